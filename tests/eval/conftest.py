"""Small real models, once for all tests: see `models`."""

from __future__ import annotations

from pathlib import Path

import pytest

from encode.models.text import TextEncoder
from encode.models.vae import Vae
from encode.registry import ModelSpec
from tests.encode.toy import text_encoder
from tests.eval.judged import clip_folder, detector_folder, llava_folder, qwen_folder  # noqa: F401 - fixtures
from tests.eval.models import save_run, save_text, save_vae


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("models") / "vae")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("models") / "text")


@pytest.fixture(scope="session")
def vae(vae_folder: Path) -> Vae:
    return Vae(ModelSpec.model_validate({"class": "AutoencoderKL", "path": str(vae_folder)}))


@pytest.fixture(scope="session")
def text(text_folder: Path) -> TextEncoder:
    model = ModelSpec.model_validate({"class": "BertModel", "path": str(text_folder)})
    return text_encoder(model, max_tokens=16)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, vae: Vae, text: TextEncoder) -> Path:
    """A run with two checkpoints. Step 10: weights as initialised, so the velocity is 0 everywhere and what is sampled
    is the noise itself; its average: weights that do follow the prompt. Step 20: the same, written as the newest."""
    return save_run(tmp_path_factory.mktemp("runs") / "tiny", vae, text)
