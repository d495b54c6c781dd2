"""What a plan knows of the data: read from the columns, or from the config while there are none yet."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from configs import ConfigError
from shards import IncompleteColumn, JoinedColumns, NotAColumn

from ..config import DataShape, TrainConfig
from ..run import open_columns

USUAL_TOKENS = 121.0  # of a BLIP3o caption; assumed where there is no column to look into
LOOKED_AT = 2048  # captions of a column


@dataclass(frozen=True)
class Source:
    name: str
    share: float | None  # of the samples; None: as many as it has rows
    rows: float | None


@dataclass(frozen=True)
class Given:
    """What the columns are, or will be."""

    shape: DataShape
    sources: tuple[Source, ...]
    tokens: float  # a caption, mean
    latent_bytes: float  # a sample
    token_bytes: float
    notes: tuple[str, ...]

    @property
    def sample_bytes(self) -> float:
        return self.latent_bytes + self.tokens * self.token_bytes

    @property
    def rows(self) -> float | None:
        rows = [source.rows for source in self.sources]
        return None if None in rows else sum(r for r in rows if r is not None)


def look(config: TrainConfig) -> Given:
    """Into the columns; where they are missing or unfinished, into `data.expect`."""
    try:
        sources = open_columns(config, None)
    except (NotAColumn, IncompleteColumn) as error:
        if config.data.expect is None:
            raise ConfigError(
                f"{error}. To plan without columns, give their sizes: data.expect.channels=16 data.expect.height=32 "
                "data.expect.width=32 data.expect.text_width=2048"
            ) from None
        return _expected(config, config.data.expect, str(error))
    try:
        return _found(config, sources)
    finally:
        sources.close()


def _expected(config: TrainConfig, shape: DataShape, why: str) -> Given:
    names, shares = _mix(config)
    given = [Source(n, s, None) for n, s in zip(names, shares, strict=True)]
    notes = (
        f"no columns ({why}): sizes from data.expect, latents taken as float16 moments, text as bfloat16",
        f"{USUAL_TOKENS:.0f} tokens a caption are assumed: give --tokens",
    )
    moments = 2 * 2 * shape.channels * shape.height * shape.width
    return Given(shape, tuple(given), USUAL_TOKENS, moments, 2 * shape.text_width, notes)


def _found(config: TrainConfig, sources: JoinedColumns) -> Given:
    width = sources.text_width or (config.data.expect and config.data.expect.text_width)
    if not width:
        raise ConfigError(
            f"{sources.texts[0].path}: a column of ids does not tell the width of the text: give "
            "data.expect.text_width and the other sizes"
        )
    names, shares = _mix(config)
    given: list[Source] = []
    tokens: list[float] = []
    token_bytes: list[float] = []
    weights: list[float] = []
    for name, share, join in zip(names, shares, sources.by_source, strict=True):
        rows = join.valid_rows
        given.append(Source(name, share, float(len(rows))))
        weights.append(len(rows) if share is None else share)
        some = rows[np.linspace(0, len(rows) - 1, min(LOOKED_AT, len(rows))).astype(int)]
        pairs = list(zip(join.texts, join.rates, strict=True))
        tokens.append(sum(r * float(column.lengths(some).mean()) for column, r in pairs))
        token_bytes.append(sum(r * column.layout.unit_bytes for column, r in pairs))
    return Given(
        DataShape(*sources.latent_shape, width),
        tuple(given),
        float(np.average(tokens, weights=weights)),
        sources.by_source[0].latents.layout.unit_bytes,
        float(np.average(token_bytes, weights=weights)),
        (f"tokens a caption: mean of up to {LOOKED_AT:,} of each source",),
    )


def _mix(config: TrainConfig) -> tuple[tuple[str, ...], list[float | None]]:
    """Names of the sources, and their shares where these are fixed."""
    names, weights = config.data.source_names, config.data.resolved().weights
    return names, [w / sum(weights) for w in weights] if weights else [None] * len(names)


def with_rows(given: Given, rows: Sequence[float]) -> Given:
    """The rows of each source, where the columns do not tell; ConfigError unless there is a number for each."""
    if len(rows) != len(given.sources):
        raise ConfigError(
            f"--samples: found {len(rows)} numbers, expected one for each of the sources "
            f"{', '.join(s.name for s in given.sources)}, with commas between"
        )
    return replace(
        given,
        sources=tuple(replace(s, rows=n) for s, n in zip(given.sources, rows, strict=True)),
    )
