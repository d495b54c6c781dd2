"""What goes wrong while a model is loaded is one named error, and nothing of the model's own runs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from encode.config import ColumnConfig, EngineConfig
from encode.errors import ModelNotUsable, NoGpu
from encode.models.load import load_encoders
from encode.models.loading import has_file, missing_packages
from encode.models.own import load_vae
from encode.models.tokenizer import load_tokenizer
from encode.registry import TRUST, ModelSpec
from tests.encode.tiny_models import DOWN, GROUPED, SIDE, Models, save_t5, save_tokenizer, saved
from tests.encode.toy import save_kl, spec, text_encoder

CONFIG: TypeAdapter[Any] = TypeAdapter(ColumnConfig)
ENGINE = EngineConfig(executor="inline", device="cpu")
LLAMA = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}


def load(kind: str, cls: str, folder: Path | str, **column: Any) -> Any:
    """The encoder of a column, loaded and tried as a run does."""
    encoder = {"class": cls, "path": str(folder), **column.pop("encoder", {})}
    size = {"resolution": SIDE} if kind in ("moments", "latents") else {"max_tokens": 24}
    values = {"kind": kind, "encoder": encoder, **size, **column}
    return load_encoders({"c": CONFIG.validate_python(values)}, ENGINE)["c"]


def refused(message: str, *words: Any, **column: Any) -> None:
    with pytest.raises(ModelNotUsable, match=message):
        load(*words, **column)


def text_model(folder: Path, cls: str = "LlamaModel", **config: Any) -> Path:
    size = save_tokenizer(folder, ["<s>", "<pad>", "</s>"], "<s> $A </s>", **LLAMA)
    base = GROUPED if cls == "LlamaModel" else {}
    return saved(folder, "transformers", cls, {"vocab_size": size, **base, **config})


def changed(folder: Path, **values: Any) -> Path:
    """Other values in a model's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


def copied(models: Path, folder: Path, **values: Any) -> Path:
    return changed(Path(shutil.copytree(models / "kl", folder)), **values)


# Packages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantisation", "packages"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes accelerate"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao"),
        ({"quant_method": "quanto", "weights": "int8"}, "optimum-quanto"),
    ],
)
def test_a_package_of_a_quantised_model(
    quantisation: dict[str, Any], packages: str, tmp_path: Path
) -> None:
    """None of them is a dependency of this project, or of one of its own."""
    folder = changed(text_model(tmp_path / "m"), quantization_config=quantisation)
    names = packages.replace(" ", " and ")
    refused(
        f"LlamaModel: it needs {names}, not installed here. Run `pip install {packages}`",
        "tokens", "LlamaModel", folder,
    )  # fmt: skip


def sentencepiece(words: list[str]) -> bytes:
    """A SentencePiece file of these words."""
    from transformers.utils import sentencepiece_model_pb2_new as protocol

    model = protocol.ModelProto()
    for i, word in enumerate(["<pad>", "</s>", "<unk>", *words]):
        piece = model.pieces.add()
        piece.piece, piece.score, piece.type = word, -i, (3, 3, 2)[i] if i < 3 else 1
    model.trainer_spec.unk_id = 2
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.model"])
def test_t5_with_a_sentencepiece_file_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks for tiktoken, which would not read it."""
    from transformers.utils import import_utils

    # also where they are installed
    message = import_utils.BACKENDS_MAPPING["sentencepiece"][1]
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "sentencepiece", (lambda: False, message))
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    monkeypatch.setattr("encode.models.loading.installed", lambda name: name == "google.protobuf")
    folder = save_t5(tmp_path / "m")
    for file in folder.glob("token*"):
        file.unlink()
    (folder / name).write_bytes(sentencepiece([*"abcdefghijklmnopqrst", "▁cat"]))
    refused(
        "no tokenizer can be loaded: it needs sentencepiece, .*`pip install sentencepiece`, or put "
        "a tokenizer.json", "tokens", "T5EncoderModel", folder,
    )  # fmt: skip


def test_packages_are_those_that_are_not_there(tmp_path: Path) -> None:
    model = spec("LlamaModel", tmp_path)
    error = ImportError("`tiktoken` is required to read a file. Install it with `pip install x`.")
    assert missing_packages(ImportError("no", name="a.b"), model) == ["a"]
    assert missing_packages(ImportError("run `pip install -U 'ab-c>=0.2'`."), model) == ["ab-c"]
    assert missing_packages(ValueError("a value"), model) == []
    (tmp_path / "tiktoken.model").touch()  # which SentencePiece does not read
    assert has_file(model, "tiktoken.model")
    assert missing_packages(error, model) == ["x"]


@pytest.mark.parametrize("kind", ["ids", "tokens"])
def test_a_tokenizer_whose_files_are_not_there(kind: str, tmp_path: Path, tiny: Models) -> None:
    """transformers makes one that knows no word; a column would be of unknown tokens."""
    for name in ("t5", "clip", "gemma", "qwen2"):
        encoder = tiny(name)
        folder = Path(shutil.copytree(encoder["path"], tmp_path / name))
        for file in folder.glob("token*"):
            file.unlink()
        refused(
            "its tokenizer knows . words .* Bring tokenizer.json", kind, encoder["class"], folder
        )


# Classes -------------------------------------------------------------------------------------------


def test_classes_that_are_no_autoencoder(models: Path, tmp_path: Path) -> None:
    """Said before a weight is read: the folder holds another model."""
    kl = models / "kl"
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    config = {**blocks, "block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1}
    unet = saved(tmp_path / "unet", "diffusers", "UNet2DModel", config)
    for folder in (unet, kl):
        refused(
            "UNet2DModel is no autoencoder: it has no encode and no decode",
            "moments", "UNet2DModel", folder,
        )  # fmt: skip
    half = "LTX2VideoDiffusionDecoderModel"
    refused(f"{half} is no autoencoder: it has no encode[.]", "latents", half, kl)
    for name in ("DDPMScheduler", "FluxPipeline", "logging", "models", "AutoencoderXL"):
        refused(f"diffusers has no class '{name}' of models", "moments", name, kl)
    for name in ("LlamaConfig", "AutoTokenizer", "logging"):
        folder = tmp_path / f"text-{name}"
        refused(f"transformers has no class '{name}' of models", "tokens", name, text_model(folder))


def test_a_class_that_needs_a_package(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers has a stand-in for it, of which any use raises; librosa is no dependency."""
    import diffusers
    from diffusers.utils import DummyObject

    absent = DummyObject("AutoencoderAbsent", (), {"_backends": ["librosa"]})
    monkeypatch.setattr(diffusers, "AutoencoderAbsent", absent, raising=False)
    refused("requires the librosa library", "moments", "AutoencoderAbsent", models / "kl")


def test_a_quantiser_has_latents_and_no_posterior(tmp_path: Path) -> None:
    """VQModel's latents are those before its codebook; `decode` takes the nearest of it."""
    from diffusers import VQModel

    config = {
        "block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    }  # fmt: skip
    folder = saved(tmp_path / "m", "diffusers", "VQModel", config)
    refused(
        "VQModel has no posterior. Say kind: latents, not moments", "moments", "VQModel", folder
    )
    norm = {"shift": [0.0], "scale": [0.18215]}
    vae = load("latents", "VQModel", folder, norm=norm)
    reference = VQModel.from_pretrained(folder).eval()
    x = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = reference.encode(x).latents
        pixels = reference.decode(latents).sample.clamp(-1, 1)
    torch.testing.assert_close(vae.encode(x), latents, rtol=0, atol=2e-5)
    torch.testing.assert_close(vae.decode(latents), pixels, rtol=0, atol=2e-5)


def temporal(folder: Path) -> Path:
    """The autoencoder of Stable Video Diffusion."""
    config = {
        "block_out_channels": [32, 32], "down_block_types": DOWN["down_block_types"][:2],
        "layers_per_block": 1,
    }  # fmt: skip
    return saved(folder, "diffusers", "AutoencoderKLTemporalDecoder", config)


def test_a_class_that_decodes_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It encodes pictures, but what is made with its latents could not be looked at."""
    folder, norm = temporal(tmp_path / "m"), {"shift": [0.0], "scale": [0.18215]}
    with pytest.raises(ModelNotUsable, match="cannot make a column: its decoder is of videos"):
        load("moments", "AutoencoderKLTemporalDecoder", folder)
    monkeypatch.setattr("encode.models.vae.REFUSED", {})  # as a class that is not known
    refused(
        "cannot decode what it encodes. A class that decodes frames.*VAE_ADAPTERS\n.*num_frames",
        "moments", "AutoencoderKLTemporalDecoder", folder, norm=norm,
    )  # fmt: skip
    # and nothing is said of a class that is not known
    with pytest.raises(
        ModelNotUsable, match="is not known to .*VAE_ADAPTERS, so it is taken"
    ) as no:
        load("latents", "AutoencoderKLTemporalDecoder", folder)
    assert "has a posterior" not in str(no.value)


def test_a_class_with_latents_that_is_not_known(
    tiny: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    from encode.models.vae import VAE_ADAPTERS

    monkeypatch.delitem(VAE_ADAPTERS, "AutoencoderDC")
    refused(
        "AutoencoderDC has no posterior: `encode` gives latent, expected latent_dist",
        "moments", "AutoencoderDC", tiny("dc")["path"], norm={"shift": [0.0], "scale": [0.41407]},
    )  # fmt: skip


def test_a_model_of_four_channels(tmp_path: Path) -> None:
    folder = save_kl(tmp_path / "rgba", in_channels=4, out_channels=4)
    with pytest.raises(ModelNotUsable, match="takes pictures of 4 channels .* Give a model") as no:
        load("moments", "AutoencoderKL", folder)
    assert "another size" not in str(no.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"block_out_channels": "abc"}, "converted"),
        ({"block_out_channels": []}, "index out of range"),
        ({"down_block_types": ["NoSuchBlock"] * 4}, "NoSuchBlock does not exist"),
        ({"norm_num_groups": 0}, "by zero"),
        ({"latent_channels": -1}, "negative dimension"),
        ({"latent_channels": 8}, "size mismatch"),
        ({"layers_per_block": "2"}, "integer"),
    ],
)
def test_a_config_that_does_not_fit_its_class(
    values: dict[str, Any], words: str, tmp_path: Path, models: Path
) -> None:
    folder = copied(models, tmp_path / "kl", **values)
    refused(
        f"cannot be loaded as AutoencoderKL .*{words}.* Check class, path and its config.json",
        "moments", "AutoencoderKL", folder,
    )  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [{"hidden_size": "x"}, {"num_attention_heads": 3}, {"num_attention_heads": 0}, {"head_dim": 15},
     {"hidden_act": "none"}, {"vocab_size": -1}, {"num_hidden_layers": 3}],
)  # fmt: skip
def test_a_text_config_that_does_not_fit(values: dict[str, Any], tmp_path: Path) -> None:
    folder = changed(text_model(tmp_path / "m"), **values)
    refused(f"{folder}: ", "tokens", "LlamaModel", folder)


def test_damaged_weights(tmp_path: Path, models: Path) -> None:
    folder = copied(models, tmp_path / "kl")
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 50)
    refused("cannot be loaded as AutoencoderKL", "moments", "AutoencoderKL", folder)
    text = text_model(tmp_path / "text")
    (text / "model.safetensors").write_bytes(b"\xff" * 50)
    refused("cannot be loaded as LlamaModel", "tokens", "LlamaModel", text)


# Text encoders that were refused for a wrong reason ------------------------------------------------

OPT = {
    "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 24,
}  # fmt: skip
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}


@pytest.mark.parametrize(("cls", "config"), [("OPTModel", OPT), ("XLNetModel", XLNET)])
def test_padding_on_the_right_changes_nothing(
    cls: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """OPT counts positions by the mask, XLNet's are relative and without end (it says -1)."""
    import transformers

    folder = text_model(tmp_path / "m", cls, **config)
    encoder = load("tokens", cls, folder)
    captions = ["a cat", "a dog sits on it", ""]
    reference = getattr(transformers, cls).from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for caption, states in zip(captions, encoder.encode(captions), strict=True):
        with torch.no_grad():
            alone = reference(input_ids=torch.tensor([tokenizer(caption).input_ids]))
        torch.testing.assert_close(
            states.float(), alone.last_hidden_state[0], rtol=2**-7, atol=2**-7
        )
    if cls == "OPTModel":
        refused("25 tokens asked for, the model takes 24", "tokens", cls, folder, max_tokens=25)
    else:
        assert load("tokens", cls, folder, max_tokens=300).row_shape == (300, 32)


# Variants ------------------------------------------------------------------------------------------


def test_a_variant_of_the_weights(tmp_path: Path, models: Path) -> None:
    from diffusers import AutoencoderKL

    half = AutoencoderKL.from_pretrained(models / "kl").half()
    half.save_pretrained(tmp_path / "kl", variant="fp16")
    folder = tmp_path / "kl"
    refused("Its weights are of a variant: say variant: fp16", "moments", "AutoencoderKL", folder)
    vae = load("moments", "AutoencoderKL", folder, encoder={"variant": "fp16"})
    plain = load("moments", "AutoencoderKL", models / "kl")
    assert vae.weights != plain.weights
    state = vae._module.state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(
        torch.equal(state[k], v.half().float()) for k, v in plain._module.state_dict().items()
    )
    identity = vae.model.identity(vae.weights).record()
    assert identity["variant"] == "fp16"
    assert load_vae(identity).weights == vae.weights
    assert "variant" not in plain.model.identity("w").record()

    text = text_model(tmp_path / "text")
    (text / "model.safetensors").rename(text / "model.bf16.safetensors")
    refused("say variant: bf16", "tokens", "LlamaModel", text)
    encoder = load("tokens", "LlamaModel", text, encoder={"variant": "bf16"})
    assert encoder.identity().encoder.variant == "bf16"
    ids = load("ids", "LlamaModel", text, encoder={"variant": "bf16"})  # a tokenizer has none
    assert "variant" not in ids.identity().encoder.record()


# Code of a model -----------------------------------------------------------------------------------

CODE = """
import os
from pathlib import Path
from transformers import LlamaConfig, LlamaModel
Path(os.environ["CASE_MARK"]).touch()
class C(LlamaConfig):
    model_type = "x_custom"
class X(LlamaModel):
    config_class = C
"""


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once code of a model has run; questions would be answered by yes."""
    monkeypatch.setenv("CASE_MARK", str(tmp_path / "mark"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    return tmp_path / "mark"


def with_code(folder: Path) -> Path:
    """A model whose class is in a file beside its weights."""
    names = {"AutoConfig": "own.C", "AutoModel": "own.X"}
    changed(text_model(folder), model_type="x_custom", architectures=["X"], auto_map=names)
    (folder / "own.py").write_text(CODE)
    return folder


def on_the_hub(folder: Path, cache: Path) -> str:
    """A model as the cache of the hub has it, by its id there."""
    snapshot = cache / "models--somebody--own" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0" * 40)
    return "somebody/own"


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_code_of_a_model_is_not_run(
    place: str, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(with_code(tmp_path / "m"))
    if place == "hub":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        path = on_the_hub(tmp_path / "m", tmp_path / "hub")
    for cls, message in (
        ("AutoModel", "without running Python code that comes with the model"),
        ("X", "transformers has no class 'X' .* AutoModel and trust_remote_code: true"),
    ):
        refused(message, "tokens", cls, path)
    assert not mark.exists()


def test_code_of_a_model_is_run_where_the_config_says_so(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_code(tmp_path / "m")
    encoder = load("tokens", "AutoModel", folder, encoder={"trust_remote_code": True})
    assert mark.exists()
    assert encoder.cls == "X"
    identity = encoder.identity().encoder
    assert identity.record()["trust_remote_code"] is True
    plain = text_model(tmp_path / "plain")
    assert (
        "trust_remote_code" not in load("tokens", "LlamaModel", plain).identity().encoder.record()
    )
    # a column cannot allow it, the user can
    with pytest.raises(ModelNotUsable, match=f"because a column says so.* set {TRUST}=1"):
        ModelSpec.of_identity(identity)
    monkeypatch.setenv(TRUST, "1")
    assert ModelSpec.of_identity(identity) == encoder.model
    assert text_encoder(ModelSpec.of_identity(identity), max_tokens=24).weights == encoder.weights


def test_code_of_a_tokenizer(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = text_model(tmp_path / "m")
    code = CODE.split("class C")[0] + (
        "from transformers import PreTrainedTokenizerFast\n"
        "class T(PreTrainedTokenizerFast):\n    pass\n"
    )
    (folder / "own.py").write_text(code)
    file = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": [None, "own.T"]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    refused("no tokenizer can be loaded without running Python code", "ids", "LlamaModel", folder)
    assert not mark.exists()
    trusted = load("ids", "LlamaModel", folder, encoder={"trust_remote_code": True})
    assert mark.exists()
    assert type(trusted._tokenizer).__name__ == "T"
    with pytest.raises(ModelNotUsable, match="because a column says so"):
        load_tokenizer(trusted.identity())
    monkeypatch.setenv(TRUST, "1")
    assert load_tokenizer(trusted.identity()).weights == trusted.weights


# Devices -------------------------------------------------------------------------------------------


def test_a_gpu_that_is_not_there(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    column = CONFIG.validate_python({
        "kind": "moments", "encoder": {"class": "AutoencoderKL", "path": str(models / "nothing")},
        "resolution": SIDE,
    })  # fmt: skip
    engine = ENGINE.model_copy(update={"device": "cuda"})
    with pytest.raises(NoGpu, match="engine.device=cuda: torch .* finds no GPU on .* leave device"):
        load_encoders({"c": column}, engine)
