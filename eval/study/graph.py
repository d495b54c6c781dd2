"""What a study has to do, as commands: each a node with what it needs and what it makes.

    encode/columns -> train/ENTRY/seed0 -> generate/ENTRY/seed0/step-00001000 -> score/geneval/ENTRY/seed0/step-00001000

Where settings are chosen for each entry, sets of half A of the prompts come between, an axis after the other:

    train -> generate/ENTRY/seed0/guidance_scale -> score -> generate/ENTRY/seed0/ema -> score -> generate

Pure: nothing is read or run. The order is that in which they run one after the other: columns, and
then seed by seed, so that each seed's comparison is whole as early as may be; where settings are chosen, which
takes all seeds of an entry, all trainings first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from encode import ModelSpec

from ..images.flags import plain
from ..images.imageset import HALVES
from ..prompts.prompts import Half
from .config import ScorerConfig, flag_words
from .pictures import (
    REPORTED,
    TRIED,
    PictureSet,
    reported_set,
    trial_folder,
    trial_sets,
)
from .study import Study

Kind = Literal["encode", "train", "generate", "score"]
# what a scheduler's signals are handed on by, so that a training saves before it ends
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGUSR2,SIGXCPU,SIGQUIT"


@dataclass(frozen=True, kw_only=True)
class Node:
    """One command of a study, which may be run again at any time and then goes on."""

    id: str  # and the name of its log
    kind: Kind
    command: tuple[str, ...]
    needs: tuple[str, ...]  # ids
    outputs: tuple[Path, ...]
    entry: str = ""
    seed: int | None = None
    phase: int = 0  # index; of a training, where the entry has several
    step: int | None = None
    scorer: str = ""
    sets: tuple[PictureSet, ...] = ()  # that it makes or scores, one an output
    half: Half | None = None  # of the prompts of its sets, that it scores
    axis: str = ""  # of settings, for whose choice its sets or its training are made
    # whether its command depends on a choice that its needs have yet to tell
    open: bool = False


def nodes_of(study: Study) -> list[Node]:
    """Returns the nodes of a study in the order in which they run; ids are unique."""
    encoding = list(_encode_nodes(study))
    needs = tuple(node.id for node in encoding)
    trainings, reported = {}, {}
    for seed in study.seeds:
        trainings[seed] = [
            node for name in study.trainings for node in _train_nodes(study, name, seed, needs)
        ]
        sets = [
            _generate_node(study, entry, seed, step)
            for step in study.steps
            for entry in study.entries
        ]
        reported[seed] = [*sets, *(score for node in sets for score in _score_nodes(study, node))]
    if study.axes:
        trials = [node for axis in study.sampling_axes for node in _trial_nodes(study, axis)]
        return [*encoding, *chain(*trainings.values()), *trials, *chain(*reported.values())]
    return [*encoding, *chain(*(trainings[seed] + reported[seed] for seed in study.seeds))]


def _encode_nodes(study: Study) -> Iterator[Node]:
    stems: Counter[str] = Counter()
    for path, (_, columns) in study.encode_configs.items():
        stems[path.stem] += 1
        again = f"-{stems[path.stem]}" if stems[path.stem] > 1 else ""  # of another folder
        yield Node(
            id=f"encode/{path.stem}{again}",
            kind="encode",
            needs=(),
            command=("python", "-m", "encode", "run", str(path)),
            outputs=tuple(Path(column) for column in columns if "://" not in column),
        )


def train_id(study: Study, entry: str, seed: int, phase: int = -1) -> str:
    entry, phases = study.training_name(entry), len(study.parts(entry))
    part = f"/phase{range(phases)[phase] + 1}" if phases > 1 else ""
    return f"train/{entry}{part}/seed{seed}"


def _train_nodes(study: Study, entry: str, seed: int, needs: tuple[str, ...]) -> Iterator[Node]:
    for phase in range(len(study.parts(entry))):
        config = study.train_config(entry, seed, phase)
        words = [str(study.config_path(entry, phase)), f"seed={seed}"]
        if phase:
            words.append(f"init_from={config.init_from}")
            needs = (train_id(study, entry, seed, phase - 1),)
        online = config.data.encoder is not None  # of ids, in the step
        module = ("eval", "train") if online else ("train",)
        checkpoints = study.run_folder(entry, seed, phase) / "checkpoints"
        steps = sorted({*config.save_at, config.steps})
        yield Node(
            id=train_id(study, entry, seed, phase),
            kind="train",
            needs=needs,
            command=launch(study, *module, *words),
            outputs=tuple(checkpoints / f"step-{step:08d}" for step in steps),
            entry=entry,
            seed=seed,
            phase=phase,
            step=config.steps,
            axis="lr" if "lr" in study.axes else "",
        )


def generate_id(entry: str, seed: int, step: int) -> str:
    return f"generate/{entry}/seed{seed}/step-{step:08d}"


def launch(study: Study, module: str, *words: str) -> tuple[str, ...]:
    """Returns the command that runs a module on all processes of a job."""
    if study.ranks == 1:
        return ("python", "-m", module, *words)
    ranks = ("--nproc-per-node", str(study.ranks), "--signals-to-handle", SIGNALS)
    return ("torchrun", "--standalone", *ranks, "-m", module, *words)


ALLOW = "allow-class"  # a flag of `eval generate`


def allowed_classes(study: Study) -> list[str]:
    """Returns the classes of the user's own that the study's encoders or its `generate` name, which may
    then be imported.
    """
    configs = (config for config, _ in study.encode_configs.values())
    encoders = (column.encoder for config in configs for column in config.columns.values())
    own = {e.cls for e in encoders if isinstance(e, ModelSpec) and e.own}
    for flag, value in study.config.generate.items():
        if flag.replace("_", "-") == ALLOW and value is not None:
            own |= {str(name) for name in (value if isinstance(value, list) else [value])}
    return sorted(own)


def trial_id(entry: str, seed: int, axis: str) -> str:
    return f"generate/{entry}/seed{seed}/{axis}"


def trial_score_id(study: Study, entry: str, seed: int, axis: str) -> str:
    return _score_id(study.scorers[0].name, trial_id(entry, seed, axis))


def _score_id(scorer: str, pictures: str) -> str:
    return f"score/{scorer}/{pictures.partition('/')[2]}"


def _needs(study: Study, entry: str, seed: int, axes: Sequence[str]) -> tuple[str, ...]:
    """Returns what sets of an entry wait for: what the axes before are chosen by, and the trainings of
    its seed, of the entry and of the baseline, which are compared before any picture.
    """
    names = (entry, study.baseline) if "lr" not in study.axes else ()
    needs = [train_id(study, name, seed) for name in names]
    if "lr" in axes:
        of_both = (*study.trainings_of(entry), *study.trainings_of(study.baseline))
        needs += [train_id(study, name, each) for name in of_both for each in study.seeds]
    if axes and axes[-1] != "lr":
        needs += [trial_score_id(study, entry, each, axes[-1]) for each in study.seeds]
    return tuple(dict.fromkeys(needs))


def _trial_nodes(study: Study, axis: str) -> Iterator[Node]:
    """Yields what makes and scores the sets by which an axis of sampling is chosen."""
    before = [*study.axes][: [*study.axes].index(axis)]
    for seed in study.seeds:
        for entry in study.entries:
            sets = trial_sets(study, entry, seed, axis)
            setting = study.setting(entry, [name for name in before if name != "lr"])
            values = [plain(value) for value in study.axes[axis]]
            words = (f"--{axis}", *values, "--half", TRIED)
            folder = trial_folder(study, entry, seed, axis)
            pictures = Node(
                id=trial_id(entry, seed, axis),
                kind="generate",
                command=_generate(study, sets[0], folder, setting, words),
                needs=_needs(study, entry, seed, before),
                outputs=tuple(each.folder for each in sets),
                entry=entry,
                seed=seed,
                step=study.steps[-1],
                sets=sets,
                axis=axis,
                open=not study.is_settled(entry, before),
            )
            yield pictures
            yield _score_node(study, study.scorers[0], pictures)


def _generate_node(study: Study, entry: str, seed: int, step: int) -> Node:
    pictures = reported_set(study, entry, seed, step)
    return Node(
        id=generate_id(entry, seed, step),
        kind="generate",
        command=_generate(study, pictures, pictures.folder, pictures.setting),
        needs=_needs(study, entry, seed, [*study.axes]),
        outputs=(pictures.folder,),
        entry=entry,
        seed=seed,
        step=step,
        sets=(pictures,),
        open=not study.is_settled(entry),
    )


def _generate(
    study: Study, pictures: PictureSet, folder: Path, setting: Mapping[str, float],
    more: tuple[str, ...] = (),
) -> tuple[str, ...]:  # fmt: skip
    """Returns the command that makes sets of a training at a step."""
    benchmark, run = study.config.benchmark, study.run_folder(pictures.entry, pictures.seed)
    prompts = ("--benchmark", benchmark) if benchmark else ("--prompts", str(study.config.prompts))
    weights = ("--checkpoint", str(run), "--tag", str(pictures.step))
    folders = ("--save_dir", str(folder), "--text_cache", str(study.out / "images/text"))
    flags = {k: v for k, v in study.config.generate.items() if k.replace("_", "-") != ALLOW}
    flags |= {name: plain(value) for name, value in setting.items()}
    words = [*weights, *prompts, *folders, *flag_words(flags), *more]
    if allowed := allowed_classes(study):
        words += [f"--{ALLOW}", *allowed]
    return launch(study, "eval", "generate", *words)


def _score_nodes(study: Study, pictures: Node) -> Iterator[Node]:
    """Yields what scores a set that is reported: where settings were chosen on one half of the prompts,
    the other one, and at the last step all prompts too.
    """
    for scorer in study.scorers:
        if study.halved:
            yield _score_node(study, scorer, pictures, REPORTED)
        if not study.halved or pictures.step == study.steps[-1]:
            yield _score_node(study, scorer, pictures)


def _score_node(
    study: Study, scorer: ScorerConfig, pictures: Node, half: Half | None = None
) -> Node:
    part = ("--half", half) if half else ()
    folders = [each.folder / HALVES / half if half else each.folder for each in pictures.sets]
    words = (scorer.name, *(str(each.folder) for each in pictures.sets), *scorer.words, *part)
    return Node(
        id=_score_id(scorer.name, pictures.id) + (f"/half-{half}" if half else ""),
        kind="score",
        command=("python", "-m", "eval", "score", *words),
        needs=(pictures.id,),
        outputs=tuple(folder / "scores" for folder in folders),
        entry=pictures.entry,
        seed=pictures.seed,
        step=pictures.step,
        scorer=scorer.name,
        sets=pictures.sets,
        half=half,
        axis=pictures.axis,
        open=pictures.open,
    )
