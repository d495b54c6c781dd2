"""What a process that reads a store says: it goes over the samples, and each pass takes three lines.

    {"ready": true}     it begins when a line comes on stdin; no such line where it follows the last
    {"first": seconds to the first batch, "first_bytes": its size}
    {"opening": ..., "seconds": ..., "cpu": ..., "bytes": ...}     once all samples came

Seconds of the first pass count from before anything is opened, `opening` of them until batches are
asked for. Needs numpy and torch only: the peers' environment runs this file too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..samples import BATCH, Samples, digest_of_all, digests

# batches of one pass over all samples; with True nothing of it was read ahead in the last pass
Epoch = Callable[[bool], Iterator[Any]]
WARM = 12  # epochs of a pass that fetches nothing: one takes a twentieth of a second


class Answers:
    """Lines of JSON on stdout; what libraries print there goes to stderr from now on."""

    def __init__(self) -> None:
        self._lines = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **figures: object) -> None:
        print(json.dumps(figures), file=self._lines, flush=True)

    def wait(self) -> None:
        """Says that a pass can begin, and waits until it shall."""
        self.say(ready=True)
        sys.stdin.readline()


def serve(
    open_: Callable[[], Epoch], plan: Sequence[tuple[int, bool]], samples: Samples, check: bool,
    answers: Answers,
) -> None:  # fmt: skip
    """Makes a pass for each (number of epochs, whether it waits). With `check` another one follows,
    which is not timed, for the digest of all rows.
    """
    epoch: Epoch | None = None
    for count, waits in plan:
        if waits:
            answers.wait()
        start, cpu = time.perf_counter(), time.process_time()
        epoch = epoch or open_()
        opening, rows, size, seconds, used = time.perf_counter() - start, 0, 0, 0.0, 0.0
        for number in range(count):
            for batch in epoch(waits and not number):
                rows += len(batch.moments)
                size += batch.moments.nbytes + batch.tokens.nbytes
                if rows == BATCH:
                    answers.say(first=time.perf_counter() - start, first_bytes=size)
                if rows == count * samples.rows:  # what a library does at its end is not timed
                    seconds, used = time.perf_counter() - start, time.process_time() - cpu
        if rows != count * samples.rows:
            raise ValueError(f"{rows} samples came of {count} times {samples.rows}")
        answers.say(opening=opening, seconds=seconds, cpu=used, bytes=size)
    if check and epoch is not None:
        answers.wait()
        answers.say(digest=digest_of_all(each for batch in epoch(True) for each in digests(batch)))
