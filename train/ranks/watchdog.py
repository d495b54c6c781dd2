"""A rank that dies or stands still ends the run on all ranks, and is named.

A thread of each rank gives a sign of life to the store by which the ranks met, with what its rank is at, and looks at
the next rank's. It asks nothing of the backend: a collective of NCCL that waits for a lost rank waits for ever, and
only this thread is left to end the process. A second one looks whether the store still answers the first. Who notices
first puts down a verdict, and all ranks leave by that one.
"""

import faulthandler
import json
import os
import platform
import re
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

from torch import distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

from ..config import GuardConfig

BEATS = 12  # signs of life within the silence that counts as death
VERDICT = "verdict"
# Where a rank stands that waits for others.
WAITING = re.compile(r"/torch/distributed/|/deepspeed/comm/|/train/ranks/world\.py:(sum|gather)$")
NETWORK = re.compile(r"gloo|nccl|connection|tcpstore|socket", re.IGNORECASE)


class RankLost(RuntimeError):
    """A rank of the run has died, or stands still."""

    exit_code = 4


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself."""

    beat: int
    mark: int  # phases that it has entered; all ranks go through the same ones
    at: str
    age: float  # seconds since its last progress
    where: str  # the line of code
    waits: bool  # for others
    who: str


class Guard:
    """One rank's part: `mark` what it is at; `RankLost` or the end of the process where a rank is lost."""

    def __init__(self, rank: int, size: int, config: GuardConfig, address: str, port: int) -> None:
        self.rank, self.size, self.config = rank, size, config
        self.interval = config.silence / BEATS
        # torchrun's store may outlive an attempt of the job
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        timeout = timedelta(seconds=max(1.0, config.silence / 2))
        store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
        self._store: Any = PrefixStore(f"guard/{attempt}", store)
        self._holder = f"the store of the run at {address}:{port}"
        self._main = threading.get_ident()
        self._beat, self._mark, self._at, self._since = 0, 0, "start", time.monotonic()
        self._seen = (0, time.monotonic())  # the next rank's last sign, and when it came
        self._verdict: dict[str, Any] | None = None  # that this rank has heard of
        self._over = threading.Event()
        self._rounds = 0  # that the watch has begun: the store has answered all but the last
        self._error: BaseException | None = None  # of the main thread
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for work, name in ((self._watch, "guard"), (self._watch_store, "guard of the store"))
        ]
        if rank == 0:
            self._store.set(VERDICT, "")
        self._give_sign()

    def start(self) -> None:
        """To be called when all ranks have made theirs."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(self.config.silence)  # the store may have gone silent meanwhile

    def mark(self, at: str, own: bool = False) -> None:
        """This rank has come to the next phase; `own`: has got on within one, in what not all ranks do."""
        self._mark += not own
        self._at, self._since = at, time.monotonic()

    # Errors of the main thread ---------------------------------------------------------------------------------------

    def explain(self, error: BaseException) -> RankLost | None:
        """What is behind an error of this rank: RankLost if the connection to a lost rank broke, else None.

        Either way the other ranks are told, for they wait for this one."""
        self._error, broken = error, self._of_the_network(error)
        try:
            verdict = self._verdict or self._look(self.rank)[0]
            if broken and not verdict and (lost := self._silent()):
                verdict = self._put(self._death(lost))
            if not verdict:
                code = getattr(type(error), "exit_code", 1)
                text = f"rank {self.rank} ended the run: {type(error).__name__}: {error}"
                self._put({"rank": self.rank, "code": code, "text": text})
            self._be_heard()
        except RuntimeError:
            verdict = self._verdict or self._store_gone()
        return _error_of(verdict) if broken and verdict else None

    def _be_heard(self) -> None:
        """This rank knows the verdict. The first, which may hold the store, does not leave before all others do."""
        self._store.set(f"heard/{self.rank}", "")
        everyone = [f"heard/{rank}" for rank in range(self.size)]
        end = time.monotonic() + max(1.0, 3 * self.interval)
        while self.rank == 0 and time.monotonic() < end and not self._store.check(everyone):
            time.sleep(0.01)

    def _of_the_network(self, error: BaseException) -> bool:
        if self.size == 1 or hasattr(type(error), "exit_code"):
            return False
        return isinstance(error, distributed.DistError) or (
            isinstance(error, RuntimeError) and bool(NETWORK.search(str(error)))
        )

    # The threads -----------------------------------------------------------------------------------------------------

    def _watch_store(self) -> None:
        """A store whose process is stopped, or whose host is lost without a word, may let an operation wait for ever:
        torch, past its time-out, asks the store to cancel and waits for the answer to that. Beats are counted, so the
        seconds for which a scheduler suspends the job are no silence. A rank that gets on goes on: with torchrun alone
        stopped, as by Ctrl-Z, nobody needs the store for now.
        """
        rounds, silent = 0, 0
        while not self._over.wait(self.interval):
            rounds, silent = self._rounds, silent + 1 if rounds == self._rounds else 0
            if silent > BEATS and time.monotonic() - self._since > self.config.silence:
                self._end(self._verdict or self._store_gone())

    def _watch(self) -> None:
        while self._waited():
            self._rounds += 1
            try:
                self._give_sign()
                verdict, following = self._look((self.rank + 1) % self.size)
                verdict = self._verdict = verdict or self._judge(following)
                if verdict:
                    self._store.set(f"heard/{self.rank}", "")
            except distributed.DistStoreError:
                # too late, but an answer: its process was stopped, and signs with it
                self._seen = (self._seen[0], time.monotonic())
                continue
            except RuntimeError:
                verdict = self._verdict = self._verdict or self._store_gone()
            if verdict and not self._over.wait(
                max(1.0, 2 * self.interval)
            ):  # else it ended by itself
                self._end(verdict)

    def _waited(self) -> bool:
        """Until the next beat; False at the end. While a scheduler has the job suspended, nobody is silent."""
        before = time.monotonic()
        over = self._over.wait(self.interval)
        now = time.monotonic()
        late = now - before - self.interval
        if late > self.interval:
            self._since, self._seen = min(self._since + late, now), (self._seen[0], now)
        return not over

    def _give_sign(self) -> None:
        self._beat += 1
        frame = sys._current_frames().get(self._main)
        where, waits = _stands(frame)
        sign = Sign(
            self._beat, self._mark, self._at, time.monotonic() - self._since, where, waits,
            f"{platform.node()}, pid {os.getpid()}",
        )  # fmt: skip
        self._store.set(f"sign/{self.rank}", json.dumps(asdict(sign)))

    def _signs(self, *ranks: int) -> list[Sign]:
        keys = [f"sign/{rank}" for rank in ranks or range(self.size)]
        return [Sign(**json.loads(sign)) for sign in self._store.multi_get(keys)]

    def _look(self, rank: int) -> tuple[dict[str, Any] | None, Sign]:
        """The verdict, if there is one, and a rank's last sign."""
        verdict, sign = self._store.multi_get([VERDICT, f"sign/{rank}"])
        return json.loads(verdict) if verdict else None, Sign(**json.loads(sign))

    def _put(self, verdict: dict[str, Any]) -> dict[str, Any]:
        """Put down a verdict, unless another rank was first; returns the one that stands."""
        found: dict[str, Any] = json.loads(
            self._store.compare_set(VERDICT, "", json.dumps(verdict))
        )
        return found

    def _judge(self, following: Sign) -> dict[str, Any] | None:
        """A verdict on the next rank, if it is silent; or on whoever keeps all from getting on."""
        now = time.monotonic()
        if self.size > 1:
            if following.beat != self._seen[0]:
                self._seen = following.beat, now
            elif now - self._seen[1] > self.config.silence:
                return self._put(self._death(self._silent() or [(self.rank + 1) % self.size]))
        if self.config.hang and now - self._since > self.config.hang:
            signs = self._signs()
            if min(sign.age for sign in signs) > self.config.hang:
                return self._put(self._standstill(signs))
        return None

    def _silent(self) -> list[int]:
        """The ranks that give no sign of life for three beats."""
        before = self._signs()
        end = time.monotonic() + 3 * self.interval
        while time.monotonic() < end:  # the thread does the same meanwhile, or this is the thread
            time.sleep(self.interval / 2)
            if threading.get_ident() != self._main:
                self._give_sign()
        return [
            rank
            for rank, (old, new) in enumerate(zip(before, self._signs(), strict=True))
            if old.beat == new.beat and rank != self.rank
        ]

    def _death(self, ranks: list[int]) -> dict[str, Any]:
        signs = self._signs(*ranks)
        text = "; ".join(
            f"rank {rank} ({sign.who}) gives no sign of life; the last was from: {sign.at}, {sign.where}"
            for rank, sign in zip(ranks, signs, strict=True)
        )
        return _verdict_of(ranks[0], f"{text}. It was killed or stopped, or its host is lost")

    def _standstill(self, signs: list[Sign]) -> dict[str, Any]:
        """Those who are not as far as the others, and of these who waits for nobody."""
        least = min(sign.mark for sign in signs)
        behind = [rank for rank, sign in enumerate(signs) if sign.mark == least]
        culprits = [rank for rank in behind if not signs[rank].waits] or behind
        text = "; ".join(
            f"rank {rank} ({signs[rank].who}) stands still in: {signs[rank].at}, {signs[rank].where}"
            for rank in culprits[:8]
        )
        seconds = f"{self.config.hang:g} s (guard.hang)"
        return _verdict_of(culprits[0], f"no rank has got on for {seconds}: {text}")

    def _store_gone(self) -> dict[str, Any]:
        return _verdict_of(
            0, f"{self._holder} does not answer: the process that holds it, torchrun on the first host or else "
            "rank 0, has died or is stopped"
        )  # fmt: skip

    def _end(self, verdict: dict[str, Any]) -> None:
        """The main thread waits for a rank that does not come, or is itself the one that does not."""
        with suppress(Exception):
            if self._error:  # which the main thread could not tell the others
                traceback.print_exception(self._error)
            print(f"{RankLost.__name__}: {verdict['text']}", file=sys.stderr, flush=True)
            if verdict["rank"] == self.rank:
                faulthandler.dump_traceback(sys.stderr.fileno())
            sys.stdout.flush()
        os._exit(verdict["code"])


def _verdict_of(rank: int, text: str) -> dict[str, Any]:
    again = "Start the run again: it goes on from its last checkpoint"
    return {"rank": rank, "code": RankLost.exit_code, "text": f"{text}. {again}"}


def _error_of(verdict: dict[str, Any]) -> RankLost:
    """An error with the exit code of the verdict: that of the rank that ended the run, if it was not lost."""
    kind = type(RankLost.__name__, (RankLost,), {"exit_code": verdict["code"]})
    error: RankLost = kind(verdict["text"])
    return error


def _stands(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread is: its innermost line, and whether it waits for other ranks there."""
    if frame is None:
        return "nowhere", False
    lines = [
        (frame.f_code.co_filename, line, frame.f_code.co_name)
        for frame, line in traceback.walk_stack(frame)
    ]
    file, line, function = lines[0]
    short = "/".join(file.split("/")[-2:])
    waits = any(WAITING.search(f"{file}:{function}") for file, _, function in lines)
    return f"{short}:{line} in {function}", waits
