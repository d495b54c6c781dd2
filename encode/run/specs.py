"""What only a loaded encoder can say of its columns: identity, layout, norm, int8 scales and the
row of the empty caption. A worker answers it, since the driver of a run holds no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from shards import ColumnSpec, Store, read_commit
from shards.column import committed
from shards.format import COLUMN, VERSION
from shards.format.atomic import Json

from ..config import EncodeConfig
from ..errors import BadTar, EncodeError
from ..models.encoder import (
    CALIBRATION_PICTURES,
    CALIBRATION_ROWS,
    CaptionEncoder,
    Encoder,
    ImageEncoder,
    Words,
    column_spec,
    existing_scales,
    layout_of,
    measured_row_scales,
    measured_scales,
)
from ..plan.sample_source import SourceJob
from ..source.decoding import Batch, View, load
from ..source.fetch import fetched
from ..source.members import read_captions
from ..source.tars import Tar, scan_tar

TRIES = 8  # tars that are looked at for captions to measure on


def column_specs(
    config: EncodeConfig, jobs: Sequence[SourceJob], encoders: Mapping[str, Encoder]
) -> tuple[dict[str, dict[str, ColumnSpec]], dict[str, Words], list[str]]:
    """Returns the spec of each column by source and column, the row of the empty caption of each
    column of captions, and what the user should know.
    """
    specs: dict[str, dict[str, ColumnSpec]] = {}
    notes: list[str] = []
    for job in jobs:
        specs[job.source.name] = {}
        for name, encoder in encoders.items():
            spec = column_spec(
                encoder, job.source.fingerprint, len(job.tars), config.shard_rows,
                partial(scales, encoder, job, name, config), job.images.get(name),
            )  # fmt: skip
            column = job.folder.child(name)
            if existing := existing_encoder(column):
                spec = beside_existing(encoder, spec, existing)
                if existing.get("version") == spec.identity["encoder"].get("version"):
                    notes += source_changes(encoder, column, len(job.tars))
            specs[job.source.name][name] = spec
    empty = {
        name: encoder.rows([""], config.engine.tokens)[0]
        for name, encoder in encoders.items()
        if isinstance(encoder, CaptionEncoder)
    }
    return specs, empty, notes


def existing_encoder(column: Store) -> Json | None:
    """Returns what the identity of a column on disk says of its encoder; None without one."""
    if column.size("column.json") is None:
        return None
    existing = column.unseal("column.json", COLUMN, VERSION)["identity"].get("encoder")
    return existing if isinstance(existing, dict) else None


def beside_existing(encoder: Encoder, spec: ColumnSpec, existing: Json) -> ColumnSpec:
    """Returns a column's spec with the figures of the column on disk where they are the same but for
    rounding, as on another machine.
    """
    same = encoder.with_outputs_of(existing)
    identity = {**spec.identity, "encoder": {**spec.identity["encoder"], **same}}
    return replace(spec, identity=identity) if same else spec


def source_changes(encoder: Encoder, column: Store, shards: int) -> list[str]:
    """Returns a note if the source file of an encoder's class is another one than that of the first
    shard which is committed; nothing compares it for a column's identity.
    """
    source = encoder.runs_on().get("class_source")
    numbers = committed(column, shards) if source else []
    if not numbers:
        return []
    before = read_commit(column, numbers[0]).provenance.get("class_source")
    if before in (None, source):
        return []
    return [
        f"{column.url}: the file that defines {encoder.model.cls} has changed since shard {numbers[0]} was "
        "encoded, its version has not. If what it computes has changed, state another version and "
        "encode another column"
    ]


def scales(encoder: Encoder, job: SourceJob, name: str, config: EncodeConfig) -> Json:
    """Returns the channel scales of an int8 column: those of the column on disk, else measured on
    the first tar that is one and has captions, or pictures.
    """
    existing = existing_scales(job.folder.child(name))
    if existing is not None:
        return existing
    tries = min(TRIES, len(job.tars))
    if isinstance(encoder, ImageEncoder):
        suffix, most, unit, plain = encoder.view.suffix, CALIBRATION_PICTURES, "picture", "float16"
        suffix = job.images.get(name, suffix)
    else:
        assert isinstance(encoder, CaptionEncoder)
        suffix, most, unit, plain = encoder.suffix, CALIBRATION_ROWS, "caption", "bfloat16"
    for shard in range(tries):
        try:
            if isinstance(encoder, ImageEncoder):
                images = _first_pictures(job, shard, View(encoder.view.resolution, suffix))
                layout = layout_of(encoder, len(job.tars), config.shard_rows)
                measured = measured_row_scales(encoder, images, config.engine.batch, layout)
                if measured["rows"]:
                    return measured
                continue
            captions = _first_captions(job, shard, encoder.suffix)
        except BadTar:
            continue  # it is reported when its turn comes
        if any(captions):
            return measured_scales(encoder, captions, config.engine.tokens)
    raise EncodeError(
        f"{job.tars[0]}: neither it nor the tars after it ({tries} were looked at) hold a {unit} "
        f"({suffix}) in their first {most} rows, so the scales of an int8 column cannot be measured. "
        f"Put another tar first, or store {plain}"
    )


def _first_pictures(job: SourceJob, shard: int, view: View) -> NDArray[np.uint8]:
    """Returns the crops of a tar's first rows that have a picture, (n, R, R, 3)."""
    place, size = job.tars[shard], job.size(shard)
    assert place is not None  # a run has all tars in reach
    with fetched(place, job.scratch, size) as path, path.open("rb") as file:
        Tar(file, size)
        rows = scan_tar(file, job.source.shard_rows)[0][:CALIBRATION_PICTURES]
        batch = Batch.empty((0, len(rows)), [view])
        load(rows, file.fileno(), batch, 0, len(rows))
        return batch.images[view][batch.good(view.suffix)]


def _first_captions(job: SourceJob, shard: int, suffix: str) -> list[str | None]:
    """Returns the captions of a tar's first rows, from the tar alone: scales follow neither from
    an index nor from what is behind these rows.
    """
    place, size = job.tars[shard], job.size(shard)
    assert place is not None  # a run has all tars in reach
    with fetched(place, job.scratch, size) as path, path.open("rb") as file:
        Tar(file, size)
        rows, _ = scan_tar(file, job.source.shard_rows)
        return read_captions(rows[:CALIBRATION_ROWS], file.fileno(), suffix)[0]
