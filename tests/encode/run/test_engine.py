"""The parts of the engine: turns, meters, batches, the writing thread, pictures from elsewhere."""

import io
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from encode.config import EncodeConfig
from encode.errors import Aborted, RemoteDecodeFailed
from encode.meter import DECODE, IDLE, READ, WRITE, Meter
from encode.run import encode_shard as engine
from encode.run import remote_decode as remote
from encode.run import signals
from encode.run.encode_shard import encode_shard
from encode.run.prepare import claim_columns
from encode.run.resources import TEXT_BUFFERS, PriorityLock, WorkerResources
from encode.run.writing import Writing
from encode.source import decoding
from encode.source.decoding import View, decoded, spans
from encode.source.tars import scan_tar
from encode.tasks import ShardTask, Target
from shards import ShardWriter, SourceChanged, Status, put_index, read_commit
from shards.column.source import ShardIndex
from tests.encode import faults, light, scarce
from tests.encode.rays import until
from tests.encode.toy import jpeg, sample, tar_bytes, write_source
from tests.forks import fork, wait

# Turns and time -----------------------------------------------------------------------------------


def test_the_shard_that_came_first_gets_the_turn() -> None:
    lock, order = PriorityLock(), []
    held = threading.Event()

    def take(place: int) -> None:
        with lock.held(place):
            order.append(place)
            held.wait()

    threads = [threading.Thread(target=take, args=(place,)) for place in (9, 3, 7, 1)]
    for i, thread in enumerate(threads):
        thread.start()
        until(lambda: (order, len(lock._waiting)) == ([9], i))  # noqa: B023 - called in this turn alone
    held.set()
    for thread in threads:
        thread.join()
    assert order == [9, 1, 3, 7]


def test_every_moment_of_a_worker_is_counted_once() -> None:
    now = [0.0]
    meter = Meter(lambda: now[0])

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    pass_by(1)  # nothing to do
    with meter.shard("first") as first:
        pass_by(2)  # reads
        with first.waiting(DECODE):
            pass_by(3)
            with meter.shard("second") as second:
                pass_by(4)  # the first one is ahead, and waits for pictures
                with second.encodes("vae"):
                    pass_by(5)
                first.done(rows=64)
                with second.waiting(WRITE):
                    pass_by(6)  # the same
        with first.waiting(WRITE):
            pass_by(7)
    pass_by(8)
    stats = meter.stats()
    assert stats.busy == 5
    assert stats.waits == {READ: 2, DECODE: 3 + 4 + 6, WRITE: 7, IDLE: 1 + 8}
    assert stats.busy + sum(stats.waits.values()) == now[0]
    assert stats.rows == {}
    assert stats.beat >= 3


# Batches ------------------------------------------------------------------------------------------


def test_batches_cover_every_row_once_and_no_border() -> None:
    for rows in (0, 1, 63, 64, 1023, 1024, 1025, 2048, 3000):
        batches = spans(rows, 60)
        assert [row for a, b in batches for row in range(a, b)] == list(range(rows))
        assert all(a // 1024 == (b - 1) // 1024 for a, b in batches)


def test_a_picture_is_decoded_once_for_all_its_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [m for n in range(20) for m in sample(n)] + [
        ("x.jpg", b"no picture"),
        ("y.txt", b"y"),
    ]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    rows, _ = scan_tar(tmp_path / "a.tar", 1024)
    count, real = [0], decoding.decode

    def counted(data: bytes) -> Any:
        count[0] += 1
        return real(data)

    monkeypatch.setattr(decoding, "decode", counted)
    views = [View(16, "jpg"), View(32, "jpg")]
    with (
        (tmp_path / "a.tar").open("rb") as tar,
        ThreadPoolExecutor(3) as pool,
        Meter().shard("a") as timer,
    ):
        batches = list(decoded(rows, tar.fileno(), views, 8, pool, timer))
    assert count[0] == 21
    assert [b.span for b in batches] == [(0, 8), (8, 16), (16, 22)]
    assert batches[2].status["jpg"].tolist() == [
        0, 0, 0, 0, Status.IMAGE_UNDECODABLE, Status.IMAGE_MISSING
    ]  # fmt: skip
    assert batches[2].good("jpg").tolist() == [0, 1, 2, 3]
    assert timer.meter.stats().cpu["decode"] > 0
    for view in views:
        from encode.source.images import decode, transform

        image, _ = decode(jpeg(9))
        assert image is not None
        assert np.array_equal(batches[1].images[view][1], transform(image, view.resolution))


# One shard ----------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[EncodeConfig, Any]:
    """A config of quick encoders over three blocks of rows, and what it has to do."""
    monkeypatch.setattr("encode.run.job.load_encoders", light.load_encoders)
    light.write_source(tmp_path / "tars", 1, 2100)
    config = faults.config_of(tmp_path, tmp_path / "cache", executor="inline", batch=64)
    update = {"sources": {"toy": f"{tmp_path}/tars/0.tar"}, "shard_rows": 3072}
    config = config.model_copy(update=update)
    plan = light.prepared(config)
    claim_columns(plan, False)
    return config, plan


def test_a_block_that_cannot_be_written_is_not_followed_by_another(
    job: Any, tmp_path: Path
) -> None:
    """Else the next block would be written in its place, and adopted as sound later on."""
    target = job[1].tasks[0].targets["vae"]
    zeros, status = np.zeros((1024, 2, 4, 4), np.float16), np.zeros(1024, np.uint8)
    with (
        Meter().shard("a") as timer,
        ShardWriter(target.store, target.spec, target.digest, 0, 2048, "index") as writer,
        Writing({"vae": writer}, timer) as writing,
    ):
        freed: list[str] = []
        writing.put("vae", zeros[:, :1], status, lambda: freed.append("first"))
        writing.put("vae", zeros, status, lambda: freed.append("second"))
        with pytest.raises(ValueError, match="shape"):
            writing.finish()
    assert freed == ["first", "second"]
    assert not (tmp_path / "cache/toy/vae/moments/c").exists()


def test_a_disk_error_ends_the_attempt_and_the_next_one_goes_on(job: Any, tmp_path: Path) -> None:
    config, plan = job
    (task,) = plan.tasks
    place = WorkerResources(2)
    blocked = tmp_path / "cache/toy/vae/moments/c/0/0"
    blocked.parent.mkdir(parents=True)
    blocked.write_bytes(b"")  # a file where a folder has to be
    encoders = quick(config)
    with pytest.raises(OSError, match="moments"):
        encode_shard(task, encoders, config.engine, place)
    assert not list((tmp_path / "cache").rglob(".tmp-*"))
    assert place.text_buffers._value == TEXT_BUFFERS
    blocked.unlink()
    result = encode_shard(task, encoders, config.engine, place)
    assert result.rows == 2100
    seconds = read_commit(tmp_path / "cache/toy/vae", 0).provenance["seconds"]
    assert set(seconds) == {"read", "decode", "wait", "vae", "write"}
    assert result.counts["vae"] == {"ok": 2100}
    assert encode_shard(task, encoders, config.engine, place).rows == 0  # committed: not again


def quick(config: EncodeConfig, seconds: float = 0.0) -> dict[str, Any]:
    encoders: dict[str, Any] = light.load_encoders(config.columns, config.engine)
    encoders["vae"]._seconds = seconds
    return encoders


def test_a_shard_is_given_up_between_batches(job: Any, tmp_path: Path) -> None:
    config, plan = job
    place = WorkerResources(1)
    encoders = quick(config)
    rows, sizes = encoders["vae"].rows, list[int]()

    def told_meanwhile(images: Any) -> Any:
        sizes.append(len(images))
        if sum(sizes) > 1024:
            until(lambda: list(tmp_path.glob("cache/toy/vae/moments/**/0")))  # the first block
            place.stop.set()
        return rows(images)

    encoders["vae"].rows = told_meanwhile
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(encode_shard, plan.tasks[0], encoders, config.engine, place)
        with pytest.raises(Aborted):
            running.result()
    assert not list((tmp_path / "cache").rglob(".tmp-*"))
    assert not list(tmp_path.glob("cache/toy/*/commits/*"))


# Pictures from elsewhere --------------------------------------------------------------------------


@pytest.fixture
def shard(tmp_path: Path) -> tuple[ShardTask, ShardIndex, Any]:
    """A task, its index, and the engine's config."""
    write_source(tmp_path, 1, 20)
    path = tmp_path / "0.tar"
    rows, note = scan_tar(path, 1024)
    index = ShardIndex.decode(ShardIndex.encode("f", 0, rows, note), "index")
    targets: dict[str, Target] = {}
    store: Any = None
    task = ShardTask("toy", "f", store, str(path), path.stat().st_size, 0, 1024, targets)
    return task, index, faults.config_of(tmp_path, tmp_path, batch=8).engine


VIEWS = [View(16, "jpg")]


def test_batches_from_elsewhere_are_those_from_here(shard: Any) -> None:
    task, index, config = shard
    far = remote.decode_batches(task, index.digest, VIEWS, config)
    with (
        Path(task.tar).open("rb") as tar,
        ThreadPoolExecutor(1) as pool,
        Meter().shard("a") as timer,
    ):
        near = list(decoded(index.rows, tar.fileno(), VIEWS, 8, pool, timer))
    for batch, other in zip(remote.in_order(far, task, index, 8), near, strict=True):
        assert batch.span == other.span
        assert np.array_equal(batch.status["jpg"], other.status["jpg"])
        assert np.array_equal(batch.images[VIEWS[0]], other.images[VIEWS[0]])
        assert batch.images[VIEWS[0]].flags.writeable


@pytest.mark.parametrize(
    "wrong", [slice(1, None), slice(0, 2), [0, 0, 1, 2], [0, 2, 1], [0, 1, 2, 2]]
)
def test_batches_that_are_not_in_order_are_refused(shard: Any, wrong: Any) -> None:
    task, index, config = shard
    sent = list(remote.decode_batches(task, index.digest, VIEWS, config))
    assert len(sent) == 3
    sent = sent[wrong] if isinstance(wrong, slice) else [sent[i] for i in wrong]
    with pytest.raises(RemoteDecodeFailed, match="came"):
        list(remote.in_order(iter(sent), task, index, 8))


def test_another_tar_elsewhere_is_refused(shard: Any) -> None:
    task, index, config = shard
    path = Path(task.tar)
    path.write_bytes(path.read_bytes().replace(b"number 3 ", b"number 9 "))
    with pytest.raises(RemoteDecodeFailed, match="Both must see the same file"):
        next(remote.decode_batches(task, index.digest, VIEWS, config))


def test_an_index_that_notes_less_is_the_same_reading(shard: Any, tmp_path: Path) -> None:
    """Older programs did not see what is far behind the end of a tar."""
    task, _, config = shard
    path = Path(task.tar)
    path.write_bytes(path.read_bytes() + bytes(1 << 17) + tar_bytes(sample(9)))
    task = replace(task, size=path.stat().st_size)
    rows, note = scan_tar(path, 1024)
    assert note is not None
    index = put_index(tmp_path / "folder", "f", 0, rows, None)
    assert put_index(tmp_path / "folder", "f", 0, rows, note) == index
    assert next(remote.decode_batches(task, index.digest, VIEWS, config)).span == (0, 8)
    with pytest.raises(SourceChanged):
        put_index(tmp_path / "folder", "f", 0, rows[1:], note)


@pytest.mark.parametrize("attempts", [1, 3])
def test_a_shard_without_memory_is_tried_again(tmp_path: Path, attempts: int) -> None:
    """libwebp then says what it says of a broken picture. Too little in one attempt changes nothing;
    in three the shard fails.
    """
    buffer = io.BytesIO()
    Image.new("RGB", (4000, 3000), (9, 8, 7)).save(buffer, "WEBP", method=0)
    members = [("0.jpg", jpeg(0)), ("1.jpg", buffer.getvalue()), ("2.jpg", b"no picture")]
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    config = EncodeConfig.model_validate({
        "root": str(tmp_path / "cache"), "sources": {"toy": str(tmp_path / "0.tar")},
        "columns": {"vae": {"kind": "moments", "encoder": "0", "resolution": 32}},
        "shard_rows": 1024, "engine": {"executor": "inline"},
    })  # fmt: skip

    def work() -> None:
        whole, tried = engine.Shard.encode, []

        def encode(self: Any, *rest: Any) -> None:
            tried.append(self)
            if len(tried) <= attempts:
                scarce.limit(20)
            else:
                scarce.lift()
            whole(self, *rest)

        engine.Shard.encode = encode  # type: ignore[method-assign]  # in this process alone
        sys.exit(light.run(config))

    code, output = wait(fork(work, tmp_path / "output")), (tmp_path / "output").read_text()
    reasons = output.count("toy/00000: MemoryError: a picture of 12,000,000 pixels failed")
    reasons += output.count("toy/00000: MemoryError: the process could not get more memory")
    assert reasons == attempts, output  # where 20 MiB do not do for an allocation before libwebp's
    if attempts == 1:
        assert code == 0, output
        assert "vae: complete, 3 rows: 2 ok, 1 image_undecodable" in output
    else:
        assert code == 3, output
        assert "NOT complete, 1 shard failed" in output
        assert "undecodable" not in output


# Signals ------------------------------------------------------------------------------------------


def test_a_job_of_ray_gives_up_before_it_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray job stop` sends one signal, and kills some seconds later."""
    assert signals.grace() is None
    monkeypatch.setenv(signals.JOB, "{}")
    assert signals.grace() == pytest.approx(signals.STOP_SECONDS - signals.SPARE_SECONDS)
    monkeypatch.setenv(signals.STOP_WAIT, "2")
    times: dict[str, float] = {}
    aborted = threading.Event()

    def abort() -> None:
        times["aborted"] = time.monotonic()
        aborted.set()

    with signals.draining(lambda: times.update(finished=time.monotonic()), abort):
        signal.raise_signal(signal.SIGTERM)
        assert "finished" in times
        assert aborted.wait(60)
    assert times["aborted"] - times["finished"] >= 2 - signals.SPARE_SECONDS
