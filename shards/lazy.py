"""Names of a package that are loaded when they are first used: torch takes seconds, and `--help`, a
status and a plan need none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_getattr(package: str, files: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Returns the `__getattr__` of a package (PEP 562), which imports a name from the file of the
    package that has it; AttributeError for other names. `files` has the names of each file.

    Type checkers read the imports beside it, under TYPE_CHECKING, and must not see it: with a
    `__getattr__` they take any name for one of the package.
    """
    homes = {name: file for file, names in files.items() for name in names}

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return load
