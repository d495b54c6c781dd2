"""The page of scores: its numbers, that it needs nothing from outside, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval.commands import main
from eval.errors import BadReport, BadScores, MissingImages, OtherImages
from eval.images.imageset import ImageSetReader
from eval.prompts.prompts import Prompt, Prompts
from eval.report.page import verdicts
from eval.report.report import report
from eval.scores import results
from tests.eval.browser import BROWSER, Page, in_browser
from tests.eval.sets import GROUPS, PROMPTS, VAE, make_items, make_score, make_set, seeded, training

N = len(PROMPTS.items)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two sets of a benchmark and their scores, one of them of the whole set; a run; a set of another benchmark."""
    top = tmp_path_factory.mktemp("sets")
    random = np.random.default_rng(5)
    a = random.uniform(0, 1, N).round(2)
    values = {"plain": a, "e2e": (a + random.normal(0.2, 0.1, N)).round(2)}
    provenance = {"device": "cuda", "seconds": 90.0, "pictures_per_second": 0.33}
    for i, (name, found) in enumerate(values.items()):
        settings = {"vae": str(i) * 64, "weights": str(i) * 64, "guidance_scale": 6.0 + i / 2}
        trained = training({"data.sources.0.latents.encoder.weights": str(i) * 64})
        make_set(top / name, settings, seed=i, provenance=provenance, trained=trained)
        make_score(
            top / name, "vqa-tiny", make_items(found), notes=("uncalibrated: tiny",), seconds=12.0
        )
        make_score(top / name, "fd-tiny", value=20.0 - i, better="lower")
    make_score(top / "plain", "only-plain", make_items(a))
    other = Prompts("other", (Prompt("x", "one"), Prompt("y", "two")))
    make_set(top / "alone", prompts=other)
    run = top / "run"
    (run / "eval").mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"step": 0, "start": {"world": 8, "device": "H100"}}]
    lines += [
        {"step": s, "position": 64 * s, "samples_per_second": 32.0, "loss": 1.0}
        for s in range(10, 201, 10)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    column = top / "cache" / "toy" / "vae"
    (run / "config.yaml").write_text(json.dumps({"data": {"latents": str(column)}}))
    column.parent.mkdir(parents=True)
    encoded = {str(column): {"rows": 150, "seconds": {"decode": 30.0, "vae": 70.5}}, "else": {}}
    (top / "cache/report.json").write_text(json.dumps(encoded))
    value = {"value": 3.0, "low": None, "high": None, "count": None}
    (run / "eval" / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "scores": {"cmmd": value}}) + "\n" for s in (50, 100))
    )
    out = top / "page" / "report.html"
    data = report(
        [top / n for n in ("plain", "e2e", "alone")], out, runs={"plain": run}, pictures=6
    )
    return {"top": top, "out": out, "data": data, "values": values, "html": out.read_text()}


def test_the_numbers_are_those_of_the_items(example: dict[str, Any]) -> None:
    a, b = example["values"].values()
    data = json.loads((example["top"] / "page/report.json").read_text())
    assert data == json.loads(json.dumps(example["data"]))
    assert (data["format"], data["version"]) == ("latentbank-report", 1)
    first, second = data["sections"]
    assert [s["name"] for s in first["sets"]] == ["plain", "e2e"]
    scores = {score["scorer"]: score for score in first["scores"]}
    assert sorted(scores) == ["fd-tiny", "only-plain", "vqa-tiny"]
    vqa = scores["vqa-tiny"]
    assert [v["value"] for v in vqa["values"]] == pytest.approx([a.mean(), b.mean()])
    for i, group in enumerate(GROUPS):
        assert [v["value"] for v in vqa["groups"][group]] == pytest.approx(
            [a[i::3].mean(), b[i::3].mean()]
        )
    assert scores["only-plain"]["values"][1] is None
    (comparison,) = first["comparisons"]
    found = {d["scorer"]: d for d in comparison["differences"]}
    assert sorted(found) == ["fd-tiny", "vqa-tiny"]  # all that both have
    assert found["vqa-tiny"]["value"]["value"] == pytest.approx((b - a).mean())
    assert (found["vqa-tiny"]["resolved"], found["vqa-tiny"]["favours"]) == (True, "e2e")
    assert found["fd-tiny"]["value"] is None
    assert comparison["differ"]["guidance_scale"] == [6.0, 6.5]
    assert comparison["warnings"] == [
        "not a paired comparison of VAEs alone: guidance_scale differs (6.0, 6.5)"
    ]
    assert (second["benchmark"], second["scores"], second["comparisons"]) == ("other", [], [])


def test_cost_is_what_was_measured(example: dict[str, Any]) -> None:
    plain, e2e = (s["cost"] for s in example["data"]["sections"][0]["sets"])
    training = plain[
        "training"
    ]  # the set is of step 100: 6,400 samples at 32 a second, on eight GPUs
    assert (training["seconds"], training["step"], training["samples"]) == (200.0, 100, 6400)
    assert training["gpu_hours"] == pytest.approx(200 * 8 / 3600)
    assert (plain["encoding"]["seconds"], plain["encoding"]["rows"]) == (100.5, 150)
    assert plain["generation"]["seconds"] == 90.0
    assert plain["scoring"]["vqa-tiny"] == 12.0
    assert e2e["training"] is None
    (curve,) = example["data"]["curves"]
    assert [(step, value["value"]) for step, value in curve["points"]] == [(50, 3.0), (100, 3.0)]


def test_the_page_says_what_the_json_says(example: dict[str, Any]) -> None:
    page = Page(example["html"])
    text = " ".join(page.text.split())
    a, b = example["values"].values()
    assert f"{a.mean():,.4g} [" in text
    assert f"{(b - a).mean():+,.3g} [" in text
    assert "e2e is better" in text
    assert "uncalibrated: tiny" in text
    assert "guidance_scale differs (6.0, 6.5)" in text
    assert "no paired difference:" in text
    assert "python -m eval score SCORER" in text  # for the set without scores
    assert 'prompt <6> & "more"' in text  # told, not taken for tags
    assert (
        len(re.findall(r"(vae|weights|guidance_scale) differs", text)) == 3 + 1
    )  # and the warning
    assert example["html"].count('class="differs"') == 3 + 1  # and what follows the VAE
    assert "data.sources.0.latents.encoder.weights follows the VAE" in text
    assert "over prompts; training seeds are not covered" in text
    assert "0:03:20, 100 steps" in text
    assert "0:01:40 for 150 rows" in text
    assert "1:11:28 for 6,400 samples" in text  # 100.5 s of 150 rows, for each of 6,400 samples
    assert f"e2e is better by vqa-tiny {(b - a).mean():+,.3g} [" in text
    assert "Values are e2e minus plain. Compares sets that differ in more than VAEs." in text
    assert "Training lossrun" in text


def test_the_page_needs_nothing_from_outside(example: dict[str, Any]) -> None:
    page = Page(example["html"])
    for _, attributes in page.tags:
        for key in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(key) or "#").startswith(("#", "data:image/"))
    assert not re.search(
        r"url\(|@import|\bfetch\(|XMLHttpRequest|import\(|http:|https:", example["html"]
    )
    assert page.all("script") == [{}]
    targets = {(a["href"] or "").removeprefix("#") for a in page.all("a")}
    assert targets == {"s1", "s2", "training"}
    assert targets <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)


def test_the_page_is_readable_by_all(example: dict[str, Any]) -> None:
    page = Page(example["html"])
    assert page.all("html")[0]["lang"] == "en"
    names = {m.get("name"): m.get("content") for m in page.all("meta")}
    assert names["viewport"] == "width=device-width, initial-scale=1"
    assert "color-scheme: light dark" in example["html"]
    assert "prefers-color-scheme: dark" in example["html"]
    pictures = page.all("img")
    assert len(pictures) == 6 * 2 + 2
    for picture in pictures:
        assert picture["loading"] == "lazy"
        assert "prompt <" in (picture["alt"] or "") or "alone: " in (picture["alt"] or "")
        assert picture["width"]
    assert all(a.get("role") == "img" and a.get("aria-label") for a in page.all("svg"))
    assert all(a.get("scope") in ("row", "col") for a in page.all("th"))
    regions = [a for a in page.all("div") if a.get("role") == "region"]
    assert len(regions) == len(page.all("table"))
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in regions)


def test_pictures_are_those_of_the_same_prompts(example: dict[str, Any]) -> None:
    """Two of each of three groups, evenly apart, of both sets, as they lie in the folders."""
    first = example["data"]["sections"][0]
    assert first["shown"] == [
        "006",
        "007",
        "008",
        "021",
        "022",
        "023",
    ]  # of ten, the 3rd and the 8th
    uris = [a["src"] or "" for a in Page(example["html"]).all("img")]
    files = [
        example["top"] / n / "images" / f"{p}.png" for p in first["shown"] for n in ("plain", "e2e")
    ]
    for uri, file in zip(uris, files, strict=False):
        shown = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
        wanted = Image.open(file)
        assert shown.size == wanted.size
        a, b = (
            np.asarray(image.resize((4, 4), Image.Resampling.BOX)).astype(int)
            for image in (shown, wanted)
        )
        assert np.abs(a - b).mean() < 12  # noise, and lossy; another picture of noise differs by 25


def test_a_score_of_other_pictures_is_left_out_and_said(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_score(make_set(tmp_path / name, seed=ord(name)), "clip", make_items(np.ones(N)))
    shutil.copytree(tmp_path / "a/scores", tmp_path / "b/scores", dirs_exist_ok=True)
    data = report([tmp_path / "a", tmp_path / "b"], tmp_path / "r.html")
    (score,) = data["sections"][0]["scores"]
    assert score["values"][1] is None
    assert "clip is left out: it is of other pictures" in (tmp_path / "r.html").read_text()


def test_scores_without_their_pictures_join_their_benchmark(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_score(make_set(tmp_path / name), "clip", make_items(np.ones(N)))
    shutil.copytree(tmp_path / "b/scores", tmp_path / "scores-only/scores")
    (section,) = report([tmp_path / "a", tmp_path / "scores-only"], tmp_path / "r.html")["sections"]
    assert (section["kind"], section["benchmark"]) == ("pictures", "bench")
    assert section["comparisons"][0]["differences"][0]["value"]["value"] == 0


def test_unfinished_sets(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "a", finish=False)
    (folder / "images/003.png").unlink()
    with pytest.raises(MissingImages, match=r"1 of 30 files are missing.*003\.png"):
        report([folder], tmp_path / "r.html")
    assert not list(tmp_path.glob("r.*"))
    report([folder], tmp_path / "r.html", partial=True)
    page = (tmp_path / "r.html").read_text()
    assert "incomplete: the set lacks 1 file" in page


def test_reconstructions(tmp_path: Path) -> None:
    rows = Prompts("reconstruct-toy", tuple(Prompt(f"{i:08d}", f"key{i}") for i in range(4)))
    for seed, name in enumerate(("flux", "e2e")):
        folder = tmp_path / name
        for kind in ("original", "reconstruction"):
            make_set(folder / kind, {"vae": name, "kind": kind}, rows, seed=seed)
        items = make_items([20.0 + seed + [1, 3, 0, 2][i] for i in range(4)], rows)
        score = make_score(folder / "reconstruction", "psnr", items)
    results.write(tmp_path / "scores-only", score, items)
    data = report([tmp_path / n for n in ("flux", "e2e", "scores-only")], tmp_path / "r.html")
    (section,) = data["sections"]
    assert (section["kind"], section["benchmark"]) == ("reconstruction", "reconstruct-toy")
    first, second = section["comparisons"]
    assert (first["subject"], first["differences"][0]["value"]["value"]) == ("VAEs", 1.0)
    assert second["differences"][0]["value"]["value"] == 1.0
    page = Page((tmp_path / "r.html").read_text())
    names = [a["alt"] for a in page.all("img")]
    lost = [f"what {name} lost: key2" for name in ("flux", "e2e")]
    assert names[:5] == ["original: key2", "flux: key2", lost[0], "e2e: key2", lost[1]]  # the worst
    assert section["shown"] == ["00000002", "00000000", "00000003", "00000001"]
    assert "4 pictures, the worst first" in page.text
    assert "flux 20.0 dB" in page.text
    assert "e2e 21.0 dB" in page.text


def test_reconstructions_of_each_source_have_a_section(tmp_path: Path) -> None:
    items = tuple(Prompt(f"{i:08d}", f"key{i}") for i in range(4))
    values = {"flux": [20.0, 22.0, 24.0, 26.0], "e2e": [21.0, 22.5, 25.0, 27.5]}
    values["elsewhere"] = values["flux"]
    for name, psnr in values.items():
        for kind in ("original", "reconstruction"):
            make_set(
                tmp_path / name / kind,
                {"kind": kind}
                | ({"vae": name, "column": name} if kind == "reconstruction" else {}),
                Prompts("reconstruct-" + ("other" if name == "elsewhere" else "toy"), items),
            )
        prompts = ImageSetReader.open(tmp_path / name / "reconstruction").prompts
        for scorer, numbers in (("psnr", psnr), ("ssim", [0.5] * 4)):
            make_score(tmp_path / name / "reconstruction", scorer, make_items(numbers, prompts))
    data = report([tmp_path / name for name in values], tmp_path / "r.html")
    section, other = data["sections"]
    assert (other["benchmark"], other["comparisons"]) == ("reconstruct-other", [])
    assert [(s["scorer"], s["values"][0]["value"]) for s in section["scores"]] == [
        ("psnr", 23.0),
        ("ssim", 0.5),
    ]
    psnr, ssim = section["comparisons"][0]["differences"]
    assert (psnr["value"]["value"], psnr["resolved"], psnr["favours"]) == (1.0, True, "e2e")
    assert (ssim["value"]["value"], ssim["resolved"]) == (0.0, False)
    assert section["comparisons"][0]["warnings"] == []


def test_bad_folders_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    a, out = make_set(tmp_path / "a"), tmp_path / "r.html"
    make_score(a, "clip", make_items(np.ones(N)))
    (tmp_path / "empty").mkdir()
    for bad, error, told in [
        ([a, tmp_path / "none"], MissingImages, "none: no such folder"),
        ([a, tmp_path / "empty"], MissingImages, "found neither manifest.json nor scores"),
        ([a, tmp_path / "empty" / ".." / "a"], BadReport, "named twice"),
    ]:
        with pytest.raises(error, match=told):
            report(bad, out)
    with pytest.raises(BadReport, match="expected the name of a page"):
        report([a], tmp_path / "report.json")
    with pytest.raises(BadReport, match=r"--run b=.*expected a run"):
        report([a], out, runs={"b": tmp_path})
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(BadReport, match="--run b=.*expected one of a"):
        report([a], out, runs={"b": tmp_path})
    with pytest.raises(BadReport, match=r"a/manifest.json: found a file that is no report"):
        report([a], a / "manifest.html")
    (a / "scores/clip.json").write_text("{}")
    with pytest.raises(BadScores, match=r"scores/clip\.json"):
        report([a], out)
    (a / "images/000.png").write_bytes((a / "images/001.png").read_bytes())
    with pytest.raises(OtherImages, match="1 pictures changed"):
        report([a], out)
    assert not list(tmp_path.glob("r.*"))


def test_what_differs_beside_the_vae_is_on_the_page(tmp_path: Path) -> None:
    """Two layers, another rate, seed and rows against seven: no claim of pairing, and each value is named."""
    other = VAE | {"model.layers": 2, "optim.lr": 1e-5, "seed": 7, "order.valid_rows": ["2" * 64]}
    for i, changes in enumerate(({}, other)):
        settings = {"vae": str(i) * 64, "weights": str(i) * 64}
        example = make_set(
            tmp_path / str(i), settings, trained=training(changes), initial_share=0.98 * i
        )
        make_score(example, "clip", make_items(np.linspace(i, i + 0.1, N)))
    data = report([tmp_path / "0", tmp_path / "1"], tmp_path / "r.html")
    (comparison,) = data["sections"][0]["comparisons"]
    assert (comparison["subject"], comparison["paired"]) == ("VAEs", False)
    assert comparison["training"]["differ"] == {
        "model.layers": [7, 2],
        "optim.lr": [1.5e-3, 1e-5],
        "seed": [0, 7],
        "order.valid_rows": [["1" * 64], ["2" * 64]],
    }
    assert "model.in_channels" in comparison["training"]["follow"]
    (difference,) = comparison["differences"]
    assert (difference["resolved"], difference["favours"]) == (True, None)
    text = " ".join(Page((tmp_path / "r.html").read_text()).text.split())
    assert "Compares VAEs" not in text
    assert "Compares sets that differ in more than VAEs." in text
    for said in (
        "model.layers differs (7, 2)",
        "optim.lr differs (0.0015, 1e-05)",
        "order.valid_rows differs",
        "training seed differs (0, 7)",
        "model.layers differs72",
        "no verdict: other training seeds",
        "No verdict (other training seeds) by clip",
        "98.0% of the averaged weights",
    ):
        assert said in text


def test_sets_without_a_record_of_their_training_are_shown_as_such(tmp_path: Path) -> None:
    for i in range(2):
        make_set(tmp_path / str(i), {"vae": str(i) * 64, "weights": str(i) * 64})
    data = report([tmp_path / "0", tmp_path / "1"], tmp_path / "r.html")
    (comparison,) = data["sections"][0]["comparisons"]
    assert (comparison["paired"], comparison["training"]) == (None, None)
    assert [s["training"] for s in data["sections"][0]["sets"]] == [None, None]
    text = Page((tmp_path / "r.html").read_text()).text
    assert "how the weights of 0 and 1 were trained is not known" in text
    assert "Compares VAEs, on the prompts" not in text


def test_training_seeds_are_points_of_one_entry(tmp_path: Path) -> None:
    folders = seeded(tmp_path, {"flux": (0, 1, 2), "e2e": (0, 1, 2)})
    data = report(folders, tmp_path / "r.html")
    (section,) = data["sections"]
    assert section["entries"] == [
        {"name": "flux", "sets": [0, 1, 2], "seeds": [0, 1, 2]},
        {"name": "e2e", "sets": [3, 4, 5], "seeds": [0, 1, 2]},
    ]
    (comparison,) = section["comparisons"]
    assert (comparison["baseline"], comparison["other"], comparison["seeds"]) == (
        "flux",
        "e2e",
        [0, 1, 2],
    )
    (difference,) = comparison["differences"]
    values = [v["value"] for v in section["scores"][0]["values"]]
    assert {seed: v["value"] for seed, v in difference["by_seed"].items()} == pytest.approx(
        {str(seed): values[3 + seed] - values[seed] for seed in range(3)}
    )
    assert (difference["covers_seeds"], difference["favours"]) == (True, "e2e")
    means = [v["value"] for v in section["scores"][0]["over_seeds"]]
    assert means == pytest.approx([np.mean(values[:3]), np.mean(values[3:])])
    html = (tmp_path / "r.html").read_text()
    page = Page(html)
    rings = [a for a in page.all("circle") if a.get("class") == "ring"]
    assert len(rings) == 6 + 3  # of the scores, and of the differences
    assert len({a["cx"] for a in rings[:6]}) == 6
    assert "over prompts and 3 training seeds" in page.text
    assert "e2e is better by clip" in page.text
    assert "Other training seeds are not covered" not in page.text
    assert "Sets of the same training seed are paired: 0, 1, 2." in page.text
    assert len(page.all("img")) == 2 * len(section["shown"])  # of the first seed of each


@pytest.mark.parametrize(
    ("accuracy", "distance", "expected"),
    [
        ((0.1, None), (-1.0, None), "No difference shown by acc +0.1 [+0, +0.2], fd -1 [-2, +0]."),
        ((0.1, "b"), (-1.0, "b"), "b is better by acc +0.1 [+0, +0.2], fd -1 [-2, +0]."),
        ((0.1, "b"), (1.0, "a"), "b is better by acc +0.1 [+0, +0.2]. a is better by fd +1 [+0, +2]."),
        ((0.1, "b"), (1.0, None), "b is better by acc +0.1 [+0, +0.2]. No difference shown by fd +1 [+0, +2]."),
    ],
)  # fmt: skip
def test_verdicts(
    accuracy: tuple[float, str | None], distance: tuple[float, str | None], expected: str
) -> None:
    differences = [
        {
            "scorer": scorer, "favours": winner, "resolved": winner is not None, "covers_seeds": False,
            "identical": False, "no_verdict": None,
            "value": {"value": value, "low": min(0, 2 * value), "high": max(0, 2 * value)},
        }
        for scorer, (value, winner) in (("acc", accuracy), ("fd", distance))
    ]  # fmt: skip
    pair = {
        "baseline": "a",
        "other": "b",
        "sentence": "Compares sets that differ in more than VAEs.",
    }
    unscored = {"scorer": "acc", "value": None, "resolved": None, "reason": "none is scored"}
    without = {"differences": [unscored], **pair}

    def verdict(paired: bool, kind: str = "pictures") -> str:
        comparison = {"differences": differences, "paired": paired, **pair}
        first, sentence = verdicts({"kind": kind, "comparisons": [without, comparison]})
        assert first == "No verdict by acc: none is scored."
        return sentence.replace("\u00a0", " ")

    assert (
        verdict(True) == f"{expected} Values are b minus a. Other training seeds are not covered."
    )
    assert verdict(True, "reconstruction") == f"{expected} Values are b minus a."
    assert f"a. {pair['sentence']} Other" in verdict(False)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_set(tmp_path / "a")
    out = tmp_path / "deep" / "page.html"
    assert main(["report", str(tmp_path / "a"), "--out", str(out), "--pictures", "0"]) is None
    head, page, after = capsys.readouterr().out.splitlines()
    assert head == "bench: 1 set of pictures, none is scored"
    assert page == str(out)
    assert after == f"next: python -m eval score clipscore {tmp_path / 'a'}"
    assert "<img" not in out.read_text()
    assert json.loads((tmp_path / "deep/page.json").read_text())["sections"][0]["shown"] == []


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
@pytest.mark.parametrize(("dark", "width"), [(False, 390), (True, 1280)])
def test_in_a_browser(example: dict[str, Any], tmp_path: Path, dark: bool, width: int) -> None:
    """Not wider than a phone (in a frame, since no window is that narrow), in both schemes, each picture decoded."""
    found = in_browser(example["html"], tmp_path, dark=dark, width=width)
    assert found["wide"] == width
    assert found["shown"] == 6 * 2 + 2
    assert found["colour"] == ("#5aa9e0" if dark else "#2a7fb8")
    assert found["table"] > 300
    assert found["faults"] == []
