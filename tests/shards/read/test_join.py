"""Columns that may be joined, the rows that are valid in all, and refusals."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards import (
    BadRows,
    Column,
    ColumnSpec,
    CorruptColumn,
    IdentityMismatch,
    IncompleteColumn,
    JoinedColumns,
    Layout,
    Norm,
    NotAColumn,
    OrderError,
    ShardWriter,
    SourceMismatch,
    create_column,
    open_join,
    open_sources,
    open_store,
    put_complete,
    put_empty,
)
from shards.column.commits import failure_name
from shards.column.statistics import put_norm
from shards.errors import BadStatistics
from shards.format.atomic import seal
from shards.format.layout import FAILURE, VERSION
from shards.read.join import SourceColumns
from tests.bench.reading.scale import write_records
from tests.shards.toy import (
    EMPTY,
    NORM,
    ROWS,
    SHAPE,
    SHARD_ROWS,
    SOURCE,
    TOKENS,
    WIDTH,
    caption_spec,
    caption_status,
    image_status,
    moments_spec,
    row_ids,
    small_moments,
    small_tokens,
    tokens_spec,
    write_column,
    write_shard,
)

MANY = 256  # shards
ALL = np.concatenate([row_ids(s) for s in range(3)])


def test_rows_valid_in_both(toy: Path) -> None:
    join = open_join(toy / "vae", toy / "text")
    expected = ALL[(image_status(ALL) == 0) & (caption_status(ALL) == 0)]
    np.testing.assert_array_equal(join.valid_rows, expected)
    assert join.valid_mask.size == 3 * SHARD_ROWS // 32
    assert (join.latent_shape, join.text_width, join.max_tokens) == (
        (SHAPE[0] // 2, *SHAPE[1:]),
        WIDTH,
        TOKENS,
    )
    assert join.norm == NORM


def test_truncated_pictures_only_if_asked(toy: Path) -> None:
    join = open_join(toy / "vae", toy / "text", truncated=True)
    expected = ALL[(image_status(ALL) <= 1) & (caption_status(ALL) == 0)]
    np.testing.assert_array_equal(join.valid_rows, expected)
    assert len(expected) > len(open_join(toy / "vae", toy / "text").valid_rows)


def test_also_joins_statuses_of_columns_that_are_not_read(toy: Path, tmp_path: Path) -> None:
    spec = moments_spec(weights="another vae")
    also = write_column(tmp_path / "other", spec)
    plain = open_join(toy / "vae", toy / "text").identity()
    join = open_join(toy / "vae", toy / "text", [also])
    assert join.identity() != plain
    assert join.identity()["also.0"]["identity"] == spec.identity
    # A column in which rows 0..9 of shard 0 came to nothing takes them from all runs.
    path, spec = tmp_path / "bad", moments_spec(weights="a third")
    digest = create_column(path, spec)
    for shard, rows in enumerate(ROWS):
        writer = ShardWriter(path, spec, digest, shard, rows, f"index {shard}")
        for start in range(0, rows, 1024):
            values = np.ones((min(1024, rows - start), *SHAPE), np.float16)
            if shard == start == 0:
                values[:10] = np.inf
            writer.put_block(values, np.zeros(len(values), np.uint8))
        writer.commit({})
    put_complete(path, digest, 3, allow_failed=False)
    fewer = open_join(toy / "vae", toy / "text", [also, path]).valid_rows
    np.testing.assert_array_equal(fewer, join.valid_rows[join.valid_rows >= 10])


def test_another_source(toy: Path, tmp_path: Path) -> None:
    path = write_column(tmp_path / "c", tokens_spec(source="other tars"))
    with pytest.raises(
        SourceMismatch, match=r"made from source other tars, but .*vae from fingerprint"
    ):
        open_join(toy / "vae", path)
    with pytest.raises(SourceMismatch, match="other tars"):
        open_join(toy / "vae", toy / "text", [path])


def test_other_readings_of_the_source(toy: Path, tmp_path: Path) -> None:
    path = write_column(tmp_path / "c", tokens_spec(), index="another reading")
    with pytest.raises(
        SourceMismatch, match=r"shards \[0, 1, 2\] were read from tars that held different rows"
    ):
        open_join(toy / "vae", path)


def test_other_row_ids(toy: Path, tmp_path: Path) -> None:
    spec = tokens_spec()
    path = write_column(tmp_path / "c", replace(spec, layout=replace(spec.layout, shard_rows=4096)))
    with pytest.raises(SourceMismatch, match="4096 rows a shard, but .* has 2048"):
        open_join(toy / "vae", path)


def test_the_wrong_kind(toy: Path) -> None:
    with pytest.raises(
        IdentityMismatch, match="text: found a column of tokens, expected one of moments"
    ):
        open_join(toy / "text", toy / "vae")
    with pytest.raises(
        IdentityMismatch, match="vae: found a column of moments, expected one of tokens"
    ):
        open_join(toy / "vae", toy / "vae")


def test_latents_in_the_place_of_moments(toy: Path, tmp_path: Path) -> None:
    """An encoder without posterior; two sources must agree in it."""
    spec = moments_spec()
    channels, *size = spec.layout.row_shape
    shape = channels // 2, *size
    layout = replace(spec.layout, kind="latents", row_shape=shape)
    latents = replace(spec, layout=layout, identity={**spec.identity, "kind": "latents"})
    path = tmp_path / "c"
    digest = create_column(path, latents)
    for shard, rows in enumerate(ROWS):
        writer = ShardWriter(path, latents, digest, shard, rows, f"index {shard}")
        for start in range(0, rows, 1024):
            count = min(1024, rows - start)
            writer.put_block(np.zeros((count, *shape), np.float16), np.zeros(count, np.uint8))
        writer.commit({})
    put_complete(path, digest, len(ROWS), allow_failed=False)
    join = open_join(path, toy / "text")
    moments = open_join(toy / "vae", toy / "text")
    assert (join.posterior, moments.posterior) == (False, True)
    assert join.latent_shape == moments.latent_shape == shape
    with pytest.raises(IdentityMismatch, match="cannot be read together"):
        JoinedColumns([*moments.by_source, *join.by_source])


def test_a_column_without_norm(toy: Path, tmp_path: Path) -> None:
    path = write_column(tmp_path / "c", replace(moments_spec(), norm=None))
    with pytest.raises(IdentityMismatch, match="records no shift and scale"):
        _ = open_join(path, toy / "text").norm


def test_absent_unfinished_and_damaged(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(NotAColumn, match="nothing: no such folder"):
        open_join(toy / "vae", tmp_path / "nothing")
    create_column(tmp_path / "new", moments_spec())
    with pytest.raises(IncompleteColumn, match="new: no COMPLETE record"):
        open_join(tmp_path / "new", toy / "text")
    path = small_moments(tmp_path / "c")
    bits = next((path / "complete").glob("*.valid"))
    bits.write_bytes(bits.read_bytes()[:-4] + b"\xff\xff\xff\xff")
    with pytest.raises(CorruptColumn, match="the valid-row bits do not fit"):
        open_join(path, small_tokens(tmp_path / "t"))


# Several captions ---------------------------------------------------------------------------------


def two_captions(folder: Path, **second: str) -> dict[Path | str, float]:
    long = write_column(folder / "long", caption_spec("txt"))
    short = write_column(folder / "short", caption_spec("short.txt", **second), caption=1)
    return {long: 0.75, short: 0.25}


def test_captions_at_their_rates(toy: Path, tmp_path: Path) -> None:
    texts = two_captions(tmp_path)
    join = open_join(toy / "vae", texts)
    assert join.by_source[0].rates == (0.75, 0.25)
    assert [c.name for c in join.texts] == ["long", "short"]
    np.testing.assert_array_equal(
        join.valid_mask, open_join(toy / "vae", tmp_path / "long").valid_mask
    )
    record = join.identity()
    assert record["rates"] == [0.75, 0.25]
    assert record["text"]["identity"]["preprocess"]["caption"] == "txt"
    assert record["text.1"]["identity"]["preprocess"]["caption"] == "short.txt"
    assert "rates" not in open_join(toy / "vae", tmp_path / "long").identity()


@pytest.mark.parametrize("rates", [(0.5, 0.4), (1.0, 0.0), (1.5, -0.5), (float("nan"), 0.5)])
def test_rates_that_are_none(toy: Path, rates: tuple[float, float]) -> None:
    text = Column.open(toy / "text")
    with pytest.raises(IdentityMismatch, match="rates above 0 that add up to 1"):
        SourceColumns(Column.open(toy / "vae"), list(zip((text, text), rates, strict=True)))


def test_captions_of_other_encoders(toy: Path, tmp_path: Path) -> None:
    texts = two_captions(tmp_path, template="A picture of {}")
    with pytest.raises(IdentityMismatch, match="short cannot be read together with .*long") as e:
        open_join(toy / "vae", texts)
    assert "identity.preprocess.template: found 'A picture of {}', expected '{}'" in str(e.value)
    assert "caption" not in str(e.value)


def test_captions_with_another_empty_one(toy: Path, tmp_path: Path) -> None:
    path, spec = tmp_path / "other", caption_spec("txt")
    digest = create_column(path, spec)
    put_empty(path, spec, EMPTY + np.uint16(1))
    for shard in range(3):
        write_shard(path, spec, digest, shard)
    put_complete(path, digest, 3, allow_failed=False)
    good = write_column(tmp_path / "good", caption_spec("txt"))
    with pytest.raises(IdentityMismatch, match="the tokens of the empty caption differ"):
        open_join(toy / "vae", {good: 0.5, path: 0.5})


# Rows that are not ok -----------------------------------------------------------------------------


def test_bad_rows_are_an_error_if_asked(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRows) as caught:
        open_join(toy / "vae", toy / "text", bad="error")
    message = str(caught.value)
    undecodable, missing = (image_status(ALL) == 2).sum(), (caption_status(ALL) == 4).sum()
    truncated = (image_status(ALL) == 1).sum()
    assert f"{toy}/vae: {undecodable} rows are image_undecodable" in message
    assert f"{toy}/vae: {truncated} rows are truncated" in message
    assert f"{toy}/text: {missing} rows are caption_missing" in message
    assert "row 3 of shard 0: truncated in vae" in message
    assert "row 5 of shard 0: image_undecodable in vae" in message
    assert "row 7 of shard 0: caption_missing in text" in message
    with pytest.raises(BadRows) as caught:
        open_join(toy / "vae", toy / "text", bad="error", truncated=True)
    assert "are truncated" not in str(caught.value)


def test_a_word_for_bad_rows_that_says_nothing(toy: Path) -> None:
    with pytest.raises(BadRows, match="bad: found 'typo', expected skip, .* or error"):
        open_join(toy / "vae", toy / "text", bad="typo")  # type: ignore[arg-type]
    with pytest.raises(BadRows, match="bad: found 'errors', expected skip, .* or error"):
        open_sources(toy / "vae", toy / "text", bad="errors")  # type: ignore[arg-type]


def sound_column(path: Path, failed: int | None = None) -> Path:
    """Moments that are all ok, but for a shard that failed."""
    spec = moments_spec(weights="sound")
    digest = create_column(path, spec)
    for shard, rows in enumerate(ROWS):
        if shard == failed:
            record = {"format": FAILURE, "version": VERSION, "shard": shard, "reason": "NotATar: x"}
            open_store(path).replace(failure_name(shard), seal(record))
            continue
        writer = ShardWriter(path, spec, digest, shard, rows, f"index {shard}")
        for start in range(0, rows, 1024):
            count = min(1024, rows - start)
            writer.put_block(np.ones((count, *SHAPE), np.float16), np.zeros(count, np.uint8))
        writer.commit({})
    put_complete(path, digest, 3, allow_failed=failed is not None)
    return path


def sound_tokens(path: Path) -> Path:
    spec = tokens_spec()
    digest = create_column(path, spec)
    put_empty(path, spec, EMPTY)
    for shard, rows in enumerate(ROWS):
        writer = ShardWriter(path, spec, digest, shard, rows, f"index {shard}")
        for start in range(0, rows, 1024):
            count = min(1024, rows - start)
            writer.put_block([EMPTY] * count, np.zeros(count, np.uint8))
        writer.commit({})
    put_complete(path, digest, 3, allow_failed=False)
    return path


def test_rows_that_are_all_ok_pass(tmp_path: Path) -> None:
    join = open_join(sound_column(tmp_path / "a"), sound_tokens(tmp_path / "t"), bad="error")
    assert len(join.valid_rows) == sum(ROWS)


def test_a_failed_shard_is_counted_row_by_row(tmp_path: Path) -> None:
    vae, text = sound_column(tmp_path / "b", failed=1), sound_tokens(tmp_path / "t")
    with pytest.raises(BadRows, match=r"b: 40 rows are shard_failed\n(.*\n)*.*row 0 of shard 1"):
        open_join(vae, text, bad="error")


# Generations that are pinned ----------------------------------------------------------------------


def grow(path: Path, spec: ColumnSpec, shards: range) -> str:
    digest = create_column(path, spec)
    if spec.layout.ragged and shards.start == 0:
        put_empty(path, spec, EMPTY)
    for shard in shards:
        write_shard(path, spec, digest, shard)
    return digest


def test_an_unfinished_column_stays_as_it_was_seen(toy: Path, tmp_path: Path) -> None:
    path, spec = tmp_path / "new", moments_spec(weights="new")
    digest = grow(path, spec, range(2))
    with pytest.raises(IncompleteColumn):
        open_join(path, toy / "text")
    join = open_join(path, toy / "text", partial=True, bad="skip")
    rows = join.valid_rows
    assert rows.max() < 2 * SHARD_ROWS
    pins = json.loads(json.dumps(join.identity()))
    assert pins["latents"]["shards"] == [[0, 2]]
    grow(path, spec, range(2, 3))
    for finish in (False, True):
        if finish:
            put_complete(path, digest, 3, allow_failed=False)
        again = open_join(path, toy / "text", partial=True, pins=pins)
        np.testing.assert_array_equal(again.valid_rows, rows)
        assert again.identity() == pins
    assert open_join(path, toy / "text").valid_rows.max() >= 2 * SHARD_ROWS
    (path / "commits/00001.json").unlink()
    with pytest.raises(IncompleteColumn, match="new/.*This run has read that shard"):
        open_join(path, toy / "text", partial=True, pins=pins)


def test_all_shards_seen_before_the_column_was_complete(toy: Path, tmp_path: Path) -> None:
    """Then the COMPLETE record has the same digest; the pin still says what was opened."""
    path, spec = tmp_path / "new", moments_spec()
    digest = grow(path, spec, range(3))
    join = open_join(path, toy / "text", partial=True)
    pins = join.identity()
    put_complete(path, digest, 3, allow_failed=False)
    assert join.identity() == pins  # also of the join that is open
    assert open_join(path, toy / "text", partial=True, pins=pins).identity() == pins


def test_a_complete_generation_stays_the_one_that_was_read(toy: Path, tmp_path: Path) -> None:
    path = sound_column(tmp_path / "v", failed=1)
    pins = open_join(path, toy / "text").identity()
    assert "shards" not in pins["latents"]
    spec = moments_spec(weights="sound")
    write_shard(path, spec, create_column(path, spec), 1)
    newer = put_complete(path, create_column(path, spec), 3, allow_failed=False)
    assert open_join(path, toy / "text").identity()["latents"]["complete"] == newer.digest
    pinned = open_join(path, toy / "text", pins=pins)
    assert pinned.identity() == pins
    assert not ((pinned.valid_rows >= SHARD_ROWS) & (pinned.valid_rows < 2 * SHARD_ROWS)).any()


def test_pins_of_another_column_are_left_to_the_comparison(toy: Path, tmp_path: Path) -> None:
    other = write_column(tmp_path / "other", moments_spec(weights="other"))
    pins = open_join(other, toy / "text").identity()
    record = open_join(toy / "vae", toy / "text", pins=pins).identity()
    assert record["latents"]["column"] != pins["latents"]["column"]
    assert record["text"] == pins["text"]


# Several sources ----------------------------------------------------------------------------------


@pytest.fixture
def second(tmp_path: Path) -> Path:
    """Columns of another source, made by the encoders of the toy columns."""
    write_column(tmp_path / "vae", moments_spec(source="more tars"))
    write_column(tmp_path / "text", tokens_spec(source="more tars"))
    return tmp_path


def both(toy: Path, second: Path, kind: str) -> list[Path]:
    return [toy / kind, second / kind]


@pytest.mark.parametrize("method", ["measured", "measured-per-place"])
def test_a_measured_norm_of_several_sources_is_named_by_its_digest(
    toy: Path, second: Path, method: str
) -> None:
    latents, text = both(toy, second, "vae"), both(toy, second, "text")
    with pytest.raises(BadStatistics, match=r"found measured.* with 2 sources.*by its digest"):
        open_sources(latents, text, norm=method)


def test_a_norm_of_other_latents_is_refused(toy: Path) -> None:
    """One that does not broadcast, whoever put it there."""
    column = Column.open(toy / "vae")
    for shape in ((3,), (2, 2, 5)):
        values = np.ones(shape).tolist()
        norm = Norm(tuple(values), tuple(values))
        digest, snapshot = column.digest, column.snapshot.digest
        named = put_norm(column.store, digest, snapshot, "measured", 4_096, norm).digest
        with pytest.raises(BadStatistics, match=rf"vae: norm {named}: norm.* expected"):
            open_sources(toy / "vae", toy / "text", norm=named)


def test_concatenated_sources(toy: Path, second: Path) -> None:
    sources = open_sources(both(toy, second, "vae"), both(toy, second, "text"))
    each = [join.valid_rows.tolist() for join in sources.by_source]
    order = sources.order(seed=1, lanes=4)
    assert order.epoch_samples == sum(map(len, each)) // 4 * 4
    source, row = sources.locate(*order.at(np.arange(order.epoch_samples)))
    samples = set(zip(source.tolist(), row.tolist(), strict=True))
    assert len(samples) == order.epoch_samples
    assert samples <= {(s, r) for s, rows in enumerate(each) for r in rows}
    assert (sources.norm, sources.max_tokens, sources.text_width) == (NORM, TOKENS, WIDTH)
    assert "weights" in sources.identity()


def test_sources_at_fixed_weights(toy: Path, second: Path) -> None:
    sources = open_sources(both(toy, second, "vae"), both(toy, second, "text"), weights=[0.6, 0.4])
    assert len(sources.valid_masks) == 2
    source, row = sources.locate(*sources.order(lanes=4).at(np.arange(4 * 4096)))
    assert abs((source == 1).mean() - 0.4) < 1 / 4096
    for s, join in enumerate(sources.by_source):
        assert set(row[source == s].tolist()) <= set(join.valid_rows.tolist())
    with pytest.raises(OrderError, match="1 weights for 2 sources"):
        open_sources(both(toy, second, "vae"), both(toy, second, "text"), weights=[1.0])


def test_the_identity_of_one_source_is_that_of_its_join(toy: Path, second: Path) -> None:
    join = open_join(toy / "vae", toy / "text")
    assert open_sources(toy / "vae", toy / "text").identity() == join.identity()
    pins = open_sources(both(toy, second, "vae"), both(toy, second, "text")).identity()
    assert pins["latents"] == join.identity()["latents"]
    again = open_sources(both(toy, second, "vae"), both(toy, second, "text"), pins=pins)
    assert again.identity() == pins


def test_also_columns_find_their_source(toy: Path, second: Path, tmp_path: Path) -> None:
    vae, text = both(toy, second, "vae"), both(toy, second, "text")
    also = write_column(tmp_path / "also", moments_spec(source="more tars", weights="third"))
    sources = open_sources(vae, text, [also])
    assert [len(join.also) for join in sources.by_source] == [0, 1]
    stranger = write_column(tmp_path / "x", moments_spec(source="nobody's tars"))
    with pytest.raises(SourceMismatch, match="made from source nobody's tars, which is none"):
        open_sources(vae, text, [stranger])


def test_sources_that_do_not_agree(toy: Path, tmp_path: Path) -> None:
    other = "more tars"
    text = write_column(tmp_path / "text", tokens_spec(source=other))
    vae = write_column(tmp_path / "vae", moments_spec(source=other, weights="another vae"))
    with pytest.raises(IdentityMismatch, match="identity.encoder.weights: found 'another vae'"):
        open_sources([toy / "vae", vae], [toy / "text", text])
    spec = replace(moments_spec(source=other), norm=replace(NORM, shift=(0.0, 0.0)))
    vae = write_column(tmp_path / "norm", spec)
    with pytest.raises(IdentityMismatch, match=r"norm.shift: found \[0.0, 0.0\]"):
        open_sources([toy / "vae", vae], [toy / "text", text])
    with pytest.raises(SourceMismatch, match="found 2 latent columns and 1 texts"):
        open_sources([toy / "vae", vae], toy / "text")
    with pytest.raises(SourceMismatch, match="found 0 latent columns and 0 texts"):
        open_sources([], [])


def test_figures_of_an_encoder_may_differ(toy: Path, tmp_path: Path) -> None:
    """What it makes of fixed pictures is rounded otherwise on another machine."""
    paths = {}
    for source, figure in (("one", 0.5), ("two", 0.501)):
        spec = moments_spec(source=source)
        encoder = {**spec.identity["encoder"], "version": "1", "outputs": {"figures": [[figure]]}}
        spec = replace(spec, identity={**spec.identity, "encoder": encoder})
        paths[source] = (
            write_column(tmp_path / source / "vae", spec),
            write_column(tmp_path / source / "text", tokens_spec(source=source)),
        )
    latents, texts = zip(*paths.values(), strict=True)
    assert len(open_sources(latents, texts).by_source) == 2


def features(path: Path, source: str = SOURCE, element: str = "float16") -> Path:
    spec = ColumnSpec(
        {"kind": "features", "source": source}, Layout("features", (5,), 3, SHARD_ROWS, element)
    )
    digest = create_column(path, spec)
    for shard, rows in enumerate(ROWS):
        writer = ShardWriter(path, spec, digest, shard, rows, f"index {shard}")
        for start in range(0, rows, 1024):
            count = min(1024, rows - start)
            writer.put_block(np.ones((count, 5), spec.layout.dtype), np.zeros(count, np.uint8))
        writer.commit({})
    put_complete(path, digest, 3, allow_failed=False)
    return path


def test_extra_columns(toy: Path, tmp_path: Path) -> None:
    path = features(tmp_path / "dino")
    spec = Column.open(path).spec
    join = open_join(toy / "vae", toy / "text", extra={"dino": path})
    assert join.identity()["extra.dino"]["identity"] == spec.identity
    with pytest.raises(IdentityMismatch, match="rows of one shape for the extra column 'text'"):
        open_join(toy / "vae", toy / "text", extra={"text": toy / "text"})


def test_extra_columns_of_other_elements(toy: Path, tmp_path: Path) -> None:
    """They would be read as what they are not: all sources share one buffer."""
    joins = [
        open_join(
            write_column(tmp_path / f"{source}/vae", moments_spec(source=source)),
            write_column(tmp_path / f"{source}/text", tokens_spec(source=source)),
            extra={"dino": features(tmp_path / f"{source}/dino", source, element)},
        )
        for source, element in (("a", "float16"), ("b", "bfloat16"))
    ]
    with pytest.raises(IdentityMismatch, match="element: found 'bfloat16', expected 'float16'"):
        JoinedColumns([*joins[0].by_source, *joins[1].by_source])


def test_a_damaged_empty_caption_is_seen(tmp_path: Path) -> None:
    text = write_column(tmp_path / "text", tokens_spec())
    file = text / "empty/c/0/0"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        CorruptColumn, match="empty/c/0/0: its .* are not those that were committed"
    ):
        Column.open(text).empty()


def test_columns_without_shards(tmp_path: Path) -> None:
    vae = write_column(tmp_path / "vae", moments_spec(0), ())
    text = write_column(tmp_path / "text", tokens_spec(0), ())
    join = open_join(vae, text, bad="error")
    assert not len(join.valid_rows)
    with pytest.raises(OrderError, match="0 valid rows"):
        join.order()


def test_valid_rows_of_many_shards_take_the_memory_of_two_masks(tmp_path: Path) -> None:
    """One is kept, and one of a column at a time is joined with it: of 5,000 tars each has 40 MB."""
    write_records(tmp_path, MANY)
    latents, text = (Column.open(tmp_path / name) for name in ("latents", "text"))
    tracemalloc.start()
    try:
        join = JoinedColumns([SourceColumns(latents, text)])
        size, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert join.valid_mask.nbytes == latents.layout.shards * latents.layout.shard_rows // 8
    assert size < 1.2 * join.valid_mask.nbytes
    assert peak < 2.2 * join.valid_mask.nbytes
