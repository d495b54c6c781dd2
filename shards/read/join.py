"""Several columns of one source, read together by row id; several such sources, read as one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..column.commits import valid_rows
from ..column.members import member_read
from ..errors import BadRows, IdentityMismatch, OrderError, SourceMismatch
from ..format.atomic import Json
from ..format.layout import BLOCK, Norm, Status, differences
from ..store.base import Place, Store
from ..store.open import open_store
from .column import Column, open_spec
from .order import Order, Union

Text = (
    Place | Mapping[Any, float]
)  # a tokens or ids column, or several and how often each is chosen
Bad = Literal["skip", "error"]
Ints = NDArray[np.int64]
SHOWN = 8  # rows that an error lists


class Join:
    """A moments (or latents) column and one or several tokens (or ids) columns of one source, with the rows
    that are valid in all.

    `text`: a column, or (column, rate) pairs, of which each sample takes one: the choice depends on
    (seed, sample number) alone. `also`: further columns whose statuses are joined but which are not
    read, so that all runs of a comparison see the same rows. `truncated`: admit rows of status 1.
    `bad`: rows that are not valid somewhere are left out ("skip"), or refused with BadRows
    ("error"). `extra`: columns of rows of fixed shape that are delivered beside the latents.
    `pins`: by which some columns were opened, by their names in `identity`.
    """

    def __init__(
        self, latents: Column, text: Column | Sequence[tuple[Column, float]],
        also: Sequence[Column] = (), truncated: bool = False, *, bad: Bad = "skip",
        extra: Mapping[str, Column] | None = None, pins: Mapping[str, Json] | None = None,
    ) -> None:  # fmt: skip
        pairs = [(text, 1.0)] if isinstance(text, Column) else list(text)
        self.latents, self.truncated = latents, truncated
        self.texts, self.rates = tuple(c for c, _ in pairs), tuple(float(r) for _, r in pairs)
        self.also, self.extra = tuple(also), dict(extra or {})
        self._pins = dict(pins or {})
        if not pairs or not min(self.rates) > 0 or not abs(sum(self.rates) - 1) <= 1e-6:
            raise IdentityMismatch(
                f"text columns at the rates {list(self.rates)}: rates above 0 that add up to 1 "
                "expected"
            )
        _expect_kind(latents, "moments", "latents")
        for column in self.texts:
            _expect_kind(column, "tokens", "ids")
            check_same_encoding(self.text, column)
        for name, column in self.extra.items():
            if column.layout.ragged:
                raise IdentityMismatch(
                    f"{column.path}: found rows of any length, expected rows of one shape for the "
                    f"extra column {name!r}"
                )
        _, *others = self.columns.values()
        for column in others:
            check_same_source(latents, column)
        check_same_members(list(self.columns.values()))
        words = latents.words(truncated)
        for column in others:
            words &= column.words(truncated)
        self.words: NDArray[np.uint32] = words
        if bad == "error":
            refuse_bad_rows(list(self.columns.values()), truncated)

    @property
    def text(self) -> Column:
        """The first text column."""
        return self.texts[0]

    @property
    def columns(self) -> dict[str, Column]:
        """All columns, by the name that they have in `identity`."""
        texts = {f"text.{i}" if i else "text": column for i, column in enumerate(self.texts)}
        also = {f"also.{i}": column for i, column in enumerate(self.also)}
        extra = {f"extra.{name}": column for name, column in self.extra.items()}
        return {"latents": self.latents, **texts, **also, **extra}

    @property
    def norm(self) -> Norm:
        """Of the latents; IdentityMismatch if the column has none."""
        if self.latents.spec.norm is None:
            raise IdentityMismatch(f"{self.latents.path}: the column records no shift and scale")
        return self.latents.spec.norm

    @property
    def posterior(self) -> bool:
        """Whether latents are drawn from moments; else they stand in the column."""
        return self.latents.layout.kind == "moments"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent: half the channels of moments."""
        channels, height, width = self.latents.layout.row_shape
        return channels // 2 if self.posterior else channels, height, width

    @property
    def max_tokens(self) -> int:
        return max(column.layout.row_shape[0] for column in self.texts)

    @property
    def ids(self) -> bool:
        """Whether the text is token ids, which an encoder has yet to run on; else it is tokens."""
        return self.text.layout.kind == "ids"

    @property
    def text_width(self) -> int | None:
        """Of a token; None for ids, of which only their encoder knows it."""
        return None if self.ids else self.text.layout.row_shape[1]

    @property
    def valid_rows(self) -> Ints:
        """Row ids of all valid rows, ascending."""
        return valid_rows(self.words)

    def identity(self) -> Json:
        """What the columns are and which snapshot of them is read: pinned by checkpoints,
        compared on resume. `open_join(pins=)` takes it back.
        """
        found: Json = {"truncated": self.truncated}
        if len(self.texts) > 1:
            found["rates"] = list(self.rates)
        for name, column in self.columns.items():
            if name not in self._pins:  # asked once: COMPLETE may come while a run reads commits
                self._pins[name] = column.snapshot_id()
            pin = self._pins[name]
            found[name] = {
                "identity": column.spec.identity,
                "norm": column.spec.record()["norm"],
                "column": column.digest,
                "complete": pin["generation"],
            } | ({"shards": pin["shards"]} if pin["shards"] is not None else {})
        return found

    def close(self) -> None:
        for column in self.columns.values():
            column.close()


class Sources:
    """One or several joins that are read as one: `order` mixes them, `locate` tells them apart.

    Without weights they are concatenated: one order over the union, every row once an epoch. With
    weights each has epochs of its own, and a fixed share of the samples. All must agree in shapes,
    norm and encoders; IdentityMismatch names the fields.
    """

    def __init__(self, joins: Sequence[Join], weights: Sequence[float] | None = None) -> None:
        first = joins[0]
        for join in joins[1:]:
            check_same_encoding(first.latents, join.latents)
            check_same_encoding(first.text, join.text)
            if first.extra.keys() != join.extra.keys():
                raise IdentityMismatch(
                    f"{join.latents.path}: found the extra columns {sorted(join.extra)} with it, "
                    f"but {sorted(first.extra)} with {first.latents.path}"
                )
            for name, column in first.extra.items():
                check_same_encoding(column, join.extra[name])
        if weights is not None and len(weights) != len(joins):
            raise OrderError(f"{len(weights)} weights for {len(joins)} sources: one each expected")
        self.joins = tuple(joins)
        self.weights = None if weights is None else tuple(float(w) for w in weights)
        mixed = self.weights or len(joins) == 1
        self._union = None if mixed else Union([join.words for join in joins])

    @property
    def words(self) -> list[NDArray[np.uint32]]:
        """Valid-row bits as `Order` takes them: of each source, or of all laid end to end."""
        return [self._union.words] if self._union else [join.words for join in self.joins]

    def order(self, seed: int = 0, lanes: int = 64, window: int = 0) -> Order:
        """The order of samples over these sources."""
        return Order(self.words, seed, lanes, window, self.weights)

    def locate(self, source: Ints, row: Ints) -> tuple[Ints, Ints]:
        """(source, row id in it) of what `Order` calls (source, row id)."""
        return self._union.split(row) if self._union else (source, row)

    @property
    def norm(self) -> Norm:
        return self.joins[0].norm

    @property
    def posterior(self) -> bool:
        return self.joins[0].posterior

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.joins[0].latent_shape

    @property
    def max_tokens(self) -> int:
        return max(join.max_tokens for join in self.joins)

    @property
    def ids(self) -> bool:
        return self.joins[0].ids

    @property
    def text_width(self) -> int | None:
        return self.joins[0].text_width

    @property
    def texts(self) -> list[Column]:
        """The text columns of all sources; the first one's empty caption stands for all."""
        return [column for join in self.joins for column in join.texts]

    def identity(self) -> Json:
        """As of a join; further sources stand below `more`."""
        first, *others = (join.identity() for join in self.joins)
        more = {"more": others, "weights": self.weights and list(self.weights)} if others else {}
        return first | more

    def close(self) -> None:
        for join in self.joins:
            join.close()


def as_sources(join: Join | Sources) -> Sources:
    return Sources([join]) if isinstance(join, Join) else join


# Opening -----------------------------------------------------------------------------------------


def open_join(
    latents: Place, text: Text, also: Sequence[Place] = (), truncated: bool = False, *,
    bad: Bad = "skip", partial: bool = False, extra: Mapping[str, Place] | None = None,
    pins: Json | None = None,
) -> Join:  # fmt: skip
    """Open and join columns; a named error says which one is absent, unfinished, damaged or
    foreign.

    `text`: a column, or a mapping of columns to their rates. `partial`: columns may be unfinished;
    the rows that are committed now are read. `pins`: what `Join.identity` said earlier; exactly the
    generations that it names are opened, whatever has been added since.
    """
    rates = text if isinstance(text, Mapping) else {text: 1.0}
    used: dict[str, Json] = {}

    def opened(name: str, place: Place) -> Column:
        pinned = (pins or {}).get(name)
        # a pin of another column is of no use: the caller compares identities, and says so
        if pinned is None or pinned["column"] != open_spec(open_store(place))[1]:
            return Column.open(place, partial)
        used[name] = {"generation": pinned["complete"], "shards": pinned.get("shards")}
        return Column.open(place, snapshot_id=used[name])

    return Join(
        opened("latents", latents),
        [
            (opened(f"text.{i}" if i else "text", place), rate)
            for i, (place, rate) in enumerate(rates.items())
        ],
        [opened(f"also.{i}", place) for i, place in enumerate(also)],
        truncated,
        bad=bad,
        extra={name: opened(f"extra.{name}", place) for name, place in (extra or {}).items()},
        pins=used,
    )


def open_sources(
    latents: Place | Sequence[Place], text: Text | Sequence[Text], also: Sequence[Place] = (),
    truncated: bool = False, *, weights: Sequence[float] | None = None, bad: Bad = "skip",
    partial: bool = False, pins: Json | None = None,
) -> Sources:  # fmt: skip
    """Open one or several sources: a moments or latents column and a `text` (as in `open_join`) of each.

    Each `also` column goes to the source that it was made from. `pins`: what `Sources.identity`
    said earlier.
    """
    all_latents = [latents] if isinstance(latents, Store | Path | str) else list(latents)
    all_texts = [text] if isinstance(text, Store | Path | str | Mapping) else list(text)
    if not all_latents or len(all_latents) != len(all_texts):
        raise SourceMismatch(
            f"found {len(all_latents)} latent columns and {len(all_texts)} texts, expected one "
            "text (a column, or columns with their rates) for each latent column"
        )
    pinned = [pins, *pins.get("more", [])] if pins else []
    pinned += [{}] * (len(all_latents) - len(pinned))
    if len(all_latents) == 1:
        mine: list[list[Place]] = [list(also)]
    else:
        mine = _by_source(all_latents, also)
    joins = [
        open_join(z, t, a, truncated, bad=bad, partial=partial, pins=pin)
        for z, t, a, pin in zip(all_latents, all_texts, mine, pinned, strict=False)
    ]
    return Sources(joins, weights)


def _by_source(latents: Sequence[Place], also: Sequence[Place]) -> list[list[Place]]:
    """The `also` columns of each latent column's source."""
    sources = [open_spec(open_store(place))[0].identity["source"] for place in latents]
    mine: list[list[Place]] = [[] for _ in latents]
    for place in also:
        source = open_spec(open_store(place))[0].identity["source"]
        if source not in sources:
            raise SourceMismatch(
                f"{place}: made from source {source}, which is none of those that are read: "
                f"{sources}"
            )
        mine[sources.index(source)].append(place)
    return mine


# Refusals ----------------------------------------------------------------------------------------


def _expect_kind(column: Column, *kinds: str) -> None:
    if column.layout.kind not in kinds:
        raise IdentityMismatch(
            f"{column.path}: found a column of {column.layout.kind}, expected one of "
            f"{' or '.join(kinds)}"
        )


def check_same_source(a: Column, b: Column) -> None:
    """Raise SourceMismatch unless both columns were made from the same rows."""
    found, expected = b.spec.identity["source"], a.spec.identity["source"]
    if found != expected:
        raise SourceMismatch(
            f"{b.path}: made from source {found}, but {a.path} from {expected}. Columns join by "
            "row number: "
            "use columns of one source, or encode the missing one"
        )
    if a.layout.shard_rows != b.layout.shard_rows:  # row 1 of tar 1 has another id in each
        raise SourceMismatch(
            f"{b.path}: {b.layout.shard_rows} rows a shard, but {a.path} has {a.layout.shard_rows}. "
            "Encode both with the same shard_rows"
        )
    pairs = zip(a.snapshot.index, b.snapshot.index, strict=True)
    wrong = [s for s, (x, y) in enumerate(pairs) if x and y and x != y]
    if wrong:
        raise SourceMismatch(
            f"{b.path} and {a.path}: shards {wrong[:8]} were read from tars that held different "
            "rows. "
            "Encode one of the two columns again"
        )


def check_same_members(columns: Sequence[Column]) -> None:
    """Raise SourceMismatch if columns that read the same suffix, of captions or of pictures, were
    made of other ones. Commits are read of such columns alone; those of older releases say nothing.
    """
    by_suffix: dict[str, dict[str, Column]] = defaultdict(dict)
    for column in columns:
        if suffix := member_read(column.spec.identity):
            by_suffix[suffix][column.path] = column
    for suffix, some in by_suffix.items():
        first: dict[int, tuple[str, Column]] = {}
        for column in some.values() if len(some) > 1 else ():
            wrong: dict[str, list[int]] = defaultdict(list)
            for shard, digest in column.members(suffix).items():
                expected, other = first.setdefault(shard, (digest, column))
                if digest != expected:
                    wrong[other.path].append(shard)
            for other_path, shards in wrong.items():
                raise SourceMismatch(
                    f"{column.path} and {other_path}: shards {shards[:8]} ({len(shards)} in all) were "
                    f"made of other {suffix} members: the tars were changed in place between the "
                    "two. Encode one of the two columns again from the tars that are right"
                )


def encoding(column: Column) -> Json:
    """How a column was made, whatever the source and whichever caption of it was read."""
    identity = {k: v for k, v in column.spec.identity.items() if k != "source"}
    if column.layout.ragged and isinstance(identity.get("preprocess"), dict):
        identity["preprocess"] = {k: v for k, v in identity["preprocess"].items() if k != "caption"}
    shape = list(column.layout.row_shape)
    return {
        "kind": column.layout.kind,
        "identity": identity,
        "norm": column.spec.record()["norm"],
        "row_shape": shape[1:] if column.layout.ragged else shape,
    } | ({} if column.layout.ragged else {"element": column.layout.element})


def check_same_encoding(a: Column, b: Column) -> None:
    """Raise IdentityMismatch unless rows of both may stand in one batch."""
    lines = differences(encoding(b), encoding(a))
    text = a.layout.ragged and a is not b
    if text and not lines and not np.array_equal(a.empty(), b.empty()):
        lines = ["the tokens of the empty caption differ"]
    if lines:
        raise IdentityMismatch(
            "\n  ".join(
                [
                    f"{b.path} cannot be read together with {a.path}: it was made otherwise "
                    "(found there, expected as here):",
                    *lines,
                    "Use columns of one encoder and preprocessing",
                ]
            )
        )


def refuse_bad_rows(columns: Sequence[Column], truncated: bool) -> None:
    """Raise BadRows if a row that some column knows is not valid in all of them.

    Shards that a partly encoded column has not come to yet are not meant.
    """
    layout = columns[0].layout
    known = np.max([column.snapshot.rows for column in columns], axis=0)
    for column in columns:
        failed = {shard for shard, _ in column.snapshot.failed}
        content = column.snapshot.content
        known[[s for s, c in enumerate(content) if c is None and s not in failed]] = 0
    present = np.concatenate(
        [np.zeros(0, np.uint32), *(_first_bits(rows, layout.shard_rows) for rows in known.tolist())]
    )
    lines, examples = [], list[tuple[int, str]]()
    for column in columns:
        ids = valid_rows(present & ~column.words(truncated))
        for status, rows in _by_status(column, ids):
            lines.append(f"{column.path}: {len(rows)} rows are {status}")
            examples += [(int(row), f"{status} in {column.name}") for row in rows[:SHOWN]]
        nothing = [s for s, _ in column.snapshot.failed if not known[s]]
        if nothing:
            lines.append(f"{column.path}: shards {nothing[:SHOWN]} failed ({len(nothing)} in all)")
    if not lines:
        return
    first = [
        "row {1} of shard {0}: {2}".format(*divmod(row, layout.shard_rows), why)
        for row, why in sorted(examples)[:SHOWN]
    ]
    raise BadRows(
        "\n  ".join(
            [
                "found rows that are not ok in every column, expected none (bad: error):",
                *lines,
                "The first are",
                *first,
                "Say bad: skip to leave such rows out, or encode those shards again",
            ]
        )
    )


def _first_bits(count: int, of: int) -> NDArray[np.uint32]:
    """Words of `of` bits, the first `count` of them set."""
    words = np.zeros(of // BLOCK, np.uint32)
    words[: count // BLOCK] = 2**BLOCK - 1
    words[count // BLOCK : -(-count // BLOCK)] = (1 << count % BLOCK) - 1
    return words


def _by_status(column: Column, ids: Ints) -> Iterator[tuple[str, Ints]]:
    """(name of a status, the row ids that have it) of rows that are not admitted."""
    committed = np.array(column.snapshot.rows, np.int64) > 0
    status = np.full(ids.size, Status.SHARD_FAILED, np.uint8)
    there = committed[ids // column.layout.shard_rows]
    status[there] = column.status(ids[there])
    for value in np.unique(status):
        yield Status(int(value)).name.lower(), ids[status == value]
