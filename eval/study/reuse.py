"""What exists of a study and fits it: made by the study itself, or by hand.

A run fits where the newest checkpoint's own record says of its training what the config and its
columns say: all that moves the weights, the rows by their digest. A set of pictures fits where it
is of these weights, prompts, seed and sampler; a score where it is of these pictures and by these
flags. So a node is done or not whatever was killed before, and an entry or a seed more leaves the
others as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import isclose
from pathlib import Path
from typing import Any

from configs import ConfigError
from shards import (
    Column,
    IncompleteColumn,
    NotAColumn,
    ShardsError,
    open_store,
)
from shards.format import COLUMN, VERSION
from shards.format.atomic import read_json
from train.checkpoints.checkpoint import WHOLE, CheckpointError, manifest_of
from train.checkpoints.folders import steps
from train.checkpoints.identity import TABLE, compared, training_of
from train.checkpoints.snapshots import EmaLengthRefused, digest_of_length, refuse_planned
from train.config import TrainConfig
from train.report import validated
from train.run import expected_record

from ..errors import BadPrompts, BadScores, EvalError
from ..images.checks import (
    difference_text,
    read_manifest,
    read_set_prompts,
    removed_files,
    set_digest,
)
from ..images.layouts import LAYOUTS
from ..images.runs import Run
from ..prompts.prompts import Half, Prompts
from ..scores import results
from ..scores.aggregate import means_of
from ..scores.results import Score
from .axes import METRICS, loss_at, other_validation
from .flags import generate_settings
from .graph import Node, nodes_of
from .pictures import PictureSet, prompts_of
from .study import Study

Json = dict[str, Any]
PROGRESS = {"step", "position"}  # of a training: a longer run has the steps of a shorter one
# of a text encoder in the step, which is not loaded here; TABLE is of the weights that a run starts from
FROM_ENCODER = ("model.text_width", "data.text_encoder")
DEEP = 3  # parts of a set's path that are the same when a study's folder is moved
ROUNDING = ("batch_size", "threads")  # settings of a set that change rounding only
THEN = "{} there, {} now"


@dataclass
class Existing:
    """What exists of a study; columns and prompts are read once."""

    study: Study
    _expected: dict[tuple[str, int, Path | None], Json] = field(default_factory=dict)

    # Nodes ----------------------------------------------------------------------------------------

    def done(self, node: Node) -> bool:
        """Whether all that a node makes exists and fits."""
        if node.kind == "encode":
            _, columns = self.study.encode_configs[Path(node.command[-1])]
            return all(map(column_exists, columns))
        assert node.seed is not None
        if node.open:
            return False
        if node.kind == "train":
            return self.trained(node.entry, node.seed, node.phase)
        if node.kind == "generate":
            for each in node.sets:
                if self.set_differences(each) != [] or recorded_digest(each.folder) is None:
                    return False
            kept = all(has_pictures(each.folder) for each in node.sets)
            return kept or all(map(self.score_names, self._scores_of[node.id]))
        return bool(self.score_names(node))

    @cached_property
    def _scores_of(self) -> dict[str, list[Node]]:
        """The nodes that score a set, by the id of the node that makes it."""
        nodes: dict[str, list[Node]] = defaultdict(list)
        for node in nodes_of(self.study):
            for need in node.needs if node.kind == "score" else ():
                nodes[need].append(node)
        return nodes

    def trained(self, entry: str, seed: int, phase: int) -> bool:
        """Whether a run of this training has all that is wanted of it."""
        run = self.study.run_folder(entry, seed, phase)
        wanted = self.study.train_config(entry, seed, phase)
        file = self.weights_file(entry, phase)
        last = phase + 1 == len(self.study.parts(entry))
        if last and "lr" in self.study.axes and self.validation_loss(entry, seed) is None:
            return False  # a signal may have kept it from its last validation
        if run == self.study.own_run_folder(entry, seed, phase) and self._cut_short(run, wanted):
            return False
        return has_steps(run, wanted, file) and self.run_differences(entry, seed, phase, run) == []

    def _cut_short(self, run: Path, wanted: TrainConfig) -> bool:
        """Whether a signal kept a run from the validation of its last step, which it makes when it goes on.
        Metrics that were removed say nothing of it.
        """
        metrics, manifest = run / METRICS, self.newest(run)
        if manifest is None or manifest["step"] != wanted.steps or not metrics.is_file():
            return False
        validation = manifest["config"].get("validation") or {}  # as it was when the run ended
        if wanted.validation.source is None or validation.get("source") is None:
            return False
        try:
            return not validated(metrics, wanted.steps)
        except ConfigError:
            return False

    def validation_loss(self, entry: str, seed: int) -> float | None:
        """Returns the loss of a run's validation at its last step; None where its metrics have none."""
        step = self.study.train_config(entry, seed).steps
        return loss_at(self.study.run_folder(entry, seed), step)

    def score_names(self, node: Node) -> list[str]:
        """Returns the names of the scores that a node made of the pictures that are there now, the same of
        all its sets.
        """
        record = read_record(self.study, node.id)
        if record is None or not is_record_of(record, node) or record.get("exit_code"):
            return []
        names = names_in(record)
        beside = record.get("beside")  # items, without which no difference has an interval
        names_beside = (
            [name for name in beside if isinstance(name, str)] if isinstance(beside, list) else []
        )
        for pictures, folder in zip(node.sets, node.outputs, strict=True):
            if not all((folder / name).is_file() for name in names_beside):
                return []
            digest = recorded_digest(pictures.folder, node.half)
            try:
                scores = [read_whole(folder / f"{name}.json") for name in names]
            except (EvalError, ShardsError, OSError, ValueError):
                return []
            if digest is None or any(score.images != digest for score in scores):
                return []
        return names

    # Runs -----------------------------------------------------------------------------------------

    def training(self, entry: str, seed: int, phase: int = -1) -> Json | None:
        """Returns the training that a run would be, None while its columns do not exist."""
        phase = range(len(self.study.parts(entry)))[phase]
        config = self.study.train_config(entry, seed, phase)
        key = entry, phase, config.init_from  # a later phase starts from another run for each seed
        if key not in self._expected:
            try:
                record = expected_record(config, self.study.ranks)
            except (NotAColumn, IncompleteColumn):
                return None
            if "init" not in record:  # the run that it starts from does not exist yet
                return training_of(record)
            self._expected[key] = record
        record = self._expected[key]
        return training_of(record | {"config": config.model_dump(mode="json")})

    def run_differences(self, entry: str, seed: int, phase: int, run: Path) -> list[str] | None:
        """Returns in what the training in a folder is another than the study's; None without one."""
        manifest = self.newest(run)
        if manifest is None:
            return None
        recorded, wanted = training_of(manifest), self.training(entry, seed, phase)
        if wanted is None:  # its columns are gone, or not yet made: by their names then
            config = self.study.train_config(entry, seed, phase)
            dump = {"config": config.model_dump(mode="json"), "step": config.steps}
            wanted = training_of(dump)
            earlier = TrainConfig.model_validate(manifest["config"]).data.resolved()
            current = config.data.resolved()
            pairs = {k: (getattr(earlier, k), getattr(current, k)) for k in ("latents", "text")}
            named = {f"data.{k}": pair for k, pair in pairs.items() if pair[0] != pair[1]}
        else:
            named = {}
        if phase + 1 == len(self.study.parts(entry)):
            named |= self._too_few_snapshots(entry, seed, manifest)
            if "lr" in self.study.axes:
                named |= other_validation(manifest, self.study.train_config(entry, seed))
        differ = compared(recorded, wanted)
        unknown = FROM_ENCODER if "init" in wanted else (*FROM_ENCODER, *TABLE)
        lines = named | {
            key: values
            for key, values in differ.all.items()
            if key not in PROGRESS and not key.startswith(unknown)
        }
        return [difference_text(key, *values, THEN) for key, values in lines.items()]

    def _too_few_snapshots(
        self, entry: str, seed: int, manifest: Json
    ) -> dict[str, tuple[Any, Any]]:
        """Returns the averages that a run keeps where the length that is sampled cannot be made of them."""
        named = [] if self.flags["ema"] is None else [self.flags["ema"]]
        lengths = [*named, *self.study.axes.get("ema", ())]
        if not lengths:
            return {}
        config = TrainConfig.model_validate(manifest["config"])
        try:
            for step, length in product(self.study.steps, lengths):
                refuse_planned(config.ema, config.steps, step, length)
        except EmaLengthRefused:
            wanted = self.study.train_config(entry, seed).ema
            return {"ema": (config.ema.model_dump(), wanted.model_dump())}
        return {}

    def newest(self, run: Path) -> Json | None:
        """Returns the manifest of a run's newest checkpoint that can be read, None without one."""
        for path in steps(run / "checkpoints"):
            with suppress(CheckpointError, OSError):
                manifest = manifest_of(path)
                if "config" in manifest:
                    return manifest
        return None

    # Sets -----------------------------------------------------------------------------------------

    def set_differences(self, pictures: PictureSet, folder: Path | None = None) -> list[str] | None:
        """Returns in what the settings of a set, that of a folder made by hand where one is named, are
        others than the study's; None where there is none.
        """
        folder = folder or pictures.folder
        if not (folder / "manifest.json").is_file():
            return None
        settings = read_manifest(folder / "manifest.json")["settings"]
        wanted = self._settings(pictures)
        if not folder.is_relative_to(self.study.out):
            wanted = {key: value for key, value in wanted.items() if key not in ROUNDING}
        return [
            difference_text(key, settings.get(key), value, THEN)
            for key, value in wanted.items()
            if settings.get(key) != value
        ]

    def _settings(self, pictures: PictureSet) -> Json:
        """Returns the settings that a set will have, as far as they are known without loading models."""
        flags = self._flags_of(pictures)
        names = ("num_inference_steps", "guidance_scale", "sampler", "seed")
        settings = {name: flags[name] for name in names} | {
            "guidance_interval": flags["guidance_interval"] and list(flags["guidance_interval"]),
            "ema": flags["ema_weights"] if flags["ema"] is None else flags["ema"],
            "images_per_prompt": self.study.images_per_prompt,
            "step": pictures.step,
            "half": pictures.half,
        }
        settings |= {k: flags[k] for k in ("resolution", "batch_size") if flags[k] is not None}
        if self.prompts is not None:
            prompts = self.prompts.half(pictures.half) if pictures.half else self.prompts
            settings |= {"prompts": prompts.digest, "benchmark": prompts.benchmark}
        if (weights := self.weights(pictures)) is not None:
            settings["weights"] = weights
            run = Run(weights, training_of(manifest_of(self._checkpoint(pictures))))
            settings["shift"] = run.other_shift(flags["shift"])
        return settings

    @cached_property
    def flags(self) -> Json:
        return generate_settings(self.study)

    @cached_property
    def prompts(self) -> Prompts | None:
        """The study's prompts; None while they are not here."""
        try:
            return prompts_of(self.study)
        except BadPrompts:
            return None

    def _flags_of(self, pictures: PictureSet) -> Json:
        flags: Json = self.flags | dict(pictures.setting)
        return flags

    def weights(self, pictures: PictureSet) -> str | None:
        """Returns the digest of the weights that are sampled; None while they do not exist."""
        try:
            if (length := self._flags_of(pictures)["ema"]) is not None:
                return digest_of_length(self._checkpoint(pictures), length)
            files = manifest_of(self._checkpoint(pictures))["files"]
            return str(files[self.weights_file(pictures.entry)]["sha256"])
        except (CheckpointError, EmaLengthRefused, KeyError):
            return None

    def weights_file(self, entry: str, phase: int = -1) -> str:
        """Returns which weights of a run are used: those that are sampled, or that its next phase
        starts from."""
        phase = range(len(self.study.parts(entry)))[phase]
        if phase + 1 == len(self.study.parts(entry)):
            return WHOLE["ema" if self.flags["ema_weights"] else "weights"]
        after = self.study.train_config(entry, self.study.seeds[0], phase + 1)
        return WHOLE["ema" if after.init_ema else "weights"]

    def _checkpoint(self, pictures: PictureSet) -> Path:
        run = self.study.run_folder(pictures.entry, pictures.seed)
        return run / "checkpoints" / f"step-{pictures.step:08d}"


def column_exists(place: str) -> bool:
    """Whether a column is complete."""
    try:
        Column.open(place).close()
    except (NotAColumn, IncompleteColumn):
        return False
    return True


def column_identity(place: str) -> Json:
    """Returns what a column, complete or not, says that it was made from and how; empty without one."""
    store = open_store(place)
    if store.size("column.json") is None:
        return {}
    return dict(store.unseal("column.json", COLUMN, VERSION)["identity"])


def has_steps(run: Path, config: TrainConfig, file: str) -> bool:
    """Whether a run has the checkpoints that a study samples from, and the last, with these weights."""
    wanted = {*config.save_at, config.steps}
    return all(is_saved(run / "checkpoints" / f"step-{step:08d}", file) for step in wanted)


def is_saved(checkpoint: Path, file: str) -> bool:
    """Whether a checkpoint has these weights, by their size: the digest is checked when they are read."""
    try:
        entry = manifest_of(checkpoint)["files"][file]
        return bool((checkpoint / file).stat().st_size == entry["bytes"])
    except (CheckpointError, ShardsError, KeyError, OSError):
        return False


def recorded_digest(folder: Path, half: Half | None = None) -> str | None:
    """Returns the digest of a complete set, or of its pictures of a half of the prompts, from its
    manifest; None while it is not complete, or lacks a file that was not removed on purpose.
    """
    try:
        manifest = read_manifest(folder / "manifest.json")
        if not manifest["complete"]:
            return None
        needed = manifest["files"].keys() - removed_files(folder, manifest)
    except (EvalError, ShardsError, OSError):
        return None
    if not _are_files(folder, needed):
        return None
    if half is None:
        return set_digest(manifest)
    settings, digests = manifest["settings"], manifest["files"]
    try:
        prompts = read_set_prompts(folder / "prompts.json", settings).half(half)
    except (EvalError, OSError):
        return None
    files = LAYOUTS[settings["layout"]].files(prompts, settings["images_per_prompt"])
    of_half = {file.path: digests[file.path] for file in files}
    return set_digest({"settings": settings | {"half": half}, "files": of_half})


def has_pictures(folder: Path) -> bool:
    """Whether all pictures of a complete set are there: none was removed once it was scored."""
    return _are_files(folder, read_manifest(folder / "manifest.json")["files"])


def _are_files(folder: Path, names: Iterable[str]) -> bool:
    return all((folder / "images" / name).is_file() for name in names)


def read_record(study: Study, node: str) -> Json | None:
    """Returns when a node ran and how it ended; None where it did not, or nothing can be read."""
    try:
        record = read_json(study.log(node).with_suffix(".json"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def is_record_of(record: Json, node: Node) -> bool:
    """Whether a record is of a scoring by the same command, wherever the study's folder was then."""
    command = record.get("command")
    if not isinstance(command, list) or len(command) != len(node.command):
        return False
    own = {str(each.folder) for each in node.sets}

    def moved(then: str, now: str) -> bool:
        return now in own and Path(then).parts[-DEEP:] == Path(now).parts[-DEEP:]

    words = zip(command, node.command, strict=True)
    return all(then == now or moved(str(then), now) for then, now in words)


def names_in(record: Json) -> list[str]:
    """Returns the names of the scores that a record says were written; none where it was edited."""
    names = record.get("scores")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return []
    return names


def read_whole(path: Path) -> Score:
    """Returns a score; BadScores, OSError or ValueError where it or its items were changed."""
    score, items = results.read(path), results.read_items(path)
    if items and not isclose(
        means_of(items, score.overall, score.unit)[0], score.value.value, rel_tol=1e-6, abs_tol=1e-9
    ):
        raise BadScores(f"{path}: its items do not add up to it. Score the set again")
    return score
