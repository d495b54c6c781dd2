"""Everything that may be wrong with a source, case by case, each with the one outcome it has.

python -m tests.encode.corpus > docs/bad-sources.md
"""

from __future__ import annotations

import gzip
import io
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from encode.errors import MissingTar, NotASource
from shards import Status
from shards.errors import NotAColumn, StoreError
from shards.places import NotLocal
from tests.encode.toy import jpeg, picture, tar_bytes

OK, CUT, BROKEN, NO_IMAGE = (
    Status.OK,
    Status.TRUNCATED,
    Status.IMAGE_UNDECODABLE,
    Status.IMAGE_MISSING,
)
NO_TEXT, BAD_TEXT = Status.CAPTION_MISSING, Status.CAPTION_UNDECODABLE
Rows = Sequence[tuple[Status, Status]]  # of the picture and the caption of each row
SHARD_ROWS = 1024


@dataclass(frozen=True)
class Case:
    """Members that stand in a tar among others, and the rows they become."""

    name: str
    data: bytes  # of the members, headers included
    rows: Rows
    remark: str = ""


@dataclass(frozen=True)
class SourceCase:
    """Places that cannot be one source: the run ends before anything is encoded."""

    name: str
    tars: list[str]  # {} is a folder with a.tar, and b/a.tar
    error: type[Exception]
    message: str


@dataclass(frozen=True)
class TarCase:
    """A whole tar: the error that its shard fails with, or the rows it has and what is noted."""

    name: str
    data: bytes
    rows: int = 0
    note: str = ""  # what is told of it
    error: str = ""  # what its BadTar says; then there are no rows


Member = tuple[str, bytes | tarfile.TarInfo]


def members(*some: Member, how: int = tarfile.GNU_FORMAT) -> bytes:
    """Members as they stand in a tar, without its end."""
    return tar_bytes_of(some, how)[: -2 * 512]


def tar_bytes_of(some: Sequence[Member], how: int) -> bytes:
    parts = []
    for name, data in some:
        info = tarfile.TarInfo(name) if isinstance(data, bytes) else data
        info.name = name
        body = data if isinstance(data, bytes) else b""
        if isinstance(data, bytes):
            info.size = len(data)
        parts.append(info.tobuf(how, errors="surrogateescape") + body + bytes(-len(body) % 512))
    return b"".join(parts) + bytes(2 * 512)


def special(kind: bytes, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname, info.size = kind, link, size
    return info


def saved(image: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG that says it is so large, of whatever chunks."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IEND", b"")


def flipped(data: bytes, start: int, count: int) -> bytes:
    """Some bits turned, none of which makes or breaks a marker of JPEG."""
    chance, out = random.Random(0), bytearray(data)
    for _ in range(count):
        at = chance.randrange(start, len(out) - 2)
        if 0xFF not in out[at - 1 : at + 2]:
            out[at] ^= 1 << chance.randrange(3)
    return bytes(out)


def exif(**tags: Any) -> Image.Exif:
    header = Image.Exif()
    header[0x0112] = 6  # turned by 90 degrees
    for number, value in tags.items():
        header[int(number[1:], 16)] = value
    return header


def frames(kind: str) -> bytes:
    return saved(picture(1), kind, save_all=True, append_images=[picture(2), picture(3)])


# Pictures -----------------------------------------------------------------------------------------

GOOD = jpeg(7, quality=90)
PNG = saved(picture(7), "PNG")
CAPTION = b"a picture"
L16 = Image.fromarray((np.arange(48 * 40).reshape(40, 48) * 30).astype(np.uint16))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))

PICTURES: list[tuple[str, bytes, Status, str]] = [
    ("sound JPEG", GOOD, OK, ""),
    ("JPEG cut in half", saved(NOISE, "JPEG")[:1500], CUT, "the rest of the picture is grey"),
    ("JPEG cut inside its header", GOOD[:100], BROKEN, ""),
    ("JPEG without its last two bytes", GOOD[:-2], CUT, "every pixel is there, but the file does not say so"),
    ("JPEG with flipped bits in its pixels", flipped(saved(NOISE, "JPEG"), 700, 30), OK,
     "JPEG has no checksum: the picture is spoilt, and nothing tells"),
    ("JPEG with flipped bits in its tables", flipped(GOOD, 20, 200), BROKEN, ""),
    ("JPEG with bytes after its end", GOOD + b"trailing" * 100, OK, ""),
    ("JPEG with bytes before its start", b"\r\n" + GOOD, BROKEN, ""),
    ("progressive JPEG", jpeg(7, progressive=True), OK, ""),
    ("JPEG in shades of grey", saved(picture(7).convert("L"), "JPEG"), OK, ""),
    ("JPEG in CMYK", saved(picture(7).convert("CMYK"), "JPEG"), OK, "converted without a profile"),
    ("JPEG with a colour profile", saved(picture(7), "JPEG", icc_profile=b"\0" * 3000), OK, "not applied"),
    ("JPEG with 60 kB of EXIF", saved(picture(7), "JPEG", exif=exif(x010E="x" * 60_000)), OK, ""),
    ("JPEG that EXIF turns", saved(picture(7), "JPEG", exif=exif()), OK, "not turned, as in the reference"),
    ("JPEG of 1 x 1", saved(picture(7, 1, 1), "JPEG"), OK, "one colour everywhere"),
    ("JPEG of 30,000 x 1", saved(picture(7, 30_000, 1), "JPEG"), OK, "its middle; no gigabytes on the way"),
    ("JPEG of 1 x 30,000", saved(picture(7, 1, 30_000), "JPEG"), OK, "the same"),
    ("PNG of 20,000 x 20,000 in 60 bytes", png(20_000, 20_000, chunk(b"IDAT", zlib.compress(b""))), BROKEN,
     "a decompression bomb: over twice PIL's limit of pixels"),
    ("PNG with text that unpacks to 100 MB", png(
        8, 8, chunk(b"zTXt", b"c\0\0" + zlib.compress(bytes(100_000_000), 9)),
        chunk(b"IDAT", zlib.compress(bytes(72)))), CUT, "PIL does not unpack it, and calls the file damaged"),
    ("PNG of 0 x 0", png(0, 0, chunk(b"IDAT", zlib.compress(b""))), BROKEN, ""),
    ("PNG with 16 bits of grey", saved(L16, "PNG"), OK, "PIL clips it to 8 bits; so does the reference"),
    ("PNG with a palette and alpha", saved(picture(7).quantize(8), "PNG", transparency=0), OK, "alpha is dropped"),
    ("PNG in RGBA", saved(picture(7).convert("RGBA"), "PNG"), OK, "alpha is dropped"),
    ("PNG in one bit", saved(picture(7).convert("1"), "PNG"), OK, ""),
    ("PNG cut in half", saved(NOISE, "PNG")[:3000], CUT, ""),
    ("PNG with a flipped bit in its pixels", flipped(saved(NOISE, "PNG"), 200, 1), CUT, "its checksum tells"),
    ("GIF that moves", frames("GIF"), OK, "the first picture"),
    ("WebP that moves", frames("WEBP"), OK, "the first picture"),
    ("PNG called .jpg", PNG, OK, "the bytes tell the format, not the name"),
    ("WebP called .jpg", saved(picture(7), "WEBP"), OK, "the same"),
    ("BMP called .jpg", saved(picture(7), "BMP"), OK, "the same"),
    ("GIF called .jpg", saved(picture(7), "GIF"), OK, "the same"),
    ("TIFF called .jpg", saved(picture(7), "TIFF"), OK, "the same"),
    ("WebP cut in half", saved(NOISE, "WEBP")[:1000], BROKEN, ""),
    ("EPS called .jpg", saved(picture(7), "EPS"), BROKEN, "a program for Ghostscript, which is not started"),
    ("SVG called .jpg", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", BROKEN, ""),
    ("empty file", b"", BROKEN, ""),
    ("zeros", bytes(5000), BROKEN, ""),
    ("HTML page called .jpg", b"<!doctype html><title>429 Too Many Requests</title>", BROKEN, ""),
]  # fmt: skip

# Captions -----------------------------------------------------------------------------------------

CAPTIONS: list[tuple[str, bytes, Status, str]] = [
    ("empty caption", b"", OK, "the embedding of the empty caption"),
    ("caption of spaces", b" \n\t ", OK, "the same"),
    ("caption with NUL in it", b"a\0b", OK, ""),
    ("caption with a byte order mark", b"\xef\xbb\xbfa cat", OK, "the mark is part of it"),
    ("caption from right to left", "صورة قطة תמונה".encode(), OK, ""),
    ("caption with emoji", "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301".encode(), OK, ""),
    ("caption with control characters", b"\x1b[31mred\x07\r\n", OK, ""),
    ("caption that spells special tokens", b"<eos><pad><bos> a cat", OK, "taken for tokens, as in the reference"),
    ("caption of 1,000,000 characters", b"x" * 1_000_000, OK, "the first `max_tokens` tokens"),
    ("caption over one megabyte", b"x" * ((1 << 20) + 1), BAD_TEXT, ""),
    ("caption in Latin-1", "un café".encode("latin-1"), BAD_TEXT, "not UTF-8"),
    ("caption in UTF-16", "a cat".encode("utf-16"), BAD_TEXT, "not UTF-8"),
    ("caption with half a surrogate", b"\xed\xa0\x80", BAD_TEXT, "not UTF-8"),
    ("caption cut inside a character", "é".encode()[:1], BAD_TEXT, "not UTF-8"),
]  # fmt: skip

# Names and members --------------------------------------------------------------------------------

NAMES: list[Case] = [
    Case("no picture", members(("m1.txt", CAPTION)), [(NO_IMAGE, OK)]),
    Case("no caption", members(("m2.jpg", GOOD)), [(OK, NO_TEXT)]),
    Case("neither", members(("m3.json", b"{}")), [(NO_IMAGE, NO_TEXT)]),
    Case("picture with another suffix", members(("m4.png", PNG), ("m4.txt", CAPTION)), [(OK, OK)],
         "where the config names no suffix"),
    Case("picture with a suffix of none", members(("m4b.raw", PNG), ("m4b.txt", CAPTION)), [(NO_IMAGE, OK)],
         "a column reads pictures, or the suffixes that its config names"),
    Case("suffixes in capitals", members(("m5.JPG", GOOD), ("m5.Txt", CAPTION)), [(OK, OK)]),
    Case("several captions", members(("m6.jpg", GOOD), ("m6.txt", CAPTION), ("m6.short.txt", b"a")), [(OK, OK)],
         "one row"),
    Case("one key twice, side by side", members(
        ("n1.jpg", GOOD), ("n1.txt", CAPTION), ("n1.jpg", GOOD), ("n1.txt", CAPTION)), [(OK, OK), (OK, OK)],
         "two rows: a suffix that comes again starts a sample"),
    Case("one key twice, apart", members(
        ("n2.jpg", GOOD), ("n2.txt", CAPTION), ("n3.jpg", GOOD), ("n3.txt", CAPTION), ("n2.jpg", GOOD),
        ("n2.txt", CAPTION)), [(OK, OK)] * 3, "the key is not the identity of a row"),
    Case("a suffix twice", members(("n4.jpg", GOOD), ("n4.jpg", GOOD), ("n4.txt", CAPTION)),
         [(OK, NO_TEXT), (OK, OK)]),
    Case("pictures first, captions after", members(
        ("n5.jpg", GOOD), ("n6.jpg", GOOD), ("n5.txt", CAPTION), ("n6.txt", CAPTION)),
         [(OK, NO_TEXT), (OK, NO_TEXT), (NO_IMAGE, OK), (NO_IMAGE, OK)], "a sample is a run of one key"),
    Case("keys that differ in capitals alone", members(("n7.jpg", GOOD), ("N7.txt", CAPTION)),
         [(OK, NO_TEXT), (NO_IMAGE, OK)]),
    Case("dots in the name", members(("v1.5.jpg", GOOD), ("v1.5.txt", CAPTION)), [(NO_IMAGE, NO_TEXT)],
         "the key ends at the first dot, so the suffixes are 5.jpg and 5.txt"),
    Case("folders", members(("d", special(tarfile.DIRTYPE)), ("d/a.jpg", GOOD), ("d/a.txt", CAPTION)), [(OK, OK)]),
    Case("a file without a suffix in between", members(("p1.jpg", GOOD), ("README", b"1"), ("p1.txt", CAPTION)),
         [(OK, OK)], "it belongs to no sample and parts none"),
    Case("hidden files of macOS", members(("p2.jpg", GOOD), ("._p2.jpg", b"\0\5\x16\7"), ("p2.txt", CAPTION)),
         [(OK, OK)], "the same"),
    Case("names that climb out", members(("../../p3.jpg", GOOD), ("../../p3.txt", CAPTION)), [(OK, OK)],
         "a name is never used as a path"),
    Case("absolute names", members(("/etc/p4.jpg", GOOD), ("/etc/p4.txt", CAPTION)), [(OK, OK)], "the same"),
    Case("names with backslashes, quotes and line ends", members(("a\\b\"'\n.jpg", GOOD), ("a\\b\"'\n.txt", CAPTION)),
         [(OK, OK)]),
    Case("names that are not UTF-8", members(
        ("p\udcff\udcfe.jpg", GOOD), ("p\udcff\udcfe.txt", CAPTION), how=tarfile.USTAR_FORMAT), [(OK, OK)],
         "the key is written with escapes"),
    Case("long names of GNU", members((f"{'g' * 300}.jpg", GOOD), (f"{'g' * 300}.txt", CAPTION)), [(OK, OK)]),
    Case("long names of PAX", members(
        (f"{'é' * 300}.jpg", GOOD), (f"{'é' * 300}.txt", CAPTION), how=tarfile.PAX_FORMAT), [(OK, OK)]),
    Case("a name of 70,000 characters", members(
        ("p5.jpg", GOOD), (f"{'k' * 70_000}.jpg", GOOD), ("p5.txt", CAPTION)), [(OK, OK)],
         "longer than an index holds: it belongs to no sample"),
    Case("symbolic link for a picture", members(
        ("q1.jpg", special(tarfile.SYMTYPE, "/etc/passwd")), ("q1.txt", CAPTION)), [(NO_IMAGE, OK)],
         "links are not followed"),
    Case("hard link for a picture", members(
        ("q2.jpg", special(tarfile.LNKTYPE, "n1.jpg")), ("q2.txt", CAPTION)), [(NO_IMAGE, OK)], "the same"),
    Case("pipe for a caption", members(("q3.jpg", GOOD), ("q3.txt", special(tarfile.FIFOTYPE))), [(OK, NO_TEXT)]),
    Case("device for a caption", members(("q4.jpg", GOOD), ("q4.txt", special(tarfile.CHRTYPE))), [(OK, NO_TEXT)]),
    Case("sparse file for a picture", members(
        ("q5.jpg", special(tarfile.GNUTYPE_SPARSE)), ("q5.txt", CAPTION)), [(NO_IMAGE, OK)],
         "its bytes do not stand in the tar as they are"),
    Case("a member of an unknown kind", members(("q6.jpg", special(b"Z")), ("q6.txt", CAPTION)), [(NO_IMAGE, OK)],
         "only plain files are read"),
]  # fmt: skip


def row_cases() -> list[Case]:
    """Every case of members, in the order of their tar."""
    cases = [
        Case(
            name,
            members((f"i{n:03d}.jpg", data), (f"i{n:03d}.txt", CAPTION)),
            [(status, OK)],
            remark,
        )
        for n, (name, data, status, remark) in enumerate(PICTURES)
    ]
    cases += [
        Case(
            name, members((f"c{n:03d}.jpg", GOOD), (f"c{n:03d}.txt", data)), [(OK, status)], remark
        )
        for n, (name, data, status, remark) in enumerate(CAPTIONS)
    ]
    return cases + NAMES


# Whole tars ---------------------------------------------------------------------------------------

TWO = members(("a.jpg", GOOD), ("a.txt", CAPTION), ("b.jpg", GOOD), ("b.txt", CAPTION))
ONE = members(("a.jpg", GOOD), ("a.txt", CAPTION))
END = bytes(1024)


def resized(data: bytes, at: int, size: int) -> bytes:
    """Another size in the header at a place, and its sum made right."""
    header = bytearray(data[at : at + 512])
    header[124:136] = (256**12 + size).to_bytes(13, "big")[1:] if size < 0 else (
        b"\x80" + size.to_bytes(11, "big"))  # fmt: skip
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


def old_format(data: bytes) -> bytes:
    """The same members with headers that say nothing of ustar."""
    out = bytearray(data)
    while (at := out.find(b"ustar  \0")) >= 0:
        out[at : at + 8] = bytes(8)
        header = out[at - 257 : at + 255]
        header[148:156] = b" " * 8
        out[at - 109 : at - 101] = b"%06o\0 " % sum(header)
    return bytes(out)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.jpg", GOOD)
    return buffer.getvalue()


def long_link(size: int) -> bytes:
    return special(tarfile.GNUTYPE_LONGNAME, size=size).tobuf(tarfile.GNU_FORMAT)


TARS: list[TarCase] = [
    TarCase("sound tar", TWO + END, 2),
    TarCase("tar in the format of 1979", old_format(TWO) + END, 2),
    TarCase("tar of PAX with a global header", tar_bytes(
        [("a.jpg", GOOD), ("a.txt", CAPTION)], format=tarfile.PAX_FORMAT, pax_headers={"comment": "é"}), 1),
    TarCase("file of no bytes", b"", error="not a tar (empty file"),
    TarCase("random bytes", random.Random(0).randbytes(20_000), error="not a tar"),
    TarCase("HTML page", b"<!doctype html><title>Rate limit</title>" * 40, error="not a tar (HTML or XML"),
    TarCase("pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n" * 12,
            error="not a tar (a pointer of Git LFS"),
    TarCase("tar in gzip", gzip.compress(TWO + END, mtime=0), error="not a tar (gzip"),
    TarCase("zip", zipped(), error="not a tar (zip"),
    TarCase("tar without members", bytes(10_240), error="no sample in it (an empty tar"),
    TarCase("tar without a sample", members(("README", b"1"), ("d", special(tarfile.DIRTYPE))) + END,
            error="no sample in it"),
    TarCase("tar cut inside its first member", ONE[:700], error="no sample in it (cut off at byte 700"),
    TarCase("tar cut inside a header", TWO[: len(ONE) + 200], 1, "cut off at byte"),
    TarCase("tar cut inside a picture", TWO[: len(ONE) + 800], 1, "inside b.jpg"),
    TarCase("tar cut between picture and caption", TWO[:-1024], 2, "before the end of the archive"),
    TarCase("tar cut before its end", TWO, 2, "before the end of the archive"),
    TarCase("tar with a damaged header", TWO[: len(ONE)] + b"\xff" * 512 + TWO[len(ONE) + 512 :] + END, 1,
            "neither a member nor the end"),
    TarCase("member that claims 8 exabytes", resized(TWO, len(ONE), 2**62) + END, 1, "cut off at byte"),
    TarCase("member that claims 1 terabyte", resized(TWO, len(ONE), 2**40) + END, 1, "inside b.jpg"),
    TarCase("member of negative size", resized(TWO, len(ONE), -1024) + END, 1, "damaged after 1 rows"),
    TarCase("long name that claims 3 gigabytes", ONE + long_link(3 << 30) + TWO + END, 1, "damaged after 1 rows"),
    TarCase("5,000 long names without a member", ONE + long_link(0) * 5000, 1, "damaged after 1 rows"),
    TarCase("one tar behind another", ONE + bytes(10_240) + TWO + END, 1, "more after the end of the archive"),
    TarCase("one tar behind another, after 3 MB of zeros", ONE + bytes(3_000_320) + TWO + END, 1,
            "more after the end of the archive"),
    TarCase("tar with 3 MB of zeros at its end", ONE + bytes(3_000_320), 1),
    TarCase("more rows than a shard has room for", members(*((f"{i}.txt", b"") for i in range(SHARD_ROWS + 1))) + END,
            error="more than 1024 rows"),
    TarCase("frames of a film as one sample", members(*((f"f.{i:04d}.jpg", b"") for i in range(300))) + END,
            error="more than 256 members of one sample"),
]  # fmt: skip

SOURCES: list[SourceCase] = [
    SourceCase(
        "a tar that is not there", ["{}/a.tar", "{}/d.tar"], MissingTar, "1 of 2 tars is not there"
    ),
    SourceCase(
        "a folder without tars",
        ["{}/a.tar", "{}/c"],
        NotASource,
        "a folder without tars",
    ),
    SourceCase("a pattern of nothing", [], NotASource, "found no tar"),
    SourceCase(
        "two tars of one name", ["{}/a.tar", "{}/b/a.tar"], NotASource, "two tars called a.tar"
    ),
    SourceCase("one tar twice", ["{}/a.tar", "{}/a.tar"], NotASource, "two tars called a.tar"),
    SourceCase(
        "an url with a query", ["https://server.invalid/a.tar?key=1"], StoreError, "found a query"
    ),
    SourceCase(
        "an url with a password",
        ["https://me:secret@server.invalid/a.tar"],
        StoreError,
        "found a user or password",
    ),
    SourceCase(
        "a home folder of a user that does not exist",
        ["~no-such-user-here/a.tar"],
        NotLocal,
        "no such user's home",
    ),
    SourceCase(
        "an url of another kind",
        ["ftp://server.invalid/a.tar"],
        NotAColumn,
        "found the scheme 'ftp'",
    ),
]


CHANGES = [  # see test_changed.py
    ("another size when it is opened", "BadTar: ... found N bytes, the source was made of M ..."),
    ("cut off, lengthened or written to while it is read", "BadTar or TarChanged, tried again"),
    ("other captions (txt) than the index knows", "SourceChanged: ... other members or captions ..."),
    ("other pictures, or captions of any suffix, than an earlier column read",
     "SourceChanged: ... was made of other jpg members ..."),
    ("values that a killed attempt made of other members",
     "CorruptColumn: ... of no commit: delete it ..."),
]  # fmt: skip


# The page ------------------------------------------------------------------------------------------

HEAD = """\
# Bad sources and what becomes of them

Written by `python -m tests.encode.corpus > docs/bad-sources.md` from the table that the tests encode: a
source of all these rows and tars is encoded into a column of moments and one of tokens, and each row must end
as this page says. A row is never dropped: it keeps its number and gets a status, in every column alike, and
the trainer reads the rows that are `ok` in all columns that it joins (`truncated` ones if asked).
"""


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def page() -> str:
    """The documentation's table."""
    lines = [HEAD, "## Samples", "", "| case | picture | caption | remark |", "|---|---|---|---|"]
    for case in row_cases():
        images, captions = (
            ", ".join(s.name.lower() for s in column) for column in zip(*case.rows, strict=True)
        )
        lines.append(f"| {cell(case.name)} | {images} | {captions} | {cell(case.remark)} |")
    lines += [
        "", "A case of several rows names the status of each, in order.", "", "## Tars", "",
        "A tar that is cut off or damaged keeps what stands before; the index, the output and the report note it.",
        "One that holds nothing fails (`BadTar`): its shard is recorded in `failures/`, the others go on, and the",
        "run ends with exit code 3. A lack of memory is no fault of a picture: the shard is tried again, and fails",
        "with `MemoryError` after three attempts.",
        "", "| case | outcome |", "|---|---|",
    ]  # fmt: skip
    for tar in TARS:
        rows = f"{tar.rows} row{'s' * (tar.rows != 1)}"
        kept = f"{rows} kept, noted: \u201c... {tar.note} ...\u201d" if tar.note else f"{rows}"
        lines.append(
            f"| {cell(tar.name)} | {f'fails: BadTar, ... {tar.error} ...' if tar.error else kept} |"
        )
    lines += [
        "", "## Tars that change", "",
        "Such a shard fails without a commit, what it had written is taken back, and the run ends with exit code 3.",
        "Restore the tar; `encode retry-failed` then makes the shard.",
        "", "| case | outcome |", "|---|---|",
        *(f"| {change} | {outcome} |" for change, outcome in CHANGES),
        "", "## Sources", "", "Nothing is encoded, exit code 2.", "", "| case | error |", "|---|---|",
        *(f"| {cell(s.name)} | {s.error.__name__}: ... {s.message} ... |" for s in SOURCES),
        "| a suffix that no sample in the first tars has | NoSuchSuffix: ... Suffixes there, with their rows: ... |",
        "| a source or a column whose name cannot be a folder's | ConfigError: ... Call it ... |",
        "",
        "How a suffix is written in the config does not matter: `.JPG` is `jpg`. Rows that lack a column's suffix and",
        "have others are counted by those, in the output, in `report.json` and by `plan`. A column in which no row is",
        "usable, or most rows lack their picture or caption, is reported as such, and `run` and `status` end with 3.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
