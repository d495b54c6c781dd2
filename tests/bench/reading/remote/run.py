"""Serves the samples as objects, starts a process for each way of reading them, and lets them take turns.

    plain           all objects by requests of 4 MiB, 16 at once: the limit of this client
    kept            the same, written to files of 4 MiB: what a reader that keeps them does at least
    rows            one request for each row of the same order, 32 at once
    cold, warm      this program with a cache that holds the columns: its first epoch, twelve later ones
    small, none     its first epoch with a cache of a quarter of the columns, and with none; `steady` is
                    its second
    staging, staged it copies the columns to a folder and reads an epoch there; twelve later ones
    mosaicml ...    MosaicML Streaming and LitData with a cache that holds all: first epoch, twelve later

The store is a folder behind nginx, or behind a small server of Python's where nginx is not
installed: near and as fast as it can, near with 75 MB/s for each connection (1.2 GB/s for 16, which
needs nginx), and with that limit at 20 ms a request. Each way gets a process and an empty cache of
its own; they take turns, there and back, and ratios are of one round. Requests and bytes are the
server's. In the first round every way but plain requests goes over the samples once more, and all
rows are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from shards.format.atomic import Json
from shards.places import local_path
from tests.bench import turns

from ..readers import write_columns
from ..report import versions
from ..run import Failed as Failed
from ..run import command, environment, prepare
from ..samples import BATCH, Samples, digest_of_all, row_digest
from .passes import WARM
from .report import promises, summary, text
from .server import BUCKET, Delayed, Store

ROUNDS = 3
NETWORKS = {"near": "0 ms", "limited": "1.2 GB/s", "late": "20 ms"}  # with their names in results
LATE = 0.02  # seconds
ROOT = Path(__file__).parents[4]
# what each process prints, in order: (pass, its epochs, whether it starts anew)
WAYS = {
    "plain": [("plain", 1, True)],
    "kept": [("kept", 1, True)],
    "rows": [("rows", 1, True)],
    "cache": [("cold", 1, True), ("warm", WARM, True)],
    "small": [("small", 1, True), ("small, steady", 1, False)],
    "none": [("none", 1, True), ("none, steady", 1, False)],
    "staged": [("staging", 1, True), ("staged", WARM, True)],
    "mosaicml": [("mosaicml, cold", 1, True), ("mosaicml, warm", WARM, True)],
    "litdata": [("litdata, cold", 1, True), ("litdata, warm", WARM, True)],
}
INSTALL = "`make .venv-peers/ready` installs the other libraries"
PEERS = {"mosaicml": ("mds", "mosaicml-streaming"), "litdata": ("litdata", "litdata")}


class Bench:
    """The samples as objects of a store below `folder`, and what reads them."""

    def __init__(self, folder: Path, samples: Samples, peers: Path) -> None:
        self.folder, self.samples, self.peers = folder, samples, peers
        self.ways, self.not_run = list(WAYS), dict[str, str]()
        bucket = folder / "bucket" / BUCKET
        bucket.mkdir(parents=True)
        write_columns(bucket, samples)
        self.digest = digest_of_all(row_digest(*sample) for sample in samples)
        self.versions = versions(peers if peers.exists() else None)
        for way, (store, package) in PEERS.items():
            if "peers" not in self.versions:
                self.leave_out(way, f"there is no {peers}. {INSTALL}")
            elif package not in self.versions["peers"]:
                self.leave_out(way, f"{package} is not installed for {peers}. {INSTALL}")
            else:
                try:
                    prepare(store, peers, folder, samples)
                except Failed as error:
                    self.leave_out(way, str(error))
                else:
                    (folder / store).rename(bucket / store)

    def leave_out(self, way: str, why: str) -> None:
        self.ways.remove(way)
        self.not_run[way] = why

    def passes(
        self, way: str, port: int, store: Store, check: bool = False
    ) -> Iterator[tuple[str, Json]]:
        """Runs one way in a process of its own; yields (name, figures) of each pass.

        Raises Failed where it ends early or delivers other rows.
        """
        cache = self.folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        os.sync()  # what others wrote is not written to the disk in this one's time
        check &= way not in ("plain", "kept", "rows")
        words = [
            way, f"s3://{BUCKET}", str(cache), json.dumps(self.samples.record()),
            json.dumps([how for _, *how in WAYS[way]]), str(check),
        ]  # fmt: skip
        python, module = Path(sys.executable), "remote.readers"
        if way in PEERS:
            python, module = self.peers, "remote.peers"
        log = self.folder / f"{way}.log"
        with log.open("w") as errors, subprocess.Popen(
            command(python, self.folder, module, *words),
            env=environment(python, self.folder) | self._store_of(way, port, cache),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        ) as process:  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None

            def line() -> Json:
                answer: Json = json.loads(process.stdout.readline() or "null")  # type: ignore[union-attr]
                if answer is None:
                    raise Failed(f"{way} ended early:\n{log.read_text()[-800:]}")
                return answer

            def begin() -> None:
                line()  # it is ready
                store.count()
                print(file=process.stdin, flush=True)

            try:
                for name, epochs, waits in WAYS[way]:
                    if waits:
                        begin()
                    figures = line() | {"epochs": epochs}
                    figures |= line()
                    figures["requests"], figures["fetched"] = store.count()
                    yield name, figures
                if check:
                    begin()
                    if line()["digest"] != self.digest:
                        raise Failed(f"{way}: delivers other rows than were written")
            except Failed:
                process.kill()
                raise

    def _store_of(self, way: str, port: int, cache: Path) -> dict[str, str]:
        """The environment that leads a process to the store and to its cache."""
        gigabytes = {"small": self.samples.row_bytes(2) / 4e9, "none": 0}.get(way, 64)
        endpoint = f"http://127.0.0.1:{port}"
        keys = {"AWS_SKIP_SIGNATURE": "true"}
        if way in PEERS:
            keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        return keys | {
            "AWS_ENDPOINT_URL": endpoint, "S3_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1",
            "LATENTBANK_CACHE": str(cache), "LATENTBANK_CACHE_GB": f"{gigabytes:.6f}",
        }  # fmt: skip


def run(folder: Path, args: argparse.Namespace) -> tuple[Json, str]:
    samples = Samples(2 * BATCH, (4, 4, 4), 16) if args.light else Samples(1_024)
    bench = Bench(folder, samples, args.peers)
    with ExitStack() as stack:
        store = stack.enter_context(Store(folder))
        networks = list(args.networks)
        if store.limited is None and "limited" in networks:
            networks.remove("limited")
            bench.not_run[NETWORKS["limited"]] = "nginx is not installed"
        figures: dict[str, dict[str, list[Json]]] = {NETWORKS[name]: {} for name in networks}
        plan = [(number, network) for number in range(args.rounds) for network in networks]
        for step in turns.turns("store", range(len(plan))):
            number, network = plan[step]
            of_network = figures[NETWORKS[network]]
            port = store.port if network == "near" else store.limited or store.port
            late: Any = Delayed(port, LATE) if network == "late" else nullcontext()
            with late as proxy:
                port = proxy.port if proxy else port
                for way in bench.ways[:: -1 if number % 2 else 1]:
                    check = step == 0
                    try:
                        for name, found in bench.passes(way, port, store, check):
                            of_network.setdefault(name, []).append(found)
                    except Failed as error:
                        if way not in PEERS:
                            raise
                        bench.leave_out(way, str(error))
                        for ways in figures.values():
                            for name, *_ in WAYS[way]:
                                ways.pop(name, None)
    results: Json = {
        "server": store.name, "samples": samples.record(), "rounds": args.rounds,
        "versions": bench.versions, "not_run": bench.not_run,
        "networks": {network: summary(ways, samples) for network, ways in figures.items()},
    }  # fmt: skip
    results["promises"] = promises(results["networks"])
    return results, text(results)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    turns.add_options(parser, ROUNDS, "%(default)s")
    parser.add_argument(
        "--peers", type=local_path, metavar="PYTHON", default=ROOT / ".venv-peers/bin/python",
        help="python of the peers' environment (default: the one that `make bench-remote` makes)",
    )  # fmt: skip
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS),
        help="near: as fast as the server can; limited: 75 MB/s a connection; late: and 20 ms a request",
    )  # fmt: skip
    return turns.measured({"remote": run}, parser.parse_args())
