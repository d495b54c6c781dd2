"""`python -m eval study run`: what is missing is made, one command after the other or several at a time.

Each command is a process of its own, whose output is its log. Whether it is done is seen from what it
made, so the study goes on wherever it was killed, and a second call does only what is missing. A
command that fails is named with its log; what does not need it goes on. Any number of workers, on any
number of machines, take one node after the other, each under a claim of the node.
"""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from shards import LeaseHeld, canonical_json
from shards.console import Bar, duration_text
from shards.exits import explained

from ...errors import ClaimLost, StudyHalted
from ..checks import check_columns, check_pair, check_ranks, check_sets, preflight
from ..earlier import take_over, taken_over
from ..graph import Node, nodes_of, train_id
from ..reuse import Existing, read_record
from ..study import Study
from .claims import SECONDS, Claim, holder, holder_text
from .command import Running, environment, list_anew, visible_gpus
from .edited import refuse_edited
from .workers import Worker, claim_folder

# exit codes: nothing was begun; something failed; a trainer's: another job has its folder
REFUSED, FAILED, HELD = 2, 3, 5
# that a command waits for a folder which an earlier one still holds: that has `bound.GRACE` to end, and on another
# machine its lease then has to expire
LEASE_SECONDS = 300
POLL = 0.2  # seconds between two looks at the commands
LOOK = 2.0  # seconds at most between two looks at a node that another worker has
PATIENCE = 900  # seconds that a stopped command has to save what it does
TAIL = 8  # lines of a failed command's log that are shown


def run(study: Study, seconds: float = SECONDS) -> int:
    """Makes what is missing of a study, with all workers that are at it; returns 0, or 3 where a command
    failed. `seconds`: of a lease, after which what a worker that stopped had is another's.

    Raises WorkerDiffers, OutputEdited and the named errors of `checks.preflight` before anything is written;
    StudyHalted once commands have begun.
    """
    import torch  # takes seconds

    worker = Worker(study, seconds)
    worker.refuse_others()
    check_ranks(study, torch.cuda.device_count())
    refuse_edited(study)
    study = preflight(study)
    worker.join()
    try:
        runner = Runner(study, worker)
        with runner.at_work():
            code = runner.go()
            check_sets(runner.study)
            if all(node.id in runner.done for node in runner.nodes):
                worker.finish(runner.study)
    finally:
        worker.leave()
    return code


@dataclass
class Runner:
    """The nodes of a study, and what has become of them."""

    study: Study
    worker: Worker | None = None
    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(
        default_factory=dict
    )  # by id: why, or which failed node it needs
    running: list[Running] = field(default_factory=list)
    claims: dict[str, Claim] = field(default_factory=dict)  # that this worker has, by node
    elsewhere: dict[str, str] = field(default_factory=dict)  # by id: which worker has it
    look_at: dict[str, float] = field(default_factory=dict)  # when to look at these again
    held: dict[str, float] = field(default_factory=dict)  # since when a node waits for a folder
    paired: set[tuple[str, int]] = field(default_factory=set)  # entry and seed that were compared
    looked: set[str] = field(default_factory=set)  # nodes that may have been done before
    broken: int = 0  # commands that failed
    begun: int = 0  # commands that this worker began

    def __post_init__(self) -> None:
        self.nodes = nodes_of(self.study)
        self.existing = Existing(self.study)
        self.gpus = visible_gpus() if self.study.jobs > 1 else []
        self.seconds = SECONDS if self.worker is None else self.worker.seconds
        self._waiting: list[str] = []

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Stops at the end what still runs. StudyHalted where, after commands had begun, something ends it that
        a user can put right.
        """
        try:
            yield
        except Exception as error:
            code, text = explained(error) or (None, "")
            if code != REFUSED or not self.begun:
                raise
            raise StudyHalted(
                f"{self.study.out}: ended after commands had begun, of which all is kept that they made: {text}"
            ) from error
        finally:
            self.stop()

    def go(self) -> int:
        """Runs until nothing more can be done; returns the exit code."""
        with Bar(f"{self.study.path.stem}:", len(self.nodes), "commands") as self.bar:
            if self.worker is not None and self.worker.others:  # who may have encoded meanwhile
                self._encoded()
            self._look_at_all()
            self.bar.skip(len(self.done))
            for line in self._plan():
                self.bar.note(line)
            while self._collect() or self._begin() or self.running or self._waits():
                time.sleep(POLL)
                self._keep()
        left = sum(node.id not in self.done for node in self.nodes)
        state = f"{left} commands are left" if left else "all that the study asks for exists"
        print(f"{self.study.out}: {state}", flush=True)
        return FAILED if self.broken else 0

    def _look_at_all(self) -> None:
        """Looks which nodes are done; of those that depend on a choice, once that can be made."""
        nodes: list[Node] = []
        while nodes is not self.nodes:
            nodes = self.nodes
            for node in nodes:
                self._look(node)
            self._choose()

    def _look(self, node: Node) -> bool:
        """Whether a node whose needs are done is done itself; looked at once before it runs."""
        if node.open or not set(node.needs) <= self.done or node.id in self.looked:
            return False
        self.looked.add(node.id)
        if self.existing.done(node):
            self.done.add(node.id)
        return node.id in self.done

    def _plan(self) -> Iterator[str]:
        """Yields what is taken over, and what there is to do."""
        for name, folder in taken_over(self.study).items():
            yield f"{name}: taken over from {folder}"
        kinds = Counter(node.kind for node in self.nodes if node.id not in self.done)
        todo = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        yield f"{len(self.done)} of {len(self.nodes)} commands are done; to do: {todo or 'nothing'}"

    # Beginning ------------------------------------------------------------------------------------

    def _begin(self) -> bool:
        """Starts commands as long as there is room; returns whether one was started."""
        started = False
        while len(self.running) < self.study.jobs and (node := self._next()):
            self._check_pairs(node)
            self._start(node)
            started = True
        return started

    def _next(self) -> Node | None:
        """Returns the first node whose needs are done, whose outputs no other command writes, and that
        no other worker has; this one has its claim then.
        """
        busy = {running.node.id for running in self.running}
        writing = {path for running in self.running for path in running.node.outputs}
        nodes = self.nodes
        for node in nodes:
            if node.id in self.done or node.id in self.failed or node.id in busy:
                continue
            if cause := next((need for need in node.needs if need in self.failed), None):
                self.failed[node.id] = f"needs {cause}"
            elif self._look(node):
                self.bar.skip(1)
                self._choose()
            elif node.open or not set(node.needs) <= self.done or writing & set(node.outputs):
                continue
            elif self._claimed(node):
                return node
            if nodes is not self.nodes:  # a column or a choice exists now: other nodes may be done
                return self._next()
        return None

    def _claimed(self, node: Node) -> bool:
        """Takes the claim of a node; returns whether it is this worker's to run: no other has it, made it
        or failed in it.
        """
        if node.id in self.claims:
            return True
        if time.monotonic() < self.look_at.get(node.id, 0.0):
            return False
        claim = Claim(claim_folder(self.study, node), node.id, self.seconds)
        try:
            claim.take()
        except LeaseHeld:
            record = holder(claim.folder)
            self.elsewhere[node.id] = holder_text(record) if record else "a worker"
            self.look_at[node.id] = time.monotonic() + min(LOOK, self.seconds / 10)
            return False
        self.elsewhere.pop(node.id, None)
        if not self._taken(node):
            self.claims[node.id] = claim
            return True
        claim.release()
        return False

    def _taken(self, node: Node) -> bool:
        """Whether another worker has made a node, or failed in it, before this one had its claim."""
        list_anew(self.study.log(node.id).parent, *node.outputs)
        if self.existing.done(node):
            self.bar.skip(1)
            self._made(node)
            return True
        record = read_record(self.study, node.id)
        if self.worker is None or record is None or record.get("session") != self.worker.session:
            return False
        if not record.get("exit_code"):
            return False
        self._fail(node, f"exit code {record.get('exit_code')}", f"by {holder_text(record)}")
        return True

    def _waits(self) -> bool:
        """Whether other workers have nodes that are left; says once which."""
        elsewhere = [
            f"{node.id} ({self.elsewhere[node.id]})"
            for node in self.nodes
            if node.id in self.elsewhere and node.id not in self.done | self.failed.keys()
        ]
        if elsewhere and elsewhere != self._waiting:
            self.bar.note(f"waits for {', '.join(elsewhere)}")
        self._waiting = elsewhere
        return bool(elsewhere)

    def _check_pairs(self, node: Node) -> None:
        """Before the first pictures of a seed: its trainings differ in nothing but what they should."""
        if node.kind != "generate" or node.seed is None:
            return
        for entry in self.study.entries[1:]:
            trained = train_id(self.study, entry, node.seed) in self.done
            baseline = train_id(self.study, self.study.baseline, node.seed) in self.done
            if trained and baseline and (entry, node.seed) not in self.paired:
                check_pair(self.study, entry, node.seed)
                self.paired.add((entry, node.seed))

    def _start(self, node: Node) -> None:
        used = {running.slot for running in self.running}
        slot = next(number for number in range(self.study.jobs) if number not in used)
        variables = environment(slot, self.study.jobs, self.gpus)
        claim, again = self.claims[node.id], node.id in self.held
        try:
            claim.check()
            running = Running.begin(node, claim, self.study.log(node.id), slot, variables, again)
        except ClaimLost:
            self._lose(node)
            return
        self.running.append(running)
        self.begun += 1
        if not again:
            self.bar.note(f"begins: {node.id}")

    # Ending ---------------------------------------------------------------------------------------

    def _collect(self) -> bool:
        """Takes up commands that have ended; returns whether there was one."""
        ended = [running for running in self.running if running.process.poll() is not None]
        for running in ended:
            self.running.remove(running)
            running.log.close()
            try:
                self._end(running, running.process.returncode)
            except ClaimLost:
                self._lose(running.node)
        return bool(ended)

    def _end(self, running: Running, code: int) -> None:
        node = running.node
        running.claim.check()
        if (
            code == HELD
            and time.monotonic() - self.held.setdefault(node.id, time.monotonic()) < LEASE_SECONDS
        ):
            self.bar.note(f"{node.id}: its folder is held by an earlier command; waits for it")
            time.sleep(2)
            return
        record = running.record(self.study, code, self.worker.session if self.worker else "")
        running.claim.write(self.study.log(node.id).with_suffix(".json"), canonical_json(record))
        done = code == 0 and self.existing.done(node)
        self.claims.pop(node.id).release()
        if done:
            self.bar.advance(1)
            self.bar.note(f"done: {node.id}, {duration_text(record['seconds'])}")
            self._made(node)
            return
        empty = "exit code 0, but what it should have made is not there"
        self._fail(node, f"exit code {code}" if code else empty)

    def _made(self, node: Node) -> None:
        """Takes up what follows from a node that is done now, by this worker or another."""
        self.done.add(node.id)
        if node.kind == "encode":
            self._encoded()
        elif node.axis:
            self._choose()

    def _fail(self, node: Node, ending: str, by: str = "") -> None:
        """Says that a node failed, here or by another worker."""
        self.broken += 1
        self.failed[node.id] = ending
        log = self.study.log(node.id)
        who = f"{node.id}, {by}" if by else node.id
        self.bar.note(f"failed: {who}, {ending}: {shlex.join(node.command)}")
        for line in log.read_text(errors="replace").splitlines()[-TAIL:] if log.is_file() else ():
            self.bar.note(f"    {line}")
        self.bar.note(f"    all of it is in {log}; what does not need it goes on")

    def _keep(self) -> None:
        """Ends what another worker has taken over, since this one was suspended."""
        for running in [*self.running]:
            if running.claim.lapsed:
                try:
                    running.claim.check()
                except ClaimLost:
                    running.kill()
                    self.running.remove(running)
                    self._lose(running.node)
        if self.worker is not None:
            self.worker.keep()

    def _lose(self, node: Node) -> None:
        """Leaves a node to the worker that has taken it over."""
        self.claims.pop(node.id).release()
        self.held.pop(node.id, None)
        self.elsewhere[node.id] = "a worker"
        self.bar.note(f"{node.id}: another worker has taken it over, since this one was suspended")

    def _choose(self) -> None:
        """Takes up what can be chosen for entries now, and so the commands that waited for it."""
        study = take_over(self.study)
        for entry, values in study.settled.items():
            for axis in values.keys() - self.study.settled.get(entry, {}).keys():
                self.bar.note(f"chosen for {entry}: {axis} {values[axis]:g}")
        if study.settled != self.study.settled:
            self.study = study
            self.nodes, self.existing = nodes_of(study), Existing(study)

    def _encoded(self) -> None:
        """Takes over what was made by hand of columns that exist only now, and checks these."""
        before = taken_over(self.study)
        self.study = take_over(self.study)
        self.nodes, self.existing = nodes_of(self.study), Existing(self.study)
        check_columns(self.study, self.existing)
        for name, folder in taken_over(self.study).items():
            if name not in before:
                self.bar.note(f"{name}: taken over from {folder}")

    def stop(self) -> None:
        """Stops what still runs, as a signal would, and waits until it has saved its state."""
        for running in self.running:
            running.stop()
        until = time.monotonic() + PATIENCE
        for running in self.running:
            running.wait(max(0.0, until - time.monotonic()))
        self.running = []
        for claim in self.claims.values():
            claim.release()
        self.claims = {}
