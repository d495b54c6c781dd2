"""`python -m encode check CONFIG`: whether the autoencoders of a config do what columns need of them, on a
few pictures; nothing is written. For a class of one's own while it is written, and for any other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import configs
from shards import Status
from shards.console import config_words, counted, positive, render
from shards.places import local_path

from ..config import EncodeConfig, EngineConfig, LatentsColumn, MomentsColumn
from ..errors import EncodeError, ModelNotUsable

if TYPE_CHECKING:
    from .vae import Vae

Pictures = NDArray[np.uint8]  # (N, R, R, 3)
Vaes = MomentsColumn | LatentsColumn
MISSED = 2  # exit code
COUNT = 16  # pictures of a folder, unless more are asked for
SPREAD = 0.2, 5.0  # of the deviation of normalised latents
CLIPPED = (
    0.25  # share of values that a decoder may put at the ends of its range, beyond the picture's
)
LARGEST = 65_504.0  # of float16


@dataclass(frozen=True, slots=True)
class Result:
    """One check: whether it passed, what was found, and what to do where it did not."""

    check: str
    passed: bool
    found: str
    advice: str = ""


@dataclass(slots=True)
class _Checks:
    """The checks of one column, in an order in which each rests on those before it."""

    vae: Vae
    pictures: Pictures
    results: list[Result] = field(default_factory=list)

    def add(self, check: str, passed: bool, found: str, advice: str = "") -> None:
        self.results.append(Result(check, bool(passed), found, "" if passed else advice))

    def run(self) -> None:
        from .rehearsal import TOLERANCE

        vae, pictures = self.vae, self.pictures
        rounding = TOLERANCE[vae.model.precision]
        shape = vae.row_shape
        tokens = shape[1] == 1 and len(shape) == 3
        self.add(
            "shape", True, f"{vae.kind} {shape}" + (", tokens without places" if tokens else "")
        )
        rows = vae.rows(pictures)
        largest = float(np.abs(np.nan_to_num(rows.astype(np.float64), nan=np.inf)).max())
        self.add(
            "values", largest <= LARGEST, f"at most {largest:.3g}",
            f"Columns hold float16, {LARGEST:,.0f} at most: divide latents by a constant, find what "
            "makes NaN, or say precision: fp32",
        )  # fmt: skip
        again = max(map(difference, rows, vae.rows(pictures)))
        self.add(
            "determinism", again <= (0 if vae.device.type == "cpu" else rounding),
            f"the same pictures twice differ by {again:.2g}",
            "Take the mean in place of a sample, and switch dropout off",
        )  # fmt: skip
        alone = max(difference(row, vae.rows(pictures[i : i + 1])[0]) for i, row in enumerate(rows))
        self.add(
            "batch", alone <= rounding, f"a picture alone and in a batch differ by {alone:.2g}",
            "A row must not depend on its neighbours: no statistics over the batch (BatchNorm in eval mode)",
        )  # fmt: skip
        self._round_trip(rows)
        self._norm(rows)

    def _round_trip(self, rows: NDArray[Any]) -> None:
        import torch

        from .pixels import to_images, to_pixels

        stored = torch.from_numpy(rows.astype(np.float32))
        latents = stored.chunk(2, 1)[0] if self.vae.kind == "moments" else stored
        pixels = self.vae.decode(latents).cpu()
        sides = tuple(pixels.shape[2:])
        side = self.pictures.shape[1]
        self.add(
            "size", sides == (side, side), f"decoded to {sides[1]} x {sides[0]} pixels",
            f"decode must give {side} x {side}: choose a resolution that the model's factor divides",
        )  # fmt: skip
        if sides != (side, side):
            return
        share, before = (
            float((x.abs() >= 1).float().mean()) for x in (pixels, to_pixels(self.pictures))
        )
        self.add(
            "range", share - before <= CLIPPED,
            f"{100 * share:.0f} % of decoded values are at the ends, {100 * before:.0f} % of the pictures'",
            "Is pixel_range that of the pixels which the class takes and gives?",
        )  # fmt: skip
        decoded = to_images(pixels)
        reached, grey = psnr(self.pictures, decoded), psnr(self.pictures, means(self.pictures))
        self.add(
            "round trip", reached > grey, f"{reached:.1f} dB; each picture's mean colour has {grey:.1f}",
            "The decoder shows less than one colour would: check weights, pixel_range, the order of axes, "
            "and whether decode expects normalised latents (it gets those of encode)",
        )  # fmt: skip

    def _norm(self, rows: NDArray[Any]) -> None:
        norm = self.vae.norm
        values = rows.astype(np.float64)
        mean, noise = values, 0.0
        if self.vae.kind == "moments":
            mean, logvar = np.split(values, 2, 1)
            noise = float(np.mean(np.exp(logvar) * norm.arrays[1] ** 2))
        normalised = (mean - norm.arrays[0]) * norm.arrays[1]
        spread = float(np.sqrt(normalised.var() + noise))
        places = {array.shape for array in norm.arrays}
        kind = "one for all channels" if places == {(1, 1, 1)} else f"arrays of {sorted(places)}"
        self.add(
            "norm", SPREAD[0] <= spread <= SPREAD[1],
            f"{kind}; normalised latents have mean {normalised.mean():.2f}, deviation {spread:.2f}",
            "Expected about 0 and 1: is scale the inverse of the deviation, and of latents as encode gives "
            "them? Else measure both over your pictures",
        )  # fmt: skip


def difference(row: NDArray[Any], other: NDArray[Any]) -> float:
    """Returns `rehearsal.difference`, which loads torch: `--help` need not."""
    from .rehearsal import difference as of_rows

    return of_rows(row, other)


def check_column(
    config: Vaes, engine: EngineConfig, pictures: Callable[[int], Pictures]
) -> list[Result]:
    """Returns the results of one column's checks, up to the first that ends them."""
    from .load import device_of, load_encoder
    from .rehearsal import TOLERANCE

    device = device_of(engine)
    checks: _Checks | None = None
    try:
        vae: Any = load_encoder(config, device)
        checks = _Checks(vae, pictures(config.resolution))
        checks.add("loads", True, f"{vae.cls}, weights {vae.weights[:16]}")
        checks.run()
        again: Any = load_encoder(config, device)
        pair = zip(vae.rows(checks.pictures), again.rows(checks.pictures), strict=True)
        rounding = max(difference(row, other) for row, other in pair)
        same = again.weights == vae.weights and rounding <= TOLERANCE[vae.model.precision]
        checks.add(
            "digest", same, "loaded twice, it is the same" if same else "loaded twice, it is another",
            "Read every weight from path: what is not read is drawn at random at each start",
        )  # fmt: skip
    except ModelNotUsable as error:
        results = checks.results if checks else []
        message, _, advice = str(error).partition(". ")
        return [*results, Result("answers" if results else "loads", False, message, advice)]
    return checks.results


# Pictures ----------------------------------------------------------------------------------------


def drawn(side: int) -> Pictures:
    """Returns four pictures of soft colours and edges, (4, side, side, 3)."""
    y, x = np.mgrid[:side, :side] / max(side - 1, 1)
    pictures = []
    for n in range(4):
        waves = [0.5 + 0.35 * np.sin((1 + n) * (2 * x + c * y) + c + n) for c in range(3)]
        image = np.stack(waves, -1)
        disc = (x - 0.3 - 0.1 * n) ** 2 + (y - 0.5) ** 2 < 0.06
        image[disc] = [0.2 * n, 0.9 - 0.2 * n, 0.4]
        pictures.append(image)
    return (np.stack(pictures) * 255).astype(np.uint8)


def from_place(place: Path, count: int) -> Callable[[int], Pictures]:
    """Returns a function that crops the first pictures of a folder, or the one of a file, as a column does;
    EncodeError where there is none.
    """
    from ..source.images import decode, transform

    if not place.exists():
        raise EncodeError(
            f"{place}: no such file or folder. Name a folder of pictures, or a picture"
        )
    files = (
        sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    )
    images = []
    for path in files:
        image, status = decode(path.read_bytes())
        if image is not None and status == Status.OK:
            images.append(image)
        if len(images) == count:
            break
    if not images:
        raise EncodeError(
            f"{place}: found no picture among {counted(len(files), 'file')}. Name a folder of pictures"
            if place.is_dir()
            else f"{place}: no picture that can be decoded. Name another, or a folder of pictures"
        )
    return lambda side: np.stack([transform(image, side) for image in images])


def psnr(a: Pictures, b: Pictures) -> float:
    """Returns the mean over pictures of 10 log10(255^2 / MSE), in dB."""
    errors = np.square(a.astype(np.float64) - b).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(errors, 1 / a[0].size))))


def means(pictures: Pictures) -> Pictures:
    colours = pictures.mean((1, 2), keepdims=True)
    return np.broadcast_to(colours.round(), pictures.shape).astype(np.uint8)


# Command -----------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    config_words(parser)
    flag = parser.add_argument
    flag(
        "--pictures",
        type=local_path,
        metavar="PLACE",
        help="a folder of pictures, or one picture, to try them on; some are drawn without it",
    )
    flag("--count", type=positive, default=COUNT, help="of the folder's pictures, the first ones")
    flag("--json", action="store_true", help="one JSON object a check")


def run_check(args: argparse.Namespace) -> int:
    """Returns 0 where every check of every column by an autoencoder passed, else 2."""
    config = configs.load(EncodeConfig, args.config, args.overrides)
    pictures = from_place(args.pictures, args.count) if args.pictures else drawn
    columns = {
        n: c for n, c in config.columns.items() if isinstance(c, MomentsColumn | LatentsColumn)
    }
    if not columns:
        raise EncodeError(
            f"{args.config}: found columns of {', '.join(c.kind for c in config.columns.values())}, "
            "expected one of moments or latents to check"
        )
    code = 0
    for name, column in columns.items():
        results = check_column(column, config.engine, pictures)
        code = code if all(result.passed for result in results) else MISSED
        if args.json:
            print("\n".join(json.dumps({"column": name, **asdict(r)}) for r in results), flush=True)
        else:
            print(as_text(name, results), flush=True)
    if passed_over := [name for name in config.columns if name not in columns]:
        print(f"not checked, of no autoencoder: {', '.join(passed_over)}", file=sys.stderr)
    return code


def as_text(name: str, results: Sequence[Result]) -> str:
    """Returns a table of a column's checks, and below it what to do about each that was missed."""
    from rich.table import Table

    table = Table("check", "", "found", title=name, title_justify="left")
    for result in results:
        table.add_row(result.check, "pass" if result.passed else "MISS", result.found)
    missed = [result for result in results if not result.passed]
    lines = [f"{name}: {r.check}: {r.advice or r.found}" for r in missed]
    verdict = (
        f"{name}: {len(missed)} of {counted(len(results), 'check')} missed"
        if missed
        else f"{name}: all passed"
    )
    return render(table, *lines, verdict)
