"""What may befall processes that make one set of pictures; each ends in the set of one that nothing befell, byte for
byte, once the command is started again.

generate   ranks that are killed at a moment drawn by chance, 1 to 4 of them

Each function is one case: of the tests, and in greater numbers of the soak run.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from encode.models.vae import Vae
from encode.registry import ModelSpec
from eval.images.generate import Request, generate
from eval.images.imageset import ImageSetWriter
from eval.images.ranks import Rank
from tests.encode.toy import text_encoder
from tests.eval.models import save_run, save_text, save_vae
from tests.forks import fork, leave_pytest, stop_after, wait
from tests.memory import MEMORY, kept
from tests.soak.sweep import Case, Sweep

SCRATCH = os.environ.get("LATENTBANK_SCRATCH") or MEMORY
PROMPTS = 70  # more than a chunk of the text cache
MOMENTS = 20


@cache
def made() -> tuple[Path, Path]:
    """A folder with a run, its encoders and prompts, and the set that nothing befell."""
    torch.set_num_threads(1)  # a fork would wait for ever for threads that it does not have
    folder = kept(SCRATCH)
    vae = Vae(model("AutoencoderKL", save_vae(folder / "vae")))
    text = text_encoder(model("BertModel", save_text(folder / "text")), max_tokens=16)
    save_run(folder / "run", vae, text)
    words = ("red", "blue", "cat", "dog", "flag", "on", "the")
    chance = random.Random(0)
    prompts = [" ".join(chance.choices(words, k=1 + i % 7)) for i in range(PROMPTS)]
    (folder / "words.json").write_text(json.dumps(prompts))
    generate(request(folder, folder / "straight"))
    return folder, folder / "straight"


def model(cls: str, path: Path) -> ModelSpec:
    return ModelSpec.model_validate({"class": cls, "path": str(path)})


def request(folder: Path, save_dir: Path) -> Request:
    return Request(
        checkpoint=folder / "run",
        prompts=folder / "words.json",
        save_dir=save_dir,
        num_inference_steps=2,
        batch_size=4,
    )


def start(
    save_dir: Path, ranks: int, log: Path, only: tuple[int, ...] = (),
    before: Callable[[int], None] = lambda number: None,
) -> list[int]:  # fmt: skip
    """Processes of the ranks (or of some alone), each with what torchrun puts into its environment; their pids.
    Each does `before` first.
    """
    folder, _ = made()

    def work(number: int) -> None:
        before(number)
        os.environ.update(RANK=str(number), WORLD_SIZE=str(ranks), LOCAL_RANK=str(number))
        leave_pytest()
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        generate(request(folder, save_dir), rank=Rank.here())

    numbers = only or range(ranks)
    return [fork(lambda n=n: work(n), log.with_suffix(f".{n}")) for n in numbers]  # type: ignore[misc]


def content(save_dir: Path) -> dict[str, bytes]:
    """All files of a set but what says when and where it was made."""
    paths = [p for p in save_dir.rglob("*") if p.is_file()]
    actual = {p.relative_to(save_dir).as_posix(): p.read_bytes() for p in paths}
    manifest: dict[str, Any] = json.loads(actual.pop("manifest.json"))
    assert manifest.pop("complete"), manifest
    manifest.pop("provenance")
    return {**actual, "manifest": json.dumps(manifest, sort_keys=True).encode()}


def same(save_dir: Path) -> None:
    """The set is whole, and that of one process that nothing befell; what writes were cut short is passed over."""
    actual, expected = content(save_dir), content(made()[1])
    left = [name for name in actual if name.rpartition("/")[2].startswith(".tmp-")]
    assert not [name for name in left if name.startswith("images/")]
    for name in left:
        del actual[name]
    assert actual.keys() == expected.keys()
    assert [name for name in actual if actual[name] != expected[name]] == []


def killed(ranks: int, moment: int) -> None:
    """Kill all ranks somewhere between their start and their end, twice, and let them end."""
    chance = random.Random(f"{ranks} {moment}")
    made()
    with tempfile.TemporaryDirectory(dir=SCRATCH, prefix="fault-") as name:
        save_dir, log = Path(name) / "out", Path(name) / "log"
        for _ in range(2):
            pids = start(save_dir, ranks, log)
            if chance.random() < 0.3:  # while models are loaded and prompts encoded, as a rule
                time.sleep(0.8 * chance.random())
            else:
                await_files(save_dir, chance.randrange(PROMPTS), pids)
                time.sleep(0.02 * chance.random())
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            for pid in pids:
                wait(pid)
        pids = start(save_dir, ranks, log)
        codes = [wait(pid) for pid in pids]
        assert codes == [0] * ranks, [p.read_text() for p in log.parent.glob("log.*")]
        same(save_dir)


def stop_at_pictures(folder: Path, count: int) -> None:
    """Has this process, a fork, stop itself once it has written a picture and there are so many."""
    stop_after(ImageSetWriter, "save", lambda: len(list(folder.glob("images/*.png"))) >= count)


def await_files(save_dir: Path, count: int, pids: list[int]) -> None:
    """Until so many pictures are there, or nothing more comes."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if len(list((save_dir / "images").glob("*.png"))) >= count:
            return
        if all(os.waitid(os.P_PID, p, os.WEXITED | os.WNOHANG | os.WNOWAIT) for p in pids):
            return
        time.sleep(0.001)
    raise TimeoutError(f"not {count} pictures after a minute")


def copied(save_dir: Path, change: Callable[[Path], None]) -> Path:
    """The finished set elsewhere, with something done to it."""
    shutil.copytree(made()[1], save_dir)
    change(save_dir)
    return save_dir


def cases() -> list[Case]:
    return [("kill", ranks, moment) for ranks in (1, 2, 3, 4) for moment in range(MOMENTS)]


SWEEP = Sweep(
    "generate", "ranks, and a moment at which all of them are killed, twice", cases,
    lambda _, ranks, moment: killed(ranks, moment), lambda case: f"{case[1]} ranks",
)  # fmt: skip
