"""The cache of pages on a disk: what it keeps, what it evicts, and what it does when it cannot."""

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import StoreError
from shards.store import page_cache
from shards.store.page_cache import File, PageCache
from shards.store.pages import Pages, spread


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def held(cache: PageCache, key: str, pages: int, size: int) -> list[int]:
    return [page for page in range(pages) if cache.has(key, page, size)]


class Counted:
    """An object of numbered bytes that says how often each page was fetched."""

    def __init__(self, size: int, key: str = "k") -> None:
        self.key, self.size = key, size
        self.data = np.random.default_rng(size).bytes(size)
        self.pages: dict[int, File | None] = {}
        self.anew, self.beside = False, 0
        self.fetched: list[tuple[int, int]] = []
        self.asked, self.go = threading.Event(), threading.Event()
        self.go.set()
        self.enough = 0  # requests, with which they go on

    def fetch(self, start: int, length: int) -> bytes:
        self.fetched.append((start, length))
        self.asked.set()
        if len(self.fetched) == self.enough:
            self.go.set()
        assert self.go.wait(60)
        return self.data[start : start + length]


@given(
    st.lists(st.integers(0, 40), max_size=5), st.integers(0, 50), st.integers(0, 100),
    st.integers(1, 20),
)  # fmt: skip
def test_spread_lays_every_byte_where_preadv_would(
    sizes: list[int], offset: int, size: int, page_bytes: int
) -> None:
    data = bytes(range(size))
    buffers = [bytearray(n) for n in sizes]
    end = min(size, offset + sum(sizes))
    for page, start, parts in spread([memoryview(b) for b in buffers], offset, end, page_bytes):
        at = page * page_bytes + start
        for part in parts:
            part[:] = data[at : at + len(part)]
            at += len(part)
        assert at <= (page + 1) * page_bytes
    expected = data[offset:end] if end > offset else b""
    assert b"".join(buffers) == expected.ljust(sum(sizes), b"\0")


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = PageCache(tmp_path / "cache", 64 * 1000)
    for page in range(64):
        cache.add("a", page, bytes(1000))
        when = time.time() - 10_000 + page
        if cache.has("a", page, 1000):
            os.utime(cache.path("a", page), (when, when))
    first = held(cache, "a", 64, 1000)[0]
    assert cache.open("a", first, 1000)  # the oldest is used once more
    for page in range(8):
        cache.add("b", page, bytes(1000))
    pages = held(cache, "a", 64, 1000)
    assert first in pages
    assert first + 1 not in pages
    assert pages[1:] == list(range(pages[1], 64))
    assert held(cache, "b", 8, 1000) == list(range(8))
    assert total(tmp_path) <= 64 * 1000


def test_a_page_is_marked_as_used_only_now_and_then(tmp_path: Path) -> None:
    cache = PageCache(tmp_path, 1 << 20)
    cache.add("a", 0, b"12")
    for age, marked in ((5, False), (500, True)):
        when = time.time() - age
        os.utime(cache.path("a", 0), (when, when))
        assert PageCache(tmp_path, 1 << 20).open("a", 0, 2)
        status = os.stat(cache.path("a", 0))
        assert (status.st_atime > when + 1) == marked
        assert status.st_mtime < when + 1  # when it was written


def test_a_page_of_another_user_is_read(tmp_path: Path) -> None:
    """Who may not mark it as used."""
    if os.geteuid():
        pytest.skip("only root can be two users")
    PageCache(tmp_path, 1 << 20).add("a", 0, b"12")
    os.utime(tmp_path / "a/0", (0, 0))
    tmp_path.chmod(0o755)
    pid = os.fork()
    if not pid:
        code = 9
        try:
            os.chdir(tmp_path)  # the folders above it are root's alone
            os.setuid(12345)
            page = PageCache(Path(), 1 << 20).open("a", 0, 2)
            code = 9 if page is None else int(os.read(page.descriptor, 3) != b"12")
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert (tmp_path / "a/0").stat().st_mtime == 0


def test_litter_of_killed_writers_is_evicted(tmp_path: Path) -> None:
    cache = PageCache(tmp_path, 10_000)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/.tmp-0").write_bytes(bytes(9000))
    os.utime(tmp_path / "old/.tmp-0", (0, 0))
    cache.add("a", 0, bytes(1000))
    assert not (tmp_path / "old").exists()
    assert cache.has("a", 0, 1000)


LIMIT, SMALL = 1 << 20, 1 << 13


def fill_cache(folder: Path, who: int) -> int:
    """Add twice the limit; the most that was ever there."""
    cache, most = PageCache(folder, LIMIT), 0
    for page in range(2 * LIMIT // SMALL):
        cache.add(f"{who}{page % 7}", page, bytes(SMALL))
        if page % 32 == 0:
            before, after = pages_in(folder), pages_in(folder)
            most = max(most, sum(before[name] for name in before.keys() & after))  # all at once
    return most


def pages_in(folder: Path) -> dict[tuple[str, int, int], int]:
    """Bytes of each file of a page, seen one by one while other processes add and evict."""
    sizes = {}
    for key in os.scandir(folder):
        if key.is_dir():
            with suppress(FileNotFoundError):
                for page in os.scandir(key.path):
                    with suppress(FileNotFoundError):
                        status = page.stat()
                        sizes[page.path, status.st_ino, status.st_mtime_ns] = status.st_size
    return sizes


def test_eight_processes_stay_within_the_limit(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(8) as pool:
        most = pool.starmap(fill_cache, [(tmp_path, who) for who in range(8)])
    assert LIMIT // 2 < max(most) <= LIMIT * 9 // 8  # counted while pages come and go
    assert LIMIT // 2 < total(tmp_path) <= LIMIT


def test_a_page_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    cache, source = PageCache(tmp_path / "cache", 100), Counted(200)
    pages, buffer = Pages(cache, 200), bytearray(200)
    assert pages.preadv(source, [memoryview(buffer)], 0) == 200
    assert bytes(buffer) == source.data
    assert total(tmp_path) == 0


FULL = """
import os, sys
from pathlib import Path
from shards.store.page_cache import PageCache
from shards.store.pages import Pages
from tests.shards.store.test_pages import Counted
folder = Path(sys.argv[1])
cache = PageCache(folder, 1 << 30)
added = [cache.add("a", page, bytes(1 << 16)) for page in range(100)]
assert all(added), added
assert cache.has("a", 99, 1 << 16) and not cache.has("a", 0, 1 << 16)
assert not list(folder.glob("*/.tmp-*"))
for path in folder.glob("*/*"):
    path.unlink()
cache.evict()  # which closes them
with open(folder / "other", "wb") as other:  # someone else fills the disk
    try:
        while True:
            other.write(bytes(1 << 12))
            other.flush()
    except OSError:
        os.close(os.dup(other.fileno()))
        assert [cache.add("a", page, bytes(1 << 16)) for page in range(3)] == [None] * 3
        assert not list(folder.glob("*/.tmp-*"))
        for freed in (0, 100_000):  # the disk takes nothing of a page, or a part
            os.ftruncate(other.fileno(), os.fstat(other.fileno()).st_size - freed)
            source, buffer = Counted(1 << 18), bytearray(1 << 18)
            assert Pages(cache, 1 << 18).preadv(source, [memoryview(buffer)], 0) == source.size
            assert bytes(buffer) == source.data
            assert source.fetched == [(0, 1 << 18)]
            assert not list(folder.glob("*/*"))
        print("sound", flush=True)
        os._exit(0)
"""


def test_a_full_disk_makes_room_or_goes_without(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=2m none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, FULL]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare to mount a small disk with")
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"may not mount a small disk: {done.stderr}")
    assert done.stdout == "sound\n", done.stderr
    assert done.stderr.count("no room for the cache of remote columns") == 1


READ_ONLY = """
import os, subprocess, sys
from pathlib import Path
from shards.errors import StoreError
from shards.store.page_cache import PageCache
folder = Path(sys.argv[1])
PageCache(folder, 1 << 30).add("a", 0, b"12")
os.utime(folder / "a/0", (0, 0))
subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
cache = PageCache(folder, 1 << 30)
assert os.read(cache.open("a", 0, 2).descriptor, 3) == b"12"
try:
    cache.add("a", 1, b"34")
except StoreError as error:
    print(error)
"""


def test_a_disk_that_is_only_to_be_read(tmp_path: Path) -> None:
    """What is kept there is read; what is not is an error with a name."""
    mount = 'mount -t tmpfs -o size=2m none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, READ_ONLY]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare to mount a disk with")
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"may not mount a disk: {done.stderr}")
    assert "Read-only file system" in done.stdout, done.stderr
    assert "Set LATENTBANK_CACHE" in done.stdout


def test_a_reader_that_is_collected_at_any_moment_gives_its_room_back(tmp_path: Path) -> None:
    pages, readers = Pages(PageCache(tmp_path, 800), 100), [Counted(1), Counted(2)]
    for i in (0, 1, 0, 1):  # one that says it again counts once
        pages.expect(readers[i], 400)
    assert (pages.room, pages.fits) == (-100, False)
    with pages._lock:  # as where its collector runs in the midst of the work
        readers.pop()
        gc.collect()
    assert pages.room == 300
    readers.pop()
    gc.collect()
    assert (pages.room, pages.fits) == (700, True)


def test_a_cache_that_cannot_be_is_an_error_with_a_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    pages, source = Pages(PageCache(tmp_path / "file", 1 << 20), 100), Counted(100)
    with pytest.raises(StoreError, match=r"file: the cache of remote columns .* LATENTBANK_CACHE"):
        pages.preadv(source, [memoryview(bytearray(10))], 0)


def test_without_a_cache_there_is_nothing_to_forget(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    Pages(PageCache(tmp_path / "file", 0), 100).forget(Counted(100), 0, 100)


def open_files(folder: Path) -> list[str]:
    links = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    paths = [os.readlink(link) for link in links if link.is_symlink()]
    return [path for path in paths if path.startswith(str(folder))]


def test_what_another_process_evicted_is_closed(tmp_path: Path) -> None:
    ours, theirs = (PageCache(tmp_path / "cache", 1 << 20) for _ in range(2))
    for page in range(3):
        ours.add("k", page, bytes(100))
        assert ours.open("k", page, 100)
    theirs.drop("k", 0)
    assert len(open_files(tmp_path)) == 3
    ours.evict()
    assert open_files(tmp_path) == []


def test_a_process_that_reads_no_more_closes_its_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else can, and the room of those that are evicted is given back only then."""
    monkeypatch.setattr(page_cache, "TOUCH", 0.05)
    cache = PageCache(tmp_path / "cache", 1 << 20)
    for page in range(3):
        cache.add("k", page, bytes(100))
        assert cache.open("k", page, 100)
        end = time.monotonic() + 20
        while open_files(tmp_path) and time.monotonic() < end:
            time.sleep(0.01)
        assert open_files(tmp_path) == []


def test_a_page_in_another_file_of_the_same_inode_is_new(tmp_path: Path) -> None:
    """A file system gives the number away once nobody has the file open."""
    cache, source = PageCache(tmp_path, 1 << 20), Counted(100)
    pages, buffer = Pages(cache, 100), bytearray(10)
    for _ in range(2):
        pages.preadv(source, [memoryview(buffer)], 0)
    pages.take_anew(source)
    kept = cache.open("k", 0, 100)
    assert kept
    before = kept.file
    cache._close_all()
    os.utime(cache.path("k", 0), ns=(0, before[1]))  # it is used, by another process
    pages.preadv(source, [memoryview(buffer)], 20)
    assert not pages.take_anew(source)
    cache._close_all()
    with open(cache.path("k", 0), "r+b") as file:  # in place, so of the same number
        file.write(source.data)
    os.utime(cache.path("k", 0), ns=(before[1], before[1] + 1_000_000))
    pages.preadv(source, [memoryview(buffer)], 20)
    assert os.stat(cache.path("k", 0)).st_ino == before[0]
    assert pages.take_anew(source)


def test_a_reader_takes_what_is_asked_for_but_has_no_turn_yet(tmp_path: Path) -> None:
    pages, source = Pages(PageCache(tmp_path, 1 << 20), 10, threads=1), Counted(100)
    source.go.clear()
    pages.willneed(source, 0, 100)
    assert source.asked.wait(60)  # the thread has begun, and waits
    source.enough = 2
    buffer = bytearray(10)
    assert pages.preadv(source, [memoryview(buffer)], 90) == 10
    assert bytes(buffer) == source.data[90:]
    assert source.fetched[:2] == [(0, 10), (90, 10)]  # the thread's first, then the reader's own
    whole = bytearray(100)
    assert pages.preadv(source, [memoryview(whole)], 0) == 100
    assert bytes(whole) == source.data
    assert len(source.fetched) == 10


def test_what_is_closed_is_fetched_no_more(tmp_path: Path) -> None:
    pages, source, other = (
        Pages(PageCache(tmp_path, 1 << 20), 10, 1),
        Counted(100),
        Counted(20, "o"),
    )
    source.go.clear()
    pages.willneed(source, 0, 100)
    pages.willneed(other, 0, 20)
    pages.cancel(source)
    source.go.set()
    pages.preadv(other, [memoryview(bytearray(20))], 0)
    assert len(source.fetched) <= 1
    assert len(other.fetched) == 2


def test_a_program_ends_though_much_is_asked_for(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from shards.store.page_cache import PageCache
from shards.store.pages import Pages
class Slow:
    key, size, pages, anew, beside = "k", 10_000, {}, False, 0
    def fetch(self, start, length):
        time.sleep(2)
        return bytes(length)
Pages(PageCache(Path(sys.argv[1]), 1 << 20), 10).willneed(Slow(), 0, 10_000)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=240)
    assert len(list(tmp_path.glob("k/*"))) < 500  # which take a minute
