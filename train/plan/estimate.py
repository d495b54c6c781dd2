"""What a run takes, by arithmetic: parameters, FLOPs, memory, bytes, hours and money."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..config import TrainConfig
from ..model.config import FlowConfig
from ..model.dit import DiT
from ..model.flops import Cost, Gpu, forward, parameters, total, training
from ..model.tokens import Tokens
from ..ready import disk_bytes
from ..run import model_config, refuse_narrow
from ..step.engine import deepspeed_config
from .caching_speedup import PADDED, Efficiency, Saving, savings
from .memory import activations, by_stage
from .survey import DataSummary

PIXELS = 8  # a side of the picture that one side of the latent stands for, of all VAEs in `saving`
BUCKET = 500_000_000  # elements, unless the DeepSpeed JSON says otherwise


@dataclass(frozen=True)
class Setting:
    """What is assumed of the machines."""

    gpus: int
    gpu: Gpu | None
    efficiency: Efficiency
    price: float | None  # of a GPU hour


@dataclass(frozen=True)
class RunPlan:
    data: DataSummary
    setting: Setting
    parameters: dict[str, int]
    forward: Cost
    train: Cost
    memory: dict[int, dict[str, float]]  # by ZeRO stage; 0 is the reference
    stage: int  # of the config
    accumulation: int
    savings: list[Saving]
    steps: int
    global_batch: int
    micro_batch: int
    tokens: Tokens
    flow: FlowConfig
    checkpoint_bytes: int
    snapshot_bytes: int  # of power averages, of all that the run makes

    @property
    def samples(self) -> int:
        return self.steps * self.global_batch

    @property
    def flops(self) -> float:
        """FLOPs of a sample, forward and backward."""
        return self.train.of(1, self.data.tokens)

    @property
    def samples_per_second(self) -> float | None:
        s = self.setting
        return s.gpus * s.gpu.peak * s.efficiency.dit / self.flops if s.gpu else None

    @property
    def gpu_hours(self) -> float | None:
        rate = self.samples_per_second
        return rate and self.samples / rate * self.setting.gpus / 3600

    def epochs(self) -> dict[str, tuple[float, float]]:
        """Returns steps of an epoch and epochs of the run, of each source whose rows are known.
        Sources without a fixed share are one."""
        steps = {
            s.name: s.rows / (s.share * self.global_batch)
            for s in self.data.sources
            if s.share and s.rows
        }
        if self.data.rows and not steps:
            steps = {
                "+".join(s.name for s in self.data.sources): self.data.rows / self.global_batch
            }
        return {name: (count, self.steps / count) for name, count in steps.items()}


def make_plan(config: TrainConfig, data: DataSummary, setting: Setting) -> RunPlan:
    """Returns the plan; ConfigError where the batch or the DeepSpeed JSON does not fit."""
    engine = deepspeed_config(config, setting.gpus)
    zero, autocast = engine["zero_optimization"], engine.get("torch_autocast", {}).get("enabled")
    shape = data.shape
    size = (shape.height, shape.width)
    dit = model_config(config, shape)
    refuse_narrow(dit, config.flow)
    with torch.device("meta"):
        model = DiT(dit)
    parts, train = parameters(model), training(model.config, *size)
    matrices = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    linear, bucket = (
        sum(m.weight.numel() for m in matrices),
        int(zero.get("reduce_bucket_size", BUCKET)),
    )
    activation_bytes = config.micro_batch * activations(
        model.config, *size, data.tokens, 2 if autocast else 4, config.compute.recompute
    )
    memory = {
        stage: by_stage(
            stage,
            setting.gpus,
            sum(parts.values()),
            linear,
            bucket,
            bool(autocast),
            len(config.ema.power or ()),
        )
        | {"activations, estimated": activation_bytes}
        for stage in (0, 1, 2)
    }
    square = shape.width == shape.height
    return RunPlan(
        data, setting, parts, total(forward(model.config, *size)), train, memory, zero["stage"],
        config.accumulation(setting.gpus),
        savings(train, PIXELS * shape.height, data.tokens, setting.efficiency) if square else [],
        config.steps, config.global_batch, config.micro_batch, Tokens.of(dit, *size),
        config.flow.resolved(shape.channels * shape.height * shape.width),
        *disk_bytes(config, sum(parts.values())),
    )  # fmt: skip


def as_record(plan: RunPlan) -> dict[str, Any]:
    """Returns the plan as JSON."""
    rate, hours, price = plan.samples_per_second, plan.gpu_hours, plan.setting.price
    return {
        "parameters": sum(plan.parameters.values()),
        "parameters_by_part": plan.parameters,
        "given": asdict(plan.data),
        "flops_a_sample": {
            "forward": plan.forward.of(1, plan.data.tokens),
            "training": plan.flops,
            "training_padded": plan.train.of(1, PADDED),
        },
        "memory_bytes": {str(stage): {**parts, "total": sum(parts.values())} for stage, parts in plan.memory.items()},
        "epochs": {name: {"steps": s, "of_the_run": e} for name, (s, e) in plan.epochs().items()},
        "samples": plan.samples,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "ema_snapshot_bytes": plan.snapshot_bytes,
        "bytes_a_sample": plan.data.sample_bytes,
        "setting": asdict(plan.setting),
        "samples_per_second": rate,
        "seconds_a_step": rate and plan.global_batch / rate,
        "read_bytes_per_second": rate and rate * plan.data.sample_bytes,
        "hours": hours and hours / plan.setting.gpus,
        "gpu_hours": hours,
        "price": hours and price and hours * price,
        "cached_over_online": [asdict(s) for s in plan.savings],
    }  # fmt: skip
