"""Opening columns that are read as one: places, pins and masks of one or several sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..column.mask import Mask, read_mask
from ..column.statistics import MeasuredNorm, find_norm, latent_shape
from ..errors import BadStatistics, SourceMismatch
from ..format.atomic import Json
from ..store.base import Place, Store
from ..store.open import open_store
from .column import Column, open_spec
from .compatible import Bad, check_mask_source
from .join import JoinedColumns, SourceColumns

# a tokens or ids column, or several, each with the share of the samples that takes it
Text = Place | Mapping[Any, float]
SOURCES = 16  # that are opened at once


def open_join(
    latents: Place, text: Text, also: Sequence[Place] = (), truncated: bool = False, *,
    bad: Bad = "skip", partial: bool = False, extra: Mapping[str, Place] | None = None,
    pins: Json | None = None, masks: Sequence[Place] = (),
) -> JoinedColumns:  # fmt: skip
    """Opens and joins the columns of one source; a named error says which one is absent, unfinished,
    damaged or foreign.

    `text`: a column, or a mapping of columns to their rates. `partial`: columns may be unfinished;
    the rows that are committed now are read. `masks`: files that `shards mask` wrote. `pins`: what
    `JoinedColumns.identity` returned earlier; exactly the snapshots that it names are opened,
    whatever has been added since.
    """
    rows = _masks_by_source([latents], masks)[0]
    source = _open_source(
        latents, text, also, truncated, bad, partial, extra or {}, pins or {}, rows
    )
    return JoinedColumns([source])


def open_sources(
    latents: Place | Sequence[Place], text: Text | Sequence[Text], also: Sequence[Place] = (),
    truncated: bool = False, *, weights: Sequence[float] | None = None, bad: Bad = "skip",
    partial: bool = False, pins: Json | None = None, masks: Sequence[Place] = (),
    norm: str = "config",
) -> JoinedColumns:  # fmt: skip
    """Opens one or several sources: a moments or latents column and a `text` of each, as in
    `open_join`. `also` columns and masks go to all of the source that they were made from.

    `norm`: "config" for the one of the columns, or one that was measured of the first latent column:
    "measured", "measured-per-place" or a digest, which several sources require. Where `pins` name
    such a one, it is taken from them; BadStatistics where there is none.
    """
    all_latents = [latents] if isinstance(latents, Store | Path | str) else list(latents)
    all_texts = [text] if isinstance(text, Store | Path | str | Mapping) else list(text)
    if not all_latents or len(all_latents) != len(all_texts):
        raise SourceMismatch(
            f"found {len(all_latents)} latent columns and {len(all_texts)} texts, expected one "
            "text (a column, or columns with their rates) for each latent column"
        )
    all_masks = _masks_by_source(all_latents, masks)
    all_also = [list(also)] if len(all_latents) == 1 else _by_source(all_latents, also)
    all_pins = [pins, *pins.get("more", [])] if pins else []
    all_pins += [{}] * (len(all_latents) - len(all_pins))
    sources = zip(all_latents, all_texts, all_also, all_pins, all_masks, strict=False)
    with ThreadPoolExecutor(SOURCES) as pool:
        opened = [
            pool.submit(_open_source, z, t, a, truncated, bad, partial, {}, p, m)
            for z, t, a, p, m in sources
        ]
        join = JoinedColumns([source.result() for source in opened], weights)
    if norm != "config":
        if len(all_latents) > 1 and norm.startswith("measured"):
            raise BadStatistics(
                f"data.norm: found {norm} with {len(all_latents)} sources, whose latents have norms of "
                f"their own, expected one for all. Name one of {join.latents.path} by its digest, which "
                f"`python -m shards norm` prints, or say config"
            )
        join.measured = _measured(join.latents, norm, (pins or {}).get("latents", {}))
    return join


def _measured(latents: Column, named: str, pin: Json) -> MeasuredNorm:
    """Returns the norm that is asked for: the pinned one if it is that, else one of the column;
    BadStatistics for one of latents of another shape.
    """
    measured = MeasuredNorm.of_identity(pin)
    if measured is None or named not in (measured.method, measured.digest):
        measured = find_norm(latents.store, latents.digest, latents.snapshot.digest, named)
    try:
        measured.norm.check_shape(latent_shape(latents.layout))
    except ValueError as error:
        raise BadStatistics(
            f"{latents.path}: norm {measured.digest}: {error}. Delete it and measure again"
        ) from None
    return measured


def _open_source(
    latents: Place, text: Text, also: Sequence[Place], truncated: bool, bad: Bad, partial: bool,
    extra: Mapping[str, Place], pins: Json, masks: Sequence[Mask],
) -> SourceColumns:  # fmt: skip
    rates = text if isinstance(text, Mapping) else {text: 1.0}
    snapshot_ids: dict[str, Json] = {}

    def open_column(name: str, place: Place) -> Column:
        pin = pins.get(name)
        # a pin of another column is of no use: the caller compares identities, and says so
        if pin is None or pin["column"] != open_spec(open_store(place))[1]:
            return Column.open(place, partial)
        snapshot_ids[name] = {"generation": pin["complete"], "shards": pin.get("shards")}
        return Column.open(place, snapshot_id=snapshot_ids[name])

    texts = {f"text.{i}" if i else "text": place for i, place in enumerate(rates)}
    further = {f"also.{i}": place for i, place in enumerate(also)}
    extras = {f"extra.{name}": place for name, place in extra.items()}
    places = {"latents": latents, **texts, **further, **extras}
    with ThreadPoolExecutor(len(places)) as pool:  # a store takes its time for each
        opened = pool.map(open_column, places.keys(), places.values())
        columns = dict(zip(places, opened, strict=True))
    return SourceColumns(
        columns["latents"],
        [(columns[name], rate) for name, rate in zip(texts, rates.values(), strict=True)],
        [columns[name] for name in further],
        truncated,
        bad=bad,
        extra={name: columns[f"extra.{name}"] for name in extra},
        snapshot_ids=snapshot_ids,
        masks=masks,
    )


def _by_source(latents: Sequence[Place], also: Sequence[Place]) -> list[list[Place]]:
    """Returns the `also` columns of each latent column's source."""
    sources = [open_spec(open_store(place))[0].identity["source"] for place in latents]
    groups: list[list[Place]] = [[] for _ in latents]
    for place in also:
        source = open_spec(open_store(place))[0].identity["source"]
        if source not in sources:
            raise SourceMismatch(
                f"{place}: made from source {source}, which is none of those that are read: "
                f"{sources}"
            )
        for own, group in zip(sources, groups, strict=True):
            if own == source:  # once for each text, perhaps
                group.append(place)
    return groups


def _masks_by_source(latents: Sequence[Place], files: Sequence[Place]) -> list[list[Mask]]:
    """Returns the masks of each latent column's source, before any row is looked at; SourceMismatch
    for one of another source.
    """
    groups: list[list[Mask]] = [[] for _ in latents]
    masks = [read_mask(file) for file in files]  # first: a wrong file is no matter of columns
    stores = [open_store(place) for place in latents] if masks else []
    specs = [open_spec(store)[0] for store in stores]
    sources = [spec.identity["source"] for spec in specs]
    for mask in masks:
        for i in [i for i, own in enumerate(sources) if own == mask.source] or [0]:
            check_mask_source(mask, stores[i].url, specs[i])
            groups[i].append(mask)
    return groups
