"""OUT/study.lock: what a finished study is of, and `python -m eval study verify`, which checks it.

    versions   of Python and the packages that compute; recorded, never a difference
    code       digest of the project's own code; likewise
    study      the YAML as it is resolved; seeds, scorers and flags are in it
    configs    {path below OUT: digest} of the configs of all commands, as they are resolved
    prompts    {benchmark or file: digest}
    settled    {entry: {axis: value}} that was chosen
    columns    {folder or url: digest, complete}: what of the caches was trained on
    commands   {node: its command, with OUT for the study's folder}; on how many processes is recorded, never
               a difference
    outputs    {path below OUT, or path: sha256} of configs as files, of weights that are sampled, of sets of
               pictures (all their files and settings), and of scores with their items

The lock is written when `study run` ends with nothing missing, and by nothing else. It holds no times, so
a study that is run again and made nothing anew has the same lock on the same machine.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from configs import ConfigError, read_yaml
from shards import (
    Column,
    FormatVersion,
    ShardsError,
    atomic_write,
    canonical_json,
    seal,
    sha256,
    sha256_file,
    unseal,
)
from shards.format import differences
from train.checkpoints.checkpoint import CheckpointError, manifest_of
from train.checkpoints.snapshots import EmaLengthRefused, files_of_length

from ..errors import BadPrompts, BadStudy, EvalError
from ..images.checks import REMOVED
from ..images.imageset import ImageSetReader
from .earlier import take_over
from .encoders import places
from .graph import Node, nodes_of
from .pictures import prompts_of
from .reuse import Existing
from .run.files import config_files, config_values
from .study import Study

Json = dict[str, Any]
FORMAT, VERSION = "latentbank-study-lock", 2
FILE = "study.lock"
PACKAGES = (
    "latentbank", "torch", "numpy", "diffusers", "transformers", "deepspeed", "zarr", "scipy", "pillow",
)  # fmt: skip
OWN = ("configs", "shards", "encode", "train", "eval")  # packages of the project
ABSENT = "absent"  # in place of the digest of what is not there
OUT = "OUT"  # in place of the study's folder, which may be moved
MADE = ("configs", "images", "runs", "settle")  # folders there that commands name


def write_lock(study: Study, write: Callable[[Path, bytes], None] = atomic_write) -> Path:
    """Writes the lock of a study of which everything exists; returns its path."""
    path = study.out / FILE
    write(path, seal({"format": FORMAT, "version": VERSION, **record_of(study)}))
    return path


def record_of(study: Study) -> Json:
    """Returns what a lock holds; files are read for it."""
    nodes = nodes_of(study)
    return {
        "versions": versions(),
        "code": code_digest(),
        "study": _resolved(study),
        "configs": _configs(study),
        "prompts": _prompts(study),
        "settled": {entry: dict(values) for entry, values in study.settled.items()},
        "columns": {place: _column(place) for place in _columns(study)},
        "commands": {node.id: [_word(study, word) for word in node.command] for node in nodes},
        "outputs": dict(sorted(_outputs(study, nodes))),
    }


def _word(study: Study, word: str) -> str:
    """Returns a word of a command, with OUT where it is the path, or key=path, of what the study made."""
    key, equals, value = word.rpartition("=")
    if any(Path(value).is_relative_to(study.out / folder) for folder in MADE):
        return f"{key}{equals}{Path(OUT, Path(value).relative_to(study.out))}"
    return word


def _resolved(study: Study) -> Json:
    return study.config.model_dump(mode="json", by_alias=True)


def versions() -> dict[str, str]:
    """Returns the versions of what computes, by package."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def code_digest() -> str:
    """Returns the digest of the project's own code."""
    root = Path(__file__).parents[2]
    files = sorted(path for package in OWN for path in (root / package).rglob("*.py"))
    return sha256(canonical_json({str(p.relative_to(root)): sha256_file(p) for p in files}))


def _configs(study: Study) -> dict[str, str]:
    values = config_values(study)["configs"]
    return {name: _config_digest(of_config) for name, of_config in values.items()}


def _config_digest(values: Json) -> str:
    """Returns the digest of a config but for the folder of its runs, which moves with the study."""
    return sha256(canonical_json({key: value for key, value in values.items() if key != "runs"}))


def _config_file(path: Path) -> str:
    """Returns the digest of a config that `study run` wrote; its first line names a YAML that may be moved."""
    try:
        return _config_digest(read_yaml(path))
    except ConfigError:
        return _file(path)


def _prompts(study: Study) -> dict[str, str]:
    name = str(study.config.prompts or study.benchmark)
    try:
        return {name: prompts_of(study).digest}
    except BadPrompts:  # they are not here
        return {name: ABSENT}


def _columns(study: Study) -> list[str]:
    data = [
        study.train_config(entry, study.seeds[0], phase).data.resolved()
        for entry in study.entries
        for phase in range(len(study.parts(entry)))
    ]
    named = [place for each in data for place in places([each.latents, each.text or [], each.also])]
    return list(dict.fromkeys(named))


def _column(place: str) -> Json | str:
    try:
        column = Column.open(place)
    except ShardsError:  # not there, not complete, or damaged
        return ABSENT
    try:
        return {"digest": column.digest, "complete": column.snapshot.digest}
    finally:
        column.close()


def _outputs(study: Study, nodes: list[Node]) -> Iterator[tuple[str, str]]:
    """Yields the digest of each output as it is now."""
    existing = Existing(study)
    lengths = {
        study.training_name(entry): study.setting(entry).get("ema", existing.flags["ema"])
        for entry in study.entries
    }  # of averages that are sampled
    for path in (study.out / "study.yaml", *config_files(study)):
        yield _name(study, path), _config_file(path)
    for node in nodes:
        if node.seed is None:
            continue
        if node.kind == "train":
            config = study.run_folder(node.entry, node.seed, node.phase) / "config.yaml"
            yield _name(study, config), _file(config)
            file = existing.weights_file(node.entry, node.phase)
            last = node.phase + 1 == len(study.parts(node.entry))
            for step in node.outputs:
                yield _name(study, step / file), _weights(step, file)
                for path in _average(step, lengths.get(node.entry) if last else None):
                    yield _name(study, path), _file(path)
        elif node.kind == "generate":
            for folder in node.outputs:
                yield _name(study, folder), _pictures(folder)
        else:
            for path in (p for folder in node.outputs for p in sorted(folder.glob("*.json*"))):
                yield _name(study, path), sha256_file(path)


def _file(path: Path) -> str:
    return sha256_file(path) if path.is_file() else ABSENT


def _weights(step: Path, file: str) -> str:
    """Returns the digest of a checkpoint's weights."""
    try:
        names = [name for name in manifest_of(step)["files"] if name == file]
        return sha256_file(step / names[0]) if names else ABSENT
    except (CheckpointError, OSError):
        return ABSENT


def _average(step: Path, length: float | None) -> list[Path]:
    """Returns the files of which an average of a length is made, where one is sampled and can be made."""
    if length is not None:
        with suppress(CheckpointError, EmaLengthRefused, OSError):
            return files_of_length(step, length)
    return []


def _pictures(folder: Path) -> str:
    try:
        return ImageSetReader.open(folder, scored=True).digest
    except (EvalError, OSError):
        return ABSENT


def _name(study: Study, path: Path) -> str:
    """Returns a path that holds when the study's folder is moved; of what was taken over, as it is."""
    return str(path.relative_to(study.out) if path.is_relative_to(study.out) else path)


def verify(study: Study) -> tuple[list[str], list[str]]:
    """Returns in what a study is other than its lock says, and which versions, the code's among them, are
    others now.

    BadStudy without a lock, or where it is of another YAML than this one.
    """
    path = study.out / FILE
    if not path.is_file():
        raise BadStudy(
            f"{path}: no such file. `python -m eval study run` writes it when everything exists"
        )
    try:
        lock = unseal(path, FORMAT, VERSION)
    except FormatVersion as error:
        raise BadStudy(
            f"{error}; or `python -m eval study run`, which writes it anew when everything exists"
        ) from None
    if lines := list(differences(lock["study"], _resolved(study))):
        title = f"{path} is of another study than {study.path} says now:"
        verb = f"python -m eval study verify {study.out / 'study.yaml'} --out {study.out}"
        advice = f"Say `{verb}` for the study as it was last run, or run it as it is now"
        raise BadStudy("\n  ".join([title, *lines]) + f"\n{advice}")
    now = record_of(take_over(study))
    for record in (lock, now):
        record["commands"] = {
            name: _work([word.replace(OUT, str(study.out)) for word in words])
            for name, words in record["commands"].items()
        }  # not OUT, which locks of before have in place of parts of words, too
    faults = [
        f"{part}: {line}"
        for part in ("configs", "prompts", "settled", "columns", "commands", "outputs")
        for line in _different(lock.get(part, {}), now[part])
    ]
    versions_then, versions_now = (r["versions"] | {"code": r["code"]} for r in (lock, now))
    return faults, differences(versions_then, versions_now)


def removed_sets(study: Study) -> list[Path]:
    """Returns the sets of a study of which `study gc` removed pictures."""
    made = (node for node in nodes_of(study) if node.kind == "generate")
    folders = (folder for node in made for folder in node.outputs)
    return [folder for folder in folders if (folder / REMOVED).is_file()]


def _work(command: list[str]) -> list[str]:
    """Returns the words of a command from its module on: what comes before is how many processes run it."""
    return command[command.index("-m") :]


def _different(then: Json, now: Json) -> Iterator[str]:
    """Yields a line for each key whose value is another one, or that only one side has."""
    for key in sorted(then.keys() | now.keys()):
        a, b = then.get(key, ABSENT), now.get(key, ABSENT)
        if a != b:
            problem = "missing" if b == ABSENT else "changed"
            yield f"{key}: {'not in the lock' if a == ABSENT else problem}"
