"""Columns, sources and indexes made by someone who means harm, and whose every digest fits.

An input is drawn by chance from a seed: a sound column with a few fields, names or bytes of one of
its files changed, and all that speaks of that file sealed anew. Whoever opens it must end in an
error of ours that names the column, or in values, with bounded memory, and never run what it holds.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import json
import pickle
import random
import resource
import tarfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from shards import (
    Column,
    ColumnSpec,
    IndexRow,
    Layout,
    Norm,
    ShardsError,
    Source,
    open_source,
    put_index,
    read_index,
    seal,
    sha256,
)
from shards.column.checksum import crc32c
from shards.column.commits import Commit
from shards.tools.info import information
from shards.tools.verify import logical_digest, verify
from tests.shards.sweeps import VARIANTS, expected, make, scratch, sound_column
from tests.soak.sweep import Case, Sweep

INPUTS = 20  # of a case
GROWTH = 128 << 20  # bytes that a small column may take of memory, whatever its records say
VIRTUAL = 6 << 30  # a guard for the machine; never reached
ROWS = 64  # of each shard that are read

Files = dict[str, bytes]


# ---- what may be found in the place of a value --------------------------------------------------


def deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


POOL: tuple[Callable[[], Any], ...] = tuple(
    (lambda value=value: copy.deepcopy(value))  # type: ignore[misc]
    for value in (
        None, True, False, 0, 1, -1, 7, 31, 255, 256, 1024, 65535, 65536, 2**20, 2**31 - 1, 2**31,
        2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -(2**31), -(2**63), 10**4000,
        0.0, -0.0, 0.5, 1.5, 1e300, 5e-324, float("nan"), float("inf"), "", "x", "0", "moments",
        "tokens", "ids", "features", "int8", "bfloat16", "float16", "blosc", "webdataset", "zarr",
        "../../x", "/etc/passwd", "..", "c/../../../x", "a\0b", "\ud800", "\u202ecod", "x" * 70_000,
        "0" * 64, "g" * 64, "NaN", "true", [], {}, [[]], [[]] * 1000, [0] * 3, [1, 1, 1], [0, 0],
        [[0, 1, 2]], [[0, 1, 77]], [[-1, 1, 2]], [[0, 2**40, 1]], [2**20] * 3, [2**31 - 1] * 8,
        {"a": 1}, {"shift": [0.0], "scale": [0.0]}, {"$type": "os.system"}, deep(15),
    )
) + (lambda: deep(90), lambda: deep(3000))  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the parts of a JSON value stand, down to some depth."""
    if at:
        yield at
    if len(at) > 12:
        return
    items: Any = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from places(item, (*at, key))


def near(value: Any, chance: random.Random) -> Any:
    """A value of the same type that is almost right."""
    if type(value) is int:
        return chance.choice([value + 1, value - 1, -value, 2 * value, 1024 * value, value + 2**32])
    if isinstance(value, str):
        return chance.choice([value + "0", value[:-1], value.upper(), value[::-1], f"../{value}"])
    if isinstance(value, list) and value:
        return chance.choice(
            [value + value, value[:-1], value[::-1], value + [value[0]], value * 50]
        )
    if isinstance(value, float):
        return chance.choice([-value, value * 1e30, float("nan"), value + 0.5])
    return chance.choice(POOL)()


def changed(record: Any, chance: random.Random) -> Any:
    """The JSON value with one to three changes."""
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        *way, last = chance.choice(list(places(record)) or [("",)])
        parent = record
        for key in way:
            parent = parent[key]
        fate = chance.random()
        if fate < 0.1 and isinstance(parent, dict):
            parent.pop(last, None)
        elif fate < 0.2 and isinstance(parent, dict):
            parent[chance.choice(["unknown", "__class__", "../x", "", "digest"])] = chance.choice(
                POOL
            )()
        elif fate < 0.25 and isinstance(parent, list):
            parent.insert(last, chance.choice(parent))
        elif fate < 0.65:
            parent[last] = chance.choice(POOL)()
        else:
            parent[last] = near(parent[last], chance)
    return record


def opened(data: bytes) -> dict[str, Any]:
    """A record without its digest."""
    record = json.loads(data)
    record.pop("digest", None)
    return record  # type: ignore[no-any-return]


def closed(record: Any) -> bytes:
    """The record sealed; as it is where it has no canonical form."""
    try:
        return seal(record)
    except (ValueError, TypeError, RecursionError, AttributeError):
        with suppress(RecursionError):
            return json.dumps(record).encode(errors="replace")
        return b"[" * 5000


# ---- columns ------------------------------------------------------------------------------------


def commit_name(files: Files) -> str:
    return next(name for name in files if name.startswith("commits/"))


def complete_name(files: Files) -> str:
    return next(n for n in files if n.startswith("complete/") and n.endswith(".json"))


def reseal(files: Files, chance: random.Random) -> None:
    """Let commit and COMPLETE record say what column.json and the objects are now."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        column = json.loads(files["column.json"])["digest"]
        commit = opened(files[commit_name(files)])
        commit["column"] = column
        commit["objects"] = [
            [path, len(files[path]), sha256(files[path])] if path in files else [path, size, digest]
            for path, size, digest in commit["objects"]
        ]
        files[commit_name(files)] = closed(commit)
        follow(files, chance)


def follow(files: Files, chance: random.Random) -> None:
    """Let the COMPLETE record say what the commit is now."""
    name = complete_name(files)
    complete = opened(files[name])
    complete["column"] = json.loads(files["column.json"])["digest"]
    with suppress(KeyError, TypeError, ValueError):
        commit = json.loads(files[commit_name(files)])
        complete["shards"][0] = [commit["rows"], commit["content"], commit["index"]]
        shards = json.loads(files["column.json"])["layout"]["shards"]
        if type(shards) is int and 1 < shards < 10**4 and chance.random() < 0.5:
            complete["shards"] += [[0, None, None]] * (shards - 1)
    files[name] = closed(complete)


def of_column(files: Files, chance: random.Random) -> None:
    record = changed(opened(files["column.json"]), chance)
    with suppress(Exception):  # where it makes sense at all, its Zarr metadata shall fit it
        layout, norm = record["layout"], record["norm"]
        spec = ColumnSpec(
            record["identity"],
            Layout(**{**layout, "row_shape": tuple(layout["row_shape"])}),
            norm and Norm(tuple(norm["shift"]), tuple(norm["scale"])),
            record["empty_tokens"],
            record.get("quantisation"),
        )
        if chance.random() < 0.8:
            metadata = spec.zarr_json()
            record["zarr"] = {path: sha256(data) for path, data in metadata.items()}
            files.update(metadata)
    files["column.json"] = closed(record)
    reseal(files, chance)


def of_commit(files: Files, chance: random.Random) -> None:
    name = commit_name(files)
    record = changed(opened(files[name]), chance)
    with suppress(Exception):
        if chance.random() < 0.8:
            parts = [record[f] for f in ("shard", "rows", "not_ok", "objects", "blocks", "index")]
            record["content"] = Commit(*parts, record["column"], record["provenance"]).content
    files[name] = closed(record)
    if chance.random() < 0.7:
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            follow(files, chance)


def of_complete(files: Files, chance: random.Random) -> None:
    name = complete_name(files)
    files[name] = closed(changed(opened(files[name]), chance))
    if chance.random() < 0.3:
        del files[commit_name(files)]


def of_bits(files: Files, chance: random.Random) -> None:
    name = complete_name(files)
    bits = chance.choice([b"", b"\xff" * 12, bytes(12), chance.randbytes(chance.randrange(64))])
    files[name.replace(".json", ".valid")] = bits
    record = opened(files[name])
    record["valid"] = {"words": chance.choice([len(bits) // 4, 3, 2**60]), "sha256": sha256(bits)}
    files[name] = closed(record)


def of_failure(files: Files, chance: random.Random) -> None:
    record = {"format": "latentbank-failure", "version": 1, "shard": 0, "reason": "no tar"}
    record["shard"] = chance.choice([0, 1, 7])
    files[f"failures/{chance.choice(['00000', '00001', 'x'])}.json"] = closed(
        changed(record, chance)
    )
    if chance.random() < 0.5:
        del files[commit_name(files)]


def indexed(data: bytes, chunks: list[tuple[int, int]]) -> bytes:
    """An object with this chunk index, whose checksum fits."""
    index = np.array(chunks, np.uint64).astype("<u8")
    return data + index.tobytes() + crc32c(np.ascontiguousarray(index)).to_bytes(4, "little")


def of_object(files: Files, chance: random.Random) -> None:
    """Values, lengths, statuses or checksums that nobody wrote, in objects whose digests fit."""
    names = [path for path, *_ in json.loads(files[commit_name(files)])["objects"]]
    name = chance.choice(names)
    data = bytearray(files[name])
    fate = chance.randrange(7)
    if name.startswith("tar/") and fate < 4:
        files[name] = hostile_tar(chance)
    elif fate == 0:  # other values
        at, size = chance.randrange(len(data)), chance.choice([1, 2, 64, 4096])
        data[at : at + size] = chance.choice([b"\xff", b"\0", b"\x7f"]) * min(size, len(data) - at)
        files[name] = bytes(data)
    elif fate == 1:  # all of the largest value, with an index that fits
        entries = chance.choice([1, 2, 8, 32, 1024])
        size = chance.choice([1024, 2048, 3072, 4096])
        files[name] = indexed(
            chance.choice([b"\xff", b"\0", b"\x01"]) * size,
            [(0, size), *[(2**64 - 1, 2**64 - 1)] * (entries - 1)],
        )
    elif fate == 2:  # an index that lies
        entries = chance.choice([1, 2, 8, 32, 1024])
        huge = [0, 1, 1024, 2**31, 2**62, 2**63, 2**64 - 2, 2**64 - 1]
        index = [(chance.choice(huge), chance.choice(huge)) for _ in range(entries)]
        files[name] = indexed(bytes(data[: chance.randrange(len(data))]), index)
    elif fate == 3:
        files[name] = chance.choice([b"", pickle.dumps(Canary()), bytes(100_000), bytes(data[:-1])])
    elif fate == 4:
        files[name] = chance.randbytes(len(data))
    elif fate == 5:
        del files[name]
    else:
        files[name] = files[chance.choice(names)]
    reseal(files, chance)


def hostile_tar(chance: random.Random) -> bytes:
    """A tar of members that are not what a column's tar holds."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row in range(chance.randrange(4)):
            name = chance.choice(
                [f"{row:08d}.npy", "../../x.npy", "/x.npy", "00000001.npy", "a" * 99]
            )
            array = chance.choice([
                np.zeros((1, 3), np.uint16), np.zeros((2**16, 3), np.uint16), np.zeros((0, 3), "<u2"),
                np.array([Canary()], object), np.full((1, 3), 0xFFFF, "<u2"), np.zeros(3, "<f8"),
            ])  # fmt: skip
            member = io.BytesIO()
            np.save(member, array, allow_pickle=True)
            data = member.getvalue()
            if chance.random() < 0.4:
                data = data.replace(b"(1, 3)", chance.choice([b"(-1,3)", b"(9**9)", b"[0]*99"]))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.type = chance.choice([tarfile.REGTYPE] * 4 + [tarfile.SYMTYPE, tarfile.DIRTYPE])
            info.linkname = "/etc/passwd" if info.type == tarfile.SYMTYPE else ""
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return out.getvalue()[: chance.choice([None, None, 512, 700, 1500])]


CANARY = "canary-of-a-hostile-column"


class Canary:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path(CANARY),)


COLUMNS: dict[str, Callable[[Files, random.Random], None]] = {
    "column.json": of_column,
    "commits": of_commit,
    "COMPLETE": of_complete,
    "valid bits": of_bits,
    "failures": of_failure,
    "objects": of_object,
}


@contextmanager
def installed(path: Path, sound: Files, files: Files) -> Iterator[None]:
    """A column that stands as `sound`, with other files in it for a while."""
    try:
        for name in sound.keys() | files.keys():
            if name not in files:
                (path / name).unlink()
            elif files[name] != sound.get(name):
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_bytes(files[name])
        yield
    finally:
        for file in path.rglob("*"):
            if file.is_file() and str(file.relative_to(path)) not in sound:
                file.unlink()
        for name, data in sound.items():
            if not (path / name).exists() or (path / name).read_bytes() != data:
                (path / name).write_bytes(data)


def use(path: Path, partial: bool) -> None:
    """Everything that a reader may ask of a column."""
    column = Column.open(path, partial=partial)
    try:
        column.valid_mask(truncated=True)
        for shard, rows in enumerate(column.snapshot.rows):
            if rows:
                ids = shard * column.layout.shard_rows + np.arange(min(rows, ROWS))
                column.hint(ids)
                column.status(ids)
                column.decoded(column.read(ids))
                column.read(ids, check=True)
        if column.spec.empty_tokens:
            column.empty()
        column.snapshot_id()
    finally:
        column.close()


def borne(path: Path, *works: Callable[[], object]) -> None:
    """Each of them ends, or ends in an error of ours that names the folder."""
    for work in works:
        try:
            work()
        except ShardsError as error:
            if str(path) not in str(error):
                raise AssertionError(f"the message names no file: {error}") from error


def numbers_of(name: str) -> int:
    """A number of bytes from /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) << 10


@contextmanager
def bounded(growth: int = GROWTH) -> Iterator[None]:
    """AssertionError if memory grows by more than `growth` meanwhile; the machine is guarded too."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    frozen = gc.get_freeze_count()
    gc.freeze()  # what stands stays: old garbage that goes meanwhile would hide as much growth
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from now
    before = numbers_of("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (numbers_of("VmSize") + VIRTUAL, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        if not frozen:  # in a fork the parent's garbage stays frozen
            gc.unfreeze()
    grown = numbers_of("VmHWM") - before
    assert grown <= growth, f"{grown >> 20} MB of memory for a small column"


def draw(kind: str, number: int) -> tuple[str, Files]:
    """Input `number` of a kind: (variant, all files of the column)."""
    chance = random.Random(f"{kind} {number}")
    variant = chance.choice(list(VARIANTS))
    files = dict(expected(variant, True))
    COLUMNS[kind](files, chance)
    return variant, files


def check_column(kind: str, number: int) -> int:
    """Whoever comes upon a column bears it. Returns the input's digest."""
    variant, files = draw(kind, number)
    sound, path = expected(variant, True), sound_column(variant)
    with installed(path, sound, files), bounded():
        borne(
            path,
            lambda: use(path, partial=True),
            lambda: use(path, partial=False),
            lambda: verify(path),
            lambda: logical_digest(path),
            lambda: information(path),
        )
        if kind in ("objects", "column.json"):  # a writer finds it, and no commit
            (path / commit_name(sound)).unlink(missing_ok=True)
            borne(path, lambda: make(variant, path, single=True))
    return digest_of(files)


@contextmanager
def told(kind: str, number: int) -> Iterator[None]:
    """Name the input with any fault."""
    try:
        yield
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise AssertionError(
            f"input {number} of {kind}: {type(error).__name__} in {at.name}: {str(error)[:1500]}"
        ) from error


def digest_of(files: Files) -> int:
    state = hashlib.blake2b(digest_size=6)
    for name in sorted(files):
        state.update(name.encode() + b"\0" + files[name])
    return int.from_bytes(state.digest(), "little")


# ---- sources ------------------------------------------------------------------------------------

SOURCE = Source("toy", (("0.tar", 100), ("1.tar", 90)))
LINES = [
    IndexRow("a", {"jpg": (512, 10), "txt": (1536, 3)}, {"txt": "0" * 64}),
    IndexRow("b\u2028é", {"jpg": (2560, 9)}, {}),
]


def draw_source(kind: str, number: int) -> tuple[str, bytes]:
    """Input `number`: (name of the file, its bytes)."""
    chance = random.Random(f"{kind} {number}")
    with scratch() as folder:
        SOURCE.put(folder)
        put_index(folder, SOURCE.fingerprint, 0, LINES, "cut off")
        source, index = (folder / n for n in ("source.json", "index/00000.jsonl"))
        if kind == "source.json":
            record = changed(opened(source.read_bytes()), chance)
            with suppress(Exception):
                if chance.random() < 0.7:
                    pairs = record["tars"]
                    record["fingerprint"] = Source("", tuple(map(tuple, pairs))).fingerprint
            return "source.json", closed(record)
        lines = changed([json.loads(line) for line in index.read_bytes().splitlines()], chance)
        with suppress(Exception):
            if chance.random() < 0.5:
                lines[0]["rows"] = len(lines) - 1
        text = b"".join(closed_line(line) for line in lines)
        return "index/00000.jsonl", text[: chance.choice([None, None, None, len(text) // 2])]


def closed_line(line: Any) -> bytes:
    try:
        return json.dumps(line, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"
    except RecursionError:
        return b"[" * 5000 + b"\n"


def check_source(kind: str, number: int) -> int:
    """Whoever comes upon a source or an index bears it. Returns the input's digest."""
    name, data = draw_source(kind, number)
    with scratch() as folder, bounded():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        borne(
            folder,
            lambda: open_source(folder),
            lambda: SOURCE.check(folder),
            lambda: read_index(folder, 0),
            lambda: put_index(folder, SOURCE.fingerprint, 0, LINES, None),
        )
    return digest_of({name: data})


# ---- the sweep ----------------------------------------------------------------------------------

SHARES = {  # cases of a kind; INPUTS times as many inputs
    "column.json": 2200, "commits": 2200, "COMPLETE": 1600, "valid bits": 50, "failures": 250,
    "objects": 1500, "source.json": 700, "index": 700,
}  # fmt: skip


def hostile_cases() -> list[Case]:
    return [(kind, case * INPUTS) for kind, cases in SHARES.items() for case in range(cases)]


def check_hostile(kind: str, first: int) -> list[int]:
    """Inputs `first` and following; the digest of each."""
    check, digests = check_column if kind in COLUMNS else check_source, []
    for number in range(first, first + INPUTS):
        with told(kind, number):
            digests.append(check(kind, number))
            assert not Path(CANARY).exists(), "code of a column was run"
    return digests


SWEEPS = [
    Sweep("hostile", f"{INPUTS} columns or sources with sealed records that lie",
          hostile_cases, check_hostile, lambda c: str(c[0])),
]  # fmt: skip
