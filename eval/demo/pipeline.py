"""The demo's steps, one command each; the two trainings, and what follows them, run side by side
on a core each.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shards import atomic_write, canonical_json

from .page import write_report

OUT = Path("demo")
CONFIGS = Path("configs/demo")
VAES = ("vae-plain", "vae-equi")
GUIDANCE = 3.0
ENCODE = ["python", "-m", "encode", "run", str(CONFIGS / "encode.yaml")]
Command = Sequence[str]


class StepFailed(RuntimeError):
    """A command of the demo ended with an error; its output is above."""

    exit_code = 1


def train_command(vae: str) -> list[str]:
    """The training command of one VAE; the two differ in one value."""
    launch = ["torchrun", "--standalone", "--nproc-per-node", "1", "-m", "train"]
    return [*launch, str(CONFIGS / "train.yaml"), f"data.latents={OUT}/cache/openmoji/{vae}"]


def generate_command(vae: str) -> list[str]:
    return [
        "python", "-m", "eval", "generate", "--checkpoint", f"{OUT}/runs/train-{vae}",
        "--prompts", f"{OUT}/data/prompts.json", "--save_dir", f"{OUT}/images/{vae}",
        "--guidance_scale", str(GUIDANCE), "--batch_size", "70",
    ]  # fmt: skip


def reconstruct_command(vae: str, source: str) -> list[str]:
    return [
        "python", "-m", "eval", "reconstruct", f"{OUT}/cache/{source}/{vae}",
        "--tars", f"{OUT}/data/{source}", "--save_dir", f"{OUT}/reconstructions/{source}/{vae}",
        "--count", "280", "--batch_size", "70",
    ]  # fmt: skip


def main() -> int:
    clock: dict[str, float] = {}
    start = time.perf_counter()
    with timed("pictures", clock):
        together({"pictures": ["python", "-m", "eval.demo.data", f"{OUT}/data"]})
        put_prompts(OUT / "data")
    with timed("columns", clock):
        together({"encode": ENCODE})
    with timed("training", clock):
        together({vae: train_command(vae) for vae in VAES})
    with timed("sampling", clock):
        together({vae: generate_command(vae) for vae in VAES})
        for source in ("openmoji-val", "photos"):
            together({vae: reconstruct_command(vae, source) for vae in VAES})
    with timed("scores and page", clock):
        clock["so far"] = round(time.perf_counter() - start, 1)
        commands = [shlex.join(c) for c in (ENCODE, *map(train_command, VAES))]
        summary = write_report(OUT, VAES, CONFIGS / "classifier", commands, clock)
    print(f"\n{summary['verdict']}\n\n{OUT / 'report.html'}  {OUT / 'summary.json'}")
    return 0


def put_prompts(data: Path) -> None:
    """The held-out captions in the form that `eval generate` reads: {key: prompt}."""
    lines = [json.loads(line) for line in (data / "prompts.jsonl").read_text().splitlines()]
    atomic_write(data / "prompts.json", canonical_json({p["key"]: p["prompt"] for p in lines}))


@contextmanager
def timed(name: str, clock: dict[str, float]) -> Iterator[None]:
    """Wall seconds of a stage."""
    print(f"\n== {name}", flush=True)
    start = time.perf_counter()
    yield
    clock[name] = round(time.perf_counter() - start, 1)
    print(f"== {name}: {clock[name]:.0f} s", flush=True)


def together(commands: dict[str, Command]) -> None:
    """Run commands side by side, a core each, their output line by line behind their names.

    Raises StepFailed, and ends the others, as soon as one fails.
    """
    running = {}
    for name, command in commands.items():
        print(f"$ {shlex.join(command)}", flush=True)
        running[name] = subprocess.Popen(
            with_this_python(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    readers = [
        threading.Thread(target=relay, args=(name if len(running) > 1 else "", process))
        for name, process in running.items()
    ]
    for reader in readers:
        reader.start()
    try:
        while any(process.poll() is None for process in running.values()):
            if any(process.poll() for process in running.values()):
                break
            time.sleep(0.2)
    finally:
        for process in running.values():
            if process.poll() is None:
                process.terminate()
        for reader in readers:
            reader.join()
    failed = [name for name, process in running.items() if process.wait()]
    if failed:
        codes = {name: running[name].returncode for name in failed}
        raise StepFailed(f"exit codes {codes}; what they printed is above. Run again to go on")


def with_this_python(command: Command) -> list[str]:
    """The same command by this environment's programs, whatever PATH says."""
    program, *rest = command
    folder = Path(sys.executable).parent
    return [sys.executable if program == "python" else str(folder / program), *rest]


def relay(name: str, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{name + ' | ' if name else ''}{line.rstrip()}", flush=True)
