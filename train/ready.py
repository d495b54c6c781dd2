"""What a run needs of its machine, checked before the processes meet and a model is built: a compiler
where the config asks for one, and room for a checkpoint.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch

from configs import ConfigError
from shards import NoRoom
from shards.console import size_text

from .checkpoints import checkpoint, folders
from .config import TrainConfig
from .model.config import ComputeConfig
from .model.dit import DiT, DiTConfig
from .model.flops import parameters

log = logging.getLogger(__name__)
# on a GPU, by Triton; on a CPU, by PyTorch, which looks for one alone
COMPILERS: dict[bool, tuple[str, tuple[str, ...]]] = {
    True: ("CC", ("gcc", "clang")),
    False: ("CXX", ("clang++" if sys.platform == "darwin" else "g++",)),
}


def check_compiler(
    compute: ComputeConfig, gpu: bool, environment: Mapping[str, str] = os.environ
) -> None:
    """Raises ConfigError where torch.compile is asked for and has no compiler: it would say so in the
    first step, in many lines.
    """
    if not compute.compile:
        return
    advice = "set compute.compile=false: the same values but for rounding, slower"
    variable, names = COMPILERS[gpu]
    if variable in environment:
        names = (environment[variable],)
    if not any(shutil.which(name, path=environment.get("PATH")) for name in names):
        raise ConfigError(
            f"compute.compile: found no {' and no '.join(names)}, expected a compiler for torch.compile. Install one, "
            f"name one by {variable}, or {advice}"
        )
    if gpu and find_spec("triton") is None:
        raise ConfigError(
            f"compute.compile: found no package triton, which torch.compile needs on a GPU. Install it, or {advice}"
        )


def disk_bytes(config: TrainConfig, parameters: int) -> tuple[int, int]:
    """Returns the bytes of a checkpoint, fp32 in the ranks' states and in the whole files, and of all
    snapshots of power averages, fp16."""
    powers = len(config.ema.power or ())
    tensors = len(checkpoint.KINDS) + powers + len(checkpoint.WHOLE)
    snapshots = min(config.ema.snapshots, config.steps)
    return 4 * tensors * parameters, 2 * powers * snapshots * parameters


def check_room(config: TrainConfig, model: DiTConfig, folder: Path) -> None:
    """Raises NoRoom where the disk has less room than a checkpoint of the model takes, if the run has
    one to save; logs a warning where it has less than those that are kept.
    """
    earlier = folders.steps(folder)
    if earlier and earlier[0].name >= f"step-{config.steps:08d}":
        return
    with torch.device("meta"):
        size, snapshots = disk_bytes(config, sum(parameters(DiT(model)).values()))
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free + sum(map(_bytes, checkpoint.leftovers(folder)))
    found = f"{folder}: {size_text(free)} are free, and a checkpoint takes {size_text(size)}"
    if free < size:
        raise NoRoom(
            f"{found}. Make room, or name another folder with runs=FOLDER; a smaller `keep` does not help here"
        )
    # a save comes before the oldest is removed
    kept = max(0, config.keep - len(earlier)) + 1 + len(config.save_at)
    if free < kept * size:
        log.warning("%s: not enough for the %d that are kept at once (keep, save_at)", found, kept)
    if snapshots and free < kept * size + snapshots:
        log.warning("%s, and the snapshots of ema.power %s in all", found, size_text(snapshots))


def _bytes(path: Path) -> int:
    """Returns the bytes of a file, or of the files in a folder; another job may remove them meanwhile."""
    total = 0
    with suppress(OSError):
        for file in path.iterdir() if path.is_dir() else (path,):
            total += file.stat().st_size
    return total
