"""What goes wrong while the files of a model are loaded, as one error of ours: a Python package that is
not installed, a config that does not fit its class, files that are damaged, code of the model's own.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import is_offline_mode
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError

from ..errors import EncodeError, ModelNotUsable
from ..registry import ModelSpec, location, one_line

# what diffusers and transformers raise of files, and of a config's values in the class's own code
FAILURES = (
    OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip
PIP = re.compile(r"pip install (?:-U |--upgrade )*[`'\"]?([A-Za-z][\w.-]*)")
VARIANT = re.compile(r"(?:diffusion_pytorch_)?model\.([a-z]\w*)(?:-\d+-of-\d+)?\.safetensors")
# modules that read quantised weights, and the packages that bring them
QUANTISERS = {
    "bitsandbytes": "bitsandbytes", "compressed_tensors": "compressed-tensors", "gptqmodel": "gptqmodel",
    "torchao": "torchao", "hqq": "hqq", "optimum.quanto": "optimum-quanto", "aqlm": "aqlm",
}  # fmt: skip
# what reads a SentencePiece file: modules, and the packages that bring them
SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
TIKTOKEN = "tiktoken.model"  # the name by which transformers knows such a file


@contextmanager
def loading(model: ModelSpec, failure: str, advice: str) -> Iterator[None]:
    """Turns what a library raises while it loads a model into ModelNotUsable: `failure`, the library's
    words and `advice`, or the package that is not installed, or that the code of the model's own is
    not run.
    """
    try:
        yield
    except EncodeError:
        raise
    except (ImportError, *FAILURES) as error:
        if packages := missing_packages(error, model):
            raise ModelNotUsable(
                f"{model.path}: {failure}: it needs {' and '.join(packages)}, not installed here. Run "
                f"`pip install {' '.join(packages)}`, or {_instead(packages)}"
            ) from error
        if _out_of_reach(error):
            reason = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the hub cannot be reached"
            raise ModelNotUsable(
                f"{model.path}: {failure}: the hub's cache here ({HF_HUB_CACHE}) lacks files of it, and "
                f"{reason}. Download it first, or name a folder that holds it"
            ) from error
        if "trust_remote_code" in str(error):
            raise ModelNotUsable(
                f"{model.path}: {failure} without running Python code that comes with the model. "
                "Read that code; in a config, trust_remote_code: true beside class and path lets it "
                "run, and a revision fixes it"
            ) from error
        variants = variants_of(model) if model.variant is None else []
        if variants and "safetensors" in str(error):
            advice = f"Its weights are of a variant: say variant: {' or '.join(variants)}"
        raise ModelNotUsable(f"{model.path}: {failure} ({one_line(error)}). {advice}") from error


def _out_of_reach(error: BaseException | None) -> bool:
    """Returns whether a file of the hub is wanted that is not here and cannot be fetched: libraries make
    of it that the model has no such file.
    """
    while error is not None and not isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__ or error.__context__
    return error is not None


@contextmanager
def silent(name: str) -> Iterator[None]:
    """Lets a logger write errors alone."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def missing_packages(error: Exception, model: ModelSpec) -> list[str]:
    """Returns the packages, by their names for pip, for want of which a library gave up.

    Where a SentencePiece file cannot be read, transformers tries it as one of tiktoken and asks for
    that.
    """
    text = str(error)
    if "tiktoken" in text or "sentencepiece" in text:
        absent = [package for module, package in SENTENCEPIECE.items() if not installed(module)]
        if absent and not has_file(model, TIKTOKEN):
            return absent
    if not (isinstance(error, ImportError) or "pip install" in text):
        return []
    packages = [name for m, name in QUANTISERS.items() if name in text and not installed(m)]
    packages += [name.rstrip(".-") for name in PIP.findall(text)]
    if not packages and isinstance(error, ImportError) and error.name:
        packages = [error.name.partition(".")[0]]
    return list(dict.fromkeys(packages))


def _instead(packages: list[str]) -> str:
    if {"sentencepiece", "protobuf", "tiktoken"} & set(packages):
        return "put a tokenizer.json beside its other files, which needs none"
    return "give the model in another form: of a quantised one, the weights that it was made of"


def installed(module: str) -> bool:
    """Returns whether a module can be imported, without doing so."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def variants_of(model: ModelSpec) -> list[str]:
    """Returns the variants of weights in a model's folder, as fp16; none for a model of the hub."""
    folder = Path(location(model.path)) / (model.subfolder or "")
    return sorted({match[1] for p in folder.glob("*") if (match := VARIANT.fullmatch(p.name))})


def has_file(model: ModelSpec, name: str) -> bool:
    """Returns whether a tokenizer's folder, or the hub's cache of it, has a file of this name."""
    folder = Path(location(model.path))
    name = f"{model.tokenizer}/{name}" if model.tokenizer else name
    if folder.is_dir():
        return (folder / name).is_file()
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model.path, name, revision=model.revision), str)
