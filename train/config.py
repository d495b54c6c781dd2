"""What a run is: one YAML, filled into `TrainConfig`. Sizes of latents and text come from the columns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from configs import ConfigError, Strict

from .architecture import ComputeConfig, ModelConfig
from .flow import FlowConfig

Text = str | dict[str, float]  # a tokens or ids column, or several and how often each is chosen


@dataclass(frozen=True)
class DataShape:
    """What a model takes: the columns say it, or `data.expect` where there are none yet."""

    channels: int  # of a latent
    height: int
    width: int
    text_width: int


class DataConfig(Strict):
    """Which columns are read, and how. Columns are folders or urls (s3://, gs://, az://, file://)."""

    latents: (
        str | tuple[str, ...]
    )  # a moments column; the one value that differs between two VAEs. Several: one a source
    text: Text | tuple[Text, ...]  # of the same source, or of each
    # where text is ids, `torchrun -m eval train` runs this in the step: a name of encode.registry.TEXTS, or class and
    # path; None: the registry's model of the column's tokenizer
    encoder: str | dict[str, Any] | None = None
    hidden_state: int = -1  # of it: -1 is what the model puts out, after its last norm
    weights: tuple[float, ...] | None = (
        None  # share of each source; None: concatenated, each row once an epoch
    )
    also: tuple[
        str, ...
    ] = ()  # columns whose rows must be valid too, so that paired runs see the same rows
    truncated: bool = False  # admit pictures that were cut short but decoded
    bad: Literal["skip", "error"] = "skip"  # rows that are not ok in some column
    partial: bool = False  # read columns that are still being encoded, as far as they are now
    lanes: int = Field(default=64, ge=1)  # strands of the order; part of the run's identity
    window: int = Field(
        default=0, ge=0
    )  # samples permuted together within a lane; 0 = the whole lane
    caption_dropout: float = Field(
        default=0.1, ge=0, le=1
    )  # share of captions replaced by the empty one
    prefetch: int = Field(default=2, ge=1, le=256)  # batches read ahead
    ahead: int = Field(
        default=1, ge=0
    )  # batches before its turn that each is hinted to the disk, or fetched from an object store
    workers: int = Field(default=0, ge=0)  # processes that read on each rank; 0: a thread

    @model_validator(mode="after")
    def _sources(self) -> "DataConfig":
        counts = {"latents": self.latents, "text": self.text, "weights": self.weights}
        found = {
            name: len(value) if isinstance(value, tuple) else 1
            for name, value in counts.items()
            if value is not None
        }
        if len(set(found.values())) > 1:
            raise ValueError(
                "one of each a source expected, found "
                + ", ".join(f"{n} {name}" for name, n in found.items())
            )
        return self

    @property
    def first(self) -> tuple[str, str]:
        """The latent column and the (first) text column of the first source."""
        latents = self.latents if isinstance(self.latents, str) else self.latents[0]
        text = self.text[0] if isinstance(self.text, tuple) else self.text
        return latents, text if isinstance(text, str) else next(iter(text))


class OptimConfig(Strict):
    lr: float = Field(default=1e-4, gt=0)
    weight_decay: float = 1e-4
    decay: Literal["all", "matrices"] = "all"  # matrices: no norm, bias or table decays
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = Field(default=1.0, gt=0)  # global L2 norm of the gradient
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = Field(default=0, ge=0)  # steps of linear warm-up


class EmaConfig(Strict):
    decay: float = Field(default=0.9999, ge=0, lt=1)


class GuardConfig(Strict):
    """What a run bears, and when it ends itself rather than stand still."""

    nonfinite: Literal["stop", "skip"] = "stop"  # where a loss or gradient is not finite
    skips: int = Field(default=10, ge=1)  # of them in a row; then it stops
    hang: float = Field(default=600, ge=0)  # seconds without progress; 0: for ever
    silence: float = Field(default=60, gt=0)  # seconds without a sign of life: a rank is dead


class ValidationConfig(Strict):
    source: str | None = (
        None  # folder of the held-out source; its columns carry the names of the training columns
    )
    every: int = Field(default=1000, ge=1)  # steps
    rows: int = Field(default=256, ge=1)
    batch: int = Field(
        default=32, ge=1
    )  # rows a forward pass; fixed, so that the sums do not depend on the world size


class TrainConfig(Strict):
    data: DataConfig
    model: ModelConfig
    flow: FlowConfig = FlowConfig()
    optim: OptimConfig = Field(default_factory=OptimConfig)
    compute: ComputeConfig = Field(default_factory=ComputeConfig)
    ema: EmaConfig = Field(default_factory=EmaConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    deepspeed: Path | dict[str, Any] = Field(
        default_factory=lambda: {"zero_optimization": {"stage": 1}}
    )
    # a run, one of its steps, or what `train import` wrote: weights for step 0. Not read once the run has a checkpoint
    init_from: Path | None = None
    init_ema: bool = True  # its averaged weights
    seed: int = Field(default=0, ge=0, lt=2**64)
    steps: int = Field(ge=1)  # updates; warm-up, decay and this are counted in them
    # samples an update, over all ranks. May be another on resume: the samples go on in the same order from where they
    # were, and a step is then another number of them
    global_batch: int = Field(ge=1)
    micro_batch: int = Field(ge=1)  # samples a forward pass on one rank
    log_every: int = Field(default=50, ge=1)  # steps
    save_every: int = Field(default=1000, ge=1)  # steps
    keep: int = Field(
        default=3, ge=2
    )  # checkpoints; two at least, so that a damaged one has a predecessor
    runs: Path = Path("runs")

    @model_validator(mode="after")
    def _batches(self) -> "TrainConfig":
        if self.global_batch % self.data.lanes:
            raise ValueError(
                f"global_batch {self.global_batch} is no multiple of data.lanes {self.data.lanes}: change one of them"
            )
        return self

    def accumulation(self, world: int) -> int:
        """Micro-batches a step on each rank."""
        if self.global_batch % (world * self.micro_batch):
            raise ConfigError(
                f"global_batch {self.global_batch} cannot be cut into micro-batches of {self.micro_batch} on {world} "
                "ranks: make it a multiple of micro_batch x ranks"
            )
        return self.global_batch // (world * self.micro_batch)


def run_folder(config: TrainConfig, path: Path) -> Path:
    """Where a run lives: the names of its config and of its latent column, so that VAEs never share a folder."""
    latents = config.data.latents
    names = map(column_name, [latents] if isinstance(latents, str) else latents)
    return config.runs / f"{path.stem}-{'+'.join(dict.fromkeys(names))}"


def column_name(url: str) -> str:
    """How people call a column: the last part of its url, or of the folder that a link leads to."""
    return url.rstrip("/").rpartition("/")[2] if "://" in url else Path(url).resolve().name
