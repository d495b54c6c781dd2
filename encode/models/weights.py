"""Frozen models from a checkpoint: every weight from it, and their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import EncodeError, ModelNotUsable
from ..registry import ModelSpec, Precision, location, one_line


@contextmanager
def hushed(library: Any) -> Iterator[None]:
    """Let diffusers or transformers speak of errors alone: they list at length what a checkpoint
    holds beyond a class.
    """
    talk = library.utils.logging
    before = talk.get_verbosity()
    talk.set_verbosity_error()
    try:
        yield
    finally:
        talk.set_verbosity(before)


# what a model may raise at an input that it was not made for
REFUSALS = (
    RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ArithmeticError
)  # fmt: skip


@contextmanager
def trying(what: str, advice: str = "Check class, path and sizes") -> Iterator[None]:
    """Turn what a model raises at a trial input into ModelNotUsable; want of memory stays as it is."""
    try:
        yield
    except (torch.OutOfMemoryError, EncodeError):
        raise
    except REFUSALS as error:
        raise ModelNotUsable(
            f"{what}. {advice}\n  {type(error).__name__} of the library: {one_line(error)}"
        ) from error


def load_model(library: Any, model: ModelSpec, **options: Any) -> Any:
    """Load a frozen model of a library's class in fp32; ModelNotUsable says what is missing.

    Every weight must be in the checkpoint: the libraries would fill up the rest with random
    numbers, and read pickles.
    """
    cls = getattr(library, model.cls, None)
    if cls is None:
        raise ModelNotUsable(f"{model.path}: {library.__name__} has no class {model.cls!r}")
    if model.subfolder:
        options["subfolder"] = model.subfolder
    path = location(model.path)
    try:
        with hushed(library):
            module, report = cls.from_pretrained(
                path, revision=model.revision, use_safetensors=True, output_loading_info=True,
                **options,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ModelNotUsable(
            f"{model.path}: cannot be loaded as {model.cls} "
            f"({one_line(error)}). "
            "Check class and path, or that the hub can be reached and its licence is accepted"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelNotUsable(
            f"{model.path}: {len(missing)} weights of {model.cls} are not in it, {missing[:3]} "
            "among them. Check class and path"
        )
    return module.float().eval().requires_grad_(False)


def weights_digest(module: torch.nn.Module) -> str:
    """sha256 over the sorted names, dtypes, shapes and bytes of a module's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tune(module: torch.nn.Module, hot: torch.nn.Module, compiled: bool, last: bool) -> None:
    """Make a model faster on a GPU: compile its hot part, lay convolutions out channels last. In
    place, and after the digest: neither names nor values change, only the last bits of results.
    """
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters() if last else ():
        if parameter.ndim in layouts:
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.ndim])
    if compiled:
        hot.compile()


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context in which an encoder runs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-autocast")
