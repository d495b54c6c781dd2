"""`python -m eval study status`: what of a study exists, what is missing, and what has failed."""

from __future__ import annotations

import shlex
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from shards.console import duration_text, next_text, render
from train.checkpoints.folders import steps

from ..errors import OutputEdited
from ..images.flags import plain
from .earlier import take_over, taken_over
from .graph import Node, nodes_of
from .reuse import Existing, read_record
from .run.claims import holder_text
from .run.edited import refuse_edited
from .run.workers import claimed, workers
from .study import Study


def states(study: Study) -> dict[str, bool]:
    """Returns for each node, by id and in order, whether it is done."""
    existing, done = Existing(study), dict[str, bool]()
    for node in nodes_of(study):
        done[node.id] = all(done[need] for need in node.needs) and existing.done(node)
    return done


def status(study: Study) -> str:
    """Returns a table of the runs with their pictures and scores, what has failed, and what is next."""
    from rich.table import Table

    study = take_over(study)
    done, nodes = states(study), nodes_of(study)
    table = Table(box=None, pad_edge=False)
    for name in ("entry", "seed", "training", "sets", "scores", "from"):
        table.add_column(name, justify="left")
    by_run: dict[tuple[str, int | None], list[Node]] = defaultdict(list)
    for node in nodes:
        by_run[node.entry, node.seed].append(node)
    folders = taken_over(study)
    for (entry, seed), own in by_run.items():
        if seed is None:
            continue
        by_hand = [str(folders[node.id]) for node in own if node.id in folders]
        table.add_row(
            entry,
            str(seed),
            ", ".join(_training(study, node, done) for node in own if node.kind == "train"),
            _count([node for node in own if node.kind == "generate"], done),
            _count([node for node in own if node.kind == "score"], done),
            ", ".join(dict.fromkeys(by_hand)),
        )
    encoding = [
        f"{node.id}: {'done' if done[node.id] else 'to do'}"
        for node in nodes
        if node.kind == "encode"
    ]
    head = f"{study.out}: {sum(done.values())} of {len(nodes)} commands are done; {_holders(study)}"
    verb = "report" if all(done.values()) else "run"
    out = [] if study.out == Path("studies") / study.path.stem else ["--out", study.out]
    after = next_text("eval", "study", verb, study.path, *out)
    return render(
        head, *encoding, table, *_chosen(study), *_claims(study, nodes),
        *_failures(study, nodes, done), *_edited(study), after,
    )  # fmt: skip


def _training(study: Study, node: Node, done: dict[str, bool]) -> str:
    if done[node.id]:
        return "done"
    assert node.seed is not None
    saved = steps(study.run_folder(node.entry, node.seed, node.phase) / "checkpoints")
    at = saved[0].name.removeprefix("step-").lstrip("0") if saved else "0"
    return f"step {at} of {node.step}"


def _count(nodes: Sequence[Node], done: dict[str, bool]) -> str:
    return f"{sum(done[node.id] for node in nodes)} of {len(nodes)}"


def _chosen(study: Study) -> Iterator[str]:
    """Yields what is chosen for each entry so far, and what is still to be."""
    for entry in study.entries if study.axes else ():
        values = study.settled.get(entry, {})
        parts = [f"{axis} {plain(values[axis])}" for axis in study.axes if axis in values]
        if left := [axis for axis in study.axes if axis not in values]:
            parts.append(f"{', '.join(left)} to be chosen")
        yield f"{entry}: {', '.join(parts)}"


def _holders(study: Study) -> str:
    """Returns which workers are at work now; one that was killed leaves its lease."""
    holders = [holder_text(record) for record in workers(study)]
    if not holders:
        return "no `study run` works on it"
    return f"`study run` works on it ({'; '.join(holders)})"


def _claims(study: Study, nodes: Sequence[Node]) -> Iterator[str]:
    """Yields which node each worker has, and since when."""
    for node, record in claimed(study, nodes):
        since = record.get("since")
        text = ""
        if isinstance(since, int | float) and 0 < since <= time.time():
            clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
            text = f", since {clock} ({duration_text(time.time() - since)})"
        yield f"{node}: {holder_text(record)}{text}"


def _edited(study: Study) -> Iterator[str]:
    """Yields which files were edited, for which `study run` is refused."""
    try:
        refuse_edited(study)
    except OutputEdited as error:
        yield f"`study run` will refuse: {error}"


def _failures(study: Study, nodes: Sequence[Node], done: dict[str, bool]) -> Iterator[str]:
    running = {node for node, _ in claimed(study, nodes)}
    for node in nodes:
        record = None if done[node.id] or node.id in running else read_record(study, node.id)
        if record is not None and record.get("exit_code"):
            yield f"failed: {node.id}, exit code {record['exit_code']}: {shlex.join(node.command)}"
            yield f"    {study.log(node.id)}"
