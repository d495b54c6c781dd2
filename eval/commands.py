"""The verbs of `python -m eval` and their flags, named as in the reference's scripts where it has them.

A verb is an entry of VERBS: a sentence, a function that adds its flags, and one that runs it. What
they need is loaded when the verb is used.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from shards.console import Parser, examples_text, not_negative, overview, positive, say_next
from shards.launch import take_local_rank
from shards.places import local_path, place
from shards.printing import command
from shards.signals import in_time, stoppable

from .errors import BadRequest
from .images.flags import (
    AXES,
    class_flag,
    device_flag,
    generate_flags,
    interval_of,
    sampling_flags,
    set_flags,
)
from .images.ranks import chosen_device
from .latents.flags import preview_flags, reconstruct_flags
from .prompts.benchmarks import BENCHMARKS, PLACE

Flags = Callable[[argparse.ArgumentParser], None]
PURPOSE = "sample, reconstruct, score and compare"
SCORERS_OF = {"geneval": "geneval", "dpgbench": "dpg", "genaibench": "genai"}  # by benchmark
EXAMPLES = (
    "python -m eval generate --checkpoint runs/NAME --prompts prompts.txt --save_dir images/NAME",
    "python -m eval score geneval images/NAME/geneval",
    "python -m eval report images/A images/B --out report.html",
)


@command
def main(words: Sequence[str] | None = None) -> int | None:
    """Runs a verb with its flags, those of the command line unless given; returns its exit code,
    None being 0.
    """
    words = list(sys.argv[1:] if words is None else words)
    take_local_rank(words)
    if not words:
        texts = {name: text for name, (text, _, _) in VERBS.items()}
        print(overview("python -m eval", PURPOSE, texts, EXAMPLES))
        return 0
    parser = Parser(
        prog="python -m eval", description=PURPOSE.capitalize(), epilog=examples_text(EXAMPLES)
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for name, (text, add_flags, run) in VERBS.items():
        verb = verbs.add_parser(name, help=text, description=text)
        if words[0] == name:  # the flags of the others are not needed
            add_flags(verb)
        verb.set_defaults(run_verb=run)
    args = parser.parse_args(words)
    if "device" in args:
        args.device = chosen_device(args.device)
    with nullcontext() if words[0] == "train" else in_time():  # a training saves what it has
        code: int | None = args.run_verb(args)
    return code


def add_options(verb: str, parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a verb."""
    VERBS[verb][1](parser)


def _fields(args: argparse.Namespace, *others: str) -> dict[str, Any]:
    """Returns what the function that a verb calls takes of its flags."""
    return {k: v for k, v in vars(args).items() if k not in ("run_verb", *others)}


# Generate -----------------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> int:
    from .images.generate import generate_each, requests_of
    from .images.ranks import Rank

    rank = Rank.here()
    args.guidance_interval = interval_of(args.guidance_interval)
    args.device = rank.device(args.device)
    if args.device.startswith("cuda:"):
        import torch

        torch.cuda.set_device(args.device)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("eval").setLevel(logging.INFO)
    received: list[int] = []

    def work() -> None:
        requests = requests_of(_fields(args))
        manifests = generate_each(requests, rank, received)
        if all(manifest.get("complete", True) for manifest in manifests):  # by the last rank
            folders = [request.save_dir for request in requests]
            say_next("eval", *_after_generate(args.benchmark, folders))

    return stoppable(work, received)


def _after_generate(benchmark: str, folders: Sequence[Path]) -> tuple[object, ...]:
    """Returns the words that score sets, where their benchmark has a scorer, or show them."""
    if benchmark in SCORERS_OF:
        return "score", SCORERS_OF[benchmark], *folders
    return "report", *folders, "--out", "report.html"


# Benchmarks' prompts ------------------------------------------------------------------------------


def _prompts_flags(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    fetch = actions.add_parser("fetch", help="bring them from where they are published")
    names = [name for name, benchmark in BENCHMARKS.items() if benchmark.sources]
    fetch.add_argument("names", nargs="+", metavar="NAME", choices=names, help=", ".join(names))
    show = actions.add_parser("show", help="what a file holds, as a benchmark reads it")
    show.add_argument("file", type=local_path, nargs="?", help="what was fetched without")
    show.add_argument("--benchmark", choices=BENCHMARKS, default="prompts", help="how it is read")
    listing = actions.add_parser("list", help="benchmarks, and whose prompts are here")
    for action in (fetch, show, listing):
        action.add_argument("--to", type=local_path, default=PLACE, help="where they are kept")


def _prompts(args: argparse.Namespace) -> int:
    from .prompts.catalogue import listed, shown

    if args.action == "list":
        print("\n".join(listed(args.to)))
    elif args.action == "show":
        print("\n".join(shown(args.benchmark, args.file, args.to)))
    return stoppable(lambda: _fetch(args)) if args.action == "fetch" else 0


def _fetch(args: argparse.Namespace) -> None:
    from .prompts.fetch import fetch

    for name in args.names:
        fetch(name, args.to)


# Scores -------------------------------------------------------------------------------------------


def _reconstruct(args: argparse.Namespace) -> None:
    from .reconstruct import reconstruct

    print(json.dumps(reconstruct(**_fields(args))["mean"]))
    say_next("eval", "report", args.save_dir, "--out", "report.html", file=sys.stderr)


def _preview(args: argparse.Namespace) -> None:
    from .latents import preview

    preview.run(args)


def _fid_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("fake", type=local_path, help="a folder of pictures")
    flag("real", type=local_path, help="the folder that it is compared with")
    flag("--inception", type=local_path, help="folder that holds inception-2015-12-05.pt")
    flag("--batch_size", type=positive, default=32, help="pictures looked at at a time")
    device_flag(parser)


def _fid(args: argparse.Namespace) -> None:
    from .distances.fid import score

    print(json.dumps(score(args.fake, args.real, args.inception, args.device, args.batch_size)))


def _score_flags(parser: argparse.ArgumentParser) -> None:
    from .distances.measure import make_reference, reference_flags
    from .score import SCORERS, add_flags, run

    kinds = parser.add_subparsers(required=True, metavar="SCORER")

    def scorer_parser(name: str, flags: Flags) -> argparse.ArgumentParser:
        kind = kinds.add_parser(
            name,
            help=(flags.__doc__ or "").splitlines()[0],
            conflict_handler="resolve",  # a scorer may set its own defaults of these
        )
        add_flags(kind, flags)
        return kind

    half_help = "score one half of the prompts, as `eval sweep` divides them; the name says which"
    partial_help = "score what is there; the name says how much that is"
    for name, scorer in SCORERS.items():
        kind = scorer_parser(name, scorer.flags)
        kind.add_argument("save_dir", type=local_path, nargs="+", help="what `generate` wrote")
        kind.add_argument("--partial", action="store_true", help=partial_help)
        kind.add_argument("--half", choices=("a", "b"), help=half_help)
        kind.set_defaults(score=partial(run, scorer))
    scorer_parser("reference", reference_flags).set_defaults(score=make_reference)


def _score(args: argparse.Namespace) -> None:
    args.score(args)
    if "save_dir" in args:
        say_next("eval", "report", *args.save_dir, "--out", "report.html", file=sys.stderr)


def _report_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("folders", type=local_path, nargs="+", metavar="DIR", help="the first is the baseline")
    flag("--out", type=local_path, default=Path("report.html"), help="report.json goes beside it")
    flag("--partial", action="store_true", help="take unfinished sets as they are")
    flag(
        "--run", type=_named, action="append", default=[], metavar="NAME=RUN",
        help="the training run of the folder of that name, where its pictures do not say it",
    )  # fmt: skip
    flag("--note", default="", help="a line on the page, such as the pictures' licence")
    flag("--pictures", type=not_negative, default=24, help="prompts shown of a benchmark")


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected NAME=RUN")
    return name, local_path(path)


def _report(args: argparse.Namespace) -> None:
    from .report.page import as_text
    from .report.report import report

    data = report(args.folders, args.out, args.partial, dict(args.run), args.pictures, args.note)
    for section in data["sections"]:
        print(as_text(section))
    print(args.out)
    for section in data["sections"]:
        unscored = [s["folder"] for s in section["sets"] if not section["scores"]]
        if unscored and section["kind"] == "pictures":
            scorer = SCORERS_OF.get(section["benchmark"], "clipscore")
            say_next("eval", "score", scorer, *unscored)
            break


# Beside the trainer -------------------------------------------------------------------------------


def _train_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("config", type=local_path, help="a YAML file, or a shipped one by its name")
    flag("words", nargs="*", metavar="KEY=VALUE", help="over the config: optim.lr=1e-4")
    flag(
        "--tars", nargs="+", type=local_path, metavar="DIR", default=[],
        help="encode pictures and captions in the step, from the tars of each source",
    )  # fmt: skip
    flag("--measure", type=positive, metavar="STEPS", help="end after so many steps, save nothing")
    class_flag(parser)


def _train(args: argparse.Namespace) -> int:
    from .online import train

    return train(args.config, args.words, args.tars, args.allow_class or (), args.measure)


def _watch_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("run", type=local_path, metavar="RUN", help="the run's folder")
    flag("--prompts", type=local_path, required=True, help="a small set, as generate reads it")
    sampling_flags(parser, 32)
    flag("--order", choices=("newest", "oldest"), default="newest", help="which first")
    flag("--every", type=positive, default=30, help="seconds between two looks")
    flag("--once", action="store_true", help="score what stands, and end")
    _scorer_flag(parser)


def _scorer_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scorer", nargs=argparse.REMAINDER, default=[], metavar="NAME [FLAG ...] [--scorer NAME ...]",
        help="the last flag: all that follows is the scorer's",
    )  # fmt: skip


def _watch(args: argparse.Namespace) -> int:
    from .images.generate import Request
    from .score import SCORERS
    from .watch import parse_scorers, watch

    requests = parse_scorers(args.scorer, SCORERS, args.device)
    fields = _fields(args, "run", "order", "every", "once", "scorer")
    request = Request(checkpoint=args.run, save_dir=args.run / "eval", **fields)
    return watch(args.run, request, requests, args.order, args.every, args.once)


# Settings of the sampler --------------------------------------------------------------------------


def _sweep_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("checkpoint", type=local_path, metavar="RUN", help="a run, or one of its steps")
    flag(
        "--over", nargs="+", required=True, metavar="NAME=VALUE,VALUE",
        help=f"what is tried, such as guidance_scale=1.5,2,3; of {', '.join(AXES)}",
    )  # fmt: skip
    flag("--save_dir", type=local_path, help="of the sets and the page; RUN/sweep by default")
    set_flags(parser)
    _scorer_flag(parser)


def _sweep(args: argparse.Namespace) -> int:
    from .score import SCORERS
    from .sweep import as_text, parse_over, sweep
    from .watch import parse_scorers

    args.guidance_interval = interval_of(args.guidance_interval)
    args.save_dir = args.save_dir or args.checkpoint / "sweep"
    fields, over = _fields(args, "over", "scorer"), parse_over(args.over)
    scorers = parse_scorers(args.scorer, SCORERS, args.device, "sweep")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    received: list[int] = []

    def work() -> None:
        print(as_text(sweep(fields, over, scorers, received)))
        print(args.save_dir / "report.html")

    return stoppable(work, received)


# Columns before training -------------------------------------------------------------------------


def _probe_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("columns", type=place, nargs="*", metavar="COLUMN", help="columns of moments or latents")
    outcomes = (
        "in place of columns: how well such figures ordered the entries of these finished studies"
    )
    flag("--outcomes", type=local_path, nargs="+", metavar="STUDY", help=outcomes)
    flag("--text", type=place, metavar="COLUMN", help="a tokens column of the same source")
    flag("--rows", type=positive, default=2048, help="read, evenly apart; at most 8,192")
    groups = "a regular expression: what it finds in a key is the row's group; else rows of equal captions"
    flag("--groups", metavar="PATTERN", help=groups)
    together = "likewise: rows that are variants of one picture, never fitted on each other"
    flag("--together", metavar="PATTERN", help=together)
    flag("--json", type=local_path, metavar="FILE", help="all figures with intervals")
    flag("--out", type=local_path, metavar="FILE", help="a page of HTML")


def _probe(args: argparse.Namespace) -> None:
    if bool(args.columns) == bool(args.outcomes):
        raise BadRequest(
            "found both columns and --outcomes, or neither. Name columns to probe, or finished studies behind "
            "--outcomes"
        )
    if args.outcomes:
        from .study.report import outcomes

        outcomes.run(args)
    else:
        from . import probe

        probe.run(args)


# Several trainings -----------------------------------------------------------------------------


def _study_flags(parser: argparse.ArgumentParser) -> None:
    from .study.commands import study_flags

    study_flags(parser)


def _study(args: argparse.Namespace) -> int | None:
    from .study.commands import run_study

    return run_study(args)


VERBS: dict[str, tuple[str, Flags, Callable[[argparse.Namespace], int | None]]] = {
    "train": (
        "train, with the text encoder in the step where captions are ids, or with both encoders",
        _train_flags,
        _train,
    ),
    "prompts": ("the benchmarks' prompts: fetch, list, show", _prompts_flags, _prompts),
    "generate": (
        "images from prompts, through a checkpoint and its VAE; also under torchrun",
        generate_flags,
        _generate,
    ),
    "reconstruct": (
        "pictures of a column decoded by its VAE, beside the originals, with their scores",
        reconstruct_flags,
        _reconstruct,
    ),
    "preview": (
        "rows of a column on one page: decoded beside their source, with key, caption and status",
        preview_flags,
        _preview,
    ),
    "probe": (
        "columns of latents judged before anything is trained on them",
        _probe_flags,
        _probe,
    ),
    "fid": ("FID and KID between two folders of pictures", _fid_flags, _fid),
    "report": (
        "sets of pictures and their scores side by side, on one page",
        _report_flags,
        _report,
    ),
    "watch": (
        "pictures and scores of each checkpoint of a run, while it is trained",
        _watch_flags,
        _watch,
    ),
    "sweep": (
        "the guidance scale (or another setting of the sampler) that suits a run",
        _sweep_flags,
        _sweep,
    ),
    "study": (
        "entries trained over several seeds, sampled, scored and compared, from one file",
        _study_flags,
        _study,
    ),
    "score": ("scores of finished sets of pictures, written beside them", _score_flags, _score),
}
