"""Whether a run goes on Ray, and how a cluster is reached or started.

What is wrong with an address or a folder is said before Ray is asked, which would try again for ten
minutes without saying so.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.column import committed
from shards.console import render

from ..config import EncodeConfig, EngineConfig
from ..errors import NoCluster
from ..plan.sample_source import SourceJob
from .signals import JOB, deferred, undisturbed

ADDRESS = "RAY_ADDRESS"
# Rows that are worth Ray's start. It took 5 s more than beginning in this process (two cores, busy:
# up to 11 s), and a second worker saves 2 ms a picture at best of a VAE that takes 4 ms.
ROWS_SHARED = 2_500  # among several workers
ROWS_ALONE = 100_000  # by one worker: Ray is no faster then, but replaces it where it dies
STORE_BYTES = 128 << 20  # of the object store of a cluster of our own; pictures need more
CONNECT_SECONDS = 10.0  # to reach an address, and for its answer
ANSWER_SECONDS = 40.0  # that Ray has to connect to a cluster, which takes it seconds
SOCKET_BYTES = 107  # of the path of a Unix socket, by Linux's sockaddr_un
# of the longest socket of Ray's, behind the folder for temporary files
SOCKET_NAME = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # of a client of HTTP/2 (RFC 9113, section 3.4)
SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # a frame that changes none; 4 is its kind
TOKEN_LOGGER = "ray._private.authentication.authentication_token_setup"


# Which executor ----------------------------------------------------------------------------------


def decided(config: EncodeConfig, jobs: Sequence[SourceJob], retry: bool) -> EncodeConfig:
    """Returns the config with `ray` or `inline` in place of `auto`, and says which and why."""
    if config.engine.executor != "auto":
        return config
    reason = reason_for_ray(config, jobs, retry)
    if reason:
        text = f"encoding on Ray: {reason} (engine.executor=inline: in this process alone)"
    else:
        text = (
            "encoding in this process: starting Ray would take longer than it saves here "
            "(engine.executor=ray: on Ray all the same)"
        )
    print(render(text), file=sys.stderr, flush=True)
    engine = config.engine.model_copy(update={"executor": "ray" if reason else "inline"})
    return config.model_copy(update={"engine": engine})


def reason_for_ray(config: EncodeConfig, jobs: Sequence[SourceJob], retry: bool) -> str:
    """Returns why a run is better off on Ray; empty: it is not.

    All of it is known before a model is loaded: where the process was started, what the config
    asks for, devices and cores, and what is left to encode.
    """
    engine = config.engine
    if os.environ.get(ADDRESS) or JOB in os.environ:
        return f"{ADDRESS} names a cluster" if os.environ.get(ADDRESS) else "submitted to a cluster"
    if (engine.workers or 1) > 1:
        return f"engine.workers is {engine.workers}"
    if engine.remote_decode:
        return f"engine.remote_decode is {engine.remote_decode:g}"
    if retry:
        return "a shard that failed may end the process that tries it"
    count = 0 if engine.device == "cpu" else gpus()
    if count > 1 and engine.workers is None:
        return f"this machine has {count} GPUs"
    tars, rows = left(config, jobs)
    cores = len(os.sched_getaffinity(0))
    workers = 1 if count or engine.workers else min(cores, tars)
    if rows is None:
        return "the rows of its sources are not known yet"
    if rows < (ROWS_SHARED if workers > 1 else ROWS_ALONE):
        return ""
    if workers > 1:
        return f"about {rows:,} rows in {tars:,} tars are left, and there are {cores} cores"
    return f"about {rows:,} rows are left, and a worker that dies is replaced"


def gpus() -> int:
    """Returns the Nvidia GPUs that this process may use; torch would take seconds to tell."""
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    return min(count, len([word for word in visible.split(",") if word.strip() not in ("", "-1")]))


def left(config: EncodeConfig, jobs: Sequence[SourceJob]) -> tuple[int, int | None]:
    """Returns the tars that lack a commit in some column, and about how many rows they hold; None
    where no tar could be looked into.
    """
    tars, rows, known = 0, 0.0, True
    for job in jobs:
        shards = range(len(job.tars))
        done = [set(committed(job.folder.child(name), len(shards))) for name in config.columns]
        absent = [shard for shard in shards if any(shard not in column for column in done)]
        tars += len(absent)
        if absent and job.row_bytes is None:
            known = False
        elif absent:
            rows += sum(job.source.tars[shard][1] for shard in absent) / (job.row_bytes or 1)
    return tars, round(rows) if known else None


# Starting ----------------------------------------------------------------------------------------


def connect(ray: Any, engine: EngineConfig) -> None:
    """Connects to the cluster of RAY_ADDRESS, or starts one on this machine. Raises NoCluster."""
    address = os.environ.get(ADDRESS, "")  # `ray job submit` sets it
    own = address in ("", "local") and JOB not in os.environ
    options: dict[str, Any] = {}
    if own:
        # of a user's cluster the resources are its own business
        options = {"address": "local", "include_dashboard": False}
        options["object_store_memory"] = STORE_BYTES * (4 if engine.remote_decode else 1)
        # it would warn of the token that it makes for a cluster which ends with this process
        logging.getLogger(TOKEN_LOGGER).setLevel(logging.ERROR)
    try:
        with (
            limited(address if not own else ""),
            deferred(),
        ):  # which restores the handler of SIGTERM, too: Ray replaces it
            ray.init(logging_level="WARNING", **options)
    except Exception as error:  # Ray raises what its parts happen to
        shut_down(ray)
        where = "started on this machine" if own else f"reached at {address or 'its address'}"
        do = (
            "The logs are in `ray/session_latest/logs` of the folder for temporary files; "
            "engine.executor=inline does without Ray"
            if own
            else "Check that the cluster runs Ray of this release, and that RAY_AUTH_TOKEN is its token"
        )
        raise NoCluster(f"Ray cannot be {where}: {error}. {do}") from error
    except BaseException:
        shut_down(ray)
        raise


@contextmanager
def limited(address: str) -> Iterator[None]:
    """Ends the process with NoCluster's exit code where a block takes longer than ANSWER_SECONDS; an
    empty address: nothing is limited.

    Ray tries again for ten minutes in C++ code, which no exception leaves. By then no column has
    been written to, so that the process may end at once.
    """

    def end() -> None:
        print(
            f"NoCluster: what answers at {ADDRESS} = {address} is no Ray cluster, or one that does "
            f"not answer in {ANSWER_SECONDS:g} s. Its address is that of `ray start --head` (HOST:"
            "6379), not that of a node, a dashboard or, without ray://, of a client",
            file=sys.stderr,
            flush=True,
        )
        os._exit(NoCluster.exit_code)

    timer = threading.Timer(ANSWER_SECONDS, end)
    timer.daemon = True
    if address:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def shut_down(ray: Any) -> None:
    """Disconnects from Ray, and ends a cluster of our own.

    It is done here, not at the interpreter's end: where a signal breaks it off, threads of Ray's
    C++ code go on while the interpreter goes, and may abort the process.
    """
    with undisturbed():
        ray.shutdown()


def check_start() -> None:
    """Raises NoCluster where Ray cannot be reached at its address, or has no room for the names of
    its sockets; says that it starts.
    """
    address = os.environ.get(ADDRESS, "")
    if address not in ("", "local"):
        check_address(address)
    elif JOB not in os.environ:
        check_folder()
        text = render("starting Ray on this machine (about 5 s if it is idle)")
        print(text, file=sys.stderr, flush=True)


def check_folder() -> None:
    """Raises NoCluster if the folder for temporary files has too long a name for Ray's sockets."""
    named = [name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)]
    folder = os.environ[named[0]] if named else tempfile.gettempdir()
    most = SOCKET_BYTES - len(SOCKET_NAME)
    if len(os.fsencode(os.path.abspath(folder))) > most:
        raise NoCluster(
            f"Ray cannot start: it puts Unix sockets below {named[0] if named else 'the folder'} = "
            f"{folder}, whose name may have {most} bytes and has {len(os.fsencode(folder))}. Set "
            "RAY_TMPDIR=/tmp, or another short folder on a local disk; or encode without Ray by "
            "engine.executor=inline"
        )


def check_address(address: str) -> None:
    """Raises NoCluster if nothing answers at an address in the way of a cluster, within 20 s."""
    scheme, separator, place = address.partition("://")
    if separator and scheme in ("http", "https"):
        raise NoCluster(
            f"{ADDRESS} is {address}: a dashboard, at which `ray job submit --working-dir . -- "
            "python -m encode run CONFIG` submits a run. For a run that is started here set "
            f"{ADDRESS} to the cluster itself (HOST:6379), or unset it to use this machine"
        )
    if address == "auto" or (separator and scheme != "ray"):  # Ray alone knows what is meant
        return
    host, _, port = (place if separator else address).rpartition(":")
    advice = (
        f"Set {ADDRESS} to HOST:PORT of a cluster that runs (`ray start --head` prints it), or "
        "unset it to use this machine"
    )
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise NoCluster(f"{ADDRESS} is {address}, expected HOST:PORT. {advice}")
    try:
        answer = first_answer(host.strip("[]"), int(port))
    except OSError as error:
        cause = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise NoCluster(f"no Ray cluster can be reached at {address}: {cause}. {advice}") from error
    if answer is not None and answer[3:4] != SETTINGS[3:4]:
        what = "a web server" if answer.startswith((b"HTTP/", b"<")) else "another server"
        what = what if answer else "a server that hangs up"
        raise NoCluster(f"at {address} is {what}, no Ray cluster. {advice}")


def first_answer(host: str, port: int) -> bytes | None:
    """Returns the first bytes that a server says to a client of gRPC, whose server begins with a
    frame of settings; None where it speaks TLS. Raises OSError.
    """
    with socket.create_connection((host, port), CONNECT_SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return None
        connection.sendall(PREFACE + SETTINGS)
        answer = b""
        while len(answer) < len(SETTINGS) and (part := connection.recv(64)):
            answer += part
        return answer
