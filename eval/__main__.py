"""Evaluation on the command line; `--help` after a verb lists its flags.

torchrun --standalone --nproc-per-node 8 \\
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGUSR2,SIGXCPU,SIGQUIT \\
    -m eval train CONFIG data.text=cache/blip3o/gemma-ids
python -m eval generate --checkpoint demo/runs/NAME --prompts prompts.txt --save_dir images/NAME
python -m eval reconstruct demo/cache/openmoji-val/vae-plain --tars demo/data/val --save_dir images/rec
python -m eval prompts fetch geneval
python -m eval generate --checkpoint demo/runs/NAME --benchmark geneval --save_dir images/NAME/geneval
python -m eval score geneval images/NAME/geneval
python -m eval fid images/NAME/images images/real --inception /weights
python -m eval report images/A images/B --out report.html
python -m eval watch demo/runs/NAME --prompts few.txt --scorer cmmd --reference real.safetensors
"""

from __future__ import annotations

from shards.exits import run

from .commands import main

run(main)
