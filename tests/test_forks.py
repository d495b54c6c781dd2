"""A fork does not end what its parent has left."""

import gc
import os
from pathlib import Path

from tests.forks import fork, wait


class Left:
    """Garbage, once nothing but itself holds it, that says where it was ended."""

    def __init__(self, path: Path) -> None:
        self.path, self.itself = path, self

    def __del__(self) -> None:
        with self.path.open("a") as file:
            file.write(f"{os.getpid()}\n")


def test_the_garbage_of_the_parent_is_its_own(tmp_path: Path) -> None:
    gc.disable()
    try:
        Left(tmp_path / "ended")
        assert wait(fork(gc.collect, tmp_path / "log")) == 0
        assert not (tmp_path / "ended").exists()
    finally:
        gc.enable()
    gc.collect()
    assert (tmp_path / "ended").read_text() == f"{os.getpid()}\n"
