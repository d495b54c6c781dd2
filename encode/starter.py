"""`python -m encode init`: a config for sources and models of one's own. `python -m encode config`: what
a config says in full.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import configs
from configs import ConfigError, add_config_options, show_config, word, write_new
from shards.console import positive, render, say_next
from shards.format import checked_name, proposed
from shards.format.atomic import put_if_absent, read_json
from shards.places import home, is_url, local_path, place
from shards.printing import one_line

from .errors import ModelNotUsable, NotASource
from .registry import TEXTS, VAES, ModelSpec, location
from .source.members import PICTURES

if TYPE_CHECKING:
    from .config import EncodeConfig

__all__ = ["add_config_options", "add_init_options", "run_config", "run_init"]

MOST_TOKENS = 256  # of a caption, unless the model takes fewer
KNOWN_MOST = {"clip-l": 77}
GENERIC = ("model", "vae", "text_encoder", "checkpoint")  # names that say nothing of a model
# class of the text encoder in a repository whose config.json says this `model_type`; else AutoModel
TEXT_CLASSES = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}


def add_init_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.description = (
        "Write a commented config that encodes your own pictures and captions. A model is a name that "
        f"is known here ({', '.join([*VAES, *TEXTS])}), a folder, or CLASS:OWNER/NAME of the hub."
    )
    tars = (
        "[NAME=]PLACE: a pattern as /data/{000..099}.tar or /data/*.tar, a folder of tars or of "
        "pictures, a table, a url; several places of one NAME are one source"
    )
    add("--sources", nargs="+", required=True, metavar="SOURCE", help=tars)
    add("--vae", nargs="+", default=[], metavar="MODEL", help="one column of latents each")
    add("--text", nargs="+", default=[], metavar="MODEL", help="one column of captions each")
    pixels = "pixels a side of the pictures that are encoded (default: 256)"
    add("--resolution", type=positive, default=256, metavar="N", help=pixels)
    root = "where the columns go, as ROOT/SOURCE/COLUMN: a folder or a url (default: columns)"
    add("--root", type=place, default="columns", metavar="DIR", help=root)
    out = "the new file (default: encode.yaml)"
    add("--out", metavar="FILE", type=local_path, default=Path("encode.yaml"), help=out)


def run_init(args: argparse.Namespace) -> int:
    """Writes the config once it has been loaded and its sources were found, and says how to go on."""
    configs.refuse_existing(args.out)
    if not args.vae and not args.text:
        raise ConfigError("found no model, expected --vae MODEL, --text MODEL or both")
    sources = _sources(args.sources)
    columns = [_vae(model, args.resolution) for model in args.vae] + [_text(m) for m in args.text]
    names = [name for name, _ in columns]
    if double := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"two columns would be called {double[0]}: leave one of the models out, and give it a name of its "
            "own in the file"
        )
    text = _config_text(args, sources, dict(columns))
    config = _checked(text, str(args.out))
    write_new(args.out, text, put_if_absent)
    summary = f"{', '.join(names)} of {', '.join(sources)}"
    print(render(f"wrote {args.out}: {summary}, into {config.root}/SOURCE/COLUMN"))
    say_next("encode", "run", args.out, note="before it, `encode plan` says bytes and hours")
    if args.vae and args.text:
        first = f"{config.root.rstrip('/')}/{next(iter(sources))}"
        latents, captions = (shlex.quote(f"{first}/{names[i]}") for i in (0, len(args.vae)))
        print(f"then: python -m train init --latents {latents} --text {captions}")
    return 0


def run_config(args: argparse.Namespace) -> int:
    from .config import EncodeConfig

    return show_config(EncodeConfig, args)


def _checked(text: str, out: str) -> EncodeConfig:
    """Returns the config that a text says; a named error where it cannot be, or a source is not
    there or cannot be packed.
    """
    from .config import EncodeConfig
    from .pack.kinds import kind_of
    from .pack.listing import suffix_of
    from .pack.sources import place_and_target
    from .source.places import expand
    from .source.tars import make_source

    config = configs.load_text(EncodeConfig, text, out)
    for source, places in config.sources.items():
        path, _ = place_and_target(config, source, expand(places)) or (None, None)
        if path is None:
            make_source(source, places, config.shard_rows)
        elif kind_of(path) == "folder" and not any(
            suffix_of(file.name) in PICTURES for file in path.rglob("*")
        ):
            raise NotASource(
                f"{path}: found no picture in it, expected files of {', '.join(PICTURES)}, with "
                "captions of the same names"
            )
    return config


# Sources and models ------------------------------------------------------------------------------


def _sources(words: list[str]) -> dict[str, list[str]]:
    """Returns the places of each source by its name; NotASource where a name is none."""
    sources: dict[str, list[str]] = {}
    for text in words:
        name, equals, where = text.partition("=")
        if not equals or "/" in name:
            name, where = "", text
        try:
            name = checked_name(name) if name else _source_name(where)
        except ValueError as error:
            raise NotASource(f"{text}: {error}, as NAME=PLACE") from None
        sources.setdefault(name, []).append(place(where))
    return sources


def _source_name(where: str) -> str:
    """Returns a name for a source: that of the folder in which its tars are, or of its one file."""
    path = where if is_url(where) else os.path.abspath(home(where))
    parts = [part for part in path.split("/") if part]
    while len(parts) > 1 and (re.search(r"[*?{\[]", parts[-1]) or parts[-1].endswith(".tar")):
        parts.pop()
    return checked_name(proposed(Path(parts[-1]).stem if parts else where))


def _vae(model: str, resolution: int) -> tuple[str, dict[str, Any]]:
    """Returns name and keys of a column by an autoencoder."""
    column: dict[str, Any] = {"kind": "moments", "encoder": model, "resolution": resolution}
    if model in VAES:
        if VAES[model].cls == "AutoencoderDC":  # the one of these without a posterior
            column["kind"] = "latents"
        return f"{model}-{resolution}", column
    spec = _own(model)
    if "class" not in spec:
        _refuse_name(model, "--vae", VAES)
        file, subfolder = _model_file(spec["path"], ("", "vae"), "_class_name")
        spec = {"class": file["_class_name"], **spec} | subfolder
    from .models.vae import VAE_ADAPTERS  # which loads torch

    adapter = VAE_ADAPTERS.get(spec["class"])
    if adapter is not None and adapter.latent:
        column["kind"] = "latents"
    return f"{_column_name(spec['path'])}-{resolution}", column | {"encoder": spec}


def _text(model: str) -> tuple[str, dict[str, Any]]:
    """Returns name and keys of a column by a text encoder."""
    if model in TEXTS:
        most = KNOWN_MOST.get(model, MOST_TOKENS)
        return model, {"kind": "tokens", "encoder": model, "max_tokens": most}
    spec, most = _own(model), MOST_TOKENS
    if "class" not in spec:
        _refuse_name(model, "--text", TEXTS)
        file, subfolder = _model_file(spec["path"], ("", "text_encoder"), "model_type")
        spec = {"class": TEXT_CLASSES.get(file["model_type"], "AutoModel"), **spec} | subfolder
        inner = file.get("text_config")
        for values in (file, inner if isinstance(inner, dict) else {}):
            if isinstance(positions := values.get("max_position_embeddings"), int):
                most = max(1, min(most, positions))
    name = _column_name(spec["path"])
    return name, {"kind": "tokens", "encoder": spec, "max_tokens": most}


def _refuse_name(model: str, flag: str, registry: Mapping[str, ModelSpec]) -> None:
    """Raises ModelNotUsable for a name that is neither known nor that of a folder, with the nearest one
    or the flag of the model that has it.
    """
    if "/" in model or local_path(model).exists():
        return
    for other, models in (("--vae", VAES), ("--text", TEXTS)):
        if model in models:
            raise ModelNotUsable(
                f"{flag} {model}: a model of the other kind, expected {other} {model}"
            )
    raise ModelNotUsable(
        f"{flag} {model}: no name that is known, and no folder{configs.did_you_mean(model, registry)} "
        f"Known are {', '.join(registry)}; of a model of the hub say the class, too, as CLASS:OWNER/NAME"
    )


def _own(model: str) -> dict[str, Any]:
    """Returns path and, where it is said, class of a model that has no name here."""
    if is_url(model):
        local_path(model)  # raises
    cls, colon, path = model.partition(":")
    if colon and cls.isidentifier() and cls != "package":
        return {"class": cls, "path": path}
    return {"path": model}


def _model_file(
    path: str, subfolders: tuple[str, ...], key: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the config.json of a model in a folder, which says `key`, and its subfolder."""
    folder = Path(location(str(local_path(path))))
    if not folder.is_dir():
        registry, cls = (TEXTS, "AutoModel") if key == "model_type" else (VAES, "AutoencoderKL")
        raise ModelNotUsable(
            f"{path}: found no folder of that name. Of a model of the hub say the class, too, as "
            f"{cls}:OWNER/NAME; known by name are {', '.join(registry)}"
        )
    for subfolder in subfolders:
        file = folder / subfolder / "config.json"
        if file.is_file():
            try:
                values = read_json(file)
            except ValueError as error:
                raise ModelNotUsable(
                    f"{file}: found no JSON ({error}), expected a model as it was saved. Fetch it again"
                ) from None
            if isinstance(values, dict) and isinstance(values.get(key), str):
                return values, {"subfolder": subfolder} if subfolder else {}
    places = " or ".join(f"{folder / s}/config.json".replace("//", "/") for s in subfolders)
    raise ModelNotUsable(
        f"{path}: found no {key!r} in {places}, expected a model as it was saved. Say its class, as "
        f"CLASS:{path}"
    )


def _column_name(path: str) -> str:
    """Returns a name for a model's column: the last part of its path that says something."""
    parts = [part for part in re.split(r"[/:]", path) if part.strip(".~")]
    while len(parts) > 1 and parts[-1] in GENERIC:
        parts.pop()
    return checked_name(proposed(parts[-1] if parts else path))


# The text ----------------------------------------------------------------------------------------


def _config_text(
    args: argparse.Namespace, sources: dict[str, list[str]], columns: dict[str, dict[str, Any]]
) -> str:
    out = one_line(shlex.quote(str(args.out)))
    places = "\n".join(
        f"  {word(name)}: {word(p[0]) if len(p) == 1 else '[' + ', '.join(map(word, p)) + ']'}"
        for name, p in sources.items()
    )
    lines = "\n".join(f"  {word(name)}: {_flow(keys)}" for name, keys in columns.items())
    return f"""\
# Pictures and captions into columns, by `python -m encode init`. It runs as it is:
#
#   python -m encode plan {out}    # bytes and hours, before anything is written
#   python -m encode run {out}     # each model once over every sample; again after any interruption
#
# Every key with its meaning: docs/config.md; all that this file leaves out: `python -m encode config FILE`.
root: {word(args.root)} # the columns are ROOT/SOURCE/COLUMN
sources: # tars with KEY.jpg and KEY.txt members; what is none is packed into tars once, into ROOT/packed
{places}
columns: # another VAE or text encoder is a line more; what is done is not done again
{lines}
"""


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + " }"
    return word(value) if isinstance(value, str) else str(value)
