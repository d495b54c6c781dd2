"""The lines of docs/columns.md that read a column with zarr and numpy alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shards import Column
from tests.shards.toy import (
    TOKENS,
    WIDTH,
    length_of,
    moments_spec,
    row_ids,
    tokens_spec,
    write_column,
)

PAGE = Path(__file__).parents[3] / "docs/columns.md"
CODEC = [None, "blosc"]


def lines_about(name: str) -> str:
    """The page's lines of Python that open the column of this name with zarr."""
    blocks = re.findall(r"```python\n(import zarr\n.*?)```", PAGE.read_text(), re.DOTALL)
    (block,) = [block for block in blocks if f'"cache/blip3o/{name}"' in block]
    assert len([line for line in block.splitlines()[1:] if line]) <= 5
    return str(block)


def run_alone(code: str, folder: Path, result: str) -> NDArray[Any]:
    """What the lines leave under a name, in a process that loads nothing of this repository."""
    end = (
        "import sys, numpy\n"
        "assert not {'shards', 'encode', 'train', 'torch'} & set(sys.modules)\n"
        f"numpy.save('result.npy', {result})"
    )
    subprocess.run([sys.executable, "-c", f"{code}\n{end}"], cwd=folder, env={}, check=True)
    values: NDArray[Any] = np.load(folder / "result.npy")
    return values


@pytest.mark.parametrize("codec", CODEC)
def test_moments_by_zarr_alone(codec: str | None, tmp_path: Path) -> None:
    folder = write_column(tmp_path / "c", moments_spec(codec=codec))
    code = lines_about("flux").replace("cache/blip3o/flux", str(folder))
    column, ids = Column.open(folder), np.concatenate([row_ids(shard) for shard in range(3)])
    rows = run_alone(code, tmp_path, "rows")
    assert rows.tolist() == ids[column.status(ids) <= 1].tolist()
    moments = run_alone(code.replace("rows[0]", "rows[1500]"), tmp_path, "moments")
    assert np.array_equal(moments, column.read(rows[1500:1501])[0])


@pytest.mark.parametrize("codec", CODEC)
def test_text_by_zarr_alone(codec: str | None, tmp_path: Path) -> None:
    folder = write_column(tmp_path / "c", tokens_spec(codec=codec))
    code = lines_about("gemma").replace("cache/blip3o/gemma", str(folder))
    column = Column.open(folder)
    for row in (5, 1030, 4096 + 1000):
        assert ", 5, 256" in code
        changed = code.replace(", 5, 256", f", {row}, {TOKENS}")
        words = column.read(np.array([row])).reshape(-1, WIDTH)
        assert len(words) == length_of(row)
        assert np.array_equal(run_alone(changed, tmp_path, "words"), words)
        states = torch.from_numpy(words.copy()).view(torch.bfloat16).float()
        assert np.array_equal(run_alone(changed, tmp_path, "states"), states.numpy())
