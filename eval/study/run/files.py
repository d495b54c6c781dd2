"""The configs of a study's commands, as files: what `study run` writes before the first of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from configs import Strict, read_yaml
from shards import atomic_write
from shards.format import differences

from ..study import Study

Json = dict[str, Any]
Write = Callable[[Path, bytes], None]
SESSION = "workers/session.json"  # below the study's folder: what its workers are


def config_files(study: Study) -> dict[Path, tuple[Strict, str]]:
    """Returns the configs that the commands of a study read, by path below its folder, each with a note."""
    folder = study.out / "configs"
    note = f"Made by `study run` from {study.path} and {study.config.train}: change those."
    files: dict[Path, tuple[Strict, str]] = {}
    for entry in study.trainings:
        for phase in range(len(study.parts(entry))):
            config = study.train_config(entry, study.seeds[0], phase)
            config = config.model_copy(update={"init_from": None} if phase else {})
            files[study.config_path(entry, phase)] = config, note
    for path, (encode, _) in study.encode_configs.items():
        if path.parent == folder:
            files[path] = encode, note
    return files


def config_values(study: Study) -> Json:
    """Returns the study and the configs of its commands as they are resolved, by path below its folder."""
    return {
        "study": study.config.model_dump(mode="json", by_alias=True),
        "configs": {
            str(path.relative_to(study.out)): config.model_dump(mode="json", by_alias=True)
            for path, (config, _) in config_files(study).items()
        },
    }


def write_configs(study: Study, write: Write = atomic_write) -> None:
    """Writes the configs of all commands, and the study as it is now; says what has changed in it."""
    text, path = _yaml(study.config, f"As last run from {study.path}."), study.out / "study.yaml"
    if path.is_file():
        now = study.config.model_dump(mode="json", by_alias=True)
        for line in differences(read_yaml(path), now):
            print(f"changed since the last run: {line}", flush=True)
    write(path, text)
    for path, (config, note) in config_files(study).items():
        write(path, _yaml(config, note))


def _yaml(config: Strict, note: str) -> bytes:
    values = config.model_dump(mode="json", by_alias=True)
    return f"# {note}\n{yaml.safe_dump(values, sort_keys=False)}".encode()
