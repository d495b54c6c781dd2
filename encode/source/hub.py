"""A data set of the Hugging Face hub: the list of its files at one revision, and the download of one.

An unfinished file is `.NAME.DIGEST-BOOT.part` beside its later place. The library's own downloads to a
folder begin a file anew after an interruption, so its `http_get` is called with the bytes that exist.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from shards import NoRoom
from shards.format.atomic import make_durable

from ..errors import EncodeError, HubError
from .fetch import boot
from .tars import refuse_size

RETRIES = 9  # of a request, one after the other without a new byte: about five minutes
MAX_PAUSE = 60.0  # seconds between two of them
PART = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{1,24}-[0-9a-z]+\.part", re.DOTALL)


@dataclass(frozen=True)
class HubFile:
    """A file as the hub describes it. `digest` is its sha256 where `hashed`, else git's."""

    path: str
    size: int
    digest: str
    hashed: bool
    url: str

    def part(self, folder: Path) -> Path:
        """Returns where its bytes are until it is whole. After a crash of the machine the tail of a file
        may be zeros, so the boot is part of the name.
        """
        path = folder / self.path
        return path.with_name(f".{path.name}.{self.digest[:24]}-{boot()}.part")


def hub_files(
    repository: str, revision: str, pattern: str, endpoint: str | None = None
) -> tuple[str, list[HubFile]]:
    """Returns the commit that a revision is, and its files that match, in the order of their names.

    Raises HubError when the hub cannot be reached, has none of it, or does not give it to this user.
    """
    import huggingface_hub as hub

    api = hub.HfApi(endpoint=endpoint or os.environ.get("HF_ENDPOINT"))
    with naming_errors(f"{api.endpoint}/datasets/{repository}", revision):
        commit = api.dataset_info(repository, revision=revision).sha or revision
        tree = api.list_repo_tree(repository, recursive=True, revision=commit, repo_type="dataset")
        entries = [entry for entry in tree if isinstance(entry, hub.RepoFile)]
        files = [
            HubFile(
                entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id,
                entry.lfs is not None,
                hub.hf_hub_url(
                    repository, entry.path, repo_type="dataset", revision=commit,
                    endpoint=api.endpoint,
                ),
            )
            for entry in entries
            if fnmatch(entry.path, pattern) or fnmatch(entry.path.rpartition("/")[2], pattern)
        ]  # fmt: skip
        if files:  # a list may be public where the files are not
            hub.get_hf_file_metadata(files[0].url)
    if not files:
        names = ", ".join(sorted(entry.path for entry in entries)[:5])
        raise HubError(
            f"{repository}: none of its {len(entries)} files matches {pattern!r}; there are {names}. "
            "Choose with --files"
        )
    for file in files:
        if {"", ".", ".."} & set(file.path.split("/")) or file.size < 0:
            raise HubError(f"{repository}: found the file {file.path!r} of {file.size} bytes")
    return commit, sorted(files, key=lambda file: natural(file.path))


def download_file(
    file: HubFile, folder: Path, check: bool, stop: threading.Event, report: Callable[[int], None]
) -> None:
    """Downloads a file, or the rest of it, and gives it its name once it is whole.

    `report` is called with the bytes of each piece that arrives. Raises HubError, BadTar for another
    size than the hub lists, and CancelledError once `stop` is set.
    """
    path, part = folder / file.path, file.part(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with PartFile(part, file.size, stop, report) as output:
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HubError(
                f"{part}: another process downloads this file. Wait for it, or end it"
            ) from None
        output.seek(0, os.SEEK_END)  # again, under the lock
        with naming_errors(file.url.partition("/resolve/")[0]):
            _append(file, output, stop)
        output.flush()
        refuse_size(str(path), output.tell(), file.size)
        if check:
            check_digest(part, file, path, stop)
        os.fsync(output.fileno())
        os.replace(part, path)
        make_durable(path)


def remove_stale_parts(files: Sequence[HubFile], folder: Path) -> None:
    """Removes unfinished files that no download goes on with: of another version of a file, or of an
    earlier boot. What another process writes to, perhaps on another machine, stays.
    """
    parts = {file.part(folder) for file in files}
    paths = {folder / file.path for file in files}
    for parent in {path.parent for path in paths if path.parent.is_dir()}:
        for part in parent.iterdir():
            match = PART.fullmatch(part.name)
            if match and part not in parts and parent / match["name"] in paths:
                with suppress(OSError), part.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    part.unlink()


def _append(file: HubFile, output: PartFile, stop: threading.Event) -> None:
    """Appends what is missing. Requests that fail are repeated while that can help."""
    import huggingface_hub as hub
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    # sizes and positions are of the file as it is
    headers = {"Accept-Encoding": "identity"}
    if token := hub.get_token():
        headers["Authorization"] = f"Bearer {token}"
    failures = 0
    while output.tell() < file.size:
        size = output.tell()
        try:
            return http_get(file.url, output, resume_size=size, headers=headers)
        except (EncodeError, NoRoom):
            raise
        except (_network_error(), OSError) as error:
            failures = 1 if output.tell() > size else failures + 1
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if (status < 500 and status not in (408, 429)) or failures > RETRIES:
                raise
        stop.wait(min(2.0**failures, MAX_PAUSE))


class PartFile(io.BufferedWriter):
    """An unfinished file, appended to; it reports what is written and ends the download when `stop`
    is set, when more than `size` bytes come, or when the disk fails.
    """

    def __init__(
        self, path: Path, size: int, stop: threading.Event, report: Callable[[int], None]
    ) -> None:
        super().__init__(io.FileIO(path, "a"))
        self.path, self.size, self.stop, self.report = path, size, stop, report

    def write(self, data: Any) -> int:
        if self.stop.is_set():
            raise CancelledError
        if (end := self.tell() + len(data)) > self.size:
            refuse_size(str(self.path), end, self.size)
        rest = memoryview(data)
        try:
            while rest:  # past the buffer, whose rest would fail again when it is closed
                rest = rest[self.raw.write(rest) :]
        except OSError as error:  # of the disk, which no repetition of a request helps
            raise NoRoom(f"{error}. Make room, then run again to go on") from None
        self.report(len(data))
        return len(data)


class _Readable(io.FileIO):
    """A file that is read until `stop` is set: then it raises CancelledError."""

    def __init__(self, path: Path, stop: threading.Event) -> None:
        super().__init__(path)
        self.stop = stop

    def readinto(self, buffer: Any) -> int:
        if self.stop.is_set():
            raise CancelledError
        return super().readinto(buffer)


def check_digest(part: Path, file: HubFile, path: Path, stop: threading.Event) -> None:
    """Raises HubError, and removes the file, if its sha256 is not the hub's; CancelledError once
    `stop` is set.
    """
    if not file.hashed:
        return
    with _Readable(part, stop) as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != file.digest:
        part.unlink()
        raise HubError(
            f"{path}: found sha256 {digest}, the hub says {file.digest}. It has been "
            "removed: run again to fetch it anew"
        )


@contextmanager
def naming_errors(page: str, revision: str = "") -> Iterator[None]:
    """Raises HubError in place of what the hub's library raises; `page` is of the data set."""
    from huggingface_hub import errors

    endpoint, _, repository = page.partition("/datasets/")
    try:
        yield
    except (EncodeError, NoRoom):
        raise
    except errors.GatedRepoError:
        raise HubError(
            f"{repository}: gated. Accept its terms at {page}, and set HF_TOKEN to your token"
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{repository}: no such data set at {endpoint}, or a private one. Check the name, and "
            "HF_TOKEN if it is private"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{repository}: no revision {revision!r}. See {page}") from None
    except errors.OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE is set: unset it to download") from None
    except (_network_error(), OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise HubError(
            f"{endpoint} cannot be reached, or refuses ({type(error).__name__}: {reason}). Check the "
            "network and HF_ENDPOINT; run again to go on"
        ) from None


def _network_error() -> type[Exception]:
    """Returns the base of all errors of the HTTP library that the hub's library is built on."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__bases__[0]
    return base


def natural(path: str) -> list[Any]:
    """Returns a key for sorting: numbers by value, so that 2 comes before 10; 08 before 8."""
    parts = re.split(r"(\d+)", path)
    return [(int(part), -len(part)) if i % 2 else part for i, part in enumerate(parts)]
