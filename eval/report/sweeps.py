"""What `python -m eval sweep` found, in a file beside the sets of pictures, and its charts.

<save_dir>/sweep.json    format "latentbank-sweep", version 1: the fields of Sweep
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from shards import FormatVersion, ShardsError, atomic_write, charts, seal, unseal
from shards.format.checks import BaseName, Text, check

from ..errors import BadScores
from ..scores.results import Count, Finite, Texts, Value

Json = dict[str, Any]
FORMAT, VERSION, NAME = "latentbank-sweep", 1, "sweep.json"
MOST_LINES = 8  # of a chart
GREY = 7  # a colour of the page

STRICT = ConfigDict(extra="forbid")
Settings = Annotated[dict[Text, Finite], Field(min_length=1, max_length=8)]


@dataclass(frozen=True, config=STRICT)
class HalfScores:
    """A score of both halves of the prompts."""

    a: Value
    b: Value


@dataclass(frozen=True, config=STRICT)
class Point:
    """One setting, the folder of its pictures, and its scores by scorer."""

    setting: Settings
    folder: BaseName
    scores: dict[Text, HalfScores]
    difference: Value  # of the score of half A to the best one's, paired
    tied: bool  # not told apart from the best


@dataclass(frozen=True)
class Sweep:
    """A setting that was chosen on half A of the prompts; its score is that of half B."""

    run: Text  # the checkpoint, as it was named
    scorer: Text  # that the choice was made by
    better: dict[Text, Literal["higher", "lower"]]  # by scorer
    prompts: Count  # of each half
    pictures: Count  # of each half
    points: Annotated[tuple[Point, ...], Field(min_length=2, max_length=1 << 12)]
    best: Count  # index of the best score of half A
    chosen: Count  # index
    sentences: Texts

    def __post_init__(self) -> None:
        if max(self.best, self.chosen) >= len(self.points):
            raise ValueError(f"found {len(self.points)} points, expected more than {self.chosen}")
        names = {(*sorted(point.setting), "", *sorted(point.scores)) for point in self.points}
        if len(names) > 1 or set(self.points[0].scores) != set(self.better):
            raise ValueError("expected the same settings and scorers of all points")
        if self.scorer not in self.better:
            raise ValueError(f"found no score {self.scorer}")


SWEEP = TypeAdapter(Sweep)


def write(folder: Path, sweep: Sweep) -> None:
    """Puts the record into the folder of the sets, replacing the former one."""
    record = seal({"format": FORMAT, "version": VERSION, **asdict(sweep)})
    atomic_write(folder / NAME, record)


def read(folder: Path) -> Sweep:
    """Returns the record; BadScores where it is none, FormatVersion of other releases'."""
    try:
        sweep: Sweep = check(SWEEP, unseal(folder / NAME, FORMAT, VERSION))
        return sweep
    except FormatVersion:
        raise
    except (ShardsError, OSError, ValueError, KeyError, TypeError) as error:
        raise BadScores(
            f"{folder / NAME}: not what `python -m eval sweep` writes ({error}). Run it again, or move the file away"
        ) from None


def sweeps_of(folders: Iterable[Path]) -> list[Sweep]:
    """Returns the records beside some sets of pictures, each once."""
    parents = dict.fromkeys(folder.resolve().parent for folder in folders)
    return [read(parent) for parent in parents if (parent / NAME).is_file()]


def setting_text(setting: Settings, only: Sequence[str] | None = None) -> str:
    """Returns "guidance_scale 2, shift 3"."""
    names = setting if only is None else only
    return ", ".join(f"{name} {setting[name]:g}" for name in names)


def varied(points: Sequence[Point]) -> list[str]:
    """Returns the names of the settings that have several values."""
    return [name for name in points[0].setting if len({p.setting[name] for p in points}) > 1]


def scorers_of(sweep: Json) -> list[str]:
    """Returns the scorers, first the one that the choice was made by."""
    return [sweep["scorer"], *(name for name in sweep["better"] if name != sweep["scorer"])]


def charts_of(sweep: Json) -> list[str]:
    """Returns a chart a scorer: its score on half B over the first setting that varies, with the band of
    its intervals. A line for each value of the other settings; where there is one line, half A's too.
    """
    points = [Point(**point) for point in sweep["points"]]
    axis, *others = varied(points)
    lines: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.setting[axis]):
        lines.setdefault(setting_text(point.setting, others), []).append(point)
    figures = []
    for scorer in scorers_of(sweep):
        curves = [
            (name or "half B", [(point.setting[axis], point.scores[scorer].b.value) for point in line])
            for name, line in list(lines.items())[:MOST_LINES]
        ]  # fmt: skip
        bands: list[charts.Band] = []
        for colour, line in enumerate(list(lines.values())[:MOST_LINES]):
            ends = [
                (point.setting[axis], b.low, b.high)
                for point in line
                if (b := point.scores[scorer].b).low is not None and b.high is not None
            ]
            bands += [(colour, ends)] if ends else []
        colours = [*range(len(curves))]
        if len(lines) == 1:
            places = [(point.setting[axis], point.scores[scorer].a.value) for point in points]
            curves.append(("half A", sorted(places)))
            colours.append(GREY)
        title = f"{scorer} ({sweep['better'][scorer]} is better)"
        figures.append(charts.curves(title, curves, colours=colours, bands=bands, axis=axis))
    return figures
