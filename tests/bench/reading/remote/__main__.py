"""Measures reading from an object store:

python -m tests.bench.reading.remote --json bench/remote.json
python -m tests.bench.reading.remote --light --rounds 1
"""

from __future__ import annotations

from shards import exits

from .run import main

if __name__ == "__main__":
    exits.run(main)
