"""Train a diffusion transformer from a latent column and a text column.

    python -m train configs/demo/train.yaml data.latents=demo/cache/openmoji/vae-plain             # a CPU
    torchrun --standalone --nproc-per-node 8 -m train configs/train/dit3b_256.yaml data.latents=cache/blip3o/flux \\
        data.text=cache/blip3o/gemma                                                               # a node

Run it again to go on from the last checkpoint. Another VAE is another `data.latents`, and nothing else.
Exit codes: 0 done; 2 something to put right, said on stderr; 3 a loss or gradient was not finite; 4 a rank died or
stood still, which the others name; 5 another job trains in the same folder; 143 after SIGTERM and 130 after SIGINT,
each with a checkpoint of the step in progress. All ranks leave with the same one (torchrun leaves with a code of its
own, and gives its ranks 30 seconds).
"""

import logging
import os
import sys
from pathlib import Path

import configs
from configs import ConfigError

from .config import TrainConfig, run_folder


def main() -> int:
    if len(sys.argv) < 2 or "=" in sys.argv[1]:
        raise ConfigError(f"expected a config file as the first word\n{__doc__}")
    path = Path(sys.argv[1])
    config = configs.load(TrainConfig, path, sys.argv[2:])
    leader = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if leader else logging.WARNING, format="%(message)s", stream=sys.stdout
    )
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger(__package__).setLevel(logging.INFO if leader else logging.WARNING)
    from .run import fit  # torch and the columns' readers are loaded once the config is right

    return fit(config, run_folder(config, path))


if __name__ == "__main__":
    configs.run(main)
