"""The verdict of a study, in sentences: which entry is better by the primary score, and what that covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ...report.compare import Comparison
from ...report.page import change
from ...scores.seeds import ONE_SEED, SEEDS_OF_A_VERDICT

Json = dict[str, Any]
Outcome = Literal["better", "worse", "no difference", "equal", "no verdict"]


@dataclass(frozen=True)
class Verdict:
    """What a study says of an entry against its baseline."""

    entry: str
    outcome: Outcome
    sentence: str
    title: str = ""  # what to read before the sentence


def verdict_of(
    comparison: Comparison,
    scorer: str,
    title: str,
    adjusted: float | None,
    compared: int,
    planned: int,
    edges: str = "",
) -> Verdict:
    """Returns the verdict by one score, which the sentence calls by its title.

    `adjusted` is the difference's p after Holm's step-down over `compared` entries, `planned` how
    many training seeds the study has in all. `edges` is what forbids a verdict though the score has one.
    """
    entry, baseline = comparison.b, comparison.a
    difference = next((d for d in comparison.differences if d.scorer == scorer), None)
    if difference is None:
        return no_score(entry, baseline, title)
    if difference.value is None:
        return Verdict(entry, "no verdict", f"No verdict by {title}: {difference.reason}.")
    if all(d.identical for d in comparison.differences) and not edges:
        zero = "all differences are exactly 0, in every score, training seed and prompt"
        if comparison.same_pictures:
            return Verdict(entry, "equal", f"{entry} and {baseline} are equal: {zero}.")
        sentence = (
            f"No difference shown between {entry} and {baseline}: {zero}, though their pictures differ. The scores "
            "do not tell such pictures apart, as where no picture of either is right."
        )
        return Verdict(entry, "no difference", sentence)
    seeds = len(difference.by_seed) or 1
    part = f" of {planned} planned" if seeds < planned else ""
    prompts = count(difference.value.count, "prompt") if difference.value.count else "its prompts"
    extent = f"over {count(seeds, 'training seed')}{part} and {prompts}"
    if seeds == 1:
        extent = f"over {prompts} and one training seed{part}"
    amount = (
        f"{change(asdict(difference.value))} by {title} ({difference.better} is better), {extent}"
    )
    head = ONE_SEED[0].upper() + ONE_SEED[1:] if seeds == 1 else ""
    if reason := edges or comparison.no_verdict(difference):
        sentence = f"No verdict: {reason}. {entry} minus {baseline} is {amount}."
        return Verdict(entry, "no verdict", sentence, head)
    if difference.resolved is None:
        sentence = (
            f"No verdict: the difference has no interval. {entry} minus {baseline} is {amount}."
        )
        return Verdict(entry, "no verdict", sentence, head)
    winner = comparison.favours(difference, adjusted)
    if winner is None:
        sentence = f"No difference shown between {entry} and {baseline}: {amount}."
        if difference.resolved:
            sentence += (
                f" The interval alone leaves out 0, but {compared} entries are compared with {baseline} (p after "
                f"Holm: {adjusted:.2g})."
            )
        return Verdict(entry, "no difference", sentence, head)
    outcome: Outcome = "better" if winner == entry else "worse"
    return Verdict(entry, outcome, f"{entry} is {outcome} than {baseline}: {amount}.", head)


def no_score(entry: str, baseline: str, title: str) -> Verdict:
    """Returns the verdict where no training seed has the score of both."""
    return Verdict(
        entry, "no verdict",
        f"No verdict yet: no training seed has {title} of both {entry} and {baseline} at the last step.",
    )  # fmt: skip


def count(number: int, noun: str) -> str:
    """Returns "1 seed" or "3 seeds"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def covers(
    seeds: Sequence[int], prompts: int | None, benchmark: str, compared: int, axes: Sequence[str]
) -> list[str]:
    """Returns what the verdicts' intervals cover; `axes` are settings that were chosen for each entry."""
    lines = []
    if len(seeds) >= SEEDS_OF_A_VERDICT:
        names = ", ".join(map(str, seeds))
        lines.append(
            f"{count(len(seeds), 'training seed')} ({names}), each trained for every entry"
        )
    if prompts:
        half = f", which had no part in choosing {listed(axes)}" if axes else ""
        lines.append(f"{count(prompts, 'prompt')} of {benchmark}, the same for every entry{half}")
    if compared > 1:
        lines.append(f"{compared} entries against one baseline, adjusted for their number (Holm)")
    return lines


def listed(names: Sequence[str]) -> str:
    """Returns "a", "a and b", or "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def leaves_open(seeds: int, settings: Json, step: int, axes: Sequence[str]) -> list[str]:
    """Returns what another study would have to tell."""
    lines = []
    if seeds < SEEDS_OF_A_VERDICT:
        lines.append("other training seeds, which may move a score as much as another VAE does")
    scale = settings.get("guidance_scale")
    fixed = isinstance(scale, int | float) and "guidance_scale" not in axes
    guidance = f"guidance {scale:g}, " if fixed else ""
    tuned = f"{listed(axes)} alone were chosen for each" if axes else "none was tuned for an entry"
    lines.append(
        f"other settings of sampling: {guidance}{settings.get('num_inference_steps', '?')} steps and the same noise "
        f"for every entry; {tuned}"
    )
    lines.append(f"longer training than {step:,} steps, other models, other data")
    return lines
