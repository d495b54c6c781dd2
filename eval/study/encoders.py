"""Which encoders a study's columns are made by, or were."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from encode.errors import ModelNotUsable
from encode.registry import TEXTS, VAES, ModelSpec, location, lookup

from ..errors import BadStudy
from ..images.encoders import check_named
from .flags import generate_settings
from .graph import allowed_classes
from .reuse import column_exists, column_identity
from .study import Study

Json = dict[str, Any]


def check_encoders(study: Study) -> None:
    """Raises ModelNotUsable where a column is to be made by a name that is none, or a folder that is
    not there; what the hub has is seen by the encode command, which runs first. BadStudy where a
    column, complete or not, was begun by another encoder.
    """
    for path, (config, columns) in study.encode_configs.items():
        for column in columns:
            own = config.columns[column.rstrip("/").rpartition("/")[2]]
            model = lookup(own.encoder, VAES)
            if not column_exists(column) and not model.own:
                location(model.path)
            if lines := list(_other_encoder(column_identity(column), model, own)):
                title = f"{study.path}: {column} was made in another way than {path} says:"
                advice = (
                    "Name another column, or the encoder that made this one; or leave `encoder` out, to use a "
                    "complete column as it is"
                )
                raise BadStudy("\n  ".join([title, *lines]) + f"\n{advice}")


def check_classes(study: Study) -> None:
    """Raises BadStudy where a column was made by a class of the user's own that neither an encoder of
    the study nor `generate` names: its pictures could not be decoded after the training.
    """
    allowed = allowed_classes(study)
    for entry in study.entries:
        data = study.train_config(entry, study.seeds[0]).data.resolved()
        for column in places(data.latents):
            encoder = column_identity(column).get("encoder")
            cls = encoder.get("class") if isinstance(encoder, dict) else None
            if isinstance(cls, str) and ":" in cls and cls not in allowed:
                raise BadStudy(
                    f"{study.path}: {entry}: {column} was made by {cls}, a Python class of somebody's own, and none is "
                    f"imported because a column says so. Read that class; to run it, say generate: {{allow_class: "
                    f"[{cls}]}}"
                )


def check_decoders(study: Study) -> None:
    """Raises BadStudy where the VAE or the text encoder that pictures are to be made with is not there: one that
    `generate` names, or the VAE of a column that exists.
    """
    flags = generate_settings(study)
    try:
        if not allowed_classes(study):  # which alone know what a path names
            check_named("vae", flags["vae"], VAES)
        if not (study.out / "images/text").exists():  # of prompts that are encoded already
            check_named("text_encoder", flags["text_encoder"], TEXTS)
    except ModelNotUsable as error:
        raise BadStudy(f"{study.path}: generate: {error}") from None
    for entry in study.entries if flags["vae"] is None else ():
        data = study.train_config(entry, study.seeds[0]).data.resolved()
        for column in places(data.latents):
            encoder = column_identity(column).get("encoder") or {}
            path = encoder.get("path") if isinstance(encoder, dict) else None
            if not isinstance(path, str) or ":" in str(encoder.get("class")):
                continue
            try:
                location(path)
            except ModelNotUsable as error:
                raise BadStudy(
                    f"{study.path}: {entry}: {column}: the VAE that made it is needed for pictures: {error}. Run this "
                    "from the folder that it was encoded from, or name the VAE's place: generate: {vae: DIR}"
                ) from None


def _other_encoder(identity: Json, model: ModelSpec, own: Any) -> Iterator[str]:
    """Yields in what a column's identity is another than that of its config, as far as that is known
    without loading the model: another place counts as another model, a revision where both name one.
    """
    encoder, preprocess = (identity.get(k) or {} for k in ("encoder", "preprocess"))
    if not isinstance(encoder, dict) or "weights" not in encoder:  # made by another program
        return
    wanted = model.model_dump(by_alias=True)
    for key in ("class", "path", "subfolder", "precision", "variant", "revision"):
        then, now = encoder.get(key), wanted[key]
        if key == "path":
            then, now = _place(then or ""), _place(now)
        if (then or None) != (now or None) and not (key == "revision" and None in (then, now)):
            yield f"encoder.{key}: found {then!r}, expected {now!r}"
    for key, then, now in (
        ("kind", identity.get("kind"), own.kind),
        ("resolution", preprocess.get("resolution"), own.resolution),
    ):
        if then is not None and then != now:
            yield f"{key}: found {then!r}, expected {now!r}"


def _place(path: str) -> str:
    """Returns where a model is, or its path as it is where nothing is there."""
    try:
        return location(path)
    except ModelNotUsable:
        return path


def places(value: Any) -> Iterator[str]:
    """Yields all columns of latents, texts with their rates, and lists of these."""
    if isinstance(value, str):
        yield value
    else:
        for part in value:
            yield from places(part)
