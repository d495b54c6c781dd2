"""Prompts fetched from a real web server on loopback that knows ranges, breaks off and serves wrong bytes."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import random
import resource
import signal
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

import eval.prompts.fetch as fetching
from eval.commands import main
from eval.errors import BadPrompts, NotFetched
from eval.prompts.benchmarks import BENCHMARKS, find
from eval.prompts.fetch import download, fetch
from eval.prompts.published import Source, coco_captions, draw, texts_of
from tests.encode.web import Web, serving

PROMPTS = json.dumps({f"{i:05d}": "x" * 900 for i in range(400)}).encode()  # some chunks
SHA = hashlib.sha256(PROMPTS).hexdigest()


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(fetching, "PAUSE", 0.01)
    with serving(**{"p.json": PROMPTS, "other.json": b"[]"}) as web:
        yield web


def entry(monkeypatch: pytest.MonkeyPatch, *sources: Source, prompts: int | None = 400) -> None:
    """A benchmark added by one entry."""
    added = replace(BENCHMARKS["genaibench"], sources=sources, prompts=prompts)
    monkeypatch.setitem(BENCHMARKS, "mine", added)


def test_fetched_once_then_checked(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    web.moved["/moved/p.json"] = f"{web.url}/p.json"  # as the hub leads to its store
    entry(
        monkeypatch,
        Source("p.json", f"{web.url}/moved/p.json", SHA, terms="CC0"),
        Source("o.json", f"{web.url}/other.json"),
    )
    monkeypatch.chdir(tmp_path)
    assert main(["prompts", "fetch", "mine"]) == 0
    message = capsys.readouterr().out
    assert (
        f"prompts/mine/p.json: {len(PROMPTS):,} bytes, sha256 {SHA} (as expected). Terms: CC0"
        in message
    )
    assert "trusted, as none is published; written down in prompts/mine/fetched.json" in message
    assert (tmp_path / "prompts/mine/p.json").read_bytes() == PROMPTS
    assert {path.name for path in (tmp_path / "prompts/mine").iterdir()} == {
        "p.json",
        "o.json",
        "fetched.json",
    }
    assert len(find("mine").items) == 400  # found without a path
    web.seen.clear()
    assert main(["prompts", "fetch", "mine"]) == 0
    assert web.seen == []
    assert capsys.readouterr().out.count("there already") == 2
    main(["prompts", "list"])
    assert f"prompts/mine/p.json, sha256 {SHA[:12]}" in capsys.readouterr().out
    main(["prompts", "show", "--benchmark", "mine"])
    assert "prompts     400\n" in capsys.readouterr().out


def test_what_breaks_off_goes_on(web: Web, tmp_path: Path) -> None:
    web.fault = lambda method, path, part: "cut" if len(web.seen) <= 4 else None
    progress: list[tuple[int, int | None]] = []
    downloaded = download(
        f"{web.url}/p.json", tmp_path / "p.json", lambda here, size: progress.append((here, size))
    )
    assert downloaded.read_bytes() == PROMPTS
    assert progress[-1] == (len(PROMPTS), len(PROMPTS))
    ranges = [int(part.removeprefix("bytes=").rstrip("-")) for _, _, part in web.seen if part]
    assert ranges == sorted(ranges)
    assert ranges[-1] > len(PROMPTS) / 2  # what had come was not asked for again


def test_goes_on_in_another_run(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry(monkeypatch, Source("p.json", f"{web.url}/p.json"))
    web.fault = lambda method, path, part: "cut" if not part and len(web.seen) == 1 else "503"
    with pytest.raises(NotFetched, match=r"did not come \(HTTP status 503\).*run again to go on"):
        fetch("mine", tmp_path)
    assert [path.suffix for path in (tmp_path / "mine").iterdir()] == [".part"]
    web.fault = lambda method, path, part: None
    web.seen.clear()
    fetch("mine", tmp_path)
    assert [part for _, _, part in web.seen if part] == [f"bytes={len(PROMPTS) // 2}-"]
    assert (tmp_path / "mine" / "p.json").read_bytes() == PROMPTS


@pytest.mark.parametrize("fault", ["whole", "changed"])
def test_a_server_without_ranges_or_with_another_version(
    fault: str, web: Web, tmp_path: Path
) -> None:
    """What came before is not glued to what it does not belong to."""
    path = tmp_path / "p.json"
    web.fault = lambda method, path, part: "cut" if len(web.seen) == 1 else "404"
    with pytest.raises(NotFetched, match="HTTP status 404"):
        download(f"{web.url}/p.json", path, lambda *_: None)
    if fault == "changed":
        web.files["/p.json"] = PROMPTS[::-1]
    web.fault = lambda method, path, part: fault if part else None
    downloaded = download(f"{web.url}/p.json", path, lambda *_: None)
    assert downloaded.read_bytes() == web.files["/p.json"]


def test_wrong_digests_are_refused_and_nothing_is_left(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry(monkeypatch, Source("p.json", f"{web.url}/p.json", "0" * 64))
    for _ in range(2):
        with pytest.raises(
            NotFetched, match=f"found sha256 {SHA}, expected 0{{64}}, which this program knows"
        ):
            fetch("mine", tmp_path)
        assert list((tmp_path / "mine").iterdir()) == []
    entry(monkeypatch, Source("p.json", f"{web.url}/p.json"))
    fetch("mine", tmp_path)
    path = tmp_path / "mine" / "p.json"
    path.write_text('{"1": "mine"}')
    with pytest.raises(NotFetched, match="changed. Move it away"):
        fetch("mine", tmp_path)
    assert path.read_text() == '{"1": "mine"}'
    path.unlink()
    web.files["/p.json"] = PROMPTS.replace(b"x", b"y")  # the publisher changed it
    with pytest.raises(NotFetched, match=r"fetched\.json has from the first time"):
        fetch("mine", tmp_path)
    assert not path.exists()
    web.files["/p.json"] = PROMPTS
    fetch("mine", tmp_path)
    assert path.read_bytes() == PROMPTS


def test_a_full_disk_is_no_matter_of_the_network(web: Web, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(NotFetched, match=r"cannot be written to \(File too large\); see --to"):
            download(f"{web.url}/p.json", tmp_path / "p.json", lambda *_: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(web.seen) == 1


def test_what_holds_no_prompts_is_refused(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry(monkeypatch, Source("p.json", f"{web.url}/p.json"), prompts=1600)
    with pytest.raises(NotFetched, match="found 400 prompts, expected the 1600 of mine"):
        fetch("mine", tmp_path)
    web.files["/p.json"] = b"<html>please log in</html>"
    with pytest.raises(BadPrompts, match="found lines of text"):
        fetch("mine", tmp_path)
    assert list((tmp_path / "mine").iterdir()) == []
    with pytest.raises(BadPrompts, match="nothing to fetch"):
        fetch("prompts", tmp_path)
    (tmp_path / "mine" / "fetched.json").write_text("[]")
    with pytest.raises(NotFetched, match=r"fetched\.json: damaged"):
        fetch("mine", tmp_path)


class Archives(Web):
    """Sends in chunks and without a size, as GitHub sends archives; breaks off in the middle `breaks` times."""

    breaks = 0

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        data = self.files[request.path]
        self.seen.append((request.command, request.path, request.headers.get("Range", "")))
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        for at in range(0, len(data), 50_000):
            if self.breaks and at > len(data) // 2:
                self.breaks, request.close_connection = self.breaks - 1, True
                return
            piece = data[at : at + 50_000]
            request.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        request.wfile.write(b"0\r\n\r\n")


def test_a_server_that_says_no_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "PAUSE", 0.01)
    web = Archives()
    try:
        web.files["/a.tar.gz"], web.breaks = PROMPTS, 2
        downloaded = download(f"{web.url}/a.tar.gz", tmp_path / "a", lambda *_: None)
        assert downloaded.read_bytes() == PROMPTS
        assert [part for _, _, part in web.seen] == ["", "", ""]  # each time from the start
        web.breaks = 99
        with pytest.raises(NotFetched, match="did not come .IncompleteRead"):
            download(f"{web.url}/a.tar.gz", tmp_path / "b", lambda *_: None)
    finally:
        web.close()


def test_two_that_fetch_one_file(web: Web, tmp_path: Path) -> None:
    """The second is told; the first is not disturbed."""
    begun, go_on = threading.Event(), threading.Event()

    def show(here: int, size: int | None) -> None:
        begun.set()
        go_on.wait(20)

    downloaded: list[Path] = []
    first = threading.Thread(
        target=lambda: downloaded.append(download(f"{web.url}/p.json", tmp_path / "p.json", show))
    )
    first.start()
    assert begun.wait(20)
    with pytest.raises(NotFetched, match="another process fetches this file"):
        download(f"{web.url}/p.json", tmp_path / "p.json", lambda *_: None)
    go_on.set()
    first.join(20)
    assert downloaded[0].read_bytes() == PROMPTS


# Files that are made of archives ------------------------------------------------------------------


def tar_of(files: dict[str, str]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return data.getvalue()


def test_dpg_prompts_of_the_repository(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.files["/ELLA.tar.gz"] = tar_of(
        {
            "ELLA-3c/README.md": "no", "ELLA-3c/dpg_bench/prompts/partiprompts97.txt": "ein Faultier\n",
            "ELLA-3c/dpg_bench/prompts/0.txt": "eight cabbages", "ELLA-3c/dpg_bench/dpg_bench.csv": "no",
            "ELLA-3c/dpg_bench/prompts/deep/1.txt": "no", "ELLA-3c/prompts/2.txt": "no",
        }
    )  # fmt: skip
    source = Source("prompts.json", f"{web.url}/ELLA.tar.gz", make=texts_of("dpg_bench/prompts"))
    monkeypatch.setitem(
        BENCHMARKS, "dpgbench", replace(BENCHMARKS["dpgbench"], sources=(source,), prompts=2)
    )
    fetch("dpgbench", tmp_path)
    items = find("dpgbench", folder=tmp_path).items
    assert [(prompt.id, prompt.text) for prompt in items] == [
        ("0", "eight cabbages"),
        ("partiprompts97", "ein Faultier"),
    ]
    assert {path.name for path in (tmp_path / "dpgbench").iterdir()} == {
        "prompts.json",
        "fetched.json",
    }
    folder = tmp_path / "official"
    folder.mkdir()
    (folder / "partiprompts97.txt").write_text("ein Faultier\n")
    (folder / "0.txt").write_text("eight cabbages")
    assert find("dpgbench", folder).digest == find("dpgbench", folder=tmp_path).digest


def test_coco_captions_are_drawn_alike_everywhere(tmp_path: Path) -> None:
    rng = random.Random(0)
    captions = [
        {"image_id": image, "id": number, "caption": f" Caption, {number}\n"}
        for number, image in enumerate(sorted(rng.randrange(50) for _ in range(250)))
    ]
    lots = {c["id"]: hashlib.sha256(f"coco30k {c['id']}".encode()).hexdigest() for c in captions}
    images = {caption["image_id"] for caption in captions}
    each = {
        min((c["id"] for c in captions if c["image_id"] == i), key=lots.__getitem__) for i in images
    }
    expected = sorted(sorted(each, key=lots.__getitem__)[:30])
    shuffled = rng.sample(captions, len(captions))
    assert [c["id"] for c in draw(shuffled, 30)] == expected
    archive = tmp_path / "annotations.zip"
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("annotations/captions_val2014.json", json.dumps({"annotations": shuffled}))
    captions_csv = coco_captions(archive)
    rows = list(csv.DictReader(io.StringIO(captions_csv.decode())))
    assert 40 < len(rows) == len(images)
    assert [int(row["id"]) for row in rows] == sorted(each)
    assert rows[0]["caption"] == f"Caption, {rows[0]['id']}"
    path = tmp_path / "captions.csv"
    path.write_bytes(captions_csv)
    assert [prompt.id for prompt in find("coco30k", path).items] == [row["id"] for row in rows]


@pytest.mark.parametrize(
    "data",
    [b"no archive", gzip.compress(b"no tar"), tar_of({"a/p/1.txt": "x" * 9999})[:-90]],
    ids=["text", "no tar", "cut"],  # gzip writes the time down, and processes must agree on names
)
def test_archives_that_are_none(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "archive"
    path.write_bytes(data)
    for make in (texts_of("p"), coco_captions):
        with pytest.raises(BadPrompts, match="not the archive that was expected"):
            make(path)
