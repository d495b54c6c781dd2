"""The command `latentbank`: `latentbank encode run CONFIG` is `python -m encode run CONFIG`, and so on.

A stage runs as the module that it is, so options, exit codes, signals and processes are the same.
"""

from __future__ import annotations

# PYTHON_ARGCOMPLETE_OK
import os
import runpy
import sys
from contextlib import suppress

from . import did_you_mean

STAGES = {
    "encode": "tars of images and captions are encoded once, into columns",
    "shards": "columns are looked at, checked, repaired, compared, converted and copied",
    "train": "a diffusion transformer is trained from columns",
    "eval": "checkpoints and VAEs are sampled, scored and compared",
}
START = "latentbank: train diffusion transformers from cached latents\n"
END = """
For example:

  latentbank encode run configs/demo/encode.yaml

`latentbank STAGE` lists the verbs of a stage.
"""


def main() -> int:
    """Runs a stage with the words behind its name; returns the exit code, if the stage returns."""
    if "_ARGCOMPLETE" in os.environ:
        from .completion import complete

        sys.path.append(os.getcwd())
        complete()
    words = sys.argv[1:]
    stage = words[0] if words else "--help"
    if stage in ("-h", "--help"):
        lines = [f"  {name:6}  {text}" for name, text in STAGES.items()]
        # for `| head -1`; what is written at once is not kept for later
        with suppress(BrokenPipeError):
            os.write(sys.stdout.fileno(), "\n".join([START, *lines, END]).encode())
        return 0
    if stage not in STAGES:
        near = did_you_mean(stage, STAGES, end="")
        expected = ", ".join(STAGES)
        message = f"WrongWords: latentbank: found {stage!r}, expected one of {expected}{near}"
        print(message, file=sys.stderr)
        return 2
    sys.argv = [stage, *words[1:]]
    sys.path.append(os.getcwd())  # as `python -m` has it; benchmarks are run from a checkout
    runpy.run_module(stage, run_name="__main__", alter_sys=True)
    return 0
