"""Which executor `auto` is, and what is said where Ray cannot be reached or started; Ctrl-C while it starts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from encode.config import EncodeConfig
from encode.errors import NoCluster
from encode.plan.sample_source import open_job
from encode.run import ray_start
from encode.run.job import run
from tests.encode import interrupts
from tests.encode.rays import ROOT
from tests.encode.toy import write_config, write_source
from tests.servers.ports import free_port

SILENCE = 0.5  # seconds that a silent server is waited for here


@contextmanager
def answering(answer: bytes | None) -> Iterator[int]:
    """A server's port; it answers each connection so and hangs up, or never says a word (None)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                    if answer is not None:
                        with kept[-1] as connection:
                            connection.recv(1)
                            connection.sendall(answer)
                            connection.shutdown(socket.SHUT_WR)
                            connection.recv(100)
                except OSError:
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in kept:
                connection.close()


def refusal(address: str) -> str:
    with pytest.raises(NoCluster) as caught:
        ray_start.check_address(address)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_an_address_that_is_no_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_start, "CONNECT_SECONDS", SILENCE)
    closed = free_port()
    assert f"127.0.0.1:{closed}: Connection refused" in refusal(f"127.0.0.1:{closed}")
    assert "Connection refused" in refusal(f"ray://127.0.0.1:{closed}")
    with answering(None) as silent:
        assert f"127.0.0.1:{silent}: no answer" in refusal(f"127.0.0.1:{silent}")
    with answering(b"") as closing:
        assert "is a server that hangs up, no Ray cluster" in refusal(f"127.0.0.1:{closing}")
    with answering(b"SSH-2.0-OpenSSH_9.6\r\n") as other:
        assert "is another server, no Ray cluster" in refusal(f"127.0.0.1:{other}")
    assert "expected HOST:PORT" in refusal("127.0.0.1")
    assert "expected HOST:PORT" in refusal("127.0.0.1:99999")
    assert "no.such.host.invalid:6379: " in refusal("no.such.host.invalid:6379")
    assert "a dashboard, at which `ray job submit" in refusal("http://127.0.0.1:8265")


def test_a_web_server() -> None:
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert "is a web server, no Ray cluster" in refusal(f"127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


LIMITED = """
from encode.__main__ import main
from encode.run import ray_start
from shards import exits
ray_start.ANSWER_SECONDS = 3
exits.run(main)
"""


def test_another_server_of_grpc(tmp_path: Path, models: Path) -> None:
    """Ray alone can tell it from a cluster, and would try again for minutes."""
    import grpc

    tars = write_source(tmp_path / "tars", 1, 3)
    config = write_config(tmp_path / "c.yaml", tmp_path / "cache", tars, models, executor="ray")
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    try:
        ray_start.check_address(f"127.0.0.1:{port}")
        env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": f"127.0.0.1:{port}"}
        ended = subprocess.run(
            [sys.executable, "-c", LIMITED, "run", str(config)], cwd=ROOT, timeout=240, text=True,
            capture_output=True, env=env,
        )  # fmt: skip
    finally:
        server.stop(None).wait()
    assert ended.returncode == 2, ended.stderr
    assert f"RAY_ADDRESS = 127.0.0.1:{port} is no Ray cluster" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "cache").exists()


def command(config: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`encode run`, which is to end soon: Ray by itself would try for longer."""
    here = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, "-m", "encode", "run", str(config)], cwd=ROOT, timeout=240, text=True,
        capture_output=True, env={**here, "PYTHONPATH": str(ROOT), **env},
    )  # fmt: skip


def test_the_command_ends_with_the_cause(tmp_path: Path, models: Path) -> None:
    tars = write_source(tmp_path / "tars", 1, 3)
    config = write_config(
        tmp_path / "c.yaml", tmp_path / "cache", tars, models, executor="ray", workers=1
    )
    address = f"127.0.0.1:{free_port()}"
    ended = command(config, RAY_ADDRESS=address)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"NoCluster: no Ray cluster can be reached at {address}: Connection re" in ended.stderr
    assert "Traceback" not in ended.stderr
    folder = tmp_path / ("a" * 60)
    folder.mkdir()
    ended = command(config, TMPDIR=str(folder))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"TMPDIR = {folder}, whose name may have 39 bytes" in ended.stderr
    assert "Set RAY_TMPDIR=/tmp" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "cache").exists()


def test_the_longest_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name as long as Ray's own check of its sockets takes, and a byte more."""
    from ray._private import utils

    most = ray_start.SOCKET_BYTES - len(ray_start.SOCKET_NAME)
    for length in (most, most + 1):
        folder = "/" + "a" * (length - 1)
        monkeypatch.setenv("RAY_TMPDIR", folder)
        if length == most:
            utils.validate_socket_filepath(folder + ray_start.SOCKET_NAME)
            ray_start.check_folder()
        else:
            with pytest.raises(OSError, match="cannot exceed"):
                utils.validate_socket_filepath(folder + ray_start.SOCKET_NAME)
            with pytest.raises(NoCluster):
                ray_start.check_folder()


# Which executor ----------------------------------------------------------------------------------


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a source of 4 tars of 10 rows, on a machine with two cores and nothing else."""
    write_source(tmp_path / "tars", 4, 10)
    for name in (ray_start.ADDRESS, ray_start.JOB):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray_start, "gpus", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    return tmp_path


def config_at(folder: Path, tars: str = "{0..3}", **engine: Any) -> EncodeConfig:
    return EncodeConfig.model_validate({
        "root": str(folder / "cache"), "sources": {"toy": f"{folder}/tars/{tars}.tar"},
        "columns": {"vae": {"kind": "moments", "encoder": "0", "resolution": 32}},
        "shard_rows": 1024, "engine": {"batch": 8, **engine},
    })  # fmt: skip


def reason(folder: Path, retry: bool = False, tars: str = "{0..3}", **engine: Any) -> str:
    config = config_at(folder, tars, **engine)
    return ray_start.reason_for_ray(config, [open_job(config, "toy")], retry)


def test_auto_by_what_is_asked_for(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_at(at).engine.executor == "auto"
    assert reason(at) == ""
    assert reason(at, workers=1) == ""
    assert reason(at, workers=2) == "engine.workers is 2"
    assert reason(at, remote_decode=0.5) == "engine.remote_decode is 0.5"
    assert "may end the process" in reason(at, retry=True)
    monkeypatch.setattr(ray_start, "gpus", lambda: 2)
    assert reason(at) == "this machine has 2 GPUs"
    assert reason(at, device="cpu") == reason(at, workers=1) == ""
    monkeypatch.setenv(ray_start.JOB, "{}")
    assert reason(at) == "submitted to a cluster"
    monkeypatch.setenv(ray_start.ADDRESS, "127.0.0.1:6379")
    assert reason(at) == "RAY_ADDRESS names a cluster"


def test_auto_by_what_is_left(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are told by the bytes of the tars that are left; all tars here have as many."""
    config = config_at(at)
    assert ray_start.left(config, [open_job(config, "toy")]) == (4, 40)
    monkeypatch.setattr(ray_start, "ROWS_SHARED", 40)
    monkeypatch.setattr(ray_start, "ROWS_ALONE", 50)
    assert reason(at) == "about 40 rows in 4 tars are left, and there are 2 cores"
    assert reason(at, workers=1) == reason(at, tars="{0..0}") == ""
    monkeypatch.setattr(ray_start, "ROWS_ALONE", 40)
    assert reason(at, workers=1) == "about 40 rows are left, and a worker that dies is replaced"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(ray_start, "ROWS_ALONE", 50)
    assert reason(at) == ""


def test_auto_by_what_is_committed(
    tmp_path: Path,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run of a part of the source leaves the rest; the choice is said, and how to make the other."""
    import configs

    for name in (ray_start.ADDRESS, ray_start.JOB):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray_start, "gpus", lambda: 0)
    tars = write_source(tmp_path / "tars", 2, 5)
    path = write_config(tmp_path / "c.yaml", tmp_path / "cache", tars, models, executor="auto")
    config = configs.load(EncodeConfig, path)
    assert ray_start.left(config, [open_job(config, "toy")]) == (2, 10)
    assert run(config) == 0
    said = capsys.readouterr().err
    assert "encoding in this process" in said
    assert "engine.executor=ray" in said
    assert ray_start.left(config, [open_job(config, "toy")]) == (0, 0)
    monkeypatch.setattr(ray_start, "reason_for_ray", lambda *_: "it is asked for")
    decided = ray_start.decided(config, [], False)
    assert decided.engine.executor == "ray"
    assert "on Ray: it is asked for (engine.executor=inline" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 2), ("1", 1), ("", 0), ("-1", 0), ("0,1,2", 2)]
)
def test_gpus(visible: str | None, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["nvidia0", "nvidia1"]
    monkeypatch.setattr(Path, "glob", lambda _, pattern: iter(map(Path, names)))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert ray_start.gpus() == count


# Ctrl-C ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "first"), [("starting Ray", 0.5), ("starting Ray", 4.0)])
def test_two_signals_while_ray_starts(word: str, first: float) -> None:
    """The second one comes while Ray is shut down, or just before: the interpreter must not end with
    Ray half-way.
    """
    code, output = interrupts.interrupted(first, [0.8], word)
    assert code == 128 + signal.SIGINT, output
    assert "Traceback" not in output
    assert "Token authentication" not in output
