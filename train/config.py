"""What a run is: one YAML, filled into `TrainConfig`. Sizes of latents and text come from the
columns.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from configs import ConfigError, Strict, expects, read_yaml
from shards.places import local_path, place

from .model.config import ComputeConfig, FlowConfig, ModelConfig

Place = Annotated[str, BeforeValidator(place)]  # a column's name, a folder or a url
LocalPath = Annotated[Path, BeforeValidator(local_path)]
Share = Annotated[float, Field(gt=0)]
Text = Place | dict[Place, Share]  # a tokens or ids column, or several and how often each is chosen
Size = Annotated[int, Field(ge=1, strict=True)]
Beta = Annotated[float, Field(ge=0, lt=1)]
SHORTEST_EMA = 0.01  # length of a power average, relative to the updates
LONGEST_EMA = 0.25  # 0.289 is the plain mean of all updates
EmaLength = Annotated[float, Field(ge=SHORTEST_EMA, le=LONGEST_EMA)]


@dataclass(frozen=True)
class DataShape:
    """What a model takes: the columns say it, or `data.expect` where there are none yet."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    channels: Size  # of a latent
    height: Size  # of a latent
    width: Size  # of a latent
    text_width: Size  # numbers of a token's hidden state


class DataConfig(Strict):
    """Which columns are read, and how. Columns are folders or urls (s3://, gs://, az://, file://).

    With `sources`, a word without a slash is the name of a column that each source has: one word
    for several sources. Where latents and text are folders or urls all the same, `sources` is not
    used."""

    # a moments column, the one value that differs between two VAEs; several: one of each source
    latents: Place | tuple[Place, ...]
    # a tokens or ids column of the same source, several with the share of the samples that takes each, or one of each
    # source
    text: Text | tuple[Text, ...]
    # where text is ids, `torchrun -m eval train` runs this in the step: a name of encode.registry.TEXTS, or class and
    # path; null: the registry's model of the column's tokenizer
    encoder: str | dict[str, Any] | None = None
    # of `encoder`: which hidden state is taken; -1: its output, after the last norm
    hidden_state: int = -1
    # folder or url above `sources`
    root: Place = ""
    # folders of columns; {folder: share} mixes them at fixed shares, and null leaves one out
    sources: tuple[Place, ...] | dict[Place, Share | None] | None = None
    # share of each source; null: concatenated, each row once an epoch
    weights: tuple[Share, ...] | None = None
    # sizes of a latent and a token, for plans while there are no columns yet; columns of other sizes are an error
    expect: DataShape | None = None
    # columns whose rows must be valid too, so that paired runs see the same rows
    also: tuple[Place, ...] = ()
    # a file of `shards mask`, or several: of the source that each is of, the rows that it names alone are trained on
    mask: Place | tuple[Place, ...] | None = None
    # shift and scale of latents: config: those of the column; measured (by channel) or measured-per-place: what
    # `shards norm` measured of its rows; or the digest of one, which several sources require
    norm: Annotated[
        str,
        Field(pattern=r"^(config|measured|measured-per-place|[0-9a-f]{64})$"),
        expects(
            "config, measured, measured-per-place, or a digest of 64 hexadecimal digits. Write one of these"
        ),
    ] = "config"
    # admits pictures that were cut short but decoded
    truncated: bool = False
    # rows that are not ok in some column: left out, or an error
    bad: Literal["skip", "error"] = "skip"
    # reads columns that are still being encoded, as far as they are now
    partial: bool = False
    # strands of the order of samples, of which `global_batch` is a multiple; part of the run's identity
    lanes: int = Field(default=64, ge=1)
    # samples permuted together within a lane; 0: the whole lane
    window: int = Field(default=0, ge=0)
    # share of captions replaced by the empty one, for classifier-free guidance (arXiv 2207.12598)
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    # batches read ahead
    prefetch: int = Field(default=2, ge=1, le=256)
    # batches before its turn that each is hinted to the disk or fetched from an object store, at least; 0: never
    ahead: int = Field(default=1, ge=0, le=256)

    @model_validator(mode="before")
    @classmethod
    def _no_workers(cls, values: Any) -> Any:
        """Refuses reading processes; the config of an older run says `workers: 0`."""
        if not isinstance(values, dict) or "workers" not in values:
            return values
        if values["workers"]:
            raise ValueError(
                f"data.workers: found {values['workers']}, but reading processes are gone, since a thread reads as "
                "fast. Remove it"
            )
        return {key: value for key, value in values.items() if key != "workers"}

    @model_validator(mode="after")
    def _sources(self) -> DataConfig:
        words = [
            *_several(self.latents),
            *(c for text in _several(self.text) for c in _names(text)),
        ]
        if self.sources is None or all(map(_is_place, words)):
            values = {"latents": self.latents, "text": self.text, "weights": self.weights}
            counts = {k: len(_several(v)) for k, v in values.items() if v is not None}
            if len(set(counts.values())) > 1:
                listed = ", ".join(f"{count} {name}" for name, count in counts.items())
                raise ValueError(f"one of each a source expected, found {listed}")
            return self
        if places := [word for word in words if _is_place(word)]:
            raise ValueError(
                f"{places[0]} is a folder or url, {next(w for w in words if not _is_place(w))} the name of a column in "
                "each of data.sources: give all latents and text as one or as the other"
            )
        if isinstance(self.latents, tuple) or isinstance(self.text, tuple):
            raise ValueError("with data.sources, one name for latents and one text expected")
        if isinstance(self.sources, dict) and self.weights is not None:
            raise ValueError("data.sources says the shares already: remove data.weights")
        if not self._shares:
            raise ValueError("data.sources names no source")
        if self.weights is not None and len(self.weights) != len(self.sources):
            raise ValueError(f"{len(self.weights)} weights for {len(self.sources)} sources")
        return self

    @property
    def _shares(self) -> dict[str, float | None]:
        """Folder or url of each source that is used, and its share."""
        sources = self.sources or {}
        if not isinstance(sources, dict):
            weights = self.weights or (None,) * len(sources)
            return {self._below_root(s): w for s, w in zip(sources, weights, strict=False)}
        return {self._below_root(s): share for s, share in sources.items() if share is not None}

    def _below_root(self, source: str) -> str:
        return f"{self.root.rstrip('/')}/{source}" if self.root else source.rstrip("/")

    def resolved(self) -> DataConfig:
        """Returns the same data with each column as a folder or url, and no `sources`."""
        if self.sources is None or _is_place(_several(self.latents)[0]):
            return self.model_copy(update={"sources": None})
        folders, shares = list(self._shares), tuple(self._shares.values())
        latents, text = self.latents, self.text
        assert isinstance(latents, str)
        assert not isinstance(text, tuple)
        texts = [
            f"{f}/{text}" if isinstance(text, str) else {f"{f}/{k}": v for k, v in text.items()}
            for f in folders
        ]
        also, masks = (
            [w if _is_place(w) else [f"{f}/{w}" for f in folders] for w in words]
            for words in (self.also, self.masks)
        )
        single = len(folders) == 1
        return self.model_copy(
            update={
                "latents": f"{folders[0]}/{latents}" if single else tuple(f"{f}/{latents}" for f in folders),
                "text": texts[0] if single else tuple(texts),
                "also": tuple(column for columns in also for column in _several(columns)),
                "mask": tuple(file for files in masks for file in _several(files)) or None,
                "weights": None if single or None in shares else shares,
                "sources": None,
            }
        )  # fmt: skip

    @property
    def masks(self) -> tuple[str, ...]:
        """The files of masks as they are named."""
        return files_of(self.mask)

    @property
    def first(self) -> tuple[str, str]:
        """The latent column and the (first) text column of the first source."""
        data = self.resolved()
        return _several(data.latents)[0], next(iter(_names(_several(data.text)[0])))

    @property
    def source_names(self) -> tuple[str, ...]:
        """Name of each source for people: the folder of its latents; where two have the same, the
        whole path."""
        columns = [url.rstrip("/") for url in _several(self.resolved().latents)]
        names = [
            c.split("/")[-2] if "://" in c else Path(c).absolute().parent.name for c in columns
        ]
        return tuple(names if len(set(names)) == len(names) else columns)

    def check(self, shape: DataShape) -> None:
        """Raises ConfigError where the columns are not of the sizes that `expect` names."""
        if self.expect is not None and self.expect != shape:
            expected = asdict(self.expect)
            wrong = [
                f"{k} {v}, data.expect says {expected[k]}"
                for k, v in asdict(shape).items()
                if v != expected[k]
            ]
            raise ConfigError(
                f"{self.first[0]} and {self.first[1]}: found {'; '.join(wrong)}. Name other columns, or correct "
                "data.expect"
            )


def _several(value: Any) -> Any:
    """Returns one value, or a tuple or list of values, as a sequence."""
    return value if isinstance(value, tuple | list) else (value,)


def files_of(mask: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the files that a `mask` names."""
    return () if mask is None else tuple(_several(mask))


def _names(text: Text) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else tuple(text)


def _is_place(word: str) -> bool:
    return "/" in word


class OptimConfig(Strict):
    """AdamW (arXiv 1711.05101) and its learning rate."""

    # learning rate after the warm-up
    lr: float = Field(default=1e-4, gt=0)
    # decoupled from the gradient: a step takes lr * weight_decay of each weight away
    weight_decay: float = Field(default=1e-4, ge=0, le=100)
    # what decays; with matrices no norm, bias or table does
    decay: Literal["all", "matrices"] = "all"
    # decays of the averages of gradient and squared gradient
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    # added to the root of the squared gradient's average
    eps: float = Field(default=1e-8, gt=0, le=1)
    # largest L2 norm of the whole gradient; null: it is not clipped
    clip: float | None = 1.0
    # of the rate after the warm-up: as it is, or down to 0 at `steps`
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    # steps of linear warm-up
    warmup: int = Field(default=0, ge=0)

    @field_validator("clip", mode="before")
    @classmethod
    def _clip(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not 0 < value < math.inf:
            raise ValueError(
                "expected a number above 0, or null for a gradient that is not clipped"
            )
        return value


class EmaConfig(Strict):
    """The average of the weights, with which pictures are made."""

    # share of the average that an update keeps
    decay: float = Field(default=0.9999, ge=0, lt=1)
    # lengths of two more averages, relative to the updates so far (EDM2, arXiv 2312.02696: [0.05, 0.10]), of which
    # `eval generate --ema LENGTH` makes one of another length after the run; null: none
    power: tuple[EmaLength, EmaLength] | None = None
    # copies of those two that are kept, in half precision, evenly spaced over `steps`
    snapshots: int = Field(default=32, ge=2, le=1000)

    @field_validator("power")
    @classmethod
    def _power(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value and not (value[0] < value[1] and f"{value[0]:g}" != f"{value[1]:g}"):
            raise ValueError(
                f"found {value[0]} and {value[1]}, expected the shorter one first, other in six digits: by these their "
                "files are named"
            )
        return value


class GuardConfig(Strict):
    """What a run bears, and when it ends itself rather than hang."""

    # what happens where a loss or gradient is not finite: the run ends, or the step is left out
    nonfinite: Literal["stop", "skip"] = "stop"
    # steps in a row that are left out; then the run ends
    skips: int = Field(default=10, ge=1)
    # seconds without progress; 0: it waits for ever
    hang: float = Field(default=600, ge=0, le=1e6)
    # seconds without a heartbeat after which a rank counts as dead
    silence: float = Field(default=60, gt=0, le=1e6)


class ValidationConfig(Strict):
    """The loss on rows that are not trained on. `validation: null` means none."""

    # folder of the held-out source, whose columns have the names of the training columns; null: no validation
    source: Place | None = None
    # as `data.mask`, of the held-out source, which may then be the source that is trained on
    mask: Place | tuple[Place, ...] | None = None
    # steps from one validation to the next
    every: int = Field(default=1000, ge=1)
    # rows of the held-out source that are used, the same each time
    rows: int = Field(default=256, ge=1)
    # rows a forward pass; fixed, so that the sums do not depend on the world size
    batch: int = Field(default=32, ge=1)
    # whether losses are also shown over what the best linear model of 2,048 training rows would lose on the same rows;
    # it takes some seconds of one CPU core when a run starts, and changes nothing of the training
    reference: bool = True


def _none_is_off(value: Any) -> Any:
    return {} if value is None else value


class MetricsConfig(Strict):
    """Where the figures go beside metrics.jsonl. wandb and trackio are imported only if named."""

    # programs that draw them, beside metrics.jsonl
    to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    # name of the project in wandb and trackio
    project: str = "latentbank"


class TrainConfig(Strict):
    data: DataConfig
    model: ModelConfig
    flow: FlowConfig = FlowConfig()
    optim: OptimConfig = Field(default_factory=OptimConfig)
    ema: EmaConfig = Field(default_factory=EmaConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)
    validation: Annotated[
        ValidationConfig,
        BeforeValidator(_none_is_off, json_schema_input_type=ValidationConfig | None),
    ] = Field(default_factory=ValidationConfig)
    compute: ComputeConfig = Field(default_factory=ComputeConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    # a JSON file for DeepSpeed, or the same as YAML: docs/training.md lists its keys
    deepspeed: LocalPath | dict[str, Any] = Field(
        default_factory=lambda: {"zero_optimization": {"stage": 1}}
    )
    # a run, one of its steps, or what `train import` wrote: weights for step 0. Not read once the run has a checkpoint
    init_from: LocalPath | None = None
    # takes the averaged weights of `init_from`
    init_ema: bool = True
    # of the initial weights, the order of samples, noise, timesteps and dropped captions
    seed: int = Field(default=0, ge=0, lt=2**64)
    # updates of the weights in the whole run, its warm-up included
    steps: int = Field(ge=1, lt=10**8)
    # samples an update, over all ranks. May be another on resume: the samples go on in the same order from where they
    # were, and a step is then another number of them
    global_batch: int = Field(ge=1)
    # samples a forward pass on one rank
    micro_batch: int = Field(ge=1)
    # steps from one line of figures to the next
    log_every: int = Field(default=50, ge=1)
    # steps from one checkpoint to the next; the last step is saved too
    save_every: int = Field(default=1000, ge=1)
    # newest checkpoints that are kept; two at least, so that a damaged one has a predecessor
    keep: int = Field(default=3, ge=2)
    # steps that are saved beside those of `save_every`, and kept whatever `keep` says
    save_at: tuple[Size, ...] = ()
    # folder in which the folder of the run is made
    runs: LocalPath = Path("runs")

    @model_validator(mode="after")
    def _batches(self) -> TrainConfig:
        if self.global_batch % self.data.lanes:
            raise ValueError(
                f"global_batch {self.global_batch} is no multiple of data.lanes {self.data.lanes}: change one of them"
            )
        return self

    def accumulation(self, world: int) -> int:
        """Returns the micro-batches a step on each rank; ConfigError where the batch cannot be cut
        so."""
        if self.global_batch % (world * self.micro_batch):
            raise ConfigError(
                f"global_batch {self.global_batch} cannot be cut into micro-batches of {self.micro_batch} on {world} "
                "ranks: make it a multiple of micro_batch x ranks"
            )
        return self.global_batch // (world * self.micro_batch)


def run_folder(config: TrainConfig, path: Path) -> Path:
    """Returns the folder of a run: the names of its config and of its latent column, and its seed
    unless that is 0, so that neither VAEs nor seeds share a folder. A run that was begun without
    the seed in its name goes on."""
    names = map(column_name, _several(config.data.resolved().latents))
    latents = "+".join(dict.fromkeys(names))
    folder = config.runs / (latents if path.stem == latents else f"{path.stem}-{latents}")
    if config.seed == 0:
        return folder
    seeded = folder.with_name(f"{folder.name}-seed{config.seed}")
    return folder if not seeded.exists() and _seed_of(folder) == config.seed else seeded


def _seed_of(run: Path) -> int | None:
    """Returns the seed of the run in a folder, None where there is none."""
    try:
        seed = read_yaml(run / "config.yaml")["seed"]
    except (ConfigError, OSError, KeyError):
        return None
    return seed if isinstance(seed, int) else None


def column_name(url: str) -> str:
    """Returns a column's name: the last part of its url, or of the folder that a link leads to."""
    return url.rstrip("/").rpartition("/")[2] if "://" in url else Path(url).resolve().name
