"""Checkpoints: complete or absent, readable without this code, loadable at any world size, and
never a pickle.

    checkpoints/step-00000100/manifest.json                       written last: what this is, and every file's sha256
    checkpoints/step-00000100/state-00000-of-00002.safetensors    rank 0's part of weights, exp_avg, exp_avg_sq and ema
    checkpoints/step-00000100/weights.safetensors                 all weights under the reference's parameter names
    checkpoints/step-00000100/ema.safetensors                     their moving average, the same
    checkpoints/step-00000100/norm.safetensors                    shift and scale, where they were measured of the rows
    checkpoints/latest                                            a hint for people; nothing here reads it
    checkpoints/.staging-step-00000300-<owner>                    one that a job is writing; the owner is its lease
    checkpoints/.damaged-step-00000200                            the last one that was passed over, set aside

A state file holds 1-D fp32 tensors `<kind>/<parameter>`; its metadata `ranges` says which elements
of the flattened parameter they are: {"<parameter>": [start, stop, total]}. Saving goes: stage in a
hidden folder, fsync, read back, manifest, rename. A folder named step-* is therefore whole, unless
the disk failed it later, which the sha256 shows. What a crash leaves has a name with a dot before
it, and goes with the next save.

A job may be suspended at any line (SIGSTOP, a paused machine), lose the run's lock meanwhile and
wake up beside its successor. So what is deleted is listed first, then the lock is checked, then it
is deleted: what the successor makes is not in the list. Names of what is in progress differ by
owner.
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from shards import FormatVersion, LeaseHeld, ShardsError, atomic_write, seal, sha256_file, unseal
from shards.format.atomic import TEMPORARY, Json, fsync_path, make_durable, make_readable, naming
from shards.format.checks import BaseName, Count, Digest, Fields, check

from ..model.dit import DiT, DiTConfig
from ..ranks.world import World
from ..step.engine import Fragment
from .folders import steps
from .norm import FILE as NORM_FILE
from .norm import norm_tensors

KIND, VERSION = "latentbank-checkpoint", 1
KINDS = ("weights", "exp_avg", "exp_avg_sq", "ema")
LEFTOVERS = (".staging-*", ".removed-*", f"{TEMPORARY}*")  # by a crash in the midst of a save
WHOLE = {"weights": "weights.safetensors", "ema": "ema.safetensors"}
MOST = 1 << 24  # of any size of a model
Manifest = dict[str, Any]
Progress = Callable[[str], None]  # is called with what is about to be read
log = logging.getLogger(__name__)


class _File(Fields):
    bytes: Count
    sha256: Digest


class _Manifest(Fields):
    """The fields that are computed with; the rest is compared and shown, whatever it says."""

    step: Count
    model: dict[str, Any]
    files: Annotated[dict[BaseName, _File], Field(max_length=1 << 20)]
    data: dict[str, Any] = {}
    position: Count = 0


def _silent(at: str) -> None:
    pass


class CheckpointError(RuntimeError):
    """A checkpoint that is absent, damaged, or could not be written."""

    exit_code = 2


@dataclass(frozen=True)
class State:
    """What a rank saves and loads: flat fp32 partitions by kind, and which elements they are."""

    fragments: Sequence[Fragment]
    totals: Mapping[str, int]  # elements of each whole parameter
    flats: Mapping[str, Sequence[Tensor]]  # kind -> partition tensors


# Saving --------------------------------------------------------------------------------------------------------------


def save(
    folder: Path,
    state: State,
    model: DiT,
    record: Mapping[str, Any],
    world: World,
    keep: int,
    kept: Sequence[int] = (),
) -> Path:
    """Writes `folder/step-<record["step"]>`, all ranks together; returns it. The oldest beyond
    `keep` are removed, but for those of the steps `kept`.

    An error of one rank is raised on all, and leaves the existing checkpoints as they were."""
    final = folder / f"step-{record['step']:08d}"
    staging = on_first(world, lambda: stage(final, world))
    file = staging / f"state-{world.rank:05d}-of-{world.size:05d}.safetensors"
    states = together(world, lambda: write_state(file, state))

    def publish() -> None:
        files = states + _write_whole(staging, [staging / name for name, _ in states], model, world)
        if norm := norm_tensors(record):
            files.append(write_tensors(staging / NORM_FILE, norm, {}))
        manifest = {
            **record,
            "format": KIND,
            "version": VERSION,
            "world": world.size,
            "files": dict(files),
            "provenance": provenance(),
        }
        atomic_write(staging / "manifest.json", seal(manifest))
        world.check_lock()
        _replace(staging, final, world)
        world.check_lock()
        atomic_write(folder / "latest", f"{final.name}\n".encode())
        _prune(final, keep, world, kept)

    on_first(world, publish)
    return final


def stage(final: Path, world: World) -> Path:
    """Makes an empty staging folder, and removes what crashes and jobs that lost the lock left."""
    listed = leftovers(final.parent)
    world.check_lock()
    for path in listed:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    staging = final.with_name(f".staging-{final.name}-{world.owner}")
    staging.mkdir(parents=True)
    return staging


def leftovers(folder: Path) -> list[Path]:
    """Returns what crashes left in a folder of steps, which the next save removes."""
    return [path for pattern in LEFTOVERS for path in folder.glob(pattern)]


def _replace(staging: Path, final: Path, world: World) -> None:
    """Renames the staged folder; one of that name was damaged and passed over, and is set aside."""
    fsync_path(staging)
    if final.exists():
        _set_aside(final, world)
    staging.rename(final)
    make_durable(final)


def _prune(newest: Path, keep: int, world: World, kept: Sequence[int]) -> None:
    """Keeps the checkpoint just written and those before it, `keep` in all, and those of the steps
    `kept`. Those of later steps were damaged, and passed over on resume. A name vanishes before the
    files below it do."""
    listed = steps(newest.parent)
    world.check_lock()
    for damaged in reversed([path for path in listed if path.name > newest.name]):
        _set_aside(damaged, world)
    names = {f"step-{step:08d}" for step in kept}
    earlier = [path for path in listed if path.name <= newest.name and path.name not in names]
    for old in earlier[keep:]:
        aside = old.rename(old.with_name(f".removed-{old.name}"))
        with suppress(OSError):  # what is left goes with the next save
            shutil.rmtree(aside)


def _set_aside(damaged: Path, world: World) -> None:
    """Keeps the last damaged folder; it is put back if it is another job's by now."""
    for earlier in damaged.parent.glob(".damaged-*"):
        shutil.rmtree(earlier, ignore_errors=True)
    aside = damaged.rename(damaged.with_name(f".damaged-{damaged.name}"))
    try:
        world.check_lock()
    except LeaseHeld:
        aside.rename(damaged)
        raise


def together(world: World, work: Callable[[], Any]) -> list[Any]:
    """Does work on each rank and returns all results everywhere; an error on one rank is raised on
    all. Where it came of another job that has the folder by now, it is RunLocked."""

    def named() -> Any:
        try:
            return work()
        except ShardsError:
            raise  # has its own exit code
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"rank {world.rank}: {error}") from error

    world.phase("saving or loading a checkpoint")
    try:
        return world.together(named)
    except CheckpointError:
        world.together(world.check_lock)
        raise


def on_first(world: World, work: Callable[[], Any]) -> Any:
    """Does work on rank 0 and returns its result everywhere."""
    return together(world, work if world.rank == 0 else lambda: None)[0]


def write_state(path: Path, state: State) -> tuple[str, Json]:
    tensors = {
        f"{kind}/{f.name}": f.of(flats).cpu()
        for kind, flats in state.flats.items()
        for f in state.fragments
    }
    ranges = {f.name: [f.start, f.stop, state.totals[f.name]] for f in state.fragments}
    metadata = {
        "format": KIND,
        "version": str(VERSION),
        "ranges": json.dumps(ranges, sort_keys=True),
    }
    return write_tensors(path, tensors, metadata)


def _write_whole(
    folder: Path, states: Sequence[Path], model: DiT, world: World
) -> list[tuple[str, Json]]:
    """Puts weights and average together from the state files, which shows that they can be read."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    buffers = {name: b.cpu() for name, b in model.named_buffers()}
    files = []
    for kind, name in WHOLE.items():
        world.progress(f"writing {name}")
        parts = read_ranges(states, kind, {n: (0, shape.numel()) for n, shape in shapes.items()})
        tensors = {n: parts[n].view(shape) for n, shape in shapes.items()}
        files.append(write_tensors(folder / name, tensors | buffers, {}))
    return files


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> tuple[str, Json]:
    """Writes a safetensors file; returns its name and its entry in a manifest."""
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error
    with naming(path):
        make_readable(path)
        fsync_path(path)
        return path.name, {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


@cache
def provenance() -> dict[str, Any]:
    """Returns versions and machine, which are recorded and never compared."""
    packages = {name: version(name) for name in ("torch", "deepspeed", "safetensors", "numpy")}
    return {**packages, "python": platform.python_version(), "machine": platform.machine()}


# Finding -------------------------------------------------------------------------------------------------------------


def manifest_of(path: Path, kind: str = KIND) -> Manifest:
    """Returns the manifest of a checkpoint; CheckpointError where it is damaged, FormatVersion
    where another release wrote it, which is no damage."""
    try:
        manifest = unseal(path / "manifest.json", kind, VERSION)
        check(_Manifest, manifest)
        return manifest
    except (ShardsError, OSError, ValueError) as error:
        if isinstance(error, FormatVersion) and (error.sound or error.newer):
            raise
        raise CheckpointError(f"{path} is damaged: {error}") from None


def verified(
    path: Path, names: Iterable[str] | None = None, progress: Progress = _silent, kind: str = KIND
) -> Manifest:
    """Returns the manifest of a checkpoint once its files (all, or those of these names) are found
    to be as they were written; else CheckpointError."""
    manifest = manifest_of(path, kind)
    try:
        for name in manifest["files"] if names is None else names:
            progress(f"checking {path.name}/{name}")
            file, entry = path / name, manifest["files"][name]
            if file.stat().st_size != entry["bytes"] or sha256_file(file) != entry["sha256"]:
                raise OSError(f"{name} is not the {entry['bytes']} bytes that its manifest names")
    except (OSError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    return manifest


def newest(folder: Path, progress: Progress = _silent) -> tuple[Path, Manifest] | None:
    """Returns the newest whole checkpoint, None if there is none at all; a damaged one is logged
    and passed over."""
    damaged = 0
    for path in steps(folder):
        try:
            return path, verified(path, progress=progress)
        except CheckpointError as error:
            damaged += 1
            log.warning("%s. Falling back to the checkpoint before it", error)
    if damaged:
        raise CheckpointError(
            f"{folder}: all {damaged} checkpoints are damaged. Move them away to start over"
        )
    return None


def pins(folder: Path) -> dict[str, Any] | None:
    """Returns what the checkpoints of a run say of its columns, so that the same snapshots are
    opened again; None if there are none."""
    return cast(dict[str, Any] | None, recorded(folder, "data"))


def recorded(folder: Path, part: str) -> Any:
    """Returns a part of the manifests of a run's checkpoints that is the same in all, so the newest
    that can be read will do, whatever became of its weights; None if there are none.

    FormatVersion where another release wrote any of them: this one must neither pass it over nor
    remove it."""
    value = None
    for path in steps(folder):  # all of them, for their versions
        with suppress(CheckpointError):
            older = manifest_of(path).get(part)
            value = value or older
    return value


# Loading -------------------------------------------------------------------------------------------------------------


def load(path: Path, manifest: Manifest, state: State, progress: Progress = _silent) -> State:
    """Returns the same fragments from a checkpoint that any number of ranks may have written."""
    files = [path / name for name in manifest["files"] if name.startswith("state-")]
    ranges = {f.name: (f.start, f.stop) for f in state.fragments}
    flats = {
        kind: [torch.zeros_like(flat) for flat in parts] for kind, parts in state.flats.items()
    }
    for kind, parts in flats.items():
        progress(f"reading {kind} of {path.name}")
        read = read_ranges(files, kind, ranges)
        for fragment in state.fragments:
            fragment.of(parts).copy_(read[fragment.name])
    return replace(state, flats=flats)


def read_ranges(
    files: Sequence[Path], kind: str, spans: Mapping[str, tuple[int, int]]
) -> dict[str, Tensor]:
    """Returns elements [start, stop) of each parameter, 1-D fp32, from the state files."""
    out = {name: torch.empty(stop - start) for name, (start, stop) in spans.items()}
    missing = {name: stop - start for name, (start, stop) in spans.items()}
    for path in files:
        with _opened(path) as file:
            ranges = json.loads(file.metadata()["ranges"])
            for name in ranges.keys() & spans.keys():
                (start, stop), (first, last, _) = spans[name], ranges[name]
                low, high = max(start, first), min(stop, last)
                if low < high:
                    part = file.get_slice(f"{kind}/{name}")[low - first : high - first]
                    out[name][low - start : high - start] = part
                    missing[name] -= high - low
    if lacking := [name for name, count in missing.items() if count]:
        raise CheckpointError(
            f"{files[0].parent}: {kind} of {lacking[0]} is not whole in the state files"
        )
    return out


def sizes(files: Sequence[Path]) -> dict[str, int]:
    """Returns the elements of each whole parameter of which state files hold a part."""
    totals: dict[str, int] = {}
    for path in files:
        with _opened(path) as file:
            ranges = json.loads(file.metadata()["ranges"])
            totals |= {name: total for name, (_, _, total) in ranges.items()}
    return totals


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError, RuntimeError) as error:  # the last from torch, which maps it
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def load_for_sampling(where: Path, ema: bool = True) -> tuple[DiT, Manifest]:
    """Returns a model in eval mode on the CPU and its manifest, from a run folder, a folder of
    steps (of either the newest), or a step folder; trained here or imported."""
    name = WHOLE["ema" if ema else "weights"]
    path, manifest = step_to_sample(where, [name])
    return model_of(path, manifest, lambda: load_file(path / name)), manifest


def step_to_sample(where: Path, names: Sequence[str]) -> tuple[Path, Manifest]:
    """Returns the folder and the manifest of a step, or of the newest one that is whole; of a step,
    the files of these names are verified."""
    folder = where / "checkpoints" if (where / "checkpoints").is_dir() else where
    if (where / "manifest.json").is_file():
        return where, verified(where, names)
    if (checkpoint := newest(folder)) is not None:
        return checkpoint
    advice = "Train first"
    if any(where.glob("*/mp_rank_00_model_states.pt")):
        advice = f"It is the reference's: python -m train import {where} OUT"
    raise CheckpointError(
        f"{where}: found no checkpoint there, expected a run folder or one of its steps. {advice}"
    )


def model_of(path: Path, manifest: Manifest, load: Callable[[], Mapping[str, Tensor]]) -> DiT:
    """Returns the model of a step in eval mode on the CPU, with the weights that `load` reads."""
    try:
        state = load()
        config = DiTConfig.model_validate(manifest["model"])
        if config.layers > len(state) or any(
            n > MOST for n in vars(config).values() if type(n) is int
        ):
            raise ValueError("the model is larger than any")
        with torch.device("meta"):  # no memory, and no time for weights that are replaced
            model = DiT(config)
        model.load_state_dict(state, assign=True)
    except (ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: its weights do not fit its manifest: {error}") from None
    return model.eval()
