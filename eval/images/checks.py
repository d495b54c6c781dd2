"""What a folder of pictures must hold to be scored: all of a set, unchanged, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from shards import FormatVersion, ShardsError, canonical_json, seal, sha256, unseal
from shards.console import brief, is_digest
from shards.format.atomic import read_file, read_json, refuse_version
from shards.format.checks import Count, Digest, Fields, Text, check
from shards.printing import one_line

from ..errors import MissingImages, OtherImages
from ..prompts.prompts import Prompts, checked
from .layouts import LAYOUTS, File

FORMAT, VERSION = "latentbank-images", 2
REMOVED = "removed.json"  # in a set whose pictures were removed once they were scored
REMOVED_FORMAT, REMOVED_VERSION = "latentbank-removed-pictures", 1
NAMED = 20  # of many files, how many an error names
MOST_PICTURES = 1 << 21  # of a set
LONGEST = 60  # characters of a value that a difference names
# of settings and parts of a training that are digests, by the last word of their names: what another
# digest means
OTHERS = {
    "prompts": "other prompts", "weights": "other weights", "vae": "another VAE", "source": "other tars",
    "text_encoder": "another text encoder", "valid_rows": "other rows", "sha256": "other weights",
    "tokenizer": "another tokenizer",
}  # fmt: skip
Json = dict[str, Any]


def difference_text(name: str, then: Any, now: Any, form: str = "found {}, expected {}") -> str:
    """Returns a line of two values of a setting: in words where they are digests, else as `form`."""
    values = [*then, *now] if isinstance(then, list) and isinstance(now, list) else [then, now]
    if any(map(is_digest, values)):
        return f"{name}: {OTHERS.get(name.rpartition('.')[2], 'another one')}"
    texts = [
        text if len(text := brief(value)) <= LONGEST else f"{text[:LONGEST]}…"
        for value in (then, now)
    ]
    return f"{name}: {form.format(*texts)}"


def _layout(name: str) -> str:
    if name not in LAYOUTS:
        raise ValueError(f"found {name!r:.80}, expected one of {', '.join(LAYOUTS)}")
    return name


class _Settings(Fields):
    benchmark: Text
    prompts: Digest
    layout: Annotated[str, AfterValidator(_layout)]
    encoding: Text
    images_per_prompt: Annotated[int, Field(ge=1, le=MOST_PICTURES)]
    step: Count = 0
    weights: Text = ""


class _Provenance(Fields):
    seconds: float | None = None
    pictures_per_second: float | None = None
    device: Text = ""
    ranks: Annotated[int, Field(ge=1, le=1 << 30)] = 1
    checkpoint: Text = ""


class _Manifest(Fields):
    settings: _Settings
    complete: bool
    provenance: _Provenance = _Provenance()


class _Complete(Fields):
    files: Annotated[dict[Text, Digest], Field(max_length=MOST_PICTURES)]


class _Removed(Fields):
    set: Digest
    kept: Annotated[list[Text], Field(max_length=MOST_PICTURES)]


def set_digest(manifest: Json) -> str:
    """Returns the digest of a complete set, of its settings and all files: what a score is of."""
    return sha256(canonical_json([manifest["settings"], manifest["files"]]))


def removed_record(manifest: Json, kept: Sequence[str]) -> bytes:
    """Returns what REMOVED holds: that all files of a complete set but those `kept` were removed."""
    record = {"format": REMOVED_FORMAT, "version": REMOVED_VERSION, "set": set_digest(manifest)}
    return seal(record | {"kept": sorted(kept)})


def removed_files(save_dir: Path, manifest: Json) -> frozenset[str]:
    """Returns which files of a set are not needed any more, as REMOVED says; they may be there still.

    Empty where none were removed; OtherImages where the record is damaged, or of another set.
    """
    path = save_dir / REMOVED
    if not manifest["complete"] or not path.exists():
        return frozenset()
    try:
        record = check(_Removed, unseal(path, REMOVED_FORMAT, REMOVED_VERSION))
    except FormatVersion:
        raise
    except (ShardsError, ValueError) as error:
        raise OtherImages(
            f"{path}: not a record of removed pictures ({error}). Restore it, or delete it and run `python -m eval "
            "generate` with the same settings again, which makes the pictures"
        ) from None
    if record.set != set_digest(manifest):
        raise OtherImages(
            f"{path}: found the record of another set than manifest.json is of. Delete it, and run `python -m eval "
            "generate` with the same settings again, which makes the pictures"
        )
    return frozenset(manifest["files"].keys() - set(record.kept))


def refuse_removed(save_dir: Path, absent: Sequence[str]) -> None:
    """MissingImages where files are absent because they were removed once they were scored."""
    if absent:
        raise MissingImages(
            f"{save_dir}: {len(absent)} pictures were removed by `python -m eval study gc` once they were scored. For "
            "another score run `python -m eval generate` with the same settings again: it makes what is missing"
        )


def refuse_missing(save_dir: Path, files: Sequence[File], complete: bool = True) -> None:
    """MissingImages where files are absent, or (not `complete`) their run has not ended."""
    absent = [file for file in files if not (save_dir / "images" / file.path).is_file()]
    if not absent and complete:
        return
    problem = "all files are there, but the run that makes them has not ended"
    if absent:
        prompts, names = len({file.prompt.id for file in absent}), _listed([f.path for f in absent])
        problem = f"{len(absent)} of {len(files)} files are missing, of {prompts} prompts: {names}"
    raise MissingImages(
        f"{save_dir}: {problem}. Run `python -m eval generate` with the same settings again: it makes what is missing"
    )


def refuse_strangers(images: Path, expected: set[str]) -> None:
    """OtherImages where the folder holds a file or a folder that no prompt asks for."""
    folders = {parent.as_posix() for path in expected for parent in PurePosixPath(path).parents}
    strangers = []
    for at, below, names in os.walk(images):
        here = Path(at).relative_to(images)
        strangers += [path for name in names if (path := (here / name).as_posix()) not in expected]
        strangers += [f"{p}/" for name in below if (p := (here / name).as_posix()) not in folders]
    if strangers:
        raise OtherImages(
            f"{images}: found {len(strangers)} files that no prompt asks for ({_listed(sorted(strangers))}). "
            "A scorer would count them: move them away"
        )


def refuse_changed(images: Path, digests: Mapping[str, str], recorded: Mapping[str, str]) -> None:
    """OtherImages where digests are not those of the manifest."""
    changed = [path for path in digests if digests[path] != recorded.get(path)]
    if changed:
        raise OtherImages(
            f"{images}: {len(changed)} pictures changed since manifest.json was written ({_listed(changed)}). Restore "
            "them, or make the whole set again in another folder"
        )


def refuse_remade(path: Path, digest: str, name: str, manifest: Json) -> None:
    """OtherImages where a picture of a complete set, made again, is not the recorded one."""
    if not manifest["complete"] or manifest["files"].get(name) == digest:
        return
    provenance = manifest.get("provenance", {}).items()
    origin = ", ".join(f"{key} {value}" for key, value in provenance if isinstance(value, str))
    raise OtherImages(
        f"{path}: was lost, and cannot be made again here: found sha256 {digest:.16}..., expected "
        f"{manifest['files'].get(name)!s:.16}... of manifest.json. Another kind of CPU or GPU and other versions round "
        f"otherwise; nothing was written. Make it where the set was made ({origin}), restore it from a copy, or make "
        "the whole set again in another --save_dir"
    )


def refuse_sidecars(images: Path, sidecars: Mapping[str, bytes]) -> None:
    """OtherImages where a file that a scorer reads beside the pictures is absent or changed."""
    for path, expected in sidecars.items():
        try:
            data = read_file(images / path)
        except FileNotFoundError:
            data = b""
        if data != expected:
            raise OtherImages(
                f"{images / path}: {'changed' if data else 'missing'}; expected what prompts.json says of the prompt. "
                "Delete it and run `python -m eval generate` with the same settings again"
            )


def _listed(paths: Sequence[str]) -> str:
    rest = f", and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return ", ".join(map(one_line, paths[:NAMED])) + rest


def read_manifest(path: Path) -> Json:
    """Returns a set's manifest; OtherImages where it is none, FormatVersion of other releases'."""
    try:
        manifest: Json = read_json(path)
        refuse_version(manifest, str(path), FORMAT, VERSION)
        check(_Manifest, manifest)
        if manifest["complete"]:
            check(_Complete, manifest)
        count = manifest["settings"]["images_per_prompt"]
        if manifest["settings"]["layout"] == "grids" and isqrt(count) ** 2 != count:
            raise ValueError(f"found grids of {count} pictures, expected a square number")
    except FormatVersion:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OtherImages(
            f"{path}: not a manifest of images ({error}). Restore it, or choose another folder"
        ) from None
    return manifest


def read_set_prompts(path: Path, settings: Json) -> Prompts:
    """Returns the prompts of a set; OtherImages where they changed, or cannot name files."""
    try:
        prompts = Prompts.from_json(settings["benchmark"], read_json(path))
        digest = prompts.digest
        checked(prompts.benchmark, prompts.items, path)
    except (OSError, ValueError, TypeError) as error:
        raise OtherImages(f"{path}: not a list of prompts ({error})") from None
    if digest != settings["prompts"]:
        raise OtherImages(f"{path}: changed since the pictures were made. Make the set again")
    if len(prompts.items) * settings["images_per_prompt"] > MOST_PICTURES:
        raise OtherImages(
            f"{path}: {len(prompts.items)} prompts of {settings['images_per_prompt']} pictures each are more than the "
            f"{MOST_PICTURES} that a set holds"
        )
    return prompts
