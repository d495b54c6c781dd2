"""The VAE and the text encoder of a set: those of the columns, or others that are named.

By name or hub id a registry entry, or a folder; a folder alone says which class its weights are of. What was made with
other weights than the columns is another set, so it must be asked for, and the settings hold the digests of what was
used.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from encode.config import TokensColumn
from encode.errors import ModelNotUsable
from encode.models.text import TextEncoder
from encode.models.vae import Vae
from encode.registry import TEXTS, VAES, ModelSpec, location
from shards.format.atomic import read_file
from shards.format.identity import ColumnIdentity, EncoderIdentity

from ..errors import EncoderMismatch

Json = dict[str, Any]
TOKENS = 256  # of a caption, in the reference
HALVES = {  # classes of whole models whose text half is the encoder
    "T5ForConditionalGeneration": "T5EncoderModel", "CLIPModel": "CLIPTextModel",
}  # fmt: skip


def relocate_encoder(
    encoder: EncoderIdentity, place: str | None, registry: Mapping[str, ModelSpec] | None = None
) -> EncoderIdentity:
    """Returns an encoder's identity with its files in another place, a folder or a name or hub id of
    the registry; the weights still have to be the same.

    A folder is the whole repository, if it has the encoder's subfolder, or else that folder alone; the
    tokenizer's lies in or beside it.
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


def _registered(named: str | None, known: Mapping[str, ModelSpec]) -> ModelSpec | None:
    """A registry's entry by its name or its hub id, unless a folder of that name is here."""
    if named is None or named in known or Path(named).is_dir():
        return known.get(named or "")
    return next((spec for spec in known.values() if spec.path == named), None)


def _place(name: str) -> Path:
    return Path(location(name)) if name.startswith("package:") else Path(name)


# Named alone ---------------------------------------------------------------------------------------------------------


def vae_named(name: str) -> ModelSpec:
    """A VAE by its name or hub id in the registry or its folder, run as those of the registry."""
    if spec := _registered(name, VAES):
        return spec
    folder, subfolder = _folder(name, "vae", VAES)
    cls = _config(folder / (subfolder or "")).get("_class_name")
    return _spec(name, cls, subfolder)


def text_named(name: str) -> ModelSpec:
    """Likewise a text encoder."""
    if spec := _registered(name, TEXTS):
        return spec
    folder, _ = _folder(name, None, TEXTS)
    architectures = _config(folder).get("architectures") or [None]
    whole = str(architectures[0]) if architectures[0] else None
    return _spec(name, whole and HALVES.get(whole, re.sub(r"For[A-Z]\w*$", "Model", whole)), None)


def _folder(
    name: str, subfolder: str | None, known: dict[str, ModelSpec]
) -> tuple[Path, str | None]:
    """A model's folder, and the subfolder that its config is in, if it is."""
    folder = _place(name)
    if not folder.is_dir():
        raise ModelNotUsable(
            f"{name}: no such folder, and none of {', '.join(known)}. Name a folder with a config.json, or one of these"
        )
    below = subfolder is not None and not (folder / "config.json").exists()
    return folder, subfolder if below else None


def _config(folder: Path) -> Json:
    path = folder / "config.json"
    try:
        found = json.loads(read_file(path))  # not ours, and may hold Infinity
    except (OSError, ValueError) as error:
        raise ModelNotUsable(
            f"{path}: found nothing that can be read ({error}), expected the model's config"
        ) from None
    return found if isinstance(found, dict) else {}


def _spec(name: str, cls: Any, subfolder: str | None) -> ModelSpec:
    if not isinstance(cls, str):
        raise ModelNotUsable(f"{name}: its config.json names no class of a model")
    fields = {"class": cls, "path": name, "subfolder": subfolder, "precision": "bf16-autocast"}
    return ModelSpec.model_validate(fields)


# VAE -----------------------------------------------------------------------------------------------------------------


def vae_of(column: ColumnIdentity | None, named: str | None, device: str, other: bool) -> Vae:
    """The VAE of a column's identity, or the one named, which without a column one must be.

    EncoderMismatch if it is another than the column's and `other` is off.
    """
    if named and (other or column is None):
        return Vae(vae_named(named), device)
    assert column is not None
    encoder = relocate_encoder(column.encoder, named, VAES)
    with _hint("--vae", named):
        vae = Vae(ModelSpec.of_identity(encoder), device)
    _check("VAE", vae.model.path, {"weights": (vae.weights, encoder.weights)})
    return vae


def latent_shape(vae: Vae, resolution: int, channels: int) -> tuple[int, int, int]:
    """(C, H, W) of the latents of square pictures; EncoderMismatch if the model takes other channels."""
    rows, height, width = vae.moments_shape(resolution)
    found = rows // 2 if vae.kind == "moments" else rows
    if found != channels:
        raise EncoderMismatch(
            f"{vae.model.path}: found a VAE of {found} latent channels, expected {channels}, as the model has. Name "
            "the VAE that it was trained with"
        )
    return found, height, width


# Text ----------------------------------------------------------------------------------------------------------------

SAID = ("max_tokens", "hidden_state", "template", "instruction")  # in a column's `preprocess`
CHECKED = ("tokenizer", "chat_template")  # digests, likewise


class Text:
    """A text encoder that is loaded when it is first needed: where columns say which one, its identity is known
    before that."""

    def __init__(
        self, column: ColumnIdentity | None, named: str | None, device: str, other: bool = False,
        hidden_state: int = -1,
    ) -> None:  # fmt: skip
        """That of a tokens column's identity. Without one, and where `other` is on, the one named, read as the
        reference does, or as the column does."""
        how = column.text.record() if column else {}
        read = {"max_tokens": TOKENS, "hidden_state": hidden_state, "template": "{}"} | how
        self._how: Json = {name: read[name] for name in (*SAID, "chat_template") if name in read}
        self._device, self._named = device, named
        self._loaded: TextEncoder | None = None
        if named and (other or column is None):
            self._model = text_named(named)
            self._loaded = text = self._load()
            self._expected = {"weights": text.weights, **_digests(text)}
        else:
            assert column is not None
            encoder = relocate_encoder(column.encoder, named, TEXTS)
            self._model = ModelSpec.of_identity(encoder)
            self._expected = {"weights": encoder.weights}
            self._expected |= {name: how[name] for name in CHECKED if name in how}

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
        return {
            "class": self._model.cls, "precision": self._model.precision,
            **self._how, **self._expected,
        }  # fmt: skip

    def load(self) -> TextEncoder:
        """The encoder itself; EncoderMismatch if its weights or tokenizer are not the column's."""
        if self._loaded is None:
            with _hint("--text-encoder", self._named):
                text = self._load()
            found = {"weights": text.weights, **_digests(text)}
            every = dict.fromkeys([*self._expected, *found])
            wanted = {name: (found.get(name), self._expected.get(name)) for name in every}
            _check("text encoder", self._model.path, wanted)
            self._loaded = text
        return self._loaded

    def _load(self) -> TextEncoder:
        options: Json = {name: self._how[name] for name in SAID if name in self._how}
        chat = "chat_template" in self._how
        column = TokensColumn(encoder=self._model, chat_template=chat, **options)
        return TextEncoder(column, self._device)

    def release(self) -> None:
        """Give its memory back, until it is needed again."""
        self._loaded = None
        if self._device.startswith("cuda"):
            torch.cuda.empty_cache()


def _digests(text: TextEncoder) -> Json:
    found = {"tokenizer": text.tokenizer.weights, "chat_template": text.tokenizer.chat}
    return {name: digest for name, digest in found.items() if digest}


def _check(what: str, path: str, digests: dict[str, tuple[str | None, str | None]]) -> None:
    """EncoderMismatch where (found, expected) differ."""
    wrong = [
        f"{name} {_short(found)}, expected {_short(expected)}"
        for name, (found, expected) in digests.items()
        if found != expected
    ]
    if wrong:
        raise EncoderMismatch(
            f"{path}: not the {what} that the columns were made with: found {'; '.join(wrong)}. Give the path of the "
            "original, or say --allow-other-encoder to use this one all the same"
        )


@contextmanager
def _hint(flag: str, named: str | None) -> Iterator[None]:
    """Say of a model that cannot be loaded how to name another place, where its own is a column's."""
    try:
        yield
    except ModelNotUsable as error:
        if named is not None:
            raise
        raise ModelNotUsable(
            f"{error}. The columns name it as it was called when they were made: run this from the same folder, or say "
            f"where it is with {flag}"
        ) from None


def _short(digest: str | None) -> str:
    return f"{digest[:16]}..." if digest else "none"
