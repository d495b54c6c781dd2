"""Processes that read batches: worker k of N reads batches k, k + N, ... of a stream.

    parent                                              worker
    task (pickled, in anonymous memory) -------------->
    slot: anonymous memory, mapped by both -----------> reads a batch into it
                                        <-------------- position of the batch, number of the slot
    tensors over the slot, until none is alive;
    then the slot is handed out again ---------------->

Messages go over a socket pair; the bytes of a batch stay in the slot, so they are copied nowhere.
Slots are memfd files: they have no name, so nothing is left in /dev/shm whoever is killed, and only
pages that were written take memory. A worker is a fresh interpreter (not a fork) that loads numpy
and this package: threads, locks and the CUDA context of the parent are not in it, the parent's main
script is not run again, and it may be started from a daemonic process, such as a worker of a torch
DataLoader. It ends when its socket does, or when its parent is no longer its parent.
"""

from __future__ import annotations

import errno
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..errors import WorkerDied
from ..signals import SIGNALS
from .batch_layout import Planner, Reader
from .join import JoinedColumns
from .order import Order

DONE, SLOT = struct.Struct("<cqq"), struct.Struct("<q")  # tag, position, slot | slot, ~slot: drop
READY, ERROR = b"b", b"e"
ERROR_BYTES = 64 << 10  # of a pickled error; a longer one is cut
PATIENCE = 1.0  # seconds between two looks at whether the other side is alive
FAREWELL = 5.0  # seconds that a worker has to end by itself


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker has to read: every `step` samples a batch, from `position` on."""

    sources: JoinedColumns
    order: Order
    global_batch: int
    world: int
    rank: int
    position: int
    step: int
    ahead: int


def shares(position: int, global_batch: int, workers: int) -> list[tuple[int, int]]:
    """(first position, step) of each worker; taken in turn, they give every batch in order."""
    return [(position + k * global_batch, workers * global_batch) for k in range(workers)]


@dataclass(eq=False, slots=True)
class Slot:
    """A buffer that a worker writes and its parent reads."""

    number: int
    memory: NDArray[np.uint8]


class Worker:
    """One process, as its parent sees it."""

    def __init__(self, number: int, task: Task, capacity: int, depth: int) -> None:
        self.number, self.capacity, self.depth = number, capacity, depth
        self.socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            start = f"from shards.read.workers import main; main({other.fileno()}, {os.getpid()})"
            path = {"PYTHONPATH": os.pathsep.join(map(str, sys.path))}
            # the child inherits the mask: a signal that comes while it still imports must wait
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", start], pass_fds=[other.fileno()],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    env={"OPENBLAS_NUM_THREADS": "1", **os.environ, **path},
                )  # fmt: skip
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._slots: dict[int, Slot] = {}
        self._free: deque[Slot] = deque()
        with os.fdopen(os.memfd_create("latentbank-task"), "wb") as file:
            pickle.dump(task, file, pickle.HIGHEST_PROTOCOL)
            file.flush()
            self._send(b"task", file.fileno())
        for _ in range(depth):
            self._grant()

    def take(self) -> NDArray[np.uint8]:
        """The buffer of the worker's next batch; raises what the worker raised, or WorkerDied."""
        message = self._receive()
        if message[:1] == ERROR:
            error, where = pickle.loads(message[1:])
            raise error from RuntimeError(f"in worker {self.number} of the stream:\n{where}")
        _, _, number = DONE.unpack(message)
        slot = self._slots[number]
        buffer = slot.memory[:]  # an object of its own: it dies with the last tensor over it
        weakref.finalize(buffer, self._free.append, slot).atexit = False
        self._grant()
        return buffer

    def _grant(self) -> None:
        """Hand the worker a slot that no tensor lies over, a new one if there is none."""
        while len(self._free) > self.depth + 1:  # batches were kept for a while, and let go
            slot = self._free.popleft()
            del self._slots[slot.number]
            self._send(SLOT.pack(~slot.number))
        if self._free:
            return self._send(SLOT.pack(self._free.pop().number))  # the one used last is in cache
        number = next(n for n in range(len(self._slots) + 1) if n not in self._slots)
        descriptor = os.memfd_create("latentbank-slot")
        try:
            os.ftruncate(descriptor, self.capacity)
            memory = np.frombuffer(mmap.mmap(descriptor, self.capacity), np.uint8)
            self._slots[number] = Slot(number, memory)
            self._send(SLOT.pack(number), descriptor)
        finally:
            os.close(descriptor)

    def _send(self, message: bytes, *descriptors: int) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # its death is seen by `take`
            socket.send_fds(self.socket, [message], descriptors)

    def _receive(self) -> bytes:
        readable = select.poll()
        readable.register(self.socket, select.POLLIN)
        while not readable.poll(1e3 * PATIENCE) and self.process.poll() is None:
            pass
        try:
            message = self.socket.recv(2 * ERROR_BYTES, socket.MSG_DONTWAIT)
        except (ConnectionResetError, BlockingIOError):
            message = b""
        if message:
            return message
        code = self.process.wait()
        name = f" ({signal.Signals(-code).name})" if code < 0 else ""
        raise WorkerDied(
            f"worker {self.number} of the stream (process {self.process.pid}) ended with exit code "
            f"{code}{name}. Look above for what it said; if the machine ran out of memory, use "
            "fewer workers or a smaller prefetch"
        )


class Workers:
    """All processes of a stream; `take` gives their batches in the order of the stream."""

    def __init__(self, task: Task, workers: int, capacity: int, prefetch: int) -> None:
        depth = -(-prefetch // workers)
        self._workers = [
            Worker(k, replace(task, position=position, step=step), capacity, depth)
            for k, (position, step) in enumerate(shares(task.position, task.global_batch, workers))
        ]
        self._turn = 0
        self.close = weakref.finalize(self, _end, os.getpid(), self._workers)

    def take(self) -> NDArray[np.uint8]:
        buffer = self._workers[self._turn].take()
        self._turn = (self._turn + 1) % len(self._workers)
        return buffer


def _end(owner: int, workers: list[Worker]) -> None:
    """Let the workers end; each does as soon as it sees that its socket is closed."""
    if os.getpid() != owner:  # a fork of the owner ends; its workers are not ours
        return
    for worker in workers:
        with suppress(OSError):  # the worker is gone already
            worker.socket.shutdown(socket.SHUT_RDWR)  # also where a fork of ours still holds it
        worker.socket.close()
    deadline = time.monotonic() + FAREWELL
    for worker in workers:
        try:
            worker.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


# The worker's side --------------------------------------------------------------------------------


class ParentGone(Exception):
    """Nobody is left to read for."""


class Parent:
    """The parent, as its worker sees it: it sends the task, then slots."""

    def __init__(self, descriptor: int, process: int) -> None:
        self.socket, self._process = socket.socket(fileno=descriptor), process
        self._readable = select.poll()
        self._readable.register(self.socket, select.POLLIN)
        self._slots: dict[int, NDArray[np.uint8]] = {}

    def task(self) -> Task:
        _, (descriptor,) = self._receive()
        with os.fdopen(descriptor, "rb") as file:
            file.seek(0)
            task: Task = pickle.load(file)
        return task

    def slot(self) -> tuple[int, NDArray[np.uint8]]:
        """The next slot that may be written."""
        while True:
            message, descriptors = self._receive()
            (number,) = SLOT.unpack(message)
            if number < 0:
                del self._slots[~number]
                continue
            for descriptor in descriptors:
                self._slots[number] = np.frombuffer(mmap.mmap(descriptor, 0), np.uint8)
                os.close(descriptor)
            return number, self._slots[number]

    def _receive(self) -> tuple[bytes, list[int]]:
        while not self._readable.poll(1e3 * PATIENCE):
            if os.getppid() != self._process:  # a fork of the parent may still hold the socket
                raise ParentGone
        try:
            message, descriptors, flags, _ = socket.recv_fds(self.socket, 64, 1)
        except ConnectionResetError:
            raise ParentGone from None
        if flags & socket.MSG_CTRUNC:  # the kernel had no room for what was sent
            raise OSError(errno.EMFILE, "no descriptor left for a buffer; raise `ulimit -n`")
        if not message:
            raise ParentGone
        return message, descriptors

    def send(self, message: bytes) -> None:
        try:
            self.socket.send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise ParentGone from None


def main(descriptor: int, process: int) -> None:
    """Read batches until the parent closes the socket."""
    for stop in SIGNALS:  # for the parent, though a terminal, SLURM or torchrun sends them to all
        signal.signal(stop, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    parent = Parent(descriptor, process)
    with suppress(ParentGone):
        try:
            read(parent)
        except ParentGone:
            raise
        except Exception as error:
            parent.send(ERROR + pickled(error))
            while True:  # until the parent has read it and closes the socket
                parent.slot()


def read(parent: Parent) -> None:
    task = parent.task()
    reader = Reader(Planner(task.sources, task.order, task.global_batch, task.world, task.rank))
    for plan in reader.plans(task.position, task.step, task.ahead):
        number, buffer = parent.slot()
        reader.frame.put_header(plan.header, buffer)
        reader.fill(plan, buffer)
        parent.send(DONE.pack(READY, plan.position, number))


def pickled(error: Exception) -> bytes:
    """An error and where it came from, so that the parent can raise it."""
    where = "".join(traceback.format_exception(error))[-ERROR_BYTES // 2 :]
    try:
        data = pickle.dumps((error, where))
        pickle.loads(data)
    except Exception:  # of any library, and they may do anything here
        data = b""
    if not 0 < len(data) < ERROR_BYTES:
        data = pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"[:2_000]), where))
    return data
