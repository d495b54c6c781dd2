"""Snapshots of a run's power averages, and averages of other lengths that are made of them.

    ema-snapshots/step-00000100/manifest.json                     written last: step, updates, lengths, sha256 of files
    ema-snapshots/step-00000100/state-00000-of-00002.safetensors  rank 0's part of both averages, in fp16

They are written as checkpoints are, whole or absent, by all ranks, and `keep` does not remove them:
a checkpoint names those that its run has made, and no others are used. Those that an abandoned
continuation left are removed when the next one is written. A checkpoint has both averages in fp32
itself, which count as the last snapshot, so a run can be sampled at any of its checkpoints.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from shards import atomic_write, canonical_json, seal, sha256_file
from shards.format.atomic import Json, fsync_path, make_durable
from shards.format.checks import Count, Digest, Fields, check

from ..config import EmaConfig
from ..model.dit import DiT
from ..ranks.world import World
from ..step.ema import PowerEmas, kind_of
from ..step.profiles import MOST, Profile, combination, exponent, snapshots_needed
from . import checkpoint, folders
from .checkpoint import CheckpointError, Manifest, State

FOLDER = "ema-snapshots"  # beside the run's checkpoints
KIND = "latentbank-ema-snapshot"
LEAST = 1e-7  # share of an average in a sum, below which fp32 does not show it
log = logging.getLogger(__name__)


class EmaLengthRefused(ValueError):
    """An average of a length that cannot be made of what a run has kept."""

    exit_code = 2


class _Snapshot(Fields):
    step: Count
    updates: Annotated[int, Field(ge=1)]
    sha256: Digest  # of its manifest


class _Power(Fields):
    lengths: Annotated[list[Annotated[float, Field(gt=0, lt=0.28)]], Field(max_length=8)]
    updates: Count
    snapshots: Annotated[list[_Snapshot], Field(max_length=100_000)]


class _Average(Fields):
    power: _Power | None = None


# Saving --------------------------------------------------------------------------------------------------------------


class PowerAverages(PowerEmas):
    """The power averages of a run, and the snapshots that it has made of them."""

    def __init__(self, weights: Sequence[Tensor], config: EmaConfig, steps: int, run: Path) -> None:
        super().__init__(weights, config.power or ())
        self.config, self.steps, self.run = config, steps, run  # steps as they are planned now
        self.snapshots: list[Json] = []  # oldest first

    def due(self, step: int) -> bool:
        """Whether a snapshot is made after this step: they are at equal distances, the last one at the
        last step."""
        if not self.config.power:
            return False
        count = self.config.snapshots
        return step * count // self.steps > (step - 1) * count // self.steps

    def record(self, updates: int) -> Json:
        """Returns what a checkpoint's manifest says of the averages; nothing where there are none."""
        if not self.config.power:
            return {}
        lengths = list(self.config.power)
        return {"power": {"lengths": lengths, "updates": updates, "snapshots": self.snapshots}}

    def go_on(self, manifest: Manifest, flats: Mapping[str, Sequence[Tensor]]) -> None:
        """Takes over averages and snapshots from the checkpoint that a run goes on from."""
        self.load(flats)
        power = check(_Average, manifest.get("average") or {}).power
        self.snapshots = [entry.model_dump() for entry in power.snapshots] if power else []

    def save(self, step: int, updates: int, model: Json, state: State, world: World) -> float:
        """Writes a snapshot after a step, if the weights have moved at all; returns the seconds that
        it took. Collective."""
        start = time.perf_counter()
        if not updates:
            return 0.0
        final = self.run / FOLDER / f"step-{step:08d}"
        staging = checkpoint.on_first(world, lambda: checkpoint.stage(final, world))
        file = staging / f"state-{world.rank:05d}-of-{world.size:05d}.safetensors"
        halves = replace(state, flats=self.halves())
        files = checkpoint.together(world, lambda: checkpoint.write_state(file, halves))

        def publish() -> Json:
            manifest = {
                "step": step,
                "updates": updates,
                "model": model,
                "lengths": list(self.config.power or ()),
                "format": KIND,
                "version": checkpoint.VERSION,
                "world": world.size,
                "files": dict(files),
                "provenance": checkpoint.provenance(),
            }
            atomic_write(staging / "manifest.json", seal(manifest))
            fsync_path(staging)
            self._remove_abandoned(final.parent, world)
            staging.rename(final)
            make_durable(final)
            digest = sha256_file(final / "manifest.json")
            return {"step": step, "updates": updates, "sha256": digest}

        self.snapshots.append(checkpoint.on_first(world, publish))
        return time.perf_counter() - start

    def _remove_abandoned(self, folder: Path, world: World) -> None:
        """Removes snapshots that the run as it goes has not made; a name vanishes before its files."""
        names = {f"step-{entry['step']:08d}" for entry in self.snapshots}
        abandoned = [path for path in folders.steps(folder) if path.name not in names]
        world.check_lock()
        for path in abandoned:
            aside = path.rename(path.with_name(f".removed-{path.name}"))
            with suppress(OSError):  # what is left goes with the next snapshot
                shutil.rmtree(aside)


# Other lengths -------------------------------------------------------------------------------------------------------


def load_of_length(where: Path, length: float) -> tuple[DiT, Manifest, str]:
    """Returns a model in eval mode on the CPU whose weights are the average of a relative length, the
    manifest of its checkpoint, and the digest that `digest_of_length` returns. `where` is as in
    `load_for_sampling`.

    EmaLengthRefused, before weights are read, where the run has not kept enough for it."""
    whole = checkpoint.WHOLE["ema"]
    path, manifest = checkpoint.step_to_sample(where, ())
    parts = _parts_of_length(path, manifest, length)
    checkpoint.verified(path, [whole])

    def load() -> dict[str, Tensor]:
        state = load_file(path / whole)  # for shapes, and for what is no weight
        sums: dict[str, Tensor] = {}
        for source, terms in parts:
            _add(sums, source, terms, state)
        return state | sums

    return checkpoint.model_of(path, manifest, load), manifest, _digest(length, parts)


def digest_of_length(where: Path, length: float) -> str:
    """Returns a digest of a length and of the files of which its average is made, by the records that
    name them: no weights are read. EmaLengthRefused where the average cannot be made."""
    return _digest(length, _parts_of_length(*checkpoint.step_to_sample(where, ()), length))


def files_of_length(where: Path, length: float) -> list[Path]:
    """Returns the files of which an average of a length is made, as `digest_of_length` takes them."""
    sources = [
        source for source, _ in _parts_of_length(*checkpoint.step_to_sample(where, ()), length)
    ]
    return [
        source.folder / name
        for source in sources
        for name in sorted(checkpoint.manifest_of(source.folder, source.kind)["files"])
        if name.startswith("state-")
    ]


def refuse_planned(config: EmaConfig, steps: int, step: int, length: float) -> None:
    """Raises EmaLengthRefused where a run of this config, of so many steps, will not have kept enough
    at a step for an average of a length."""
    if config.power is None:
        raise EmaLengthRefused(
            f"found no ema.power, of which an average of length {length:g} is made. Train with "
            "ema.power=[0.05,0.10], or sample the average of ema.decay"
        )
    count, exponents = config.snapshots, [exponent(each) for each in config.power]
    made = {-(-i * steps // count) for i in range(1, count + 1)}  # as `due` says
    kept = sorted({at for at in made if at < step} | {step})
    profiles = [Profile(at, each) for at in kept for each in exponents]
    if not combination(profiles, Profile(step, exponent(length))).close:
        count_text = f"step {step} will have {len(kept)}"
        raise EmaLengthRefused(_too_few(config.power, length, count_text, steps / step))


def _digest(length: float, parts: _Parts) -> str:
    digest = hashlib.sha256(canonical_json({"length": length}))
    for source, terms in parts:
        entry = {"updates": source.updates, "averages": sorted(terms)}
        files = checkpoint.manifest_of(source.folder, source.kind)["files"]
        states = [files[name]["sha256"] for name in sorted(files) if name.startswith("state-")]
        digest.update(canonical_json({**entry, "files": states}))
    return digest.hexdigest()


def _parts_of_length(path: Path, manifest: Manifest, length: float) -> _Parts:
    """Returns the folders with averages that an average of a length is made of, and the share of each
    average by its kind, where fp32 shows it."""
    power = _power_of(path, manifest)
    sources = _sources(path, power)
    profiles = [Profile(s.updates, exponent(each)) for s in sources for each in power.lengths]
    result = combination(profiles, Profile(power.updates, exponent(length)))
    if not result.close:
        raise EmaLengthRefused(_too_far(path, manifest, power.lengths, length, len(sources)))
    shares = iter(result.weights)
    parts = [(s, {kind_of(each): next(shares) for each in power.lengths}) for s in sources]
    shown = ((s, {kind: x for kind, x in terms.items() if abs(x) > LEAST}) for s, terms in parts)
    return [(source, terms) for source, terms in shown if terms]


@dataclass(frozen=True)
class _Source:
    """A folder with both averages after some updates: a snapshot, or the checkpoint itself."""

    folder: Path
    updates: int
    kind: str


_Parts = list[tuple[_Source, dict[str, float]]]


def _power_of(path: Path, manifest: Manifest) -> _Power:
    """Returns what a checkpoint says of its run's power averages; EmaLengthRefused where there are
    none."""
    try:
        power: _Power | None = check(_Average, manifest.get("average") or {}).power
        if power and not all(a < b for a, b in pairwise(power.lengths)):
            raise ValueError(
                f"average.power.lengths: found {power.lengths}, expected them in order"
            )
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: its manifest: {error}") from None
    if power is None or not power.lengths or not power.updates:
        raise EmaLengthRefused(
            f"{path}: found no power averages, of which one of another length is made. Train with "
            "ema.power=[0.05,0.10], or sample the average of ema.decay"
        )
    return power


def _sources(path: Path, power: _Power) -> list[_Source]:
    """Returns the snapshots that a checkpoint names, each number of updates once, and itself."""
    sources = []
    for entry in {entry.updates: entry for entry in power.snapshots}.values():
        folder = path.parent.parent / FOLDER / f"step-{entry.step:08d}"
        if entry.updates >= power.updates:
            continue
        try:
            if sha256_file(folder / "manifest.json") != entry.sha256:
                raise OSError("its manifest is another one")
        except OSError as error:
            log.warning("%s is left out: %s", folder, error)
            continue
        sources.append(_Source(folder, entry.updates, KIND))
    return [*sources, _Source(path, power.updates, checkpoint.KIND)]


def _add(
    sums: dict[str, Tensor],
    source: _Source,
    terms: Mapping[str, float],
    state: Mapping[str, Tensor],
) -> None:
    """Adds averages, each times its share, to sums by parameter."""
    manifest = checkpoint.manifest_of(source.folder, source.kind)
    names = [name for name in manifest["files"] if name.startswith("state-")]
    checkpoint.verified(source.folder, names, kind=source.kind)
    files = [source.folder / name for name in names]
    spans = {name: (0, size) for name, size in sorted(checkpoint.sizes(files).items())}
    if strange := sorted(spans.keys() - state.keys()):
        raise ValueError(f"{source.folder}: found {strange[0]}, which the model has not")
    for kind, share in terms.items():
        for name, values in checkpoint.read_ranges(files, kind, spans).items():
            term = values.view(state[name].shape).mul_(share)
            sums[name] = sums[name].add_(term) if name in sums else term


def _too_far(
    path: Path, manifest: Manifest, lengths: Sequence[float], length: float, count: int
) -> str:
    step, steps = manifest["step"], manifest.get("config", {}).get("steps")
    spread = steps / step if isinstance(steps, int) and steps > step > 0 else 1.0
    return f"{path}: {_too_few(lengths, length, f'found {count}', spread)}"


def _too_few(lengths: Sequence[float], length: float, count: str, spread: float) -> str:
    """Says that a step has too few snapshots for a length; the run is `spread` times as long."""
    needed = snapshots_needed(lengths, length)
    advice = f"It takes more than {MOST} of them"
    if needed:
        total = math.ceil(needed * spread)
        advice = (
            f"It takes {needed}, evenly spaced up to this step: train with ema.snapshots={total}"
        )
    return (
        f"{count} snapshots of averages of the lengths {' and '.join(f'{x:g}' for x in lengths)} up to this step, too "
        f"few for one of length {length:g}. {advice}"
    )
