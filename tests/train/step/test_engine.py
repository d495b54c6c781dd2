"""The DeepSpeed JSON, and what DeepSpeed does by it: the recipe beside plain torch, on 1 rank and on 2."""

import gc
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import ConfigError
from tests.train.conftest import tiny_config
from tests.train.processes import in_world
from train.config import TrainConfig
from train.ranks.world import World
from train.step.ema import Ema
from train.step.engine import Engine, EngineError, check, deepspeed_config
from train.step.schedule import learning_rate


def config(tmp_path: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(tiny_config(tmp_path, tmp_path, **changes))


def test_batch_numbers_come_from_the_run(tmp_path: Path) -> None:
    values = deepspeed_config(config(tmp_path), 2)
    assert (values["train_batch_size"], values["train_micro_batch_size_per_gpu"]) == (16, 4)
    assert values["gradient_accumulation_steps"] == 2
    assert values["zero_optimization"] == {
        "stage": 1,
        "overlap_comm": False,
        "contiguous_gradients": False,
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zero_optimisation": {"stage": 2}}, "deepspeed.zero_optimisation: unknown key"),
        (
            {"zero_optimization": {"stage": 2, "overlap": True}},
            "zero_optimization.overlap: unknown",
        ),
        ({"zero_optimization": {"stage": 3}}, "stage: found 3, expected 1 or 2"),
        ({}, "stage: found None, expected 1 or 2"),
        ({"train_batch_size": 8}, "set global_batch instead"),
        ({"bf16": {"enabled": True}}, "torch_autocast"),
    ],
)
def test_what_deepspeed_would_ignore_is_refused(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(config(tmp_path, deepspeed=values), 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zero_optimization": {"overlap_comm": "maybe"}}, "overlap_comm: found 'maybe', expected true"),
        ({"zero_optimization": {"allgather_bucket_size": 1001}}, "expected an even number of elements"),
        ({"zero_optimization": {"reduce_bucket_size": 0.5}}, "found 0.5, expected a number of elements"),
        ({"communication_data_type": "int8"}, "found 'int8', expected fp32, bf16 or fp16"),
        ({"wall_clock_breakdown": "x"}, "wall_clock_breakdown: found 'x', expected true or false"),
        (
            {"torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Nope"]}},
            "expected a list of classes",
        ),
        ({"torch_autocast": {"enabled": True}}, "dtype: found None, expected 'bfloat16'"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "expected 'bfloat16': float16 scales"),
    ],
)  # fmt: skip
def test_a_value_that_deepspeed_fails_on_or_misuses_is_refused(
    tmp_path: Path, values: Any, message: str
) -> None:
    """In float16 it clips gradients that are scaled by 65,536 as if they were not."""
    zero = {"stage": 1, **values.get("zero_optimization", {})}
    requested = {**values, "zero_optimization": zero}
    with pytest.raises(ConfigError, match=re.escape(message)):
        deepspeed_config(config(tmp_path, deepspeed=requested), 1)


def test_sizes_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    buckets = {"reduce_bucket_size": 5e8, "allgather_bucket_size": 5e8}
    linear = {"enabled": False, "lower_precision_safe_modules": ["torch.nn.Linear"]}
    requested = {"zero_optimization": {"stage": 2, **buckets}, "torch_autocast": linear}
    assert deepspeed_config(config(tmp_path, deepspeed=requested), 1)["torch_autocast"] == linear


def test_a_file_is_read_and_a_missing_one_named(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    with pytest.raises(ConfigError, match="found nothing at .*zero.json"):
        deepspeed_config(config(tmp_path, deepspeed=str(path)), 1)
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert (
        deepspeed_config(config(tmp_path, deepspeed=str(path)), 1)["zero_optimization"]["stage"]
        == 2
    )


def test_impossible_batches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="16 cannot be cut into micro-batches of 4 on 3 ranks"):
        deepspeed_config(config(tmp_path), 3)
    with pytest.raises(ValueError, match="no multiple of data.lanes"):
        config(tmp_path, global_batch=12)


# What DeepSpeed then does, in one process group of 2 ranks --------------------------------------------------------


class Small(torch.nn.Module):
    """A matrix, a bias, a norm and a table, of sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = torch.nn.Linear(5, 7)
        self.norm = torch.nn.LayerNorm(7)
        self.table = torch.nn.Parameter(torch.empty(3, 7))
        self.last = torch.nn.Linear(7, 3, bias=False)
        for p in self.parameters():
            torch.nn.init.normal_(p, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.norm(self.first(x)) + self.table.sum(0))
        return out


def batches(rank: int, ranks: int, steps: int, micro: int) -> torch.Tensor:
    """(steps, micro-batches, samples, 5): the same samples for any number of ranks, dealt to them."""
    x = torch.randn(steps, 16, 5, generator=torch.Generator().manual_seed(1))
    return x[:, rank * 16 // ranks : (rank + 1) * 16 // ranks].unflatten(1, (-1, micro))


def engine_of(model: torch.nn.Module, made: TrainConfig, world: World) -> Engine:
    """An engine, once those of before have ended: DeepSpeed's finaliser imports something, which breaks Python's
    import locks if the collector calls it while something is being imported (KeyError in importlib, before 3.12).
    """
    gc.collect()
    return Engine(model, made, world)


def trained(world: World, folder: Path, steps: int = 4, **changes: Any) -> dict[str, Any]:
    """Some steps of the small model, with everything that can be compared with plain torch."""
    values = config(folder, **{"optim": OPTIM, **changes})
    model = Small()
    engine = engine_of(model, values, world)
    ema = Ema(engine.weights(), values.ema.decay)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    norms, rates = [], []
    for step, parts in enumerate(batches(world.rank, world.size, steps, values.micro_batch)):
        for part in parts:
            engine.backward(engine(part).square().mean())
            engine.step(learning_rate(values.optim, step, steps))
        norms.append(engine.grad_norm)
        rates.append([group["lr"] for group in engine.deepspeed.optimizer.param_groups])
        ema.update(engine.weights())
        for name, p in model.named_parameters():
            weights[name].lerp_(p.detach(), 1 - values.ema.decay)
    parts = {f.name: (f.start, f.stop, f.of(ema.parts).clone()) for f in engine.fragments}
    return {
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "average": weights, "parts": parts, "norms": norms, "rates": rates, "effective": engine.effective,
    }  # fmt: skip


OPTIM = {
    "lr": 0.05, "weight_decay": 0.3, "clip": 0.5, "schedule": "cosine", "warmup": 1, "betas": [0.8, 0.9]
}  # fmt: skip
MATRICES = {**OPTIM, "decay": "matrices"}
RECIPES: dict[str, dict[str, Any]] = {
    "stage 1": {},
    "stage 2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "not clipped": {"optim": {**OPTIM, "clip": None}},
    "matrices 1": {"optim": MATRICES},
    "matrices 2": {"optim": MATRICES, "deepspeed": {"zero_optimization": {"stage": 2}}},
}
AUTOCAST = {
    "zero_optimization": {"stage": 2}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}
}  # fmt: skip
Figures = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module", params=[1, 2])
def figures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Figures:
    """By rank and recipe; on 1 rank and on 2."""
    folder = tmp_path_factory.mktemp("engine")

    def work(world: World) -> dict[str, dict[str, Any]]:
        recipes = {name: trained(world, folder, **recipe) for name, recipe in RECIPES.items()}
        recipes["autocast"] = trained(world, folder, deepspeed=AUTOCAST)
        recipes["not finite 1"] = spoiled(world, folder, 1)
        recipes["not finite 4"] = spoiled(world, folder, 4)
        return recipes

    return in_world(request.param, work)


def plain(steps: int = 4, **recipe: Any) -> dict[str, torch.Tensor]:
    """The recipe written out in plain torch."""
    optim, model = recipe.get("optim", OPTIM), Small()
    decays = (
        {"first.weight", "last.weight"} if "decay" in optim else set(dict(model.named_parameters()))
    )
    pairs = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in pairs if n in decays], "weight_decay": 0.3},
        {"params": [p for n, p in pairs if n not in decays], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.05, betas=(0.8, 0.9))
    rates = [0.025, 0.05, 0.05 * 0.75, 0.05 * 0.25]
    for rate, x in zip(rates, batches(0, 1, steps, 16)[:, 0], strict=True):
        adamw.zero_grad()
        model(x).square().mean().backward()
        if optim["clip"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim["clip"])
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
    return {name: p.detach() for name, p in pairs}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_is_that_of_plain_torch(figures: Figures, recipe: str) -> None:
    """Clipping, accumulation, decay of all or of matrices alone, and rates right from the first step."""
    expected = plain(**RECIPES[recipe])
    for rank in figures:
        for name, p in rank[recipe]["weights"].items():
            torch.testing.assert_close(p, expected[name], rtol=2e-5, atol=2e-6)
        groups = 1 + ("matrices" in recipe)
        for rates, rate in zip(rank[recipe]["rates"], [0.025, 0.05, 0.0375, 0.0125], strict=True):
            assert rates == [pytest.approx(rate)] * groups
        assert min(rank[recipe]["norms"]) > 0.5  # so that clipping does something


def test_decay_of_matrices_is_another_recipe() -> None:
    first, second = plain(), plain(optim=MATRICES)
    assert not torch.allclose(first["table"], second["table"], rtol=1e-3)


@pytest.mark.parametrize("recipe", [*RECIPES, "autocast"])
def test_the_average_in_parts_is_the_whole_average(figures: Figures, recipe: str) -> None:
    """Each element stands on one rank, with the very bits of an average of whole weights."""
    covered = {name: torch.zeros(p.numel()) for name, p in figures[0][recipe]["average"].items()}
    for rank in figures:
        for name, (start, stop, part) in rank[recipe]["parts"].items():
            average = figures[0][recipe]["average"][name].flatten()
            assert torch.equal(part, average[start:stop]), name
            covered[name][start:stop] += 1
    assert all(bool((count == 1).all()) for count in covered.values())


def test_the_engine_says_what_it_runs_with(figures: Figures) -> None:
    for rank in figures:
        effective = rank["matrices 2"]["effective"]
        assert effective["weight_decay"] == [0.3, 0.0]
        assert (effective["stage"], effective["ranks"], effective["autocast"]) == (
            2,
            len(figures),
            None,
        )
        assert (effective["gradient_clipping"], effective["betas"]) == (0.5, (0.8, 0.9))
        assert rank["stage 1"]["effective"]["weight_decay"] == [0.3]
        assert rank["not clipped"]["effective"]["gradient_clipping"] == 0.0
        bf16 = rank["autocast"]["effective"]
        assert (bf16["autocast"], bf16["weights"]) == ("torch.bfloat16", "torch.float32")
        exact, rounded = rank["stage 2"]["weights"], rank["autocast"]["weights"]
        assert all(p.dtype == torch.float32 for p in rounded.values())
        assert not torch.equal(
            exact["first.weight"], rounded["first.weight"]
        )  # it is computed in bf16
        torch.testing.assert_close(
            exact["first.weight"], rounded["first.weight"], rtol=0.1, atol=0.05
        )


def spoiled(world: World, folder: Path, micro_batches: int) -> dict[str, Any]:
    """A gradient that is not finite on the last rank's first micro-batch alone; then a step that is discarded; then a
    sound one."""
    values = config(folder, micro_batch=16 // world.size // micro_batches)
    model = Small()
    engine = engine_of(model, values, world)
    states = [{name: p.detach().clone() for name, p in model.named_parameters()}]
    skipped = []
    for step, parts in enumerate(batches(world.rank, world.size, 3, values.micro_batch)):
        for number, part in enumerate(parts):
            hook = model.last.weight.register_hook(
                lambda gradient, bad=step + number == 0 and world.rank == world.size - 1: (
                    gradient * (torch.inf if bad else 1)
                )
            )
            engine.backward(engine(part).square().mean())
            hook.remove()
            if step == 1 and number == micro_batches - 1:
                engine.discard()
            engine.step(0.1)
        skipped.append(engine.skipped)
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
    updates = {float(s["step"]) for s in engine.zero.optimizer.state.values()}
    return {"states": states, "skipped": skipped, "updates": updates}


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_gradient_that_is_not_finite_moves_no_weight(
    figures: Figures, micro_batches: int
) -> None:
    for rank in figures:
        spoilt = rank[f"not finite {micro_batches}"]
        assert spoilt["skipped"] == [True, True, False]
        assert spoilt["updates"] == {1.0}
        first, second, third, fourth = spoilt["states"]
        for name in first:
            assert torch.equal(first[name], second[name])
            assert torch.equal(first[name], third[name])
        assert not torch.equal(first["first.weight"], fourth["first.weight"])


def test_a_setting_that_does_not_arrive_is_found() -> None:
    values = config(Path(), optim={"lr": 0.1, "clip": 2.0})
    requested = deepspeed_config(values, 1)
    sound = {
        **requested, **requested["zero_optimization"], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "ranks": 1,
        "weight_decay": [1e-4], "optimizer": "AdamW", "autocast": None, "weights": "torch.float32",
        "gradients": "torch.float32",
    }  # fmt: skip
    check(requested, values.optim, 1, [1e-4], sound)
    with pytest.raises(EngineError, match=r"gradient_clipping: asked for 2.0, runs with 0.0"):
        check(requested, values.optim, 1, [1e-4], {**sound, "gradient_clipping": 0.0})
    with pytest.raises(EngineError, match=r"weight_decay: asked for \[0.0001\], runs with \[0.0\]"):
        check(requested, values.optim, 1, [1e-4], {**sound, "weight_decay": [0.0]})
