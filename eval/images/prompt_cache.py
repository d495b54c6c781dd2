"""Prompts as the model takes them, encoded once and kept, for any number of sets.

    <folder>/<key>/text.json              encoder, tokenizer, preprocessing, prompts' digest
    <folder>/<key>/00000.safetensors      hidden states of CHUNK prompts, back to back, bf16
    <folder>/<key>/empty.safetensors      those of the empty caption

Chunks are cut from the whole list, so that their contents depend on nothing else, and each is
written whole or not at all: ranks encode them side by side, and an interrupted run goes on. bf16 at
true length is what a tokens column holds, so a model gets the text that it was trained on, to the
bit of its rounding.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from encode.models import TextEncoder
from shards import FormatVersion, canonical_json, put_if_absent, sha256
from shards.format.atomic import parse_json, read_file, read_json, refuse_version

from ..errors import BadTextCache

Json = dict[str, Any]
FORMAT, VERSION = "latentbank-text", 1  # the format is not written down: the file's name says it
CHUNK = 64  # prompts: of 256 tokens each, one pass of the encoder
KEPT = 2  # chunks in memory


class TextCache:
    """The hidden states of some prompts. Nothing is written or read before it is needed."""

    def __init__(self, folder: Path, identity: Json, texts: Sequence[str], device: str) -> None:
        """`identity`: what decides a caption's states, which differ by rounding on a GPU."""
        self._texts = texts
        prompts = sha256(canonical_json(list(texts)))
        self._record = {
            "version": VERSION, "text": identity, "prompts": prompts, "count": len(texts), "chunk": CHUNK,
            "device": torch.device(device).type,
        }  # fmt: skip
        self.folder = folder / sha256(canonical_json(self._record))[:16]
        self._kept: dict[str, list[Tensor]] = {}
        self._refuse_others()

    def _refuse_others(self) -> None:
        """BadTextCache where the folder's record is damaged, FormatVersion of another release's."""
        path = self.folder / "text.json"
        if not path.exists():
            return
        try:
            record = read_json(path)
            refuse_version({"format": FORMAT} | record, str(path), FORMAT, VERSION)
        except FormatVersion:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadTextCache(f"{path}: damaged ({error}). Delete the folder") from None
        if record != parse_json(canonical_json(self._record)):
            raise BadTextCache(
                f"{path}: of other prompts than its folder's name. Delete the folder"
            )

    def missing(self, prompts: Iterable[int] | None = None) -> list[str]:
        """Returns names of the absent files that these prompts (or all) need."""
        numbers = range(len(self._texts)) if prompts is None else prompts
        names = ["empty", *(f"{chunk:05d}" for chunk in sorted({i // CHUNK for i in numbers}))]
        return [name for name in names if not self._path(name).exists()]

    def fill(
        self, prompts: Iterable[int], encoder: Callable[[], TextEncoder], rank: int = 0,
        progress: Callable[[int], None] = lambda count: None,
    ) -> None:  # fmt: skip
        """Encodes what these prompts lack; `progress` gets 1 for each file.

        Ranks go through them in orders of their own, so that two hardly ever encode the same.
        """
        names = self.missing(prompts)
        random.Random(rank).shuffle(names)
        for name in names:
            if not self._path(name).exists():  # else another rank made it meanwhile
                first = 0 if name == "empty" else int(name) * CHUNK
                texts = [""] if name == "empty" else self._texts[first : first + CHUNK]
                self._write(name, encoder().encode(texts))
            progress(1)

    def read(self, prompts: Sequence[int]) -> list[Tensor]:
        """Returns hidden states (n_i, D) bf16 of prompts by number; BadTextCache of damage."""
        return [self._chunk(f"{i // CHUNK:05d}")[i % CHUNK] for i in prompts]

    @property
    def empty(self) -> Tensor:
        """Hidden states (n, D) bf16 of the empty caption."""
        return self._chunk("empty")[0]

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _write(self, name: str, states: Sequence[Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        put_if_absent(self.folder / "text.json", canonical_json(self._record))
        tokens = torch.cat(list(states)).contiguous()
        lengths = torch.tensor([len(row) for row in states], dtype=torch.int32)
        digest = _digest(tokens, lengths)
        data = save({"tokens": tokens, "lengths": lengths, "sha256": digest})
        put_if_absent(self._path(name), data)

    def _chunk(self, name: str) -> list[Tensor]:
        if name not in self._kept:
            chunks = [chunk for chunk in self._kept if chunk != "empty"]
            if len(chunks) == KEPT:
                del self._kept[chunks[0]]  # the oldest
            self._kept[name] = self._load(name)
        return self._kept[name]

    def _load(self, name: str) -> list[Tensor]:
        path = self._path(name)
        try:
            tensors = load(read_file(path, 1 << 32))
            tokens, lengths = tensors["tokens"], tensors["lengths"]
            if not torch.equal(_digest(tokens, lengths), tensors["sha256"]):
                raise ValueError("its digest is another")
            return list(torch.split(tokens, lengths.tolist()))
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, TypeError) as error:
            raise BadTextCache(
                f"{path}: found a file that cannot be used ({error}), expected encoded prompts. Delete it: they are "
                "encoded again"
            ) from None


def _digest(*tensors: Tensor) -> Tensor:
    """Returns the sha256 over their bytes, (32,) uint8."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
