"""What a study consists of: its entries, seeds and scored steps, and the config and folders of each run.

    OUT/study.yaml                     the study as it was last run
    OUT/configs/ENTRY.yaml             a training config of each entry, ENTRY-phase1.yaml of its phases
    OUT/runs/                          the runs, named by the trainer's own rule
    OUT/images/ENTRY-seed0/step-00001000/    sets of pictures with their scores
    OUT/settle/ENTRY-seed0/at-.../    sets of half A of the prompts, by which settings are chosen for an entry
    OUT/logs/NODE.log, NODE.json       output of each command, and when it ran

Nothing is read here but the configs; what exists is found by `reuse`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import configs
from encode import EncodeConfig
from train.config import TrainConfig, run_folder

from ..errors import BadStudy
from ..prompts.benchmarks import BENCHMARKS
from .axes import averages_of, scored_steps, setting_names, with_rate
from .config import Part, ScorerConfig, StudyConfig, encode_config_path, is_encode_config

SAYS_NOTHING = {"log_every", "save_every", "save_at", "keep", "runs"}  # keys that move no weight
LISTED = 4  # columns that a message names
Run = tuple[str, int, int]  # entry, seed and the index of a phase
Set = tuple[str, int, int]  # entry, seed and step


@dataclass(frozen=True)
class Study:
    """A study's config, put together with the training config that it names.

    `hand_runs` and `hand_sets`: folders made by hand that fit, which `earlier.take_over` finds.
    """

    config: StudyConfig
    path: Path  # of its YAML
    out: Path
    jobs: int = 1  # commands at a time, among which the GPUs are divided
    hand_runs: Mapping[Run, Path] = field(default_factory=dict)
    hand_sets: Mapping[Set, Path] = field(default_factory=dict)
    # what is chosen for each entry so far: the value by axis
    settled: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, out: Path | None = None, jobs: int = 1) -> Study:
        """Reads the YAML and every config that it names; ConfigError or BadStudy says what is wrong."""
        config = configs.load(StudyConfig, path, takes_words=False)
        study = cls(config, path, out or Path("studies") / path.stem, jobs)
        for entry in study.entries:
            for phase in range(len(study.parts(entry))):
                study._loaded(entry, phase)
        study.refuse_equal_entries()
        study.refuse_shared_folders()
        _ = study.steps, study.encode_configs
        return study

    @cached_property
    def entries(self) -> tuple[str, ...]:
        """The names of all entries, the baseline first."""
        return (self.baseline, *(name for name in self.config.entries if name != self.baseline))

    @property
    def baseline(self) -> str:
        return self.config.baseline or next(iter(self.config.entries))

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.config.seeds

    @property
    def scorers(self) -> tuple[ScorerConfig, ...]:
        """The scorers, the primary one first."""
        return self.config.all_scorers

    @property
    def benchmark(self) -> str:
        return self.config.benchmark or "prompts"

    @cached_property
    def ranks(self) -> int:
        """Processes of a training or of generating: as given, or the visible GPUs of a job, else 1."""
        if self.config.ranks is not None:
            return self.config.ranks
        import torch  # takes seconds, and only the number of GPUs needs it

        return max(1, torch.cuda.device_count() // self.jobs)

    # Trainings ------------------------------------------------------------------------------------

    @cached_property
    def trainings(self) -> tuple[str, ...]:
        """The names of what is trained: the entries, or each entry with each learning rate, such as
        flux-lr-0.0001, of which one is chosen.
        """
        return tuple(name for entry in self.entries for name in self.trainings_of(entry))

    def trainings_of(self, entry: str) -> tuple[str, ...]:
        """Returns the names of the trainings of which one is chosen for an entry."""
        if (rates := self.axes.get("lr")) is None:
            return (entry,)
        return tuple(with_rate(entry, rate) for rate in rates)

    def training_name(self, entry: str) -> str:
        """Returns the name of an entry's training; while no rate is chosen, of one in the middle."""
        if entry not in self.config.entries or "lr" not in self.axes:
            return entry
        return with_rate(entry, self.setting(entry, ("lr",))["lr"])

    def parts(self, entry: str) -> tuple[Part, ...]:
        """Returns the phases of an entry; a single one where it names none."""
        return self._parts[self.training_name(entry)]

    @cached_property
    def _parts(self) -> dict[str, tuple[Part, ...]]:
        rates = self.axes.get("lr", ())
        parts = {name: entry.parts for name, entry in self.config.entries.items()}
        with_rates = {
            with_rate(name, rate): tuple(
                part.model_copy(update={"with_": (*part.with_, f"optim.lr={rate!r}")})
                for part in entry_parts
            )
            for name, entry_parts in parts.items()
            for rate in rates
        }
        return parts | with_rates

    # Settings that are chosen ---------------------------------------------------------------------

    @property
    def axes(self) -> dict[str, tuple[float, ...]]:
        """What is chosen for each entry, in this order: its values by the name."""
        return self.config.axes

    @property
    def sampling_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in self.axes if axis != "lr")

    @property
    def halved(self) -> bool:
        """Whether settings are chosen on one half of the prompts, and the other half is reported."""
        return bool(self.sampling_axes)

    def setting(self, entry: str, axes: Sequence[str] | None = None) -> dict[str, float]:
        """Returns the values of an entry, of all axes of sampling by default; while one is not chosen, a
        value in the middle.
        """
        chosen = self.settled.get(entry, {})
        names = self.sampling_axes if axes is None else axes
        return {n: chosen.get(n, self.axes[n][len(self.axes[n]) // 2]) for n in names}

    def is_settled(self, entry: str, axes: Sequence[str] | None = None) -> bool:
        """Whether the values of these axes, of all by default, are chosen for an entry."""
        return {*(self.axes if axes is None else axes)} <= self.settled.get(entry, {}).keys()

    @cached_property
    def _configs(self) -> dict[tuple[str, int], TrainConfig]:
        return {}

    @cached_property
    def _configs_named(self) -> dict[tuple[str, int], TrainConfig]:
        return {}

    def train_config(self, entry: str, seed: int, phase: int = -1) -> TrainConfig:
        """Returns the resolved config of a run; of a later phase with the run it starts from."""
        phase = self._phase(entry, phase)
        update: dict[str, Any] = {"seed": seed}
        if phase:
            update["init_from"] = self.run_folder(entry, seed, phase - 1)
        return self._loaded(entry, phase).model_copy(update=update)

    def _phase(self, entry: str, phase: int) -> int:
        return range(len(self.parts(entry)))[phase]

    def _loaded(self, entry: str, phase: int) -> TrainConfig:
        """Returns an entry's config of a phase, with the seed of the training config itself."""
        key = entry, phase = self.training_name(entry), phase
        if key not in self._configs:
            config = self._named(entry, phase)
            last = phase == len(self.parts(entry)) - 1
            steps = scored_steps(self.config.checkpoints, config.steps) if last else ()
            # a training that the study shortens never comes to later steps
            saved = tuple(sorted({s for s in (*config.save_at, *steps) if s <= config.steps}))
            self._configs[key] = config.model_copy(
                update={
                    "save_at": saved,
                    "ema": averages_of(config, steps, self.axes.get("ema", ())),
                    "data": config.data.model_copy(
                        update={"also": self._also(config, phase, entry)}
                    ),
                }
            )
        return self._configs[key]

    def _named(self, entry: str, phase: int) -> TrainConfig:
        """Returns an entry's config of a phase as the YAML says it."""
        key = self.training_name(entry), phase
        if key not in self._configs_named:
            words = self._words(*key)
            try:
                config = configs.load(TrainConfig, self.config.train, words, takes_words=False)
            except configs.ConfigError as error:
                raise configs.ConfigError(f"{self.path}: train: {error}") from None
            self._configs_named[key] = config
        return self._configs_named[key]

    def _words(self, entry: str, phase: int) -> list[str]:
        part = self.parts(entry)[phase]
        words = [*self.config.with_, *part.with_, f"data.latents={json.dumps(part.latents)}"]
        if part.text is not None:  # null first: mappings would be merged
            words += ["data.text=null", f"data.text={json.dumps(part.text)}"]
        if part.steps is not None:
            words.append(f"steps={part.steps}")
        return [*words, f"runs={json.dumps(str(self.out / 'runs'))}"]

    def _also(self, config: TrainConfig, phase: int, entry: str) -> tuple[str, ...]:
        """Returns the columns whose rows must be valid too: those of all entries in this phase,
        counted from the last, so that all runs see the same rows. One text for all is in each anyway.
        """
        from_end = phase - len(self.parts(entry))
        data = [
            self._named(e, len(self.parts(e)) + from_end).data
            for e in self.entries
            if len(self.parts(e)) >= -from_end
        ]
        latents = [column for each in data for column in _several(each.latents)]
        texts = [_text_columns(each.text) for each in data]
        others = [] if all(text == texts[0] for text in texts) else chain(*texts)
        return tuple(dict.fromkeys([*config.data.also, *latents, *others]))

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """The steps that are scored, ascending; the same of all entries."""
        last = {entry: self._loaded(entry, self._phase(entry, -1)).steps for entry in self.entries}
        points = self.config.checkpoints
        if isinstance(points, int):
            if len(set(last.values())) > 1:
                named = ", ".join(f"{entry} {steps}" for entry, steps in last.items())
                raise BadStudy(
                    f"{self.path}: the entries are trained for other numbers of steps ({named}), so "
                    "checkpoints: a list of steps that all of them have expected"
                )
            return scored_steps(points, next(iter(last.values())))
        for entry, steps in last.items():
            if beyond := [step for step in points if step > steps]:
                raise BadStudy(
                    f"{self.path}: checkpoints: found step {beyond[0]}, but {entry} is trained for "
                    f"{steps} steps"
                )
        return tuple(sorted(points))

    def refuse_equal_entries(self) -> None:
        """Raises BadStudy for two entries that would be the same training."""
        seen: dict[str, str] = {}
        for entry in self.entries:
            parts = [self._training(entry, phase) for phase in range(len(self.parts(entry)))]
            key = json.dumps(parts, sort_keys=True)
            if (other := seen.setdefault(key, entry)) != entry:
                raise BadStudy(
                    f"{self.path}: the entries {other} and {entry} differ in nothing: the same "
                    "columns and the same training. Name what differs, or leave one out"
                )

    def _training(self, entry: str, phase: int) -> dict[str, Any]:
        """Returns what of a config moves the weights, its latents as the folders that links lead to."""
        config = self._loaded(entry, phase)
        latents = [column_place(column) for column in _several(config.data.resolved().latents)]
        dump = config.model_dump(mode="json", exclude=SAYS_NOTHING)
        return dump | {"data": dump["data"] | {"latents": latents}}

    def refuse_shared_folders(self) -> None:
        """Raises BadStudy where two runs would have one folder, by the trainer's rule for names."""
        seen: dict[Path, str] = {}
        for entry in self.trainings:
            for phase in range(len(self.parts(entry))):
                for seed in self.seeds:
                    folder = self.own_run_folder(entry, seed, phase)
                    if (other := seen.setdefault(folder, entry)) != entry:
                        raise BadStudy(
                            f"{self.path}: runs of {other} and {entry} would share the folder {folder}, which is "
                            "named by an entry and its latents. Give one of the entries another name"
                        )

    # Columns --------------------------------------------------------------------------------------

    @cached_property
    def encode_configs(self) -> dict[Path, tuple[EncodeConfig, tuple[str, ...]]]:
        """The encode configs by path, each with the columns (folders or urls) that it makes.

        What entries' encoders are put into is written to OUT/configs/encode.yaml.
        """
        columns: dict[str, Any] = {}
        made_by: dict[str, tuple[Any, str]] = {}
        wanted: dict[Path, dict[str, None]] = {}
        own = self.out / "configs/encode.yaml"
        for entry in self.entries:
            for phase, part in enumerate(self.parts(entry)):
                if part.encoder is None:
                    continue
                folders = _several(self._loaded(entry, phase).data.resolved().latents)
                how = part.encoder
                if is_encode_config(part.encoder):
                    path = encode_config_path(str(part.encoder))
                else:
                    path = own
                    how = columns[self._column(entry, folders)] = self._encoded(entry, part)
                for folder in folders:
                    first, other = made_by.setdefault(folder, (how, entry))
                    if first != how:
                        raise BadStudy(
                            f"{self.path}: {folder} is to be encoded in two ways, by {other} as {first} and by "
                            f"{entry} as {how}. Name a column for each"
                        )
                wanted.setdefault(path, {}).update(dict.fromkeys(folders))
        return {path: self._encode(path, own, columns, list(f)) for path, f in wanted.items()}

    def _column(self, entry: str, folders: Sequence[str]) -> str:
        names = {folder.rstrip("/").rpartition("/")[2] for folder in folders}
        if len(names) != 1:
            raise BadStudy(
                f"{self.path}: {entry} has an encoder, and latents of several names ({', '.join(names)}), "
                "expected the same column name for each source"
            )
        return names.pop()

    def _encoded(self, entry: str, part: Part) -> dict[str, Any]:
        encoder, resolution = part.encoder, part.resolution
        if isinstance(encoder, dict) and "resolution" in encoder:
            encoder = dict(encoder)
            resolution = encoder.pop("resolution")
        if resolution is None:
            raise BadStudy(
                f"{self.path}: {entry} has an encoder and no resolution. Name it beside the encoder, in "
                "pixels, such as 256"
            )
        return {"kind": part.kind, "encoder": encoder, "resolution": resolution}

    def _encode(
        self, path: Path, own: Path, columns: dict[str, Any], folders: Sequence[str]
    ) -> tuple[EncodeConfig, tuple[str, ...]]:
        base = self.config.encode if path == own else path
        config = configs.load(EncodeConfig, base, takes_words=False)
        if path == own:
            words = [f"columns={json.dumps(columns)}"]
            empty = [f"columns.{name}=null" for name in config.columns if name not in columns]
            config = configs.load(EncodeConfig, base, [*words, *empty])
        source_of = {
            f"{config.root.rstrip('/')}/{s}/{c}": s for s in config.sources for c in config.columns
        }
        if absent := [folder for folder in folders if folder not in source_of]:
            made = ", ".join([*source_of][:LISTED]) + (" ..." if len(source_of) > LISTED else "")
            raise BadStudy(
                f"{self.path}: found the latents {absent[0]}, which are to be encoded by {base}, but that makes "
                f"{made or 'no column'}. Name one of these as `latents`, set the root or source in {base}, or "
                "leave `encoder` out and encode the column yourself"
            )
        if path == own:
            used = {source_of[folder] for folder in folders}
            sources = {name: tars for name, tars in config.sources.items() if name in used}
            config = config.model_copy(update={"sources": sources})
        return config, tuple(folders)

    # Folders --------------------------------------------------------------------------------------

    def config_path(self, entry: str, phase: int = -1) -> Path:
        """Returns where an entry's training config is written, without seed and `init_from`."""
        entry, phase = self.training_name(entry), self._phase(entry, phase)
        several = len(self.parts(entry)) > 1
        return self.out / "configs" / f"{entry}{f'-phase{phase + 1}' if several else ''}.yaml"

    def run_folder(self, entry: str, seed: int, phase: int = -1) -> Path:
        """Returns the folder of a run: the study's own, or one made by hand that fits."""
        entry, phase = self.training_name(entry), self._phase(entry, phase)
        return self.hand_runs.get((entry, seed, phase)) or self.own_run_folder(entry, seed, phase)

    def own_run_folder(self, entry: str, seed: int, phase: int = -1) -> Path:
        phase = self._phase(entry, phase)
        config = self._loaded(entry, phase).model_copy(update={"seed": seed})
        return run_folder(config, self.config_path(entry, phase))

    def set_folder(self, entry: str, seed: int, step: int) -> Path:
        """Returns the folder of a set of pictures: the study's own, or one made by hand that fits."""
        return self.hand_sets.get((entry, seed, step)) or self.own_set_folder(entry, seed, step)

    def own_set_folder(self, entry: str, seed: int, step: int) -> Path:
        name = f"{self.training_name(entry)}-seed{seed}"
        name = "-".join([name, *setting_names(self.setting(entry))])
        return self.out / "images" / name / f"step-{step:08d}"

    def log(self, node: str) -> Path:
        """Returns the path of a command's log; the record of when it ran ends in .json."""
        return self.out / "logs" / f"{node}.log"

    @cached_property
    def reuse(self) -> tuple[Path, ...]:
        """The folders in which runs and sets made by hand are looked for."""
        if self.config.reuse is not None:
            return self.config.reuse
        return configs.load(TrainConfig, self.config.train, self.config.with_).runs, Path("images")

    @property
    def images_per_prompt(self) -> int:
        for flag in ("n_samples", "num_samples"):
            count = self.config.generate.get(flag)
            if isinstance(count, int | str) and str(count).isdecimal():  # "4" is a number, too
                return int(count)
        return BENCHMARKS[self.benchmark].images_per_prompt


def _text_columns(text: Any) -> list[str]:
    """Returns the columns of a text: one, several with their rates, or those of each source."""
    if isinstance(text, str):
        return [text]
    if isinstance(text, Mapping):
        return list(text)
    return [column for of_source in text for column in _text_columns(of_source)]


def column_place(column: str) -> str:
    """Returns a column's url, or the folder that its path leads to."""
    return column.rstrip("/") if "://" in column else str(Path(column).resolve())


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
