"""How much room columns take and the target has: what `run` looks at before it starts.

No encoder runs here. One tar of each source is sampled, its captions are counted in tokens, and the
arithmetic of the layout gives the rest.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards import Store
from shards.column import committed, read_failures
from shards.console import size_text

from ..config import EncodeConfig
from ..errors import BadTar, EncodeError, FetchFailed
from ..models.encoder import CaptionEncoder, Encoder
from .sample_source import SourceJob, TarSample
from .sizes import column_bytes, shard_bytes

BYTES_PER_TOKEN = 4.2  # of English captions; only where no tokenizer has seen any
TRIES = 5  # tars that are tried before nothing is said of the room that is needed
MARGIN = 1.02  # blocks of the file system, and what one tar does not tell of the others


class NoRoom(EncodeError, OSError):
    """The target has less free space than the columns will take."""


@dataclass(frozen=True, slots=True)
class DiskSpace:
    """What the target has and what a run needs there, in bytes."""

    root: str
    missing: float  # still to be written
    free: int | None  # None: an object store does not say

    @property
    def needed(self) -> float:
        return self.missing * MARGIN

    @property
    def fits(self) -> bool | None:
        """None where nobody knows."""
        return None if self.free is None else self.free >= self.needed

    def verdict(self) -> str:
        if self.free is None:
            return f"{self.root}: free space unknown (an object store does not say)"
        verdict = "it fits" if self.fits else "it does NOT fit, `run` will refuse"
        return (
            f"{self.root}: {size_text(self.free)} free, {size_text(self.needed)} needed: {verdict}"
        )


def lengths_of(
    encoder: Encoder, suffix: str, max_tokens: int, samples: Sequence[TarSample]
) -> list[NDArray[np.int64]]:
    """Returns the tokens, up to `max_tokens`, of each row of some tars, 0 where it has no caption.

    Counted where the captions are at hand; else from their bytes, at the rate seen in the others.
    """
    assert isinstance(encoder, CaptionEncoder)
    counts: dict[int, NDArray[np.int64]] = {}
    size = tokens = 0
    for sample in samples:
        if suffix not in sample.captions:
            continue
        lengths = np.zeros(len(sample.rows), np.int64)
        lengths[sample.has(suffix)] = encoder.lengths(
            [caption for caption in sample.captions[suffix] if caption is not None]
        )
        counts[sample.shard] = lengths
        uncut = (lengths > 0) & (lengths < max_tokens)  # what was cut tells nothing of the rate
        size += int(sample.member_bytes(suffix)[uncut].sum())
        tokens += int(lengths[uncut].sum())
    rate = size / tokens if tokens else BYTES_PER_TOKEN

    def estimated(sample: TarSample) -> NDArray[np.int64]:
        guess = np.ceil(sample.member_bytes(suffix) / rate).astype(np.int64) + 1
        return np.where(sample.has(suffix), np.minimum(guess, max_tokens), 0)

    return [counts.get(sample.shard, estimated(sample)) for sample in samples]


def free_bytes(root: Store) -> int | None:
    """Returns the free space where columns will go; None for an object store, which does not say."""
    if root.folder is None:
        return None
    folder = root.folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def required_bytes(
    config: EncodeConfig, retry: bool, jobs: Sequence[SourceJob], encoders: Mapping[str, Encoder]
) -> float:
    """Returns the bytes that the shards which are not committed yet will add, from one tar of each
    source; with `retry` only those that have failed before. Captions are counted in tokens.
    """
    return sum(_of_source(config, retry, job, encoders) for job in jobs)


def _of_source(
    config: EncodeConfig, retry: bool, job: SourceJob, encoders: Mapping[str, Encoder]
) -> float:
    def lacking(column: Store) -> set[int]:
        shards = range(len(job.tars))
        tries = set(read_failures(column)) if retry else set(shards)
        return tries - set(committed(column, len(shards)))

    missing = {name: lacking(job.folder.child(name)) for name in job.specs}
    sizes = [size for _, size in job.source.tars]
    shards = sorted(set().union(*missing.values()), key=lambda shard: (sizes[shard], shard))
    suffixes = {job.suffix(config, n) for n in missing if job.specs[n].layout.ragged}
    sample = _middle_sample(job, shards, suffixes)
    if sample is None:
        return 0.0
    total = sample.index_bytes / sample.tar_bytes * sum(sizes[shard] for shard in shards)
    for name, spec in job.specs.items():
        layout, suffix = spec.layout, job.suffix(config, name)
        lengths = np.zeros(len(sample.rows), np.int64)
        if layout.ragged:
            (lengths,) = lengths_of(encoders[name], suffix, layout.row_shape[0], [sample])
        ratio = shard_bytes(layout, sample.has(suffix), lengths) / sample.tar_bytes
        total += ratio * sum(sizes[shard] for shard in missing[name])
        if missing[name]:
            total += column_bytes(layout, 0, statistics=config.engine.statistics)
    return total


def _middle_sample(job: SourceJob, shards: Sequence[int], captions: set[str]) -> TarSample | None:
    """Returns a sample of the middle tar, by size, or of the nearest that can be read; None if none
    of a few can, or there is none.
    """
    middle = len(shards) // 2
    for shard in [*shards[middle:], *shards[:middle][::-1]][:TRIES]:
        try:
            return job.sample(shard, captions)
        except (BadTar, FetchFailed):
            continue  # it is reported when its turn comes
    return None


def refuse_if_full(root: Store, required: Callable[[], float]) -> None:
    """Raises NoRoom if the target has less free space than a run will write; `required` counts the
    bytes, where the target says what is free. `run` calls it, unless it is told `--ignore-space`.
    """
    free = free_bytes(root)
    if free is None:
        return
    space = DiskSpace(root.url, required(), free)
    if not space.fits:
        raise NoRoom(
            f"{root.url}: {size_text(free)} are free, what is not committed yet will take about "
            f"{size_text(space.needed)}. Make room, or choose cheaper columns (`python -m encode plan "
            "CONFIG` shows some); --ignore-space goes on all the same"
        )
