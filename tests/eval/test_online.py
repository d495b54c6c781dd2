"""Training from columns is training from pictures and captions: the same loss, with the libraries' own classes.

Three ways to one step: columns of latents and tokens; ids, with the encoder in the step; no column at all.
"""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from configs import ConfigError
from encode.config import EncodeConfig
from encode.errors import ModelNotUsable
from encode.models.packed_text import PackedText
from encode.run.job import run as encode
from eval.commands import main
from eval.errors import MissingPictures
from eval.images.generate import Generator, Request
from eval.online import Online, online, step_encoder
from shards import JoinedColumns, seal, sha256_file
from shards.read.stream import Batch, Stream, empty_caption, pad_text
from tests.encode.toy import jpeg, save_gemma, save_kl, save_qwen, tar_bytes
from tests.train.conftest import TINY
from tests.train.here import columns_of, forked, losses, manifest, trained
from train.config import TrainConfig
from train.model import flow
from train.model.dit import DiT, DiTConfig
from train.ranks.world import World
from train.run import from_columns, model_config, shape_of
from train.step.inputs import training_inputs

SIDE, BATCH = 32, 16  # pixels | samples a step
ALONE = World(0, 1, torch.device("cpu"))
CLASSES = {"kl": "AutoencoderKL", "qwen": "AutoencoderKLQwenImage"}
SENTENCE = "a photograph of an astronaut who rides a horse on the moon in colour and a cat"


def caption(number: int) -> str:
    words = SENTENCE.split()
    return " ".join(words[: 1 + number % len(words)]) + f" {number}"


def write_source(folder: Path, shards: int, rows: int, first: int) -> str:
    """Tars of counted pictures with a long and a short caption; the third is none."""
    folder.mkdir()
    for shard in range(shards):
        members = []
        for n in range(first + shard * rows, first + (shard + 1) * rows):
            picture = jpeg(n, quality=90) if n != first + 2 else b"none"
            members += [
                (f"{n:04d}.jpg", picture), (f"{n:04d}.txt", caption(n).encode()),
                (f"{n:04d}.short.txt", str(n).encode()),
            ]  # fmt: skip
        (folder / f"{shard}.tar").write_bytes(tar_bytes(members))
    return f"{folder}/{{0..{shards - 1}}}.tar"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars `one` and `two`, models, and of each source the columns of both VAEs and of both captions, as tokens and as
    ids."""
    folder = tmp_path_factory.mktemp("online")
    save_kl(folder / "kl")
    save_qwen(folder / "qwen")
    save_gemma(folder / "gemma")
    gemma = {"encoder": {"class": "GemmaModel", "path": str(folder / "gemma")}, "max_tokens": 90}
    vaes = {
        name: {"kind": "moments", "encoder": {"class": cls, "path": str(folder / name)}, "resolution": SIDE}
        for name, cls in CLASSES.items()
    }  # fmt: skip
    config = {
        "root": str(folder / "cache"),
        "sources": {
            "one": write_source(folder / "one", 2, 15, 0), "two": write_source(folder / "two", 1, 12, 100)
        },
        "columns": {
            **vaes, "text": {"kind": "tokens", **gemma}, "ids": {"kind": "ids", **gemma},
            "short": {"kind": "tokens", **gemma, "caption": "short.txt"},
            "short-ids": {"kind": "ids", **gemma, "caption": "short.txt"},
        },
        "shard_rows": 1024, "engine": {"executor": "inline", "device": "cpu", "batch": 8},
    }  # fmt: skip
    assert encode(EncodeConfig.model_validate(config)) == 0
    return folder


def values(
    cache: Path, runs: Path, vae: str = "kl", captions: str = "text", **data: Any
) -> dict[str, Any]:
    item = cache / "cache/one"
    return {
        "data": {
            "latents": str(item / vae), "text": str(item / captions), "lanes": 8, "caption_dropout": 0.2,
            "encoder": {"class": "GemmaModel", "path": str(cache / "gemma")} if "ids" in captions else None, **data,
        },
        "model": {**TINY, "patch_size": 1}, "steps": 1, "global_batch": BATCH, "micro_batch": 4, "log_every": 1,
        "save_every": 10, "runs": str(runs),
    }  # fmt: skip


def config_of(cache: Path, runs: Path, *words: Any, **data: Any) -> TrainConfig:
    return TrainConfig.model_validate(values(cache, runs, *words, **data))


def moving(config: DiTConfig) -> DiT:
    """A model of weights that hide nothing: as initialised, it would put out zeros whatever it is given."""
    model = DiT(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15, generator=generator)
    return model


# Against the libraries themselves ------------------------------------------------------------------------------------


def direct(cache: Path, vae: str, rows: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Moments and hidden states of pictures and captions, by torchvision, diffusers and transformers alone."""
    import diffusers
    import transformers
    from torchvision import transforms

    shown = transforms.Compose([
        transforms.Resize(SIDE, interpolation=transforms.InterpolationMode.BILINEAR),
        transforms.CenterCrop(SIDE), transforms.ToTensor(), transforms.Normalize([0.5], [0.5]),
    ])  # fmt: skip
    numbers = [15 * (row // 1024) + row % 1024 for row in rows]
    pictures = [Image.open(io.BytesIO(jpeg(n, quality=90))).convert("RGB") for n in numbers]
    x = torch.stack([shown(picture) for picture in pictures])
    encoder = getattr(diffusers, CLASSES[vae]).from_pretrained(cache / vae).eval()
    posterior = encoder.encode(x[:, :, None] if vae == "qwen" else x).latent_dist
    moments = torch.cat([posterior.mean, posterior.logvar], 1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(cache / "gemma", padding_side="right")
    text = transformers.GemmaModel.from_pretrained(cache / "gemma").eval()
    options = tokenizer(
        [caption(n) for n in numbers], padding="max_length", max_length=90, return_tensors="pt"
    )
    states = text(**options).last_hidden_state
    lengths = options.attention_mask.sum(1).tolist()
    return moments.flatten(1).view(len(rows), -1, *moments.shape[-2:]), [
        row[:n] for row, n in zip(states, lengths, strict=True)
    ]


def losses_of(
    model: DiT, sources: JoinedColumns, config: TrainConfig, batch: Batch, empty: Tensor
) -> Tensor:
    """Of each sample of a step: what `Trainer.step` computes."""
    x = training_inputs(
        batch, sources.norm, empty, config.flow, config.data.caption_dropout, config.seed
    )
    predicted = model(x.noisy, x.timestep, *pad_text(x.tokens, x.cu_seqlens))
    return flow.losses(config.flow, predicted, x.latents, x.noise, x.sigma)


@torch.no_grad()
@pytest.mark.parametrize("vae", CLASSES)
def test_the_loss_is_that_of_pictures_and_captions(cache: Path, tmp_path: Path, vae: str) -> None:
    """Columns hold fp16 and bf16; the loss is the fp32 item within 1e-4. Other rows or texts are not near it."""
    config = config_of(cache, tmp_path, vae)
    sources, order = columns_of(config)
    model = moving(model_config(config, shape_of(sources)))
    with Stream(sources, order, position=0, global_batch=BATCH) as stream:
        cached = next(stream)
    moments, states = direct(cache, vae, cached.rows.tolist())
    tokens, empty = torch.cat(states), empty_caption(sources)
    assert moments.dtype == tokens.dtype == torch.float32
    assert [len(s) for s in states] == cached.lengths.tolist()

    def online_losses(moments: Tensor, tokens: Tensor) -> Tensor:
        batch = Batch(0, cached.samples, cached.rows, moments, tokens, cached.cu_seqlens)
        return losses_of(model, sources, config, batch, empty.float())

    expected = online_losses(moments, tokens)
    actual = losses_of(model, sources, config, cached, empty)
    assert float(actual.mean()) == pytest.approx(float(expected.mean()), rel=1e-4)
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=0)
    for wrong in (
        online_losses(moments.roll(1, 0), tokens),
        online_losses(moments, tokens.flip(0)),
    ):
        assert (wrong / expected - 1).abs().max() > 5e-3


# Through the trainer -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(cache: Path) -> Path:
    """A step folder with a model that moves, for these columns."""
    config = config_of(cache, cache)
    model = moving(model_config(config, shape_of(columns_of(config)[0])))
    folder = cache / "step-00000000"
    folder.mkdir()
    file = folder / "ema.safetensors"
    save_file(model.state_dict(), file)
    record = {
        "format": "latentbank-checkpoint", "version": 1, "step": 0, "model": model.config.model_dump(),
        "files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}},
    }  # fmt: skip
    (folder / "manifest.json").write_bytes(seal(record))
    return folder


@pytest.fixture(scope="module")
def by_command(cache: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on ids by `python -m eval train`."""
    folder = tmp_path_factory.mktemp("ids")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values(cache, folder, "kl", "ids")))
    code, output = forked(
        lambda: main(["train", str(path), "steps=2", f"init_from={start}"]), folder / "log"
    )
    assert code == 0, output
    assert "step 2/2  loss" in output
    return folder / "tiny-kl"


def test_three_ways_to_one_step(cache: Path, start: Path, by_command: Path, tmp_path: Path) -> None:
    init = {"init_from": str(start), "steps": 2}
    cached = losses(trained({**values(cache, tmp_path / "cached"), **init}))
    without = {**values(cache, tmp_path / "online"), **init}
    batches = online(TrainConfig.model_validate(without), cache / "one")
    live = losses(trained(without, batches=batches))
    ids = losses(by_command)
    assert cached.keys() == live.keys() == ids.keys() == {1, 2}
    for step in (1, 2):
        assert live[step] == pytest.approx(cached[step], rel=1e-4)
        assert ids[step] == pytest.approx(cached[step], rel=1e-4)
    assert cached[1] != pytest.approx(cached[2], rel=2e-3)  # what the tolerance is of


def test_a_run_on_ids_says_which_encoder_it_had(cache: Path, by_command: Path) -> None:
    """So its pictures can be sampled, with that encoder."""
    output = manifest(by_command, 2)["data"]["text_encoder"]
    assert output["encoder"]["class"] == "GemmaModel"
    generator = Generator.load(Request(checkpoint=by_command, prompts=Path(), save_dir=Path()))
    assert generator.texts.load().weights == output["encoder"]["weights"]
    assert generator.texts.load().tokenizer.config.max_tokens == 90
    assert generator.identity["text_encoder"] == output["encoder"]["weights"]


def test_another_encoder_is_another_run(cache: Path, by_command: Path) -> None:
    words = ["steps=3", "data.hidden_state=1"]
    code, output = forked(
        lambda: main(["train", str(by_command.parent / "tiny.yaml"), *words]), by_command.parent / "log-2"
    )  # fmt: skip
    assert code == 2
    assert "data.text_encoder.preprocess.hidden_state: found -1, expected 1" in output


def test_the_command_trains_on_tokens_too(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values(cache, tmp_path)))
    code, output = forked(lambda: main(["train", str(path)]), tmp_path / "log")
    assert code == 0, output
    assert "text_encoder" not in manifest(tmp_path / "tiny-kl", 1)["data"]


def test_encoders_that_are_not_that_of_the_ids(cache: Path, tmp_path: Path) -> None:
    config = config_of(cache, tmp_path, "kl", "ids")
    sources, _ = columns_of(config)
    output: list[tuple[Any, type[Exception], str]] = [
        (None, ModelNotUsable, "no model of the registry has this tokenizer"),
        ("gemma-3", ModelNotUsable, r"did you mean gemma-2b\? Known are"),
        ({"class": "GemmaModel"}, ConfigError, "data.encoder.path is missing: expected a hub id"),
        ({"class": "GemmaModel", "path": str(cache / "kl")}, ModelNotUsable, "no tokenizer"),
    ]
    for encoder, error, message in output:
        data = config.data.model_copy(update={"encoder": encoder})
        with pytest.raises(error, match=message):
            step_encoder(config.model_copy(update={"data": data}), sources, "cpu")
    assert isinstance(step_encoder(config, sources, "cpu"), PackedText)


def test_steps_are_measured_of_both_ways_and_nothing_is_saved(cache: Path, tmp_path: Path) -> None:
    """As many steps as are asked for, with the losses of a training; then no checkpoint."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values(cache, tmp_path / "whole") | {"steps": 3}))
    code, output = forked(lambda: main(["train", str(path)]), tmp_path / "log")
    assert code == 0, output
    expected = losses(tmp_path / "whole/tiny-kl")
    for name, words in (("cached", []), ("online", ["--tars", str(cache / "one")])):
        command = [
            "train",
            str(path),
            f"runs={tmp_path / name}",
            "save_every=1",
            *words,
            "--measure",
            "3",
        ]
        code, output = forked(lambda: main(command), tmp_path / f"log-{name}")  # noqa: B023
        assert code == 0, output
        run = tmp_path / name / "tiny-kl"
        assert losses(run) == pytest.approx(expected, rel=1e-4)
        assert not (run / "checkpoints").exists()
        assert "measured 3 steps: nothing is saved" in output


def test_tars_that_are_not_there_are_named_before_anything_runs(
    cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values(cache, tmp_path)))
    with pytest.raises(MissingPictures, match=r"two/0.tar: found .* bytes, expected one of"):
        main(["train", str(path), "--tars", str(cache / "two")])
    with pytest.raises(ConfigError, match="found 2 folders of tars for 1 sources"):
        main(["train", str(path), "--tars", str(cache / "one"), str(cache / "two")])
    assert not (tmp_path / "tiny-kl").exists()


# Batches without columns ---------------------------------------------------------------------------------------------


def both_sources(cache: Path, *names: str) -> dict[str, Any]:
    item, two = cache / "cache/one", cache / "cache/two"
    return {
        "latents": [str(item / "kl"), str(two / "kl")],
        "text": [{str(item / names[0]): 0.5, str(item / names[1]): 0.5}, str(two / names[0])],
        "weights": [0.5, 0.5],
    }  # fmt: skip


@pytest.mark.parametrize("names", [("text", "short"), ("ids", "short-ids")])
def test_batches_are_those_of_the_columns(
    cache: Path, tmp_path: Path, names: tuple[str, str]
) -> None:
    """Two sources, one with two captions; on two ranks; from any position."""
    config = config_of(cache, tmp_path, **both_sources(cache, *names))
    sources, order = columns_of(config)
    folders = [cache / "one", cache / "two"]
    live_batches = Online.load(config, sources, folders, "cpu")
    for rank in (0, 1):
        world = World(rank, 2, torch.device("cpu"))
        stream = from_columns(config, sources, order)(BATCH, world)
        live = online(config, folders)(BATCH, world) if rank else live_batches.batches(BATCH, world)
        for cached, ours in islice(zip(stream, live, strict=False), 3):
            assert ours.position == cached.position
            for name in ("samples", "rows", "sources", "cu_seqlens"):
                assert torch.equal(getattr(ours, name), getattr(cached, name)), name
            torch.testing.assert_close(ours.moments, cached.moments.float(), rtol=2**-11, atol=2e-5)
            assert ours.tokens.dtype == cached.tokens.dtype
            torch.testing.assert_close(
                ours.tokens.float(), cached.tokens.float(), rtol=2**-7, atol=2e-5
            )
        stream.close()  # type: ignore[attr-defined]  # a Stream
        live.close()  # type: ignore[attr-defined]  # a generator


def test_what_online_batches_cannot_be_made_of(cache: Path, tmp_path: Path) -> None:
    config = config_of(cache, tmp_path)
    with pytest.raises(ConfigError, match="found 2 folders of tars for 1 sources"):
        next(online(config, [cache / "one", cache / "two"])(0, ALONE))
    with pytest.raises(ConfigError, match="data.partial"):
        online(config_of(cache, tmp_path, partial=True), cache / "one")
