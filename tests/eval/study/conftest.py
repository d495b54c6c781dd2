from __future__ import annotations

from pathlib import Path

import pytest

from tests.eval.study.small_study import study, study_yaml, write_inputs


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that has run; the study itself is in `out`."""
    folder = write_inputs(tmp_path_factory.mktemp("small-study"))
    result = study("run", study_yaml(folder), "--out", folder / "out", "--jobs", 2)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder
