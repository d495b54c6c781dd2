"""How much room columns take and the target has: what `run` looks at before it starts.

No encoder runs here. One tar of each source is looked into, its captions are counted in tokens, and
the arithmetic of the layout gives the rest.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shards import ColumnSpec, Source, Store
from shards.column.commits import committed, read_failures
from shards.console import size_text

from ..config import EncodeConfig
from ..errors import BadTar, EncodeError, FetchFailed
from ..models.encoder import CaptionEncoder, Encoder
from .sizes import column_bytes, shard_bytes
from .survey import Look, Tar, look_at

BYTES_PER_TOKEN = 4.2  # of English captions; only where no tokenizer has seen any
TRIES = 5  # tars that are looked at before nothing is said of the room that is needed
MARGIN = 1.02  # of room: blocks of the file system, and what one tar does not tell of the others


class Claim(Protocol):
    """A source and the columns that are asked for of it. `prepare.Claim` is one."""

    @property
    def source(self) -> Source: ...

    @property
    def tars(self) -> Sequence[str]: ...

    @property
    def folder(self) -> Store: ...

    @property
    def specs(self) -> Mapping[str, ColumnSpec]: ...


class NoRoom(EncodeError, OSError):
    """The target has less free space than the columns will take."""


def lengths_of(
    encoder: CaptionEncoder | None, suffix: str, most: int, looks: Sequence[Look]
) -> list[NDArray[np.int64]]:
    """Tokens of each row of some tars, 0 where there is no caption.

    Counted where the captions are at hand; else from their bytes, at the rate seen in the others.
    """
    counted: dict[int, NDArray[np.int64]] = {}
    size = tokens = 0
    for look in looks:
        texts = look.captions.get(suffix)
        if texts is None or encoder is None:
            continue
        lengths = np.zeros(len(texts), np.int64)
        there = [i for i, text in enumerate(texts) if text is not None]
        lengths[there] = encoder.lengths([texts[i] or "" for i in there])
        counted[look.shard] = lengths
        whole = (lengths > 0) & (lengths < most)  # what was cut tells nothing of the rate
        size += int(look.member_bytes(suffix)[whole].sum())
        tokens += int(lengths[whole].sum())
    each = size / tokens if tokens else BYTES_PER_TOKEN
    found = []
    for look in looks:
        guess = np.ceil(look.member_bytes(suffix) / each).astype(np.int64) + 1
        guess = np.where(look.has(suffix), np.minimum(guess, most), 0)
        found.append(counted.get(look.shard, guess))
    return found


def free_bytes(root: Store) -> int | None:
    """Free space where columns will go; None for an object store, which does not say."""
    if root.folder is None:
        return None
    folder = root.folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def required_bytes(
    config: EncodeConfig, retry: bool, claims: Sequence[Claim], encoders: Mapping[str, Encoder]
) -> float:
    """Returns the bytes that the shards which are not committed yet will add, from one tar of each
    source; with `retry` only those that have failed before. Captions are counted in tokens.
    """
    return sum(_of_claim(config, claim, encoders, retry) for claim in claims)


def _of_claim(
    config: EncodeConfig, claim: Claim, encoders: Mapping[str, Encoder], retry: bool
) -> float:
    shards = len(claim.tars)

    def lacking(column: Store) -> list[int]:
        asked = set(read_failures(column)) if retry else set(range(shards))
        return sorted(asked - set(committed(column, shards)))

    missing = {name: lacking(claim.folder.child(name)) for name in claim.specs}
    wanted = sorted(set().union(*missing.values()))
    if not wanted:
        return 0.0
    sizes = [size for _, size in claim.source.tars]
    room = claim.source.shard_rows
    tars = [Tar(claim.tars[shard], sizes[shard], shard, room) for shard in wanted]
    suffixes = {config.columns[n].suffix for n in missing if claim.specs[n].layout.ragged}
    look = _any_look(tars, claim.folder, suffixes, config)
    if look is None:
        return 0.0
    total = 0.0
    for name, spec in claim.specs.items():
        layout, suffix = spec.layout, config.columns[name].suffix
        lengths = np.zeros(len(look.rows), np.int64)
        if layout.ragged:
            counter = encoders[name]
            assert isinstance(counter, CaptionEncoder)
            (lengths,) = lengths_of(counter, suffix, layout.row_shape[0], [look])
        each = shard_bytes(layout, look.has(suffix), lengths) / look.tar_bytes
        total += each * sum(sizes[shard] for shard in missing[name])
        total += column_bytes(layout, 0) if missing[name] else 0
    return total + look.index_bytes / look.tar_bytes * sum(tar.size for tar in tars)


def _any_look(
    tars: Sequence[Tar], folder: Store, texts: set[str], config: EncodeConfig
) -> Look | None:
    """The middle one of some tars, by size, or another that is one; None if none of a few is."""
    by_size = sorted(tars, key=lambda tar: tar.size)
    middle = len(by_size) // 2
    for tar in (by_size[middle:] + by_size[:middle][::-1])[:TRIES]:
        try:
            return look_at(tar, folder, texts, set(), config.engine.scratch_folder)
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
    need = required() * MARGIN
    if free < need:
        raise NoRoom(
            f"{root.url}: {size_text(free)} are free, what is not committed yet will take about "
            f"{size_text(need)}. Make room, or choose cheaper columns (`python -m encode plan "
            "CONFIG` shows some); --ignore-space goes on all the same"
        )
