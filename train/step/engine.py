"""The DeepSpeed engine: fp32 weights and AdamW, sharded by ZeRO 1 or 2 (arXiv 1910.02054), also on
one process.

Each rank holds a *partition*: flat fp32 tensors of weights and moments, cut from all parameters
laid end to end. A `Fragment` says which elements of which parameter are where in it. Checkpoints
and the EMA work on partitions only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs import ConfigError, shipped
from shards.format.atomic import read_json

from ..config import OptimConfig, TrainConfig
from ..ranks.world import World

# What the DeepSpeed JSON may say; what is not here has not been tried with this trainer, or would be ignored.
KNOWN: dict[str, tuple[str, ...]] = {
    "zero_optimization": (
        "stage", "overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size",
        "allgather_bucket_size",
    ),
    "torch_autocast": ("enabled", "dtype", "lower_precision_safe_modules"),
    "communication_data_type": (),
    "wall_clock_breakdown": (),
}  # fmt: skip
BATCH = (
    *("train_batch_size", "train_micro_batch_size_per_gpu"),
    *("gradient_accumulation_steps", "gradient_clipping"),
)
OURS = {
    "train_batch_size": "global_batch",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "global_batch and micro_batch",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "torch_autocast in the DeepSpeed JSON, which keeps the weights fp32",
    "fp16": "torch_autocast in the DeepSpeed JSON, which keeps the weights fp32",
}


def _is_size(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 1 <= value < 2**63 and value == int(value)


def _are_classes(value: Any) -> bool:
    """Whether a value lists classes by their modules, as DeepSpeed will import them."""
    try:
        paths = [path.rpartition(".") for path in value]
        return all(isinstance(getattr(import_module(m), name), type) for m, _, name in paths)
    except (ImportError, AttributeError, TypeError, ValueError):
        return False


FLAG = (lambda value: isinstance(value, bool), "true or false")
# a value that DeepSpeed takes, and how it is described
VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "zero_optimization.overlap_comm": FLAG,
    "zero_optimization.contiguous_gradients": FLAG,
    "zero_optimization.reduce_scatter": FLAG,
    "zero_optimization.reduce_bucket_size": (_is_size, "a number of elements"),
    "zero_optimization.allgather_bucket_size": (
        lambda value: _is_size(value) and value % 2 == 0,
        "an even number of elements",
    ),
    "torch_autocast.enabled": FLAG,
    "torch_autocast.lower_precision_safe_modules": (
        _are_classes,
        "a list of classes, as [torch.nn.Linear]",
    ),
    "communication_data_type": (
        lambda value: value in ("fp32", "bf16", "fp16"),
        "fp32, bf16 or fp16",
    ),
    "wall_clock_breakdown": FLAG,
}


class EngineError(RuntimeError):
    """DeepSpeed does not do what it was asked to."""

    exit_code = 2


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of a flattened parameter, at `offset` of partition tensor `group`."""

    name: str
    start: int
    stop: int
    group: int
    offset: int

    def of(self, flats: Sequence[Tensor]) -> Tensor:
        return flats[self.group][self.offset : self.offset + self.stop - self.start]


class Engine:
    """A model under DeepSpeed, with the parts of its state that checkpoints and the EMA need."""

    def __init__(self, model: nn.Module, config: TrainConfig, world: World) -> None:
        import deepspeed

        requested = deepspeed_config(config, world.size)
        groups = parameter_groups(model, config.optim)
        optimizer = torch.optim.AdamW(groups, fused=True, **_adamw(config.optim))
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=requested
        )
        self.zero = self.deepspeed.optimizer
        self.model: nn.Module = self.deepspeed.module
        self.effective = self._read_back()
        check(
            requested, config.optim, world.size, [g["weight_decay"] for g in groups], self.effective
        )
        self.fragments = self._fragments()

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.deepspeed(*inputs)  # type: ignore[no-any-return]  # DeepSpeed is untyped

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a micro-batch, divided by the number of micro-batches of a step."""
        self.deepspeed.backward(loss)

    def step(self, lr: float) -> None:
        """Moves the weights after the last micro-batch; to be called after each `backward`."""
        for group in self.zero.param_groups:
            group["lr"] = lr
        self.deepspeed.step()

    def discard(self) -> None:
        """Makes the last `step` of an update leave the weights alone, as a gradient of NaN does."""
        for gradients in self.zero.averaged_gradients.values():
            for gradient in gradients or ():
                gradient.fill_(torch.nan)

    @property
    def skipped(self) -> bool:
        """Whether the last step left the weights alone, because a gradient was not finite."""
        return bool(self.zero.overflow)

    @property
    def grad_norm(self) -> float:
        """Global L2 norm of the last step's gradient, before clipping."""
        return float(self.deepspeed.get_global_grad_norm())

    def weights(self) -> list[Tensor]:
        """Returns this rank's partition, a flat fp32 tensor a parameter group, padded by zeros."""
        return [part.data for part in self.zero.single_partition_of_fp32_groups]

    def moments(self) -> dict[str, list[Tensor]]:
        """Returns AdamW's two moments over the same partition; zero before the first update."""
        state, parts = self.zero.optimizer.state, self.zero.single_partition_of_fp32_groups
        return {
            name: [state[p][name] if state[p] else torch.zeros_like(p.data) for p in parts]
            for name in ("exp_avg", "exp_avg_sq")
        }

    @torch.no_grad()
    def set_weights(self, parts: Sequence[Tensor]) -> None:
        """Replaces this rank's partition; collective, since the model needs those of the others."""
        for part, values in zip(self.weights(), parts, strict=True):
            part.copy_(values)
        self.zero.update_lp_params()

    def set_moments(self, step: int, moments: Mapping[str, Sequence[Tensor]]) -> None:
        """Gives AdamW its state after `step` updates."""
        for i, part in enumerate(self.zero.single_partition_of_fp32_groups):
            count = torch.tensor(float(step), device=part.device)
            state = {name: flats[i].to(part.device) for name, flats in moments.items()}
            self.zero.optimizer.state[part] = {"step": count, **state}

    def _fragments(self) -> list[Fragment]:
        """Returns which elements this rank owns, compared with the weights themselves."""
        fragments, flats = [], self.weights()
        for group, parameters in enumerate(self.zero.bit16_groups):
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is None:  # all of it is on other ranks
                    continue
                source, place = mapping.lp_fragment_address, mapping.hp_fragment_address
                name, stop = self.zero.param_names[parameter], source.start + source.numel
                fragment = Fragment(name, source.start, stop, group, place.start)
                if not torch.equal(
                    fragment.of(flats), parameter.detach().flatten()[fragment.start : fragment.stop]
                ):
                    raise EngineError(
                        f"DeepSpeed's partition does not hold {name} where it says: another version?"
                    )
                fragments.append(fragment)
        return fragments

    def _read_back(self) -> dict[str, Any]:
        """Returns what DeepSpeed runs with, by the names of its JSON."""
        ds, adamw = self.deepspeed, self.zero.optimizer
        groups = adamw.param_groups
        return {
            "stage": int(ds.zero_optimization_stage()),
            "ranks": ds.dp_world_size,
            "train_batch_size": ds.train_batch_size(),
            "train_micro_batch_size_per_gpu": ds.train_micro_batch_size_per_gpu(),
            "gradient_accumulation_steps": ds.gradient_accumulation_steps(),
            "gradient_clipping": self.zero.clip_grad,
            "optimizer": type(adamw).__name__,
            **{n: _one_of([group[n] for group in groups]) for n in ("lr", "betas", "eps")},
            "weight_decay": [group["weight_decay"] for group in groups],
            "autocast": str(ds.torch_autocast_dtype()) if ds.torch_autocast_enabled() else None,
            "weights": _one_of([str(p.dtype) for p in self.zero.single_partition_of_fp32_groups]),
            "gradients": str(self.zero.gradient_accumulation_dtype),
            "overlap_comm": bool(self.zero.overlap_comm),
            "contiguous_gradients": bool(self.zero.contiguous_gradients),
            "reduce_scatter": bool(self.zero.reduce_scatter),
            "reduce_bucket_size": self.zero.reduce_bucket_size,
            "allgather_bucket_size": self.zero.allgather_bucket_size,
        }


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Returns one group that decays, or that and one of norms, biases and tables that does not."""
    pairs = list(model.named_parameters())
    if optim.decay == "all":
        return [{"params": [p for _, p in pairs], "weight_decay": optim.weight_decay}]
    flat = {name: p.ndim < 2 or name.endswith("table") for name, p in pairs}
    groups = [
        {"params": [p for name, p in pairs if flat[name] == rest], "weight_decay": decay}
        for rest, decay in ((False, optim.weight_decay), (True, 0.0))
    ]
    return [group for group in groups if group["params"]]


def _one_of(values: list[Any]) -> Any:
    """Returns the value of all groups; the list of them, where they differ."""
    return values[0] if all(value == values[0] for value in values) else values


def deepspeed_config(config: TrainConfig, world: int) -> dict[str, Any]:
    """Returns the JSON for DeepSpeed: the user's, checked, and the batch arithmetic of the run."""
    json = config.deepspeed
    values = json if isinstance(json, dict) else _read_json(shipped(json))
    for key, value in values.items():
        if key in OURS:
            raise ConfigError(f"deepspeed.{key}: remove it, and set {OURS[key]} instead")
        if key not in KNOWN:
            raise ConfigError(f"deepspeed.{key}: unknown key. Known ones: {', '.join(KNOWN)}")
        inner = value if KNOWN[key] else {}
        if not isinstance(inner, dict):
            raise ConfigError(f"deepspeed.{key}: found {value!r}, expected a mapping")
        if unknown := sorted(set(inner) - set(KNOWN[key])):
            raise ConfigError(
                f"deepspeed.{key}.{unknown[0]}: unknown key. Known ones: {', '.join(KNOWN[key])}"
            )
        leaves = (
            {f"{key}.{name}": part for name, part in inner.items()} if KNOWN[key] else {key: value}
        )
        for name, part in leaves.items():
            if name in VALUES and not VALUES[name][0](part):
                raise ConfigError(f"deepspeed.{name}: found {part!r}, expected {VALUES[name][1]}")
    autocast = values.get("torch_autocast", {})
    if autocast.get("enabled") and autocast.get("dtype") != "bfloat16":
        raise ConfigError(
            f"deepspeed.torch_autocast.dtype: found {autocast.get('dtype')!r}, expected 'bfloat16': float16 scales the "
            "gradient, and DeepSpeed clips it as if it had not been scaled"
        )
    zero = values.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2):
        raise ConfigError(
            f"deepspeed.zero_optimization.stage: found {zero.get('stage')!r}, expected 1 or 2"
        )
    return {
        **values,
        # overlap_comm and contiguous_gradients of ZeRO 2 have a history of wrong gradients; both only if asked for
        "zero_optimization": {"overlap_comm": False, "contiguous_gradients": False, **zero},
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.accumulation(world),
        "gradient_clipping": config.optim.clip or 0.0,  # DeepSpeed's way to say that it is not
        "steps_per_print": 10**9,  # the loop prints its own line
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise ConfigError(
            f"deepspeed: found nothing at {path}, expected a JSON file: check the path"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"deepspeed: {path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"deepspeed: {path} holds a {type(values).__name__}, expected an object")
    return values


def _adamw(optim: OptimConfig) -> dict[str, Any]:
    return {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}


def check(
    requested: Mapping[str, Any], optim: OptimConfig, ranks: int, decays: Sequence[float],
    effective: Mapping[str, Any],
) -> None:  # fmt: skip
    """Raises EngineError where DeepSpeed, which ignores some settings, runs with others."""
    zero, autocast = requested["zero_optimization"], requested.get("torch_autocast", {})
    dtype = f"torch.{autocast.get('dtype', 'bfloat16')}" if autocast.get("enabled") else None
    expected = {
        **{name: requested[name] for name in BATCH},
        **{name: value for name, value in zero.items() if name in effective},
        **_adamw(optim),
        "weight_decay": list(decays),
        "ranks": ranks,
        "optimizer": "AdamW",
        "autocast": dtype,
        "weights": "torch.float32",
        "gradients": "torch.float32",
    }
    wrong = [
        f"{k}: asked for {v!r}, runs with {effective[k]!r}"
        for k, v in expected.items()
        if effective[k] != v
    ]
    if wrong:
        raise EngineError(
            "DeepSpeed runs with other settings than asked for:\n  " + "\n  ".join(wrong)
        )
