"""A vision-language model that answers questions about a picture with the probabilities of its first token.

Any model that transformers knows as AutoModelForImageTextToText, with its own processor and chat template. Nothing is
generated: the logits behind the prompt are the answer, as greedy decoding of one token would see them.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from encode.models.text import tokenizer_digest
from shards import canonical_json, sha256

from ..errors import MissingWeights
from ..features import pretrained
from ..images.layouts import Picture


@dataclass(frozen=True, slots=True)
class Spellings:
    """What counts as yes and as no. A spelling counts if it is one token; the probabilities of several are added."""

    yes: tuple[str, ...]
    no: tuple[str, ...]


EXACT = Spellings(("Yes",), ("No",))  # VQAScore's
ANY = Spellings(("yes", "Yes", " yes", " Yes"), ("no", "No", " no", " No"))


@dataclass(frozen=True, slots=True)
class Answer:
    """Probabilities over the whole vocabulary at temperature 1: they need not add up to 1."""

    yes: float
    no: float


class Vlm:
    """Questions go through the model `batch_size` at a time, each with its picture."""

    def __init__(self, path: str, device: str, spellings: Spellings, batch_size: int = 8) -> None:
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
        """To each question about one picture (H, W, 3)."""
        return self.ask([(picture, question) for question in questions])

    @torch.inference_mode()
    def ask(self, pairs: Sequence[tuple[Picture, str]]) -> list[Answer]:
        """P(yes) and P(no) to each question about its picture."""
        return [
            Answer(float(odds[self._yes].sum()), float(odds[self._no].sum()))
            for odds in self._first(pairs)
        ]

    @torch.inference_mode()
    def odds(
        self, pairs: Sequence[tuple[Picture, str]], accepted: Sequence[Sequence[str]]
    ) -> list[float]:
        """Of each question the probability that its answer begins as one of its accepted spellings does."""
        found = []
        for odds, spellings in zip(self._first(pairs), accepted, strict=True):
            cut = [self._tokenizer(text, add_special_tokens=False).input_ids for text in spellings]
            first = sorted({ids[0] for ids in cut if ids} - {self._tokenizer.unk_token_id})
            found.append(float(odds[first].sum()))
        return found

    def _first(self, pairs: Sequence[tuple[Picture, str]]) -> Iterator[Tensor]:
        """Of each question the first token's probabilities (V,)."""
        for start in range(0, len(pairs), self._batch):
            inputs = self._inputs(pairs[start : start + self._batch])
            logits: Tensor = self._model(**inputs, **self._options).logits[:, -1]
            yield from logits.float().softmax(-1).cpu()

    def _inputs(self, pairs: Sequence[tuple[Picture, str]]) -> Any:
        """One row a question, padded at the left."""
        asked = [
            [{"role": "user", "content": [
                {"type": "image", "image": Image.fromarray(picture)}, {"type": "text", "text": text},
            ]}]
            for picture, text in pairs
        ]  # fmt: skip
        made = self._processor.apply_chat_template(
            asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        )  # fmt: skip
        return made.to(self._device, self._dtype)  # of the tensors only those with fractions change


def _tokens(tokenizer: Any, spellings: Sequence[str], path: str) -> list[int]:
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in spellings]
    whole = sorted({cut[0] for cut in ids if len(cut) == 1} - {tokenizer.unk_token_id})
    if not whole:
        raise MissingWeights(
            f"{path}: its vocabulary has none of {', '.join(map(repr, spellings))} as one token, so the probability of "
            "the answer cannot be read off the first one. Choose another model"
        )
    return whole


def _processor_digest(processor: Any) -> str:
    """Of how pictures are prepared and of the chat template."""
    prepare = processor.image_processor.to_dict()
    kept = {
        name: value for name, value in prepare.items() if not name.endswith(("_class", "_type"))
    }
    return sha256(canonical_json([repr(sorted(kept.items())), processor.chat_template]))
