"""`study run --print-sbatch`: the script of a SLURM array whose tasks are workers of one study."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import BadRequest
from ..study import Study

FAILED = 3  # exit code: some command failed
SAVING = 900  # seconds before the end of the time at which the worker is told to save
EARLY = 60  # seconds by which SLURM may tell it earlier
# minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]], as sbatch takes them
TIME = re.compile(r"(\d+)(?::(\d+))?(?::(\d+))?")
NAME = re.compile(r"[\w.,@+-]+")  # of a partition or an account
SCRIPT = """\
#!/bin/bash
# Made by `python -m eval study run --print-sbatch`: {workers} workers of one study, each on GPUs of its own. Submit it
# with sbatch. Add what your cluster asks for: --cpus-per-task, --mem, --constraint, modules.
{directives}
# --signal: SIGTERM to this shell {warning} s before the end of the time, which it hands on: the worker's commands save.
# Then the task is called back, and goes on. Who cancels does not want it back; SLURM itself calls back
# a task that is preempted, or whose node is lost.
cd {folder} || exit 2
end="${{SLURM_JOB_END_TIME:-9999999999}}"
is_end=no
early=no
worker=
# shellcheck disable=SC2317,SC2329 # the trap calls it
stop() {{
  [ "$(date +%s)" -lt $((end - {margin})) ] || is_end=yes
  if [ -n "$worker" ]; then kill -TERM "$worker"; else early=yes; fi
}}
trap stop TERM

"${{PYTHON:-{python}}}" {words} &
worker=$!
[ $early = no ] || kill -TERM "$worker" # a signal came before its number was known
wait "$worker"
code=$?
while kill -0 "$worker" 2>/dev/null; do # a signal ended the wait, not the worker
  wait "$worker"
  code=$?
done

# 0 is done for this worker; 2 and {failed} need a person.
case $is_end-$code in no-* | yes-0 | yes-2 | yes-{failed}) exit "$code" ;; esac
scontrol requeue "$SLURM_JOB_ID"
exit "$code"
"""


@dataclass(frozen=True)
class Array:
    """What a SLURM array asks for: how many workers, and for each its GPUs and time."""

    workers: int = 2
    gpus: int = 8
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None

    def __post_init__(self) -> None:
        for flag in ("partition", "account"):
            value = getattr(self, flag)
            if value is not None and not NAME.fullmatch(value):
                raise BadRequest(f"--{flag}: found {value!r}, expected a name as SLURM has it")
        self.seconds()

    def seconds(self) -> int:
        """Returns the seconds of the time; BadRequest where it is none."""
        days, dash, rest = self.time.rpartition("-")
        match = TIME.fullmatch(rest)
        if match is None or (dash and not days.isdecimal()):
            raise BadRequest(
                f"--time: found {self.time!r}, expected minutes, HH:MM:SS or D-HH:MM:SS, such as 24:00:00"
            )
        parts = [int(part) for part in match.groups() if part is not None]
        # days-hours[:minutes[:seconds]]; minutes[:seconds], or hours:minutes:seconds
        units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
        return int(days or 0) * 86400 + sum(n * unit for n, unit in zip(parts, units, strict=False))


def script(study: Study, array: Array, words: Sequence[str]) -> str:
    """Returns the script. `words`: of `study run`, from the YAML on. BadRequest where a training of the study has
    more processes than a worker has GPUs.
    """
    ranks = (study.config.ranks or 0) * study.jobs
    if array.gpus and ranks > array.gpus:
        raise BadRequest(
            f"--gpus: found {array.gpus}, expected at least {ranks}: {study.path} says ranks: {study.config.ranks}, "
            f"for {study.jobs} commands at a time"
        )
    name = "study-" + re.sub(r"[^\w.-]", "-", study.path.stem)
    warning = min(SAVING, array.seconds() // 4)
    flags = {
        "job-name": name,
        "array": f"0-{array.workers - 1}",
        "nodes": 1,
        "ntasks": 1,
        "gpus-per-node": array.gpus or None,
        "time": array.time,
        "partition": array.partition,
        "account": array.account,
        "signal": f"B:TERM@{warning}",
        "open-mode": "append",
        "output": f"{name}-%A-%a.log",
    }
    lines = [f"#SBATCH --{flag}={value}" for flag, value in flags.items() if value is not None]
    return SCRIPT.format(
        workers=array.workers, directives="\n".join([*lines, "#SBATCH --requeue"]), warning=warning,
        margin=warning + EARLY, folder=shlex.quote(str(Path.cwd())), python=_in_default(sys.executable),
        words=shlex.join(["-m", "eval", "study", "run", *words]), failed=FAILED,
    )  # fmt: skip


def _in_default(text: str) -> str:
    r"""Returns a text as it is written within "${NAME:-...}"."""
    return re.sub(r'([\\"$`}])', r"\\\1", text)
