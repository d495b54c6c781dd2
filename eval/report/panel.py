"""The page of `python -m eval probe`: a column a row, with what each figure says and does not say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards import charts

from .page import page_of, value_text

Json = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A figure of a column: its title, what it says, what it does not, and where it is from."""

    title: str
    says: str
    not_said: str
    source: str


FIGURES = {
    "linear_reference": Figure(
        "linear reference",
        "The squared error that the best linear model of stationary latents makes in the velocity, a value, over the "
        "eight noise levels that every run validates at: low where few directions carry most of the variance.",
        "It does not say how good pictures will be: latents that have lost detail are easy to model. A trained model "
        "may lie below it, which means that it has learned more than a linear one could.",
        "L / ((1 - s)^2 L + s^2) in each eigen direction of the cross spectra; as arXiv 2606.03578 has it of classes",
    ),
    "linear_reference_given_text": Figure(
        "given the caption",
        "The same of what a linear regression on the caption's mean hidden state leaves. Mean, regression and penalty "
        "come from other rows than those whose error it is.",
        "It does not know word order. Variants of one picture in other rows make it too low: name them by --together.",
        "ridge regression in five folds of rows, its penalty chosen within the other folds",
    ),
    "text_r2": Figure(
        "caption to latent R²",
        "The share of the posterior means' variance that the caption explains, linearly, in rows that were not fitted.",
        "It does not say how well a model will follow prompts.",
        "the same regression",
    ),
    "viv": Figure(
        "VIV",
        "The linear reference averaged over noise levels uniform in (0, 1): half of pi times the mean root of the "
        "variances.",
        "It is no second opinion: the same variances under another weight. The published sum grows with the "
        "latent; here it is a mean.",
        "velocity irreducible variance, arXiv 2606.03578, without classes",
    ),
    "lds": Figure(
        "LDS",
        "How much more alike (cosine) two neighbouring places of a latent are than two distant ones.",
        "It does not say what is alike: smooth latents without detail have it too.",
        "local against distant similarity, iREPA, arXiv 2512.10794; distances in proportion to the grid",
    ),
    "neighbours_same_group": Figure(
        "neighbours of one group",
        "The share of the ten nearest rows, by cosine of posterior means, that are of the row's group; rows at random "
        "have the share that is written as chance.",
        "It says little where groups do not show in pictures.",
        "latent neighbours of the same class, arXiv 2606.03578",
    ),
    "high_frequency_share": Figure(
        "high frequencies",
        "The share of the variance at spatial frequencies above half of the highest.",
        "It does not say whether that is detail or noise.",
        "the same spectra; SSVAE, arXiv 2512.05394, argues for low ones",
    ),
    "effective_rank": Figure(
        "effective rank",
        "How many channels the variance of a place amounts to.",
        "It does not say what the other channels are worth: one of little variance may carry text or faces.",
        "exp of the eigenvalues' entropy, Roy and Vetterli 2007",
    ),
    "posterior_share": Figure(
        "posterior share",
        "The share of the encoder's own noise in the variance of the latents that training draws.",
        "It does not say whether the decoder undoes it.",
        "mean of exp(logvar), by the law of total variance",
    ),
}  # fmt: skip


def value_of(column: Json, name: str) -> str:
    """Returns a figure of a column as text, with the one of held-out directions where there is one."""
    value = column[name]
    if value["value"] is None:
        return "–"
    text = value_text(value)
    if (other := column.get(f"{name}_held_out")) is not None:
        text += f" to {value_text(other)}"
    if (chance := value.get("chance")) is not None:
        text += f" (chance {chance:.2f})"
    return text


def page(record: Json) -> str:
    """Returns the HTML of a record of `eval probe`."""
    columns: Sequence[Json] = record["columns"]
    names = [column["name"] for column in columns]
    return page_of(
        Path(__file__).with_name("panel.html.j2"),
        "Columns before training",
        r=record,
        names=names,
        figures=FIGURES,
        value_of=value_of,
        curves=[curve for curve in _curves(columns) if curve],
        intervals={name: _intervals(columns, name) for name in FIGURES},
    )


def _curves(columns: Sequence[Json]) -> list[str]:
    """Returns a chart of each reference over the noise level, a line a column."""
    figures = []
    for name, title in (
        ("linear_reference", "Linear reference by noise level, squared error a value"),
        ("linear_reference_given_text", "Linear reference given the caption, by noise level"),
    ):
        lines, bands = list[charts.Curve](), list[charts.Band]()
        for i, column in enumerate(columns):
            levels = sorted(column.get(f"{name}_by_sigma") or [], key=lambda level: level["sigma"])
            lines.append((column["name"], [(level["sigma"], level["value"]) for level in levels]))
            ends = [(level["sigma"], level["low"], level["high"]) for level in levels]
            bands += [(i, ends)] if ends else []
        figures.append(charts.curves(title, lines, bands=bands, axis="sigma"))
    return figures


def _intervals(columns: Sequence[Json], name: str) -> str:
    """Returns a figure of all columns on one scale; empty text where none has it."""
    lines = [(c["name"], c[name] if c[name]["value"] is not None else None) for c in columns]
    return charts.intervals(name, lines) if any(value for _, value in lines) else ""
