"""Any sequence of events ends with every task done once or given up for a reason."""

from collections import Counter
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from encode.run.scheduler import ATTEMPTS, DEATHS, Scheduler

OK, POISON, BROKEN, FINAL, SHAKY, FRAGILE = "ok", "poison", "broken", "final", "shaky", "fragile"
# poison: kills its worker always; broken: fails always; final: fails for good; shaky and fragile: only at first


class World:
    """Workers and tasks that behave in a set way; `choose(n)` says who finishes next."""

    def __init__(
        self, behaviours: list[str], workers: int, choices: list[int], broken: Sequence[int] = ()
    ) -> None:
        self.behaviours, self.workers, self.broken = behaviours, range(workers), broken
        self.scheduler: Scheduler[int] = Scheduler(range(len(behaviours)))
        self.choices, self.turn = choices, 0
        self.done: Counter[int] = Counter()
        self.tries: Counter[int] = Counter()
        self.handed: list[int] = []

    def choose(self, n: int) -> int:
        self.turn += 1
        return self.choices[self.turn % len(self.choices)] % n

    def hand_out(self) -> None:
        running = self.scheduler.running
        for worker in self.workers:
            while (task := self.scheduler.next_for(worker)) is not None:
                assert sum(task in tasks for tasks in running.values()) == 1  # with one worker only
                assert len(running[worker]) <= 2
                self.handed.append(task)

    def step(self) -> None:
        busy = [w for w in self.workers if self.scheduler.running.get(w)]
        assert busy, "nobody works and nobody is told to"
        worker = busy[self.choose(len(busy))]
        costs = self.scheduler.running[worker]
        task = costs[self.choose(len(costs))]
        if worker in self.broken:
            return self.scheduler.died(worker, "no GPU")
        self.tries[task] += 1
        match self.behaviours[task], self.tries[task]:
            case ("poison", _) | ("fragile", 1):
                self.scheduler.died(worker, f"killed by {task}")
            case ("broken", _) | ("shaky", 1):
                self.scheduler.failed(worker, task, "fails")
            case "final", _:
                self.scheduler.failed(worker, task, "for good", final=True)
            case _:
                self.scheduler.done(worker, task)
                self.done[task] += 1

    def run(self) -> None:
        for _ in range(40 * len(self.behaviours) + 40):
            if self.scheduler.finished or self.scheduler.stranded(self.workers):
                return
            self.hand_out()
            self.step()
        raise AssertionError("it never ends")


behaviours = st.lists(
    st.sampled_from([OK] * 6 + [POISON, BROKEN, FINAL, SHAKY, FRAGILE]), max_size=12
)
turns = st.lists(st.integers(0, 11), min_size=1, max_size=30)


@settings(max_examples=400, deadline=None)
@given(behaviours, st.integers(1, 3), turns)
def test_no_task_is_lost_done_twice_or_starved(
    kinds: list[str], workers: int, choices: list[int]
) -> None:
    world = World(kinds, workers, choices)
    world.run()
    scheduler = world.scheduler
    assert all(n == 1 for n in world.done.values())
    assert not world.done.keys() & scheduler.given_up.keys()
    for task in scheduler.given_up:
        assert kinds[task] in (POISON, BROKEN, FINAL)  # never one for what its neighbour did
    if scheduler.finished:
        assert world.done.keys() | scheduler.given_up.keys() == set(range(len(kinds)))
    else:
        assert scheduler.stranded(world.workers)
        assert sum(kind in (POISON, FRAGILE) for kind in kinds) > 1


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 8), st.integers(0, 8), st.integers(1, 3), turns)
def test_one_poisoned_task(before: int, after: int, workers: int, choices: list[int]) -> None:
    world = World([OK] * before + [POISON] + [OK] * after, workers, choices)
    world.run()
    assert world.scheduler.given_up == {before: f"killed by {before}"}
    assert len(world.done) == before + after
    assert not world.scheduler.abandoned
    assert ATTEMPTS <= world.tries[before] <= ATTEMPTS + 1  # alone each time but the first


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 12), st.integers(2, 4), st.integers(0, 3), turns)
def test_broken_workers_cost_no_task(
    tasks: int, workers: int, broken: int, choices: list[int]
) -> None:
    """As long as one is sound: a dead GPU must not use up the attempts of sound shards."""
    world = World([OK] * tasks, workers, choices, range(min(broken, workers - 1)))
    world.run()
    assert world.scheduler.finished
    assert not world.scheduler.given_up
    assert len(world.done) == tasks
    assert workers - 1 not in world.scheduler.abandoned


def test_a_broken_worker_is_abandoned() -> None:
    world = World([OK] * 30, 2, [0], broken=[0])
    world.run()
    assert world.scheduler.abandoned == {0}
    assert len(world.done) == 30


def test_all_workers_broken_is_stranded_not_a_hang() -> None:
    """They die before they take anything, as when the GPU driver is missing."""
    scheduler = Scheduler(range(6))
    for n in range(DEATHS):
        assert not scheduler.stranded((0, 1))
        for worker in (0, 1):
            scheduler.died(worker, f"death {n}")
    assert scheduler.stranded((0, 1))
    assert not scheduler.finished
    assert scheduler.next_for(0) is None


@settings(max_examples=100, deadline=None)
@given(behaviours, st.integers(1, 3), turns, st.integers(0, 20))
def test_drain_lets_what_is_in_flight_finish(
    kinds: list[str], workers: int, choices: list[int], when: int
) -> None:
    world = World(kinds, workers, choices)
    for _ in range(when):
        if world.scheduler.finished or world.scheduler.stranded(world.workers):
            return
        world.hand_out()
        world.step()
    world.scheduler.draining = True
    handed = len(world.handed)
    while not world.scheduler.finished:
        world.hand_out()
        world.step()
    assert len(world.handed) == handed
    assert not any(world.scheduler.running.values())
