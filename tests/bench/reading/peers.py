"""Readers of other libraries, each as its documents advise for arrays of one process.

    python -m tests.bench.reading.peers read mosaicml FOLDER SAMPLES CORE

Runs in the environment of the peers (bench/peers.txt), where none of ours can be imported, and for
webdataset in the project's own. A library is imported when it is opened.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .measure import Reader, main
from .samples import BATCH, Batch, Ring, Samples

SHARD = 128  # samples of a shard: 64 MB, the default size of MosaicML's and LitData's
BUFFER = 256  # samples of a shuffle buffer
COLUMNS = ("moments", "tokens")


# WebDataset: tars of two .npy members a sample ----------------------------------------------------


def write_tars(folder: Path, samples: Samples, columns: tuple[str, ...] = COLUMNS) -> None:
    import webdataset

    with webdataset.ShardWriter(
        f"{folder}/%05d.tar", maxcount=4 * SHARD, maxsize=1 << 32, verbose=0
    ) as writer:
        for row, values in enumerate(samples):
            named = {f"{c}.npy": v for c, v in zip(COLUMNS, values, strict=True) if c in columns}
            writer.write({"__key__": f"{row:08d}", **named})


def webdataset(folder: Path, samples: Samples, order: str, ring: Ring) -> Iterator[Batch]:
    import webdataset

    urls = sorted(str(path) for path in (folder / "tars").glob("*.tar"))
    data = webdataset.WebDataset(urls, shardshuffle=len(urls) if order == "shuffled" else False)
    if order == "shuffled":
        data = data.shuffle(BUFFER)
    return ring.pack(lazily(data.decode().to_tuple("moments.npy", "tokens.npy")))


def lazily(data: Any) -> Iterator[Any]:
    """Iterate, but begin only when the first is asked for: some libraries read ahead at `iter`."""
    yield from data


# MosaicML Streaming -------------------------------------------------------------------------------


def write_mds(folder: Path, samples: Samples, columns: tuple[str, ...]) -> None:
    """As `bytes`, which are read at two thirds of the price of its `ndarray`.

    Shards are cut by hand every 128 samples: data sets that are zipped must be cut alike, or their
    shuffles differ.
    """
    from streaming import MDSWriter

    with MDSWriter(
        out=str(folder), columns=dict.fromkeys(columns, "bytes"), size_limit=None
    ) as writer:
        for row, values in enumerate(samples):
            if row and row % SHARD == 0:
                writer.flush_shard()
                writer._reset_cache()
            sample = dict(zip(COLUMNS, values, strict=True))
            writer.write({name: sample[name].tobytes() for name in columns})


def write_mds_joint(folder: Path, samples: Samples) -> None:
    write_mds(folder, samples, COLUMNS)


def open_mds(folder: Path, order: str) -> Any:
    from streaming import StreamingDataset

    return StreamingDataset(
        local=str(folder), batch_size=BATCH, shuffle=order == "shuffled", shuffle_seed=0
    )


def clean_mds() -> None:
    """Remove the shared memory of data sets whose process was killed; else the next may refuse."""
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()


def arrays(samples: Samples, moments: bytes, tokens: bytes) -> tuple[Any, Any]:
    return (
        np.frombuffer(moments, np.float16).reshape(samples.shape),
        np.frombuffer(tokens, np.uint16).reshape(-1, samples.width),
    )


def mosaicml(folder: Path, samples: Samples, order: str, ring: Ring) -> Iterator[Batch]:
    clean_mds()
    return ring.pack(mosaicml_rows(open_mds(folder / "mds", order), samples))


def mosaicml_rows(data: Any, samples: Samples) -> Iterator[tuple[Any, Any]]:
    return (arrays(samples, row["moments"], row["tokens"]) for row in lazily(data))


def mosaicml_zipped(folder: Path, samples: Samples, order: str, ring: Ring) -> Iterator[Batch]:
    """One data set a column; it has no join, so two of the same seed are read side by side."""
    clean_mds()
    latents, text = (open_mds(folder / f"mds-zipped/{name}", order) for name in ("latents", "text"))
    pairs = zip(lazily(latents), lazily(text), strict=True)
    return ring.pack(arrays(samples, a["moments"], b["tokens"]) for a, b in pairs)


def write_mds_zipped(folder: Path, samples: Samples) -> None:
    write_mds(folder / "latents", samples, ("moments",))
    write_mds(folder / "text", samples, ("tokens",))


# LitData ------------------------------------------------------------------------------------------


class LitSample:
    """A row as LitData stores it; bfloat16 goes as int16, as its serializer knows no bfloat16."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __call__(self, row: int) -> dict[str, torch.Tensor]:
        moments, tokens = self.samples[row]
        return {
            "moments": torch.from_numpy(moments),
            "tokens": torch.from_numpy(tokens.view(np.int16)),
        }


def write_litdata(folder: Path, samples: Samples) -> None:
    import litdata

    litdata.optimize(
        fn=LitSample(samples), inputs=list(range(samples.rows)), output_dir=str(folder),
        chunk_bytes="64MB", num_workers=1, verbose=False,
    )  # fmt: skip


def litdata(folder: Path, samples: Samples, order: str, ring: Ring) -> Iterator[Batch]:
    import litdata

    # its own choice decodes 256 rows together, which costs twice as much where rows are shuffled
    how = {"shuffle": True, "batch_decode": 0} if order == "shuffled" else {}
    return ring.pack(litdata_rows(litdata.StreamingDataset(str(folder / "litdata"), **how)))


def litdata_rows(data: Any) -> Iterator[tuple[Any, Any]]:
    return ((row["moments"].numpy(), row["tokens"].numpy()) for row in lazily(data))


# Energon ------------------------------------------------------------------------------------------


def write_energon(folder: Path, samples: Samples, columns: tuple[str, ...]) -> None:
    """Tars as WebDataset's, with the index and the records that `energon prepare` adds."""
    from megatron.energon.flavors import BaseWebdatasetFactory

    write_tars(folder, samples, columns)
    names = sorted(path.name for path in folder.glob("*.tar"))
    BaseWebdatasetFactory.prepare_dataset(
        folder, names, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1
    )
    crude = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    (folder / ".nv-meta" / "dataset.yaml").write_text(json.dumps(crude))  # JSON is YAML


def write_energon_both(folder: Path, samples: Samples) -> None:
    write_energon(folder, samples, COLUMNS)


def write_energon_joined(folder: Path, samples: Samples) -> None:
    """A data set a column, and the record that joins them by key."""
    from megatron.energon import prepare_metadataset
    from megatron.energon.epathlib import EPath

    for column in COLUMNS:
        (folder / column).mkdir()
        write_energon(folder / column, samples, (column,))
    joiner = {"__module__": f"{__package__}.peers", "__function__": "joined_row"}
    parts = [{"path": "moments"}, {"path": "tokens"}]
    record = {
        "__module__": "megatron.energon",
        "__class__": "MetadatasetV2",
        "splits": {"train": {"join": parts, "joiner": joiner}},
    }
    (folder / "joined.yaml").write_text(json.dumps(record))
    prepare_metadataset(EPath(folder / "joined.yaml"))


def joined_row(moments: Any, tokens: Any) -> Any:
    """A row of two data sets; Energon finds this by its name."""
    from megatron.energon import CrudeSample

    return CrudeSample({**moments, "tokens.npy": tokens["tokens.npy"]})


def energon(place: str) -> Callable[[Path, Samples, str, Ring], Iterator[Batch]]:
    def open_(folder: Path, samples: Samples, order: str, ring: Ring) -> Iterator[Batch]:
        from megatron.energon import (
            Cooker,
            DefaultTaskEncoder,
            WorkerConfig,
            get_loader,
            get_train_dataset,
            get_val_dataset,
            stateless,
        )

        @stateless  # type: ignore[untyped-decorator]  # the library has no types here
        def cook(row: Any) -> Any:
            return row

        class Collate(DefaultTaskEncoder):  # type: ignore[misc]
            cookers = [Cooker(cook)]

            def batch(self, samples: list[Any]) -> Any:
                return next(ring.pack((row["moments.npy"], row["tokens.npy"]) for row in samples))

        how: dict[str, Any] = {
            "batch_size": BATCH,
            "task_encoder": Collate(),
            "worker_config": WorkerConfig(rank=0, world_size=1, num_workers=0),
        }
        if order == "shuffled":
            data = get_train_dataset(
                folder / place, shuffle_buffer_size=BUFFER, max_samples_per_sequence=100,
                repeat=False, **how,
            )  # fmt: skip
        else:
            data = get_val_dataset(folder / place, split_part="train", **how)
        return lazily(get_loader(data, watchdog_timeout_seconds=None))

    return open_


READERS = {
    "webdataset": Reader(webdataset, "tars"),
    "mosaicml": Reader(mosaicml, "mds"),
    "mosaicml, zipped": Reader(mosaicml_zipped, "mds-zipped"),
    "litdata": Reader(litdata, "litdata"),
    "energon": Reader(energon("energon"), "energon"),
    "energon, joined": Reader(energon("energon-joined/joined.yaml"), "energon-joined"),
}


WRITERS: dict[str, Callable[[Path, Samples], None]] = {
    "tars": write_tars,
    "mds": write_mds_joint,
    "mds-zipped": write_mds_zipped,
    "litdata": write_litdata,
    "energon": write_energon_both,
    "energon-joined": write_energon_joined,
}

if __name__ == "__main__":
    main(READERS, WRITERS, sys.argv[1:])
