"""Several values of a setting in one command: a set each, as separate commands make them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from eval.commands import main
from eval.errors import BadRequest, OtherImages
from eval.images.flags import single
from eval.images.generate import Request, generate, generate_each, requests_of
from eval.images.imageset import ImageSetReader
from eval.images.ranks import Rank
from eval.prompts.prompts import halves
from eval.report.entries import open_all
from eval.scores import results
from shards import exits
from tests.commands.lines import next_lines
from tests.eval import faults
from tests.eval.faults import made
from tests.forks import await_stop, fork, leave_pytest, wait

PROMPTS = ["a red cat", "the blue dog on a flag", "a", "dog", "the red flag"]
SCALES = ["1.5", "2", "3", "4", "6"]


@pytest.fixture
def words(tmp_path: Path, run: Path) -> list[str]:
    (tmp_path / "few.json").write_text(json.dumps(PROMPTS))
    paths = ["--checkpoint", str(run), "--prompts", str(tmp_path / "few.json")]
    return [
        "generate",
        *paths,
        "--num_inference_steps",
        "3",
        "--batch_size",
        "2",
        "--device",
        "cpu",
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


def settings(folder: Path) -> object:
    return json.loads((folder / "manifest.json").read_text())["settings"]


def test_five_scales_make_the_pictures_of_five_commands(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*words, "--save_dir", str(out), "--guidance_scale", *SCALES]) == 0
    captured = capsys.readouterr()
    folders = [out / f"guidance_scale-{scale}" for scale in SCALES]
    named = " ".join(map(str, folders))
    lines = set(next_lines(captured.out + captured.err))
    assert lines == {f"next: python -m eval report {named} --out report.html"}
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [f.name for f in folders] + ["text"]
    )
    assert len(list((out / "text").iterdir())) == 1  # prompts are encoded once
    for scale, folder in zip(SCALES, folders, strict=True):
        alone = tmp_path / scale
        assert main([*words, "--save_dir", str(alone), "--guidance_scale", scale]) == 0
        assert files(folder) == files(alone)
        assert settings(folder) == settings(alone)
        assert not (folder / "text").exists()
    assert len({files(folder)["00001.png"] for folder in folders}) == 5
    assert [scored.name for scored in open_all(folders)] == [f.name for f in folders]


def test_a_half_of_the_prompts_has_the_pictures_of_the_whole_set(
    tmp_path: Path, words: list[str]
) -> None:
    """Five prompts: two in each half. Both halves are scored under their names, and cannot be halved again."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    named = {f"face-{n}": text for n, text in enumerate(PROMPTS)}
    (tmp_path / "few.json").write_text(json.dumps(named))
    assert main([*words, "--save_dir", str(whole), "--guidance_scale", "2"]) == 0
    assert main([*words, "--save_dir", str(half), "--guidance_scale", "2", "--half", "a"]) == 0
    a, b = halves([(name, None) for name in named])
    of_whole, of_half = ImageSetReader.open(whole), ImageSetReader.open(half)
    assert [prompt.id for prompt in of_half.prompts.items] == sorted(a)
    pixels = {picture.path.name: picture.read() for picture in of_whole}
    assert all((picture.read() == pixels[picture.path.name]).all() for picture in of_half)
    assert not main(["score", "demo-acc", str(half), "--device", "cpu"])
    assert not main(["score", "demo-acc", str(whole), "--device", "cpu", "--half", "b"])
    (of_a,) = results.read_all(half).values()
    (of_b,) = results.read_all(whole / "halves/b").values()
    assert (of_a.scorer[-7:], of_b.scorer[-7:]) == ("-half-a", "-half-b")
    assert (of_a.prompts, of_b.prompts) == (len(a), len(b))
    assert not results.read_all(whole)
    with pytest.raises(OtherImages, match="found pictures of half a of the prompts"):
        main(["score", "demo-acc", str(half), "--device", "cpu", "--half", "b"])


def test_a_single_value_is_a_set_of_its_own_folder(
    tmp_path: Path, words: list[str], run: Path
) -> None:
    assert main([*words, "--save_dir", str(tmp_path / "out"), "--guidance_scale", "2"]) == 0
    request = Request(
        checkpoint=run, prompts=tmp_path / "few.json", save_dir=tmp_path / "other", num_inference_steps=3,
        batch_size=2, guidance_scale=2.0,
    )  # fmt: skip
    generate(request)
    assert files(tmp_path / "out") == files(tmp_path / "other")
    assert (tmp_path / "out/text").is_dir()


def test_each_combination_of_lists_is_a_set(tmp_path: Path, run: Path) -> None:
    fields = {"checkpoint": run, "save_dir": tmp_path, "guidance_scale": [1.0, 2.25]}
    names = [r.save_dir.name for r in requests_of({**fields, "shift": [3.0, 1.5]})]
    assert sorted(names) == [
        "guidance_scale-1-shift-1.5", "guidance_scale-1-shift-3", "guidance_scale-2.25-shift-1.5",
        "guidance_scale-2.25-shift-3",
    ]  # fmt: skip
    requests = requests_of({**fields, "shift": [3.0], "text_cache": tmp_path / "kept"})
    assert [(r.save_dir.name, r.guidance_scale, r.shift) for r in requests] == [
        ("guidance_scale-1", 1.0, 3.0),
        ("guidance_scale-2.25", 2.25, 3.0),
    ]
    assert {r.text_cache for r in requests} == {tmp_path / "kept"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guidance_scale", "2", "3", "2.0"], "--guidance_scale: found 2 twice, expected each"),
        (["--guidance_scale", "2", "-1"], "found '-1', expected a number of at least 0"),
        (["--guidance_scale", "2", "nan"], "found 'nan', expected a number of at least 0"),
        (["--guidance_scale", "0.5", "2", "1"], "found 0.5 and 1, expected one of them"),
        (["--guidance_scale"], "expected at least one argument"),
        (["--shift", "2", "2"], "--shift: found 2 twice"),
        (["--shift", "2", "0"], "found '0', expected a number of at least"),
    ],
)
def test_bad_lists_write_nothing(
    tmp_path: Path, words: list[str], flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as end:
        exits.run(lambda: main([*words, "--save_dir", str(tmp_path / "out"), *flags]))
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_settings_is_found_before_anything_is_written(
    tmp_path: Path, run: Path, words: list[str]
) -> None:
    out = tmp_path / "out"
    other = Request(
        checkpoint=run, prompts=tmp_path / "few.json", save_dir=out / "guidance_scale-3", batch_size=2,
        num_inference_steps=2, guidance_scale=3.0, text_cache=out / "text",
    )  # fmt: skip
    generate(other)
    before = files(other.save_dir)
    fields = {**vars(other), "save_dir": out, "num_inference_steps": 3}
    with pytest.raises(OtherImages, match="num_inference_steps: found 2, expected 3"):
        generate_each(requests_of({**fields, "guidance_scale": [1.5, 2.0, 3.0]}))
    assert sorted(path.name for path in out.iterdir()) == ["guidance_scale-3", "text"]
    assert files(other.save_dir) == before


def fields_of(out: Path) -> dict[str, object]:
    """Two scales of the set that `made` holds, which is of scale 6."""
    return {**vars(faults.request(made()[0], out)), "guidance_scale": [6.0, 3.0]}


def test_killed_in_the_second_set_it_goes_on_there(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"

    def work() -> None:
        leave_pytest()
        generate_each(requests_of(fields_of(out)))

    def stopping() -> None:
        faults.stop_at_pictures(out / "guidance_scale-3", 5)
        work()

    pid = fork(stopping, log)
    await_stop(pid, log)
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL
    assert files(out / "guidance_scale-6") == files(made()[1])
    times = [path.stat().st_mtime_ns for path in (out / "guidance_scale-6/images").iterdir()]
    assert wait(fork(work, log)) == 0, log.read_text()
    assert times == [
        path.stat().st_mtime_ns for path in (out / "guidance_scale-6/images").iterdir()
    ]
    assert "chunks of prompts" not in log.read_text()
    alone = Request(**{**fields_of(tmp_path / "alone"), "guidance_scale": 3.0})  # type: ignore[arg-type]
    generate(alone)
    assert files(out / "guidance_scale-3") == files(alone.save_dir)


def test_ranks_share_each_set(tmp_path: Path) -> None:
    """One after the other, as in a scheduler's array: each finds in the cache what it encoded itself."""
    for number in (1, 0):
        manifests = generate_each(requests_of(fields_of(tmp_path)), Rank(number, 2))
    assert [manifest["complete"] for manifest in manifests] == [True, True]
    assert files(tmp_path / "guidance_scale-6") == files(made()[1])


def test_where_one_value_is_needed_several_are_refused() -> None:
    assert single({"guidance_scale": [2.0], "shift": None, "names": ["a", "b"]}) == {
        "guidance_scale": 2.0, "shift": None, "names": ["a", "b"],
    }  # fmt: skip
    with pytest.raises(BadRequest, match="--shift: found 2 values, expected one"):
        single({"guidance_scale": 2.0, "shift": [1.0, 2.0]})
