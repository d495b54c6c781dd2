"""A vision-language model that answers questions by its first token's probabilities.

Any model that transformers knows as AutoModelForImageTextToText, with its own processor and chat
template. Nothing is generated: the logits after the prompt are the answer, as greedy decoding of
one token would see them.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from PIL import Image

from shards import canonical_json, sha256
from shards.places import model

from ..errors import MissingWeights
from ..images.layouts import Picture
from ..images.ranks import Rank

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT = "Qwen/Qwen3-VL-8B-Instruct"  # of the family that t2v_metrics 3.1 asks


@dataclass(frozen=True, slots=True)
class Spellings:
    """What counts as yes and as no: each spelling that is one token, their probabilities added."""

    yes: tuple[str, ...]
    no: tuple[str, ...]


EXACT = Spellings(("Yes",), ("No",))  # VQAScore's
ANY = Spellings(("yes", "Yes", " yes", " Yes"), ("no", "No", " no", " No"))


@dataclass(frozen=True, slots=True)
class Answer:
    """Probabilities over the whole vocabulary at temperature 1: they need not add up to 1."""

    yes: float
    no: float


def flags(add: argparse.ArgumentParser) -> None:
    add.add_argument(
        "--vlm",
        type=model,
        default=DEFAULT,
        help="a model for pictures and text: hub name or folder",
    )
    add.set_defaults(batch_size=8)  # questions at a time


def load(args: argparse.Namespace, spellings: Spellings) -> Vlm:
    """Returns the model that the options name, loaded once for several sets."""
    return _load(args.vlm, Rank.here().device(args.device), spellings, args.batch_size)


class Vlm:
    """Questions go through the model `batch_size` at a time, each with its picture."""

    def __init__(self, path: str, device: str, spellings: Spellings, batch_size: int = 8) -> None:
        import torch

        from encode.models import tokenizer_digest

        from ..features import pretrained

        self._processor = pretrained.part("AutoProcessor", path)
        tokenizer = getattr(self._processor, "tokenizer", None)
        if tokenizer is None or not self._processor.chat_template:
            raise MissingWeights(
                f"{path}: found no chat template for pictures and text, expected a model that is tuned for dialogue. "
                "Choose an Instruct model"
            )
        tokenizer.padding_side = "left"  # the answer then follows the last position of every row
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._tokenizer = tokenizer
        self._yes = _tokens(tokenizer, spellings.yes, path)
        self._no = _tokens(tokenizer, spellings.no, path)
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self._model, weights = pretrained.model("AutoModelForImageTextToText", path, device, dtype)
        last = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._options = {"logits_to_keep": 1} if last else {}
        self._device, self._dtype, self._batch = device, dtype, batch_size
        self.identity = {
            "weights": weights, "dtype": str(dtype).removeprefix("torch."),
            "tokenizer": tokenizer_digest(tokenizer), "processor": _processor_digest(self._processor),
            "yes": spellings.yes, "no": spellings.no, "batch_size": batch_size,
        }  # fmt: skip

    def answers(self, picture: Picture, questions: Sequence[str]) -> list[Answer]:
        """Returns the answer to each question about one picture (H, W, 3)."""
        return self.ask([(picture, question) for question in questions])

    def ask(self, pairs: Sequence[tuple[Picture, str]]) -> list[Answer]:
        """Returns P(yes) and P(no) of each question about its picture."""
        return [
            Answer(float(odds[self._yes].sum()), float(odds[self._no].sum()))
            for odds in self._first(pairs)
        ]

    def odds(
        self, pairs: Sequence[tuple[Picture, str]], accepted: Sequence[Sequence[str]]
    ) -> list[float]:
        """Returns for each question the probability of an answer that begins as accepted."""
        probabilities = []
        for odds, spellings in zip(self._first(pairs), accepted, strict=True):
            ids = [self._tokenizer(text, add_special_tokens=False).input_ids for text in spellings]
            first = sorted({row[0] for row in ids if row} - {self._tokenizer.unk_token_id})
            probabilities.append(float(odds[first].sum()))
        return probabilities

    def _first(self, pairs: Sequence[tuple[Picture, str]]) -> Iterator[Tensor]:
        """Yields of each question the first token's probabilities (V,)."""
        import torch

        for start in range(0, len(pairs), self._batch):
            inputs = self._inputs(pairs[start : start + self._batch])
            with torch.inference_mode():
                logits: Tensor = self._model(**inputs, **self._options).logits[:, -1]
                probabilities = logits.float().softmax(-1).cpu()
            yield from probabilities

    def _inputs(self, pairs: Sequence[tuple[Picture, str]]) -> Any:
        """Returns the model's inputs, a row a question, padded at the left."""
        messages = [
            [{"role": "user", "content": [
                {"type": "image", "image": Image.fromarray(picture)}, {"type": "text", "text": text},
            ]}]
            for picture, text in pairs
        ]  # fmt: skip
        inputs = self._processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        )  # fmt: skip
        return inputs.to(self._device, self._dtype)  # which changes the type of fractions alone


_load = lru_cache(maxsize=1)(Vlm)


def _tokens(tokenizer: Any, spellings: Sequence[str], path: str) -> list[int]:
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in spellings]
    single = sorted({row[0] for row in ids if len(row) == 1} - {tokenizer.unk_token_id})
    if not single:
        raise MissingWeights(
            f"{path}: its vocabulary has none of {', '.join(map(repr, spellings))} as one token, so the probability of "
            "the answer cannot be read off the first one. Choose another model"
        )
    return single


def _processor_digest(processor: Any) -> str:
    """Returns the digest of how pictures are prepared and of the chat template."""
    options = processor.image_processor.to_dict()
    decisive = {
        name: value for name, value in options.items() if not name.endswith(("_class", "_type"))
    }
    return sha256(canonical_json([repr(sorted(decisive.items())), processor.chat_template]))
