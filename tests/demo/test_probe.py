"""The linear reference of the demo's own columns, encoded here: the figures that docs/probe.md shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from encode.__main__ import main as encode
from eval.demo.pipeline import VAES
from eval.probe import probe
from shards import Column
from shards.probe import ColumnRows, common_rows, evenly, pooled_text
from shards.probe.spectra import linear_references
from tests.demo.test_pipeline import command
from train.model.flow import fixed_sigmas

TOGETHER = "^[a-z]*-[0-9A-F]*"  # an emoji's group and first code point
# column -> the reference given the caption: variants of an emoji in other folds, and together
REFERENCE = {"vae-plain": (0.505, 0.617), "vae-equi": (0.421, 0.507)}
# of a penalty of 30 that nothing has chosen, with variants in other folds: what a first sketch found
SKETCHED = {"vae-plain": 0.540, "vae-equi": 0.448}


@pytest.fixture(scope="module")
def columns(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("columns")
    command(
        out,
        encode,
        "run",
        "configs/demo/encode.yaml",
        f"root={out}",
        f"sources.openmoji={data}/openmoji",
        f"sources.openmoji-val={data}/openmoji-val",
        f"sources.photos={data}/photos",
        "engine.executor=inline",
    )
    return out / "openmoji"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demos_references(columns: Path) -> None:
    places = [str(columns / vae) for vae in VAES]
    text = str(columns / "minilm")
    for i, together in enumerate((None, TOGETHER)):
        for column in probe(places, text, together=together)["columns"]:
            value = column["linear_reference_given_text"]["value"]
            assert value == pytest.approx(REFERENCE[column["name"]][i], abs=0.02)
    for place in places:
        column, captions = Column.open(place), Column.open(text)
        rows = evenly(common_rows([column, captions]), 2048)
        references = linear_references(
            ColumnRows(column, rows), fixed_sigmas(), pooled_text(captions, rows), penalty=0.83
        )
        assert references.given_text is not None
        value = references.given_text.errors.mean(slice(None))["value"]
        assert value == pytest.approx(SKETCHED[column.name], abs=0.02)
