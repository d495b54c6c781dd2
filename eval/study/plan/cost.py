"""What the nodes of a study take: GPU hours and bytes, by arithmetic, or by what earlier nodes took.

    encode      rows x FLOPs of the VAE's encoder          values of the column
    train       samples x FLOPs, as `train plan` counts    checkpoints, each in full, and snapshots of averages
    generate    pictures x steps x forward passes          pictures, as many bytes as a set that exists has
    score       pictures x an assumed time                 -

Decoding pictures, the text encoder's pass over the prompts, saving and starting are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from configs import ConfigError
from encode import EncodeConfig, ModelSpec
from encode.registry import VAES as NAMED_VAES
from shards.console import size_text
from train.checkpoints.snapshots import FOLDER
from train.config import TrainConfig
from train.plan import (
    VAES,
    DataSummary,
    Efficiency,
    Gpu,
    RunPlan,
    Setting,
    data_summary,
    make_plan,
)

from ...errors import BadPrompts
from ...prompts.benchmarks import BENCHMARKS
from ...prompts.prompts import Half
from ..flags import generate_settings
from ..graph import Node
from ..pictures import prompts_of
from ..reuse import column_exists, has_pictures, recorded_digest
from ..study import Study

T = TypeVar("T")
Phase = tuple[str, int]  # an entry, and the index of its phase
# seconds a picture on one GPU, assumed: a detector and CLIP, a VLM that is asked several questions, a VLM that is
# asked once; any other is a small network in one pass
SCORE_SECONDS = {"geneval": 0.2, "dpg": 2.0, "softtifa": 2.0, "genai": 0.3}
OTHER_SECONDS = 0.02
PIXEL_BYTES = 2.0  # of a PNG of a picture; an uncompressed one has three
PROMPT_TOKENS = 20.0  # of a benchmark's prompt, where the prompts are not here
BYTES_PER_TOKEN = 4.2  # of English prompts
COLUMN_MARGIN = 1.02  # indices and records beside a column's values
SIDE = 8  # pixels of a side of the picture that one of the latent stands for
# what bytes are of, as the plan's JSON names it
COLUMNS, SCORED, OTHERS, SNAPSHOTS, PICTURES = PARTS = (
    "columns",
    "scored_checkpoints",
    "other_checkpoints",
    "ema_snapshots",
    "pictures",
)


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What is assumed of the machines, and of columns that do not exist yet."""

    gpus: int = 1
    gpu: Gpu | None = None
    efficiency: Efficiency = Efficiency()
    price: float | None = None  # of a GPU hour
    samples: Sequence[float] | None = None  # rows of each source
    tokens: float | None = None  # a caption


@dataclass(frozen=True)
class Files:
    """Files of one part of what a node writes: a column, a checkpoint, a snapshot or a set each."""

    part: str  # of PARTS
    bytes: float  # of all that are still to be written
    each: float  # bytes of one


@dataclass(frozen=True)
class NodeCost:
    node: Node
    # None: no GPU is named, and no node of the kind has run
    gpu_hours: float | None
    measured: bool  # by a node of this study, else assumed
    files: tuple[Files, ...]
    place: str  # folder or url below which they go

    @property
    def bytes(self) -> float:
        return sum(files.bytes for files in self.files)


Cost = tuple[float | None, tuple[Files, ...], str]  # hours, files and place of a node


class Costs:
    """Counts what each node of a study takes. `seconds` of nodes that are done come before FLOPs.

    Each training is planned once, not once a seed; what differs in its columns' names alone, too.
    """

    def __init__(
        self, study: Study, assumptions: Assumptions, seconds: Mapping[str, float] | None = None
    ) -> None:
        self.study, self.assumptions = study, assumptions
        self._seconds = seconds or {}

    def of(self, nodes: Iterable[Node]) -> list[NodeCost]:
        """Returns the cost of each node as if nothing of it existed."""
        nodes = list(nodes)
        measured = self._measured(nodes)
        costs = []
        for node in nodes:
            hours, files, place = self._by_kind[node.kind](node)
            rate = measured.get(_like(node)) or measured.get((node.kind, node.scorer))
            if rate is not None:
                hours = rate * self._work(node) * self._ranks(node) / 3600
            costs.append(NodeCost(node, hours, rate is not None, files, place))
        return costs

    def _measured(self, nodes: Iterable[Node]) -> dict[tuple[object, ...], float]:
        """Returns seconds by work of the slowest node of each sort: one that was interrupted says less."""
        most: dict[tuple[object, ...], float] = {}
        for node in nodes:
            if (seconds := self._seconds.get(node.id)) is None or node.kind == "encode":
                continue
            for key in (_like(node), (node.kind, node.scorer)):
                most[key] = max(most.get(key, 0.0), seconds / self._work(node))
        return most

    def _work(self, node: Node) -> float:
        """Returns the FLOPs of a training, which differ between entries; pictures of other nodes."""
        if node.kind != "train":
            return float(self._pictures_of(node)) or 1.0
        plan = self.plans[node.entry, node.phase]
        return plan.samples * plan.flops

    def _ranks(self, node: Node) -> int:
        return self.ranks if node.kind in ("train", "generate") else 1

    @property
    def ranks(self) -> int:
        """GPUs of a training: as the study says, else all."""
        return self.study.config.ranks or self.assumptions.gpus

    @property
    def _by_kind(self) -> Mapping[str, Callable[[Node], Cost]]:
        return {
            "encode": self._encode, "train": self._train, "generate": self._generate, "score": self._score,
        }  # fmt: skip

    # Columns and trainings ------------------------------------------------------------------------

    @cached_property
    def data(self) -> dict[Phase, DataSummary]:
        """What is known of the columns of each entry and phase: read from them, or from `data.expect`.
        Where neither says it, they are taken to be as another entry's; ConfigError if there is none.
        """
        known: dict[Phase, DataSummary] = {}
        missing: dict[Phase, ConfigError] = {}
        for entry, phase in self._phases():
            config = self._config(entry, phase)
            alone = config.model_copy(update={"data": config.data.model_copy(update={"also": ()})})
            try:
                known[entry, phase] = data_summary(
                    alone, self.assumptions.samples, self.assumptions.tokens
                )
            except ConfigError as error:
                missing[entry, phase] = error
        for (entry, phase), reason in missing.items():
            from_end = phase - len(self.study.parts(entry))
            like = next((e for e, p in known if p - len(self.study.parts(e)) == from_end), None)
            if like is None:
                raise reason
            summary = known[like, from_end + len(self.study.parts(like))]
            note = f"{entry}: no column and no data.expect, so its sizes are taken to be those of {like}"
            known[entry, phase] = replace(summary, notes=(note,))
        return known

    def notes(self) -> list[str]:
        """Returns what is said of the data: columns that are missing, and what is assumed of them."""
        configs = [self._config(*key).data.resolved() for key in self._phases()]
        texts = [text for config in configs for text in several(config.text)]
        lines = []
        columns = (column for config in configs for column in several(config.latents))
        if missing := _missing(columns):
            lines.append(f"no latent columns yet, so their sizes are assumed: {_listed(missing)}")
        encoded = {c for _, folders in self.study.encode_configs.values() for c in folders}
        if unmade := [column for column in missing if column not in encoded]:
            lines.append(
                "no encoder makes these, so `study run` will refuse: give their entries an `encoder`, or encode "
                f"them before: {_listed(unmade)}"
            )
        if missing := _missing(c for t in texts for c in ((t,) if isinstance(t, str) else t)):
            lines.append(
                f"no columns of text yet, which a study does not make (`python -m encode run`): {_listed(missing)}"
            )
            data = next(iter(self.data.values()))
            if data.rows:
                size = size_text(data.rows * data.tokens * data.token_bytes)
                lines[-1] += f"; about {size} as bfloat16 tokens"
        if self.study.encode_configs and not any(data.rows for data in self.data.values()):
            lines.append(
                "rows of the sources are not known, so hours and bytes of columns to be made are not counted: "
                "give --samples"
            )
        others = (note for data in self.data.values() for note in data.notes)
        return lines + [note for note in dict.fromkeys(others) if not note.startswith("no columns")]

    @cached_property
    def plans(self) -> dict[Phase, RunPlan]:
        """The plan of a training of each entry and phase, as `python -m train plan` makes it."""
        by_content: dict[str, RunPlan] = {}
        plans = {}
        a = self.assumptions
        setting = Setting(self.ranks, a.gpu, a.efficiency, a.price)
        for entry, phase in self._phases():
            config, data = self._config(entry, phase), self.data[entry, phase]
            key = config.model_dump_json(exclude={"data", "init_from"}) + repr(
                (replace(data, notes=()), config.data.expect)
            )
            if key not in by_content:
                by_content[key] = make_plan(config, data, setting)
            plans[entry, phase] = by_content[key]
        return plans

    def _phases(self) -> list[Phase]:
        return [(e, p) for e in self.study.trainings for p in range(len(self.study.parts(e)))]

    def _config(self, entry: str, phase: int) -> TrainConfig:
        return self.study.train_config(entry, self.study.seeds[0], phase)

    # Kinds of nodes -------------------------------------------------------------------------------

    def _encode(self, node: Node) -> Cost:
        """Returns hours and bytes of the columns that a node makes, of which the study reads some."""
        config, folders = next(
            value for path, value in self.study.encode_configs.items() if str(path) in node.command
        )
        flops, sizes, counted = 0.0, list[float](), set[str]()
        for entry, phase in self._phases():
            latents = several(self._config(entry, phase).data.resolved().latents)
            if not set(folders) & set(latents) - counted or all(map(column_exists, latents)):
                continue
            counted |= set(latents)
            data = self.data[entry, phase]
            if (rows := self._rows(phase - len(self.study.parts(entry)))) is None:
                return None, (), config.root
            flops += rows * encoder_flops(config, latents[0], data.shape.height * SIDE)
            sizes.append(rows * data.latent_bytes * COLUMN_MARGIN)
        gpu, share = self.assumptions.gpu, self.assumptions.efficiency.vae
        files = Files(COLUMNS, sum(sizes), max(sizes, default=0.0))
        return (flops / gpu.peak / share / 3600 if gpu else None), (files,), config.root

    def _rows(self, from_end: int) -> float | None:
        """Returns the rows of the sources, where the column of some entry or --samples says them."""
        rows = (
            data.rows
            for (entry, phase), data in self.data.items()
            if phase - len(self.study.parts(entry)) == from_end
        )
        return next((count for count in rows if count is not None), None)

    def _train(self, node: Node) -> Cost:
        """Returns hours and bytes of a training; the bytes without what its run has written already."""
        plan = self.plans[node.entry, node.phase]
        config = self._config(node.entry, node.phase)
        run = self.study.run_folder(node.entry, node.seed or 0, node.phase)
        counts, written = files_of_run(config), written_bytes(run, config)
        each = {
            SCORED: plan.checkpoint_bytes,
            OTHERS: plan.checkpoint_bytes,
            SNAPSHOTS: plan.snapshot_bytes / max(counts[SNAPSHOTS], 1),
        }
        files = tuple(
            Files(part, max(0.0, counts[part] * size - written[part]), size)
            for part, size in each.items()
        )
        return plan.gpu_hours, files, str(self.study.out)

    def _generate(self, node: Node) -> Cost:
        name = self.study.training_name(node.entry)
        plan = self.plans[name, len(self.study.parts(name)) - 1]
        flags, tokens = self._flags, self.prompt_tokens
        steps, passes = flags["num_inference_steps"], 0.0
        for each in node.sets:
            guided = (flags | dict(each.setting))["guidance_scale"] > 1
            # the second pass is on the empty caption, of one token
            of_one = plan.forward.of(1, tokens) + (plan.forward.of(1, 1) if guided else 0.0)
            passes += steps * of_one * self._pictures(each.half)
        shape = plan.data.shape
        size = self._set_bytes.get(node.entry)
        if size is None:
            size = self.pictures * PIXEL_BYTES * shape.height * shape.width * SIDE**2
        size *= self._pictures_of(node) / max(self.pictures, 1)
        gpu, share = self.assumptions.gpu, self.assumptions.efficiency.dit
        hours = passes / gpu.peak / share / 3600 if gpu else None
        return hours, (Files(PICTURES, size, size),), str(self.study.out)

    @cached_property
    def _flags(self) -> dict[str, Any]:
        """The flags of `eval generate`. Their averages are checked at each step, which takes a moment."""
        return generate_settings(self.study)

    def _pictures(self, half: Half | None) -> int:
        """Returns the pictures of a set, of all prompts or of a half."""
        return self._prompts[0] // (2 if half else 1) * self.study.images_per_prompt

    def _pictures_of(self, node: Node) -> int:
        """Returns the pictures that a node makes or scores."""
        return sum(self._pictures(node.half or each.half) for each in node.sets)

    @cached_property
    def _set_bytes(self) -> dict[str, float]:
        """Returns the bytes of a set of each entry that has one, with what scorers keep beside the pictures."""
        study, sizes = self.study, dict[str, float]()
        for entry, seed, step in product(study.entries, study.seeds, study.steps):
            folder = study.set_folder(entry, seed, step)
            if entry not in sizes and recorded_digest(folder) and has_pictures(folder):
                sizes[entry] = folder_bytes(folder)
        return sizes

    def _score(self, node: Node) -> Cost:
        seconds = self._pictures_of(node) * SCORE_SECONDS.get(node.scorer, OTHER_SECONDS)
        return (seconds / 3600 if self.assumptions.gpu else None), (), str(self.study.out)

    @cached_property
    def _prompts(self) -> tuple[int, float]:
        """Prompts and their mean tokens; of the whole benchmark where its prompts are not here."""
        try:
            items = prompts_of(self.study).items
        except BadPrompts:
            count = BENCHMARKS[self.study.benchmark].prompts
            if count is None:
                raise
            return count, PROMPT_TOKENS
        lengths = [len(prompt.text.encode()) / BYTES_PER_TOKEN + 1 for prompt in items]
        return len(items), sum(lengths) / max(len(lengths), 1)

    @property
    def pictures(self) -> int:
        """Pictures of a set."""
        return self._prompts[0] * self.study.images_per_prompt

    @property
    def prompt_tokens(self) -> float:
        return self._prompts[1]


def _like(node: Node) -> tuple[object, ...]:
    """Returns what nodes of about the same cost have in common."""
    return node.kind, node.scorer, node.entry, node.phase


def files_of_run(config: TrainConfig) -> dict[str, int]:
    """Returns how many checkpoints and snapshots of averages a run has at most: checkpoints of
    `save_at`, which stay; the last `keep` others, and one that is written before the oldest goes.
    """
    named = _named(config)
    others = {*range(config.save_every, config.steps + 1, config.save_every), config.steps} - named
    snapshots = min(config.ema.snapshots, config.steps) if config.ema.power else 0
    return {SCORED: len(named), OTHERS: min(config.keep + 1, len(others)), SNAPSHOTS: snapshots}


def _named(config: TrainConfig) -> set[int]:
    """Returns the steps whose checkpoints stay."""
    return {step for step in config.save_at if step <= config.steps}


def several(value: T | tuple[T, ...]) -> tuple[T, ...]:
    return value if isinstance(value, tuple) else (value,)


def _missing(columns: Iterable[str]) -> list[str]:
    return [column for column in dict.fromkeys(columns) if not column_exists(column)]


def _listed(columns: Sequence[str]) -> str:
    """Returns the columns' names, and where the first is looked for."""
    names = dict.fromkeys(column.rstrip("/").rpartition("/")[2] for column in columns)
    return f"{', '.join(names)} (such as {columns[0]})"


def written_bytes(run: Path, config: TrainConfig) -> dict[str, int]:
    """Returns the bytes of the checkpoints and snapshots that a run has already."""
    names = {f"step-{step:08d}" for step in _named(config)}
    sizes = {SCORED: 0, OTHERS: 0, SNAPSHOTS: 0}
    for step in run.glob("checkpoints/step-*"):
        sizes[SCORED if step.name in names else OTHERS] += folder_bytes(step)
    sizes[SNAPSHOTS] = sum(map(folder_bytes, run.glob(f"{FOLDER}/step-*")))
    return sizes


def folder_bytes(folder: Path) -> int:
    """Returns the bytes of the files of a folder and of those below it."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def encoder_flops(config: EncodeConfig, latents: str, side: int) -> float:
    """Returns the FLOPs of encoding one picture of that side for a column. FLOPs of other sides than
    those counted follow the number of pixels; a VAE of one's own counts as FLUX's.
    """
    encoder = config.columns[latents.rstrip("/").rpartition("/")[2]].encoder
    spec = encoder if isinstance(encoder, ModelSpec) else NAMED_VAES.get(encoder)
    by_side = VAES["Qwen-Image" if spec and "Qwen" in spec.cls else "FLUX, SD-3.5"]
    return 1e9 * by_side.get(side, by_side[256] * (side / 256) ** 2)
