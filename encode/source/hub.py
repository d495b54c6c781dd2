"""What the Hugging Face hub has of a data set: names, sizes and digests at one revision."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from ..errors import HubError


@dataclass(frozen=True)
class HubFile:
    """A file as the hub describes it."""

    path: str
    size: int
    sha256: str | None  # of what is kept as large
    url: str


def hub_files(
    repository: str, revision: str, pattern: str, endpoint: str | None = None
) -> tuple[str, list[HubFile]]:
    """The commit that a revision is, and its files that match, in the order of their names.

    Raises HubError when the hub cannot be reached, has none of it, or does not give it to this user.
    """
    import huggingface_hub as hub

    if token := hub.get_token():
        os.environ["HF_TOKEN"] = token  # what the ranges are asked for with
    if endpoint := endpoint or os.environ.get("HF_ENDPOINT"):
        os.environ["HF_ENDPOINT"] = endpoint
    api = hub.HfApi(endpoint=endpoint, token=token)
    with naming_errors(repository, revision, api.endpoint):
        commit = api.dataset_info(repository, revision=revision).sha or revision
        tree = api.list_repo_tree(repository, recursive=True, revision=commit, repo_type="dataset")
        every = [file for file in tree if isinstance(file, hub.RepoFile)]
        found = [
            HubFile(
                file.path, file.size, file.lfs.sha256 if file.lfs else None,
                hub.hf_hub_url(
                    repository, file.path, repo_type="dataset", revision=commit, endpoint=api.endpoint
                ),
            )
            for file in every
            if fnmatch(file.path, pattern) or fnmatch(file.path.rpartition("/")[2], pattern)
        ]  # fmt: skip
        if found:  # a list may be public where the files are not
            hub.get_hf_file_metadata(found[0].url, token=token)
    if not found:
        known = ", ".join(sorted(file.path for file in every)[:5])
        raise HubError(
            f"{repository}: none of its {len(every)} files matches {pattern!r}; there are {known}. "
            "Choose with --files"
        )
    for file in found:
        if {"", ".", ".."} & set(file.path.split("/")) or file.size < 0:
            raise HubError(f"{repository}: found the file {file.path!r} of {file.size} bytes")
    return commit, sorted(found, key=lambda file: natural(file.path))


@contextmanager
def naming_errors(repository: str, revision: str, endpoint: str) -> Iterator[None]:
    """HubError for what the hub's library raises."""
    from huggingface_hub import errors

    # of whichever HTTP library it is built on
    network: type[Any] = errors.HfHubHTTPError.__bases__[0]
    page = f"{endpoint}/datasets/{repository}"
    try:
        yield
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
    except (network, OSError) as error:
        told = " ".join(str(error).split())[:300]
        raise HubError(
            f"{endpoint} cannot be reached, or refuses ({type(error).__name__}: {told}). Check the "
            "network and HF_ENDPOINT; run again to go on"
        ) from None


def natural(path: str) -> list[Any]:
    """For sorting: numbers by value, so that 2 comes before 10; 08 before 8."""
    parts = re.split(r"(\d+)", path)
    return [(int(p), -len(p)) if i % 2 else p for i, p in enumerate(parts)]
