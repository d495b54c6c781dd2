"""The demo's judge: a small network that tells OpenMoji groups apart.

    python -m eval.demo.classifier --data demo/data --out configs/demo/classifier

About three minutes on one core. `eval.demo.judge` makes scores of it. It sees drawings only, never a
picture that came out of a VAE or a transformer; blur, noise and shifts in training keep it from
judging by sharpness. Its numbers mean something within this demo and nowhere else.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from shards import sha256_file
from shards.console import Bar
from shards.places import local_path

from .data import digest, read, training_tars
from .openmoji import GROUPS, group_of

RESOLUTION = 64
FILE = "classifier.safetensors"
FEATURES = 32  # few enough for a covariance from a few hundred pictures
FIRST = 4  # losses that are recorded
WIDTHS = (24, 48, 64, 64)


@dataclass(frozen=True)
class Budget:
    """The training of the shipped weights; the test shortens it."""

    steps: int = 800
    batch: int = 64
    rate: float = 3e-3
    seed: int = 0


class Classifier(nn.Module):
    """Pixels (B, 3, 64, 64) in [-1, 1] -> features (B, F) -> logits (B, G)."""

    def __init__(self, groups: list[str]) -> None:
        super().__init__()
        self.groups = groups
        layers: list[nn.Module] = []
        for inner, outer in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(inner, outer, 3, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(outer), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)  # (B, 64, 4, 4)
        self.neck = nn.Linear(WIDTHS[-1] * 16, FEATURES)
        self.head = nn.Linear(FEATURES, len(groups))

    def features(self, pixels: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [-1, 1] -> (B, 32), between -1 and 1."""
        maps = F.dropout(self.trunk(pixels).flatten(1), 0.3, self.training)
        return torch.tanh(self.neck(maps))

    def logits(self, pixels: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [-1, 1] -> (B, G), in the order of `groups`."""
        logits: Tensor = self.head(self.features(pixels))
        return logits


def load_classifier(path: Path | str) -> Classifier:
    """Returns the classifier stored in a folder, ready to judge."""
    config = json.loads((Path(path) / "config.json").read_text())
    classifier = Classifier(config["groups"])
    classifier.load_state_dict(load_file(Path(path) / FILE))
    return classifier.eval()


def save_classifier(classifier: Classifier, path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), path / FILE)
    config = {"groups": classifier.groups, "features": FEATURES, "resolution": RESOLUTION}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def labels(keys: list[str], groups: list[str]) -> Tensor:
    """Returns the index (N,) of each key's group."""
    return torch.tensor([groups.index(group_of(key)) for key in keys])


def distort(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Returns pictures mirrored, moved, blurred, recoloured, covered and with noise, each in its own way."""
    count, _, side, _ = pixels.shape

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    # An affine map of the picture's plane: mirrored or not, scaled, moved by up to a tenth.
    angle, zoom = draw(-0.2, 0.2), draw(0.85, 1.15)
    mirror = torch.where(draw(0, 1) < 0.5, 1.0, -1.0)
    cosine, sine, move = angle.cos() * zoom, angle.sin() * zoom, draw(-0.2, 0.2, 2)
    rows = (cosine * mirror, -sine, move[:, 0], sine * mirror, cosine, move[:, 1])
    grid = F.affine_grid(
        torch.stack(rows, 1).view(count, 2, 3), list(pixels.shape), align_corners=False
    )
    x = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    # Blur to the detail of 16 to 64 pixels, one level for the batch; half of each picture's share stays.
    small = int(torch.randint(16, side + 1, (), generator=generator))
    coarse = F.interpolate(x, size=small, mode="bilinear", antialias=True)
    coarse = F.interpolate(coarse, size=side, mode="bilinear")
    x = torch.lerp(x, coarse, draw(0, 1, 1, 1, 1))
    x = x * draw(0.7, 1.1, 1, 1, 1) + draw(-0.15, 0.15, 3, 1, 1)
    # A grey square hides a part, since generated pictures are right in parts.
    centre, half = draw(0, side, 2, 1), draw(0, 10, 1)
    near = (torch.arange(side) - centre).abs() < half.unsqueeze(2)  # (B, 2, side)
    x = torch.where((near[:, 0, :, None] & near[:, 1, None, :])[:, None], 0.0, x)
    noise = torch.randn(x.shape, generator=generator) * draw(0, 0.2, 1, 1, 1)
    return (x + noise).clamp(-1, 1)


def train(
    pixels: Tensor, targets: Tensor, budget: Budget, report: Callable[[int, float], None]
) -> Classifier:
    """Returns a classifier of pixels (N, 3, 64, 64) with targets (N,); `report` gets step and loss."""
    torch.manual_seed(budget.seed)
    generator = torch.Generator().manual_seed(budget.seed)
    classifier = Classifier(list(GROUPS)).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), budget.rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / budget.steps))
    )
    for step in range(budget.steps):
        rows = torch.randint(len(pixels), (budget.batch,), generator=generator)
        logits = classifier.logits(distort(pixels[rows], generator))
        loss = F.cross_entropy(logits, targets[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call,unused-ignore]  # torch leaves it untyped
        optimizer.step()
        schedule.step()
        report(step, loss.item())
    return classifier.eval()


@torch.inference_mode()
def accuracy(classifier: Classifier, pixels: Tensor, targets: Tensor) -> float:
    """Returns the share of pictures that are put into their group."""
    guesses = torch.cat([classifier.logits(part).argmax(1) for part in torch.split(pixels, 256)])
    return float((guesses == targets).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=local_path, required=True, help="folder of eval.demo.data")
    parser.add_argument("--out", type=local_path, required=True)
    arguments = parser.parse_args()
    budget = Budget()
    keys, pixels = read(training_tars(arguments.data), RESOLUTION)
    start = time.monotonic()
    losses: list[float] = []

    def report(_: int, loss: float) -> None:
        losses.append(loss)
        bar.advance(1)

    def text() -> str:
        return f"loss {np.mean(losses[-50:]):.3f}, {bar.pace()}"

    with Bar("classifier", budget.steps, "steps", text=text) as bar:
        classifier = train(pixels, labels(keys, list(GROUPS)), budget, report)
    save_classifier(classifier, arguments.out)
    keys, pixels = read([arguments.data / "openmoji-val/00000.tar"], RESOLUTION)
    recipe = {
        **asdict(budget),
        "data": digest(),
        "weights": sha256_file(arguments.out / FILE),
        # A test repeats these steps, so that script, pictures and weights stay together.
        "first_losses": [round(value, 4) for value in losses[:FIRST]],
        "seconds": round(time.monotonic() - start),
        "torch": torch.__version__,
        "held_out_accuracy": round(accuracy(classifier, pixels, labels(keys, list(GROUPS))), 3),
    }
    (arguments.out / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    print(json.dumps(recipe))


if __name__ == "__main__":
    main()
