"""The YAML of a study: one training config, the entries that are compared, seeds, and scorers.

train: configs/train/dit700m_256.yaml
entries: {flux: flux-256, e2e: flux-e2e-256}
benchmark: geneval
scorers: [geneval]
"""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)

from configs import Strict, did_you_mean, expects
from shards.places import local_path
from train.config import LocalPath, Place, Text

from ..images.flags import AXES
from ..prompts.benchmarks import BENCHMARKS

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._]*(-[A-Za-z0-9._]+)*")  # of an entry, as a folder's
Scalar = bool | int | float | str
Flag = Scalar | None | list[int | float | str]
Flags = dict[str, Flag]
Size = Annotated[int, Field(ge=1, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**64, strict=True)]
# flags of `eval generate` that the study gives itself
OWN_FLAGS = {
    *("checkpoint", "tag", "type", "prompts", "metadata_file", "benchmark", "save_dir"),
    *("text_cache", "half"),
}
# keys of the training config, likewise, and what is said instead
OWN_KEYS = {
    "seed": "list it in the study's `seeds`",
    "runs": "runs go below --out; folders of runs made by hand are listed in `reuse`",
    "data.latents": "name it as the entry's `latents`",
}
MOST_CHECKPOINTS = 1_000  # that are scored: more is rather a step than a number of them
OWN_NAMES = {"encode"}  # of files in OUT/configs beside those of entries


def _free(words: tuple[str, ...]) -> tuple[str, ...]:
    """Raises ValueError for overrides of what the study sets itself, which would have no effect."""
    for word in words:
        if (key := word.partition("=")[0].strip()) in OWN_KEYS:
            raise ValueError(f"{key} is set by the study itself: leave it out, {OWN_KEYS[key]}")
    return words


# as on the command line
Words = Annotated[
    tuple[str, ...],
    expects("a list of KEY=VALUE. Write it as in [steps=1000, optim.lr=1e-4]"),
    AfterValidator(_free),
]


class Part(Strict):
    """What an entry is trained on, and what it has of its own; the rest is the training config's."""

    # the latent column, the one value that differs between two VAEs; several: one of each source
    latents: Place | tuple[Place, ...] | None = None
    text: Text | tuple[Text, ...] | None = None
    # makes the latent column where it is missing: a name of encode.registry.VAES, or class and path,
    # put into the study's `encode` config; or the path of an encode config that makes it
    encoder: str | dict[str, Any] | None = None
    kind: Literal["moments", "latents"] = "moments"  # of the column that `encoder` makes
    resolution: Size | None = None  # pixels, likewise
    # updates; those of the training config by default
    steps: Size | None = None
    with_: Words = Field(default=(), alias="with")


class Entry(Part):
    """One side of the comparison. With `phases` it is trained in several, each from the weights of
    the one before; what a phase does not name is the entry's.
    """

    phases: tuple[Part, ...] = ()

    @field_validator("phases")
    @classmethod
    def _phases(cls, phases: tuple[Part, ...]) -> tuple[Part, ...]:
        for phase in phases[1:]:
            if any(word.partition("=")[0].strip() == "init_from" for word in phase.with_):
                raise ValueError(
                    "init_from: a phase starts from the weights of the one before. Only the first may name others"
                )
        return phases

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its phases, each with what the entry says for all; the entry itself where it has none."""
        if not self.phases:
            return (self,)
        own = self.model_dump(by_alias=True, exclude={"phases", "with_"}, exclude_defaults=True)
        return tuple(
            Part.model_validate(
                own
                | phase.model_dump(by_alias=True, exclude_defaults=True)
                | {"with": (*self.with_, *phase.with_)}
            )
            for phase in self.phases
        )


@dataclass(frozen=True)
class ScorerConfig:
    """A scorer and its flags, as `eval score NAME` takes them."""

    name: str
    flags: Flags

    @property
    def words(self) -> tuple[str, ...]:
        """The flags as words of a command line."""
        return flag_words(self.flags)


def flag_words(flags: Mapping[str, Flag]) -> tuple[str, ...]:
    """Returns flags as words: true is the flag alone, false its --no- form, null leaves it out."""
    words: list[str] = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words += [f"--{name}", str(value)]
    return tuple(words)


def _entry(value: Any) -> Any:
    """An entry may be its latent column alone."""
    return {"latents": value} if isinstance(value, str | list) else value


class Published(Strict):
    """What is published of an entry against the baseline, to be set beside what the study finds."""

    better: bool  # than the baseline
    # of what, after what training, and how well it is known
    text: str
    source: str  # a paper or page


def _expression(pattern: str) -> str:
    """Raises ValueError for what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"expected a regular expression: {error}") from None
    return pattern


Expression = Annotated[str, AfterValidator(_expression)]


class PanelConfig(Strict):
    """What is shown of the entries' columns beside the outcome, as `eval probe` takes it."""

    # rows of each column that are read
    rows: Annotated[int, Field(ge=64, le=8192, strict=True)] = 2048
    # regular expressions of keys: groups of rows, and variants of one picture
    groups: Expression | None = None
    together: Expression | None = None
    # folders of `eval reconstruct`, by entry, whose scores are shown too
    reconstructions: dict[str, LocalPath] = {}


Values = Annotated[
    tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=2)
]


def _several_numbers(for_all: str) -> WrapValidator:
    return expects(
        "a list of two or more numbers above 0, of which one is chosen for each entry. Write such a list; or leave "
        f"this key out and name one value for all entries: {for_all}"
    )


Scales = Annotated[Values | None, _several_numbers("generate: {guidance_scale: 3}")]
Lengths = Annotated[Values | None, _several_numbers("generate: {ema: 0.1}")]
Shifts = Annotated[Values | None, _several_numbers("generate: {shift: 2}")]
Rates = Annotated[Values | None, _several_numbers("with: [optim.lr=1e-4]")]


class SettleConfig(Strict):
    """What is chosen for each entry, one value for all its seeds: at the last step, on half A of the
    prompts, by the mean of the primary score over the seeds. The study then reports half B.
    """

    # guidance of the sampler; null: none is chosen. So is none where `generate` names it
    guidance_scale: Scales = (1.5, 2.0, 3.0, 4.5, 6.0, 9.0)
    # lengths of the average of the weights, relative to the updates; the runs keep what they take
    ema: Lengths = (0.05, 0.075, 0.1)
    # timestep shifts of the sampler
    shift: Shifts = None
    # learning rates: each entry is trained with each in every seed, and its own validation loss chooses
    lr: Rates = None
    # whether a value at an end of its range, beyond which a better one may lie, gives a verdict
    accept_edge: bool = False

    @field_validator("guidance_scale", "ema", "shift", "lr")
    @classmethod
    def _range(cls, values: tuple[float, ...] | None, info: ValidationInfo) -> Any:
        if values is None:
            return None
        if double := _double(values):
            raise ValueError(f"{double[0]:g} is named twice. Name each value once")
        if info.field_name == "guidance_scale" and len([v for v in values if v <= 1]) > 1:
            raise ValueError(
                "several values of 1 or below make the same pictures. Name one of them"
            )
        if (read := AXES.get(info.field_name or "")) is not None:
            try:
                values = tuple(read(repr(value)) for value in values)
            except ArgumentTypeError as error:
                raise ValueError(str(error)) from None
        return tuple(sorted(values))


Seeds = Annotated[
    tuple[Seed, ...],
    Field(min_length=1),
    expects("a list of whole numbers from 0 on. Write one seed as [3], several as [0, 1, 2]"),
]
Checkpoints = Annotated[
    Annotated[Size, Field(le=MOST_CHECKPOINTS)] | Annotated[tuple[Size, ...], Field(min_length=1)],
    expects(
        f"how many steps are scored, {MOST_CHECKPOINTS:,} at most, or a list of steps, each a whole number from 1 on. "
        "Write 8 for eight of them, [5000, 10000] for these two"
    ),
]


Scorer = Annotated[
    str | dict[str, Flags],
    expects(
        "a scorer's name, or {NAME: {FLAG: VALUE}}. Write it as in fid, or {fid: {batch_size: 8}}"
    ),
]


class StudyConfig(Strict):
    # the training config of all entries, and what all have otherwise: [steps=1000]
    train: LocalPath
    with_: Words = Field(default=(), alias="with")
    entries: dict[str, Annotated[Entry, BeforeValidator(_entry)]]
    # what the others are compared with; None: the first entry
    baseline: str | None = None
    # of trainings; three at least for a verdict that holds beyond these trainings
    seeds: Seeds = (0, 1, 2)
    # a name of eval.prompts.BENCHMARKS, or a prompt file of your own: exactly one
    benchmark: str | None = None
    prompts: LocalPath | None = None
    # the first is the primary one, of which the verdict is; a scorer with flags is {name: {flag: value}}
    scorers: tuple[Scorer, ...] = Field(min_length=1)
    # flags of `eval generate`
    generate: Flags = {}
    # what is chosen for each entry; null: nothing, and `generate` is for all
    settle: SettleConfig | None = SettleConfig()
    # steps that are scored: how many, equally spaced in log samples over the last decade and ending
    # with the last; or the steps themselves
    checkpoints: Checkpoints = 8
    # the encode config that an entry's `encoder` is put into
    encode: LocalPath = Path("configs/encode/base/blip3o.yaml")
    # processes of a training; None: the visible GPUs that a job has, else 1
    ranks: Size | None = None
    # folders in which runs and sets made by hand are looked for; None: the training config's `runs`, and images
    reuse: tuple[LocalPath, ...] | None = None
    # parts of a training that two entries may differ in, beside what the entries say here
    differ: tuple[str, ...] = ()
    # money a GPU hour, and which GPU, for the plan and the page
    price: float | None = Field(default=None, ge=0)
    gpu: str | None = None
    # what is published of entries against the baseline
    published: dict[str, Published] = {}
    # figures of the latent columns beside the outcome; null: none
    panel: PanelConfig | None = PanelConfig()
    # a line on the page
    note: str = ""

    @field_validator("entries")
    @classmethod
    def _names(cls, entries: dict[str, Entry]) -> dict[str, Entry]:
        for name, entry in entries.items():
            if not NAME.fullmatch(name) or re.search(r"-(seed|phase)\d+$", name):
                raise ValueError(
                    f"{name!r} names folders: letters, digits, . _ and single hyphens expected, and "
                    "no -seedN or -phaseN at its end"
                )
            if name.casefold() in OWN_NAMES:
                raise ValueError(
                    f"{name!r} is a file of the study's own: give the entry another name"
                )
            for part in entry.parts:
                if part.latents is None:
                    raise ValueError(f"{name}: no latents. Name the latent column it is trained on")
        if len({name.casefold() for name in entries}) < len(entries):
            raise ValueError(
                "two entries differ in capitals alone, and are one folder on some disks"
            )
        if len(entries) < 2:
            raise ValueError(f"found {len(entries)} entry, expected two at least to compare")
        return entries

    @field_validator("generate")
    @classmethod
    def _generate(cls, flags: Flags) -> Flags:
        names = {flag.partition("=")[0].replace("-", "_") for flag in flags}
        if own := sorted(OWN_FLAGS & names):
            raise ValueError(f"{own[0]} is set by the study itself: leave it out")
        return flags

    @model_validator(mode="after")
    def _whole(self) -> StudyConfig:
        if self.baseline is not None and self.baseline not in self.entries:
            raise ValueError(
                f"baseline: found {self.baseline!r}, expected one of {', '.join(self.entries)}"
            )
        others = [
            name for name in self.entries if name != (self.baseline or next(iter(self.entries)))
        ]
        if unknown := [name for name in self.published if name not in others]:
            raise ValueError(
                f"published: found {unknown[0]!r}, expected an entry that is compared with the baseline: "
                f"{', '.join(others)}"
            )
        named = self.panel.reconstructions if self.panel else {}
        if strange := [name for name in named if name not in self.entries]:
            raise ValueError(
                f"panel.reconstructions: found {strange[0]!r}, expected entries: {', '.join(self.entries)}"
            )
        if (self.benchmark is None) == (self.prompts is None):
            names = ", ".join(name for name in BENCHMARKS if name != "prompts")
            raise ValueError(f"expected one of benchmark ({names}) and prompts (a file)")
        if self.benchmark is not None and self.benchmark not in {*BENCHMARKS} - {"prompts"}:
            names = ", ".join(name for name in BENCHMARKS if name != "prompts")
            hint = did_you_mean(self.benchmark, BENCHMARKS, "")
            raise ValueError(f"benchmark: found {self.benchmark!r}, expected one of {names}{hint}")
        for key, values in (
            ("seeds", self.seeds),
            ("scorers", [scorer.name for scorer in self.all_scorers]),
            ("checkpoints", () if isinstance(self.checkpoints, int) else self.checkpoints),
        ):
            if double := _double(values):
                raise ValueError(f"{key}: {double[0]} is named twice. Name each once")
        return self

    @model_validator(mode="after")
    def _settled_once(self) -> StudyConfig:
        """Raises ValueError where something is both named and to be chosen."""
        named = set(self.settle.model_fields_set) if self.settle else set()
        for axis in sorted(named & self._named):
            if getattr(self.settle, axis) is not None:
                raise ValueError(
                    f"settle.{axis}: found it in `generate`, too. Name it in one of them"
                )
        parts = (part for entry in self.entries.values() for part in entry.parts)
        keys = {word.partition("=")[0].strip() for part in parts for word in part.with_}
        if "lr" in self.axes and "optim.lr" in keys:
            raise ValueError("settle.lr: found optim.lr of an entry, too. Name it in one of them")
        if "ema" in self.axes and "ema.decay" in keys:
            raise ValueError(
                "settle.ema: found ema.decay of an entry, too, of whose average nothing would be sampled. Leave it "
                "out, or say settle: {ema: null}"
            )
        return self

    @property
    def _named(self) -> set[str]:
        """Settings that `generate` names, by the names of axes; no average has a length without averages."""
        named = {
            name.replace("-", "_") for name, value in self.generate.items() if value is not None
        }
        return named | ({"ema"} if "ema_weights" in named else set())

    @property
    def axes(self) -> dict[str, tuple[float, ...]]:
        """What is chosen for each entry, in this order: its values, ascending, by the name."""
        if self.settle is None:
            return {}
        ranges = {
            name: getattr(self.settle, name) for name in ("lr", "guidance_scale", "ema", "shift")
        }
        asked = self.settle.model_fields_set
        return {
            name: values
            for name, values in ranges.items()
            if values and (name in asked or name not in self._named)
        }

    @property
    def all_scorers(self) -> tuple[ScorerConfig, ...]:
        """The scorers in their order, the primary one first."""
        scorers = []
        for scorer in self.scorers:
            if isinstance(scorer, str):
                scorers.append(ScorerConfig(scorer, {}))
            else:
                if len(scorer) != 1:
                    raise ValueError(
                        f"scorers: found {scorer}, expected one name with its flags each"
                    )
                scorers += [ScorerConfig(name, flags) for name, flags in scorer.items()]
        return tuple(scorers)


def _double(values: Iterable[Any]) -> list[Any]:
    """Returns the values that occur a second time."""
    seen: set[Any] = set()
    return [value for value in values if value in seen or seen.add(value)]  # type: ignore[func-returns-value]


def is_encode_config(encoder: Any) -> bool:
    """Whether an entry's encoder is the path of an encode config."""
    return isinstance(encoder, str) and Path(encoder).suffix in (".yaml", ".yml")


def encode_config_path(encoder: str) -> Path:
    path: Path = local_path(encoder)
    return path
