"""The subject of a comparison of two sets, and whether they differ in nothing else.

Both follow from the settings of the pictures and from the trainings behind them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from shards.console import brief
from train.checkpoints.identity import TrainingDifferences, compared, leaves

from .entries import RECONSTRUCTION, ScoredSet

Differing = Mapping[str, tuple[Any, Any]]  # a's and b's value by key
SEVERAL = "several settings"
# The subject is the first of these whose setting differs; its further fields cannot but differ too.
SUBJECTS = (
    ("VAEs", "vae", {"vae", "decoding", "norm", "weights", "column"}),
    ("weights", "weights", {"weights", "step", "ema"}),
    ("columns", "column", {"column"}),
)
ROUNDING = {"batch_size", "threads"}  # settings that change rounding only
PROGRESS = {"step", "position"}  # parts of a training
# parts of a training that have the name of a setting of the pictures
NAMES = {"seed": "training seed"}
LISTED = 12  # differences that a warning names
UNPAIRED = ("seed", "prompts")  # alone they leave nothing to compare


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """What two sets compare, and whether they differ in nothing else."""

    subject: str  # "VAEs", "weights", or the one setting that differs
    differ: dict[str, tuple[Any, Any]]  # settings, a's and b's
    training: TrainingDifferences | None  # None: one of the trainings is unknown
    warnings: tuple[str, ...]
    paired: bool | None  # None: as far as is known, but a training is unknown in part
    same_seed: bool  # unless it is known that the trainings had other seeds
    own: tuple[str, ...] = ()  # settings that differ since each entry has its own

    @property
    def sentence(self) -> str:
        if self.paired:
            own = f", each at its own {' and '.join(self.own)}" if self.own else ""
            return f"Compares {self.subject}, on the prompts that both share{own}."
        if self.paired is None:
            return (
                f"Compares {self.subject} as far as is known: how the weights were trained is not known "
                "in full."
            )
        if self.subject in UNPAIRED:
            return f"Compares sets of another {self.subject}: not a paired comparison."
        extent = "" if self.subject == SEVERAL else "more than "
        return f"Compares sets that differ in {extent}{self.subject}."


def pairing_of(a: ScoredSet, b: ScoredSet, own: Collection[str] = ()) -> Pairing:
    """Returns what two sets compare, from their settings and trainings. `own` are keys of both that
    were chosen for each, and are as much part of it as its weights.
    """
    differ = {
        key: (a.settings.get(key), b.settings.get(key))
        for key in sorted(a.settings.keys() | b.settings.keys())
        if a.settings.get(key) != b.settings.get(key)
    }
    trained = a.kind != RECONSTRUCTION and "weights" in differ
    training: TrainingDifferences | None = TrainingDifferences()
    if trained:
        trainings = a.trained and b.trained and (a.trained.training, b.trained.training)
        training = compared(*trainings) if trainings else None
    subject, warnings = subject_of(differ, training, own)
    warnings += [*_other_originals(a, b), *_other_decoder(a), *_other_decoder(b)]
    paired: bool | None = not warnings
    if training is None or training.unknown:
        paired = paired and None
        warnings.append(_unknown(a, b, training))
    return Pairing(
        subject=subject, differ=differ, training=training, warnings=tuple(warnings), paired=paired,
        same_seed=not trained or None in (a.seed, b.seed) or a.seed == b.seed,
        own=tuple(sorted({*differ, *(training.all if training else ())} & set(own))),
    )  # fmt: skip


def subject_of(
    differ: Differing, training: TrainingDifferences | None = None, own: Collection[str] = ()
) -> tuple[str, list[str]]:
    """Returns what sets compare that differ in these settings and in their trainings, and a warning
    that names what else differs, but for `own`.
    """
    settings = differ.keys() - ROUNDING - set(own)
    subject, implied = next(
        ((name, fields) for name, key, fields in SUBJECTS if key in settings), (None, set[str]())
    )
    parts = {} if training is None else training.beside if subject == "VAEs" else training.all
    trained = {NAMES.get(key, key): v for key, v in parts.items() if key not in own}
    if subject == "weights" and trained:
        implied = {"weights"}
        if trained.keys() <= PROGRESS:
            subject, implied = "steps", implied | PROGRESS
        elif len(trained) == 1:
            subject = next(iter(trained))
            implied = implied | {subject}
    one_training = training is not None and not trained and "step" not in settings
    lengths = any(isinstance(value, float) for value in differ.get("ema", ()))
    if subject == "weights" and one_training and lengths:
        subject = "EMA lengths"
    precisions = [v.get("precision") for v in differ.get("decoding", ()) if isinstance(v, Mapping)]
    if len(set(precisions)) > 1:  # the user's choice, not a part of the VAE
        implied = implied - {"decoding"}
    values = {**trained, **differ}
    differing = sorted((settings | trained.keys()) - implied)
    if subject is None:
        subject = (
            differing[0] if len(differing) == 1 else SEVERAL if differing else "equal settings"
        )
    named = "; ".join(
        f"{key} differs ({', '.join(brief(value)[:40] for value in values[key])})"
        for key in differing[:LISTED]
    )
    if len(differing) > LISTED:
        named += f"; and {len(differing) - LISTED} more"
    if subject in UNPAIRED:
        return subject, [f"not a paired comparison: {named}"]
    if not differing or differing == [subject]:
        return subject, []
    return subject, [f"not a paired comparison of {subject} alone: {named}"]


def _unknown(a: ScoredSet, b: ScoredSet, training: TrainingDifferences | None) -> str:
    if training is not None:
        return f"of the trainings this is not known: {', '.join(training.unknown)}"
    names = " and ".join(scored.name for scored in (a, b) if scored.trained is None)
    return (
        f"how the weights of {names} were trained is not known: `python -m eval generate` with the settings of the "
        "set records it, where the checkpoint says it"
    )


def _other_originals(a: ScoredSet, b: ScoredSet) -> list[str]:
    """Returns a warning where two reconstructions are of another source, resolution or rows."""
    first, second = a.originals, b.originals
    if first is None or second is None or first.digest == second.digest:
        return []
    keys = sorted(first.settings.keys() | second.settings.keys())
    changed = [key for key in keys if first.settings.get(key) != second.settings.get(key)]
    reason = f"{', '.join(changed)} differs" if changed else "their pictures differ"
    return [f"of other originals: {reason}"]


def _other_decoder(scored: ScoredSet) -> list[str]:
    """Returns a warning where another VAE decoded the pictures than the model was trained on."""
    data = leaves(scored.trained.training.get("data") if scored.trained else None)
    trained_on = [v for k, v in data.items() if k.endswith(".latents.encoder.weights")]
    vae = scored.settings.get("vae")
    if not trained_on or vae in trained_on:
        return []
    return [
        f"{scored.name}: decoded by the VAE {brief(vae)}, its model was trained on latents of "
        f"{brief(trained_on[0])}"
    ]
