"""Whether the small files of a study, JSON and YAML, are still as its commands made them.

    OUT/logs/NODE.json          `files`: {path below OUT: sha256} of a node that ended well
    OUT/workers/session.json    the configs, as the last workers wrote them

A node's record is removed before it begins again, and the session before configs are written: what a killed
command left is compared with nothing. Nor is what was made by hand, in other folders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs import ConfigError, read_yaml
from shards import FormatVersion, sha256_file
from shards.format import differences
from shards.format.atomic import read_json
from train.checkpoints.checkpoint import CheckpointError, manifest_of

from ...errors import OutputEdited
from ..axes import METRICS
from ..graph import Node, nodes_of
from ..reuse import Existing, names_in, read_record
from ..study import Study
from .files import SESSION, config_values

Json = dict[str, Any]
MOST_LINES = 6  # of files that a message names, and of differences of one config
SHOWN = 16  # characters of a digest


def digests_of(study: Study, node: Node, record: Json) -> dict[str, str]:
    """Returns the digests of the small files that a node made in the study's folder, by their paths there."""
    own = study.out.resolve()
    return {
        str(path.relative_to(study.out)): sha256_file(path)
        for path in _small_files(study, node, record)
        if path.is_file() and path.is_relative_to(study.out) and own in path.resolve().parents
    }


def _small_files(study: Study, node: Node, record: Json) -> Iterator[Path]:
    if node.kind == "train" and node.seed is not None:
        run = study.run_folder(node.entry, node.seed, node.phase)
        yield run / "config.yaml"
        yield run / METRICS  # its losses choose learning rates; they and its costs are on the page
    for folder in node.outputs:
        if node.kind == "generate":
            yield folder / "manifest.json"
            yield folder / "prompts.json"
        elif node.kind == "score":
            yield from (folder / f"{name}.json" for name in names_in(record))
            yield from (folder / name for name in record["beside"])


def refuse_edited(study: Study) -> None:
    """Raises OutputEdited where a small file of a node that is done, or a config that `study run` wrote, is
    another than was written. One that is missing is none: it is made again.
    """
    lines = [*_edited_configs(study)]
    for node in nodes_of(study):
        lines += _edited_outputs(study, node)
    if lines:
        title = f"{study.out}: files that this study made were changed since:"
        more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
        advice = (
            "Put back what was there. Or remove what is to be made again: of a score its file, of pictures the set's "
            "folder, of a training its run's folder, of a config its file, which follows the study's YAML. Where "
            f"`settle` has no lr, {METRICS} alone may go: nothing is trained again, the page lacks its losses and costs"
        )
        raise OutputEdited("\n  ".join([title, *lines[:MOST_LINES], *more]) + f"\n{advice}")


def _edited_outputs(study: Study, node: Node) -> list[str]:
    record = read_record(study, node.id)
    if record is None or record.get("exit_code") != 0:
        return []
    lines = []
    files = record.get("files")
    for name, then in files.items() if isinstance(files, dict) else ():
        path = study.out / name
        if not path.is_file() or (now := sha256_file(path)) == then:
            continue
        if node.kind == "train" and _is_gone_on_with(study, node, path, then):
            continue
        lines.append(
            f"{path}, of {node.id}: found sha256 {now:.{SHOWN}}…, expected {then!s:.{SHOWN}}…"
        )
    for step in node.outputs if node.kind == "train" else ():
        if (path := step / "manifest.json").is_file() and not _is_whole(step):
            lines.append(f"{path}, of {node.id}: found another digest of it than it says itself")
    # another worker may just have begun it again
    return lines if lines and read_record(study, node.id) == record else []


def _is_gone_on_with(study: Study, node: Node, path: Path, then: str) -> bool:
    """Whether somebody has started a training again by hand: its config is what its newest checkpoint says, or
    what the study says now; its metrics have lines more, or that checkpoint is beyond the training's end.
    """
    assert node.seed is not None
    assert node.step is not None
    manifest = Existing(study).newest(path.parent)
    if path.name == METRICS:
        beyond = manifest is not None and int(manifest["step"]) > node.step
        return beyond or _has_lines_more(path, then)
    try:
        values = read_yaml(path)
    except ConfigError:
        return False
    now = study.train_config(node.entry, node.seed, node.phase).model_dump(mode="json")
    return values == now or (manifest is not None and values == manifest["config"])


def _has_lines_more(path: Path, then: str) -> bool:
    """Whether the first lines of a file have a digest."""
    digest = hashlib.sha256()
    with path.open("rb") as lines:
        for line in lines:
            digest.update(line)
            if digest.hexdigest() == then:
                return True
    return False


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint's manifest is as it was written, or of another release, which is no edit."""
    try:
        manifest_of(checkpoint)
    except FormatVersion:
        return True
    except CheckpointError:
        return False
    return True


def _edited_configs(study: Study) -> Iterator[str]:
    session = _session(study)
    try:
        written = _by_file(session["worker"])
    except (KeyError, TypeError):  # no session yet, or none that can be read
        return
    now = _by_file(config_values(study))
    for name, then in written.items():
        if not (path := study.out / name).is_file():
            continue
        try:
            values = read_yaml(path)
        except ConfigError as error:
            lines = [str(error)]
        else:
            lines = [] if values == now.get(name) else differences(values, then)
        if lines and _session(study) == session:  # else another worker has just written it
            yield f"{path}: " + "; ".join(lines[:MOST_LINES])


def _by_file(values: Json) -> Json:
    return {"study.yaml": values["study"], **values["configs"]}


def _session(study: Study) -> Json:
    try:
        session = read_json(study.out / SESSION)
    except (OSError, ValueError):
        return {}
    return session if isinstance(session, dict) else {}
