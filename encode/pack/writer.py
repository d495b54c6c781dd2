"""Rows -> tars of a fixed number of rows, the same bytes whenever and wherever they are written.

    OUT/00000.tar, 00001.tar ...   appear whole, one after the other
    OUT/.packing/state.json        which rows, by the digest of their listing
    OUT/.packing/00000.json        of a tar that is about to appear: where the next begins, its counts
    OUT/pack.json                  the report; written last, and .packing is removed

So an interrupted packing keeps its whole tars and goes on behind the last.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from shards import NoRoom
from shards.column import CAPTION_BYTES
from shards.console import counted, size_text
from shards.format.atomic import (
    Json,
    Staged,
    atomic_write,
    canonical_json,
    parse_json,
    read_file,
    read_json,
)
from shards.read import map_ahead

from ..errors import NotASource
from ..source.members import caption_in
from .kinds import Rows
from .listing import Item, Troubles, utf8
from .table import CAPTION_NAMES

WORKING = ".packing"
REPORT = "pack.json"
FORMAT, VERSION = "latentbank packed source", 1
THREADS, AHEAD = 8, 32  # files read before they are asked for: a network's answers take their time
PICTURE_BYTES = 1 << 30  # a larger file is no picture
MEMBER = 2 * tarfile.BLOCKSIZE  # bytes of a tar beside a member's own, at most, for a short name
END = bytes(2 * tarfile.BLOCKSIZE)
SPARE = 64 << 20  # bytes of the disk that are left free


@dataclass
class Packed:
    """A packed source: its tars and the report, as `pack.json` has it."""

    folder: Path
    record: Json
    fresh: bool = True  # False: it was there already

    @property
    def tars(self) -> list[str]:
        return [str(self.folder / name) for name, _ in self.record["tars"]]


@dataclass
class Members:
    """The members of a row by suffix, or nothing and why; troubles that it has all the same."""

    item: Item
    data: list[tuple[str, bytes]] = field(default_factory=list)
    troubles: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def working(out: Path) -> Iterator[Path]:
    """Yields the working folder of a target, held against other packings; a target that is left empty
    is removed. NotASource where another packing is at work.
    """
    fresh = [path for path in (out, *out.parents) if not path.exists()]
    folder = out / WORKING
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NotASource(f"{out}: another command packs into it. Let it finish") from None
        for left in (*out.glob(".tmp-*"), *folder.glob(".tmp-*")):
            left.unlink()
        try:
            yield folder
        finally:
            (folder / "listing.sqlite").unlink(missing_ok=True)
            if (out / REPORT).exists() or not (folder / "00000.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # one is not empty
                for path in fresh:
                    path.rmdir()
    finally:
        os.close(handle)


def read_report(out: Path) -> Json | None:
    """Returns the report of a packed source; None where there is none. NotASource if it is damaged."""
    try:
        record = read_json(out / REPORT)
        if record["format"] != FORMAT or record["version"] != VERSION:
            raise ValueError(f"{record['format']!r:.80} {record['version']!r:.80}")
        [(str(name), int(size)) for name, size in record["tars"]]
        return dict(record)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise NotASource(
            f"{out / REPORT}: not the report of a packed source ({error}). Delete {out} and pack again"
        ) from None


def write_tars(
    rows: Rows, place: Path, out: Path, tar_rows: int, field_name: str | None,
    advance: Callable[[int], None], skip: Callable[[int], None],
) -> Packed:  # fmt: skip
    """Packs rows into `out`, whose working folder is held. `advance` is called with rows that are done,
    `skip` with those of an earlier attempt. Raises NotASource where other tars are there, NoRoom.
    """
    folder, state = out / WORKING, {"listing": rows.digest, "rows": tar_rows, "caption": field_name}
    record = read_report(out)
    if record is not None:
        _refuse_other(record["state"], state, place, out)
        _refuse_damage(record, out)
        return Packed(out, record, fresh=False)
    finished = _begin(folder, state, place, out)
    troubles, tars, start, suffixes = Troubles(), list[list[str | int]](), 0, Counter[str]()
    for name, part in finished:
        troubles.merge(part["troubles"])
        suffixes.update(part["suffixes"])
        tars.append([name, (out / name).stat().st_size])
        start = part["next"]
    skip(start)
    _refuse_full(rows, sum(int(size) for _, size in tars), out)
    packed = sum(part["rows"] for _, part in finished)
    with ThreadPoolExecutor(THREADS) as pool:
        load = Loader(field_name)
        members = map_ahead(pool, load, rows.items(start), AHEAD)
        with closing(members):
            while True:
                name = f"{len(tars):05d}.tar"
                part = _write_tar(out / name, folder, members, tar_rows, advance)
                if not part["rows"]:
                    troubles.merge(part["troubles"])
                    break
                troubles.merge(part["troubles"])
                suffixes.update(part["suffixes"])
                packed += part["rows"]
                tars.append([name, (out / name).stat().st_size])
    if not packed:
        raise NotASource(
            f"{place}: none of {counted(rows.rows, 'picture')} could be read "
            f"({'; '.join(troubles.places.get('unreadable', []))})"
        )
    troubles.merge(rows.source.troubles.record())
    record = {
        "format": FORMAT, "version": VERSION, "source": utf8(place.resolve()), "state": state,
        "kind": rows.source.kind, "rows": packed, "tars": tars, "suffixes": dict(suffixes),
        "troubles": troubles.record(), "others": dict(rows.source.others.most_common(20)),
    }  # fmt: skip
    atomic_write(out / REPORT, canonical_json(record))
    return Packed(out, record)


def _begin(folder: Path, state: Json, place: Path, out: Path) -> list[tuple[str, Json]]:
    """Returns the whole tars of an earlier attempt, with what it noted of each; writes down what is
    packed now if there was none.
    """
    path = folder / "state.json"
    try:
        earlier = parse_json(read_file(path))
    except (FileNotFoundError, ValueError):
        others = [p.name for p in out.iterdir() if p.name != WORKING]
        if others:
            raise NotASource(
                f"{out}: it holds {', '.join(sorted(others)[:5])} and no {REPORT}. Name a new or an "
                "empty folder"
            ) from None
        atomic_write(path, canonical_json(state))
        return []
    _refuse_other(earlier, state, place, out)
    finished = list[tuple[str, Json]]()
    while (out / (name := f"{len(finished):05d}.tar")).is_file():
        finished.append((name, read_json(folder / name.replace(".tar", ".json"))))
    return finished


def _refuse_other(earlier: Json, state: Json, place: Path, out: Path) -> None:
    if earlier != state:
        changed = [key for key in state if earlier.get(key) != state[key]]
        words = {
            "listing": "other files or dates",
            "rows": "another --rows",
            "caption": "--caption",
        }
        raise NotASource(
            f"{out}: it was packed from something else than {place} is now "
            f"({', '.join(words[key] for key in changed)}). Columns that were made of these tars need "
            "them: name the tars as the source to go on with those. Else pack into a new folder, which a "
            "source of another name of `encode run` does, or, if nothing was made of it, delete this one"
        )


def _refuse_damage(record: Json, out: Path) -> None:
    for name, size in record["tars"]:
        path = out / name
        if not path.is_file() or path.stat().st_size != size:
            raise NotASource(
                f"{path}: missing, or not of {size} bytes. Delete {out} and pack again"
            )


def _refuse_full(rows: Rows, written: int, out: Path) -> None:
    needed = rows.bytes + 3 * MEMBER * rows.rows - written
    free = shutil.disk_usage(out).free
    if needed + SPARE > free:
        raise NoRoom(
            f"{out}: {size_text(needed)} to write, {size_text(free)} free. Make room, or name another "
            "folder"
        )


def _write_tar(
    path: Path, folder: Path, rows: Iterator[Members], most: int, advance: Callable[[int], None]
) -> Json:
    """Writes a tar of the next rows; none where there are no more. Returns its part of the report."""
    troubles, count, following, suffixes = Troubles(), 0, None, Counter[str]()
    with Staged(path, folder) as tar:
        for row in rows:
            for trouble, place in row.troubles:
                troubles.add(trouble, place)
            following = row.item.number + 1
            advance(1)
            if not row.data:
                continue
            for suffix, data in row.data:
                tar.write(header(row.item, suffix, len(data)))
                tar.write(data)
                tar.write(bytes(-len(data) % tarfile.BLOCKSIZE))
                suffixes[suffix] += 1
            count += 1
            if count == most:
                break
        part = {
            "rows": count, "next": following, "troubles": troubles.record(),
            "suffixes": dict(suffixes),
        }  # fmt: skip
        if count:
            tar.write(END)
            atomic_write(folder / path.with_suffix(".json").name, canonical_json(part))
            if not tar.publish():
                raise NotASource(f"{path}: it appeared while it was packed. Pack into a new folder")
    return part


def header(item: Item, suffix: str, size: int) -> bytes:
    """Returns a member's header, in which nothing is of this machine, this user or this day."""
    info = tarfile.TarInfo(f"{item.key.decode(errors='surrogateescape')}.{suffix}")
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


class Loader:
    """Reads the members of a row: its picture byte for byte, and its caption."""

    def __init__(self, field_name: str | None) -> None:
        self._names: Sequence[str] = CAPTION_NAMES if field_name is None else (field_name,)

    def __call__(self, item: Item) -> Members:
        row = Members(item)
        try:
            picture = item.picture
            if not isinstance(picture, bytes):
                picture = read_file(picture, PICTURE_BYTES)
            elif not picture:
                row.troubles.append(("picture_missing", os.fsdecode(item.key)))
                return row
        except OSError as error:
            row.troubles.append(("unreadable", str(error)))
            return row
        members = [(item.suffix, picture)]
        caption = self._caption(row, members)
        if caption is None:
            row.troubles.append(("without_caption", os.fsdecode(item.key)))
        else:
            members.append(("txt", caption))
        row.data = members
        return row

    def _caption(self, row: Members, members: list[tuple[str, bytes]]) -> bytes | None:
        """Returns a row's caption, of the table, its file or its JSON; adds the JSON to the members."""
        item, fields = row.item, None
        try:
            if item.fields is not None:
                fields = read_file(item.fields, CAPTION_BYTES)
                members.append(("json", fields))
            if item.text is not None:
                return item.text.encode()
            if item.caption is not None:
                return read_file(item.caption, CAPTION_BYTES)
        except OSError as error:
            row.troubles.append(("unreadable", str(error)))
        if fields is None:
            return None
        texts = (caption_in(fields, f"json:{name}")[0] for name in self._names)
        return next((text.encode() for text in texts if text), None)
