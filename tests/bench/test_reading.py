"""The bench: all readers deliver the same samples, and one that does not has no numbers."""

import json
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.bench.reading import captions, latents, peers, readers
from tests.bench.reading.measure import Reader, one_pass
from tests.bench.reading.report import PROMISES, READERS, promises, summary
from tests.bench.reading.run import command, compare, environment, expected_digests
from tests.bench.reading.samples import BATCH, Batch, Ring, Samples
from tests.bench.reading.scale import opening, write_records

SAMPLES = Samples(2 * BATCH, (4, 4, 4), 16)
HERE = readers.READERS | {"webdataset": peers.READERS["webdataset"]}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The columns and the tars, written once. Read only."""
    folder = tmp_path_factory.mktemp("bench")
    for name, write in (
        ("columns", readers.WRITERS["columns"]),
        ("tars", peers.WRITERS["tars"]),
    ):
        (folder / name).mkdir()
        write(folder / name, SAMPLES)
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    return expected_digests(tmp_path_factory.mktemp("expected"), SAMPLES)


def digest(reader: Reader, folder: Path, order: str) -> str:
    ring = Ring(SAMPLES, reader.columns)
    return str(one_pass(reader, folder, SAMPLES, ring, order, check=True)["digest"])


ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("configs", "shards", "encode", "train", "eval", "tests"):
            raise ModuleNotFoundError(f"{name}: not in the peers' environment", name=name)

sys.meta_path.insert(0, Refuse())
for name in sys.argv[1:]:
    __import__(name)
"""


def test_peers_are_imported_where_nothing_of_ours_is(tmp_path: Path) -> None:
    peers_python = tmp_path / "python"  # another name than this one's, as that of the peers has
    names = [command(peers_python, tmp_path, each)[-1] for each in ("peers", "remote.peers")]
    path = environment(peers_python, tmp_path) | {"PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", ALONE, *names], env=path, check=True)


def test_samples_are_plausible_and_the_same_everywhere() -> None:
    samples = Samples(4096)
    moments, tokens = samples[7]
    assert moments.shape == (32, 32, 32)
    assert tokens.shape == (samples.lengths[7], 2048)
    assert np.array_equal(moments, Samples(**json.loads(json.dumps(samples.record())))[7][0])
    text = torch.from_numpy(tokens).view(torch.bfloat16).float()
    for values in (torch.from_numpy(moments).float(), text):
        assert values.abs().min() >= 1 / 8
        assert values.abs().max() < 2
        assert values.std() > 0.5
    assert 112 < samples.lengths.mean() < 120
    assert samples.lengths.min() >= 1
    assert samples.lengths.max() <= 256
    assert samples.row_bytes(2) == 4096 * 65_536 + int(samples.lengths.sum()) * 4096


@pytest.mark.parametrize("order", ["sequential", "shuffled", "shuffled+crc"])
@pytest.mark.parametrize("name", HERE)
def test_every_reader_delivers_the_samples(
    stores: Path, expected: dict[int, str], name: str, order: str
) -> None:
    reader = HERE[name]
    if order in reader.orders:
        assert digest(reader, stores, order) == expected[reader.columns]


def test_raw_reads_the_rows_that_the_stream_reads(stores: Path) -> None:
    ring = Ring(SAMPLES, 2)
    for order in ("sequential", "shuffled"):
        pairs = zip(
            HERE["raw"].open(stores, SAMPLES, order, ring),
            HERE["ours"].open(stores, SAMPLES, order, ring),
            strict=True,
        )
        for raw, ours in pairs:
            assert torch.equal(raw.moments, ours.moments)
            assert ours.tokens is not None
            assert raw.tokens is not None
            assert torch.equal(raw.tokens.view(torch.int16), ours.tokens.view(torch.int16))


@pytest.mark.parametrize("fault", ["lost", "twice", "flipped", "texts swapped"])
def test_a_reader_that_delivers_something_else_is_found(
    stores: Path, expected: dict[int, str], fault: str
) -> None:
    def open_(folder: Path, samples: Samples, order: str, ring: Ring) -> Iterator[Batch]:
        rows = [samples[row] for row in range(samples.rows)]
        rows[6:8] = [rows[6], rows[6]] if fault == "twice" else rows[6:8]
        if fault == "flipped":
            rows[5][1][0, 0] ^= 1
        if fault == "texts swapped":
            rows[3], rows[4] = (rows[3][0], rows[4][1]), (rows[4][0], rows[3][1])
        return ring.pack(rows[: -BATCH if fault == "lost" else None])

    reader = Reader(open_, "none")
    if fault == "lost":
        with pytest.raises(ValueError, match="64 samples came, 128 stand"):
            digest(reader, stores, "sequential")
    else:
        assert digest(reader, stores, "sequential") != expected[2]


@pytest.mark.slow
def test_processes_take_turns_and_a_damaged_store_has_no_numbers(
    tmp_path: Path, stores: Path
) -> None:
    expected_digests(tmp_path, SAMPLES)
    (tmp_path / "columns").mkdir()
    readers.WRITERS["columns"](tmp_path / "columns", SAMPLES)
    with (tmp_path / "columns/text/tokens/c/0/0").open("r+b") as file:
        file.seek(77)
        byte = file.read(1)
        file.seek(77)
        file.write(bytes([byte[0] ^ 8]))
    rows, turns, faults = compare(
        tmp_path, SAMPLES, ["raw", "raw, latents", "litdata"], None, 2,
        ["shuffled-warm"], Console(file=StringIO()),
    )  # fmt: skip
    assert [fault.partition(":")[0] for fault in faults] == ["raw", "litdata"]
    assert [(row["reader"], row["mode"]) for row in rows] == [("raw, latents", "shuffled-warm")]
    assert len(turns) == 2
    assert rows[0]["ratio_to_raw"] == 1
    assert 0 < rows[0]["peak_rss_mb"] < 500


def test_ratios_are_within_rounds() -> None:
    speeds = {"raw": (100.0, 50.0, 80.0), "ours": (90.0, 50.0, 60.0)}
    turns = [
        {
            "round": number,
            "reader": name,
            "mode": mode,
            "samples_per_s": speeds[name][number],
            "mb_per_s": 1.0,
            "cpu_s_per_gb": 1 / speeds[name][number],
        }
        for number in range(3)
        for name, mode in (("raw", "shuffled-warm"), ("ours", "shuffled-warm"))
    ]
    crc = [{**t, "mode": "shuffled+crc-warm"} for t in turns if t["reader"] == "ours"]
    rows = {(r["reader"], r["mode"]): r for r in summary(turns + crc, {"raw": 5, "ours": 7})}
    ours = rows["ours", "shuffled-warm"]
    assert ours["samples_per_s"] == 90
    assert ours["ratio_to_raw"] == pytest.approx(0.9)
    assert ours["ratio_to_raw_rounds"] == [0.9, 1.0, 0.75]
    assert ours["peak_rss_mb"] == 7
    assert rows["raw", "shuffled-warm"]["cpu_times_ours"] == pytest.approx(0.9)
    assert rows["ours", "shuffled+crc-warm"]["ratio_to_raw"] == pytest.approx(0.9)


def test_promises_are_held_against_what_was_found() -> None:
    rows = [
        {"reader": "ours", "mode": "shuffled-warm", "ratio_to_raw": 0.89, "peak_rss_mb": 194.0},
        {"reader": "ours", "mode": "shuffled-cold", "ratio_to_raw": 0.2, "peak_rss_mb": 194.0},
        {"reader": "litdata", "mode": "shuffled-warm", "cpu_times_ours": 1.4},
    ]
    large = {"open_join_s": 0.4, "peak_rss_mb": 501.0, "first_rows_at_0_s": 0.3,
             "first_rows_at_1e9_s": 0.4}  # fmt: skip
    found = {p["what"]: p["holds"] for p in promises(rows, large)}
    assert found == {
        "ours, ratio_to_raw": False,
        "ours, peak_rss_mb": True,
        "litdata, cpu_times_ours": True,
        "32 M rows, open_join_s": True,
        "32 M rows, peak_rss_mb": False,
        "32 M rows, late_start_s": True,
    }


def test_every_promise_is_of_a_reader_that_there_is() -> None:
    assert {name for name, *_ in PROMISES} <= READERS.keys()


def test_a_column_of_records_opens_and_orders(tmp_path: Path) -> None:
    write_records(tmp_path, shards=3)
    found = opening(tmp_path)
    assert found["rows"] == 3 * (6_400 - 3)  # one cut-off picture, two captions missing a shard


def test_other_parameters_discard_what_stands(tmp_path: Path) -> None:
    first = expected_digests(tmp_path, SAMPLES)
    (tmp_path / "columns").mkdir()
    (tmp_path / "mine").mkdir()
    assert expected_digests(tmp_path, SAMPLES) == first
    assert (tmp_path / "columns").exists()
    assert expected_digests(tmp_path, Samples(2 * BATCH, (4, 4, 4), 16, seed=1)) != first
    assert not (tmp_path / "columns").exists()
    assert (tmp_path / "mine").exists()


def test_captions_are_compared(tmp_path: Path) -> None:
    results, table = captions.run(tmp_path, 2, light=True)
    assert (
        list(results["samples_s"]) == ["bfloat16", "int8", "int8, tokens"] == list(captions.TURNS)
    )
    assert len(results["rate"]["int8"]["ratios"]) == 2
    assert results["rate"]["bfloat16"]["ratio"] == 1
    assert table.row_count == 3


def test_latents_are_compared(tmp_path: Path) -> None:
    results, table = latents.run(tmp_path, 2, light=True)
    assert list(results["rate"]) == ["float16", "int8"]
    # rows of fewer than 128 channels have one scale
    assert results["row_bytes"] == {"float16": 128, "int8": 64 + 4}
    assert table.row_count == 2
