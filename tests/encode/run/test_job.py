"""`encode run` as a process: statuses, resuming, refusals, deaths and signals."""

import io
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
import zarr
from numpy.typing import NDArray
from PIL import Image

from encode.__main__ import main
from encode.models.vae import Vae
from encode.run.job import record_failures
from encode.run.supervisor import is_final
from encode.tasks import ShardTask, Target
from shards import (
    Column,
    CorruptColumn,
    IncompleteColumn,
    ShardWriter,
    create_column,
    exits,
    open_store,
    put_complete,
    read_commit,
    read_index,
)
from shards.column.commits import read_failures
from shards.column.lease import Lease
from shards.errors import LeaseHeld, StoreError
from shards.tools.gc import collect
from shards.tools.repair import repair
from shards.tools.verify import logical_digest, verify
from tests.commands.lines import next_lines
from tests.encode.toy import files_of, jpeg, sample, tar_bytes, write_config, write_source
from tests.forks import await_stop, fork, stop_after, wait
from tests.seccomp import no_atomic_names, no_links
from tests.shards.toy import moments_spec

ROOT = Path(__file__).parents[3]
Encode = Callable[..., tuple[int, str]]


def start(
    output: Path, *words: object, command: str = "run", before: Callable[[], None] = lambda: None
) -> int:
    """`python -m encode run ...` in a forked process, which does `before` first; its pid."""

    def work() -> None:
        before()
        sys.argv = ["encode", command, *map(str, words)]
        exits.run(main)

    return fork(work, output)


@pytest.fixture
def encode(tmp_path: Path) -> Encode:
    """Run it to the end: exit code and output."""

    def run(*words: object, command: str = "run") -> tuple[int, str]:
        code = wait(start(tmp_path / "output", *words, command=command))
        return code, (tmp_path / "output").read_text()

    return run


@pytest.fixture
def config(tmp_path: Path, models: Path) -> Path:
    """Six sound tars of nine samples."""
    tars = write_source(tmp_path / "tars", 6, 9)
    return write_config(tmp_path / "toy.yaml", tmp_path / "cache", tars, models)


def stored_status(path: Path) -> NDArray[np.uint8]:
    """As zarr-python alone reads it."""
    group: Any = zarr.open(str(path), mode="r")
    status: NDArray[np.uint8] = group["status"][:]
    return status


def digests(root: Path) -> list[str]:
    return [logical_digest(root / "toy" / name) for name in ("vae", "text")]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, models: Path) -> list[str]:
    """Digests of the columns of `config`, made in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    tars = write_source(folder / "tars", 6, 9)
    path = write_config(folder / "toy.yaml", folder / "cache", tars, models)
    assert wait(start(folder / "output", path)) == 0, (folder / "output").read_text()
    return digests(folder / "cache")


def test_every_row_ends_as_ok_or_with_a_reason(
    tmp_path: Path, models: Path, encode: Encode
) -> None:
    """A source with everything that may be wrong with a sample."""
    odd: dict[str, list[tuple[str, bytes]]] = {
        "sound": sample(0),
        "broken picture": [("1.jpg", b"\xff\xd8 no jpeg"), ("1.txt", b"one")],
        "no caption": [("2.jpg", jpeg(2))],
        "no picture": [("3.txt", b"three")],
        "half a picture": [("4.jpg", jpeg(4)[:-150]), ("4.txt", b"four")],
        "no UTF-8": [("5.jpg", jpeg(5)), ("5.txt", b"caf\xe9")],
        "empty caption": [("6.jpg", jpeg(6)), ("6.txt", b" \n")],
        "huge caption": [("7.jpg", jpeg(7)), ("7.txt", b"x" * (1 << 20) + b"y")],
        "cut off": [("8.jpg", jpeg(8)), ("8.txt", b"eight"), ("9.jpg", bytes(3000))],
    }
    whole = tar_bytes(m for members in odd.values() for m in members)
    (tmp_path / "odd.tar").write_bytes(whole[: whole.rindex(b"eight") + 1000])
    pattern = [str(tmp_path / "odd.tar"), write_source(tmp_path, 1, 3)]
    path = write_config(tmp_path / "c.yaml", tmp_path / "cache", pattern, models)
    code, output = encode(path)
    assert code == 0, output
    assert "toy/00000: cut off at byte" in output
    assert (
        "vae: complete, 12 rows: 9 ok, 1 truncated, 1 image_undecodable, 1 image_missing" in output
    )
    assert "text: complete, 12 rows: 9 ok, 1 caption_missing, 2 caption_undecodable" in output

    vae, text = tmp_path / "cache/toy/vae", tmp_path / "cache/toy/text"
    index = read_index(tmp_path / "cache/toy", 0)
    assert [row.key for row in index.rows] == ["0000", *"12345678"]
    assert index.note is not None
    status = stored_status(vae)
    assert status[:9].tolist() == [0, 2, 0, 3, 1, 0, 0, 0, 0]
    assert (status[9:1024] == 255).all()
    assert status[1024:1028].tolist() == [0, 0, 0, 255]
    status = stored_status(text)
    assert status[:10].tolist() == [0, 0, 4, 0, 0, 5, 0, 5, 0, 255]
    column = Column.open(text)
    lengths = column.lengths(np.arange(9)).tolist()
    assert lengths == [24, 4, 0, 6, 5, 0, 1, 0, 6]  # <bos> and a token a letter; at most 24
    np.testing.assert_array_equal(column.read(np.array([6])), column.empty())
    assert verify(vae) == verify(text) == []
    for store in (vae, text):  # a commit says what its encoder ran on
        record = read_commit(store, 0).provenance
        assert record["device"] == platform.machine()
        assert record["torch_threads"] == 1
    report = json.loads((tmp_path / "cache/report.json").read_bytes())[str(vae.resolve())]
    assert report["rows"] == 12
    assert report["counts"]["ok"] == 9
    assert report["bytes"] > 12 * 32 * 16 * 2


def test_a_second_run_does_nothing(config: Path, encode: Encode) -> None:
    assert encode(config)[0] == 0
    cache = config.parent / "cache"
    before = {name: (cache / name).stat().st_mtime_ns for name in files_of(cache)}
    code, output = encode(config)
    assert code == 0
    assert "every shard is committed already" in output
    words = f"--latents {cache}/toy/vae --text {cache}/toy/text"
    assert next_lines(output) == [f"next: python -m train init {words}"]
    assert "┃" not in output  # lines alone: the tables were shown by the run that made the columns
    assert output.count("complete, 54 rows: 54 ok") == 2
    code, output = encode(config, command="status")
    assert (code, next_lines(output)) == (0, [f"next: python -m train init {words}"])
    before.pop("report.json")
    assert all((cache / name).stat().st_mtime_ns == at for name, at in before.items())
    assert before.keys() | {"report.json"} == files_of(cache).keys()


@torch.no_grad()
def test_cached_moments_equal_online_encoding(config: Path, encode: Encode, models: Path) -> None:
    """Picture -> PIL and torchvision -> diffusers, one by one in fp32, against the column's float16."""
    from diffusers import AutoencoderKL
    from torchvision import transforms

    assert encode(config)[0] == 0
    column = Column.open(config.parent / "cache/toy/vae")
    rows = np.array([1024 * shard + row for shard in range(6) for row in range(9)])
    cached = torch.from_numpy(column.read(rows, check=True)).float()
    reference = transforms.Compose([
        transforms.Resize(32, interpolation=transforms.InterpolationMode.BILINEAR),
        transforms.CenterCrop(32), transforms.ToTensor(), transforms.Normalize([0.5], [0.5]),
    ])  # fmt: skip
    vae = AutoencoderKL.from_pretrained(models / "kl").eval()
    online = []
    for row in rows.tolist():
        image = Image.open(io.BytesIO(jpeg(row // 1024 * 100 + row % 1024))).convert("RGB")
        online.append(vae.encode(reference(image)[None]).latent_dist.parameters)
    # Half a unit in the last of 11 bits, and what batching does to fp32.
    torch.testing.assert_close(cached, torch.cat(online), rtol=2**-11, atol=2e-5)
    assert (cached[0] - cached[1]).abs().max() > 0.01  # the pictures differ, so the rows do


def test_columns_added_later_and_other_batches_agree(
    config: Path, encode: Encode, tmp_path: Path, models: Path, undisturbed: list[str]
) -> None:
    text = config.read_text()
    config.write_text(re.sub(r"  text:\n(    .*\n)+", "", text))
    assert "text" not in config.read_text()
    assert encode(config, "engine.threads=1")[0] == 0
    config.write_text(text)
    assert encode(config)[0] == 0
    assert digests(tmp_path / "cache") == undisturbed


# ---- bad input --------------------------------------------------------------------------------


def refused(encode: Encode, cache: Path, *words: object) -> str:
    """Exit code 2, one readable message, and nothing on disk is another than before."""
    before = files_of(cache)
    code, output = encode(*words)
    assert code == 2, output
    assert "Traceback" not in output
    after = files_of(cache)
    assert before.items() <= after.items()
    assert not [name for name in after if ".tmp-" in name]
    return output


def test_another_vae_into_an_existing_column(config: Path, encode: Encode, models: Path) -> None:
    assert encode(config)[0] == 0
    cache = config.parent / "cache"
    before = files_of(cache)
    output = refused(encode, cache, config, f"columns.vae.encoder.path={models / 'other-kl'}")
    assert (
        f"identity.encoder.path: found '{models / 'kl'}', expected '{models / 'other-kl'}'"
        in output
    )
    assert "identity.encoder.weights: found" in output
    assert "Nothing was changed. Encode into another folder" in output
    for word, field in (
        ("columns.vae.resolution=64", "identity.preprocess.resolution: found 32, expected 64"),
        ("columns.vae.encoder.precision=bf16-autocast", "identity.encoder.precision"),
        ("columns.text.max_tokens=20", "identity.preprocess.max_tokens: found 24, expected 20"),
        ("columns.text.template='a {}'", "identity.preprocess.template"),
        ("columns.text.caption=short.txt", "'short.txt', in 6 of 6 tars that were looked at"),
        ("shard_rows=2048", "shard_rows: found 1024, expected 2048"),
    ):
        assert field in refused(encode, cache, config, word)
    assert files_of(cache) == before


def test_a_refused_run_does_not_claim_its_new_columns(
    config: Path, encode: Encode, models: Path
) -> None:
    """Also not those that come before the one that is refused."""
    assert encode(config)[0] == 0
    cache = config.parent / "cache"
    before = files_of(cache)
    settings = yaml.safe_load(config.read_text())
    columns = settings["columns"]
    settings["columns"] = {"new": columns["vae"], **columns}
    settings["columns"]["text"] = columns["text"] | {"max_tokens": 20}
    other = config.with_name("other.yaml")
    other.write_text(yaml.safe_dump(settings, sort_keys=False))
    assert "identity.preprocess.max_tokens" in refused(encode, cache, other)
    assert files_of(cache) == before


def test_the_same_model_in_another_place(config: Path, encode: Encode, models: Path) -> None:
    assert encode(config)[0] == 0
    moved = shutil.copytree(models / "kl", config.parent / "moved")
    output = refused(encode, config.parent / "cache", config, f"columns.vae.encoder.path={moved}")
    assert f"identity.encoder.path: found '{models / 'kl'}', expected '{moved}'" in output
    assert "The weights are the same: name their place as it was named first" in output


def test_the_report_keeps_columns_of_earlier_runs(config: Path, encode: Encode) -> None:
    settings = yaml.safe_load(config.read_text())
    for name in ("vae", "text"):
        part = config.with_name(f"{name}.yaml")
        part.write_text(yaml.safe_dump(settings | {"columns": {name: settings["columns"][name]}}))
        assert encode(part)[0] == 0
    report = json.loads((config.parent / "cache/report.json").read_text())
    assert {Path(path).name for path in report} == {"vae", "text"}


def test_another_source_under_the_same_name(config: Path, encode: Encode) -> None:
    assert encode(config)[0] == 0
    cache, tar = config.parent / "cache", config.parent / "tars/5.tar"
    before = files_of(cache)
    output = refused(encode, cache, config, f"sources.toy={config.parent}/tars/{{0..4}}.tar")
    assert "source.json: the source recorded here is another one" in output
    tar.write_bytes(tar.read_bytes() + bytes(512))
    assert "New or changed tars are a new source" in refused(encode, cache, config)
    assert files_of(cache) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["engine.bacth=3"], "engine.bacth: unknown key; did you mean batch?"),
        (["columns.vae.kind=latent"], "columns.vae"),
        (["columns.vae.kind=latents"], "AutoencoderKL has a posterior. Say kind: moments"),
        (["engine.remote_decode=2"], "engine.remote_decode"),
        (["columns.vae.resolution=-1"], "columns.vae"),
        (["columns.vae.encoder=fluxs"], "'fluxs': no such name; did you mean flux? Known are"),
        (["columns.vae.encoder.path=/no/such/vae"], "/no/such/vae: no such folder"),
        (["columns.vae.encoder.class=GemmaModel"], "no class 'GemmaModel'"),
        (["columns.text.template=caption"], "must hold {}"),
        (["sources.toy=/no/such/{0..3}.tar"], "4 of 4 tars are not there"),
        (["shard_rows=1000"], "shard_rows: found 1000"),
        (["root"], "expected KEY=VALUE"),
        (["root=/dev/null/cache"], "Something else is where a file or folder is needed"),
        (["columns.google/gemma={kind: ids, encoder: gemma-2-2b}"], "Call it gemma"),
        (["sources={../x: /no/such.tar}"], "sources: found the name '../x': it has a slash"),
        (["sources={index: /no/such.tar}"], "Call it index-1"),
        (["sources={TOY: /no/such.tar}"], "'toy' and 'TOY' differ in capitals alone"),
    ],
)
def test_what_a_config_can_get_wrong(
    config: Path, encode: Encode, words: list[str], message: str
) -> None:
    assert message in refused(encode, config.parent / "cache", config, *words)
    assert not list(config.parent.glob("cache/toy/*/c"))


def test_no_such_config(tmp_path: Path, encode: Encode) -> None:
    output = refused(encode, tmp_path / "cache", tmp_path / "none.yaml")
    assert "none.yaml, expected a YAML file" in output


def test_what_is_no_tar_fails_alone(config: Path, encode: Encode, undisturbed: list[str]) -> None:
    tar, cache = config.parent / "tars/2.tar", config.parent / "cache"
    sound = tar.read_bytes()
    tar.write_bytes(b"<html>Too many requests</html>".ljust(len(sound)))
    code, output = encode(config)
    assert code == 3
    assert re.search(r"FAILED toy/00002 \(.*/tars/2.tar\): BadTar: .* not a tar", output)
    assert "vae: NOT complete, 1 shard failed" in output
    assert "Traceback" not in output
    for name in ("vae", "text"):
        done = sorted(p.stem for p in (cache / "toy" / name / "commits").iterdir())
        assert done == ["00000", "00001", "00003", "00004", "00005"]
        record = json.loads((cache / "toy" / name / "failures/00002.json").read_bytes())
        assert "not a tar" in record["reason"]
        assert verify(cache / "toy" / name) == []

    before = (cache / "toy/vae/failures/00002.json").stat().st_mtime_ns
    code, output = encode(config)  # it is not tried again by itself
    assert code == 3
    assert "1 shard failed in an earlier run; `python -m encode retry-failed" in output
    assert (cache / "toy/vae/failures/00002.json").stat().st_mtime_ns == before

    code, output = encode(
        config, "--allow-failed", "engine.batch=8"
    )  # complete without it, if told so
    assert code == 3
    assert "vae: complete, 45 rows: 45 ok" in output
    column = Column.open(cache / "toy/vae")
    assert column.snapshot.rows == (9, 9, 0, 9, 9, 9)
    assert not column.valid_mask()[2 * 32 : 3 * 32].any()

    code, output = encode(config, command="retry-failed")  # as bad as before
    assert code == 3
    tar.write_bytes(sound)  # fetched again: the same name and size
    code, output = encode(config, command="retry-failed")
    assert code == 0, output
    assert digests(cache) == undisturbed
    code, output = encode(config, command="retry-failed")
    assert (code, "no shard has failed" in output) == (0, True)
    assert encode(config)[0] == 0


def test_retry_failed_leaves_the_rest_alone(config: Path, encode: Encode) -> None:
    """Of a column that is not finished, only what has failed is tried."""
    tar, cache = config.parent / "tars/2.tar", config.parent / "cache"
    sound = tar.read_bytes()
    tar.write_bytes(b"<html>Too many requests</html>".ljust(len(sound)))
    assert encode(config)[0] == 3
    for name in ("vae", "text"):
        (cache / "toy" / name / "commits/00004.json").unlink()  # as if it had not been reached
    tar.write_bytes(sound)
    code, output = encode(config, command="retry-failed")
    assert code == 0, output
    assert "NOT complete, 0 shards failed, 1 not encoded yet" in output
    assert sorted(p.stem for p in (cache / "toy/vae/commits").iterdir()) == [
        "00000", "00001", "00002", "00003", "00005"
    ]  # fmt: skip


def test_a_tar_that_changed_between_two_columns(config: Path, encode: Encode) -> None:
    assert encode(config)[0] == 0
    tar = config.parent / "tars/1.tar"
    data = tar.read_bytes()
    tar.write_bytes(data.replace(b"picture number 101 ", b"picture number 999 "))
    later = config.read_text().replace("  vae:", "  later:")
    config.write_text(later)
    code, output = encode(config)
    assert code == 3
    assert "FAILED toy/00001" in output
    assert "SourceChanged" in output


# ---- deaths -----------------------------------------------------------------------------------


def litter(cache: Path) -> list[Path]:
    return list(cache.rglob(".tmp-*"))


def stopped_at_a_commit(commits: Path, output: Path, *words: object) -> int:
    """The same, in progress: stopped (SIGSTOP) as there is a first commit in a folder."""

    def before() -> None:
        stop_after(ShardWriter, "commit", lambda: commits.is_dir() and any(commits.iterdir()))

    pid = start(output, *words, before=before)
    await_stop(pid, output)
    return pid


def count(folder: Path) -> int:
    """Files that are whole."""
    names = (name for _, _, names in os.walk(folder) for name in names)
    return sum(not name.startswith(".tmp-") for name in names)


def test_sigkill_at_random_moments_then_rerun(
    config: Path, encode: Encode, tmp_path: Path, undisturbed: list[str]
) -> None:
    """Each run starts where the last was killed; in the end the digests are those of one quiet run."""
    assert encode(config, f"root={tmp_path / 'whole'}")[0] == 0
    total, cache = count(tmp_path / "whole"), tmp_path / "cache"
    chance, kills = random.Random(0), 0
    for attempt in range(6):
        existing = min(count(cache), total)  # the leases of a killed run come on top
        bound = chance.randrange(existing, total + 1)  # files, so that it bites on any machine

        def stopping() -> None:
            stop_after(os, "link", lambda: count(cache) >= bound)  # noqa: B023 - called in this turn

        pid = start(tmp_path / "output", config, before=stopping)
        if os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1]):  # else it came to its end
            if attempt % 2:  # not just where a name has appeared
                os.kill(pid, signal.SIGCONT)
                time.sleep(chance.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
            kills += wait(pid) == -signal.SIGKILL
        if attempt % 3 == 2:  # from the beginning again
            assert encode(config)[0] == 0
            assert digests(tmp_path / "cache") == undisturbed
            assert verify(tmp_path / "cache/toy/vae") == verify(tmp_path / "cache/toy/text") == []
            (tmp_path / "cache").rename(tmp_path / f"cache-{attempt}")
    assert kills >= 3


def test_a_signal_drains(
    config: Path, encode: Encode, tmp_path: Path, undisturbed: list[str]
) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        root = tmp_path / f"cache-{number}"
        commits = root / "toy/text/commits"
        pid = stopped_at_a_commit(commits, tmp_path / "output", config, f"root={root}")
        os.kill(pid, number)
        os.kill(pid, signal.SIGCONT)
        code, output = wait(pid), (tmp_path / "output").read_text()
        assert code == 128 + number, output
        assert f"{number.name}: finishing what is in flight" in output
        assert f"stopped by {number.name}; run it again to go on" in output
        assert "Traceback" not in output
        done = {p.stem for p in commits.iterdir()}
        assert 1 <= len(done) <= 4  # the one seen, two in flight, and one more for a late look
        assert done == {p.stem for p in (root / "toy/vae/commits").iterdir()}
        assert not litter(root)
        assert encode(config, f"root={root}")[0] == 0
        assert digests(root) == undisturbed


def test_a_second_signal_stops_at_once(tmp_path: Path, models: Path) -> None:
    """In the middle of a shard, which is then not committed: a large one, so that its end is far away."""
    tars = write_source(tmp_path / "tars", 2, 1000)
    config = write_config(tmp_path / "c.yaml", tmp_path / "cache", tars, models, batch=1)

    def slow() -> None:
        rows = Vae.rows
        Vae.rows = lambda self, images: time.sleep(0.1) or rows(self, images)  # type: ignore[func-returns-value, method-assign]

    pid = start(tmp_path / "output", config, before=slow)
    while not (tmp_path / "cache/toy/index/00000.jsonl").exists():
        time.sleep(0.002)
    os.kill(pid, signal.SIGTERM)
    while "finishing what is in flight" not in (tmp_path / "output").read_text():
        time.sleep(0.002)
    os.kill(pid, signal.SIGTERM)
    code, output = wait(pid), (tmp_path / "output").read_text()
    assert code == 143, output
    assert "giving up what is in flight" in output
    assert "Traceback" not in output
    assert not litter(tmp_path / "cache")
    assert not list((tmp_path / "cache/toy").glob("*/commits/*"))


def test_a_full_disk_ends_the_run(config: Path, encode: Encode, tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the error is the job's, not of each shard."""

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        sys.argv = ["encode", "run", str(config)]
        exits.run(main)

    code = wait(fork(work, tmp_path / "output"))
    output = (tmp_path / "output").read_text()
    assert code == 2, output
    assert "cannot go on: [Errno 27] File too large" in output
    assert "Traceback" not in output
    assert not litter(tmp_path / "cache")
    assert encode(config)[0] == 0


def test_what_may_pass_is_tried_again() -> None:
    assert not is_final(StoreError("s3://b/x: reading failed after 240 s"))
    assert not is_final(IncompleteColumn("values: no object. Run encode again"))
    assert is_final(CorruptColumn("damaged"))


def test_two_runs_at_once(config: Path, tmp_path: Path, undisturbed: list[str]) -> None:
    """They share the work: each commits what the other has not, and adopts the rest."""
    words = "engine.cooperate=true", "engine.batch=2"
    pids = [start(tmp_path / f"output-{i}", config, *words) for i in range(2)]
    codes = [wait(pid) for pid in pids]
    assert codes == [0, 0], (tmp_path / "output-0").read_text() + (
        tmp_path / "output-1"
    ).read_text()
    assert digests(tmp_path / "cache") == undisturbed
    assert not litter(tmp_path / "cache")


def test_a_column_that_another_command_holds(
    config: Path, encode: Encode, undisturbed: list[str]
) -> None:
    column = config.parent / "cache/toy/vae"
    with Lease(column, "shards repair"):
        code, output = encode(config)
        assert code == 5
        assert "held by `shards repair` (pid " in output
        assert not (column / "column.json").exists()
        assert list(files_of(config.parent / "cache")) == ["toy/vae/lease.json"]
        assert encode(config, "--break-lease")[0] == 0
    assert digests(config.parent / "cache") == undisturbed


def test_repair_and_gc_keep_away_from_a_run(tmp_path: Path, models: Path) -> None:
    tars = write_source(tmp_path / "tars", 3, 90)
    config = write_config(tmp_path / "c.yaml", tmp_path / "cache", tars, models, batch=1)
    column = tmp_path / "cache/toy/vae"
    pid = stopped_at_a_commit(column / "commits", tmp_path / "output", config)
    for attempt in (lambda: repair(column, yes=True), lambda: collect(column, yes=True)):
        with pytest.raises(LeaseHeld, match="held by `encode run`"):
            attempt()
    os.kill(pid, signal.SIGCONT)
    assert wait(pid) == 0, (tmp_path / "output").read_text()
    assert not list(tmp_path.glob("cache/toy/*/lease*"))
    collect(column, yes=True)


def test_a_run_whose_column_is_taken_away_drains(
    tmp_path: Path, models: Path, encode: Encode
) -> None:
    tars = write_source(tmp_path / "tars", 8, 40)
    config = write_config(tmp_path / "c.yaml", tmp_path / "cache", tars, models, batch=1, look=0.05)
    column = tmp_path / "cache/toy/vae"
    pid = stopped_at_a_commit(column / "commits", tmp_path / "output", config)
    with Lease(column, "shards repair", force=True):
        os.kill(pid, signal.SIGCONT)
        code, output = wait(pid), (tmp_path / "output").read_text()
        assert code == 5, output
        assert "was taken away or expired; it stopped" in output
        assert len(list(column.glob("commits/*.json"))) < 8
    assert encode(config)[0] == 0


def test_storage_options_change_no_value(
    tmp_path: Path, models: Path, undisturbed: list[str]
) -> None:
    tars = write_source(tmp_path / "tars", 6, 9)
    path = write_config(tmp_path / "toy.yaml", tmp_path / "cache", tars, models)
    config = yaml.safe_load(path.read_text())
    config["columns"]["vae"]["backend"] = "webdataset"
    config["columns"]["text"]["codec"] = "blosc"
    config["columns"]["small"] = {**config["columns"]["text"], "element": "int8", "codec": None}
    path.write_text(yaml.safe_dump(config))
    assert wait(start(tmp_path / "output", path)) == 0, (tmp_path / "output").read_text()
    assert digests(tmp_path / "cache") == undisturbed
    small, text = (Column.open(tmp_path / "cache/toy" / name) for name in ("small", "text"))
    rows = np.arange(9)
    exact, lossy = (
        torch.from_numpy(c.decoded(c.read(rows, check=True))).view(torch.bfloat16).float()
        for c in (text, small)
    )
    error = float((lossy - exact).norm() / exact.norm())
    assert 0 < error < 0.01
    assert small.spec.quantisation is not None
    assert small.spec.quantisation["relative_error"] == pytest.approx(error, rel=0.2)
    assert small.layout.unit_bytes == text.layout.unit_bytes // 2 + 4
    assert verify(tmp_path / "cache/toy/small") == []
    commit = tmp_path / "cache/toy/small/commits/00003.json"
    whole = commit.read_bytes()
    commit.unlink()  # the scales that stand are used again, not measured anew
    assert wait(start(tmp_path / "output", path)) == 0, (tmp_path / "output").read_text()
    assert json.loads(commit.read_bytes())["content"] == json.loads(whole)["content"]


def test_an_index_of_a_newer_release_ends_the_run(
    tmp_path: Path, models: Path, encode: Encode
) -> None:
    """It is no fault of the shard: no failure is recorded, and nothing is committed."""
    tars = write_source(tmp_path / "data", 1, 3)
    config = write_config(tmp_path / "toy.yaml", tmp_path / "cache", tars, models)
    assert encode(config, "columns.text=null")[0] == 0
    source = tmp_path / "cache/toy"
    index = source / "index/00000.jsonl"
    index.write_bytes(index.read_bytes().replace(b'"version":1', b'"version":2', 1))
    shutil.rmtree(source / "vae")
    code, output = encode(config, "columns.text=null")
    assert (code, "version 2" in output) == (2, True)
    assert not list(source.glob("vae/failures/*"))
    assert not list(source.glob("vae/commits/*"))


@pytest.mark.parametrize("atomic", [True, False])
def test_a_file_system_without_hard_links(tmp_path: Path, models: Path, atomic: bool) -> None:
    """A run works where a rename can be told not to replace, and is refused in a sentence where none can."""
    tars = write_source(tmp_path / "data", 1, 3)
    config = write_config(tmp_path / "toy.yaml", tmp_path / "cache", tars, models)

    def work() -> None:
        (no_links if atomic else no_atomic_names)()
        sys.argv = ["encode", "run", str(config), "columns.text=null"]
        exits.run(main)

    code, output = wait(fork(work, tmp_path / "output")), (tmp_path / "output").read_text()
    if atomic:
        assert code == 0, output
        assert verify(tmp_path / "cache/toy/vae") == []
    else:
        assert (code, "neither hard links" in output, "Make room" in output) == (2, True, False)
        assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_member_named_with_escape_sequences(tmp_path: Path, models: Path, encode: Encode) -> None:
    """The index keeps the name as it is; a terminal and a log get it written out."""
    name = "zz\x1b]0;title\x07\x1b[31m[bold]evil\n.jpg"
    data = tar_bytes([*sample(0), (name, jpeg(7) * 9)])
    (tmp_path / "0.tar").write_bytes(data[: data.rindex(b"evil") + 1500])
    config = write_config(
        tmp_path / "toy.yaml", tmp_path / "cache", str(tmp_path / "0.tar"), models
    )
    code, output = encode(config, "columns.text=null")
    assert code == 0, output
    assert "\x1b" not in output
    assert r"inside zz\x1b]0;title\x07\x1b[31m[bold]evil\n.jpg; 1 row kept" in output
    assert name in str(read_index(tmp_path / "cache/toy", 0).note)


def test_a_password_in_a_url_is_neither_printed_nor_recorded(
    tmp_path: Path, models: Path, encode: Encode
) -> None:
    for url in (
        "https://me:SECRET@127.0.0.1:9/a.tar",
        "https://127.0.0.1:9/a.tar?X-Amz-Signature=SECRET",
    ):
        config = write_config(tmp_path / "toy.yaml", tmp_path / "cache", url, models)
        code, output = encode(config)
        assert (code, "SECRET" in output) == (2, False)
        assert encode(config, "root=s3://me:SECRET@b/c")[0] == 2
        assert "SECRET" not in (tmp_path / "output").read_text()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("size", [1, 4_000, 4_001, 70_000, 1_000_000])
def test_a_reason_of_any_length_is_written_and_read(tmp_path: Path, size: int) -> None:
    """Its beginning and its end are kept."""
    store, spec = open_store(tmp_path / "s/c"), moments_spec(1)
    digest = create_column(store, spec)
    target = Target(store, digest, spec)
    tar = ShardTask("s", "f", store.parent, "0.tar", 1, 0, spec.layout.shard_rows, {"c": target})
    why = ("first " + "x" * size)[: size - 5] + " last" if size > 20 else "x" * size
    record_failures([(tar, why)])
    (reason,) = read_failures(store).values()
    assert (reason[:6], reason[-5:]) == (why[:6], why[-5:])
    assert len(reason) <= 4_100
    assert (reason == why) == (size <= 4_000)
    assert put_complete(store, digest, 1, allow_failed=True).failed == ((0, reason),)
