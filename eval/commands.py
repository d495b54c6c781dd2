"""The verbs of `python -m eval` and their flags, named as in the reference's scripts where it has them."""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from .benchmarks import BENCHMARKS


def main(words: Sequence[str] | None = None) -> int | None:
    """Run a verb with its flags, those of the command line unless given; returns its exit code, None being 0."""
    parser = argparse.ArgumentParser(
        prog="python -m eval", description="Sample, reconstruct, score"
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for name, (add_flags, act) in VERBS.items():
        verb = verbs.add_parser(
            name,
            help=(add_flags.__doc__ or "").splitlines()[0],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        add_flags(verb)
        if name not in ("train", "score"):  # there each rank, or each scorer, has its own
            verb.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        verb.set_defaults(act=act)
    args = parser.parse_args(words)
    code: int | None = args.act(args)
    return code


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, not negative")
    return int(text)


def _positive(text: str) -> int:
    if _natural(text) == 0:
        raise argparse.ArgumentTypeError("found 0, expected at least 1")
    return int(text)


def _generate_flags(add: argparse.ArgumentParser) -> None:
    """images from prompts, through a checkpoint and its columns' VAE"""
    add.add_argument("--checkpoint", type=Path, required=True, help="a run, or one of its steps")
    add.add_argument(
        "--tag", type=int, help="the step, where --checkpoint is a run; the last without"
    )
    add.add_argument(
        "--prompts", type=Path, required=True, help=".txt: one a line; .json: list or {id: prompt}"
    )
    add.add_argument("--save_dir", type=Path, required=True)
    add.add_argument("--benchmark", choices=BENCHMARKS, default="prompts")
    add.add_argument("--num_inference_steps", type=_positive, default=25)
    add.add_argument("--guidance_scale", type=float, default=6.0)
    add.add_argument("--batch_size", type=_positive, default=32)
    add.add_argument("--seed", type=_natural, default=42)
    add.add_argument("--ema_weights", action=argparse.BooleanOptionalAction, default=True)
    add.add_argument("--vae", help="where the columns' VAE lies now, if not where it was")
    add.add_argument("--text_encoder", help="likewise for the text encoder")


def _generate(args: argparse.Namespace) -> None:
    from .generate import Request, generate

    fields = {k: v for k, v in vars(args).items() if k != "act"}
    generate(Request(**fields))


def _reconstruct_flags(add: argparse.ArgumentParser) -> None:
    """pictures of a column decoded by its VAE, beside the originals, with their scores"""
    add.add_argument("column", type=Path)
    add.add_argument("--tars", type=Path, required=True, help="folder of the source's tars")
    add.add_argument("--save_dir", type=Path, required=True)
    add.add_argument(
        "--count", type=_positive, default=64, help="pictures: the column's first valid rows"
    )
    add.add_argument("--batch_size", type=_positive, default=32)
    add.add_argument("--vae", help="where the column's VAE lies now, if not where it was")
    add.add_argument(
        "--scores", nargs="+", default=[], help="beside PSNR and SSIM: lpips-alex, lpips-vgg, rfid, rkid",
        choices=("lpips-alex", "lpips-vgg", "rfid", "rkid"), metavar="SCORE",
    )  # fmt: skip
    add.add_argument("--inception", dest="inception_folder", type=Path, metavar="DIR",
                     help="folder that holds inception-2015-12-05.pt")  # fmt: skip
    add.add_argument("--lpips", dest="lpips_folder", type=Path, metavar="DIR",
                     help="folder of LPIPS's backbones and heads, where torchvision's and lpips's are not")  # fmt: skip
    add.add_argument("--allow-few", action="store_true", help="rFID of fewer than 2,049 pictures")


def _reconstruct(args: argparse.Namespace) -> None:
    from .reconstruct import reconstruct

    fields = {k: v for k, v in vars(args).items() if k != "act"}
    print(json.dumps(reconstruct(**fields)["mean"]))


def _fid_flags(add: argparse.ArgumentParser) -> None:
    """FID and KID between two folders of pictures"""
    add.add_argument("fake", type=Path)
    add.add_argument("real", type=Path)
    add.add_argument("--inception", type=Path, help="folder that holds inception-2015-12-05.pt")
    add.add_argument("--batch_size", type=_positive, default=32)


def _fid(args: argparse.Namespace) -> None:
    from .fid import score

    print(json.dumps(score(args.fake, args.real, args.inception, args.device, args.batch_size)))


def _score_flags(add: argparse.ArgumentParser) -> None:
    """scores of finished sets of pictures, written beside them"""
    from .distance_scorers import make_reference, reference_flags
    from .score import run, scorers

    kinds = add.add_subparsers(required=True, metavar="SCORER")

    def one_of_them(
        name: str, flags: Callable[[argparse.ArgumentParser], None]
    ) -> argparse.ArgumentParser:
        kind = kinds.add_parser(
            name,
            help=(flags.__doc__ or "").splitlines()[0],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            conflict_handler="resolve",  # a scorer may set its own defaults of these
        )
        kind.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        kind.add_argument("--batch_size", type=_positive, default=32)
        flags(kind)
        return kind

    for name, scorer in scorers().items():
        kind = one_of_them(name, scorer.flags)
        kind.add_argument("save_dir", type=Path, nargs="+", help="what `generate` wrote")
        kind.add_argument(
            "--partial",
            action="store_true",
            help="score what is there; the name says how much that is",
        )
        kind.set_defaults(score=partial(run, scorer))
    one_of_them("reference", reference_flags).set_defaults(score=make_reference)


def _score(args: argparse.Namespace) -> None:
    args.score(args)


def _train_flags(add: argparse.ArgumentParser) -> None:
    """train, with the text encoder in the step where the captions are token ids"""
    add.add_argument("config", type=Path)
    add.add_argument("words", nargs="*", metavar="KEY=VALUE", help="over the config: optim.lr=1e-4")


def _train(args: argparse.Namespace) -> int:
    from .online import train

    return train(args.config, args.words)


VERBS = {
    "train": (_train_flags, _train),
    "generate": (_generate_flags, _generate),
    "reconstruct": (_reconstruct_flags, _reconstruct),
    "fid": (_fid_flags, _fid),
    "score": (_score_flags, _score),
}
