"""MosaicML Streaming and LitData from an object store, as their documents advise: both columns in one
data set, shuffled, with a local cache that holds it.

    python -m latentbank_bench.remote.peers mosaicml URL CACHE SAMPLES CHECK

Each shuffles within blocks or chunks of its own choice, and reads a first batch of one or two of
them; ours is over all rows. Runs in the environment of the peers; see `bench/peers.txt`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from ..peers import clean_mds, litdata_rows, mosaicml_rows
from ..samples import BATCH, Ring, Samples
from .passes import Answers, Epoch, serve


def mosaicml(url: str, cache: Path, samples: Samples) -> Callable[[], Epoch]:
    from streaming import StreamingDataset

    clean_mds()
    ring = Ring(samples, 2)

    def open_() -> Epoch:
        data = StreamingDataset(
            remote=f"{url}/mds", local=str(cache), batch_size=BATCH, shuffle=True, shuffle_seed=0
        )
        return lambda _: ring.pack(mosaicml_rows(data, samples))

    return open_


def litdata(url: str, cache: Path, samples: Samples) -> Callable[[], Epoch]:
    from litdata import StreamingDataset
    from litdata.streaming import downloader

    # its faster client takes no option of the user's, and by default refuses what is not https
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    cache.mkdir(parents=True, exist_ok=True)
    ring = Ring(samples, 2)

    def open_() -> Epoch:
        data = StreamingDataset(
            f"{url}/litdata", cache_dir=str(cache), max_cache_size="1000GB", shuffle=True,
            batch_decode=0, storage_options={"endpoint_url": os.environ["AWS_ENDPOINT_URL"]},
        )  # fmt: skip
        return lambda _: ring.pack(litdata_rows(data))

    return open_


READERS = {"mosaicml": mosaicml, "litdata": litdata}

if __name__ == "__main__":
    name, url, cache, record, plan, check = sys.argv[1:]
    answers = Answers()
    samples = Samples(**json.loads(record))
    open_ = READERS[name](url, Path(cache), samples)
    serve(open_, json.loads(plan), samples, check == "True", answers)
