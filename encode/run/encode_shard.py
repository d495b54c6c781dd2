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
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards import (
    CorruptColumn,
    FormatVersion,
    IndexRow,
    NotAColumn,
    ShardWriter,
    SourceChanged,
    Status,
    put_index,
    sha256,
)
from shards.column import (
    TAR_BYTES,
    ShardIndex,
    commit_name,
    index_name,
    member_of,
    own_commit,
    refuse_other_members,
    suffix_read,
)
from shards.format import ZARR_ROWS
from shards.format.atomic import Json

from ..config import EngineConfig
from ..errors import BadTar, TarChanged
from ..meter import DECODE, READ, WRITE, Timer
from ..models.encoder import CaptionEncoder, Encoder, ImageEncoder
from ..source.decoding import Batch, View, decoded
from ..source.fetch import fetched
from ..source.members import passed_over, read_captions
from ..source.tars import Tar, scan_tar
from ..tasks import ShardResult, ShardTask, Target
from .resources import WorkerResources
from .writing import Writing


def encode_shard(
    task: ShardTask, encoders: Mapping[str, Encoder], config: EngineConfig,
    resources: WorkerResources,
) -> ShardResult:  # fmt: skip
    """Encodes one tar into every column of the task and commits each; writes its index if it has none.

    Raises BadTar, SourceChanged, OSError or Aborted; what was committed stays.
    """
    with resources.meter.shard(task.name) as timer, ExitStack() as stack:
        targets = {n: t for n, t in task.targets.items() if not is_committed(t, task.number)}
        has_index = task.folder.size(index_name(task.number)) is not None
        if not targets and has_index:
            return ShardResult(0)
        with timer("read"):
            path = stack.enter_context(
                fetched(task.tar, config.scratch_folder, task.size, report=lambda _: timer.done())
            )
            tar = Tar(stack.enter_context(path.open("rb")), task.size)
            rows, note = scan_tar(tar.file, task.shard_rows)
            tar.check()
            if has_index and task.fetched_again and not has_commit(task):
                task.folder.delete(index_name(task.number))  # of the tar as it was when it failed
                has_index = False
            if not has_index:
                note = note_of_commits(task, rows, note)
            index = put_index(task.folder, task.fingerprint, task.number, rows, note)
        if not targets:
            return ShardResult(0)
        writers = {
            name: stack.enter_context(_writer(t, task.number, len(rows), index.digest, config))
            for name, t in targets.items()
        }
        stack.enter_context(withdrawing(writers.values(), tar))
        writing = stack.enter_context(Writing(writers, timer))
        shard = Shard(
            task, rows, index, tar.file.fileno(), {name: encoders[name] for name in writers},
            config, resources, timer, writing,
        )  # fmt: skip
        shard.encode()
        with timer.waiting(WRITE):
            writing.finish()
            tar.check()
            members = shard.members()
            refuse_others(task, members)
            counts = {}
            for name, writer in writers.items():
                with timer(f"write {name}"):
                    record = provenance(encoders[name], config)
                    record["seconds"] = seconds_of(timer.seconds, name)
                    record["passed_over"] = shard.passed_over(name)
                    if task.fetched_again:
                        record[TAR_BYTES] = task.size
                    commit = writer.commit(record, members[name])
                numbers = Counter(commit.status().tolist())
                counts[name] = {Status(n).name.lower(): numbers[n] for n in sorted(numbers)}
        return ShardResult(len(rows), counts, note)


def _writer(target: Target, shard: int, rows: int, index: str, config: EngineConfig) -> ShardWriter:
    return ShardWriter(
        target.store, target.spec, target.digest, shard, rows, index, config.statistics
    )


@contextmanager
def withdrawing(writers: Iterable[ShardWriter], tar: Tar) -> Iterator[None]:
    """Takes back what a failed attempt has written if the tar was to blame: the next attempt would
    adopt it as sound. After any other failure it stays, and the next attempt goes on with it.
    """
    try:
        yield
    except BaseException as error:
        bad_tar = isinstance(error, (BadTar, SourceChanged))
        try:
            tar.check()
        except BadTar:
            bad_tar = True
        for writer in writers if bad_tar else ():
            writer.withdraw()
        raise


def is_committed(target: Target, shard: int) -> bool:
    """Returns whether a shard of a column is done, by an earlier attempt or another run."""
    return target.store.size(commit_name(shard)) is not None


def has_commit(task: ShardTask) -> bool:
    """Returns whether any column of the source on disk has the shard."""
    columns = chain(task.targets.values(), *task.peers.values())
    return any(is_committed(column, task.number) for column in columns)


def note_of_commits(task: ShardTask, rows: Sequence[IndexRow], note: str | None) -> str | None:
    """Returns the note with which the rows of a tar are the index that columns on disk were made with,
    which is lost: an older program noted less. Raises SourceChanged where they are another one.
    """
    notes = {
        sha256(ShardIndex.encode(task.fingerprint, task.number, rows, text)): text
        for text in (None, note)
    }
    for peer in chain.from_iterable(task.peers.values()):
        with suppress(NotAColumn, CorruptColumn, FormatVersion):  # not committed, or damaged
            expected = own_commit(peer.store, peer.digest, task.number).index
            if expected not in notes:
                raise SourceChanged(
                    f"{task.folder.at(index_name(task.number))}: the index is lost, and {task.tar} has "
                    f"others than the rows, members or captions of which {peer.store.url} was made. Restore "
                    "the tar or the index, or make it a new source"
                )
            return notes[expected]
    return note


def refuse_others(task: ShardTask, members: Mapping[str, Mapping[str, str]]) -> None:
    """Raises SourceChanged if a column on disk was made of other members of this tar than those
    that were read now, TarChanged if two of these columns read different ones.
    """
    digests: dict[str, str] = {}
    for suffix, digest in (item for column in members.values() for item in column.items()):
        if digests.setdefault(suffix, digest) != digest:
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
    # the open file's descriptor
    tar: int
    encoders: Mapping[str, Encoder]
    config: EngineConfig
    resources: WorkerResources
    timer: Timer
    writing: Writing

    def __post_init__(self) -> None:
        self.priority = self.resources.next_priority()
        self.images = {n: e for n, e in self.encoders.items() if isinstance(e, ImageEncoder)}
        self.captions = {n: e for n, e in self.encoders.items() if isinstance(e, CaptionEncoder)}
        # which pictures are read is the column's affair: one encoder may serve several sources
        self.column_views = {
            name: View(
                encoder.view.resolution, suffix_read(self._identity(name)) or encoder.view.suffix
            )
            for name, encoder in self.images.items()
        }
        self.views = list(dict.fromkeys(self.column_views.values()))
        self._picture_digests: dict[str, Any] = {v.suffix: hashlib.sha256() for v in self.views}
        self._caption_digests: dict[str, Any] = {name: hashlib.sha256() for name in self.captions}

    def _identity(self, name: str) -> Json:
        return self.task.targets[name].spec.identity

    def members(self) -> dict[str, dict[str, str]]:
        """Returns the digest of what each column has read of the tar, by column and suffix; see
        `shards.column.members`.
        """
        pictures = {
            name: {view.suffix: self._picture_digests[view.suffix].hexdigest()}
            for name, view in self.column_views.items()
        }
        return pictures | {
            name: {member_of(e.suffix): self._caption_digests[name].hexdigest()}
            for name, e in self.captions.items()
        }

    def passed_over(self, name: str) -> dict[str, int]:
        """Returns rows that lack the column's member, by suffix; see `members.passed_over`."""
        if name in self.captions:
            return passed_over(self.rows, self.captions[name].suffix, pictures=False)
        return passed_over(self.rows, self.column_views[name].suffix, pictures=True)

    def encode(self) -> None:
        """Takes every block through every encoder and on to the writer."""
        with closing(self._batches()) as batches:
            for start in range(0, len(self.rows), ZARR_ROWS):
                block = self.rows[start : start + ZARR_ROWS]
                if self.images:
                    self._encode_pictures(batches, len(block))
                for name, encoder in self.captions.items():
                    self.resources.check()
                    self._encode_captions(name, encoder, block)
                self.timer.done(0 if self.images else len(block))
                self.writing.end_block()

    def _batches(self) -> Generator[Batch, None, None]:
        if self.images and self.task.remote:
            from .remote_decode import decoded_elsewhere

            yield from decoded_elsewhere(self.task, self.index, self.views, self.config)
        elif self.images:
            yield from decoded(
                self.rows, self.tar, self.views, self.config.batch, self.resources.decoding,
                self.timer,
            )  # fmt: skip

    def _encode_pictures(self, batches: Iterator[Batch], count: int) -> None:
        """Encodes the image columns of a block of `count` rows, batch by batch; rows without a
        picture are left out of an encoder's batch.
        """
        values: dict[str, NDArray[Any]] = {}
        status = {view.suffix: np.zeros(count, np.uint8) for view in self.views}
        first = 0
        while first < count:
            self.resources.check()
            with self.timer.waiting(DECODE), self.timer("wait"):
                batch = next(batches)
            size = batch.span[1] - batch.span[0]
            for suffix in status:
                self._picture_digests[suffix].update(batch.digests[suffix])
                status[suffix][first : first + size] = batch.status[suffix]
            for name, encoder in self.images.items():
                view = self.column_views[name]
                good = batch.good(view.suffix)
                if not len(good):
                    continue
                images = batch.images[view]
                with self.resources.lock.held(self.priority), self.timer.encodes(name):
                    words = encoder.rows(images if len(good) == size else images[good])
                if name not in values:  # the writer blanks what is not set here
                    values[name] = np.zeros((count, *words.shape[1:]), words.dtype)
                values[name][first + good] = words
            first += size
            self.timer.done(size)
        for name, view in self.column_views.items():
            if name not in values:  # not one picture of the block could be decoded
                values[name] = self.task.targets[name].spec.layout.as_read.blank(count)
            self.writing.put(name, values[name], status[view.suffix])

    def _encode_captions(
        self, name: str, encoder: CaptionEncoder, block: Sequence[IndexRow]
    ) -> None:
        """Encodes a caption column of a block. Text is large: a worker holds two such blocks."""
        with self.timer.waiting(READ), self.timer("read"):
            captions, status = read_captions(
                block, self.tar, encoder.suffix, self._caption_digests[name].update
            )
        buffers = self.resources.text_buffers
        with self.timer.waiting(WRITE):
            buffers.acquire()
        try:
            with self.resources.lock.held(self.priority), self.timer.encodes(name):
                values = encode_captions(captions, encoder, self.config.tokens)
        except BaseException:
            buffers.release()
            raise
        self.writing.put(name, values, status, buffers.release)


def encode_captions(
    captions: Sequence[str | None], encoder: CaptionEncoder, budget: int
) -> list[NDArray[Any]]:
    """Returns the words of each row; none where there is no caption."""
    texts = [caption for caption in captions if caption is not None]
    words = iter(encoder.rows(texts, budget) if texts else [])
    return [encoder.blank if caption is None else next(words) for caption in captions]


def seconds_of(seconds: Mapping[str, float], column: str) -> dict[str, float]:
    """Returns a column's seconds for its commit: its encoder, its writing, and what all share."""
    stages = {stage: seconds[stage] for stage in ("read", "decode", "wait") if stage in seconds}
    stages |= {column: seconds.get(column, 0.0), "write": seconds.get(f"write {column}", 0.0)}
    return {stage: round(value, 3) for stage, value in stages.items()}


@cache
def versions() -> Json:
    """Returns the versions of the libraries that decide the values."""
    libraries = ("torch", "diffusers", "transformers", "pillow", "numpy")
    return {name: version(name) for name in libraries}


def provenance(encoder: Encoder, config: EngineConfig) -> Json:
    """Returns what may differ between two attempts at a column: commits record it, nothing compares
    it.
    """
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": versions(),
        **encoder.runs_on(),
        "batch": config.batch,
        "tokens": config.tokens,
    }
