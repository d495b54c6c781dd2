"""`python -m eval watch RUN`: pictures of a few prompts and their scores for each checkpoint of a run,
while it is trained.

    RUN/eval/watch.json             what is sampled: prompts, steps, guidance, seed
    RUN/eval/step-00000010/         the set of pictures of a checkpoint, and its scores
    RUN/eval/metrics.jsonl          a line a checkpoint: {"step", "scores": {scorer: Value}, "seconds", "weights", ...}
    RUN/eval/old-1-step-00000010/   set and record of this step's former weights, if it was trained again
    RUN/eval/lease.json             while a watcher runs: there is one at a time

It is a process of its own and only reads the trainer's files. It goes on where it was stopped, passes
over checkpoints that the trainer removes meanwhile, and ends when the run's last checkpoint is scored.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

import configs
from shards import LeaseHeld, atomic_write, canonical_json, open_store, put_if_absent
from shards.column import Lease, lease_chain
from shards.console import Parser
from shards.format.atomic import read_json
from shards.signals import Stopped, stoppable
from train.checkpoints.checkpoint import WHOLE, CheckpointError
from train.checkpoints.folders import number_of, steps
from train.checkpoints.snapshots import EmaLengthRefused, digest_of_length, refuse_planned
from train.config import EmaConfig
from train.report import write_page

from .errors import BadReport, OtherImages, Watched
from .images.checks import read_manifest
from .images.generate import Request, generate
from .images.imageset import ImageSetReader
from .images.ranks import chosen_device
from .prompts.benchmarks import BENCHMARKS, find
from .score import add_flags
from .score import run as score_sets
from .scores import results
from .scores.scorer import Scorer

Json = dict[str, Any]
# Fields of a request that say from what, where and how fast is sampled, not what.
UNCOMPARED = {
    "checkpoint", "tag", "prompts", "save_dir", "vae", "text_encoder", "allow_other_encoder", "text_cache", "device",
    "batch_size", "threads", "allow_class",
}  # fmt: skip


@dataclass(frozen=True)
class ScorerRequest:
    """A scorer with its parsed flags."""

    name: str  # with the flags, as they were typed
    scorer: Scorer
    args: argparse.Namespace


def parse_scorers(
    words: Sequence[str], scorers: Mapping[str, Scorer], device: str, verb: str = "watch"
) -> list[ScorerRequest]:
    """Returns the scorers of `cmmd --reference FILE --scorer fid ...`: names, each followed by its
    flags as `eval score` takes them.
    """
    requests = []
    for separator, part in groupby(words, lambda word: word == "--scorer"):
        if separator:
            continue
        name, *flags = part
        if name not in scorers:
            raise BadReport(
                f"--scorer: found {name!r}, expected one of {', '.join(sorted(scorers))}"
            )
        parser = Parser(
            prog=f"python -m eval {verb} RUN --scorer {name}", conflict_handler="resolve"
        )
        add_flags(parser, scorers[name].flags)
        parser.set_defaults(partial=False, device=device)
        arguments = parser.parse_args(flags)
        arguments.device = chosen_device(arguments.device)
        requests.append(ScorerRequest(" ".join([name, *flags]), scorers[name], arguments))
    return requests


def watch(
    run: Path, request: Request, scorers: Sequence[ScorerRequest], order: str = "newest",
    every: float = 30.0, once: bool = False,
) -> int:  # fmt: skip
    """Scores the checkpoints of a run until it is finished, or with `once` those that exist now;
    returns the exit code.

    `request` says what to sample, its checkpoint and save_dir are set for each step. `order` is
    "newest" or "oldest" first, `every` seconds lie between two looks.
    """
    watcher = Watcher(run, request, scorers, order)

    def work() -> None:
        with watcher.alone():
            watcher.go(every, once)

    return stoppable(work, watcher.signals)


@dataclass
class Watcher:
    """A run, and what is done with each of its checkpoints."""

    run: Path
    request: Request
    scorers: Sequence[ScorerRequest]
    order: str
    # step and time of the manifest of checkpoints that could not be read
    unreadable: set[tuple[int, int]] = field(default_factory=set)
    # numbers of the stop signals that were received
    signals: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Checks all that a user can get wrong, before anything is written."""
        run, request = self.run, self.request
        if not run.is_dir():
            raise CheckpointError(f"{run}: no such folder, expected one of a run. Train first")
        if not ((run / "checkpoints").is_dir() or (run / "config.yaml").is_file()):
            raise CheckpointError(
                f"{run}: found neither checkpoints nor config.yaml, expected the folder of a run"
            )
        if request.ema is not None:
            self._check_average(request.ema)
        if not self.scorers:
            raise BadReport("--scorer: found none, expected at least one with its flags")
        prompts = find(request.benchmark, request.prompts)
        images_per_prompt = request.n_samples or BENCHMARKS[request.benchmark].images_per_prompt
        count, place = images_per_prompt * len(prompts.items), request.prompts or prompts.benchmark
        for scorer in self.scorers:  # loads its weights, and asks for enough pictures
            scorer.scorer.ready(scorer.args)
            scorer.scorer.suits(scorer.args, prompts)
            scorer.scorer.enough(scorer.args, count, str(place))
        on_cpu = torch.device(request.device).type == "cpu"
        settings = {key: value for key, value in vars(request).items() if key not in UNCOMPARED} | {
            "prompts": prompts.digest,
            "benchmark": prompts.benchmark,
            "precision": "fp32" if on_cpu else "bf16-autocast",
        }
        self.settings: Json = json.loads(json.dumps(settings, default=str))
        self.folder = run / "eval"

    def _check_average(self, length: float) -> None:
        """EmaLengthRefused where the run will not have kept enough for an average of a length at its end;
        of earlier steps it is seen when they are read.
        """
        path = self.run / "config.yaml"
        if not path.is_file():
            return
        values = configs.read_yaml(path).get("ema") or {}
        try:
            config, steps = EmaConfig.model_validate(values), self._steps(path)
        except ValidationError as error:
            line = configs.explained(EmaConfig, values, error, above="ema")[0]
            raise Watched(f"{path}: {line}") from None
        try:
            refuse_planned(config, steps, steps, length)
        except EmaLengthRefused as error:
            raise EmaLengthRefused(f"{self.run}: --ema: {error}") from None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Holds the lease of the folder; Watched if another process does, or if the folder's pictures
        are of other settings.
        """
        self.folder.mkdir(exist_ok=True)
        self._lease = Lease(self.folder, "eval watch")
        try:
            self._lease.__enter__()
        except LeaseHeld:
            holder = lease_chain(open_store(self.folder))[1] or {}
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
            settings = {"ema": None} | dict(read_json(path))  # which older releases did not know
        except (OSError, ValueError, TypeError) as error:
            raise Watched(
                f"{path}: not readable ({error}). Move {self.folder} away to start over"
            ) from None
        differing = [
            f"{key}: found {settings[key]!r}, expected {self.settings[key]!r}"
            for key in sorted(self.settings.keys() & settings.keys())
            if settings[key] != self.settings[key]
        ]
        if differing:
            title = f"{self.folder} holds scores of pictures of other settings:"
            advice = "Use these again, or move that folder away to start over"
            raise Watched("\n  ".join([title, *differing, advice]))

    # What there is to do ----------------------------------------------------------------------------

    def go(self, every: float, once: bool) -> None:
        """Scores one checkpoint after another; before each it looks anew which one is next."""
        while True:
            # first, so that what is saved meanwhile is still in `pending`
            last = once or self.finished()
            pending = self.pending()
            key = (
                self._key(pending[0]) if pending else None
            )  # before it is read: it may be replaced
            scored = bool(pending) and self._sample_and_score(pending[0])
            if self.signals:
                raise Stopped(self.signals[0])
            if scored:
                continue
            if key:
                self.unreadable.add(key)
            elif last:
                left = ", ".join(map(str, self.unscored()))
                but = f", but for those that were passed over: step {left}" if left else ""
                return print(f"{self.run}: all checkpoints that exist are scored{but}", flush=True)
            else:
                time.sleep(every)

    def finished(self) -> bool:
        """Whether no checkpoint will come: the last step's exists, or, without config.yaml, any."""
        numbers = [n for n in map(number_of, steps(self.run / "checkpoints")) if n is not None]
        config = self.run / "config.yaml"
        if not config.is_file():
            return bool(numbers)
        return bool(numbers) and max(numbers) >= self._steps(config)

    def _steps(self, config: Path) -> int:
        """Returns how many steps a run is to take."""
        steps = configs.read_yaml(config).get("steps")
        if type(steps) is not int or steps < 1:
            raise Watched(f"{config}: found steps {steps!r:.40}, expected the config of a run")
        return steps

    def pending(self) -> list[int]:
        """Returns the steps to be scored, the next one first, without those that could not be read."""
        return [step for step in self.unscored() if self._key(step) not in self.unreadable]

    def unscored(self) -> list[int]:
        """Returns the steps without scores, in the watcher's order: of checkpoints that exist, and of
        finished sets whose checkpoint is gone.

        FormatVersion where another release made any of the sets: this one must not replace it.
        """
        saved = {path.name for path in steps(self.run / "checkpoints")}
        sets = list(self.folder.glob("step-*/manifest.json"))
        for manifest in sets:
            with suppress(OtherImages):  # raised again by whoever opens it
                read_manifest(manifest)
        names = saved | {path.parent.name for path in sets if _value(path, "complete")}
        records, requested = self.records(), {scorer.name for scorer in self.scorers}
        unscored = [
            step for name in names
            if (step := number_of(Path(name))) is not None
            and (not requested <= set(records.get(step, {}).get("asked", [])) or self._outdated(step, records))
        ]  # fmt: skip
        return sorted(unscored, reverse=self.order == "newest")

    def _checkpoint(self, step: int) -> Path:
        return self.run / "checkpoints" / f"step-{step:08d}"

    def _key(self, step: int) -> tuple[int, int]:
        """Returns by what a checkpoint is passed over until another one takes its place."""
        try:
            return step, (self._checkpoint(step) / "manifest.json").stat().st_mtime_ns
        except OSError:
            return step, 0

    def _weights(self, step: int) -> str | None:
        """Returns the digest of a checkpoint's weights that are sampled; None where it cannot be read."""
        checkpoint = self._checkpoint(step)
        if self.request.ema is not None:
            with suppress(CheckpointError, EmaLengthRefused, OSError):
                return digest_of_length(checkpoint, self.request.ema)
            return None
        file = WHOLE["ema" if self.request.ema_weights else "weights"]
        digest: str | None = _value(checkpoint / "manifest.json", "files", file, "sha256")
        return digest

    def _outdated(self, step: int, records: Mapping[int, Json]) -> bool:
        """Whether the set or the record is of other weights than the checkpoint's."""
        weights = self._weights(step)
        manifest = self.folder / f"step-{step:08d}" / "manifest.json"
        earlier = _value(manifest, "settings", "weights"), records.get(step, {}).get("weights")
        return weights is not None and any(digest not in (None, weights) for digest in earlier)

    def _set_aside(self, step: int, records: dict[int, Json]) -> None:
        """Gives the set of other weights, with its record, a name that is no step's."""
        record = records.pop(step, None)
        folder, number = self.folder / f"step-{step:08d}", 1
        while (aside := folder.with_name(f"old-{number}-{folder.name}")).exists():
            number += 1
        print(
            f"step {step}: trained again since it was scored; its set goes to {aside}", flush=True
        )
        self._lease.check()
        if folder.is_dir():
            if record:
                atomic_write(folder / "record.json", canonical_json(record))
            folder.rename(aside)
        if record:
            self._write(records)

    def records(self) -> dict[int, Json]:
        """Returns the records of metrics.jsonl by step."""
        records = results.read_watched(self.folder / "metrics.jsonl")
        return {record["step"]: record for record in records}

    # One checkpoint ---------------------------------------------------------------------------------

    def _sample_and_score(self, step: int) -> bool:
        """Returns False, after a line that says why, where the checkpoint cannot be read."""
        checkpoint = self._checkpoint(step)
        folder = self.folder / checkpoint.name
        start = time.perf_counter()
        records = self.records()
        if self._outdated(step, records):
            self._set_aside(step, records)
        try:
            if not _value(folder / "manifest.json", "complete"):
                cache = self.request.text_cache or self.folder / "text"  # one for all steps
                request = replace(
                    self.request, checkpoint=checkpoint, tag=None, save_dir=folder, text_cache=cache
                )
                generate(request, signals=self.signals)
        except (CheckpointError, EmaLengthRefused, OtherImages, OSError) as error:
            reason = f". {error}"  # OtherImages: the step was trained again meanwhile
            if not isinstance(error, OtherImages) and not checkpoint.is_dir():
                reason = ", its checkpoint was removed while it was read"
            elif not isinstance(error, CheckpointError | EmaLengthRefused | OtherImages):
                raise
            print(f"step {step}: passed over{reason}", flush=True)
            return False
        self._score(step, folder, time.perf_counter() - start)
        return True

    def _score(self, step: int, folder: Path, sampling_seconds: float) -> None:
        """Runs the scorers that the step's record lacks, and writes the record."""
        record = self.records().get(step) or {
            "step": step,
            "scores": {},
            "asked": [],
            "seconds": {},
        }
        images = ImageSetReader.open(folder)
        start = time.perf_counter()
        for scorer in self.scorers:
            if scorer.name not in record["asked"]:
                scorer.args.save_dir = [folder]
                score_sets(scorer.scorer, scorer.args)
                record["asked"].append(scorer.name)
        for name, score in results.read_all(folder).items():
            if score.images == images.digest:
                record["scores"][name] = asdict(score.value)
        seconds = {"generate": sampling_seconds, "score": time.perf_counter() - start}
        record |= {
            "seconds": {key: record["seconds"].get(key, 0.0) + seconds[key] for key in seconds},
            "images": images.digest,
            "weights": images.settings["weights"],
        }
        self._lease.check()
        self._write(self.records() | {step: record})
        sampling, scoring = (f"{seconds[key]:.3g} s" for key in ("generate", "score"))
        print(
            f"step {step}: scored, after {sampling} of sampling and {scoring} of scoring",
            flush=True,
        )

    def _write(self, records: Mapping[int, Json]) -> None:
        """Writes metrics.jsonl in the order of steps, which need not be that of scoring, and the page."""
        lines = (canonical_json(records[step]) for step in sorted(records))
        atomic_write(self.folder / "metrics.jsonl", b"".join(lines))
        if (self.run / "metrics.jsonl").is_file() and (self.run / "config.yaml").is_file():
            write_page(self.run)


def _value(path: Path, *keys: str) -> Any:
    """Returns the value under these keys of a JSON file, None where it cannot be read: whoever opens
    the file for good says why.
    """
    try:
        value = read_json(path)
        for key in keys:
            value = value[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value
