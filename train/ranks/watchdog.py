"""A rank that dies or hangs ends the run on all ranks, and is named.

A thread of each rank writes a heartbeat into the store by which the ranks met, with what its rank
is doing, and reads that of the next rank. It does not use the backend: a collective of NCCL that
waits for a lost rank waits for ever, and only this thread is left to end the process. A second
thread checks that the store still answers the first. The first rank to notice writes a verdict, and
all ranks leave by that one.
"""

from __future__ import annotations

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

from shards.exits import explained

from ..config import GuardConfig

BEATS = 12  # heartbeats within the silence that counts as death
MEETING = timedelta(seconds=60)  # for the first connection, while processes start
VERDICT = "verdict"
# Code in which a rank waits for others.
WAITING = re.compile(r"/torch/distributed/|/deepspeed/comm/|/train/ranks/world\.py:(sum|gather)$")
NETWORK = re.compile(r"gloo|nccl|connection|tcpstore|socket", re.IGNORECASE)


class RankLost(RuntimeError):
    """A rank of the run has died, or hangs."""

    exit_code = 4


@dataclass(frozen=True)
class Heartbeat:
    """What a rank writes about itself."""

    beat: int  # number of the heartbeat
    phases: int  # how many phases it has entered; all ranks go through the same ones
    at: str  # the phase
    age: float  # seconds since its last progress
    where: str  # the line of code
    waits: bool  # for other ranks
    process: str  # host and pid


class Watchdog:
    """One rank's part: `phase` records what it does; RankLost or the end where a rank is lost."""

    def __init__(self, rank: int, size: int, config: GuardConfig, address: str, port: int) -> None:
        self.rank, self.size, self.config = rank, size, config
        self.interval = config.silence / BEATS
        # torchrun's store may outlive an attempt of the job
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._timeout = timedelta(seconds=max(1.0, config.silence / 2))
        patience = max(self._timeout, MEETING)
        store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=patience)
        self._store: Any = PrefixStore(f"guard/{attempt}", store)
        self._holder = f"the store of the run at {address}:{port}"
        self._main = threading.get_ident()
        self._beat, self._phases, self._at, self._progress = 0, 0, "start", time.monotonic()
        self._last = (0, time.monotonic())  # the next rank's last heartbeat, and when it came
        self._verdict: dict[str, Any] | None = None  # that this rank has read
        self._stopped = threading.Event()
        self._rounds = 0  # of the watching thread: the store has answered all but the last
        self._error: BaseException | None = None  # of the main thread
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for work, name in (
                (self._watch, "watchdog"),
                (self._watch_store, "watchdog of the store"),
            )
        ]
        if rank == 0:
            self._store.set(VERDICT, "")
        self._send_heartbeat()

    def start(self) -> None:
        """Starts the threads, once all ranks have made their watchdogs."""
        self._store.set_timeout(self._timeout)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(self.config.silence)  # the store may have gone silent meanwhile

    def phase(self, at: str, within: bool = False) -> None:
        """Records that this rank enters a phase, or (`within`) got on in what not all ranks do."""
        self._phases += not within
        self._at, self._progress = at, time.monotonic()

    # Errors of the main thread ---------------------------------------------------------------------------------------

    def explain(self, error: BaseException) -> RankLost | None:
        """Returns RankLost if an error of this rank is a connection to a lost rank that broke, else
        None.

        Either way the other ranks get a verdict, for they wait for this one."""
        self._error, broken = error, self._is_network_error(error)
        try:
            verdict = self._verdict or self._read(self.rank)[0]
            if broken and not verdict and (lost := self._silent_ranks()):
                verdict = self._put_verdict(self._death_verdict(lost))
            if not verdict:
                code = (explained(error) or (1, ""))[0]
                text = f"rank {self.rank} ended the run: {type(error).__name__}: {error}"
                self._put_verdict({"rank": self.rank, "code": code, "text": text})
            self._acknowledge()
        except RuntimeError:
            verdict = self._verdict or self._store_verdict()
        return _error_of(verdict) if broken and verdict else None

    def _acknowledge(self) -> None:
        """Says that this rank knows the verdict. Rank 0, which may hold the store, waits until all
        others do, too."""
        self._store.set(f"heard/{self.rank}", "")
        everyone = [f"heard/{rank}" for rank in range(self.size)]
        end = time.monotonic() + max(1.0, 3 * self.interval)
        while self.rank == 0 and time.monotonic() < end and not self._store.check(everyone):
            time.sleep(0.01)

    def _is_network_error(self, error: BaseException) -> bool:
        if self.size == 1 or hasattr(type(error), "exit_code"):
            return False
        return isinstance(error, distributed.DistError) or (
            isinstance(error, RuntimeError) and bool(NETWORK.search(str(error)))
        )

    # The threads -----------------------------------------------------------------------------------------------------

    def _watch_store(self) -> None:
        """Ends the process where the store hangs and this rank makes no progress.

        A store whose process is stopped, or whose host is lost, may let an operation wait for ever:
        torch, past its time-out, asks the store to cancel and waits for that answer. Beats are
        counted, so the seconds for which a scheduler suspends the job are no silence. A rank that
        makes progress goes on: with torchrun alone stopped, as by Ctrl-Z, the store is not needed
        for now."""
        rounds, silent = 0, 0
        while not self._stopped.wait(self.interval):
            rounds, silent = self._rounds, silent + 1 if rounds == self._rounds else 0
            if silent > BEATS and time.monotonic() - self._progress > self.config.silence:
                self._exit(self._verdict or self._store_verdict())

    def _watch(self) -> None:
        while self._wait_for_beat():
            self._rounds += 1
            try:
                self._send_heartbeat()
                verdict, following = self._read((self.rank + 1) % self.size)
                verdict = self._verdict = verdict or self._judge(following)
                if verdict:
                    self._store.set(f"heard/{self.rank}", "")
            except distributed.DistStoreError:
                # late, but an answer: the store's process was stopped, and heartbeats with it
                self._last = (self._last[0], time.monotonic())
                continue
            except RuntimeError:
                verdict = self._verdict = self._verdict or self._store_verdict()
            if verdict and not self._stopped.wait(
                max(1.0, 2 * self.interval)
            ):  # else it ended by itself
                self._exit(verdict)

    def _wait_for_beat(self) -> bool:
        """Waits for the next beat; False at the end. Time of a suspended job does not count."""
        before = time.monotonic()
        over = self._stopped.wait(self.interval)
        now = time.monotonic()
        late = now - before - self.interval
        if late > self.interval:
            self._progress, self._last = min(self._progress + late, now), (self._last[0], now)
        return not over

    def _send_heartbeat(self) -> None:
        self._beat += 1
        frame = sys._current_frames().get(self._main)
        where, waits = _position(frame)
        heartbeat = Heartbeat(
            self._beat, self._phases, self._at, time.monotonic() - self._progress, where, waits,
            f"{platform.node()}, pid {os.getpid()}",
        )  # fmt: skip
        self._store.set(f"heartbeat/{self.rank}", json.dumps(asdict(heartbeat)))

    def _heartbeats(self, *ranks: int) -> list[Heartbeat]:
        keys = [f"heartbeat/{rank}" for rank in ranks or range(self.size)]
        return [Heartbeat(**json.loads(heartbeat)) for heartbeat in self._store.multi_get(keys)]

    def _read(self, rank: int) -> tuple[dict[str, Any] | None, Heartbeat]:
        """Returns the verdict, if there is one, and a rank's last heartbeat."""
        verdict, heartbeat = self._store.multi_get([VERDICT, f"heartbeat/{rank}"])
        return json.loads(verdict) if verdict else None, Heartbeat(**json.loads(heartbeat))

    def _put_verdict(self, verdict: dict[str, Any]) -> dict[str, Any]:
        """Writes a verdict unless another rank was first; returns the one that counts."""
        first: dict[str, Any] = json.loads(
            self._store.compare_set(VERDICT, "", json.dumps(verdict))
        )
        return first

    def _judge(self, following: Heartbeat) -> dict[str, Any] | None:
        """Returns a verdict on the next rank if it is silent, or on who keeps all from progress."""
        now = time.monotonic()
        if self.size > 1:
            if following.beat != self._last[0]:
                self._last = following.beat, now
            elif now - self._last[1] > self.config.silence:
                return self._put_verdict(
                    self._death_verdict(self._silent_ranks() or [(self.rank + 1) % self.size])
                )
        if self.config.hang and now - self._progress > self.config.hang:
            heartbeats = self._heartbeats()
            if min(heartbeat.age for heartbeat in heartbeats) > self.config.hang:
                return self._put_verdict(self._standstill_verdict(heartbeats))
        return None

    def _silent_ranks(self) -> list[int]:
        """Returns the ranks that write no heartbeat for three intervals."""
        before = self._heartbeats()
        end = time.monotonic() + 3 * self.interval
        while time.monotonic() < end:  # the thread does the same meanwhile, or this is the thread
            time.sleep(self.interval / 2)
            if threading.get_ident() != self._main:
                self._send_heartbeat()
        return [
            rank
            for rank, (old, new) in enumerate(zip(before, self._heartbeats(), strict=True))
            if old.beat == new.beat and rank != self.rank
        ]

    def _death_verdict(self, ranks: list[int]) -> dict[str, Any]:
        heartbeats = self._heartbeats(*ranks)
        text = "; ".join(
            f"rank {rank} ({beat.process}) gives no sign of life; the last was from: {beat.at}, {beat.where}"
            for rank, beat in zip(ranks, heartbeats, strict=True)
        )
        return _verdict_of(ranks[0], f"{text}. It was killed or stopped, or its host is lost")

    def _standstill_verdict(self, heartbeats: list[Heartbeat]) -> dict[str, Any]:
        """Blames the ranks that entered the fewest phases, of these those that wait for nobody."""
        least = min(heartbeat.phases for heartbeat in heartbeats)
        behind = [rank for rank, heartbeat in enumerate(heartbeats) if heartbeat.phases == least]
        culprits = [rank for rank in behind if not heartbeats[rank].waits] or behind
        text = "; ".join(
            f"rank {rank} ({heartbeats[rank].process}) hangs in: {heartbeats[rank].at}, {heartbeats[rank].where}"
            for rank in culprits[:8]
        )
        seconds = f"{self.config.hang:g} s (guard.hang)"
        return _verdict_of(culprits[0], f"no rank has got on for {seconds}: {text}")

    def _store_verdict(self) -> dict[str, Any]:
        return _verdict_of(
            0, f"{self._holder} does not answer: the process that holds it, torchrun on the first host or else "
            "rank 0, has died or is stopped"
        )  # fmt: skip

    def _exit(self, verdict: dict[str, Any]) -> None:
        """Ends the process: its main thread waits for a lost rank, or hangs itself."""
        with suppress(Exception):
            if self._error:  # which the main thread could not hand to the others
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
    """Returns an error with the exit code of the verdict: of a lost rank, or of its own error."""
    kind = type(RankLost.__name__, (RankLost,), {"exit_code": verdict["code"]})
    error: RankLost = kind(verdict["text"])
    return error


def _position(frame: FrameType | None) -> tuple[str, bool]:
    """Returns a thread's innermost line of code, and whether it waits for other ranks there."""
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
