"""Sources of an encode config that are no tars: packed once into <root>/packed/<source>, then found
there.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from shards.console import Bar, counted, render
from shards.places import local_path

from ..config import EncodeConfig
from ..errors import NotASource
from ..source.places import expand, is_url, tars_in
from .kinds import Options, kind_of, open_rows
from .listing import suffix_of, utf8
from .pack import mostly_lost, pack, report
from .table import TABLES
from .writer import Packed, read_report

PACKED = "packed"  # folder of the root


def with_packed(config: EncodeConfig, make: bool) -> EncodeConfig:
    """Returns a config whose sources are all tars: pictures in a folder, a table or Parquet are packed
    if need be. Without `make` nothing is, and what is not packed yet stays as it is. Raises NotASource
    where it cannot be packed, or, with `make`, where other files were than are there now.
    """
    sources = dict(config.sources)
    for name, places in config.sources.items():
        packed = _packed(config, name, expand(places), make)
        if packed is not None:
            sources[name] = packed.tars
    return config.model_copy(update={"sources": sources})


def _packed(config: EncodeConfig, name: str, places: list[str], make: bool) -> Packed | None:
    """Returns what a source is packed into; None where it is of tars, or not packed yet."""
    out = _target(config, name)
    if len(places) == 1 and out is not None and not is_url(places[0]):
        path = local_path(places[0])
        if not path.exists():  # the pictures may be gone, and their tars serve
            record = read_report(out)
            if record is not None and record["source"] == utf8(path.resolve()):
                return Packed(out, record, fresh=False)
    pair = place_and_target(config, name, places)
    if pair is None:
        return None
    path, out = pair
    if not make:
        record = read_report(out)
        if record is None:
            return None
        if record["source"] != utf8(path.resolve()):
            text = (
                f"source {name!r}: {out} was packed from {record['source']}. `python -m encode run CONFIG` "
                f"refuses {path} if its files are others"
            )
            print(render(text), file=sys.stderr)
        elif record["state"]["listing"] != _digest(path):
            text = (
                f"source {name!r}: {path} holds other files or dates than were packed into {out}, which is "
                f"what is counted here. `python -m encode run CONFIG` refuses it: name {out}/*.tar as the "
                "source to go on with those, or give the source another name"
            )
            print(render(text), file=sys.stderr)
        return Packed(out, record, fresh=False)
    packed = pack(path, out)
    words = "packed" if packed.fresh else "already packed"
    tars = counted(len(packed.tars), "tar")
    print(render(f"source {name!r}: {path} is {words} into {out}, {tars}"), flush=True)
    if packed.fresh or mostly_lost(packed.record):
        print(report(packed.record), flush=True)
    return packed


def _digest(path: Path) -> str:
    """Returns the digest of what `run` would pack."""
    with Bar(f"list {shlex.quote(path.name)}", unit="pictures") as bar:
        rows = open_rows(path, kind_of(path), Options(), None, bar.advance)
    try:
        return rows.digest
    finally:
        rows.close()


def place_and_target(
    config: EncodeConfig, name: str, places: Sequence[str]
) -> tuple[Path, Path] | None:
    """Returns what a source is packed from, and the folder for its tars; None where it is of tars.
    NotASource where it cannot be packed by `run`.
    """
    paths = (local_path(place) for place in places if not is_url(place))
    path = next(filter(to_be_packed, paths), None)
    if path is None:
        return None
    if len(places) > 1:
        raise NotASource(
            f"source {name!r}: {path} is no tar, and not all of the source. Make it a source of its "
            f"own, or pack it yourself by {_command(path)}"
        )
    kind_of(path)
    out = _target(config, name)
    if out is None:
        raise NotASource(
            f"source {name!r}: {path} is no tar, and cannot be packed into {config.root}. Pack it into "
            f"a folder by {_command(path)}, and name that"
        )
    return path, out


def _target(config: EncodeConfig, name: str) -> Path | None:
    folder = config.root_store.folder
    return None if folder is None else folder / PACKED / name


def _command(path: Path) -> str:
    return f"`python -m encode pack {shlex.quote(str(path))} FOLDER`"


def to_be_packed(path: Path) -> bool:
    if path.is_dir():
        return not tars_in(path)
    return path.is_file() and suffix_of(path.name) in (*TABLES, "parquet")
