"""One source shard through its encoders: decode once, feed every column, write blocks of 1,024
rows, commit.

    read    bring the tar here if it is elsewhere, list its rows
    decode  threads, two batches ahead, all resolutions from one decoded picture
    encode  batch by batch, in turns with the other shard of the worker; captions block by block
    write   a thread of its own
    commit  column by column

Batches depend on the shard and the config alone, so a second attempt gives the same bytes on the
same machine. The same function serves a laptop (inline) and a cluster (inside a Ray actor).
"""

from __future__ import annotations

import hashlib
import platform
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards import IndexRow, ShardWriter, Status, put_index
from shards.column.commits import commit_name, own_commit
from shards.column.members import member_of
from shards.column.source import ShardIndex
from shards.column.writer import refuse_other_members
from shards.errors import CorruptColumn, FormatVersion, NotAColumn, SourceChanged
from shards.format.atomic import Json
from shards.format.layout import ZARR_ROWS

from ..config import EngineConfig
from ..errors import BadTar, TarChanged
from ..meter import DECODE, READ, WRITE, Timer
from ..models.encoder import CaptionEncoder, Encoder, ImageEncoder
from ..source.decoding import Batch, View, decoded
from ..source.fetch import fetched
from ..source.members import passed_over, read_captions
from ..source.tars import Tar, scan_tar
from .resources import Workplace
from .tasks import ShardResult, ShardTask, Target
from .writing import Writing


def encode_shard(
    task: ShardTask, encoders: Mapping[str, Encoder], config: EngineConfig, place: Workplace
) -> ShardResult:
    """Encode one tar into every column of the task and commit each.

    Raises BadTar, SourceChanged, OSError or Aborted; what was committed stands.
    """
    with place.meter.shard(task.name) as timer, ExitStack() as stack:
        targets = {n: t for n, t in task.targets.items() if not is_committed(t, task.number)}
        if not targets:
            return ShardResult(0)
        with timer("read"):
            scratch = Path(config.scratch or tempfile.gettempdir())
            report = lambda _: timer.done()  # noqa: E731
            path = stack.enter_context(fetched(task.tar, scratch, task.size, report=report))
            tar = Tar(stack.enter_context(path.open("rb")), task.size)
            rows, note = scan_tar(tar.file, task.shard_rows)
            tar.check()
            index = put_index(task.folder, task.fingerprint, task.number, rows, note)
        writers = {
            name: stack.enter_context(
                ShardWriter(t.store, t.spec, t.digest, task.number, len(rows), index.digest)
            )
            for name, t in targets.items()
        }
        stack.enter_context(withdrawing(writers.values(), tar))
        encoding = {name: encoders[name] for name in writers}
        shard = Shard(task, rows, index, tar.file.fileno(), encoding, config)
        writing = stack.enter_context(Writing(writers, timer))
        shard.encode(place, timer, writing)
        with timer.waiting(WRITE):
            writing.finish()
            tar.check()
            members = shard.members()
            refuse_others(task, members)
            counts = {}
            for name, writer in writers.items():
                with timer(f"write {name}"):
                    seconds = seconds_of(timer.seconds, name)
                    told = {**provenance(encoders[name], config), "seconds": seconds}
                    told["passed_over"] = shard.passed_over(name)
                    commit = writer.commit(told, members[name])
                values, amounts = np.unique(commit.status(), return_counts=True)
                counts[name] = {
                    Status(int(v)).name.lower(): int(n)
                    for v, n in zip(values, amounts, strict=True)
                }
        return ShardResult(
            len(rows), counts, by_stage(timer.seconds), by_stage(timer.cpu), note
        )  # fmt: skip


@contextmanager
def withdrawing(writers: Iterable[ShardWriter], tar: Tar) -> Iterator[None]:
    """Take back what a failed attempt has written if the tar was to blame: the next attempt would
    adopt it as sound. After any other failure it stays, and is gone on with.
    """
    try:
        yield
    except BaseException as error:
        to_blame = isinstance(error, (BadTar, SourceChanged))
        try:
            tar.check()
        except BadTar:
            to_blame = True
        for writer in writers if to_blame else ():
            writer.withdraw()
        raise


def is_committed(target: Target, shard: int) -> bool:
    """Whether a shard of a column is done, by an earlier attempt or another run."""
    return target.store.size(commit_name(shard)) is not None


def refuse_others(task: ShardTask, members: Mapping[str, Mapping[str, str]]) -> None:
    """Raise SourceChanged if a column that stands was made of other members of this tar than those
    that were read now, TarChanged if two of these columns read different ones.
    """
    now: dict[str, str] = {}
    for suffix, digest in (item for said in members.values() for item in said.items()):
        if now.setdefault(suffix, digest) != digest:
            raise TarChanged(f"{task.tar}: its {suffix} members were replaced while they were read")
        for peer in task.peers.get(suffix, ()):
            with suppress(NotAColumn, CorruptColumn, FormatVersion):  # not committed, or damaged
                commit = own_commit(peer.store, peer.digest, task.number)
                refuse_other_members(peer.store, commit, {suffix: digest})


@dataclass
class Shard:
    """The rows of one tar on their way through the encoders."""

    task: ShardTask
    rows: Sequence[IndexRow]
    index: ShardIndex
    tar: int  # the open file
    encoders: Mapping[str, Encoder]
    config: EngineConfig

    def __post_init__(self) -> None:
        self.images = {n: e for n, e in self.encoders.items() if isinstance(e, ImageEncoder)}
        self.captions = {n: e for n, e in self.encoders.items() if isinstance(e, CaptionEncoder)}
        self.views = list(dict.fromkeys(encoder.view for encoder in self.images.values()))
        self._pictures: dict[str, Any] = {view.suffix: hashlib.sha256() for view in self.views}
        self._texts: dict[str, Any] = {name: hashlib.sha256() for name in self.captions}

    def members(self) -> dict[str, dict[str, str]]:
        """What each column has read of the tar, by suffix; see `shards.column.members`."""
        images = {n: (e.view.suffix, self._pictures[e.view.suffix]) for n, e in self.images.items()}
        texts = {n: (member_of(e.suffix), self._texts[n]) for n, e in self.captions.items()}
        return {
            name: {suffix: digest.hexdigest()}
            for name, (suffix, digest) in (images | texts).items()
        }

    def passed_over(self, name: str) -> dict[str, int]:
        """See `members.passed_over`."""
        if name in self.captions:
            return passed_over(self.rows, self.captions[name].suffix, pictures=False)
        return passed_over(self.rows, self.images[name].view.suffix, pictures=True)

    def encode(self, place: Workplace, timer: Timer, writing: Writing) -> None:
        """Every block through every encoder and on to the writer."""
        turn = place.number()
        with ExitStack() as stack:
            if self.images:
                batches = stack.enter_context(closing(self._batches(place, timer)))
            for start in range(0, len(self.rows), ZARR_ROWS):
                block = self.rows[start : start + ZARR_ROWS]
                if self.images:
                    pictures = Pictures(self.images, self.task.targets, len(block))
                    while pictures.rows < len(block):
                        place.check()
                        with timer.waiting(DECODE), timer("wait"):
                            batch = next(batches)
                        for suffix, digests in batch.digests.items():
                            self._pictures[suffix].update(digests)
                        pictures.add(batch, place, turn, timer)
                        timer.done(batch.span[1] - batch.span[0])
                    for name in self.images:
                        writing.put(name, *pictures.block(name))
                for name, encoder in self.captions.items():
                    place.check()
                    self._captions(name, encoder, block, place, turn, timer, writing)
                timer.done(0 if self.images else len(block))
                writing.end_block()

    def _batches(self, place: Workplace, timer: Timer) -> Generator[Batch, None, None]:
        if self.task.remote:
            from .remote_decode import decoded_elsewhere

            return decoded_elsewhere(self.task, self.index, self.views, self.config)
        return decoded(
            self.rows, self.tar, self.views, self.config.batch, place.decoding, timer
        )  # fmt: skip

    def _captions(
        self, name: str, encoder: CaptionEncoder, block: Sequence[IndexRow], place: Workplace,
        turn: int, timer: Timer, writing: Writing,
    ) -> None:  # fmt: skip
        """One column of captions of a block. Encoded text is large: a worker holds two such
        blocks.
        """
        with timer.waiting(READ), timer("read"):
            captions, status = read_captions(
                block, self.tar, encoder.suffix, self._texts[name].update
            )
        with timer.waiting(WRITE):
            place.texts.acquire()
        try:
            with place.turns.turn(turn), timer.encodes(name):
                values = encode_captions(captions, encoder, self.config.tokens)
        except BaseException:
            place.texts.release()
            raise
        writing.put(name, values, status, place.texts.release)


class Pictures:
    """The image columns of one block, filled batch by batch."""

    def __init__(
        self, encoders: Mapping[str, ImageEncoder], targets: Mapping[str, Target], count: int
    ) -> None:
        self.rows, self._count = 0, count
        self._encoders, self._targets = encoders, targets
        self._values: dict[str, NDArray[Any]] = {}
        self._status: dict[str, NDArray[np.uint8]] = {}

    def add(self, batch: Batch, place: Workplace, turn: int, timer: Timer) -> None:
        """Run the encoders on the next batch; rows without a picture are left out of it."""
        count = batch.span[1] - batch.span[0]
        good = {suffix: batch.good(suffix) for suffix in batch.status}
        for suffix, status in batch.status.items():
            whole = self._status.setdefault(suffix, np.zeros(self._count, np.uint8))
            whole[self.rows : self.rows + count] = status
        shown: dict[View, NDArray[np.uint8]] = {}
        for view, images in batch.images.items():
            mine = good[view.suffix]
            shown[view] = images if len(mine) == count else images[mine]
        for name, encoder in self._encoders.items():
            mine = good[encoder.view.suffix]
            if not len(mine):
                continue
            with place.turns.turn(turn), timer.encodes(name):
                words = encoder.rows(shown[encoder.view])
            if name not in self._values:  # the writer blanks what is not set here
                self._values[name] = np.zeros((self._count, *words.shape[1:]), words.dtype)
            self._values[name][self.rows + mine] = words
        self.rows += count

    def block(self, name: str) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """Values and status of a column, once all rows are in."""
        encoder = self._encoders[name]
        status = self._status[encoder.view.suffix]
        if name not in self._values:  # not one picture of the block could be decoded
            return self._targets[name].spec.layout.blank(self._count), status
        return self._values.pop(name), status


def encode_captions(
    captions: Sequence[str | None], encoder: CaptionEncoder, budget: int
) -> list[NDArray[Any]]:
    """The words of each row; none where there is no caption."""
    there = [i for i, caption in enumerate(captions) if caption is not None]
    values = [encoder.blank] * len(captions)
    encoded = encoder.rows([captions[i] or "" for i in there], budget) if there else []
    for i, words in zip(there, encoded, strict=True):
        values[i] = words
    return values


def by_stage(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of a shard by stage; writing is told column by column until here."""
    found: dict[str, float] = {}
    for stage, passed in seconds.items():
        name = "write" if stage.startswith("write ") else stage
        found[name] = found.get(name, 0.0) + passed
    return found


def seconds_of(seconds: Mapping[str, float], column: str) -> dict[str, float]:
    """What one column's commit tells of the time: its own encoder and writing, and what all share."""
    shared = ("read", "decode", "wait")
    mine = {stage: seconds[stage] for stage in shared if stage in seconds}
    mine |= {column: seconds.get(column, 0.0), "write": seconds.get(f"write {column}", 0.0)}
    return {stage: round(passed, 3) for stage, passed in mine.items()}


@cache
def versions() -> Json:
    """Of what decides the values; read once, as it was loaded once."""
    libraries = ("torch", "diffusers", "transformers", "pillow", "numpy")
    return {name: version(name) for name in libraries}


def provenance(encoder: Encoder, config: EngineConfig) -> Json:
    """What may differ between two attempts at the same column; recorded in commits, never
    compared.
    """
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": versions(),
        **encoder.runs_on(),
        "batch": config.batch,
        "tokens": config.tokens,
    }
