"""What the bench says: ratios within rounds, promises held against them, the machine, a table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.bench.cost import promise

from . import peers, readers

READERS = readers.READERS | peers.READERS
Json = dict[str, Any]


def raw_of(name: str) -> str:
    """The reader that is the limit of another: of the same columns."""
    return "raw" if READERS[name].columns > 1 else "raw, latents"


def summary(turns: Sequence[Json], peaks: dict[str, float]) -> list[Json]:
    """A row for each reader and mode: the best turn, and the median of the ratios within rounds."""
    place = {(t["round"], t["reader"], t["mode"]): t for t in turns}
    rows = []
    for name, mode in dict.fromkeys((t["reader"], t["mode"]) for t in turns):
        mine = [t for t in turns if t["reader"] == name and t["mode"] == mode]
        best = max(mine, key=lambda t: float(t["samples_per_s"]))
        plain = mode.replace("+crc", "")
        row = {
            "reader": name,
            "mode": mode,
            "samples_per_s": best["samples_per_s"],
            "mb_per_s": best["mb_per_s"],
            "cpu_s_per_gb": min(t["cpu_s_per_gb"] for t in mine),
            "peak_rss_mb": peaks[name],
        }
        for field, other, key in (
            ("ratio_to_raw", raw_of(name), "samples_per_s"),
            ("cpu_times_ours", "ours" + raw_of(name)[3:], "cpu_s_per_gb"),
        ):
            pairs = [(t[key], place.get((t["round"], other, plain))) for t in mine]
            ratios = [float(value / base[key]) for value, base in pairs if base]
            if ratios:
                row[field] = statistics.median(ratios)
                row[f"{field}_rounds"] = [round(ratio, 4) for ratio in ratios]
        rows.append(row)
    return rows


MODE = "shuffled-warm"
# (reader, field of its row in this mode, bound): what the README promises of two joined columns
PROMISES: tuple[tuple[str, str, str, float], ...] = (
    ("ours", "ratio_to_raw", ">=", 0.9),
    ("ours", "peak_rss_mb", "<=", 300),
    ("mosaicml", "cpu_times_ours", ">=", 2.5),
    ("mosaicml, zipped", "cpu_times_ours", ">=", 3),
    ("webdataset", "cpu_times_ours", ">=", 5),
    ("litdata", "cpu_times_ours", ">=", 1),
)
LARGE: tuple[tuple[str, str, float], ...] = (
    ("open_join_s", "<=", 2),
    ("peak_rss_mb", "<=", 500),
    ("late_start_s", "<=", 1),
)


def promises(rows: Sequence[Json], large: Json) -> list[Json]:
    """What is promised, what was found, and whether it holds; only of what was measured."""
    found = {(row["reader"], key): row[key] for row in rows if row["mode"] == MODE for key in row}
    if "first_rows_at_1e9_s" in large:
        late = [large[f"first_rows_at_{name}_s"] for name in ("1e9", "0")]
        large = {**large, "late_start_s": late[0] - late[1]}
    wanted: list[tuple[str, Any, str, float]] = [
        *((f"{name}, {key}", found.get((name, key)), s, b) for name, key, s, b in PROMISES),
        *((f"32 M rows, {key}", large.get(key), s, b) for key, s, b in LARGE),
    ]
    return [
        promise(what, value, sign, bound)
        for what, value, sign, bound in wanted
        if value is not None
    ]


def machine(folder: Path) -> Json:
    """What the numbers were taken on."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    place = str(folder.resolve())
    disk = max((m for m in mounts if f"{place}/".startswith(f"{m[1]}/".replace("//", "/"))),
               key=lambda m: len(m[1]))  # fmt: skip
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "kernel": platform.release(),
        "disk": f"{disk[0]} ({disk[2]})",
        "load": os.getloadavg()[0],
    }


PACKAGES = (
    "torch",
    "numpy",
    "zarr",
    "webdataset",
    "mosaicml-streaming",
    "litdata",
    "megatron-energon",
)


def versions(peer_python: Path | None) -> dict[str, Json]:
    """Versions in either environment."""
    own: Json = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            own[name] = version(name)
        except PackageNotFoundError:
            continue
    if peer_python is None:
        return {"own": own}
    script = (
        "import json, platform\nfrom importlib.metadata import PackageNotFoundError, version\n"
        "found = {'python': platform.python_version()}\n"
        f"for name in {PACKAGES!r}:\n"
        "    try: found[name] = version(name)\n    except PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    answer = subprocess.run([peer_python, "-c", script], capture_output=True, text=True, check=True)
    return {"own": own, "peers": json.loads(answer.stdout)}


def table(rows: Sequence[Json]) -> Table:
    head = ("reader", "mode", "samples/s", "MB/s", "cpu s/GB", "peak MB", "x raw", "cpu x ours")
    shown = Table(*head, title="best of the rounds; ratios: median of those within a round")
    for column in shown.columns[2:]:
        column.justify = "right"
    for row in sorted(rows, key=lambda row: row["mode"]):
        ratios = [row.get(field) for field in ("ratio_to_raw", "cpu_times_ours")]
        shown.add_row(
            row["reader"], row["mode"], f"{row['samples_per_s']:,.0f}", f"{row['mb_per_s']:,.0f}",
            f"{row['cpu_s_per_gb']:.3f}", f"{row['peak_rss_mb']:.0f}",
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        )  # fmt: skip
    return shown
