"""Pictures that `run` will pack first: their tars as they will be, sampled without any being written."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tarfile import BLOCKSIZE
from tempfile import TemporaryFile
from typing import BinaryIO

from shards import Source
from shards.console import Bar, size_text

from ..config import EncodeConfig
from ..pack.kinds import Options, Rows, kind_of, open_rows
from ..pack.listing import trouble_text
from ..pack.sources import place_and_target
from ..pack.writer import END, Loader, header
from ..source.places import expand
from .sample_source import SourceJob, TarSample, picture_step, sample_of, with_images

DEFAULTS = Options()


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpackedJob(SourceJob):
    """A source whose tars do not exist yet. A sample of one is made of the listing, the captions and
    some pictures, as a file that has no name.
    """

    place: Path
    # folder of the tars
    out: Path
    listing: Rows

    def tar_rows(self) -> Mapping[int, int]:
        whole, rest = divmod(self.listing.rows, DEFAULTS.rows)
        return dict(enumerate([DEFAULTS.rows] * whole + [rest] * (rest > 0)))

    def sample(
        self, shard: int, captions: Collection[str] = (), pictures: Collection[str] = ()
    ) -> TarSample:
        with TemporaryFile(dir=self.scratch if self.scratch.is_dir() else None) as file:
            self._write(shard, file, bool(pictures))
            return sample_of(file, shard, self.source.shard_rows, None, captions, pictures)

    def _write(self, shard: int, tar: BinaryIO, pictures: bool) -> None:
        """Writes a tar as `pack` does, with holes in place of the pictures that nobody will look at."""
        rows, load = self.tar_rows()[shard], Loader(DEFAULTS.caption)
        for row, item in enumerate(islice(self.listing.items(shard * DEFAULTS.rows), rows)):
            looked_at = pictures and row % picture_step(rows) == 0
            members = load(item if looked_at else replace(item, picture=b"a hole"))
            for suffix, data in members.data or [(item.suffix, b"")]:
                size = len(data) if suffix != item.suffix else item.size
                tar.write(header(item, suffix, size))
                start = tar.tell()
                tar.write(data[:size])
                tar.seek(start + size + -size % BLOCKSIZE)
        tar.write(END)
        tar.seek(0)

    def note(self, tar_bytes: float) -> str:
        """Returns what `run` does before it encodes, and what it will pass over."""
        counts = self.listing.source.troubles.counts
        troubles = "".join(
            f"; {count:,} {trouble_text(name, count)}" for name, count in counts.items()
        )
        return (
            f"not packed yet: `run` packs {self.place} into {self.out} first, {size_text(tar_bytes)}"
            f"{troubles}"
        )

    def packed_bytes(self) -> int:
        """Returns the bytes of the tars that an interrupted packing has left."""
        names = (f"{shard:05d}.tar" for shard in self.tar_rows())
        return sum(path.stat().st_size for n in names if (path := self.out / n).is_file())


def unpacked(config: EncodeConfig, name: str) -> UnpackedJob | None:
    """Returns a source of a config of `with_packed` that `run` would pack; None where it is of tars.
    Raises NotASource where nothing can be packed.
    """
    pair = place_and_target(config, name, expand(config.sources[name]))
    if pair is None:
        return None
    place, out = pair
    kind = kind_of(place)
    with Bar(f"list {shlex.quote(place.name)}", unit="pictures") as bar:
        listing = open_rows(place, kind, DEFAULTS, None, bar.advance)
    shards = -(-listing.rows // DEFAULTS.rows)
    size = max(1, listing.bytes // shards)  # the bytes of one are known once it is sampled
    tars = [f"{shard:05d}.tar" for shard in range(shards)]
    source = Source(name, tuple((tar, size) for tar in tars), config.shard_rows)
    job = UnpackedJob(
        source,
        tars,
        config.root_store.child(name),
        config.engine.scratch_folder,
        place=place,
        out=out,
        listing=listing,
    )
    resolved = with_images(config, job)
    assert isinstance(resolved, UnpackedJob)
    return resolved
