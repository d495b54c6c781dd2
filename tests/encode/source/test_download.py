"""`encode download` as a command, against a local server that speaks the hub's protocol."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

from encode.__main__ import main
from encode.source.download import brace_patterns
from encode.source.hub import PartFile, natural
from encode.source.places import expand
from encode.source.tars import make_source
from shards import exits
from shards.errors import NoRoom
from tests.commands.lines import next_lines
from tests.encode.rays import until
from tests.encode.web import Web
from tests.forks import fork, wait
from tests.soak.sweep import limit

ROOT = Path(__file__).parents[3]
COMMIT = "c0ffee" + "0" * 34
NAMES = [f"sa_{i:06d}.tar" for i in range(4)] + [f"webdataset_JDB_{i}.tar" for i in range(8, 11)]
FILES = {name: random.Random(name).randbytes(50_000 + 1000 * i) for i, name in enumerate(NAMES)}
LARGE = random.Random(0).randbytes(1 << 20) * 33  # bytes; the hub's library writes 10 MB at a time


class Hub(Web):
    """One data set. Listings come in pages of three; files are redirected to another path, as to a
    CDN. `gate` names what a request for the data set is answered with, and the hub's word for it.
    """

    def __init__(self, files: dict[str, bytes], repository: str) -> None:
        super().__init__()
        self.repository, self.gate = repository, (0, "")
        self.told = {name: len(data) for name, data in files.items()}  # sizes that it lists
        self.hub_files = files
        for name, data in files.items():
            self.files[f"/cdn/{hashlib.sha256(name.encode()).hexdigest()}"] = data

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        url = urlsplit(request.path)
        path = unquote(url.path)
        api, resolve = f"/api/datasets/{self.repository}/", f"/datasets/{self.repository}/resolve/"
        if not path.startswith(("/api/", "/datasets/")):
            return super().answer(request)
        self.seen.append((request.command, path, request.headers.get("Range", "")))
        self.tokens.append(request.headers.get("Authorization"))
        if self.gate[0]:
            return self.json(request, {"error": "no"}, self.gate[0], {"X-Error-Code": self.gate[1]})
        if path == f"{api}revision/v1":
            return self.json(request, {"id": self.repository, "sha": COMMIT})
        if path == f"{api}tree/{COMMIT}":
            return self.tree(request, int(parse_qs(url.query).get("cursor", ["0"])[0]))
        name = path.removeprefix(f"{resolve}{COMMIT}/")
        if path.startswith(resolve) and name in self.hub_files:
            data = self.hub_files[name]
            headers = {
                "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(data)), "ETag": '"pointer"',
                "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "Location": f"{self.url}/cdn/{hashlib.sha256(name.encode()).hexdigest()}",
            }  # fmt: skip
            return self.send(request, 302, headers, b"")
        code = "RevisionNotFound" if self.repository in path else "RepoNotFound"
        return self.json(request, {"error": "no"}, 404, {"X-Error-Code": code})

    def tree(self, request: BaseHTTPRequestHandler, at: int) -> None:
        names = [*self.hub_files]
        entries: list[dict[str, Any]] = [
            {"type": "file", "oid": "0" * 40, "path": name, "size": self.told[name],
             "lfs": {"oid": hashlib.sha256(self.hub_files[name]).hexdigest(), "size": self.told[name],
                     "pointerSize": 134}}
            for name in names[at : at + 3]
        ]  # fmt: skip
        link = f'<{self.url}{request.path.partition("?")[0]}?recursive=True&cursor={at + 3}>; rel="next"'
        if at == 0:
            entries += [
                {"type": "file", "oid": "0" * 40, "path": "README.md", "size": 10},
                {"type": "directory", "oid": "0" * 40, "path": "folder"},
            ]
        self.json(request, entries, 200, {"Link": link} if at + 3 < len(names) else {})

    def json(
        self, request: BaseHTTPRequestHandler, what: Any, status: int = 200, more: Any = None
    ) -> None:
        headers = {"Content-Type": "application/json", **(more or {})}
        self.send(request, status, headers, json.dumps(what).encode())


HOST = """
import json, os, sys
import huggingface_hub.hf_api, huggingface_hub.file_download
import encode.source.download
from shards import exits
from encode.__main__ import main
sys.argv[1:] = ["download"]
for line in sys.stdin:  # imports take seconds, so each command is a fork of this process
    asked = json.loads(line)
    if "wait" in asked:
        print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        output = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(asked["environment"])
        sys.argv = ["encode", "download", *asked["words"]]
        try:
            exits.run(main)
        except SystemExit as stop:
            sys.stdout.flush()
            os._exit(stop.code)  # taking a large process down takes seconds
"""
QUIET = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[..., int]]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    with subprocess.Popen(
        [sys.executable, "-c", HOST], cwd=ROOT, env={**environment, **QUIET}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as host:  # fmt: skip
        assert host.stdin is not None
        assert host.stdout is not None

        def ask(**what: Any) -> int:
            print(json.dumps(what), file=host.stdin, flush=True)
            return int(host.stdout.readline())  # type: ignore[union-attr]

        yield ask
        host.stdin.close()


class Command:
    """`encode download` against a hub, started or run to its end."""

    def __init__(self, ask: Callable[..., int], folder: Path) -> None:
        self.ask, self.output = ask, folder / "output"

    def start(self, hub: Hub, *words: object, **environment: str) -> int:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(self.output.parent), **environment}
        options = [*map(str, words), "--revision", "v1"] if "--revision" not in words else words
        return self.ask(
            words=[*map(str, options)], environment=environment, output=str(self.output)
        )

    def run(self, hub: Hub, *words: object, **environment: str) -> tuple[int, str]:
        code = self.ask(wait=self.start(hub, *words, **environment))
        return code, self.output.read_text()


@pytest.fixture
def command(ask: Callable[..., int], tmp_path: Path) -> Command:
    return Command(ask, tmp_path)


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(FILES, "BLIP3o/BLIP3o-Pretrain-Long-Caption")
    yield hub
    hub.close()


def there(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_it_comes_once_and_is_ready_for_a_config(
    hub: Hub, command: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "long"
    code, output = command.run(hub, "blip3o-long", folder, "--sha256", HF_TOKEN="hf_secret")
    assert code == 0, output
    assert there(folder) == FILES
    assert "at c0ffee000000: 7 files of 371.00 kB; 7 files, 371.00 kB, to download;" in output
    assert "secret" not in output
    config = yaml.safe_load(output[output.index("sources:") : output.index("next:")])
    assert config == {
        "sources": {
            "blip3o-long": [
                f"{folder}/sa_{{000000..000003}}.tar", f"{folder}/webdataset_JDB_{{8..9}}.tar",
                f"{folder}/webdataset_JDB_10.tar",
            ]
        }
    }  # fmt: skip
    source, _ = make_source("s", config["sources"]["blip3o-long"], 1024)
    assert source.tars == tuple((name, len(FILES[name])) for name in NAMES)
    sent = {
        (path.split("/")[1], token)
        for (_, path, _), token in zip(hub.seen, hub.tokens, strict=True)
    }
    assert ("api", "Bearer hf_secret") in sent
    assert ("datasets", "Bearer hf_secret") in sent

    hub.seen.clear()
    code, output = command.run(hub, "blip3o-long", folder)
    assert code == 0
    assert "0 files, 0 bytes, to download" in output
    assert not any(part for _, _, part in hub.seen)  # not one byte again
    (folder / NAMES[1]).write_bytes(FILES[NAMES[1]][:-1] + b"?")  # of the right size
    (folder / NAMES[2]).write_bytes(b"of another size")
    assert command.run(hub, "blip3o-long", folder)[0] == 0
    code, output = command.run(hub, "blip3o-long", folder, "--sha256")
    assert code == 2
    assert f"HubError: {folder}/{NAMES[1]}: found sha256 " in output
    code, output = command.run(hub, "blip3o-long", folder, "--sha256")
    assert (code, there(folder)) == (0, FILES)


def test_some_files_and_folders(hub: Hub, command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "some"
    code, output = command.run(hub, "blip3o-long", folder, "--files", "sa_*", "--threads", 1)
    assert code == 0, output
    assert sorted(there(folder)) == NAMES[:4]
    code, output = command.run(hub, "blip3o-long", folder, "--files", "*.zip")
    assert code == 2
    assert "none of its 8 files matches '*.zip'; there are README.md, sa_000000.tar" in output
    nested = Hub({f"{d}/{i}.tar": b"1" * i for d in "ab" for i in (1, 2)}, "me/mine")
    try:
        code, output = command.run(
            nested, "me/mine", folder, "--endpoint", nested.url, HF_ENDPOINT=""
        )
    finally:
        nested.close()
    assert code == 0, output
    assert yaml.safe_load(output[output.index("sources:") : output.index("next:")]) == {
        "sources": {f"mine-{d}": [f"{folder}/{d}/{{1..2}}.tar"] for d in "ab"}
    }
    sources = " ".join(f"'mine-{d}={folder}/{d}/{{1..2}}.tar'" for d in "ab")
    words = f"--sources {sources} --vae flux --text gemma-2b    # or models of your own"
    assert next_lines(output) == [f"next: python -m encode init {words}"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_it_goes_on(command: Command, tmp_path: Path, how: signal.Signals) -> None:
    """From the byte where it stopped; the half that was sent is not asked for again."""
    hub = Hub({"0.tar": LARGE}, "me/mine")
    hub.fault = lambda method, path, part: "pause" if method == "GET" else None
    folder = tmp_path / "folder"
    try:
        pid = command.start(hub, "me/mine", folder)
        until(lambda: sum(p.stat().st_size for p in folder.glob(".0*.part")) >= 10_000_000)
        os.kill(pid, how)
        code = command.ask(wait=pid)
        hub.over.set()  # what paused ends
        assert code == (-how if how == signal.SIGKILL else 128 + how), command.output.read_text()
        assert [path.name[-5:] for path in folder.iterdir()] == [".part"]
        hub.fault = lambda method, path, part: None
        hub.seen.clear()
        code, output = command.run(hub, "me/mine", folder)
        assert code == 0, output
        assert there(folder) == {"0.tar": LARGE}
        (part,) = (part for method, path, part in hub.seen if method == "GET" and "/cdn/" in path)
        assert int(part.removeprefix("bytes=").rstrip("-")) >= 10_000_000
    finally:
        hub.close()


@pytest.mark.parametrize("fault", ["500", "cut", "close", "whole"])
def test_a_hub_that_fails_and_then_works(
    hub: Hub, command: Command, tmp_path: Path, fault: str
) -> None:
    """Each file breaks off once; "whole": and the rest comes from its first byte on."""
    paths: set[str] = set()

    def once(method: str, path: str, part: str) -> str | None:
        if not path.startswith("/cdn/") or method == "HEAD":
            return None
        first = path not in paths
        paths.add(path)
        return ("cut" if fault == "whole" else fault) if first else fault if part else None

    hub.fault = (
        once if fault == "whole" else lambda m, p, r: once(m, p, r) if p not in paths else None
    )
    code, output = command.run(hub, "blip3o-long", tmp_path / "long", "--sha256")
    assert code == 0, output
    assert there(tmp_path / "long") == FILES
    assert len(paths) == len(FILES)


def test_names_that_climb_out_of_the_folder_are_refused(command: Command, tmp_path: Path) -> None:
    hub = Hub({"ok.tar": b"1", "a/../../b.tar": b"2"}, "me/mine")
    try:
        code, output = command.run(hub, "me/mine", tmp_path / "folder")
    finally:
        hub.close()
    assert code == 2
    assert "found the file 'a/../../b.tar'" in output
    assert not (tmp_path / "folder").exists()


def test_two_commands_do_not_write_into_one_file(command: Command, tmp_path: Path) -> None:
    hub = Hub({"0.tar": LARGE}, "me/mine")
    hub.fault = lambda method, path, part: "pause" if method == "GET" else None
    folder = tmp_path / "folder"
    try:
        pid = command.start(hub, "me/mine", folder)
        until(lambda: any(path.stat().st_size for path in folder.glob(".0.tar.*.part")))
        code, output = command.run(hub, "me/mine", folder)
        os.kill(pid, signal.SIGKILL)
        command.ask(wait=pid)
        assert code == 2
        assert "another process downloads this file" in output
    finally:
        hub.close()


def test_parts_that_nobody_goes_on_with_leave_their_room(
    hub: Hub, command: Command, tmp_path: Path
) -> None:
    """Before it is counted: of an earlier boot or version, not of other files, nor in use."""
    hub.told[NAMES[0]] = 1 << 60
    digest = hashlib.sha256(FILES[NAMES[1]]).hexdigest()[:24]
    stale = [f".{NAMES[1]}.{digest}-0b5e55ed.part", f".{NAMES[2]}.{'0' * 24}-0b5e55ed.part"]
    others = [f".other.tar.{digest}-0b5e55ed.part", f".{NAMES[1]}.part", f".{NAMES[1]}.old-1.part"]
    locked = f".{NAMES[3]}.{digest}-0b5e55ed.part"
    for name in (*stale, *others, locked):
        (tmp_path / name).write_bytes(bytes(1000))
    with (tmp_path / locked).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, output = command.run(hub, "blip3o-long", tmp_path)
    assert code == 2
    assert "NoRoom: " in output
    assert {path.name for path in tmp_path.iterdir()} == {*others, locked, "output"}


@pytest.mark.parametrize("cause", ["a signal", "another file"])
def test_digests_of_large_files_are_given_up(
    hub: Hub, command: Command, tmp_path: Path, cause: str
) -> None:
    """A file that would take an hour to read does not keep the command from ending."""
    hub.told[NAMES[0]] = 1 << 42
    with (tmp_path / NAMES[0]).open("wb") as file:
        file.truncate(1 << 42)
    if cause == "another file":
        (tmp_path / NAMES[1]).write_bytes(bytes(len(FILES[NAMES[1]])))
    pid = command.start(hub, "blip3o-long", tmp_path, "--sha256")
    if cause == "a signal":
        until(lambda: all((tmp_path / name).exists() for name in NAMES[1:]))
        os.kill(pid, signal.SIGTERM)
    try:
        with limit(60):
            code = command.ask(wait=pid)
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)
        raise
    assert code == (143 if cause == "a signal" else 2)
    assert ("found sha256" in command.output.read_text()) == (cause == "another file")
    assert (tmp_path / NAMES[0]).exists()  # nothing is known against it


def test_a_full_disk_is_named() -> None:
    with pytest.raises(NoRoom, match="No space left.*Make room"), PartFile(
        Path("/dev/full"), 1 << 20, threading.Event(), lambda count: None
    ) as file:  # fmt: skip
        file.write(bytes(1 << 20))


def failing(hub: Hub, why: str) -> Sequence[str]:
    """Make the hub fail in some way; words for the command."""
    if why == "listed size":
        hub.told[NAMES[2]] += 1
    elif why == "gone":
        hub.close()
    elif why == "404":
        return ["me/nothing"]
    elif why == "500":
        hub.gate = (500, "")
    elif why == "gated":
        hub.gate = (401, "GatedRepo")
    elif why == "gated 403":
        hub.gate = (403, "GatedRepo")
    elif why == "revision":
        return ["blip3o-long", "--revision", "v2"]
    elif why == "name":
        return ["no-such-set"]
    elif why == "room":
        hub.told[NAMES[0]] = 1 << 60
    return ["blip3o-long"]


@pytest.mark.parametrize(
    ("why", "message"),
    [
        ("listed size", f"BadTar: .*{NAMES[2]}: found 52000 bytes, .* 52001"),
        ("gone", "HubError: http://127.0.0.1:.* cannot be reached"),
        ("500", "HubError: .* cannot be reached, or refuses .*500"),
        ("404", "HubError: me/nothing: no such data set at http"),
        ("revision", "HubError: BLIP3o/.*: no revision 'v2'"),
        ("gated", "HubError: BLIP3o/.*: gated. Accept its terms at http.*set HF_TOKEN"),
        ("gated 403", "HubError: BLIP3o/.*: gated"),
        ("name", "HubError: 'no-such-set' is no data set: expected OWNER/NAME or one of blip3o-long"),
        ("room", "NoRoom: .* to download, .* free. Make room"),
    ],
)  # fmt: skip
def test_what_goes_wrong_has_a_name(
    hub: Hub, command: Command, tmp_path: Path, why: str, message: str
) -> None:
    first, *options = failing(hub, why)
    code, output = command.run(hub, first, tmp_path / "folder", *options)
    assert code == 2, output
    assert "Traceback" not in output
    assert re.search(message, output), output


def test_offline_is_respected(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the environment of `make test`."""
    words = ["download", "blip3o-long", str(tmp_path / "folder"), "--endpoint", hub.url]
    monkeypatch.setattr(sys, "argv", ["encode", *words])
    assert wait(fork(lambda: exits.run(main), tmp_path / "log")) == 2
    output = (tmp_path / "log").read_text()
    assert output == "HubError: HF_HUB_OFFLINE is set: unset it to download\n"
    assert hub.seen == []


def test_patterns_expand_to_what_they_name() -> None:
    long = [f"sa_{i:06d}.tar" for i in range(1000)] + [
        f"webdataset_JDB_{i}.tar" for i in range(1, 100)
    ]
    long += [f"webdataset_shard_{i:03d}.tar" for i in range(1598)]
    assert sorted(long, key=natural) == long
    patterns = brace_patterns(long)
    assert patterns == [
        "sa_{000000..000999}.tar", "webdataset_JDB_{1..9}.tar", "webdataset_JDB_{10..99}.tar",
        "webdataset_shard_{000..999}.tar", "webdataset_shard_{1000..1597}.tar",
    ]  # fmt: skip
    assert expand(patterns) == long
    chance = random.Random(0)
    for _ in range(500):
        names = {
            chance.choice(["a", "b7_", ""]) + str(chance.randint(0, 12)).zfill(chance.randint(0, 3))
            + chance.choice([".tar", "x.tar", ""])
            for _ in range(chance.randint(1, 12))
        }  # fmt: skip
        places = sorted(names, key=natural)
        assert expand(brace_patterns(places)) == places
