"""Frozen models from a checkpoint: every weight from it, and their digest."""

from __future__ import annotations

import hashlib
import importlib
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from shards.format.atomic import Json

from ..errors import EncodeError, ModelNotUsable
from ..registry import ModelSpec, Precision, check_weights, location, one_line
from .loading import loading


@contextmanager
def hushed(library: Any) -> Iterator[None]:
    """Lets diffusers or transformers log errors alone: they list at length what a checkpoint holds
    beyond a class.
    """
    logging = library.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


# what a model may raise at an input that it was not made for
REFUSALS = (
    RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ArithmeticError
)  # fmt: skip


@contextmanager
def trying(failure: str, advice: str = "Check class, path and sizes") -> Iterator[None]:
    """Turns what a model raises at a trial input into ModelNotUsable; want of memory stays as it is."""
    try:
        yield
    except (torch.OutOfMemoryError, EncodeError):
        raise
    except REFUSALS as error:
        raise ModelNotUsable(
            f"{failure}. {advice}\n  {type(error).__name__} of the library: {one_line(error)}"
        ) from error


def load_model(
    library: Literal["diffusers", "transformers"], model: ModelSpec, device: str = "cpu", *,
    expected: str | None = None, dtype: torch.dtype = torch.float32, part: str = "",
    check: Callable[[type, ModelSpec], None] | None = None, **options: Any,
) -> tuple[Any, str]:  # fmt: skip
    """Returns a frozen model of a library's class, or its module named `part` where it has one, on the
    device, and the digest of its weights.

    Raises ModelNotUsable where the class or a file is missing, where a weight is not in the checkpoint
    (the libraries would draw it at random, or read a pickle), or where the digest is not the `expected`
    one of a column. `check` may refuse the class before its weights are read. `options` go to
    `from_pretrained`. Code that comes with the model is run only where `model` says so.
    """
    package: Any = importlib.import_module(library)
    package.utils.logging.disable_progress_bar()
    failure = f"cannot be loaded as {model.cls}"
    where = (
        ""
        if Path(location(model.path)).is_dir()
        else ", or that the hub can be reached and its licence is accepted"
    )
    advice = f"Check class, path and its config.json{where}"
    automatic = model.cls.startswith("AutoModel")
    with loading(model, failure, advice):
        cls: Any = getattr(package, model.cls, None)
        if not (automatic and cls) and not _is_model(cls):
            raise ModelNotUsable(
                f"{model.path}: {library} has no class {model.cls!r} of models. Correct it; a class in "
                "code that comes with the model is class: AutoModel and trust_remote_code: true"
            )
        if check and not automatic:
            check(cls, model)
    if automatic or library == "transformers":
        options["trust_remote_code"] = model.trust_remote_code  # without it they would ask on stdin
    for name in ("subfolder", "variant"):
        if value := getattr(model, name):
            options[name] = value
    if dtype != torch.float32:
        options["dtype"] = dtype
    path = location(model.path)
    with loading(model, failure, advice), hushed(package):
        module, report = cls.from_pretrained(
            path,
            revision=model.revision,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelNotUsable(
            f"{model.path}: {len(missing)} weights of {model.cls} are not in it, {missing[:3]} "
            "among them. Check class and path"
        )
    module = getattr(module, part, module) if part else module
    if check:
        check(type(module), model)
    if dtype == torch.float32 and not getattr(module, "is_quantized", False):
        module = module.float()
    weights = weights_digest(module)
    check_weights(weights, expected, model.path)
    module = module.eval().requires_grad_(False)
    with loading(model, f"cannot be moved to {device}", "Choose another device"):
        return module.to(device), weights


def _is_model(cls: Any) -> bool:
    """Returns whether a library's attribute is a class of models, also where a package that it needs is
    not installed, which its first use says.
    """
    return isinstance(cls, type) and (issubclass(cls, torch.nn.Module) or "_backends" in vars(cls))


def weights_digest(module: torch.nn.Module) -> str:
    """Returns `tensors_digest` of a module's parameters and buffers."""
    return tensors_digest(module.state_dict())


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns the sha256 over the sorted names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tune(module: torch.nn.Module, hot: torch.nn.Module, compiled: bool, last: bool) -> None:
    """Makes a model faster on a GPU: compiles its `hot` part, lays convolutions out channels last. In
    place, after the digest: neither names nor values change, only the last bits of results.
    """
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters() if last else ():
        if parameter.ndim in layouts:
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.ndim])
    if compiled:
        hot.compile()


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Returns the context in which an encoder runs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-autocast")


def device_record(device: torch.device) -> Json:
    """Returns the record of `Encoder.runs_on`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": name, "torch_threads": torch.get_num_threads()}
