"""`python -m shards` as a user runs it."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from shards import Order, create_column, open_join
from shards.__main__ import main
from shards.column.lease import Lease
from shards.read.join import JoinedColumns
from shards.read.opening import open_sources
from shards.read.order import FAREST
from shards.tools.verify import logical_digest
from tests.commands.lines import next_lines
from tests.shards.tools.test_repair import flip
from tests.shards.toy import (
    files_of,
    moments_spec,
    small_moments,
    small_tokens,
    tokens_spec,
    write_column,
)

ROOT = Path(__file__).parents[3]
FAR = 10**9


def command(*words: object) -> subprocess.CompletedProcess[str]:
    """The command in this process, which saves two seconds each; `a_process` is the real thing."""
    argv, out, err = ["shards", *map(str, words)], io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            code = main()
        except SystemExit as stop:  # of the parser
            code = int(stop.code or 0)
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def a_process(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shards", *map(str, words)], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240,
    )  # fmt: skip


def order(toy: Path, **options: int) -> list[dict[str, Any]]:
    words = [w for name, value in options.items() for w in (f"--{name.replace('_', '-')}", value)]
    result = command("order", toy / "vae", toy / "text", *words)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_order_is_one_for_every_world(toy: Path) -> None:
    run = {"global_batch": 128, "seed": 3}
    run_lines = order(toy, **run, steps=6)
    assert [list(line) for line in run_lines] == [["step", "rows"]] * 6
    assert [line["step"] for line in run_lines] == [0, 1, 2, 3, 4, 5]
    assert run_lines[0]["rows"] == open_join(toy / "vae", toy / "text").order(3)(0, 128)[1].tolist()
    for world in (2, 4, 8):
        parts = [
            order(toy, **run, steps=2, position=256, world=world, rank=r) for r in range(world)
        ]
        for k in range(2):
            assert sum((part[k]["rows"] for part in parts), []) == run_lines[2 + k]["rows"]
    assert order(toy, **run, steps=4, position=256) == run_lines[2:]


def test_order_far_on_is_as_fast(toy: Path) -> None:
    far = FAR // 64 * 64
    start = time.process_time()
    near = order(toy, global_batch=64, steps=2)
    between = time.process_time()
    later = order(toy, global_batch=64, position=far, steps=2)
    assert time.process_time() - between < 3 * (between - start) + 1
    assert [line["step"] for line in later] == [far // 64, far // 64 + 1]
    assert later != near


def test_order_with_windows_lanes_and_other_columns(toy: Path, tmp_path: Path) -> None:
    write_column(tmp_path / "also", moments_spec(weights="other"))
    result = command(
        "order", toy / "vae", toy / "text", "--also", tmp_path / "also", "--truncated", "--global-batch", 16,
        "--lanes", 16, "--window", 32, "--seed", 5,
    )  # fmt: skip
    words = open_join(toy / "vae", toy / "text", truncated=True).valid_mask
    assert json.loads(result.stdout)["rows"] == Order([words], 5, 16, 32)(0, 16)[1].tolist()


def test_as_a_process(toy: Path) -> None:
    for words in (("digest", toy / "vae"), ("info", toy / "text"), ("verify", toy / "vae")):
        result, in_process = a_process(*words), command(*words)
        assert (result.returncode, result.stdout) == (in_process.returncode, in_process.stdout)


def test_digest(tmp_path: Path) -> None:
    a, b = small_tokens(tmp_path / "a"), small_tokens(tmp_path / "b")
    digests = [command("digest", path).stdout for path in (a, b)]
    assert digests[0] == digests[1] == logical_digest(a) + "\n"
    assert len(digests[0].strip()) == 64
    column = small_moments(tmp_path / "c")
    assert command("digest", column).stdout != digests[0]
    several = command("digest", a, column, b, "--deep").stdout.splitlines()
    assert several == [f"{logical_digest(path)}  {path}" for path in (a, column, b)]
    cut = command("digest", a, tmp_path / "nothing", b)
    assert (cut.returncode, cut.stdout) == (2, several[0] + "\n")


def test_info(toy: Path) -> None:
    vae, text = command("info", toy / "vae").stdout, command("info", toy / "text").stdout
    assert "(moments, complete)" in vae
    assert "3 of 3 committed, 0 failed" in vae
    assert "rows        2,164: " in vae
    assert '"weights": "vae"' in vae
    assert "WARNING     the VAE's shift and scale do not normalise these latents" in vae
    assert "(tokens, complete)" in text
    assert "most 4" in text


def test_info_of_a_column_in_the_making(tmp_path: Path) -> None:
    create_column(tmp_path, tokens_spec())
    result = command("info", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "NOT complete" in result.stdout
    assert "0 of 3 committed" in result.stdout


def test_verify_sound_and_damaged(tmp_path: Path) -> None:
    path = small_moments(tmp_path / "c")
    sound = command("verify", path)
    assert (sound.returncode, sound.stdout.strip()) == (0, f"{path}: sound")
    data = bytearray((path / "moments/c/0/0/0/0").read_bytes())
    data[100] ^= 1
    (path / "moments/c/0/0/0/0").write_bytes(data)
    bad = command("verify", path)
    assert bad.returncode == 1
    assert "moments/c/0/0/0/0" in bad.stdout
    assert "rows [3] do not fit their checksums" in bad.stdout
    assert "Traceback" not in bad.stderr


def test_damage_is_found_mended_and_told(tmp_path: Path) -> None:
    """The road of somebody whose disk lost a bit: verify, repair, encode, verify."""
    path = write_column(tmp_path / "c", moments_spec())
    digest = logical_digest(path)
    data = bytearray((path / "moments/c/4/0/0/0").read_bytes())
    data[100] ^= 1
    (path / "moments/c/4/0/0/0").write_bytes(data)
    bad = command("verify", path, "--json", "--processes", 2)
    assert bad.returncode == 1
    faults = [json.loads(line) for line in bad.stdout.splitlines()]
    assert [(f["kind"], f["shard"], f["object"]) for f in faults] == [
        (kind, 2, "moments/c/4/0/0/0") for kind in ("object", "rows", "digest")
    ]
    assert faults[1]["rows"] == [[3, 1]]
    deep = command("digest", path, "--deep")
    assert deep.returncode == 1
    assert "rows [3] do not fit" in deep.stderr
    assert deep.stdout.strip() != digest
    dry = command("repair", path)
    assert dry.returncode == 0
    assert "would quarantine: commits/00002.json" in dry.stdout
    assert "nothing was changed" in dry.stdout
    assert logical_digest(path) == digest
    result = command("repair", path, "--yes")
    assert result.returncode == 0
    assert "now makes shards [2] again" in result.stdout
    unfinished = command("verify", path)
    assert unfinished.returncode == 0
    assert "unfinished, 1 of 3 shards not committed" in unfinished.stdout
    write_column(path, moments_spec())
    assert command("digest", path, "--deep").stdout.strip() == digest
    assert "would delete: quarantine/" in command("gc", path, "--quarantine").stdout
    assert "deleted: quarantine/" in command("gc", path, "--quarantine", "--yes").stdout
    assert not [n for n in files_of(path) if n.startswith("quarantine")]


def test_a_held_lease_is_exit_code_5(tmp_path: Path) -> None:
    path = small_moments(tmp_path / "c")
    with Lease(path, "shards repair"):
        for name in ("repair", "gc"):
            result = command(name, path, "--yes")
            assert result.returncode == 5
            assert "held by `shards repair`" in result.stderr
        assert command("gc", path, "--yes", "--break-lease").returncode == 0


def test_convert_copy_stage_diff(toy: Path, tmp_path: Path) -> None:
    result = command("convert", toy / "text", tmp_path / "tar", "--backend", "webdataset")
    assert result.returncode == 0, result.stderr
    assert "logical digests equal those of the source" in result.stdout
    assert next_lines(result.stdout) == [f"next: python -m shards verify {tmp_path}/tar"]
    difference = command("diff", toy / "text", tmp_path / "tar")
    assert difference.returncode == 0, difference.stderr
    assert "the same content" in difference.stdout
    unlike = command("diff", toy / "vae", tmp_path / "tar")
    assert unlike.returncode == 1
    result = command("copy", tmp_path / "tar", f"file://{tmp_path}/copied")
    assert result.returncode == 0, result.stderr
    assert files_of(tmp_path / "copied") == files_of(tmp_path / "tar")
    assert next_lines(result.stdout) == [f"next: python -m shards verify file://{tmp_path}/copied"]
    staged = command("stage", toy / "vae", toy / "text", tmp_path / "nvme")
    place = tmp_path / "nvme" / toy.name
    assert staged.stdout.split() == [f"data.latents={place}/vae", f"data.text={place}/text"]
    both = [shutil.copytree(toy / "vae", tmp_path / name / "vae") for name in ("a b", "c")]
    staged = command("stage", *both, tmp_path / "two")
    places = [str(tmp_path / "two" / path.parent.name / "vae") for path in both]
    (word,) = shlex.split(staged.stdout)  # as a shell takes it
    assert yaml.safe_load(word.removeprefix("data.latents=")) == places
    odd = tmp_path / "a, b #c: [d] 'e' ü"
    for columns in ([toy / "vae"], both):
        staged = command("stage", *columns, odd)
        (word,) = shlex.split(staged.stdout)
        expected = [str(odd / column.parent.name / column.name) for column in columns]
        value = yaml.safe_load(word.removeprefix("data.latents="))
        assert (value if isinstance(value, list) else [value]) == expected
    info = json.loads(command("info", place / "text", "--json").stdout)
    assert info["rows"] == 2164
    result = command("verify", place / "vae", place / "text")
    assert result.stdout.splitlines() == [f"{place}/vae: sound", f"{place}/text: sound"]


def test_messages_not_tracebacks(toy: Path, tmp_path: Path) -> None:
    stranger = write_column(tmp_path / "other", tokens_spec(source="other"))
    order_words = ("order", toy / "vae", toy / "text", "--global-batch", 64)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/column.json").write_bytes((toy / "vae/column.json").read_bytes()[:-20])
    for words, message in (
        (("info", tmp_path / "nothing"), "no such folder"),
        (("digest", tmp_path), "column.json: no such file"),
        (("info", tmp_path / "cut"), "not a latentbank-column record"),
        (("order", toy / "vae", stranger, "--global-batch", 64), "made from source other"),
        (("order", toy / "vae", toy / "text", "--global-batch", 65), "multiples of the 64 lanes"),
        (
            ("order", toy / "vae", toy / "text", "--global-batch", 64, "--world", 3),
            "world of 3 ranks",
        ),
        (("order", toy / "text", toy / "vae", "--global-batch", 64), "expected one of moments"),
        (("order", toy / "vae", toy / "text", "--global-batch", "x"), "expected a whole number"),
        ((*order_words, "--steps", -1), "found -1, expected 1 or more"),
        ((*order_words, "--position", 10**20), "below 2^64"),
        (
            (*order_words, "--position", 2**63),
            f"from 0 and global batch 64 from 1 to {FAREST} expected",
        ),
        ((*order_words, "--seed", 2**64), "below 2^64"),
        (
            (*order_words, "--more", toy / "vae", toy / "text", "--weights", "0.5"),
            "1 weights for 2 sources",
        ),
        (("verify", toy / "vae", "--processes", 0), "found 0, expected 1 or more"),
        (("stage", toy / "vae", tmp_path / "x", "--threads", 0), "found 0, expected 1 or more"),
        (("stage", toy / "vae", "s3://bucket/prefix"), "found an object store, expected a folder"),
        (("copy", toy / "vae", tmp_path / "x", "--with-source"), "source.json: no such file"),
        (("copy", toy / "vae", toy / "vae/inside"), "lies inside the other"),
        (("convert", toy / "vae", toy), "lies inside the other"),
        (("bench", "--rows", 100), "a multiple of 64 expected"),
        (("bench", "--modes", "nonsense"), "invalid choice"),
        (("nonsense",), "invalid choice"),
        (("gc", toy / "vae", "--older-than", "soon"), "such as 24h"),
        (("repair", tmp_path / "nothing", "--yes"), "no such folder"),
        (("copy", tmp_path / "nothing", tmp_path / "x"), "no such folder"),
        (("copy", toy / "vae", stranger), "another record than that of"),
        (("convert", toy / "vae", tmp_path / "x", "--element", "int8"), "cannot be converted"),
        (("convert", toy / "vae", toy / "text"), "another one"),
        (("stage", tmp_path, tmp_path / "x"), "column.json: no such file"),
        (("diff", toy / "vae", tmp_path / "nothing"), "no such folder"),
        (("verify", "ftp://somewhere/c"), "'ftp'"),
    ):
        result = command(*words)
        assert result.returncode == 2, words
        assert message in result.stderr, words
        assert "Traceback" not in result.stderr
        assert not result.stdout
        assert not (tmp_path / "x").exists()


def test_verify_goes_on_after_what_is_no_column(toy: Path, tmp_path: Path) -> None:
    bad = small_moments(tmp_path / "bad")
    flip(bad / "moments/c/0/0/0/0")
    result = command("verify", toy / "vae", tmp_path / "nothing", bad)
    assert result.returncode == 2
    assert "nothing" in result.stderr
    assert result.stdout.startswith(f"{toy}/vae: sound\n")
    assert "DAMAGED" in result.stdout.splitlines()[-1]


def test_order_of_several_sources(toy: Path, tmp_path: Path) -> None:
    columns = [write_column(tmp_path / "vae", moments_spec(source="b")),
             write_column(tmp_path / "text", tokens_spec(source="b"))]  # fmt: skip
    words = ("order", f"file://{toy}/vae", f"file://{toy}/text", "--more", *columns)
    lines = [
        json.loads(command(*words, "--global-batch", 64, *options).stdout)
        for options in ((), ("--weights", 0.25, 0.75))
    ]
    sources = open_sources([toy / "vae", columns[0]], [toy / "text", columns[1]])
    expected = [sources, JoinedColumns(sources.by_source, [0.25, 0.75])]
    for line, read in zip(lines, expected, strict=True):
        source, rows = read.locate(*read.order()(0, 64)[:2])
        assert (line["sources"], line["rows"]) == (source.tolist(), rows.tolist())
    assert lines[0]["sources"] != lines[1]["sources"]
    assert 40 < sum(lines[1]["sources"]) < 56  # three quarters of 64


def test_verify_of_no_column_is_not_damage(tmp_path: Path) -> None:
    result = a_process("verify", tmp_path / "nowhere")
    assert result.returncode == 2
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr
