"""The demo's steps, one command each: pictures, columns, reconstructions, and a study of the two VAEs.
What both VAEs need runs side by side, on a core each.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shards import atomic_write
from shards.format.atomic import read_json
from shards.processes import with_this_python

OUT = Path("demo")
CONFIGS = Path("configs/demo")
STUDY = CONFIGS / "study.yaml"
VAES = ("vae-plain", "vae-equi")
SOURCES = ("openmoji-val", "photos")  # held out, and seen by the VAEs in training
JOBS = 2  # commands of the study at a time, a core each
LICENCE = (
    "Drawings: OpenMoji (https://openmoji.org), CC BY-SA 4.0; pictures on this page keep that licence. Photographs: "
    "scikit-image and scikit-learn. demo-acc and demo-fd come from a small classifier of emoji, of use here alone. "
    "What a decoder loses here it loses in generated pictures, too."
)
Command = Sequence[str]


class StepFailed(RuntimeError):
    """A command of the demo ended with an error; its output is above."""

    exit_code = 1


def evaluate(verb: str, *words: object) -> list[str]:
    return ["python", "-m", "eval", verb, *map(str, words)]


def study_command(verb: str, *words: object) -> list[str]:
    """Returns a command of the demo's study, whose folder is the demo's."""
    return evaluate("study", verb, STUDY, "--out", OUT, *words)


def reconstruction(source: str, vae: str) -> Path:
    return OUT / "reconstructions" / f"{source}-{vae}"


def reconstruct_command(source: str, vae: str) -> list[str]:
    more: list[object] = []
    if source == SOURCES[0]:  # half-way to neighbours among the pictures that models are trained on
        more = ["--scores", "idemo-fd", "--neighbours_of", OUT / f"cache/openmoji/{vae}"]
    return evaluate(
        "reconstruct", OUT / f"cache/{source}/{vae}", "--tars", OUT / f"data/{source}",
        "--save_dir", reconstruction(source, vae), "--count", 280, "--batch_size", 70, *more,
    )  # fmt: skip


def score_commands() -> dict[str, Command]:
    """Returns a command a scorer of the held-out pictures that went through each VAE."""
    decoded = [reconstruction(SOURCES[0], vae) / "reconstruction" for vae in VAES]
    held_out = reconstruction(SOURCES[0], VAES[0]) / "original/images"
    return {
        "demo-fd": evaluate(
            "score", "demo-fd", *decoded, "--reference", held_out, "--label", "held-out"
        ),
        "demo-acc": evaluate("score", "demo-acc", *decoded),
    }


def report_command() -> list[str]:
    """Returns the command that makes the page of the reconstructions."""
    folders = [reconstruction(source, vae) for source in SOURCES for vae in VAES]
    return evaluate("report", *folders, "--out", OUT / "reconstructions.html", "--note", LICENCE)


def main() -> int:
    with timed("pictures"):
        together({"pictures": ["python", "-m", "eval.demo.data", f"{OUT}/data"]})
    with timed("columns"):
        together({"encode": ["python", "-m", "encode", "run", str(CONFIGS / "encode.yaml")]})
    with timed("reconstructions"):
        for source in SOURCES:
            together({vae: reconstruct_command(source, vae) for vae in VAES})
        together(score_commands())
        together({"report": report_command()})
    with timed("study"):
        together({"study": study_command("run", "--jobs", JOBS)})
        together({"report": study_command("report")})
    summarise()
    return 0


def summarise() -> None:
    """Writes OUT/summary.json, a small part of OUT/study.json: the verdicts and each entry's scores.

    verdicts[]   entry, outcome, title, sentence
    seeds, step, prompts
    scores       {scorer: {better, entries: {entry: {value, low, high, by_seed}}}}, the verdict's first
    """
    study = read_json(OUT / "study.json")
    names = [entry["name"] for entry in study["entries"]]
    scores = {
        score["scorer"]: {
            "better": score["better"],
            "entries": {
                name: {
                    key: (entry["over_seeds"] or {}).get(key) for key in ("value", "low", "high")
                }
                | {"by_seed": {seed: value["value"] for seed, value in entry["by_seed"].items()}}
                for name, entry in zip(names, score["entries"], strict=True)
            },
        }
        for score in study["scores"]
    }
    summary = {key: study[key] for key in ("verdicts", "seeds", "step", "prompts")}
    atomic_write(OUT / "summary.json", json.dumps(summary | {"scores": scores}, indent=1).encode())
    print(f"\n{OUT / 'report.html'}  {OUT / 'summary.json'}  {OUT / 'reconstructions.html'}")


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Prints a stage's name, and its wall seconds at its end."""
    print(f"\n== {name}", flush=True)
    start = time.perf_counter()
    yield
    print(f"== {name}: {time.perf_counter() - start:.0f} s", flush=True)


def together(commands: dict[str, Command]) -> None:
    """Runs commands side by side, a core each, their output line by line behind their names.

    Raises StepFailed, and ends the others, as soon as one fails.
    """
    running = {}
    for name, command in commands.items():
        print(f"$ {shlex.join(command)}", flush=True)
        running[name] = subprocess.Popen(
            with_this_python(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    readers = [
        threading.Thread(target=relay, args=(name if len(running) > 1 else "", process))
        for name, process in running.items()
    ]
    for reader in readers:
        reader.start()
    try:
        while any(process.poll() is None for process in running.values()):
            if any(process.poll() for process in running.values()):
                break
            time.sleep(0.2)
    finally:
        for process in running.values():
            if process.poll() is None:
                process.terminate()
        for reader in readers:
            reader.join()
    codes = {name: code for name, process in running.items() if (code := process.wait())}
    if codes:
        raise StepFailed(f"exit codes {codes}; their output is above. Run again to go on")


def relay(name: str, process: subprocess.Popen[str]) -> None:
    """Prints a process's lines, behind its name if it has one."""
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{name + ' | ' if name else ''}{line.rstrip()}", flush=True)
