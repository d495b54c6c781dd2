"""All figures of a column of latents, as one record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadStatistics
from .estimates import Estimate, no_figure
from .reference import ErrorSums
from .rows import LatentRows, Part
from .spectra import References, Spectrum, Sums, least_rows, linear_references
from .structure import Neighbours, Structure

Schedules = Mapping[
    str, Sequence[float]
]  # noise levels in (0, 1] by name; the first are shown one by one


@dataclass
class _Watcher:
    rows: int
    structure: Structure
    neighbours: Neighbours | None

    def part(self, part: Part) -> None:
        self.structure.add(part)
        if part.first + len(part.mean) == self.rows:  # before the spectra, which take longest
            self.structure.refuse_constant()

    def frequency(self, weight: float, spectrum: Spectrum) -> None:
        if self.neighbours is not None:
            self.neighbours.add(weight, spectrum)


@dataclass(frozen=True)
class Panel:
    """The figures of some rows. Each estimate has `value`, `low`, `high`, and `why` where it has none."""

    rows: int
    shape: tuple[int, int, int]
    frequencies: tuple[int, int]  # looked at, of all
    means: tuple[float, ...]  # of the channels
    deviations: tuple[float, ...]
    figures: dict[str, Estimate]
    by_sigma: dict[str, list[Estimate]]  # with `sigma`

    def record(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "shape": list(self.shape),
            "frequencies": list(self.frequencies),
            "channel_means": list(self.means),
            "channel_deviations": list(self.deviations),
            **self.figures,
            **{f"{name}_by_sigma": values for name, values in self.by_sigma.items()},
        }


def panel(
    rows: LatentRows,
    schedules: Schedules,
    text: NDArray[np.float32] | None = None,
    *,
    together: NDArray[np.int64] | None = None,
    no_text: str = "no text column",
    groups: NDArray[np.int64] | None = None,
    no_groups: str = "no groups",
    advance: Callable[[int], Any] = lambda count: None,
) -> Panel:
    """Returns the figures of rows; `no_text` and `no_groups` say why there are none of these.

    BadStatistics of too few rows, or of a channel that is constant.
    """
    channels = rows.shape[0]
    if rows.count < (least := least_rows(channels)):
        raise BadStatistics(
            f"found {rows.count} rows, expected at least {least} for the spectra of {channels} channels. Encode "
            "more rows"
        )
    structure = Structure(rows.shape)
    neighbours = None if groups is None else Neighbours(groups)
    sigmas = [sigma for levels in schedules.values() for sigma in levels]
    references = linear_references(
        rows,
        sigmas,
        text,
        together=together,
        watcher=_Watcher(rows.count, structure, neighbours),
        advance=advance,
    )
    means, deviations = structure.channels()
    figures = {"posterior_share": structure.posterior_share()}
    figures |= reference_figures(references, schedules, no_text)
    figures |= {
        "lds": structure.local_similarity(),
        "neighbours_same_group": neighbours.share() if neighbours else no_figure(no_groups),
        "high_frequency_share": references.high_share(),
        "effective_rank": structure.effective_rank(),
    }
    first = len(next(iter(schedules.values())))
    by_sigma = {
        f"{name}{suffix}": [
            {"sigma": sigma, **value}
            for sigma, value in zip(sigmas[:first], sums.by_sigma()[:first], strict=True)
        ]
        for name, both in _named(references).items()
        for suffix, sums in both.items()
    }
    return Panel(
        rows.count,
        rows.shape,
        references.frequencies,
        tuple(means.tolist()),
        tuple(deviations.tolist()),
        figures,
        by_sigma,
    )


def _named(references: References) -> dict[str, dict[str, ErrorSums]]:
    """Returns the sums by the name of their figure, and by its suffix."""
    plain, given_text = references.plain, references.given_text
    named: dict[str, Sums] = {"linear_reference": plain}
    if given_text is not None:
        named["linear_reference_given_text"] = given_text
    return {
        name: {"": sums.errors} | ({"_held_out": sums.held_out} if sums.held_out else {})
        for name, sums in named.items()
    }


def reference_figures(
    references: References, schedules: Schedules, no_text: str
) -> dict[str, Estimate]:
    """Returns the means of the references over the schedules, VIV, and R^2 of captions."""
    figures: dict[str, Estimate] = {}
    for name, both in _named(references).items():
        start = 0
        for schedule, levels in schedules.items():
            part = slice(start, start + len(levels))
            for suffix, sums in both.items():
                middle = "" if start == 0 else f"_{schedule}"
                figures[f"{name}{middle}{suffix}"] = sums.mean(part)
            start += len(levels)
    figures["viv"] = references.plain.errors.viv()
    if references.given_text is None:
        figures["linear_reference_given_text"] = no_figure(no_text)
    figures["text_r2"] = references.text_r2 or no_figure(no_text)
    return figures
