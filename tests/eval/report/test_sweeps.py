"""A setting of the sampler is chosen on one half of the prompts and reported on the other."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.commands import main
from eval.distances.frechet import Gaussian, distance
from eval.errors import BadScores
from eval.features.features import extract, of_folder
from eval.images.imageset import ImageSetReader
from eval.prompts.prompts import halves
from eval.report import sweeps
from eval.report.sweeps import HalfScores, Point
from eval.score import SCORERS
from eval.scores import results
from eval.scores.choose import choose
from eval.scores.results import Value
from eval.scores.seeds import Estimate
from eval.sweep import _sentences
from eval.watch import parse_scorers
from shards import exits, seal
from shards.format.atomic import read_json
from tests.eval import faults
from tests.eval.browser import BROWSER, in_browser
from tests.eval.small import prompts_of, save_folder, save_set
from tests.forks import await_stop, fork, leave_pytest, stop_after, wait

WORDS = ("red", "blue", "cat", "dog", "flag", "on", "the")
COUNT = 25  # an odd number: one prompt is in no half


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, and pictures to compare with."""
    folder = tmp_path_factory.mktemp("sweep")
    chance = np.random.default_rng(0)
    prompts = [" ".join(chance.choice(WORDS, 1 + i % 5)) for i in range(COUNT)]
    (folder / "flag.json").write_text(
        json.dumps({f"flag-{i:02d}": p for i, p in enumerate(prompts)})
    )
    save_folder(folder / "real", 40)
    return folder


def words(
    place: Path, run: Path, out: Path, over: Sequence[str] = ("guidance_scale=1,3,6",)
) -> list[str]:
    sampling = ["--num_inference_steps", "2", "--batch_size", "8", "--device", "cpu"]
    paths = ["--prompts", str(place / "flag.json"), "--save_dir", str(out)]
    scorers = ["demo-fd", "--reference", str(place / "real"), "--allow-few", "--scorer", "demo-acc"]
    return ["sweep", str(run), "--over", *over, *paths, *sampling, "--scorer", *scorers]


@pytest.fixture(scope="module")
def swept(place: Path, run: Path) -> Path:
    assert main(words(place, run, place / "out")) == 0
    return place / "out"


def test_what_it_leaves(swept: Path) -> None:
    record = sweeps.read(swept)
    assert [point.setting for point in record.points] == [
        {"guidance_scale": 1.0}, {"guidance_scale": 3.0}, {"guidance_scale": 6.0},
    ]  # fmt: skip
    assert (record.prompts, record.pictures) == (12, 12)
    acc, fd = sorted(record.better)
    assert record.scorer == fd
    assert record.better == {fd: "lower", acc: "higher"}
    chosen_on = [point.scores[fd].a.value for point in record.points]
    assert record.best == int(np.argmin(chosen_on))
    assert record.points[record.best].difference.value == 0
    for point in record.points:
        assert point.difference.value == pytest.approx(
            point.scores[fd].a.value - min(chosen_on), abs=1e-9
        )


def test_a_distance_of_a_half_is_of_its_pictures_alone_and_says_so(
    swept: Path, place: Path, tmp_path: Path
) -> None:
    """Independent of sets and halves: pictures of the ids, copied to a folder, and its distance."""
    from eval.demo.judge import WEIGHTS
    from eval.distances.metrics import METRICS

    names = [f"flag-{i:02d}" for i in range(COUNT)]
    parts = dict(zip("ab", halves([(name, None) for name in names]), strict=True))
    network = METRICS["demo-fd"].load(WEIGHTS, "cpu")
    real = extract(of_folder(place / "real"), network)
    record, folder = sweeps.read(swept), swept / "guidance_scale-3"
    for half, ids in parts.items():
        (tmp_path / half).mkdir()
        for name in ids:
            shutil.copy(folder / f"images/{name}.png", tmp_path / half)
        features = extract(of_folder(tmp_path / half), network)
        expected = distance(Gaussian.fitted(features), Gaussian.fitted(real))
        (score,) = [
            score
            for name, score in results.read_all(folder / f"halves/{half}").items()
            if "fd" in name
        ]
        assert score.scorer.endswith(f"-few-12-half-{half}")
        assert score.value.value == pytest.approx(expected, rel=1e-3)
        assert (score.prompts, score.pictures) == (12, 12)
        found = getattr(record.points[1].scores[record.scorer], half)
        assert found == score.value
    assert results.read_all(folder) == {}  # no score of a half beside those of the set


def test_a_share_is_best_where_it_is_highest_and_says_of_how_many_pictures(
    swept: Path, place: Path, run: Path, tmp_path: Path
) -> None:
    """Recall chooses; FDr, whose validation half serves both halves of the prompts, is beside it."""
    out = tmp_path / "out"
    shutil.copytree(swept, out)  # the pictures of both settings that are asked for exist
    line = words(place, run, out, ["guidance_scale=1,6"])
    line = line[: line.index("--scorer")]
    real = ["--reference", str(place / "real")]
    other = ["--validation", str(save_folder(tmp_path / "other", 14, 5)), "--allow-few"]
    assert (
        main([*line, "--scorer", "demo-recall", *real, "--scorer", "demo-fdr", *real, *other]) == 0
    )
    record = sweeps.read(out)
    recall, fdr = record.scorer, next(name for name in record.better if "fdr" in name)
    assert record.better == {recall: "higher", fdr: "lower"}
    assert recall.startswith("demo-recall-")
    assert recall.endswith("-12")
    assert fdr.endswith("-few-12")
    shares = [point.scores[recall].a.value for point in record.points]
    assert record.best == int(np.argmax(shares))
    names = results.read_all(out / "guidance_scale-6/halves/b")
    assert {f"{name}-half-b" for name in (recall, fdr)} <= set(names)


def test_the_sets_are_those_of_generate(
    swept: Path, place: Path, run: Path, tmp_path: Path
) -> None:
    flags = ["--num_inference_steps", "2", "--batch_size", "8", "--device", "cpu"]
    paths = ["--checkpoint", str(run), "--prompts", str(place / "flag.json")]
    out = tmp_path / "out"
    line = ["generate", *paths, "--save_dir", str(out), *flags, "--guidance_scale", "3", "6"]
    assert main(line) == 0
    for scale in ("3", "6"):
        folders = [folder / f"guidance_scale-{scale}" for folder in (out, swept)]
        assert ImageSetReader.open(folders[0]).digest == ImageSetReader.open(folders[1]).digest
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert main(words(place, run, out)) == 0  # goes on with what exists
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert sweeps.read(out).points == sweeps.read(swept).points


def test_settings_that_are_all_equal_have_no_best() -> None:
    """As where no picture of any is right: neither a best score nor an edge is spoken of."""
    zero = HalfScores(Value(0.0, 0.0, 0.0), Value(0.0, 0.0, 0.0))
    scales = [{"guidance_scale": scale} for scale in (1.5, 3.0, 6.0)]
    choice = choose(scales, [Estimate(value=0.0)] * 3, "higher")
    assert choice.tied == (True, True, True)
    points = [
        Point(setting=scale, folder="x", scores={"acc": zero}, difference=zero.a, tied=True)
        for scale in scales
    ]
    text = " ".join(_sentences(points, choice, "acc", 4))
    assert "No difference shown between the 3 settings" in text
    assert "best" not in text
    assert "try them" not in text


def test_the_page_has_the_curve_and_its_choice(swept: Path) -> None:
    page = (swept / "report.html").read_text()
    record = sweeps.read(swept)
    assert "Choice of a setting" in page
    for scorer in record.better:
        assert f"{scorer} ({record.better[scorer]} is better)" in page
    assert page.count('class="band"') == 2
    assert record.sentences[0].split(":")[0] in page
    assert "No scores yet" not in page
    data = json.loads((swept / "report.json").read_text())
    assert [point["folder"] for point in data["sweeps"][0]["points"]] == [
        "guidance_scale-1", "guidance_scale-3", "guidance_scale-6",
    ]  # fmt: skip
    assert data["sections"][0]["scores"] == []


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_asks_for_nothing_and_the_page_fits(
    swept: Path, tmp_path: Path, width: int
) -> None:
    page = (swept / "report.html").read_text()
    found = in_browser(page, tmp_path, dark=width < 1000, width=width)
    assert found["faults"] == []
    assert found["wide"] <= width


def test_a_half_never_has_the_other_halfs_prompts(tmp_path: Path) -> None:
    """Four pictures a file: nothing of the other half is read, and no score of one is beside the set's."""
    prompts = prompts_of(9, groups=True)
    whole = ImageSetReader.open(save_set(tmp_path, prompts, layout="grids", count=4))
    parts = halves([(prompt.id, prompt.group) for prompt in prompts.items])
    a, b = whole.half_of("a"), whole.half_of("b")
    for half, ids in ((a, parts[0]), (b, parts[1])):
        assert {picture.file.prompt.id for picture in half} == set(ids)
        assert len(list(half)) == 16
        assert [prompt.id for prompt in half.prompts.items] == sorted(ids)
        assert half.folder == tmp_path / "halves" / str(half.half)
    assert len({whole.digest, a.digest, b.digest}) == 3
    kept = {(p.path, p.number): p.read() for p in whole}
    assert all(np.array_equal(p.read(), kept[p.path, p.number]) for p in a)


def test_the_table_fits_a_narrow_terminal(
    swept: Path,
    place: Path,
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And its sentences use the width of a wider one."""
    widest = {}
    for columns in (60, 110):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(words(place, run, swept)) == 0
        printed = capsys.readouterr().out
        table, sentences = (part.splitlines() for part in printed.split("\n\n")[:2])
        assert max(map(len, table)) <= min(columns, 60), printed
        widest[columns] = max(len(line) for line in sentences if not line.startswith("next"))
    assert 80 < widest[110] <= 110
    assert [line.split()[0] for line in table[-3:]] == ["1", "3", "6"]
    record = sweeps.read(swept)
    assert "chosen" in table[len(table) - 3 + record.chosen]
    assert record.sentences[0] in printed.replace("\n", " ")
    assert printed.rstrip().endswith("report.html")


def test_two_settings_at_once(place: Path, run: Path, tmp_path: Path) -> None:
    line = words(place, run, tmp_path / "out", ("guidance_scale=2,4", "shift=1,3"))
    assert main(line) == 0
    record = sweeps.read(tmp_path / "out")
    assert sorted(point.folder for point in record.points) == [
        f"guidance_scale-{g}-shift-{s}" for g in (2, 4) for s in (1, 3)
    ]
    page = (tmp_path / "out/report.html").read_text()
    assert ">shift 1</span>" in page


def test_killed_while_it_samples_and_while_it_scores_it_ends_in_the_same_choice(
    swept: Path, place: Path, run: Path, tmp_path: Path
) -> None:
    line, out = words(place, run, tmp_path / "out"), tmp_path / "out"

    def work() -> None:
        leave_pytest()
        main(line)

    def sampling() -> None:
        faults.stop_at_pictures(out / "guidance_scale-3", 9)
        work()

    def scoring() -> None:
        stop_after(results, "write", lambda: list(out.glob("*/halves/a/scores/*.json")))
        work()

    for moment in (sampling, scoring):
        pid = fork(moment, tmp_path / "log")
        await_stop(pid, tmp_path / "log")
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == -signal.SIGKILL
    assert not (out / sweeps.NAME).exists()
    assert wait(fork(work, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    assert sweeps.read(out) == sweeps.read(swept)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (["guidance_scale=2"], "found one setting, expected at least two"),
        (["guidance_scale=2,2"], "--guidance_scale: found 2 twice"),
        (["guidance_scale=2,-1"], "--over guidance_scale: found '-1'"),
        (["guidance_scale=2,"], "--over guidance_scale: found ''"),
        (["guidance_scale=0,1"], "found 0 and 1, expected one of them"),
        (["shift=0,1"], "--over shift: found '0'"),
        (["steps=1,2"], "found 'steps=1,2', expected NAME=VALUE"),
        (["guidance_scale"], "found 'guidance_scale', expected NAME=VALUE"),
        (["shift=1,2", "shift=3"], "found shift twice"),
    ],
)
def test_bad_lists_are_refused_before_anything_is_made(
    place: Path, run: Path, tmp_path: Path, over: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    refused(words(place, run, tmp_path / "out", over), message, capsys)
    assert not (tmp_path / "out").exists()


def refused(line: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        exits.run(lambda: main(line))
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_flags_of_a_scorer_are_taken_as_eval_score_takes_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    typed = ["demo-acc", "--device", "auto", "--batch-size", "3", "--scorer", "demo-acc"]
    auto, default = parse_scorers(typed, SCORERS, "cpu", "sweep")
    assert (auto.args.device, auto.args.batch_size) == ("cuda", 3)
    assert default.args.device == "cpu"  # that of the sweep
    with pytest.raises(SystemExit):
        parse_scorers(["demo-acc", "--bacth-size", "3"], SCORERS, "cpu", "sweep")
    assert "WrongWords: python -m eval sweep RUN --scorer demo-acc: " in capsys.readouterr().err


def test_what_cannot_be_scored_is_refused_before_anything_is_made(
    place: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    line = words(place, run, tmp_path / "out")
    refused([word for word in line if word != "--allow-few"], "expected at least 33", capsys)
    refused(line[: line.index("--scorer")], "--scorer: found none", capsys)
    refused([*line[:-1], "beauty"], "--scorer: found 'beauty'", capsys)
    refused(
        [*line[:2], "--guidance_scale", "2", "3", *line[2:]], "unrecognized arguments: 3", capsys
    )
    (tmp_path / "flag.json").write_text(json.dumps(["a", "b", "c"]))
    few = [str(tmp_path / "flag.json") if word.endswith("flag.json") else word for word in line]
    refused(few, "found 3 prompts, expected at least 4", capsys)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(line, "found 2 ranks, expected one process", capsys)
    assert not (tmp_path / "out").exists()


def spoiled(record: dict[str, Any], **fields: Any) -> bytes:
    return seal({key: value for key, value in record.items() if key != "digest"} | fields)


def test_a_damaged_record_is_named(swept: Path, tmp_path: Path) -> None:
    record = read_json(swept / sweeps.NAME)
    point = record["points"][0]
    for fields in (
        {"chosen": 3},
        {"points": [point]},
        {"scorer": "x"},
        {"points": [point, {**point, "setting": {}}]},
    ):
        (tmp_path / sweeps.NAME).write_bytes(spoiled(record, **fields))
        with pytest.raises(BadScores, match=r"sweep\.json: not what"):
            sweeps.read(tmp_path)
    (tmp_path / sweeps.NAME).write_bytes((swept / sweeps.NAME).read_bytes()[:-9])
    with pytest.raises(BadScores, match=r"sweep\.json: not what"):
        sweeps.read(tmp_path)
