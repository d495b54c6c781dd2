"""Step folders by their names."""

import subprocess
import sys
from pathlib import Path

from train.checkpoints.folders import number_of, steps

NAMES = {
    "step-00000007": 7,
    "step-99999999": 99_999_999,
    "step-100000000": 100_000_000,  # after it, though its name sorts before
    "step-00000100.old": None,
    "step-00000100-best": None,
    "step-7": None,
    ".staging-00000007": None,
}


def test_step_folders_newest_first(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000008").write_text("a file")
    assert {name: number_of(tmp_path / name) for name in NAMES} == NAMES
    assert [path.name for path in steps(tmp_path)] == [
        "step-100000000",
        "step-99999999",
        "step-00000007",
    ]
    assert steps(tmp_path / "none") == []


def test_names_alone_load_no_torch() -> None:
    """`train saved` asks for them in a shell's loop."""
    code = "import sys, train.checkpoints.commands; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
