"""The verbs of `python -m eval` and their flags, named as in the reference's scripts where it has them."""

import argparse
import json
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from shards.places import local_path, model, place
from shards.printing import safe_output

from .errors import BadRequest
from .prompts.benchmarks import BENCHMARKS, PLACE


def main(words: Sequence[str] | None = None) -> int | None:
    """Run a verb with its flags, those of the command line unless given; returns its exit code, None being 0."""
    safe_output()
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
        if name not in (
            "train",
            "score",
            "prompts",
            "report",
        ):  # of train each rank has its own, and each scorer
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


def _finite(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number")
    return found


def _guidance(text: str) -> float:
    found = _finite(text)
    if found < 0:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a finite number of at least 0")
    return found


def _sampling_flags(add: argparse.ArgumentParser) -> None:
    add.add_argument("--benchmark", choices=BENCHMARKS, default="prompts")
    add.add_argument("--num_inference_steps", type=_positive, default=25)
    add.add_argument(
        "--guidance_scale",
        type=_guidance,
        default=6.0,
        help="at least 0; at 1 or below the prompt alone is run, without guidance",
    )
    add.add_argument("--batch_size", type=_positive, help="pictures; the benchmark's by default")
    add.add_argument("--seed", type=_natural, default=42)
    add.add_argument("--ema_weights", action=argparse.BooleanOptionalAction, default=True)
    add.add_argument(
        "--vae",
        type=model,
        help="where the columns' VAE lies now, if not where it was: a folder, or flux, sd35, ...",
    )
    add.add_argument(
        "--text-encoder", "--text_encoder", type=model, help="likewise for the text encoder"
    )


def _generate_flags(add: argparse.ArgumentParser) -> None:
    """images from prompts, through a checkpoint and its VAE; also under torchrun or accelerate launch"""
    add.add_argument(
        "--checkpoint", type=local_path, required=True, help="a run, or one of its steps"
    )
    add.add_argument(
        "--tag", type=_natural, help="the step, where --checkpoint is a run; the last without"
    )
    add.add_argument(
        "--type", choices=("latentbank", "baseline-dit"), default="latentbank",
        help="baseline-dit: a folder of the reference's, with config.json and TAG/mp_rank_00_model_states.pt",
    )  # fmt: skip
    add.add_argument(
        "--prompts", "--metadata_file", type=local_path,
        help="its prompt file, if not the one fetched; of your own: .txt, one a line; .json, list or {id: prompt}",
    )  # fmt: skip
    add.add_argument("--save_dir", type=local_path, required=True)
    _sampling_flags(add)
    add.add_argument(
        "--resolution", type=_positive, help="pixels; the columns' by default, 256 without any"
    )
    add.add_argument("--sampler", choices=("euler", "dpmpp-2m"), default="euler")
    add.add_argument(
        "--guidance_interval", type=_finite, nargs=2, metavar=("LOW", "HIGH"),
        help="of sigma, 0 to 1: outside of it the prompt alone is run, at half the cost",
    )  # fmt: skip
    add.add_argument(
        "--n_samples", "--num_samples", type=_positive, help="pictures of a prompt; likewise"
    )
    add.add_argument(
        "--allow-other-encoder", "--allow_other_encoder", action="store_true",
        help="take what --vae and --text-encoder name, though the columns were made with others",
    )  # fmt: skip
    add.add_argument(
        "--text_cache",
        "--text-cache",
        type=local_path,
        help="of encoded prompts, for several sets; SAVE_DIR/text by default",
    )
    add.add_argument("--threads", type=_positive, default=1, help="of a rank, on a CPU")


def _generate(args: argparse.Namespace) -> int:
    from shards.signals import stoppable, stopping

    from .images.generate import Request, generate
    from .images.ranks import Rank

    rank = Rank.here()
    fields = {k: v for k, v in vars(args).items() if k != "act"}
    fields["guidance_interval"] = _interval(args.guidance_interval)
    fields["device"] = rank.device(args.device)
    if fields["device"].startswith("cuda:"):
        torch.cuda.set_device(fields["device"])
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("eval").setLevel(logging.INFO)

    came: list[int] = []

    def work() -> int:
        with stopping(came):
            generate(Request(**fields), rank=rank, came=came)
        return 0

    return stoppable(work)


def _interval(found: Sequence[float] | None) -> tuple[float, float] | None:
    if found is None:
        return None
    low, high = found
    if not 0 <= low < high <= 1:
        raise BadRequest(
            f"--guidance_interval: found {low:g} {high:g}, expected 0 <= LOW < HIGH <= 1"
        )
    return low, high


def _prompts_flags(add: argparse.ArgumentParser) -> None:
    """the benchmarks' prompts: fetch, list, show"""
    actions = add.add_subparsers(dest="action", required=True, metavar="ACTION")
    fetch = actions.add_parser("fetch", help="bring them from where they are published")
    names = [name for name, benchmark in BENCHMARKS.items() if benchmark.sources]
    fetch.add_argument("names", nargs="+", metavar="NAME", choices=names, help=", ".join(names))
    show = actions.add_parser("show", help="what a file holds, as a benchmark reads it")
    show.add_argument("file", type=local_path, nargs="?", help="what was fetched without")
    show.add_argument("--benchmark", choices=BENCHMARKS, default="prompts")
    listed = actions.add_parser("list", help="benchmarks, and whose prompts are here")
    for action in (fetch, show, listed):
        action.add_argument(
            "--to", type=local_path, default=PLACE, help=f"where they are kept ({PLACE})"
        )


def _prompts(args: argparse.Namespace) -> int:
    from .prompts.catalogue import listed, shown
    from .prompts.fetch import fetch

    if args.action != "fetch":
        lines = (
            listed(args.to) if args.action == "list" else shown(args.benchmark, args.file, args.to)
        )
        print("\n".join(lines))
        return 0
    try:
        for name in args.names:
            fetch(name, args.to)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on")
        return 130
    return 0


def _reconstruct_flags(add: argparse.ArgumentParser) -> None:
    """pictures of a column decoded by its VAE, beside the originals, with their scores"""
    add.add_argument("column", type=place)
    add.add_argument("--tars", type=local_path, required=True, help="folder of the source's tars")
    add.add_argument("--save_dir", type=local_path, required=True)
    add.add_argument(
        "--count", type=_positive, default=64, help="pictures: the column's first valid rows"
    )
    add.add_argument("--batch_size", type=_positive, default=32)
    add.add_argument(
        "--vae", type=model, help="where the column's VAE lies now, if not where it was"
    )
    add.add_argument(
        "--scores", nargs="+", default=[], help="beside PSNR and SSIM: lpips-alex, lpips-vgg, rfid, rkid",
        choices=("lpips-alex", "lpips-vgg", "rfid", "rkid"), metavar="SCORE",
    )  # fmt: skip
    add.add_argument("--inception", dest="inception_folder", type=local_path, metavar="DIR",
                     help="folder that holds inception-2015-12-05.pt")  # fmt: skip
    add.add_argument("--lpips", dest="lpips_folder", type=local_path, metavar="DIR",
                     help="folder of LPIPS's backbones and heads, where torchvision's and lpips's are not")  # fmt: skip
    add.add_argument("--allow-few", action="store_true", help="rFID of fewer than 2,049 pictures")


def _reconstruct(args: argparse.Namespace) -> None:
    from .reconstruct import reconstruct

    fields = {k: v for k, v in vars(args).items() if k != "act"}
    print(json.dumps(reconstruct(**fields)["mean"]))


def _fid_flags(add: argparse.ArgumentParser) -> None:
    """FID and KID between two folders of pictures"""
    add.add_argument("fake", type=local_path)
    add.add_argument("real", type=local_path)
    add.add_argument(
        "--inception", type=local_path, help="folder that holds inception-2015-12-05.pt"
    )
    add.add_argument("--batch_size", type=_positive, default=32)


def _fid(args: argparse.Namespace) -> None:
    from .distances.fid import score

    print(json.dumps(score(args.fake, args.real, args.inception, args.device, args.batch_size)))


def _score_flags(add: argparse.ArgumentParser) -> None:
    """scores of finished sets of pictures, written beside them"""
    from .distances.measure import make_reference, reference_flags
    from .score import SCORERS, run

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

    for name, scorer in SCORERS.items():
        kind = one_of_them(name, scorer.flags)
        kind.add_argument("save_dir", type=local_path, nargs="+", help="what `generate` wrote")
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
    add.add_argument("config", type=local_path)
    add.add_argument("words", nargs="*", metavar="KEY=VALUE", help="over the config: optim.lr=1e-4")


def _train(args: argparse.Namespace) -> int:
    from .online import train

    return train(args.config, args.words)


def _report_flags(add: argparse.ArgumentParser) -> None:
    """sets of pictures and their scores side by side, on one page"""
    add.add_argument(
        "folders", type=local_path, nargs="+", metavar="DIR", help="the first is the baseline"
    )
    add.add_argument(
        "--out", type=local_path, default=Path("report.html"), help="report.json goes beside it"
    )
    add.add_argument("--partial", action="store_true", help="take unfinished sets as they are")
    add.add_argument(
        "--run", type=_named, action="append", default=[], metavar="NAME=RUN",
        help="the training run of the folder of that name, where its pictures do not say it",
    )  # fmt: skip
    add.add_argument("--note", default="", help="a line on the page, such as the pictures' licence")
    add.add_argument("--pictures", type=_natural, default=24, help="prompts shown of a benchmark")


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected NAME=RUN")
    return name, local_path(path)


def _report(args: argparse.Namespace) -> None:
    from .report.page import verdict
    from .report.report import report

    data = report(args.folders, args.out, args.partial, dict(args.run), args.pictures, args.note)
    for section in data["sections"]:
        for sentence in filter(None, map(verdict, section["comparisons"])):
            print(f"{section['benchmark']}: {sentence}")
    print(args.out)


def _watch_flags(add: argparse.ArgumentParser) -> None:
    """pictures and scores of each checkpoint of a run, while it is trained"""
    add.add_argument("run", type=local_path, metavar="RUN")
    add.add_argument(
        "--prompts", type=local_path, required=True, help="a small set, as generate reads it"
    )
    _sampling_flags(add)
    add.set_defaults(batch_size=32)
    add.add_argument("--order", choices=("newest", "oldest"), default="newest", help="which first")
    add.add_argument("--every", type=_positive, default=30, help="seconds between two looks")
    add.add_argument("--once", action="store_true", help="score what stands, and end")
    add.add_argument(
        "--scorer", nargs=argparse.REMAINDER, default=[], metavar="NAME [FLAG ...] [--scorer NAME ...]",
        help="the last flag: all that follows is the scorer's",
    )  # fmt: skip


def _watch(args: argparse.Namespace) -> int:
    from .images.generate import Request
    from .score import SCORERS
    from .watch import parse_scorers, watch

    chosen = parse_scorers(args.scorer, SCORERS, args.device)
    apart = ("act", "run", "order", "every", "once", "scorer")
    fields = {k: v for k, v in vars(args).items() if k not in apart}
    request = Request(checkpoint=args.run, save_dir=args.run / "eval", **fields)
    return watch(args.run, request, chosen, args.order, args.every, args.once)


VERBS = {
    "train": (_train_flags, _train),
    "prompts": (_prompts_flags, _prompts),
    "generate": (_generate_flags, _generate),
    "reconstruct": (_reconstruct_flags, _reconstruct),
    "fid": (_fid_flags, _fid),
    "report": (_report_flags, _report),
    "watch": (_watch_flags, _watch),
    "score": (_score_flags, _score),
}
