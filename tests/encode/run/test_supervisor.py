"""Slots of workers on a cluster whose nodes come and go: what the driver does, with the cluster
played by a list.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest

from encode.config import EngineConfig
from encode.errors import NoWorkers
from encode.meter import Stats
from encode.run.local_worker import Died, Done, Event
from encode.run.progress import Progress
from encode.run.scheduler import Scheduler
from encode.run.supervisor import Supervisor
from encode.tasks import ShardResult, ShardTask
from shards import open_store


class Played:
    """An executor: slots by node, and each shard takes one turn."""

    def __init__(self, nodes: dict[str, int], broken: frozenset[str] = frozenset()) -> None:
        self.room, self.broken = nodes, broken
        self.at: dict[int, str | None] = {}  # None: no room yet
        self.flying: list[tuple[int, int]] = []
        self.last: dict[int, str] = {}
        self.dead: list[Event] = []
        self.turn = 0
        self.script: dict[int, object] = {}

    def slots(self) -> int:
        return sum(self.room.values())

    def nodes(self) -> frozenset[str]:
        return frozenset(self.room)

    def start(self, worker: int) -> None:
        self.at[worker] = None
        self._place()

    def _place(self) -> None:
        for worker, node in self.at.items():
            taken = list(self.at.values())
            free = [n for n, room in self.room.items() if taken.count(n) < room]
            if node is None and free:
                self.at[worker] = free[0]
                self.last[worker] = free[0]

    def ready(self, worker: int) -> bool:
        return self.at.get(worker) is not None

    def retire(self, worker: int) -> None:
        assert self.at.pop(worker) is None

    def submit(self, worker: int, key: int, task: ShardTask) -> None:
        self.flying.append((worker, key))

    def lose(self, node: str) -> None:
        del self.room[node]
        for worker, where in list(self.at.items()):
            if where == node:
                self._kill(worker)

    def _kill(self, worker: int) -> None:
        del self.at[worker]
        self.flying = [(w, k) for w, k in self.flying if w != worker]
        self.dead.append(Died(worker, "gone"))

    def events(self, timeout: float) -> list[Event]:
        self.turn += 1
        assert self.turn < 500, "it never ends"
        action = self.script.pop(self.turn, None)
        if callable(action):
            action()
        for worker, node in list(self.at.items()):
            if node in self.broken:
                self._kill(worker)
        self._place()
        dead, self.dead = self.dead, []
        done: list[Event] = []
        for worker in {w for w, _ in self.flying}:
            key = next(k for w, k in self.flying if w == worker)
            self.flying.remove((worker, key))
            done.append(Done(worker, key, ShardResult(10)))
        return dead + done

    def node_of(self, worker: int) -> str | None:
        return self.last.get(worker)

    def stats(self) -> Mapping[int, Stats]:
        return {}

    def abort(self) -> None: ...
    def stop(self) -> None: ...


def supervisor_of(tmp_path: Path, played: Played, shards: int, **engine: object) -> Supervisor:
    store = open_store(tmp_path)
    tasks = [ShardTask("s", "f", store, "t", 1, n, 1024, {}) for n in range(shards)]
    config = EngineConfig.model_validate({"look": 1e-6, **engine})
    scheduler = Scheduler(range(shards))
    return Supervisor(scheduler, played, config, tasks, Progress(store, tasks))


def test_nodes_that_come_are_used(tmp_path: Path) -> None:
    played = Played({"a": 1})
    played.script[5] = lambda: played.room.update(b=3)
    supervisor = supervisor_of(tmp_path, played, 60)
    supervisor.work()
    assert len(supervisor.slots) == 4
    assert played.turn < 5 + 60 / 3
    assert not supervisor.scheduler.given_up


def test_the_slots_of_a_node_that_has_gone_are_given_up(tmp_path: Path) -> None:
    played = Played({"a": 1, "b": 3})
    played.script[5] = lambda: played.lose("b")
    supervisor = supervisor_of(tmp_path, played, 60)
    supervisor.work()
    assert len(supervisor.slots) == 1
    assert not supervisor.scheduler.given_up


def test_a_slot_on_a_broken_node_is_given_up_and_another_node_makes_good_for_it(
    tmp_path: Path,
) -> None:
    played = Played({"a": 1, "broken": 1}, broken=frozenset({"broken"}))

    def replaced() -> None:
        played.lose("broken")
        played.room["c"] = 1

    played.script[20] = replaced
    supervisor = supervisor_of(tmp_path, played, 60)
    supervisor.work()
    assert len(supervisor.scheduler.abandoned) == 1
    assert "c" in played.last.values()
    assert not supervisor.scheduler.given_up


def test_there_are_no_more_workers_than_shards(tmp_path: Path) -> None:
    supervisor = supervisor_of(tmp_path, Played({"a": 9}), 3)
    supervisor.work()
    assert len(supervisor.slots) == 3


def test_workers_that_are_asked_for_may_wait_for_a_node(tmp_path: Path) -> None:
    """It holds up nobody, and tells the cluster what it lacks."""
    played = Played({"a": 1})
    played.script[10] = lambda: played.room.update(b=5)
    supervisor = supervisor_of(tmp_path, played, 60, workers=4)
    supervisor.work()
    assert len(supervisor.slots) == 4
    assert set(played.last.values()) == {"a", "b"}


def test_all_broken(tmp_path: Path) -> None:
    with pytest.raises(NoWorkers):
        supervisor_of(tmp_path, Played({"a": 2}, broken=frozenset({"a"})), 9).work()
