"""`python -m eval sweep RUN --over guidance_scale=1.5,2,3 --scorer NAME ...`: which setting of the sampler
suits a run, chosen on one half of the prompts and reported on the other.

    RUN/sweep/guidance_scale-1.5/     a set of all prompts, as `eval generate` makes it
        halves/a|b/scores/            scores of each half, whose names end with -half-a or -half-b
    RUN/sweep/sweep.json              the choice (`eval.report.sweeps`)
    RUN/sweep/report.html, .json      curves with intervals, and the pictures side by side

What exists is taken as it is: sets that `torchrun ... -m eval generate --guidance_scale 1.5 2 3` made,
their features and answers of models. How is chosen is in `eval.scores.choose`.
"""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from shards import charts
from shards.console import render
from shards.printing import one_line

from .errors import BadReport, BadRequest, TooFewImages
from .images.flags import AXES
from .images.generate import generate_each, requests_of
from .images.generator import Request
from .images.imageset import ImageSetReader
from .images.ranks import Rank
from .prompts.benchmarks import BENCHMARKS, find
from .prompts.prompts import LEAST_HALVED, Half
from .report.compare import estimate_of
from .report.report import report
from .report.sweeps import HalfScores, Point, Sweep, setting_text, varied, write
from .score import score_set
from .scores import results
from .scores.choose import Choice, choose
from .scores.results import Score, Value
from .watch import ScorerRequest

HALVES: tuple[Half, ...] = ("a", "b")


def parse_over(words: Sequence[str]) -> dict[str, list[float]]:
    """Returns the values by setting of `guidance_scale=1.5,2,3 shift=1,3`; BadRequest of other words."""
    over: dict[str, list[float]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if name not in AXES or not equals:
            raise BadRequest(
                f"--over: found {word!r}, expected NAME=VALUE,VALUE,... with one of {', '.join(AXES)}"
            )
        if name in over:
            raise BadRequest(f"--over: found {name} twice, expected all its values in one list")
        try:
            over[name] = [AXES[name](value) for value in values.split(",")]
        except ArgumentTypeError as error:
            raise BadRequest(f"--over {name}: {error}") from None
    return over


def sweep(
    fields: Mapping[str, Any], over: Mapping[str, Sequence[float]], scorers: Sequence[ScorerRequest],
    signals: Sequence[int] = (),
) -> Sweep:  # fmt: skip
    """Makes the sets that are missing, scores their halves, writes the choice and the page; returns
    the choice.

    `fields` are those of a request. All that a user can get wrong is refused before the first
    picture is made: BadRequest, BadReport, TooFewImages, and what `generate` and scorers raise.
    """
    save_dir = fields["save_dir"]
    requests = requests_of({**fields, **over})
    if len(requests) < 2:
        raise BadRequest("--over: found one setting, expected at least two to choose from")
    if (size := Rank.here().size) > 1:
        raise BadRequest(
            f"found {size} ranks, expected one process: make the sets by torchrun ... -m eval generate with the "
            "lists of values, and then sweep, which takes what exists"
        )
    count = _prompts_of_half(requests[0], scorers)
    generate_each(requests, signals=signals)
    settings = [{name: float(getattr(r, name)) for name in over} for r in requests]
    sets = [ImageSetReader.open(request.save_dir) for request in requests]
    scored = [{half: _scored(images.half_of(half), scorers) for half in HALVES} for images in sets]
    primary = next(iter(scored[0]["a"]))
    better = {name: score.better for name, (_, score) in scored[0]["a"].items()}
    estimates = [estimate_of(*halves_of["a"][primary]) for halves_of in scored]
    choice = choose(settings, estimates, better[primary])
    points = tuple(
        Point(
            setting=setting, folder=request.save_dir.name, difference=difference, tied=tied,
            scores={
                name: HalfScores(halves_of["a"][name][1].value, halves_of["b"][name][1].value)
                for name in better
            },
        )
        for setting, request, difference, tied, halves_of in zip(
            settings, requests, choice.differences, choice.tied, scored, strict=True
        )
    )  # fmt: skip
    record = Sweep(
        run=one_line(str(fields["checkpoint"])), scorer=primary, better=better,
        prompts=count, pictures=scored[0]["a"][primary][1].pictures, points=points,
        best=choice.best, chosen=choice.chosen,
        sentences=_sentences(points, choice, primary, count),
    )  # fmt: skip
    write(save_dir, record)
    report([request.save_dir for request in requests], save_dir / "report.html")
    return record


def _prompts_of_half(request: Request, scorers: Sequence[ScorerRequest]) -> int:
    """Returns the prompts of each half; BadReport without a scorer, TooFewImages where a half is too small."""
    if not scorers:
        raise BadReport("--scorer: found none, expected at least one with its flags")
    prompts = find(request.benchmark, request.prompts)
    if len(prompts.items) < LEAST_HALVED:
        raise TooFewImages(
            f"{request.prompts}: found {len(prompts.items)} prompts, expected at least {LEAST_HALVED}: one half "
            "chooses, the other one reports"
        )
    count = len(prompts.half("a").items)
    per_prompt = request.n_samples or BENCHMARKS[request.benchmark].images_per_prompt
    place = f"a half of {request.prompts or prompts.benchmark}"
    for scorer in scorers:  # loads its weights, and asks for enough pictures
        scorer.scorer.ready(scorer.args)
        of_half = Namespace(**{**vars(scorer.args), "partial": True})  # as `score_set` has it
        scorer.scorer.suits(of_half, prompts)
        scorer.scorer.enough(scorer.args, per_prompt * count, place)
    return count


def _scored(
    images: ImageSetReader, scorers: Sequence[ScorerRequest]
) -> dict[str, tuple[Path, Score]]:
    """Returns the scores of a half by their names without the half, and the folder that they lie in."""
    results.refuse_versions(images.folder)
    return {
        score.scorer.removesuffix(f"-half-{images.half}"): (images.folder, score)
        for scorer in scorers
        for score in score_set(scorer.scorer, images, scorer.args)
    }


def _sentences(
    points: Sequence[Point], choice: Choice, scorer: str, prompts: int
) -> tuple[str, ...]:
    names = varied(points)
    chosen, best = points[choice.chosen], points[choice.best]
    text, best_text = (setting_text(point.setting, names) for point in (chosen, best))
    ties = sum(choice.tied) - 1
    others = f"{ties} of the others {'is' if ties == 1 else 'are'} not told apart from it"
    sentences = [
        f"Take {text}: {scorer} is {_interval(chosen.scores[scorer].b)} on half B, which had no part in the choice."
    ]
    if all(choice.tied):  # then none is the best, and none lies at an edge
        sentences.append(
            f"No difference shown between the {len(points)} settings on half A: the score speaks neither for {text} "
            "nor against it."
        )
    elif chosen is not best:
        sentences.append(
            f"{best_text} has the best score on half A. {others}, and of these {text} has the smallest guidance."
        )
    elif ties:
        sentences.append(f"It has the best score on half A; {others}.")
    for edge in () if all(choice.tied) else choice.edges:
        tried = f"{edge.name} {edge.value:g}, the {edge.end} that was tried"
        size = "smaller" if edge.end == "smallest" else "larger"
        if edge.of == "best":
            sentences.append(
                f"The best score is that of {tried}: {size} values may be better, try them too."
            )
        else:
            sentences.append(f"The choice is {tried}: {size} values may do as well.")
    sentences.append(
        f"Each half has {prompts:,} prompts. Scores of a half have names of their own, as a distance of fewer "
        "pictures is larger: set them beside no score of the full set. Other training seeds are not covered."
    )
    return tuple(sentences)


def _interval(value: Value, text: Any = charts.figure) -> str:
    if value.low is None:
        return f"{text(value.value)}"
    return f"{text(value.value)} [{text(value.low)}, {text(value.high)}]"


def as_text(record: Sweep) -> str:
    """Returns the table of the scores that the choice was made by, and the sentences."""
    names = varied(record.points)
    heads = [Column(name.replace("_", " "), justify="right") for name in names]
    heads += [Column(f"half {half}", justify="right", no_wrap=True) for half in "AB"]
    table = Table(*heads, Column(""), box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for i, point in enumerate(record.points):
        note = "chosen" if i == record.chosen else "best on A" if i == record.best else ""
        note = note or ("tied" if point.tied else "")
        scores = point.scores[record.scorer]
        table.add_row(
            *(f"{point.setting[name]:g}" for name in names),
            *(_interval(value, "{:.3g}".format) for value in (scores.a, scores.b)),
            note,
        )
    title = f"{record.scorer} ({record.better[record.scorer]} is better)"
    return render(title, table, "", *map(Text, record.sentences))
