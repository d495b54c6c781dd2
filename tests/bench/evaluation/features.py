"""What keeping features costs: our pass of Inception over pictures, beside clean-fid's own over the same folder.

    python -m tests.bench.evaluation.features --json FILE      # about five minutes
    python -m tests.bench.evaluation.features --light          # toy sizes: that it runs, and nothing else

The network has the size of the one that FID takes (torchvision's Inception v3, of random weights, behind clean-fid's
resize). Either way reads PNGs of 256 x 256 in this process. Ours also hashes them and writes the features down; it is
timed a second time over features that stand.
"""

import argparse
import io
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from eval.features.features import extract, of_folder
from eval.features.networks import Network
from shards import exits
from tests.bench import turns
from tests.bench.cost import cpu_of, paired, promise

ROUNDS, PICTURES, SIDE, BATCH = 10, 32, 256, 16
LIMIT = 1.05  # of clean-fid's CPU seconds

Json = dict[str, Any]
Work = Callable[[], object]


def inception(light: bool) -> Network:
    """An untrained network of Inception's size; a toy with `light`."""
    from cleanfid.resize import build_resizer
    from torchvision.models import inception_v3

    resize = build_resizer("clean")
    body: torch.nn.Module = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 2048)
    )
    if not light:
        body = inception_v3(weights=None, init_weights=False, aux_logits=True)
        body.fc = torch.nn.Identity()
    body.eval().requires_grad_(False)

    def features(pixels: Tensor) -> Tensor:
        return torch.as_tensor(body((pixels - 128) / 128))

    return Network(
        "untrained", "0" * 64, "clean299", 2_048,
        lambda picture: torch.from_numpy(resize(picture).transpose(2, 0, 1)), features,
    )  # fmt: skip


def save_pictures(folder: Path, count: int) -> None:
    chance = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        coarse = chance.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((SIDE, SIDE)).save(folder / f"{i:05d}.png")


def run(folder: Path, rounds: int, light: bool) -> tuple[Json, Table]:
    """Both ways in turns; (results, table)."""
    from cleanfid import fid

    network, pictures = inception(light), folder / "pictures"
    save_pictures(pictures, 4 if light else PICTURES)
    found: dict[str, Any] = {}

    def ours(kept: Path) -> None:
        with redirect_stderr(io.StringIO()):  # the bar of each turn
            found["ours"] = extract(of_folder(pictures), network, folder=kept, batch_size=BATCH)

    def theirs() -> None:
        found["theirs"] = fid.get_folder_features(
            str(pictures), network.features, num_workers=0, batch_size=BATCH, device=torch.device("cpu"), mode="clean",
            verbose=False,
        )  # fmt: skip

    cpu: dict[str, list[float]] = {"ours": [], "theirs": [], "kept": []}
    for turn in turns.turns("features", range(-1, rounds)):  # the first warms up
        kept = folder / f"kept{turn}"
        both: list[tuple[str, Work]] = [("ours", partial(ours, kept)), ("theirs", theirs)]
        for name, work in both if turn % 2 else both[::-1]:
            cpu[name].append(cpu_of(work))
        cpu["kept"].append(cpu_of(partial(ours, kept)))
    cpu = {name: spent[1:] for name, spent in cpu.items()}
    ratio, again = (paired(cpu[name], cpu["theirs"]) for name in ("ours", "kept"))
    result: Json = {
        "rounds": rounds, "pictures": 4 if light else PICTURES, "side": SIDE, "batch": BATCH, "cpu": ratio,
        "kept": again, "cpu_s": {name: float(np.median(spent)) for name, spent in cpu.items()},
        "largest_difference": float(np.abs(found["ours"] - found["theirs"]).max()),
        "promises": [promise("CPU seconds of the feature pass, of clean-fid's", ratio["ratio"], "<=", LIMIT)],
    }  # fmt: skip
    return result, table(result)


def table(found: Json) -> Table:
    title = f"{found['pictures']} pictures of {found['side']} x {found['side']}, {found['rounds']} turns"
    shown = Table("pass", "CPU seconds", "of clean-fid's", "95 % interval", title=title)
    shown.add_row("clean-fid", f"{found['cpu_s']['theirs']:.2f}", "1", "")
    for name, key, ratio in (
        ("ours", "ours", found["cpu"]),
        ("ours, features kept", "kept", found["kept"]),
    ):
        interval = f"{ratio['ratio_low']:.4f} to {ratio['ratio_high']:.4f}"
        shown.add_row(name, f"{found['cpu_s'][key]:.2f}", f"{ratio['ratio']:.4f}", interval)
    return shown


def main() -> int:
    return bench(turns.parsed(__doc__, ROUNDS))


def bench(args: argparse.Namespace) -> int:
    """Measure, print, write down."""
    return turns.measured({"features": turns.timed(run)}, args)


if __name__ == "__main__":
    exits.run(main)
