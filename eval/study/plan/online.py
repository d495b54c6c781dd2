"""`python -m eval study online STUDY.yaml --tars DIR`: what a step takes that encodes its pictures and captions,
beside one that reads columns, both measured here.

OUT/online.json, a sealed record: format "latentbank-online", version 1, device, ranks, steps (of each measurement),
rounds, entries {name: config (digest of the training), cached[] and online[] (seconds of a step, one a round)}.
A measurement is a run of `eval train --measure` with the entry's own config; of a round, one run reads columns
and one the tars, in turns. Its first steps, in which encoders are loaded and models compiled, are not counted.
"""

from __future__ import annotations

import logging
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import TYPE_CHECKING, Any

import yaml

from shards import ShardsError, atomic_write, canonical_json, seal, sha256
from shards.console import render
from shards.format.atomic import unseal
from shards.processes import bound_to, with_this_python
from train.config import TrainConfig
from train.report import read_records

from ...errors import NotMeasured
from ..graph import allowed_classes, launch
from ..study import SAYS_NOTHING, Study

if TYPE_CHECKING:
    import argparse

Json = dict[str, Any]
FORMAT, VERSION, FILE = "latentbank-online", 1, "online.json"
WARM, SPARE = 3, 2  # steps of a measurement before those that count, and after
KINDS = ("cached", "online")
LINES = 12  # of a log that an error shows
log = logging.getLogger(__name__)


def run_online(args: argparse.Namespace) -> int:
    """Measures all entries, writes OUT/online.json and prints what it says."""
    study = Study.open(args.study, args.out)
    check(study, args.tars)
    record = measure(study, args.tars, args.steps, args.rounds)
    study.out.mkdir(parents=True, exist_ok=True)
    atomic_write(study.out / FILE, seal(record))
    print(as_text(record))
    return 0


def check(study: Study, tars: Sequence[Path]) -> None:
    """Raises before anything is measured where a column or a tar is missing."""
    from train.run import open_columns  # which loads torch

    from ...online import check_tars

    for entry in study.entries:
        sources = open_columns(_config(study, entry), None)
        try:
            check_tars(sources, tars)
        finally:
            sources.close()


def measure(study: Study, tars: Sequence[Path], steps: int, rounds: int) -> Json:
    """Returns the record of online.json. Raises NotMeasured where a run fails."""
    study.out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, dict[str, list[float]]] = {e: {k: [] for k in KINDS} for e in study.entries}
    device = ""
    with tempfile.TemporaryDirectory(dir=study.out, prefix=".online-") as folder:
        for number in range(rounds):
            for entry in study.entries:
                for kind in KINDS if number % 2 == 0 else reversed(KINDS):
                    place = Path(folder) / f"{entry}-{kind}-{number}"
                    values, device = _run(
                        study, entry, place, tars if kind == "online" else (), steps
                    )
                    seconds[entry][kind].append(fmean(values))
                    print(
                        f"{entry}, {kind}: {fmean(values):.3g} s a step (round {number + 1} of {rounds})",
                        flush=True,
                    )
    return {
        "format": FORMAT, "version": VERSION, "device": device, "ranks": study.ranks, "steps": steps, "rounds": rounds,
        "entries": {e: {"config": _digest(study, e), **seconds[e]} for e in study.entries},
    }  # fmt: skip


def measured(study: Study) -> Json | None:
    """Returns what the ledger says of a study's online.json; None where there is none.

    Fields: device, ranks, steps, rounds, entries[], one an entry and in their order: cached and online (seconds of a
    step), times (a Value: the geometric mean of the rounds' ratios, low and high the least and the most of
    them); null where its config was another, or nothing was measured.
    """
    path = study.out / FILE
    if not path.exists():
        return None
    try:
        record = unseal(path, FORMAT, VERSION)
    except ShardsError as error:  # no verdict depends on it
        log.warning(
            "%s: %s. Measure again with `study online`, or delete it", type(error).__name__, error
        )
        return None
    entries = []
    for name in study.entries:
        own = record["entries"].get(name)
        entries.append(_times(own) if own and own["config"] == _digest(study, name) else None)
    return {key: record[key] for key in ("device", "ranks", "steps", "rounds")} | {
        "entries": entries
    }


def as_text(record: Json) -> str:
    """Returns the record as a table for a terminal."""
    from rich.table import Table

    table = Table("entry", "a step from columns", "a step that encodes", "times as long")
    for name, own in record["entries"].items():
        values = _times(own)
        times = values["times"]
        table.add_row(
            name, f"{values['cached']:.3g} s", f"{values['online']:.3g} s",
            f"{times['value']:.3g} ({times['low']:.3g} to {times['high']:.3g})",
        )  # fmt: skip
    note = (
        f"{record['device']}, processes: {record['ranks']}. {record['steps']} steps of each, "
        f"in {record['rounds']} rounds; least and most of them in brackets."
    )
    return render(table, note)


def _times(own: Json) -> Json:
    ratios = [o / c for c, o in zip(own["cached"], own["online"], strict=True)]
    return {
        "cached": fmean(own["cached"]), "online": fmean(own["online"]),
        "times": {
            "value": geometric_mean(ratios), "low": min(ratios), "high": max(ratios), "count": len(ratios),
        },
    }  # fmt: skip


def _config(study: Study, entry: str) -> TrainConfig:
    """Returns the config of an entry's last phase, from new weights and without validation."""
    config = study.train_config(entry, study.seeds[0])
    validation = config.validation.model_copy(update={"source": None})
    return config.model_copy(update={"init_from": None, "validation": validation})


def _digest(study: Study, entry: str) -> str:
    """Returns the digest of what a training is, but for its seed and what moves no weight."""
    values = study.train_config(entry, study.seeds[0]).model_dump(mode="json")
    for key in (*SAYS_NOTHING, "seed", "init_from"):
        values.pop(key, None)
    if "lr" in study.axes:  # a step takes as long at each rate
        values["optim"].pop("lr")
    return sha256(canonical_json(values))


def _run(
    study: Study, entry: str, folder: Path, tars: Sequence[Path], steps: int
) -> tuple[list[float], str]:
    """Returns the seconds of each counted step of a run, and the device it was on."""
    last = WARM + steps + SPARE
    update = {"runs": folder / "runs", "log_every": 1}
    config = _config(study, entry).model_copy(update=update)
    folder.mkdir()
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    words = ["--measure", str(last)]
    for flag, values in (("--tars", tars), ("--allow-class", allowed_classes(study))):
        words += [flag, *map(str, values)] if values else []
    command = launch(study, "eval", "train", str(path), *words)
    done = subprocess.run(
        bound_to(os.getpid(), with_this_python(command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
    )  # fmt: skip
    records = [r for each in (folder / "runs").glob("*/metrics.jsonl") for r in read_records(each)]
    seconds = list(_seconds(records, steps))
    if done.returncode or len(seconds) < steps:
        kind = "encodes in each step" if tars else "reads columns"
        lines = "\n  ".join(done.stdout.splitlines()[-LINES:])
        path = study.out / "logs" / f"online-{entry}.log"
        path.parent.mkdir(exist_ok=True)
        path.write_text(done.stdout)
        raise NotMeasured(
            f"{entry}: a training that {kind} ended with code {done.returncode} after {len(seconds)} of "
            f"{steps} counted steps:\n  {lines}\nAll of it is in {path}. Nothing was measured"
        )
    return seconds, next((str(r["start"]["device"]) for r in records if r.get("start")), "unknown")


def _seconds(records: Sequence[Json], steps: int) -> Iterator[float]:
    for record in records:
        if WARM < record["step"] <= WARM + steps and record.get("seconds_a_step"):
            yield record["seconds_a_step"]
