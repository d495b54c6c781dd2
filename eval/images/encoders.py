"""The VAE and the text encoder of a set: those of the columns, or others that are named.

A name or hub id is a registry entry, else it is a folder, whose config says which class its weights
are of. What is made with other weights than the columns is another set, so it must be asked for,
and the settings hold the digests of what was used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from encode import TokensColumn
from encode.errors import ModelNotUsable
from encode.models import TextEncoder, Vae, expected_of, load_autoencoder
from encode.registry import TEXTS, VAES, ModelSpec, location
from shards.format import ColumnIdentity, EncoderIdentity, differences
from shards.format.atomic import read_file

from ..errors import EncoderMismatch

Json = dict[str, Any]
TOKENS = 256  # of a caption, in the reference
HALVES = {  # classes of whole models whose text half is the encoder
    "T5ForConditionalGeneration": "T5EncoderModel", "CLIPModel": "CLIPTextModel",
}  # fmt: skip


def relocate_encoder(
    encoder: EncoderIdentity, place: str | None, registry: Mapping[str, ModelSpec] | None = None
) -> EncoderIdentity:
    """Returns an encoder's identity with its files in another place; the weights must be the same.

    A place is a name or hub id of the registry, or a folder: the whole repository, if it has the
    encoder's subfolder, or else the encoder's folder, with the tokenizer's in it or beside it.
    """
    if place is None:
        return encoder
    if spec := _registered(place, registry or {}):
        fields = ("path", "subfolder", "revision", "tokenizer")
        return encoder.model_copy(update={name: getattr(spec, name) for name in fields})
    folder, below, tokens = _place(place), encoder.subfolder, encoder.tokenizer
    record: Json = {"path": place, "subfolder": None, "revision": None}
    if below and (folder / below).is_dir():
        record["subfolder"] = below
    elif tokens and not (folder / tokens).is_dir() and (folder.absolute().parent / tokens).is_dir():
        record |= {"path": str(folder.absolute().parent), "subfolder": folder.absolute().name}
    if tokens and not (_place(str(record["path"])) / tokens).is_dir():
        record["tokenizer"] = None  # its files are the encoder's neighbours
    return encoder.model_copy(update=record)


def _registered(named: str | None, registry: Mapping[str, ModelSpec]) -> ModelSpec | None:
    """Returns a registry's entry by its name or hub id, unless a folder of that name exists."""
    if named is None or named in registry or Path(named).is_dir():
        return registry.get(named or "")
    return next((spec for spec in registry.values() if spec.path == named), None)


def check_named(flag: str, named: str | None, registry: Mapping[str, ModelSpec]) -> None:
    """Raises ModelNotUsable where a flag names a model that is not there, as far as that is known
    without a look into the hub: a path that begins in a folder that exists is none of its ids.
    """
    if named is None or _registered(named, registry) or Path(named).exists():
        return  # a file may be of a class of the user's own
    try:
        location(named)
    except ModelNotUsable as error:
        raise ModelNotUsable(
            f"{flag}: {error}. Name a folder, or one of {', '.join(registry)}"
        ) from None
    if Path(named).parent.is_dir():
        raise ModelNotUsable(
            f"{flag}: {named}: found no such folder in {Path(named).parent}, expected that of a model. Correct the "
            f"path, or name one of {', '.join(registry)}"
        )


def _place(name: str) -> Path:
    return Path(location(name)) if name.startswith("package:") else Path(name)


# Named alone --------------------------------------------------------------------------------------


def vae_named(name: str) -> ModelSpec:
    """Returns a VAE by its name or hub id in the registry, or its folder, run as the registry's."""
    if spec := _registered(name, VAES):
        return spec
    folder = _folder(name, VAES)
    subfolder = None if (folder / "config.json").exists() else "vae"
    return _spec(name, _config(folder / (subfolder or "")).get("_class_name"), subfolder)


def text_named(name: str) -> ModelSpec:
    """Returns a text encoder likewise."""
    if spec := _registered(name, TEXTS):
        return spec
    cls = (_config(_folder(name, TEXTS)).get("architectures") or [None])[0]
    if isinstance(cls, str):  # a model with a head, or a pair of towers
        cls = HALVES.get(cls, re.sub(r"For[A-Z]\w*$", "Model", cls))
    return _spec(name, cls, None)


def _folder(name: str, registry: Mapping[str, ModelSpec]) -> Path:
    folder = _place(name)
    if not folder.is_dir():
        raise ModelNotUsable(
            f"{name}: no such folder, and none of {', '.join(registry)}. Name a folder with a config.json, or one of "
            "these"
        )
    return folder


def _config(folder: Path) -> Json:
    path = folder / "config.json"
    try:
        config = json.loads(read_file(path))  # not ours, and may hold Infinity
    except (OSError, ValueError) as error:
        raise ModelNotUsable(
            f"{path}: found nothing that can be read ({error}), expected the model's config"
        ) from None
    return config if isinstance(config, dict) else {}


def _spec(name: str, cls: Any, subfolder: str | None) -> ModelSpec:
    if not isinstance(cls, str):
        raise ModelNotUsable(f"{name}: its config.json names no class of a model")
    fields = {"class": cls, "path": name, "subfolder": subfolder, "precision": "bf16-autocast"}
    return ModelSpec.model_validate(fields)


# VAE ----------------------------------------------------------------------------------------------


def vae_of(
    column: ColumnIdentity | None, named: str | None, device: str, allow_other: bool,
    allow_class: Collection[str] = (),
) -> Vae:  # fmt: skip
    """Returns the VAE of a column's identity, or the one named; without a column one must be named.

    EncoderMismatch if it is another than the column's, unless `allow_other`. A class of the user's own
    is imported only if `allow_class` names it; with `allow_other`, `named` is its path.
    """
    own = column is not None and ":" in column.encoder.cls
    if named and (allow_other or column is None) and not own:
        return Vae(vae_named(named), device)
    assert column is not None
    encoder = relocate_encoder(column.encoder, named, VAES)
    model = ModelSpec.of_identity(encoder, allow_class)
    if model.own:
        expected = None if named and allow_other else expected_of(encoder)
        return load_autoencoder(model, device, expected, resolution=column.picture.resolution)
    with _hint("--vae", named):
        vae = Vae(model, device)
    _check("VAE", vae.model.path, {"weights": vae.weights}, {"weights": encoder.weights})
    return vae


def latent_shape(vae: Vae, resolution: int, channels: int) -> tuple[int, int, int]:
    """Returns (C, H, W) of square pictures' latents; EncoderMismatch for other channels."""
    rows, height, width = vae.moments_shape(resolution)
    depth = rows // 2 if vae.kind == "moments" else rows
    if depth != channels:
        raise EncoderMismatch(
            f"{vae.model.path}: found a VAE of {depth} latent channels, expected {channels}, as the model has. Name "
            "the VAE that it was trained with"
        )
    return depth, height, width


# Text ---------------------------------------------------------------------------------------------

READING = ("max_tokens", "hidden_state", "template", "instruction")  # in a column's `preprocess`
CHECKED = ("tokenizer", "chat_template")  # digests, likewise


class Text:
    """A text encoder that is loaded when it is first needed.

    Where columns say which it is, its identity is known before that.
    """

    def __init__(
        self, column: ColumnIdentity | None, named: str | None, device: str, allow_other: bool = False,
        hidden_state: int = -1,
    ) -> None:  # fmt: skip
        """The encoder of a tokens column; without one, and with `allow_other`, the one named.

        Captions are read as the column does, or without one as the reference does.
        """
        of_column = column.text.record() if column else {}
        reading = {"max_tokens": TOKENS, "hidden_state": hidden_state, "template": "{}"} | of_column
        self._reading: Json = {
            name: reading[name] for name in (*READING, "chat_template") if name in reading
        }
        self._device, self._named = device, named
        self._loaded: TextEncoder | None = None
        if named and (allow_other or column is None):
            self._model = text_named(named)
            self._loaded = self._load()
            self._expected = _digests(self._loaded)
        else:
            assert column is not None
            encoder = relocate_encoder(column.encoder, named, TEXTS)
            self._model = ModelSpec.of_identity(encoder)
            self._expected = {"weights": encoder.weights}
            self._expected |= {name: of_column[name] for name in CHECKED if name in of_column}

    @property
    def weights(self) -> str:
        return str(self._expected["weights"])

    @property
    def width(self) -> int | None:
        """Of a hidden state; None while it is not loaded."""
        return self._loaded.width if self._loaded else None

    @property
    def identity(self) -> Json:
        """What decides the hidden states of a caption, wherever the weights lie."""
        model = {"class": self._model.cls, "precision": self._model.precision}
        return {**model, **self._reading, **self._expected}

    def load(self) -> TextEncoder:
        """Returns the encoder; EncoderMismatch if its weights or tokenizer are not the column's."""
        if self._loaded is None:
            with _hint("--text-encoder", self._named):
                text = self._load()
            _check("text encoder", self._model.path, _digests(text), self._expected)
            self._loaded = text
        return self._loaded

    def _load(self) -> TextEncoder:
        options: Json = {name: self._reading[name] for name in READING if name in self._reading}
        chat = "chat_template" in self._reading
        column = TokensColumn(encoder=self._model, chat_template=chat, **options)
        return TextEncoder(column, self._device)

    def release(self) -> None:
        """Gives its memory back, until it is needed again."""
        self._loaded = None
        if self._device.startswith("cuda"):
            torch.cuda.empty_cache()


def _digests(text: TextEncoder) -> Json:
    tokenizer = text.tokenizer
    digests = {
        "weights": text.weights,
        "tokenizer": tokenizer.weights,
        "chat_template": tokenizer.chat,
    }
    return {name: digest for name, digest in digests.items() if digest}


def _check(role: str, path: str, digests: Json, expected: Json) -> None:
    """EncoderMismatch where digests are not the expected ones."""
    if lines := differences(digests, expected):
        raise EncoderMismatch(
            f"{path}: not the {role} that the columns were made with: {'; '.join(lines)}. Name the original, "
            "or say --allow-other-encoder to use this one all the same"
        )


@contextmanager
def _hint(flag: str, named: str | None) -> Iterator[None]:
    """Adds to a failure to load how to name another place, where the place is a column's."""
    try:
        yield
    except ModelNotUsable as error:
        if named is not None:
            raise
        raise ModelNotUsable(
            f"{error}. The columns name the place it had when they were made: run this from the same folder, or name "
            f"its place with {flag}"
        ) from None
