"""The flags of the verbs that decode a column: `reconstruct` and `preview`."""

from __future__ import annotations

import argparse
from pathlib import Path

from shards import Status
from shards.console import positive
from shards.places import local_path, model, place

from ..images.flags import class_flag, device_flag

RECONSTRUCTION_SCORES = (  # `reconstruct.MORE`, whose module is loaded when it is used
    "lpips-alex", "lpips-vgg", "rfid", "rkid", "rmind", "rdemo-fd", "ifid", "ikid", "imind", "idemo-fd"
)  # fmt: skip
STATUSES = [status.name.lower() for status in Status if status is not Status.ABSENT]


def reconstruct_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("column", type=place, help="a column by a VAE: a folder or url")
    flag("--tars", type=local_path, required=True, help="folder of the source's tars")
    flag("--save_dir", type=local_path, required=True, help="a new folder for the pictures")
    flag("--count", type=positive, default=64, help="pictures: the column's first valid rows")
    also = "in which the rows must be valid too: name those that are compared, and all have the same rows"
    flag("--also", type=place, nargs="+", default=[], metavar="COLUMN", help=also)
    flag("--batch_size", type=positive, default=32, help="pictures decoded at a time")
    flag("--vae", type=model, help="where the column's VAE lies now, if not where it was")
    class_flag(parser)
    flag(
        "--scores", nargs="+", default=[], choices=RECONSTRUCTION_SCORES, metavar="SCORE",
        help=f"beside PSNR and SSIM: {', '.join(RECONSTRUCTION_SCORES)}",
    )  # fmt: skip
    interpolated = "of ifid and its kind: "
    flag("--neighbours_of", type=place, metavar="COLUMN",
         help=interpolated + "whose rows are the neighbours (default: the column's other rows)")  # fmt: skip
    several = interpolated + "at most, evenly apart"
    flag("--reference_rows", type=positive, default=50_000, help=several)
    several = interpolated + "how many --draw has a choice of"
    flag("--neighbours", type=positive, default=1, help=several)
    drawn = interpolated + "draw one of the neighbours, not the nearest"
    flag("--draw", action="store_true", help=drawn)
    folder = "folder that holds inception-2015-12-05.pt"
    flag("--inception", dest="inception_folder", type=local_path, metavar="DIR", help=folder)
    folder = "folder of LPIPS's backbones and heads, where torchvision's and lpips's are not"
    flag("--lpips", dest="lpips_folder", type=local_path, metavar="DIR", help=folder)
    flag("--allow-few", action="store_true", help="rFID of fewer than 2,049 pictures")
    device_flag(parser)


def preview_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("column", type=place, help="a column: a folder or url")
    flag(
        "--rows",
        metavar="IDS",
        help="row ids and ranges: 0,5,100-120 (default: valid rows, evenly apart)",
    )
    flag(
        "--count", type=positive, default=24, help="rows shown, where none are named; at most 1,000"
    )
    flag(
        "--status",
        choices=STATUSES,
        metavar="NAME",
        help=f"rows of this status: {', '.join(STATUSES)}",
    )
    flag(
        "--tars",
        type=local_path,
        metavar="DIR",
        help="folder of the source's tars: pictures and captions",
    )
    flag(
        "--text",
        type=place,
        metavar="COLUMN",
        help="a column of captions of the same source, for token lengths",
    )
    flag("--out", type=local_path, default=Path("preview.html"), help="the page")
    flag("--vae", type=model, help="where the column's VAE lies now, if not where it was")
    flag(
        "--reference_rows",
        type=positive,
        default=4_096,
        help="rows that neighbours are chosen among, evenly apart",
    )
    flag("--batch_size", type=positive, default=32, help="pictures decoded at a time")
    class_flag(parser)
    device_flag(parser)
