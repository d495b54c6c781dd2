"""`python -m eval study status`: what of a study exists, what is missing, and what has failed."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shards import open_store
from shards.column import lease_chain, stale
from shards.console import next_text, render
from train.checkpoints.checkpoint import steps

from .earlier import take_over, taken_over
from .graph import Node, nodes_of
from .reuse import Existing, read_record
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
    head = f"{study.out}: {sum(done.values())} of {len(nodes)} commands are done; {_holder(study)}"
    verb = "report" if all(done.values()) else "run"
    out = [] if study.out == Path("studies") / study.path.stem else ["--out", study.out]
    after = next_text("eval", "study", verb, study.path, *out)
    return render(head, *encoding, table, *_failures(study, nodes, done), after)


def _training(study: Study, node: Node, done: dict[str, bool]) -> str:
    if done[node.id]:
        return "done"
    assert node.seed is not None
    saved = steps(study.run_folder(node.entry, node.seed, node.phase) / "checkpoints")
    at = saved[0].name.removeprefix("step-").lstrip("0") if saved else "0"
    return f"step {at} of {node.step}"


def _count(nodes: Sequence[Node], done: dict[str, bool]) -> str:
    return f"{sum(done[node.id] for node in nodes)} of {len(nodes)}"


def _holder(study: Study) -> str:
    """Returns whether a `study run` works on it now."""
    holder: dict[str, Any] | None = None
    if study.out.is_dir():
        holder = lease_chain(open_store(study.out))[1]
    if holder is None or stale(holder):  # a killed one leaves its lease
        return "no `study run` works on it"
    return f"`study run` works on it (pid {holder.get('pid')} on {holder.get('host')})"


def _failures(study: Study, nodes: Sequence[Node], done: dict[str, bool]) -> Iterator[str]:
    for node in nodes:
        record = None if done[node.id] else read_record(study, node.id)
        if record is not None and record.get("exit_code"):
            yield f"failed: {node.id}, exit code {record['exit_code']}: {shlex.join(node.command)}"
            yield f"    {study.log(node.id)}"
