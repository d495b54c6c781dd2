"""study.json and the page: their numbers and sentences, that nothing is fetched, and unfinished studies."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.commands import main
from eval.errors import BadReport, NotPaired
from eval.report.compare import Entry, compare
from eval.scores import results
from eval.study.graph import nodes_of
from eval.study.report.ledger import Training, ledger
from eval.study.report.page import render, report
from eval.study.report.sets import open_sets
from eval.study.report.verdict import verdict_of
from eval.study.study import Study
from shards import FormatVersion
from tests.eval.browser import BROWSER, Page, browser_log, in_browser
from tests.eval.sets import make_items, make_score, make_set
from tests.eval.study.handmade import OTHER, PRIMARY, fill, open_study

Json = dict[str, Any]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished study of two entries in three seeds, of which the second is better."""
    claim = {"better": True, "text": "A better <model>", "source": "a paper"}
    folder = tmp_path_factory.mktemp("two")
    study = fill(
        open_study(folder, price=2.5, note="Drawings & more", published={"e2e": claim}), (0.0, 0.5)
    )
    data = report(study, pictures=6)
    return {"study": study, "data": data, "html": (study.out / "report.html").read_text()}


def values_of(study: Study, entry: str, scorer: str = PRIMARY) -> np.ndarray[Any, Any]:
    """The scores of an entry, (seeds, prompts), from its items."""
    return np.array(
        [
            [item.value for item in results.read_items(study.set_folder(entry, seed, 100) / f"scores/{scorer}.json")]
            for seed in study.seeds
        ]
    )  # fmt: skip


def test_what_follows_the_vae_is_marked(two: dict[str, Any]) -> None:
    data = json.loads(json.dumps(two["data"]))
    follow = {"flow.shift": [2.0, 1.0]}
    data["comparisons"][0]["training"] = {"differ": {}, "follow": follow, "unknown": []}
    data["differ"]["training"] = {**follow, "optim.lr": [1, 2]}
    page, badge = render(data), ' <span class="badge">follows the VAE</span>'
    assert f"flow.shift{badge}" in page
    assert "optim.lr</th>" in page


def test_the_numbers_are_those_of_the_items(two: dict[str, Any]) -> None:
    study, data = two["study"], two["data"]
    assert json.loads((study.out / "study.json").read_text()) == json.loads(json.dumps(data))
    flux, e2e = values_of(study, "flux"), values_of(study, "e2e")
    by_seed = (e2e - flux).mean(1)
    (comparison,) = data["comparisons"]
    difference = next(d for d in comparison["differences"] if d["scorer"] == PRIMARY)
    assert [v["value"] for v in difference["by_seed"].values()] == pytest.approx(by_seed)
    assert difference["value"]["value"] == pytest.approx(by_seed.mean())
    half = 4.3027 * by_seed.std(ddof=1) / 3**0.5  # Student's t of two degrees of freedom
    assert difference["value"]["high"] - by_seed.mean() > half  # and what the prompts add
    assert difference["p_adjusted"] == difference["p"]  # of one entry
    score = data["scores"][0]
    assert (score["scorer"], score["primary"], data["scores"][1]["primary"]) == (
        PRIMARY,
        True,
        False,
    )
    assert [e["by_seed"]["2"]["value"] for e in score["entries"]] == pytest.approx(
        [flux[2].mean(), e2e[2].mean()]
    )
    means = flux.mean(1), e2e.mean(1)
    pooled = (sum(m.var(ddof=1) for m in means) / 2) ** 0.5
    assert score["deviation"]["value"] == pytest.approx(pooled)
    assert score["deviation"]["freedom"] == 4
    assert difference["seeds_needed"]["low"] <= difference["seeds_needed"]["high"]


def test_the_verdict_comes_first_with_what_it_covers(two: dict[str, Any]) -> None:
    (verdict,) = two["data"]["verdicts"]
    assert verdict["outcome"] == "better"
    assert re.fullmatch(
        r"e2e is better than flux: \+0\.\d+ \[\+0\.\d+,\s\+0\.\d+\] by clipscore \(higher is better\), "
        "over 3 training seeds and 30 prompts.",
        verdict["sentence"],
    )
    text = Page(two["html"]).text
    assert text.index("Verdict") < text.index(verdict["sentence"]) < text.index("Differences from")
    assert "3 training seeds (0, 1, 2), each trained for every entry" in two["data"]["covers"]
    assert any("none was tuned" in line for line in two["data"]["leaves_open"])
    assert two["data"]["published"]["e2e"]["agrees"] is True
    assert "Published: A better <model> (a paper). The verdict here agrees." in text
    assert "not finished" not in text


def test_the_page_needs_nothing_from_outside(two: dict[str, Any]) -> None:
    page = Page(two["html"])
    assert page.all("script") == [{}]  # inline
    assert not page.all("link")
    assert not re.search(r"@import|url\(|\bfetch\(|https?://", two["html"])
    assert all(
        (image["src"] or "").startswith("data:image/webp;base64,") for image in page.all("img")
    )
    assert len(page.all("img")) == 6 * 2
    links = {link["href"] or "" for link in page.all("a")}
    assert {link[1:] for link in links if not link.startswith("data:")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "Drawings & more" in page.text


def test_the_forest_marks_all_but_the_primary_score_as_descriptive(two: dict[str, Any]) -> None:
    page = Page(two["html"])
    assert page.text.count("descriptive") == 1 + 1  # a sentence, and the other score's label
    forests = [
        svg for svg in page.all("svg") if "differences from flux" in (svg["aria-label"] or "")
    ]
    assert [(svg["aria-label"] or "").split(":")[0] for svg in forests] == [PRIMARY, OTHER]
    assert two["html"].count('class="ring"') == 2 * 3  # a score and a seed each


def test_what_differs_and_nothing_else(two: dict[str, Any]) -> None:
    differ, same = two["data"]["differ"], two["data"]["same"]
    assert differ["training"]["model.in_channels"] == [4, 16]
    assert differ["training"]["data.sources.0.latents.encoder.weights"] == ["a" * 64, "c" * 64]
    assert list(differ["settings"]) == ["vae"]
    assert same["training"]["optim.lr"] == 1.5e-3
    assert same["settings"]["guidance_scale"] == 6.0
    assert not differ["training"].keys() & same["training"].keys()
    assert "seed" not in same["training"]


def test_encoding_once_is_set_against_encoding_in_every_step(tmp_path: Path) -> None:
    """Columns of 100 and 50 s for 200 rows each, and of text of 20 s, of which 10 s were not the encoder's;
    two trainings of each entry, of 1,000 samples.
    """
    columns = {
        f"c/{name}": {"rows": 200, "seconds": {"decode": 10.0, "vae": seconds}}
        for name, seconds in (("a", 90.0), ("b", 40.0), ("text", 10.0))
    }
    (tmp_path / "c").mkdir()
    (tmp_path / "c/report.json").write_text(
        json.dumps({str(tmp_path / name): record for name, record in columns.items()})
    )
    lines = [
        {"step": 0, "start": {"world": 4, "device": "H100"}},
        {"step": 10, "position": 1000, "samples_per_second": 50.0, "loss": 1.0},
        {
            "step": 20,
            "position": 2000,
            "samples_per_second": 50.0,
            "loss": 1.0,
        },  # beyond the study's
    ]
    trainings = {}
    for name in "ab":
        for seed in (0, 1):
            run = tmp_path / f"{name}{seed}"
            run.mkdir()
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        latents, text = (str(tmp_path / f"c/{name}"),), (str(tmp_path / "c/text"),)
        trainings[name] = [
            Training(tmp_path / f"{name}{seed}", 10, latents, text) for seed in (0, 1)
        ]
    record = {"id": "train/a/seed0", "seconds": 30.0}
    (tmp_path / "logs/train").mkdir(parents=True)
    (tmp_path / "logs/train/seed0.json").write_text(json.dumps(record))
    cost = ledger(trainings, {"a": [], "b": []}, tmp_path / "logs", 3.0)
    assert [(e["encode"], e["train"]) for e in cost["entries"]] == [(120.0, 40.0), (70.0, 40.0)]
    assert cost["total"]["encode"] == 170.0  # the text once
    assert cost["total"]["gpu_hours"] == pytest.approx(4 * 80 / 3600)
    assert cost["total"]["money"] == pytest.approx(3 * 4 * 80 / 3600)
    seconds = 2000 * (0.45 + 0.2 + 2 * 0.05)  # of a sample: a's and b's latents, and twice the text
    assert cost["online"] == {"seconds": seconds, "times": pytest.approx(seconds / 170)}
    assert cost["processes"] == {"train": 30.0}
    other = trainings | {"b": [Training(tmp_path / "b0", 10, (str(tmp_path / "unknown"),), text)]}
    assert ledger(other, {"a": [], "b": []}, tmp_path / "logs", None)["online"] is None


def test_the_ledger_adds_up(two: dict[str, Any]) -> None:
    """Three sets of 90 s on two GPUs each, and 15 s of scoring a set; no run is here."""
    cost = two["data"]["cost"]
    assert [entry["generate"] for entry in cost["entries"]] == [270.0, 270.0]
    assert cost["total"] == {
        "encode": None, "train": None, "generate": 540.0, "score": 90.0, "gpu_hours": pytest.approx(0.3),
        "money": pytest.approx(0.75),
    }  # fmt: skip
    assert cost["online"] is None


def test_an_unfinished_study_says_what_is_missing(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    data = report(study)
    assert not data["complete"]
    assert data["verdicts"][0]["outcome"] == "no verdict"
    assert [r["what"] for r in data["missing"]] == 6 * ["pictures"]
    fill(study, (0.0, 0.5), skip=[("e2e", 2)])
    (study.set_folder("flux", 1, 100) / f"scores/{OTHER}.json").unlink()
    data = report(study)
    assert data["missing"] == [
        {"entry": "flux", "seed": 1, "step": 100, "what": "genai"},
        {"entry": "e2e", "seed": 2, "step": 100, "what": "pictures"},
    ]
    (verdict,) = data["verdicts"]
    assert verdict["outcome"] == "no verdict"
    assert verdict["sentence"].endswith("over 2 training seeds of 3 planned and 30 prompts.")
    text = Page((study.out / "report.html").read_text()).text
    assert "This study is not finished" in text
    assert "scores by genai: 1 (flux)" in text


def test_seeds_that_an_entry_lacks_are_not_called_trained_for_every_entry(tmp_path: Path) -> None:
    three = open_study(tmp_path, entries={"flux": "flux", "e2e": "flux-e2e", "late": "flux-late"})
    data = report(fill(three, (0.0, 0.5, 0.1), skip=[("late", 2)]), pictures=0)
    assert [len(c["seeds"]) for c in data["comparisons"]] == [3, 2]
    assert not any("each trained for every entry" in line for line in data["covers"])
    assert any("other training seeds" in line for line in data["leaves_open"])


def test_entries_that_are_yet_to_come_are_counted(tmp_path: Path) -> None:
    """A verdict that stands before they are there must not fall by their number."""
    names = ("flux", "e2e", "sd35")
    study = open_study(tmp_path, entries={name: name for name in names})
    fill(study, (0.0, 0.5, 0.2), skip=[("sd35", seed) for seed in study.seeds])
    data = report(study, pictures=0)
    (comparison,) = data["comparisons"]
    difference = next(d for d in comparison["differences"] if d["scorer"] == PRIMARY)
    assert difference["p_adjusted"] == pytest.approx(2 * difference["p"])
    assert [v["outcome"] for v in data["verdicts"]] == ["better", "no verdict"]
    assert any("2 entries against one baseline" in line for line in data["covers"])


def test_the_score_of_a_scorer_is_the_one_that_its_command_made(tmp_path: Path) -> None:
    """Of two labels of one distance, the one of the flags as they are now; without a record, by the name."""
    study = fill(open_study(tmp_path, seeds=[0]), (0.0, 0.5))
    for name in study.entries:
        folder = study.set_folder(name, 0, 100)
        make_score(folder, "clipscore-b", make_items(np.ones(30)))
    assert report(study)["primary"] == {"asked": "clipscore", "scorer": "clipscore-b"}
    node = next(
        node for node in nodes_of(study) if (node.entry, node.scorer) == ("e2e", "clipscore")
    )
    log = study.log(node.id).with_suffix(".json")
    log.parent.mkdir(parents=True)
    for other, name in (["--other"], "clipscore-b"), ([], PRIMARY):
        command = [*node.command, *other]
        log.write_text(
            json.dumps({"id": node.id, "command": command, "scores": [PRIMARY], "seconds": 1})
        )
        data = report(study)
        assert data["primary"]["scorer"] == name
        assert data["complete"]
    (study.set_folder("flux", 0, 100) / f"scores/{PRIMARY}.json").unlink()
    assert report(study)["missing"] == [
        {"entry": "flux", "seed": 0, "step": 100, "what": "clipscore"}
    ]


def test_one_seed_is_headed_by_what_it_does_not_cover(tmp_path: Path) -> None:
    data = report(fill(open_study(tmp_path, seeds=[4]), (0.0, 0.5)))
    (verdict,) = data["verdicts"]
    assert verdict["title"] == (
        "One training seed: how much another seed would move this is not known"
    )
    assert verdict["outcome"] == "better"
    assert "over 30 prompts and one training seed" in verdict["sentence"]
    assert data["scores"][0]["deviation"] is None
    assert any("training seeds" in line for line in data["leaves_open"])


def test_equal_columns_are_called_equal(tmp_path: Path) -> None:
    data = report(fill(open_study(tmp_path), (0.0, 0.0), scatter=0.0, same=True))
    (verdict,) = data["verdicts"]
    assert verdict["outcome"] == "equal"
    assert "all differences are exactly 0" in verdict["sentence"]


def test_scores_that_do_not_tell_pictures_apart(tmp_path: Path) -> None:
    """As where no picture of either entry is right: that does not make the entries equal."""
    data = report(fill(open_study(tmp_path), (0.0, 0.0), scatter=0.0))
    (verdict,) = data["verdicts"]
    assert verdict["outcome"] == "no difference"
    assert verdict["sentence"].startswith(
        "No difference shown between e2e and flux: all differences"
    )
    assert "their pictures differ" in verdict["sentence"]


def test_several_entries_are_adjusted_and_their_curves_shown(tmp_path: Path) -> None:
    names = ("flux", "e2e", "sd35", "qwen")
    study = open_study(
        tmp_path, entries={name: name for name in names}, baseline="sd35", checkpoints=[50, 100]
    )
    data = report(fill(study, (0.0, 0.5, 0.01, -0.5)), pictures=0)
    assert [entry["name"] for entry in data["entries"]] == ["sd35", "flux", "e2e", "qwen"]
    primary = [
        next(d for d in c["differences"] if d["scorer"] == PRIMARY) for c in data["comparisons"]
    ]
    first, second, third = sorted(primary, key=lambda d: d["p"])
    expected = [3 * first["p"], max(3 * first["p"], 2 * second["p"])]
    assert [first["p_adjusted"], second["p_adjusted"]] == pytest.approx(expected)
    assert third["p_adjusted"] == pytest.approx(max(third["p"], expected[1]))
    assert [v["outcome"] for v in data["verdicts"]] == ["better", "no difference", "worse"]
    assert data["verdicts"][1]["sentence"].startswith("No difference shown between e2e and sd35: ")
    assert data["verdicts"][2]["sentence"].startswith("qwen is worse than sd35: -0.")
    line = next(c for c in data["over_steps"] if (c["scorer"], c["entry"]) == (PRIMARY, "flux"))
    assert [p["step"] for p in line["points"]] == [50, 100]
    html = (study.out / "report.html").read_text()
    assert html.count('class="band"') == 2 * 4 * 2  # over steps, and over samples
    assert "<img" not in html


def test_a_difference_may_be_hidden_by_the_number_of_entries(two: dict[str, Any]) -> None:
    study = two["study"]
    sets = open_sets(study)
    entries = [
        Entry(name, {seed: sets[name, seed, 100] for seed in study.seeds}) for name in study.entries
    ]
    comparison = compare(*entries)
    alone = verdict_of(comparison, PRIMARY, "clipscore", 0.03, 1, 3)
    among = verdict_of(comparison, PRIMARY, "clipscore", 0.06, 4, 3)
    assert (alone.outcome, among.outcome) == ("better", "no difference")
    assert among.sentence.startswith("No difference shown between e2e and flux: +0.")
    assert "4 entries are compared with flux (p after Holm: 0.06)" in among.sentence
    absent = verdict_of(comparison, "unknown", "unknown", None, 0, 3)
    assert (absent.outcome, absent.title) == ("no verdict", "")


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [(3, 3, "3"), (3, 17, "3 to 17"), (40, None, "40 to more than 1,000"),
     (None, None, "more than 1,000")],
)  # fmt: skip
def test_how_many_seeds_would_resolve_a_difference(
    two: dict[str, Any], low: int | None, high: int | None, text: str
) -> None:
    data = json.loads(json.dumps(two["data"]))
    for difference in data["comparisons"][0]["differences"]:
        if difference["scorer"] == PRIMARY:
            difference["seeds_needed"] = {"low": low, "high": high}
    page = Page(render(data))
    assert re.search(rf"e2e\s*\+0\.\d+\s*{re.escape(text)}\s*\n", page.text)


def test_a_note_of_several_sets_is_shown_once(two: dict[str, Any]) -> None:
    data = json.loads(json.dumps(two["data"]))
    data["entries"][0]["notes"] = [{"note": "too young", "seeds": [0, 2]}]
    data["entries"][1]["notes"] = [{"note": "too young", "seeds": [0, 1, 2]}]
    text = Page(render(data)).text
    assert text.count("too young") == 1
    assert "flux (seed 0, 2), e2e: too young" in text


def test_a_foreign_file_is_not_replaced(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    study.out.mkdir()
    path = study.out / "study.json"
    path.write_text("{}")
    with pytest.raises(BadReport, match=r"study\.json"):
        report(study)
    path.write_text(json.dumps({"format": "latentbank-study", "version": 2}))
    with pytest.raises(FormatVersion):
        report(study)
    assert not (study.out / "report.html").exists()


def test_the_command(
    two: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    study = two["study"]
    copy = tmp_path / "copy"
    shutil.copytree(study.out, copy)
    (copy / "report.html").unlink()
    assert main(["study", "report", str(study.path), "--out", str(copy), "--pictures", "1"]) is None
    sentence, place = capsys.readouterr().out.splitlines()
    assert sentence == two["data"]["verdicts"][0]["sentence"]
    assert place == str(copy / "report.html")
    assert (copy / "report.html").read_text().count("<img") == 2


def test_pictures_made_in_other_ways_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of sets made by hand with another guidance scale, put in place of the study's own."""
    study = fill(open_study(tmp_path, seeds=[0]), (0.0, 0.5))
    folder = study.set_folder("e2e", 0, 100)
    shutil.rmtree(folder)
    make_set(folder, {"vae": "c" * 64, "weights": "10" * 32, "guidance_scale": 7.5})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotPaired, match="guidance_scale"):
        main(["study", "report", str(study.path), "--out", str(study.out)])
    assert not (study.out / "report.html").exists()


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
@pytest.mark.parametrize(("dark", "width"), [(False, 390), (True, 1280)])
def test_in_a_browser(two: dict[str, Any], tmp_path: Path, dark: bool, width: int) -> None:
    """Not wider than a phone, in both schemes, each picture decoded."""
    found = in_browser(two["html"], tmp_path, dark=dark, width=width)
    assert found["wide"] == width
    assert found["shown"] == 6 * 2
    assert found["colour"] == ("#5aa9e0" if dark else "#2a7fb8")
    assert found["faults"] == []


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_the_browser_logs_no_request_and_no_console_line(
    two: dict[str, Any], tmp_path: Path
) -> None:
    assert browser_log(two["html"], tmp_path) == ([], [])
    bad = '<img src="https://localhost:1/x.png"><script>absent()</script></body>'
    console, requests = browser_log(two["html"].replace("</body>", bad), tmp_path)
    assert ["absent is not defined" in line for line in console if "Error" in line] == [True]
    assert requests == ["https://localhost:1/x.png"]
