"""What it takes to go on: from the start of a run to the end of its first step, at step 10 and at step 1,000,000.

A real run makes the checkpoint of step 10. The far one is a copy in which manifest and metrics say that a million steps
were made, so all else is equal: the ratio shows what grows with the step. Each start is a fork that has all imports, so
those are not counted. The order of a real data set is looked at too: it is larger than columns that a benchmark writes.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from shards import Order, seal, unseal
from shards.format.atomic import Json
from shards.format.layout import BLOCK
from shards.read.stream import Batch, Stream
from tests.bench.cost import cpu_seconds, paired, promise
from tests.bench.reading.samples import Samples
from tests.bench.turns import turns
from train.checkpoints import checkpoint, folders
from train.config import TrainConfig
from train.loop import CHECKPOINTS
from train.ranks.world import World
from train.run import fit, open_columns

from .runs import TOY, Size, config_of, forked, load_all, model

ROUNDS = 20
NEAR, FAR = 10, 1_000_000  # steps
RATIO = 1.1
LOGGED = 50  # steps between two records of the far run, as the default is
SMALL = Size(model(128, 4), Samples(64), 8)
ROWS, REAL_BATCH, LANES = (
    27_000_000,
    1024,
    64,
)  # of a data set as BLIP3o, and of the reference's recipe


@dataclass(frozen=True, slots=True)
class Start:
    """What a run took until its second batch was asked for."""

    position: int
    cpu: float
    seconds: float
    bytes_read: int  # of files, cached or not


def start_of(config: TrainConfig, run: Path) -> Start:
    """Go on with a run; it ends two steps later."""
    sources, size = open_columns(config, None), config.global_batch
    order = sources.order(config.seed, config.data.lanes, config.data.window)
    found: list[Start] = []
    read, cpu, seconds = bytes_read(), cpu_seconds(), time.perf_counter()

    def batches(position: int, world: World) -> Iterator[Batch]:
        with Stream(sources, order, position=position, global_batch=size) as stream:
            yield next(stream)
            spent = cpu_seconds() - cpu, time.perf_counter() - seconds
            found.append(Start(position, *spent, bytes_read() - read))
            yield from stream

    fit(config, run, batches)
    return found[0]


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def first_run(folder: Path, size: Size) -> tuple[TrainConfig, dict[int, Path]]:
    """The two runs to go on with, by the step they have reached."""
    load_all()
    config = config_of(folder, size, steps=NEAR)
    runs = {step: folder / f"after-{step}" for step in (NEAR, FAR)}
    forked(lambda: fit(config, runs[NEAR]))
    shutil.copytree(runs[NEAR], runs[FAR])
    move_to(runs[FAR], FAR, config.global_batch)
    return config, runs


def move_to(run: Path, step: int, batch: int) -> None:
    """Let a run's only checkpoint and its metrics say that `step` steps were made."""
    (path,) = folders.steps(run / CHECKPOINTS)
    manifest = unseal(path / "manifest.json", checkpoint.KIND, checkpoint.VERSION)
    manifest = manifest | {"step": step, "position": step * batch}
    manifest.pop("digest")  # of what it said before
    manifest["optimizer"]["step"] = step
    (path / "manifest.json").write_bytes(seal(manifest))
    path.rename(path.with_name(f"step-{step:08d}"))
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    records = (
        last | {"step": at, "position": at * batch} for at in range(LOGGED, step + 1, LOGGED)
    )
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def go_on(config: TrainConfig, run: Path, step: int, scratch: Path) -> Start:
    """Make two more steps in a copy of a run, in a process of its own."""
    shutil.copytree(run, scratch)
    try:
        return forked(lambda: start_of(config.model_copy(update={"steps": step + 2}), scratch))
    finally:
        shutil.rmtree(scratch)


def run(folder: Path, rounds: int | None, light: bool) -> tuple[Json, Table]:
    """Go on with either run in turns; (results, table)."""
    rounds = rounds or ROUNDS
    config, runs = first_run(folder, TOY if light else SMALL)
    found: dict[int, list[Start]] = {step: [] for step in runs}
    for number in turns("resume", range(-1, rounds)):  # the first round is not counted
        for step in runs if number % 2 else reversed(runs):  # there and back
            start = go_on(config, runs[step], step, folder / "scratch")
            if number >= 0:
                found[step].append(start)
    near, far = found[NEAR], found[FAR]
    cpu = paired([f.cpu for f in far], [n.cpu for n in near])
    seconds = paired([f.seconds for f in far], [n.seconds for n in near])
    order = order_of_a_real_run(rounds, ROWS // 1000 if light else ROWS)
    results: Json = {
        "rounds": rounds, "steps": [NEAR, FAR], "cpu": cpu, "seconds": seconds, "order": order,
        "cpu_s": [float(np.median([f.cpu for f in who])) for who in (near, far)],
        "seconds_s": [float(np.median([f.seconds for f in who])) for who in (near, far)],
        "promises": [
            promise(f"CPU to the first step, step {FAR:,} over step {NEAR}, upper end of 95 %",
                    cpu["ratio_high"], "<=", RATIO),
        ],
    }  # fmt: skip
    return results, table(results)


def order_of_a_real_run(rounds: int, rows: int) -> Json:
    """Milliseconds of finding the rows of a batch at either step, once the order is there."""
    order = Order([np.full(-(-rows // BLOCK), 2**32 - 1, np.uint32)], lanes=LANES)
    spent: dict[int, list[float]] = {NEAR: [], FAR: []}
    for number in range(2 * rounds):
        for step in spent if number % 2 else reversed(spent):
            start = time.perf_counter()
            order(step * REAL_BATCH, REAL_BATCH)
            spent[step].append(1e3 * (time.perf_counter() - start))
    return {
        "rows": rows, "batch": REAL_BATCH, **paired(spent[FAR], spent[NEAR]),
        "ms": [float(np.median(ms)) for ms in spent.values()],
    }  # fmt: skip


def table(found: Json) -> Table:
    near, far = found["steps"]
    shown = Table("to the first step", f"at step {near}", f"at step {far:,}", "ratio", "95 % interval",
                  title=f"going on from a checkpoint, {found['rounds']} turns")  # fmt: skip
    for name, values, ratio in (
        ("CPU seconds", found["cpu_s"], found["cpu"]),
        ("seconds", found["seconds_s"], found["seconds"]),
        (f"rows of a batch of {found['order']['batch']}, ms", found["order"]["ms"], found["order"]),
    ):
        interval = f"{ratio['ratio_low']:.3f} to {ratio['ratio_high']:.3f}"
        shown.add_row(name, *(f"{v:.3f}" for v in values), f"{ratio['ratio']:.3f}", interval)
    return shown
