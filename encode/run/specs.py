"""What only a loaded encoder can say of its columns: identity, layout, norm, int8 scales and the
row of the empty caption. A worker answers it, since the driver of a run holds no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from shards import ColumnSpec
from shards.format.atomic import Json

from ..config import EncodeConfig
from ..errors import BadTar, EncodeError
from ..models.encoder import (
    CALIBRATION_ROWS,
    CaptionEncoder,
    Encoder,
    Words,
    column_spec,
    existing_scales,
    measured_scales,
)
from ..plan.sample_source import SourceJob
from ..source.fetch import fetched
from ..source.members import read_captions
from ..source.tars import Tar, scan_tar

TRIES = 8  # tars that are looked at for captions to measure on


def column_specs(
    config: EncodeConfig, jobs: Sequence[SourceJob], encoders: Mapping[str, Encoder]
) -> tuple[dict[str, dict[str, ColumnSpec]], dict[str, Words]]:
    """Returns the spec of each column by source and column, and the row of the empty caption of
    each column of captions.
    """
    specs = {
        job.source.name: {
            name: column_spec(
                encoder, job.source.fingerprint, len(job.tars), config.shard_rows,
                partial(scales, encoder, job, name, config), job.images.get(name),
            )
            for name, encoder in encoders.items()
        }
        for job in jobs
    }  # fmt: skip
    empty = {
        name: encoder.rows([""], config.engine.tokens)[0]
        for name, encoder in encoders.items()
        if isinstance(encoder, CaptionEncoder)
    }
    return specs, empty


def scales(encoder: Encoder, job: SourceJob, name: str, config: EncodeConfig) -> Json:
    """Returns the channel scales of an int8 column: those of the column on disk, else measured on
    the first tar that is one and has captions.
    """
    assert isinstance(encoder, CaptionEncoder)
    existing = existing_scales(job.folder.child(name))
    if existing is not None:
        return existing
    tries = min(TRIES, len(job.tars))
    for shard in range(tries):
        try:
            captions = _first_captions(job, shard, encoder.suffix)
        except BadTar:
            continue  # it is reported when its turn comes
        if any(captions):
            return measured_scales(encoder, captions, config.engine.tokens)
    raise EncodeError(
        f"{job.tars[0]}: neither it nor the tars after it ({tries} were looked at) hold a caption "
        f"({encoder.suffix}) in their first {CALIBRATION_ROWS} rows, so the scales of an int8 column "
        "cannot be measured. Put another tar first, or store bfloat16"
    )


def _first_captions(job: SourceJob, shard: int, suffix: str) -> list[str | None]:
    """Returns the captions of a tar's first rows, from the tar alone: scales follow neither from
    an index nor from what is behind these rows.
    """
    place, size = job.tars[shard], job.source.tars[shard][1]
    assert place is not None  # a run has all tars in reach
    with fetched(place, job.scratch, size) as path, path.open("rb") as file:
        Tar(file, size)
        rows, _ = scan_tar(file, job.source.shard_rows)
        return read_captions(rows[:CALIBRATION_ROWS], file.fileno(), suffix)[0]
