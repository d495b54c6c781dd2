"""Makes `tests/golden/columns.tar.xz`: a source, its tiny models and columns of it, two of them half encoded.

    python -m tests.encode.golden        # by the release whose columns are to stay readable

Models are named by a relative path, so that the columns' identities hold wherever the archive is unpacked.
"""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from encode.config import EncodeConfig
from encode.run.job import run
from shards.tools.verify import logical_digest
from tests.bench.encoding import synthetic
from tests.encode.toy import jpeg, tar_bytes

ARCHIVE = Path(__file__).parents[1] / "golden/columns.tar.xz"
HALF = "half", "half-ids"  # shard 0 alone is committed; of `half` the values of shard 1 exist too
VAE = {"class": "AutoencoderKL", "path": "./models/kl"}
TEXT = {"class": "GemmaModel", "path": "./models/gemma"}
COLUMNS: dict[str, dict[str, Any]] = {
    "vae": {"kind": "moments", "encoder": VAE, "resolution": 16},
    "text": {"kind": "tokens", "encoder": TEXT, "max_tokens": 16},
    "half": {"kind": "tokens", "encoder": TEXT, "max_tokens": 12},
    "half-ids": {"kind": "ids", "encoder": TEXT, "max_tokens": 12},
    "other": {"kind": "ids", "encoder": TEXT, "max_tokens": 12, "caption": "caption"},
}


def config_of(columns: dict[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A config of some columns, to be run in the folder of the unpacked archive."""
    return {
        "root": "cache", "sources": {"toy": "tars/{0..1}.tar"}, "columns": columns, "shard_rows": 1024,
        "engine": {"executor": "inline", "batch": 2, "device": "cpu"}, **more,
    }  # fmt: skip


def members(shard: int) -> list[tuple[str, bytes]]:
    """Three rows; the second of shard 0 has no caption, the third of shard 1 no sound picture."""
    found = []
    for row in range(3):
        key = f"{shard}{row}"
        broken = (shard, row) == (1, 2)
        found.append((f"{key}.jpg", b"no picture" if broken else jpeg(10 * shard + row)))
        found.append((f"{key}.caption", f"{row} other words".encode()))
        if (shard, row) != (0, 1):
            found.append((f"{key}.txt", f"words {row} of {shard}".encode()))
    return found


def save_models(folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 4], layers_per_block=1, latent_channels=2, norm_num_groups=2,
        sample_size=16, shift_factor=0.1, scaling_factor=0.5,
    ).save_pretrained(folder / "kl")  # fmt: skip
    synthetic.save_gemma(folder / "gemma", {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32,
    })  # fmt: skip


def make(folder: Path) -> None:
    """Fill an empty folder, which is the current one."""
    (folder / "tars").mkdir()
    for shard in range(2):
        (folder / f"tars/{shard}.tar").write_bytes(tar_bytes(members(shard)))
    save_models(folder / "models")
    assert run(EncodeConfig.model_validate(config_of(COLUMNS))) == 0
    cache = folder / "cache"
    digests = {name: logical_digest(cache / "toy" / name) for name in COLUMNS}
    (folder / "digests.json").write_text(json.dumps(digests, indent=1))
    for name in ("report.json", "progress.json"):
        (cache / name).unlink(missing_ok=True)
    for name in HALF:
        column = cache / "toy" / name
        shutil.rmtree(column / "complete")
        (column / "commits/00001.json").unlink()
        for array in ("lengths", "status", "crc"):
            (column / array / "c/1").unlink()
    (cache / "toy/half-ids/ids/c/1").unlink()


def main() -> None:
    platform.node = lambda: "golden"  # else the commits name this machine
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        make(Path(name))
        with tarfile.open(ARCHIVE, "w:xz") as tar:
            for path in sorted(Path(name).rglob("*")):
                if path.is_file():
                    info = tarfile.TarInfo(str(path.relative_to(name)))
                    data = path.read_bytes()
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    sys.stdout.write(f"{ARCHIVE}: {ARCHIVE.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main()
