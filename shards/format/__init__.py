"""What exists on disk: names, shapes, JSON records, whole files put at once."""

from __future__ import annotations

from .identity import (
    CaptionPreprocess,
    ColumnIdentity,
    EncoderIdentity,
    PicturePreprocess,
    preprocess_of,
    without_figures,
)
from .int8 import (
    calibrate,
    calibrate_rows,
    channel_scale,
    quantise,
    quantise_rows,
    stored_rows,
    to_floats,
)
from .layout import (
    COLUMN,
    FAILURE,
    GROUP_JSON,
    HAS_VALUES,
    KINDS,
    SHARD_ROWS,
    VERSION,
    ZARR_ROWS,
    ArraySpec,
    differences,
)
from .names import checked_name, proposed, refuse_doubles
from .norm import summary_of
from .records import MAX_CAPTIONS, FailureRecord, parse_index_head, sealed

__all__ = [
    "ArraySpec",
    "COLUMN",
    "CaptionPreprocess",
    "ColumnIdentity",
    "EncoderIdentity",
    "FAILURE",
    "FailureRecord",
    "GROUP_JSON",
    "HAS_VALUES",
    "KINDS",
    "MAX_CAPTIONS",
    "PicturePreprocess",
    "SHARD_ROWS",
    "VERSION",
    "ZARR_ROWS",
    "calibrate",
    "calibrate_rows",
    "channel_scale",
    "checked_name",
    "differences",
    "parse_index_head",
    "preprocess_of",
    "proposed",
    "quantise",
    "quantise_rows",
    "refuse_doubles",
    "sealed",
    "stored_rows",
    "summary_of",
    "to_floats",
    "without_figures",
]
