"""The verbs of `python -m eval study` and their flags.

A verb is an entry of VERBS: a sentence, a function that adds its flags, and one that runs it. What
they need is loaded when the verb is used.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from shards.console import counted, not_negative, number, overview, positive, say_next
from shards.places import local_path
from shards.signals import stoppable

from ..errors import BadRequest

if TYPE_CHECKING:
    from .study import Study

Flags = Callable[[argparse.ArgumentParser], None]
EXAMPLES = (
    "python -m eval study plan study.yaml --gpu h100",
    "python -m eval study run study.yaml",
    "python -m eval study report study.yaml",
)


def study_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the verbs of a study with their flags."""
    verbs = parser.add_subparsers(dest="study_verb", metavar="VERB")
    for name, (text, add_flags, _) in VERBS.items():
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("study", type=local_path, metavar="STUDY.yaml", help="the study")
        default = "default: studies/<name of the YAML>"
        verb.add_argument("--out", type=local_path, metavar="DIR", help=default)
        add_flags(verb)


def run_study(args: argparse.Namespace) -> int | None:
    """Runs a verb of a study; without one prints what there is."""
    if args.study_verb is None:
        texts = {name: text for name, (text, _, _) in VERBS.items()}
        print(overview("python -m eval study", "compare VAEs over several seeds", texts, EXAMPLES))
        return 0
    return VERBS[args.study_verb][2](args)


def _no_flags(parser: argparse.ArgumentParser) -> None:
    pass


def _run_flags(parser: argparse.ArgumentParser) -> None:
    from .run.claims import SECONDS

    flag = parser.add_argument
    several = "commands at a time, among which the visible GPUs are divided"
    flag("--jobs", type=positive, default=1, help=several)
    lease = "seconds after which another worker takes over from one that stopped"
    flag("--lease", type=number(least=1), default=SECONDS, metavar="SECONDS", help=lease)
    slurm = parser.add_argument_group("for SLURM, where nothing is run here")
    flag = slurm.add_argument
    flag("--print-sbatch", action="store_true", help="print the script of an array of workers")
    flag("--workers", type=positive, help="tasks of the array; default: 2")
    flag("--gpus", type=not_negative, help="of each worker; default: 8")
    flag("--time", help="of each task, as sbatch takes it; default: 24:00:00")
    flag("--partition", metavar="NAME", help="as sbatch takes it")
    flag("--account", metavar="NAME", help="as sbatch takes it")


def _plan_flags(parser: argparse.ArgumentParser) -> None:
    from train.plan import add_setting_options

    add_setting_options(parser)


def _plan(args: argparse.Namespace) -> int:
    from .plan.plan import run_plan

    if run_plan(args):
        say_next("eval", "study", "run", *_named(args))
    return 0


def _run(args: argparse.Namespace) -> int:
    from .run.runner import FAILED, run
    from .study import Study

    study = Study.open(args.study, args.out, args.jobs)
    if _is_printed(args, study):
        return 0
    code = stoppable(lambda: run(study, args.lease))
    if code == 0:
        say_next("eval", "study", "report", *_named(args))
    elif code == FAILED:
        say_next("eval", "study", "status", *_named(args), note="what failed, and its logs")
    return code


def _is_printed(args: argparse.Namespace, study: Study) -> bool:
    """Prints the script of an array where it is asked for; BadRequest for flags that are of it alone."""
    from .run.claims import SECONDS
    from .run.sbatch import Array, script

    names = ("workers", "gpus", "time", "partition", "account")
    flags = {name: value for name in names if (value := getattr(args, name)) is not None}
    if not args.print_sbatch:
        if flags:
            name = next(iter(flags))
            raise BadRequest(
                f"--{name}: found it without --print-sbatch, expected both: it is of the script of a SLURM array"
            )
        return False
    words = [str(word) for word in _named(args)]
    words += ["--jobs", str(args.jobs)] if args.jobs != 1 else []
    words += ["--lease", f"{args.lease:g}"] if args.lease != SECONDS else []
    print(script(study, Array(**flags), words), end="")
    return True


def _named(args: argparse.Namespace) -> list[object]:
    """Returns the words that name this study again."""
    return [args.study, *(["--out", args.out] if args.out else [])]


def _status(args: argparse.Namespace) -> None:
    from .status import status
    from .study import Study

    print(status(Study.open(args.study, args.out)))


def _gc_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yes", action="store_true", help="delete; without it they are listed")


def _gc(args: argparse.Namespace) -> int:
    from .run.gc import run_gc

    return run_gc(args)


def _online_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag(
        "--tars", nargs="+", type=local_path, metavar="DIR", required=True,
        help="the folder of each source's tars, in the order of the training config",
    )  # fmt: skip
    flag("--steps", type=positive, default=10, help="steps of each measurement")
    flag("--rounds", type=positive, default=3, help="measurements of each kind")


def _online(args: argparse.Namespace) -> int:
    from .plan.online import run_online

    code = stoppable(lambda: run_online(args))
    if code == 0:
        say_next("eval", "study", "report", *_named(args))
    return code


def _verify(args: argparse.Namespace) -> int:
    from .lock import FILE, removed_sets, verify
    from .study import Study

    study = Study.open(args.study, args.out)
    faults, versions = verify(study)
    for line in versions:
        print(f"another version: {line}")
    for line in faults:
        print(line)
    if sets := removed_sets(study):
        print(
            f"pictures of {counted(len(sets), 'set')} were removed by `study gc`: by their records"
        )
    state = f"{counted(len(faults), 'difference')} from" if faults else "all is as in"
    print(f"{study.out / FILE}: {state} the lock")
    return int(bool(faults))


def _report_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=not_negative, default=24, help="prompts that are shown")
    edge = "give a verdict though a setting was best at an end of its range"
    parser.add_argument("--accept-edge", action="store_true", help=edge)


def _report(args: argparse.Namespace) -> None:
    from .checks import check_sets
    from .earlier import refuse_changed, take_over
    from .report.page import report
    from .run.edited import refuse_edited
    from .study import Study

    study = Study.open(args.study, args.out)
    refuse_edited(study)  # a score is sealed, the items beside it are not
    if args.accept_edge and study.config.settle is not None:
        settle = study.config.settle.model_copy(update={"accept_edge": True})
        study = replace(study, config=study.config.model_copy(update={"settle": settle}))
    study = take_over(study)
    check_sets(study)
    refuse_changed(study)  # its pictures would be shown as those of this YAML
    data = report(study, args.pictures)
    for verdict in data["verdicts"]:
        title = f"{verdict['title']}. " if verdict["title"] else ""
        print(f"{title}{verdict['sentence']}")
    for record in data["time_to_quality"]:
        print(record["sentence"])
    print(study.out / "report.html")


VERBS: dict[str, tuple[str, Flags, Callable[[argparse.Namespace], int | None]]] = {
    "plan": ("what a study would make, take over and cost, before it starts", _plan_flags, _plan),
    "run": ("encode, train, generate and score what is missing", _run_flags, _run),
    "status": ("what exists, what is missing and what has failed", _no_flags, _status),
    "verify": (
        "check what exists against study.lock, which a finished run wrote",
        _no_flags,
        _verify,
    ),
    "online": (
        "measure what encoding in every step would take, beside reading columns",
        _online_flags,
        _online,
    ),
    "gc": ("remove pictures that are scored and not on the page", _gc_flags, _gc),
    "report": ("the verdict, as a page and as study.json", _report_flags, _report),
}
