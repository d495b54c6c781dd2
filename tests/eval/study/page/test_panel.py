"""The panel of before beside a study's outcome, and what several studies say of its figures."""

from __future__ import annotations

import json
from dataclasses import replace
from math import atanh, sqrt, tanh
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from configs import ConfigError
from eval.commands import main
from eval.errors import BadReport, BadRequest
from eval.probe import probe
from eval.scores.ranks import FEWEST
from eval.study.report.outcomes import outcomes
from eval.study.report.page import report
from eval.study.study import Study
from shards import ShardWriter, Status, create_column, put_complete
from tests.eval.sets import PROMPTS, make_items, make_score, make_set
from tests.eval.study.handmade import PRIMARY, fill, open_study
from tests.shards.toy import SHAPE, moments_spec, tokens_spec, write_column

ROWS = 120
ENTRIES = {"flux": "flux", "e2e": "flux-e2e", "other": "other"}


def write_latents(path: Path, smooth: float) -> None:
    """A column of normal numbers, of which neighbouring places are the more alike the larger `smooth` is."""
    spec = moments_spec(1)
    spec = replace(
        spec,
        identity={**spec.identity, "encoder": {"class": "K", "path": "", "weights": path.name}},
    )
    digest = create_column(path, spec)
    values = np.random.default_rng(0).standard_normal((ROWS, *SHAPE))
    values[..., 1:] += smooth * values[..., :-1]
    writer = ShardWriter(path, spec, digest, 0, ROWS, "index 0")
    writer.put_block(values.astype(np.float16), np.full(ROWS, Status.OK, np.uint8))
    writer.commit({"host": "toy"})
    put_complete(path, digest, 1, allow_failed=False)


def make_study(folder: Path, **values: Any) -> Study:
    for column, smooth in (("flux", 0.0), ("flux-e2e", 0.5), ("other", 2.0)):
        write_latents(folder / "cache/pets" / column, smooth)
    write_column(folder / "cache/pets/words", tokens_spec(1), (ROWS,))
    where = {"with": [f"data.root={folder}/cache"], "entries": ENTRIES}
    return fill(open_study(folder, **where, **values), (0.0, 0.5, 1.0))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("panel")
    for name, psnr in (("flux", 20.0), ("e2e", 21.0), ("other", 22.0)):
        made = make_set(folder / name / "reconstruction")
        make_score(made, "psnr", make_items(np.full(len(PROMPTS.items), psnr)))
    return make_study(
        folder, panel={"reconstructions": {name: str(folder / name) for name in ENTRIES}}
    )


def test_the_figures_are_those_of_probe_beside_the_outcome(study: Study) -> None:
    data = report(study, pictures=2)
    panel = data["panel"]
    cache = study.path.parent / "cache/pets"
    direct = probe([cache / name for name in ENTRIES.values()], cache / "words")["columns"]
    figures = {figure["name"]: figure for figure in panel["figures"]}
    assert panel["why"] is None
    assert panel["outcome"] == PRIMARY
    assert panel["rows"] == direct[0]["rows"]
    for name in (
        "linear_reference",
        "linear_reference_given_text",
        "text_r2",
        "lds",
        "effective_rank",
    ):
        kept = [figures[name]["entries"][entry] for entry in ENTRIES]
        assert kept == json.loads(json.dumps([record[name] for record in direct]))
    scores = [entry["over_seeds"]["value"] for entry in data["scores"][0]["entries"]]
    lds = [record["lds"]["value"] for record in direct]
    assert figures["lds"]["rank"]["value"] == pytest.approx(
        spearmanr(lds, [-s for s in scores]).statistic
    )
    assert figures["psnr"]["rank"]["value"] == pytest.approx(
        -1
    )  # higher, and a score whose higher is better
    page = (study.out / "report.html").read_text()
    assert "What was known before training" in page
    assert "reconstruction: psnr" in page


def test_columns_are_read_once(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    first = report(study, pictures=0)["panel"]
    monkeypatch.setattr("eval.probe.probe", lambda *_, **__: pytest.fail("probed again"))
    assert report(study, pictures=0)["panel"] == first
    damaged = study.out / "probe.json"
    damaged.write_text("{")
    monkeypatch.undo()
    assert report(study, pictures=0)["panel"] == first


def test_a_study_whose_columns_are_gone_says_so(tmp_path: Path) -> None:
    study = fill(open_study(tmp_path), (0.0, 0.5))
    data = report(study, pictures=0)
    assert data["panel"]["figures"] == []
    assert data["panel"]["why"].startswith("NotAColumn: cache/pets/flux: no such folder")
    assert "The columns have no figures" in (study.out / "report.html").read_text()
    (tmp_path / "off").mkdir()
    off = fill(open_study(tmp_path / "off", panel=None), (0.0, 0.5))
    assert report(off, pictures=0)["panel"] is None
    assert "known before training" not in (off.out / "report.html").read_text()


def test_reconstructions_without_scores_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = {"reconstructions": {"flux": str(tmp_path / "absent")}}
    study = fill(open_study(tmp_path, panel=folders), (0.0, 0.5))
    assert report(study, pictures=0)["panel"]["figures"] == []
    assert f"reconstructions: flux: found no score in {tmp_path / 'absent'}" in caplog.text
    images = make_set(tmp_path / "absent/reconstruction")
    make_score(images, "psnr", make_items(np.full(len(PROMPTS.items), 20.0)))
    (images / "scores/psnr.json").write_text("{")  # the verdict does not depend on it
    assert report(study, pictures=0)["panel"]["figures"] == []
    assert "reconstructions: flux: " in caplog.records[-1].message
    assert "psnr.json" in caplog.records[-1].message


def test_reconstructions_of_no_entry_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="reconstructions: found 'another', expected entries: flux, e2e"
    ):
        open_study(tmp_path, panel={"reconstructions": {"another": "x"}})


def test_an_expression_that_is_none_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"panel.groups: found '\[a', expected a regular expression"
    ):
        open_study(tmp_path, panel={"groups": "[a"})


# Several studies ---------------------------------------------------------------------------------


def write_study(
    folder: Path, figure: list[float], scores: list[float], better: str = "lower"
) -> Path:
    names = [f"e{i}" for i in range(len(figure))]
    sign = 1 if better == "lower" else -1
    rank = None
    if len(names) > 2:
        value = float(spearmanr(figure, np.multiply(sign, scores)).statistic)
        rank = {"value": value, "low": None, "high": None, "entries": len(names)}
    record = {
        "format": "latentbank-study", "version": 1, "entries": [{"name": name} for name in names],
        "scores": [{"better": better, "entries": [{"over_seeds": {"value": s}} for s in scores]}],
        "panel": {"figures": [{
            "name": "lds", "title": "LDS", "rank": rank,
            "entries": {n: {"value": v, "low": None, "high": None} for n, v in zip(names, figure, strict=True)},
        }]},
    }  # fmt: skip
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps(record))
    return folder


def test_pairs_are_counted_and_correlations_averaged(tmp_path: Path) -> None:
    two = write_study(tmp_path / "two", [1.0, 2.0], [5.0, 4.0])  # the wrong way round
    higher = write_study(
        tmp_path / "higher", [1.0, 2.0], [0.9, 0.8], "higher"
    )  # right: 0.9 is better
    a = write_study(tmp_path / "a", [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 3.0, 4.0, 5.0])
    b = write_study(tmp_path / "b", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 3.0, 2.0, 6.0, 5.0, 4.0])
    record = outcomes([two, higher, a, b / "study.json"])["LDS"]
    assert (record.studies, record.pairs, record.right) == (4, 1 + 1 + 10 + 15, 0 + 1 + 9 + 11)
    pooled = record.pooled()
    assert pooled is not None
    r = [0.9, float(spearmanr(range(6), [1, 3, 2, 6, 5, 4]).statistic)]
    weights = [(n - 3) / (1 + x * x / 2) for n, x in zip((5, 6), r, strict=True)]
    z = sum(w * atanh(x) for w, x in zip(weights, r, strict=True)) / sum(weights)
    assert pooled.value == pytest.approx(tanh(z))
    assert pooled.low == pytest.approx(tanh(z - 1.959964 / sqrt(sum(weights))), abs=1e-6)
    assert pooled.entries == 11
    only_two = outcomes([two])["LDS"]
    assert only_two.pooled() is None
    assert FEWEST == 4


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_study(tmp_path / "two", [1.0, 2.0], [4.0, 5.0])
    main(["probe", "--outcomes", str(folder), "--json", str(tmp_path / "o.json")])
    assert "1 of 1" in capsys.readouterr().out
    assert json.loads((tmp_path / "o.json").read_text()) == {
        "LDS": {"studies": 1, "pairs": 1, "right": 1, "rank": None}
    }
    with pytest.raises(BadRequest, match="both columns and --outcomes, or neither"):
        main(["probe", str(folder), "--outcomes", str(folder)])
    with pytest.raises(BadRequest, match="both columns and --outcomes, or neither"):
        main(["probe"])
    with pytest.raises(BadReport, match="named twice, and would count twice"):
        main(["probe", "--outcomes", str(folder), str(folder / "study.json")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "found format 'other'"),
        ({"panel": None}, "no panel"),
        ({"panel": {"figures": [], "why": "NotAColumn: gone"}}, "NotAColumn: gone"),
        ({"scores": []}, "no score yet"),
    ],
)
def test_studies_without_an_outcome(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_study(tmp_path / "two", [1.0, 2.0], [4.0, 5.0])
    path = folder / "study.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadReport, match=message):
        outcomes([folder])
    with pytest.raises(BadReport, match="not readable"):
        outcomes([tmp_path])
    path.write_text("[]")
    with pytest.raises(BadReport, match="found format None"):
        outcomes([path])
