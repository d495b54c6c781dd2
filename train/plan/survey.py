"""What a plan knows of the data: read from the columns, or from the config while there are none
yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from configs import ConfigError
from shards import IncompleteColumn, JoinedColumns, NotAColumn

from ..config import DataShape, TrainConfig
from ..run import open_columns

USUAL_TOKENS = 121.0  # of a BLIP3o caption; assumed where there is no column
MOST_CAPTIONS = 2048  # of each column, whose lengths are averaged


@dataclass(frozen=True)
class Source:
    name: str
    share: float | None  # of the samples; None: as many as it has rows
    rows: float | None


@dataclass(frozen=True)
class DataSummary:
    """What the columns are, or will be."""

    shape: DataShape
    sources: tuple[Source, ...]
    tokens: float  # a caption, mean
    latent_bytes: float  # a sample
    token_bytes: float
    notes: tuple[str, ...]
    ids: bool | None = None  # whether captions are ids; None where there are no columns

    @property
    def sample_bytes(self) -> float:
        return self.latent_bytes + self.tokens * self.token_bytes

    @property
    def rows(self) -> float | None:
        rows = [source.rows for source in self.sources]
        return None if None in rows else sum(r for r in rows if r is not None)


def summarise(config: TrainConfig) -> DataSummary:
    """Returns a summary of the columns; where they are missing or unfinished, of `data.expect`."""
    try:
        return of_columns(config)
    except (NotAColumn, IncompleteColumn) as error:
        if config.data.expect is None:
            raise ConfigError(
                f"{error}. To plan without columns, give their sizes: data.expect.channels=16 data.expect.height=32 "
                "data.expect.width=32 data.expect.text_width=2048 (those of a study in its `with`)"
            ) from None
        return _expected(config, config.data.expect, str(error))


def of_columns(config: TrainConfig) -> DataSummary:
    """Returns a summary of the columns; NotAColumn or IncompleteColumn where they are not there."""
    sources = open_columns(config, None)
    try:
        return _of_columns(config, sources)
    finally:
        sources.close()


def _expected(config: TrainConfig, shape: DataShape, reason: str) -> DataSummary:
    sources = tuple(Source(name, share, None) for name, share in _mix(config))
    notes = (
        f"no columns ({reason}): sizes from data.expect, latents taken as float16 moments, text as bfloat16",
        f"{USUAL_TOKENS:.0f} tokens a caption are assumed: give --tokens",
    )
    moments = 2 * 2 * shape.channels * shape.height * shape.width
    return DataSummary(shape, sources, USUAL_TOKENS, moments, 2 * shape.text_width, notes)


def _of_columns(config: TrainConfig, sources: JoinedColumns) -> DataSummary:
    width = sources.text_width or (config.data.expect and config.data.expect.text_width)
    if not width:
        raise ConfigError(
            f"{sources.texts[0].path}: a column of ids does not tell the width of the text: give "
            "data.expect.text_width and the other sizes"
        )
    summaries: list[Source] = []
    tokens: list[float] = []
    token_bytes: list[float] = []
    weights: list[float] = []
    for (name, share), source in zip(_mix(config), sources.by_source, strict=True):
        rows = source.valid_rows
        summaries.append(Source(name, share, float(len(rows))))
        weights.append(len(rows) if share is None else share)
        sample = rows[np.linspace(0, len(rows) - 1, min(MOST_CAPTIONS, len(rows))).astype(int)]
        pairs = list(zip(source.texts, source.rates, strict=True))
        tokens.append(sum(r * float(column.lengths(sample).mean()) for column, r in pairs))
        token_bytes.append(sum(r * column.layout.unit_bytes for column, r in pairs))
    return DataSummary(
        DataShape(*sources.latent_shape, width),
        tuple(summaries),
        float(np.average(tokens, weights=weights)),
        sources.by_source[0].latents.layout.unit_bytes,
        float(np.average(token_bytes, weights=weights)),
        (
            f"tokens a caption: mean of up to {MOST_CAPTIONS:,} of each source",
            *sources.mask_notes,
        ),
        sources.ids,
    )


def _mix(config: TrainConfig) -> list[tuple[str, float | None]]:
    """Returns the name of each source, and its share where shares are fixed."""
    names, weights = config.data.source_names, config.data.resolved().weights
    if weights is None:
        return [(name, None) for name in names]
    return [(name, weight / sum(weights)) for name, weight in zip(names, weights, strict=True)]


def with_rows(data: DataSummary, rows: Sequence[float]) -> DataSummary:
    """Returns the summary with the rows of each source; ConfigError unless each has a number."""
    if len(rows) != len(data.sources):
        raise ConfigError(
            f"--samples: found {len(rows)} numbers, expected one for each of the sources "
            f"{', '.join(s.name for s in data.sources)}, with commas between"
        )
    pairs = zip(data.sources, rows, strict=True)
    return replace(data, sources=tuple(replace(source, rows=count) for source, count in pairs))
