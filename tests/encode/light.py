"""Encoders that load in no time, for tests of what happens around encoders, and workers that die on
demand.

What a worker is to suffer is a file in a folder, named for the moment:

    hang-load                     sleep for ever while the encoders are loaded
    die-picture-<shard>-<row>     SIGKILL to itself when it is shown this picture
    hang-picture-<shard>-<row>    sleep for ever at it
    stop-picture-<shard>-<row>    SIGSTOP to itself
    die-link-<n>             SIGKILL to itself just before it publishes what `<n>` holds a pattern of
    died-link-<n>            the same, just after

It removes the file first, so it happens once; `always` in the file keeps it.
"""

from __future__ import annotations

import fnmatch
import io
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from encode.config import ColumnConfig, EncodeConfig, EngineConfig
from encode.models.encoder import CaptionEncoder, Encoder, ImageEncoder, Words
from encode.plan.sample_source import open_job
from encode.registry import ModelSpec
from encode.run import job
from encode.run import ray_workers as cluster
from encode.run.prepare import RunPlan, prepare
from encode.source.decoding import View
from shards import Norm
from shards.format.identity import CaptionPreprocess, ColumnIdentity, EncoderIdentity
from tests.encode.toy import tar_bytes

FAULTS = "LATENTBANK_TEST_FAULTS"  # the folder
PLAIN = job.Options()


def faults() -> Path | None:
    folder = os.environ.get(FAULTS)
    return Path(folder) if folder else None


def happens(name: str) -> bool:
    """Whether something is to happen now; of several processes one alone is told so."""
    folder = faults()
    if folder is None:
        return False
    try:
        if (folder / name).read_text() == "always":
            return True
        (folder / name).unlink()
    except FileNotFoundError:
        return False
    return True


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


class Means(ImageEncoder):
    """(2, 4, 4): means of 4 x 4 parts of the picture in two of its colours."""

    norm = Norm((0.0,), (1.0,))

    def __init__(self, config: ColumnConfig, seconds: float) -> None:
        self.config, self.weights = config, "0" * 64
        self.model = ModelSpec.model_validate({"class": "Means", "path": "means"})
        self.view = View(config.resolution, config.suffix)  # type: ignore[union-attr]
        self._seconds = seconds

    def rows(self, images: NDArray[np.uint8]) -> Words:
        for shard, row in images[:, 0, 0, :2].tolist():
            if happens(f"die-picture-{shard}-{row}"):
                die()
            if happens(f"hang-picture-{shard}-{row}"):
                time.sleep(3600)
            if happens(f"stop-picture-{shard}-{row}"):
                os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(self._seconds * len(images))
        side = self.view.resolution // 4
        parts = images.reshape(len(images), 4, side, 4, side, 3)[..., 1:]
        return parts.mean((2, 4)).transpose(0, 3, 1, 2).astype(np.float16)


class Letters(CaptionEncoder):
    """A 2, then the letters of a caption."""

    def __init__(self, config: ColumnConfig) -> None:
        self.config, self.weights = config, "0" * 64
        self.suffix = config.suffix

    def identity(self) -> ColumnIdentity:
        return ColumnIdentity(
            kind="ids",
            encoder=EncoderIdentity(cls="Letters", path="letters", weights=self.weights),
            preprocess=self.preprocess(),
        )

    def preprocess(self) -> CaptionPreprocess:
        return CaptionPreprocess(max_tokens=64, template="{}", tokenizer=self.weights)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (64,)

    def rows(self, captions: Sequence[str], budget: int) -> list[Words]:
        return [np.array([2, *map(ord, caption[:63])], np.int32) for caption in captions]


def load_encoders(
    columns: Mapping[str, ColumnConfig], engine: EngineConfig, weights: Any = None
) -> dict[str, Encoder]:
    """Pictures or letters by the kind of the column; `precision` has no meaning here, so the
    encoder's name says how many milliseconds a picture takes.
    """
    if happens("hang-load"):
        time.sleep(3600)
    return {
        name: Letters(column)
        if column.kind == "ids"
        else Means(column, float(str(column.encoder)) / 1e3)
        for name, column in columns.items()
    }


class LightWorker(cluster.RayWorker):
    """A Ray worker with such encoders."""

    load = staticmethod(load_encoders)

    def __init__(self, columns: Any, weights: Any, engine: EngineConfig) -> None:
        watch_links()
        super().__init__(columns, weights, engine)


def watch_links() -> None:
    """Let this process die where it publishes an object; see above."""
    link = os.link

    def watched(source: Any, to: Any, **how: Any) -> None:
        meant = [
            path.name
            for path in faults().glob("*-link-*")  # type: ignore[union-attr]
            if fnmatch.fnmatch(str(to), path.read_text().removesuffix("\n"))
        ] if faults() else []  # fmt: skip
        for name in meant:
            if name.startswith("die-") and happens(name):
                die()
        link(source, to, **how)
        for name in meant:
            if name.startswith("died-") and happens(name):
                die()

    os.link = watched


def write_source(folder: Path, shards: int, rows: int) -> str:
    """Tars of pictures whose red is their shard and whose green is their row; the pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    blue = np.arange(32 * 32, dtype=np.uint32).reshape(32, 32)
    for shard in range(shards):
        members = []
        for row in range(rows):
            channels = [0 * blue + shard, 0 * blue + row, blue * (row + 1) % 251]
            buffer = io.BytesIO()  # PNG under another name: every pixel as it is
            Image.fromarray(np.stack(channels, -1).astype(np.uint8)).save(buffer, "PNG")
            caption = f"picture {row} of shard {shard}".encode()
            members += [(f"{row:04d}.jpg", buffer.getvalue()), (f"{row:04d}.txt", caption)]
        (folder / f"{shard}.tar").write_bytes(tar_bytes(members))
    return f"{folder}/{{0..{shards - 1}}}.tar"


def run(config: EncodeConfig, options: job.Options = PLAIN) -> int:
    """`encode run` with these encoders."""
    job.load_encoders = load_encoders
    cluster.RayExecutor.worker_class = LightWorker
    return job.run(config, options)


def prepared(config: EncodeConfig) -> RunPlan:
    """The plan of a run, by an executor that is gone again."""
    executor = job.start_executor(config)
    try:
        return prepare(config, [open_job(config, name) for name in config.sources], executor)
    finally:
        executor.stop()
