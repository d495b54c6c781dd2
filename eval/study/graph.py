"""What a study has to do, as commands: each a node with what it needs and what it makes.

    encode/columns -> train/ENTRY/seed0 -> generate/ENTRY/seed0/step-00001000 -> score/geneval/ENTRY/seed0/step-00001000

Pure: nothing is read or run. The order is that in which they run one after the other: columns, and
then seed by seed, so that each seed's comparison is whole as early as may be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from encode import ModelSpec

from .config import flag_words
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


def nodes_of(study: Study) -> list[Node]:
    """Returns the nodes of a study in the order in which they run; ids are unique."""
    encoding = list(_encode_nodes(study))
    nodes = [*encoding]
    for seed in study.seeds:
        for entry in study.entries:
            nodes += _train_nodes(study, entry, seed, tuple(node.id for node in encoding))
        sets = [
            _generate_node(study, entry, seed, step)
            for step in study.steps
            for entry in study.entries
        ]
        nodes += sets
        nodes += [score for node in sets for score in _score_nodes(study, node)]
    return nodes


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
    phases = len(study.parts(entry))
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


def _generate_node(study: Study, entry: str, seed: int, step: int) -> Node:
    """Waits for the baseline of its seed, too: the two trainings are compared before any picture."""
    folder, benchmark = study.set_folder(entry, seed, step), study.config.benchmark
    prompts = ("--benchmark", benchmark) if benchmark else ("--prompts", str(study.config.prompts))
    weights = ("--checkpoint", str(study.run_folder(entry, seed)), "--tag", str(step))
    folders = ("--save_dir", str(folder), "--text_cache", str(study.out / "images/text"))
    flags = {k: v for k, v in study.config.generate.items() if k.replace("_", "-") != ALLOW}
    words = [*weights, *prompts, *folders, *flag_words(flags)]
    if allowed := allowed_classes(study):
        words += [f"--{ALLOW}", *allowed]
    trainings = [train_id(study, entry, seed), train_id(study, study.baseline, seed)]
    return Node(
        id=generate_id(entry, seed, step),
        kind="generate",
        command=launch(study, "eval", "generate", *words),
        needs=tuple(dict.fromkeys(trainings)),
        outputs=(folder,),
        entry=entry,
        seed=seed,
        step=step,
    )


def _score_nodes(study: Study, pictures: Node) -> Iterator[Node]:
    (folder,) = pictures.outputs
    for scorer in study.scorers:
        yield Node(
            id=f"score/{scorer.name}/{pictures.id.partition('/')[2]}",
            kind="score",
            command=("python", "-m", "eval", "score", scorer.name, str(folder), *scorer.words),
            needs=(pictures.id,),
            outputs=(folder / "scores",),
            entry=pictures.entry,
            seed=pictures.seed,
            step=pictures.step,
            scorer=scorer.name,
        )
