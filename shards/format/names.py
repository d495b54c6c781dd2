"""Names of sources and columns: each becomes one folder, on a disk or in an object store."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

FILES = ("index", "source.json", "report.json", "progress.json", "column.json", "zarr.json")
MOST = 255  # bytes of a name in a folder
URL = "?#%"  # where they are in an url, they end the name or spell another one


def checked_name(name: str) -> str:
    """Returns the name if it can be a folder's; else ValueError says why not and names one that can."""
    if fault := _fault(name):
        raise ValueError(f"{fault}, and it names a folder. Call it {proposed(name)}")
    return name


def _fault(name: str) -> str:
    if not name:
        return "it is empty"
    if "/" in name or "\\" in name:
        return "it has a slash or a backslash"
    if name.startswith("."):
        return "it begins with a dot"
    if name.endswith((".", " ")) or name.startswith(" "):
        return "it begins or ends with a space, or ends with a dot"
    if not name.isprintable():
        return "it has a character that cannot be printed"
    if set(name) & set(URL):
        return f"it has one of the characters {' '.join(URL)}, which have a meaning in urls"
    if folded(name) in FILES:
        return "this program has a file or folder of that name there"
    if len(name.encode()) > MOST:
        return f"it takes {len(name.encode())} bytes, a file system has room for {MOST}"
    return ""


def proposed(name: str) -> str:
    """Returns a name like this that can be a folder's: of `google/gemma-2b` the last part."""
    parts = [part for part in re.split(r"[/\\]", name) if part.strip(" .")]
    clean = [c if c.isprintable() and c not in URL else "-" for c in (parts or [""])[-1]]
    text = "".join(clean).encode()[: MOST // 2].decode(errors="ignore").strip(" .")
    return f"{text.partition('.')[0] or 'name'}-1" if not text or folded(text) in FILES else text


def folded(name: str) -> str:
    """Returns a form in which names that are one on some file systems are equal."""
    return unicodedata.normalize("NFC", name).casefold()


def refuse_doubles(names: Iterable[str]) -> None:
    """Raises ValueError for two names that are one name on file systems that ignore case."""
    first: dict[str, str] = {}
    for name in names:
        if (same := first.setdefault(folded(name), name)) != name:
            raise ValueError(
                f"{same!r} and {name!r} differ in capitals alone (or in how an accent is written), "
                "and are one folder on some file systems. Give one of them another name"
            )
