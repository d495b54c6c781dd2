"""`python -m eval watch RUN`: pictures of a few prompts and their scores for each checkpoint, beside a run in progress.

    RUN/eval/watch.json             what is sampled: prompts, steps, guidance, seed
    RUN/eval/step-00000010/         the set of pictures of a checkpoint, and its scores
    RUN/eval/metrics.jsonl          a line a checkpoint: {"step", "scores": {scorer: Value}, "seconds", "weights", ...}
    RUN/eval/old-1-step-00000010/   set and record of other weights that were this step's before it was trained again
    RUN/eval/lease.json             while a watcher runs: there is one at a time

A process of its own: the trainer's files are read only. It goes on where it was stopped, passes over checkpoints that
the trainer removes meanwhile, and ends when the run's last checkpoint is scored.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import configs
from shards import LeaseHeld, atomic_write, canonical_json, open_store, put_if_absent
from shards.column.lease import Lease, standing
from shards.console import positive
from shards.format.atomic import read_json
from shards.signals import Stopped, stoppable, stopping
from train.checkpoints.checkpoint import CheckpointError, steps
from train.report.page import write_page

from .errors import BadReport, OtherImages, Watched
from .images.checks import read_manifest
from .images.generate import Request, generate
from .images.imageset import ImageSetReader
from .prompts.benchmarks import BENCHMARKS, find
from .score import run as score_sets
from .scores import results
from .scores.scorer import Scorer

Json = dict[str, Any]
NAME = "eval"  # folder of a run
ORDERS = ("newest", "oldest")
STEP = re.compile(r"step-(\d{8,})")
# Fields of a request that are not what is sampled, but from what, where and how fast.
APART = {
    "checkpoint", "tag", "prompts", "save_dir", "vae", "text_encoder", "allow_other_encoder", "text_cache", "device",
    "batch_size", "threads",
}  # fmt: skip


@dataclass(frozen=True)
class ScorerRequest:
    """A scorer with the flags it was given."""

    name: str  # with its flags, as they were typed
    scorer: Scorer
    args: argparse.Namespace


def asked(words: Sequence[str], scorers: Mapping[str, Scorer], device: str) -> list[ScorerRequest]:
    """From `cmmd --reference FILE --scorer fid ...`: names, each followed by its flags as `score` takes them."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "--scorer":
            parts.append([])
        else:
            parts[-1].append(word)
    found = []
    for part in parts:
        if not part or part[0] not in scorers:
            known = ", ".join(sorted(scorers)) or "none here"
            raise BadReport(
                f"--scorer: found {part[0] if part else 'nothing'!r}, expected one of {known}"
            )
        parser = argparse.ArgumentParser(
            prog=f"python -m eval watch RUN --scorer {part[0]}", conflict_handler="resolve"
        )
        parser.add_argument("--device", default=device)
        parser.add_argument("--batch_size", type=positive, default=32)
        parser.set_defaults(partial=False)
        scorers[part[0]].flags(parser)
        found.append(ScorerRequest(" ".join(part), scorers[part[0]], parser.parse_args(part[1:])))
    return found


def watch(
    run: Path,
    request: Request,
    scorers: Sequence[ScorerRequest],
    order: str = "newest",
    every: float = 30.0,
    once: bool = False,
) -> int:
    """Score what stands and what comes, until the run is finished; with `once`, what stands. Returns the exit code.

    `request` says what to sample; its checkpoint and save_dir are set for each step. `every`: seconds between looks.
    """
    watcher = Watcher(run, request, scorers, order)

    def work() -> int:
        with stopping(watcher.signals), watcher.alone():
            watcher.go(every, once)
        return 0

    return stoppable(work)


@dataclass
class Watcher:
    """A run, and what is done with each of its checkpoints."""

    run: Path
    request: Request
    scorers: Sequence[ScorerRequest]
    order: str
    # step and age of the manifest of checkpoints that could not be read
    passed: set[tuple[int, int]] = field(default_factory=set)
    signals: list[int] = field(default_factory=list)  # that came
    say: Callable[[str], None] = lambda text: print(text, flush=True)

    def __post_init__(self) -> None:
        """All that a user can get wrong, before anything is written."""
        if not self.run.is_dir():
            raise CheckpointError(f"{self.run}: no such folder, expected one of a run. Train first")
        if not ((self.run / "checkpoints").is_dir() or (self.run / "config.yaml").is_file()):
            raise CheckpointError(
                f"{self.run}: found neither checkpoints nor config.yaml, expected the folder of a run"
            )
        if not self.scorers:
            raise BadReport("--scorer: found none, expected at least one with its flags")
        for each in self.scorers:  # weights that are missing, before any picture is made
            each.scorer.ready(each.args)
        prompts = find(self.request.benchmark, self.request.prompts)
        each_has = self.request.n_samples or BENCHMARKS[self.request.benchmark].images_per_prompt
        for each in self.scorers:
            where = str(self.request.prompts or prompts.benchmark)
            each.scorer.enough(each.args, each_has * len(prompts.items), where)
        kept = {key: value for key, value in vars(self.request).items() if key not in APART}
        on_cpu = torch.device(self.request.device).type == "cpu"
        sampled = {
            "prompts": prompts.digest,
            "benchmark": prompts.benchmark,
            "precision": "fp32" if on_cpu else "bf16-autocast",
        }
        self.settings: Json = json.loads(json.dumps(kept | sampled, default=str))
        self.folder = self.run / NAME

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lease of the folder; Watched if another does, or if what stands there is of other settings."""
        self.folder.mkdir(exist_ok=True)
        self._lease = Lease(self.folder, "eval watch")
        try:
            self._lease.__enter__()
        except LeaseHeld:
            holder = standing(open_store(self.folder))[1] or {}
            raise Watched(
                f"{self.run}: another process watches this run (pid {holder.get('pid', 'unknown')} on "
                f"{holder.get('host', 'an unknown host')}). Wait for its end or stop it"
            ) from None
        try:
            self._check_settings()
            yield
        finally:
            self._lease.release()

    def _check_settings(self) -> None:
        path = self.folder / "watch.json"
        if put_if_absent(path, canonical_json(self.settings)):
            return
        try:
            found = dict(read_json(path))
        except (OSError, ValueError, TypeError) as error:
            raise Watched(
                f"{path}: not readable ({error}). Move {self.folder} away to start over"
            ) from None
        lines = [
            f"{key}: found {found[key]!r}, expected {self.settings[key]!r}"
            for key in sorted(found.keys() & self.settings.keys())
            if found[key] != self.settings[key]
        ]
        if lines:
            what = f"{self.folder} holds scores of pictures of other settings:"
            raise Watched(
                "\n  ".join(
                    [what, *lines, "Use these again, or move that folder away to start over"]
                )
            )

    # What there is to do ----------------------------------------------------------------------------------------------

    def go(self, every: float, once: bool) -> None:
        """One checkpoint after another; before each it is asked anew which one is next."""
        while True:
            last = (
                once or self.finished()
            )  # asked first: what is saved meanwhile is still found below
            todo = self.pending()
            key = self._key(todo[0]) if todo else None  # before it is read: it may be replaced
            done = bool(todo) and self._one(todo[0])
            if self.signals:
                raise Stopped(self.signals[0])
            if done:
                continue
            if key:
                self.passed.add(key)
            elif last:
                self.say(f"{self.run}: all checkpoints that stand are scored")
                return
            else:
                time.sleep(every)

    def finished(self) -> bool:
        """Whether no checkpoint will come: the one of the last step stands, or, without config.yaml, any."""
        found = map(number_of, steps(self.run / "checkpoints"))
        numbers = [number for number in found if number is not None]
        config = self.run / "config.yaml"
        if not config.is_file():
            return bool(numbers)
        wanted = configs.read_yaml(config).get("steps")
        if type(wanted) is not int:
            raise Watched(f"{config}: found steps {wanted!r:.40}, expected the config of a run")
        return bool(numbers) and max(numbers) >= wanted

    def pending(self) -> list[int]:
        """Steps to be scored, the next one first: of checkpoints that stand, and of sets whose checkpoint is gone.

        FormatVersion where another release made any of the sets: this one must not make it anew."""
        for manifest in self.folder.glob("step-*/manifest.json"):
            with suppress(OtherImages):  # told by whoever opens it
                read_manifest(manifest)
        done = self.records()
        wanted = {each.name for each in self.scorers}
        standing = {path.name for path in steps(self.run / "checkpoints")}
        made = {path.parent.name for path in self.folder.glob("step-*/manifest.json")
                if path.parent.name in standing or _complete(path)}  # fmt: skip
        found = {step for name in standing | made if (step := number_of(Path(name))) is not None}
        return sorted(
            (
                step for step in found
                if self._key(step) not in self.passed
                and (not wanted <= set(done.get(step, {}).get("asked", [])) or self._of_others(step, done.get(step)))
            ),
            reverse=self.order == "newest",
        )  # fmt: skip

    def _checkpoint(self, step: int) -> Path:
        return self.run / "checkpoints" / f"step-{step:08d}"

    def _key(self, step: int) -> tuple[int, int]:
        """What a checkpoint is passed over by, until another one takes its place."""
        try:
            return step, (self._checkpoint(step) / "manifest.json").stat().st_mtime_ns
        except OSError:
            return step, 0

    def _of_others(self, step: int, record: Json | None) -> bool:
        """Whether the set or the record is of other weights than those of the checkpoint that stands."""
        file = "ema.safetensors" if self.request.ema_weights else "weights.safetensors"
        now = _told(self._checkpoint(step) / "manifest.json", "files", file, "sha256")
        made = _told(self.folder / f"step-{step:08d}" / "manifest.json", "settings", "weights")
        return now is not None and any(
            weights not in (None, now) for weights in (made, (record or {}).get("weights"))
        )

    def _set_aside(self, step: int) -> None:
        """Set and record of other weights; the folder gets a name that is no step's."""
        records = self.records()
        record = records.pop(step, None)
        folder, number = self.folder / f"step-{step:08d}", 1
        while (aside := folder.with_name(f"old-{number}-{folder.name}")).exists():
            number += 1
        self.say(f"step {step}: trained again since it was scored; what was of it goes to {aside}")
        self._lease.check()
        if folder.is_dir():
            if record:
                atomic_write(folder / "record.json", canonical_json(record))
            folder.rename(aside)
        if record:
            self._write(records)

    def records(self) -> dict[int, Json]:
        records = results.read_watched(self.folder / "metrics.jsonl")
        return {record["step"]: record for record in records}

    # One checkpoint ---------------------------------------------------------------------------------------------------

    def _one(self, step: int) -> bool:
        """Sample and score a checkpoint; False, with a word about it, where it cannot be read."""
        checkpoint = self._checkpoint(step)
        folder = self.folder / checkpoint.name
        start = time.perf_counter()
        if self._of_others(step, self.records().get(step)):
            self._set_aside(step)
        try:
            if not _complete(folder / "manifest.json"):
                cache = self.request.text_cache or self.folder / "text"  # one for all steps
                request = replace(
                    self.request, checkpoint=checkpoint, tag=None, save_dir=folder, text_cache=cache
                )
                generate(request, came=self.signals)
        except (CheckpointError, OSError) as error:
            if not checkpoint.is_dir():
                self.say(f"step {step}: passed over, its checkpoint was removed while it was read")
            elif isinstance(error, CheckpointError):
                self.say(f"step {step}: passed over. {error}")
            else:
                raise
            return False
        except OtherImages as error:  # this step was trained twice
            self.say(f"step {step}: passed over. {error}")
            return False
        self._score(step, folder, time.perf_counter() - start)
        return True

    def _score(self, step: int, folder: Path, generating: float) -> None:
        """What is asked for and not there yet; a record of all of it."""
        record = self.records().get(step) or {
            "step": step,
            "scores": {},
            "asked": [],
            "seconds": {},
        }
        images = ImageSetReader.open(folder)
        start = time.perf_counter()
        for each in self.scorers:
            if each.name not in record["asked"]:
                each.args.save_dir = [folder]
                score_sets(each.scorer, each.args)
                record["asked"].append(each.name)
        for name, score in results.read_all(folder).items():
            if score.images == images.digest:
                record["scores"][name] = asdict(score.value)
        took = {"generate": generating, "score": time.perf_counter() - start}
        seconds = {key: record["seconds"].get(key, 0.0) + took[key] for key in took}
        self._lease.check()
        told = {"seconds": seconds, "images": images.digest, "weights": images.settings["weights"]}
        self._write(self.records() | {step: record | told})
        self.say(
            f"step {step}: scored, after {took['generate']:.3g} s of sampling and {took['score']:.3g} s of scoring"
        )

    def _write(self, records: Mapping[int, Json]) -> None:
        """The file anew, in the order of steps, which need not be the order of scoring; then the run's page."""
        lines = (canonical_json(records[step]) for step in sorted(records))
        atomic_write(self.folder / "metrics.jsonl", b"".join(lines))
        if (self.run / "metrics.jsonl").is_file() and (self.run / "config.yaml").is_file():
            write_page(self.run)


def number_of(checkpoint: Path) -> int | None:
    """The step, None where the name is no step's."""
    found = STEP.fullmatch(checkpoint.name)
    return int(found[1]) if found else None


def _told(path: Path, *keys: str) -> Any:
    """What stands under these keys of a JSON file, None where nothing is readable there."""
    try:
        found = read_json(path)
        for key in keys:
            found = found[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def _complete(manifest: Path) -> bool:
    """Whether a set is finished; what is not readable is told by whoever opens it."""
    return bool(_told(manifest, "complete"))
