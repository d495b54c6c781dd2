"""From a column's config to what is stored: identity, layout, norm, words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

import configs
from encode.config import ColumnConfig, EncodeConfig
from encode.errors import EncodeError, ModelNotUsable
from encode.models.encoder import (
    CaptionEncoder,
    Encoder,
    ImageEncoder,
    column_spec,
    existing_scales,
    measured_scales,
)
from encode.models.load import load_encoder
from encode.models.pixels import pixels_from_table, to_float16, to_pixels
from encode.models.tokenizer import tokenizer_digest
from encode.plan.sample_source import SourceJob
from encode.run.specs import scales
from encode.source.decoding import View
from encode.source.tars import make_source
from shards import (
    Column,
    ColumnSpec,
    Norm,
    ShardWriter,
    Status,
    Store,
    canonical_json,
    create_column,
    open_join,
    open_store,
    put_complete,
    put_empty,
    sha256,
)
from shards.format.int8 import stored_rows
from shards.read.stream import Batch, read_rows
from tests.encode.light import write_source
from tests.encode.tiny_models import SIDE, Models
from tests.encode.toy import tar_bytes
from train.model.flow import FlowConfig
from train.step.inputs import training_inputs

CONFIG: TypeAdapter[Any] = TypeAdapter(ColumnConfig)
IMAGES = np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8)
CAPTIONS = ["a cat", "", "a photograph of an astronaut", "Größe"]


def load(**column: Any) -> Any:
    return load_encoder(CONFIG.validate_python(column), "cpu")


def pictures(**column: Any) -> Any:
    encoder = load(**column)
    assert isinstance(encoder, ImageEncoder)
    return encoder


def words_of(**column: Any) -> Any:
    encoder = load(**column)
    assert isinstance(encoder, CaptionEncoder)
    return encoder


def test_identity_of_a_column_made_before_the_options(tiny: Models) -> None:
    """Field by field as ever: neither the options nor their defaults are named."""
    vae = pictures(kind="moments", encoder=tiny("flux"), resolution=32)
    spec = column_spec(vae, "source", 3, 1024)
    preprocess = {
        "image": "jpg", "resolution": 32, "decoder": "pil", "resize": "bilinear, short side",
        "crop": "centre",
    }  # fmt: skip
    encoder = {"subfolder": None, "revision": None, "precision": "fp32"}
    assert spec.identity == {
        "kind": "moments", "preprocess": preprocess, "dtype": "float16", "source": "source",
        "encoder": {**tiny("flux"), **encoder, "weights": vae.weights},
    }  # fmt: skip
    assert (spec.layout.row_shape, spec.norm) == ((32, 4, 4), Norm((0.1,), (0.5,)))
    assert vae.view == View(32, "jpg")
    text = words_of(kind="tokens", encoder=tiny("gemma"), max_tokens=40)
    spec = column_spec(text, "source", 3, 1024)
    tokenizer = tokenizer_digest(text.tokenizer._tokenizer)
    preprocess = {
        "caption": "txt", "template": "{}", "max_tokens": 40, "hidden_state": -1,
        "tokenizer": tokenizer,
    }  # fmt: skip
    assert spec.identity == {
        "kind": "tokens", "preprocess": preprocess, "dtype": "bfloat16", "source": "source",
        "encoder": {**tiny("gemma"), **encoder, "weights": text.weights},
    }  # fmt: skip
    assert (spec.layout.row_shape, spec.empty_tokens) == ((40, 32), 1)
    assert (spec.layout.record(), spec.norm) == (
        {"kind": "tokens", "row_shape": [40, 32], "shards": 3, "shard_rows": 1024}, None
    )  # fmt: skip


def test_options_are_named_where_they_are_used(tiny: Models) -> None:
    base: dict[str, Any] = {"kind": "tokens", "encoder": tiny("qwen2"), "max_tokens": 8}
    plain = words_of(**base)
    chat = words_of(**base, instruction="Draw ", chat_template=True, caption="short.txt")
    preprocess, expected = chat.identity().text.record(), plain.identity().text.record()
    assert {k for k in preprocess if preprocess[k] != expected.get(k)} == {
        "instruction", "chat_template", "caption"
    }  # fmt: skip
    assert chat.suffix == "short.txt"
    assert chat.row_shape[0] > plain.row_shape[0] == 8


@pytest.mark.parametrize("name", ["dc", "taesd", "rae"])
def test_latents_of_an_encoder_without_posterior(tiny: Models, name: str) -> None:
    norm = {"norm": {"shift": [0.0], "scale": [0.41407]}} if name == "dc" else {}
    encoder = pictures(kind="latents", encoder=tiny(name), resolution=SIDE, **norm)
    spec = column_spec(encoder, "source", 1, 1024)
    assert spec.layout.kind == spec.identity["kind"] == "latents"
    stored = encoder.rows(IMAGES)
    assert (stored.dtype, stored.shape) == (np.float16, (5, *spec.layout.row_shape))
    with pytest.raises(ModelNotUsable, match="has no posterior. Say kind: latents, not moments"):
        load(kind="moments", encoder=tiny(name), resolution=SIDE)


def test_moments_are_not_latents(tiny: Models) -> None:
    with pytest.raises(ModelNotUsable, match="has a posterior. Say kind: moments, not latents"):
        load(kind="latents", encoder=tiny("flux"), resolution=SIDE)


def test_options_that_no_column_can_have(tiny: Models) -> None:
    gemma = {"kind": "ids", "encoder": tiny("gemma")}
    with pytest.raises(ValueError, match="max_tokens\n.*less than or equal to 65535"):
        load(**gemma, max_tokens=70_000)  # lengths are uint16
    encoder = load(**gemma, backend="webdataset", codec="blosc")
    message = "a column of ids: the webdataset backend has no codec. Change its options"
    with pytest.raises(EncodeError, match=message):
        column_spec(encoder, "source", 1, 1024)


def test_a_norm_for_a_model_that_has_a_scale_alone(tiny: Models) -> None:
    """Its class knows no shift, so there is none; a column may say one, and it is recorded."""
    column = {"kind": "moments", "encoder": tiny("hunyuan"), "resolution": SIDE}
    assert pictures(**column).norm == Norm((0.0,), (0.5,))
    encoder = pictures(**column, norm={"shift": [0.25], "scale": [0.5]})
    assert column_spec(encoder, "s", 1, 1024).record()["norm"] == {"shift": [0.25], "scale": [0.5]}
    flux = {"kind": "moments", "encoder": tiny("flux"), "resolution": SIDE}
    assert pictures(**flux, norm={"shift": [0.1], "scale": [0.5]}).norm == Norm((0.1,), (0.5,))
    with pytest.raises(ModelNotUsable, match="Leave norm out of the column"):
        load(**flux, norm={"shift": [0.1], "scale": [0.6]})
    three = pictures(**column, norm={"shift": [0.0] * 3, "scale": [0.5] * 3})
    with pytest.raises(
        ModelNotUsable, match="found 3 channels, expected 1 or the 8 of the latents"
    ):
        column_spec(three, "s", 1, 1024)


def test_token_ids_need_no_model(tiny: Models, tmp_path: Path) -> None:
    ids = words_of(kind="ids", encoder=tiny("t5"), max_tokens=9)
    full = words_of(kind="tokens", encoder=tiny("t5"), max_tokens=9)
    stored = ids.rows(CAPTIONS, 100)
    assert [row.tolist() for row in stored] == full.tokenizer(CAPTIONS)
    assert {row.dtype for row in stored} == {np.dtype(np.int32)}
    spec = column_spec(ids, "s", 1, 1024)
    assert (spec.layout.row_shape, spec.layout.element, spec.empty_tokens) == ((9,), "int32", 1)
    assert ids.weights == full.tokenizer.weights
    assert spec.identity["encoder"]["class"] == "AutoTokenizer"
    for file in Path(tiny("t5")["path"]).glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = words_of(kind="ids", encoder={**tiny("t5"), "path": str(tmp_path)}, max_tokens=9)
    assert tokenizer.weights == ids.weights
    with pytest.raises(
        ModelNotUsable, match="the tokenizer is another than the column's .*expected 0000"
    ):
        load_encoder(ids.config, "cpu", "0" * 64)


@pytest.mark.parametrize("element", ["float16", "bfloat16"])
def test_features(tiny: Models, element: str) -> None:
    encoder = pictures(kind="features", encoder=tiny("dinov2"), element=element)
    spec = column_spec(encoder, "s", 1, 1024)
    assert encoder.view == View(SIDE, "jpg")  # shares the decoding with a VAE of that size
    assert (spec.layout.row_shape, spec.norm) == ((5, 32), None)
    assert spec.layout.element == spec.identity["dtype"] == element
    assert spec.identity["preprocess"]["mean"] == [0.485, 0.456, 0.406]
    stored = encoder.rows(IMAGES)
    exact = encoder.encode(torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 127.5 - 1)
    if element == "float16":
        values = torch.from_numpy(stored).float()
    else:
        values = torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16).float()
    torch.testing.assert_close(values, exact, rtol=2**-8, atol=1e-4)
    pooled = pictures(kind="features", encoder=tiny("dinov2"), output="pooled")
    assert column_spec(pooled, "s", 1, 1024).layout.row_shape == (32,)


def written(place: Path, encoder: Encoder, rows: Any, status: Any = None) -> Store:
    """A finished column of these rows."""
    store = open_store(place)
    spec = column_spec(encoder, "source", 1, 1024, lambda: measured_scales(encoder, CAPTIONS, 99))  # type: ignore[arg-type]  # asked of captions alone
    return put(store, spec, encoder, rows, status)


def put(store: Store, spec: ColumnSpec, encoder: Encoder, rows: Any, status: Any) -> Store:
    digest = create_column(store, spec)
    if isinstance(encoder, CaptionEncoder):
        put_empty(store, spec, encoder.rows([""], 99)[0])
    writer = ShardWriter(store, spec, digest, 0, len(rows), "index")
    writer.put_block(
        stored_rows(spec, rows), np.zeros(len(rows), np.uint8) if status is None else status
    )
    writer.commit({})
    put_complete(store, digest, 1, allow_failed=False)
    return store


def test_training_on_latents(tiny: Models, tmp_path: Path) -> None:
    """A column of latents takes the place of moments: nothing is drawn, the same norm and shapes."""
    images = pictures(
        kind="latents",
        encoder=tiny("dc"),
        resolution=SIDE,
        norm={"shift": [0.5], "scale": [0.41407]},
    )
    stored = images.rows(IMAGES)
    latents = written(tmp_path / "dc", images, stored)
    captions = words_of(kind="tokens", encoder=tiny("gemma"), max_tokens=40)
    text = written(tmp_path / "text", captions, captions.rows([*CAPTIONS, "five"], 99))
    join = open_join(latents, text)
    assert (join.posterior, join.latent_shape) == (False, (8, 8, 8))
    rows = np.arange(5)
    values, tokens, cu = read_rows(join, rows)
    ids = torch.from_numpy(rows)
    batch = Batch(0, ids + 100, ids, values, tokens, cu)
    empty = torch.zeros(1, 32)
    x = training_inputs(batch, join.norm, empty, FlowConfig(), 0.0, 7, join.posterior)
    assert torch.equal(x.latents, (torch.from_numpy(stored).float() - 0.5) * 0.41407)
    moments = torch.cat([values, torch.zeros_like(values)], 1)  # the same samples, with a posterior
    inputs = training_inputs(
        Batch(0, ids + 100, ids, moments, tokens, cu), join.norm, empty, FlowConfig(), 0.0, 7
    )
    assert torch.equal(x.noise, inputs.noise)  # paired with a run on moments
    assert torch.equal(x.timestep, inputs.timestep)
    assert not torch.equal(x.latents, inputs.latents)
    join.close()


class Loud(torch.nn.Module):
    """A convolution that some pictures drive beyond float16, or to NaN."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = self.layer(x)
        bright = x.mean((1, 2, 3), keepdim=True)
        return torch.where(bright > 0.9, h * 1e9, torch.where(bright < -0.9, h * torch.nan, h))


def test_bytes_are_looked_up_on_a_gpu() -> None:
    values = np.arange(256 * 3, dtype=np.uint16).astype(np.uint8).reshape(1, 16, 16, 3)
    assert torch.equal(pixels_from_table(torch.from_numpy(values)), to_pixels(values))
    assert torch.equal(pixels_from_table(torch.from_numpy(IMAGES)), to_pixels(IMAGES))


def test_float16_is_rounded_as_numpy_rounds() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).exp() ** 6
    values = torch.cat([values, -1 / values, torch.tensor([0.0, -0.0, 65519.9, 65520.0])])
    with np.errstate(over="ignore"):
        expected = values.numpy().astype(np.float16)
    np.testing.assert_array_equal(to_float16(values).view(np.uint16), expected.view(np.uint16))


def test_what_float16_cannot_hold_is_marked(tiny: Models, tmp_path: Path) -> None:
    """A model that overflows on white and is undefined on black: those rows end as NON_FINITE."""
    encoder = pictures(kind="moments", encoder=tiny("flux"), resolution=SIDE)
    encoder._module.encoder = Loud(encoder._module.encoder)
    images = IMAGES.copy()
    images[1], images[3] = 255, 0
    stored = encoder.rows(images)
    assert np.isinf(stored[1]).any()
    assert np.isnan(stored[3]).any()
    column = Column.open(written(tmp_path / "column", encoder, stored))
    ok, bad = Status.OK, Status.NON_FINITE
    assert column.status(np.arange(5)).tolist() == [ok, bad, ok, bad, ok]
    assert np.isnan(column.read(np.array([1, 3]))).all()
    assert np.array_equal(column.read(np.array([0, 2, 4])), stored[[0, 2, 4]])
    column.close()


def test_scales_of_an_int8_column(tiny: Models, tmp_path: Path) -> None:
    encoder = words_of(kind="tokens", encoder=tiny("gemma"), max_tokens=40, element="int8")
    store = open_store(tmp_path / "text")
    assert existing_scales(store) is None
    scales = measured_scales(encoder, [None, *CAPTIONS], 99)
    assert scales["rows"] == 3  # neither the missing one nor the empty one
    spec = column_spec(encoder, "source", 1, 1024, lambda: scales)
    assert spec.identity["dtype"] == "int8"
    put(store, spec, encoder, encoder.rows(CAPTIONS, 99), None)
    assert existing_scales(store) == scales
    with pytest.raises(ValueError, match="scales of its channels"):
        column_spec(encoder, "source", 1, 1024)


def test_scales_are_measured_on_the_first_tar_that_has_captions(
    tiny: Models, tmp_path: Path
) -> None:
    encoder = words_of(kind="tokens", encoder=tiny("gemma"), max_tokens=40, element="int8")
    pattern = write_source(tmp_path / "tars", 3, 2)
    (tmp_path / "tars/0.tar").write_bytes(b"<html>")
    (tmp_path / "tars/1.tar").write_bytes(tar_bytes([("0.jpg", b"no caption beside it")]))
    values = {"root": str(tmp_path), "sources": {"toy": pattern}, "columns": {}}
    config = EncodeConfig.model_validate(values)

    def measured() -> Any:
        source, tars = make_source("toy", pattern, 1024)
        return scales(
            encoder, SourceJob(source, tars, open_store(tmp_path / "toy"), tmp_path), "text", config
        )

    captions = [f"picture {row} of shard 2" for row in range(2)]
    assert measured() == measured_scales(encoder, captions, config.engine.tokens)
    (tmp_path / "tars/2.tar").write_bytes(b"<html>")
    with pytest.raises(
        EncodeError, match="0.tar: neither it nor the tars after it .3 were looked at"
    ):
        measured()


def test_a_base_can_be_thinned_out(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "root: cache\nsources: {a: a.tar, b: b.tar}\ncolumns:\n  x: {kind: ids, encoder: t5-xxl}\n"
    )
    config = configs.load(
        EncodeConfig, tmp_path / "base.yaml", ["sources.b=null", "columns.x=null"]
    )
    assert (config.sources, config.columns) == ({"a": "a.tar"}, {})


# sha256 of the canonical JSON, by the release before identities were typed
DEMO = {
    "vae-plain": "b6eab9c0c53339d252f07d7307faf2bd043e6bd253bfb802982261a9d2090a1e",
    "vae-equi": "65211b7ce7cdf1cf0f888fc015925161e9b964b53c4c96c08a2ead17e2b2e092",
    "minilm": "7bb81bd1bc64ab118554ee863f5ef0f01c2430a84f6fcbbcfee0e47cdc1702ae",
}


def test_identities_of_the_demo_are_what_they_were() -> None:
    config = configs.load(EncodeConfig, Path("configs/demo/encode.yaml"), [])
    digests = {
        name: sha256(canonical_json(load_encoder(column, "cpu").identity().record()))
        for name, column in config.columns.items()
    }
    assert digests == DEMO
