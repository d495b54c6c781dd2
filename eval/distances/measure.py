"""A set of pictures against real ones, and the paired difference of two sets.

The name of a score says what it may be compared with: `fid-clean-coco30k-val2014-cc256-lanczos-1a2b3c4d` is clean-fid's
FID of the set's benchmark against the reference of this label and digest.
"""

import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import OtherImages, TooFewImages
from ..features.features import Floats, Pictures, extract, folder_of, of_set
from ..features.networks import Network
from ..images.imageset import ImageSetReader
from ..scores import results
from ..scores.results import Score, Value
from ..scores.scorer import name
from . import influences
from .influences import Influence
from .metrics import METRICS, Distance, Metric, least
from .references import Reference

PACKAGES = ("clean-fid", "numpy", "pillow", "torch", "transformers")
UNBIASED = {"kid"}  # metrics that may be compared at different numbers of pictures


def measure(
    kind: str,
    images: ImageSetReader,
    network: Network,
    reference: Reference,
    *,
    few: bool = False,
    batch_size: int = 32,
    prefix: str = "",
    paired: bool = False,
) -> Score:
    """Score a set by an entry of METRICS; keeps features and influences beside it.

    `paired`: the reference is of the originals of the same pictures, in their order, so its chance is theirs too.
    Groups that the reference has too are scored alone, where they have pictures enough.
    """
    metric, pictures = METRICS[kind], of_set(images)
    enough(metric, network, len(pictures), f"{images.folder}", few)
    cut = reference.record["crop"]
    kept = folder_of(images.folder, network, cut)
    features = extract(pictures, network, cut, kept, batch_size)
    title = name(prefix + _title(metric, network, images, reference), images)
    found = metric.distance(features, reference, paired)
    groups, own = _by_group(metric, network, pictures, features, reference, few, paired)
    each_picture = [
        Influence(one.file.prompt.id, one.number, float(all_), one.file.prompt.group, alone)
        for one, all_, alone in zip(images, found.influence, own, strict=True)
    ]
    influences.write(images.folder, title, images.digest, each_picture)
    strata = influences.strata_of(each_picture)
    values = {
        group: influences.value(
            one.value, influences.totals(each_picture, group), strata, _drawn(one.subsets)
        )
        for group, one in groups.items()
    }
    notes = [f"{len(features)} pictures against {len(reference.features)}", metric.note]
    if groups and metric.gaussian:
        notes.append("groups are fewer pictures, so theirs are larger; KID has no such bias")
    return Score(
        scorer=title, benchmark=images.prompts.benchmark, better="lower", groups=values,
        value=influences.value(
            found.value, influences.totals(each_picture), strata, _drawn(found.subsets)
        ),
        prompts=len({i.prompt for i in each_picture}), pictures=len(features), missing=images.missing,
        notes=tuple(notes), images=images.digest, prompt_list=images.prompts.digest,
        made_by={
            "metric": kind, "reference": reference.digest, "reference_label": reference.label, **reference.record,
            "subsets": {group: list(one.subsets) for group, one in {"": found, **groups}.items() if one.subsets},
            "versions": {package: version(package) for package in PACKAGES},
        },
    )  # fmt: skip


def _by_group(
    metric: Metric,
    network: Network,
    pictures: Pictures,
    features: Floats,
    reference: Reference,
    few: bool,
    paired: bool,
) -> tuple[dict[str, Distance], list[float | None]]:
    """The distance of each group that can be scored alone, and each picture's influence on its group's."""
    found: dict[str, Distance] = {}
    own: list[float | None] = [None] * len(features)
    needed = 2 if few else least(metric, network)
    for group in dict.fromkeys(g for g in pictures.groups if g is not None):
        at = np.array([i for i, other in enumerate(pictures.groups) if other == group])
        part = reference.of_group(group)
        if part is None or min(len(at), len(part.features)) < needed:
            continue
        found[group] = metric.distance(features[at], part, paired)
        for i, each in zip(at, found[group].influence, strict=True):
            own[i] = float(each)
    return found, own


def difference(a: Path, b: Path, scorer: str) -> tuple[Value, dict[str, Value]]:
    """b minus a of a distance that both sets were scored with, of all and of each group.

    The sets must share their prompts, and then their seeds: each prompt is taken away from both at once, so what it
    does to both cancels. All but KID are larger of fewer pictures, so both sets must hold the same ones. OtherImages
    where prompts, pictures' numbers or references differ, BadScores where one was not scored.
    """
    first, second = (results.read(folder / results.NAME / f"{scorer}.json") for folder in (a, b))
    for what, found in (
        ("prompts", (first.prompt_list, second.prompt_list)),
        ("reference", (first.made_by.get("reference"), second.made_by.get("reference"))),
    ):
        if found[0] != found[1]:
            raise OtherImages(
                f"{a} and {b}: {scorer} is of another {what} in each. Only sets of the same prompts, scored "
                "against the same reference, are compared"
            )
    ours, theirs = (
        influences.read(folder, scorer, score.images) for folder, score in ((a, first), (b, second))
    )
    numbers = [{(i.prompt, i.number) for i in each} for each in (ours, theirs)]
    if first.made_by.get("metric") not in UNBIASED and numbers[0] != numbers[1]:
        raise OtherImages(
            f"{a} and {b}: {scorer} is of {len(ours)} and of {len(theirs)} pictures, "
            f"{len(numbers[0] & numbers[1])} of them of the same prompt and number. Fewer pictures alone make a larger "
            "distance, so only sets of the same ones are compared: make both whole, or score kid"
        )
    strata = influences.strata_of(ours)

    def apart(group: str | None) -> Value:
        one, other = (influences.totals(each, group) for each in (ours, theirs))
        if one.keys() != other.keys():
            raise OtherImages(
                f"{a} and {b}: {scorer} is of other prompts in each. Score the whole sets"
            )
        parts = {prompt: other[prompt] - one[prompt] for prompt in one}
        drawn = [np.array(s.made_by["subsets"].get(group or "", [])) for s in (first, second)]
        values = [s.value if group is None else s.groups[group] for s in (first, second)]
        return influences.value(
            values[1].value - values[0].value, parts, strata, _drawn(drawn[1] - drawn[0])
        )

    shared = [group for group in first.groups if group in second.groups]
    return apart(None), {group: apart(group) for group in shared}


def enough(metric: Metric, network: Network, count: int, where: str, few: bool) -> None:
    """Raise TooFewImages where a set or a reference has too few pictures for this distance."""
    needed = 2 if few else least(metric, network)
    if count < needed:
        raise TooFewImages(
            f"{where}: found {count} pictures, expected at least {needed} for {metric.prefix}: fewer than features "
            "leave no full covariance. Take more, or `score kid`, or --allow-few: the name then says the number"
        )


def _title(metric: Metric, network: Network, images: ImageSetReader, reference: Reference) -> str:
    parts = [metric.prefix]
    if network.name != metric.usual:
        parts.append(network.name.partition("-")[2])
    parts += [re.sub(r"[^\w.-]+", "-", images.prompts.benchmark), reference.name]
    count = sum(len(file.numbers) for file in images.files)
    if min(count, len(reference.features)) < least(metric, network):
        parts.append(f"few-{count}")
    return "-".join(parts)


def _drawn(subsets: Sequence[float] | NDArray[np.float64]) -> float:
    """What is added to a variance because subsets were drawn, not all of them taken."""
    return float(np.var(subsets, ddof=1) / len(subsets)) if len(subsets) else 0.0
