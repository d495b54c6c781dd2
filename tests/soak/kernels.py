"""The fast tests that compare floating-point numbers, under each CPU kernel that this machine can run.

kernels   a test file, in a pytest of its own, under one kernel of OpenBLAS (numpy, scipy) and one of PyTorch

Libraries choose their kernels by the CPU, and results differ in the last digits: a test that holds for one kernel only
is green here and red elsewhere. Environment variables choose kernels too, but a library ignores without a word what it
does not know; so the libraries are asked which kernels they took before a test is believed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np

from tests.soak.sweep import Case, Sweep

ROOT = Path(__file__).parents[2]
SECONDS = 900  # a file takes 60 alone, and more where the machine has much else to do

# What the CPU must be able to do, as Linux names it.
AVX2 = {"avx2", "fma"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
OPENBLAS = {  # OPENBLAS_CORETYPE
    "Prescott": {"pni"},
    "Haswell": AVX2,
    "Zen": AVX2,
    "SkylakeX": AVX512,
}
PYTORCH = {  # ATEN_CPU_CAPABILITY
    "default": {"pni"},
    "avx2": AVX2,
    "avx512": AVX512,
}
# What a CPU of each generation takes, and what one does where OPENBLAS_CORETYPE is set for older builds of OpenBLAS.
PAIRS = (
    ("Prescott", "default"),
    ("Haswell", "avx2"),
    ("Zen", "avx2"),
    ("SkylakeX", "avx512"),
    ("Haswell", "avx512"),
)
# What PyTorch calls, oneDNN and MKL, as it would choose on a CPU that can do that and no more. MKL hears of its oldest
# kernels on every CPU, of the others on Intel's alone.
BESIDE = {
    "default": {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {},
}
CHOOSING = ("OPENBLAS_", "ATEN_", "ONEDNN_", "DNNL_", "MKL_", "NPY_")  # variables that are replaced

# What each library calls them. Where an OpenBLAS was built without those of one CPU it has another's there.
NAMES = {
    "openblas": {
        "Prescott": "Prescott|Katmai", "Haswell": "Haswell", "Zen": "Zen|Haswell", "SkylakeX": "SkylakeX",
    },
    "pytorch": {"default": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"},
    "onednn": {"default": "Intel SSE4.1", "avx2": "Intel AVX2", "avx512": "Intel AVX-?(512|10).*"},
    "mkl": {"default": "COMPATIBLE", "avx2": "OFF", "avx512": "OFF"},
}  # fmt: skip

FOLDERS = ("demo", "eval", "train")
FILES = (
    "encode/models/test_features.py",
    "encode/test_golden.py",
    "encode/source/test_images.py",
    "encode/models/test_packed.py",
    "encode/models/test_parity.py",
    "encode/models/test_rehearsal.py",
    "encode/models/test_text.py",
    "encode/models/test_vae.py",
    "shards/tools/test_diff.py",
    "shards/tools/test_info.py",
    "shards/read/test_latents.py",
    "shards/format/test_quantise.py",
    "shards/read/test_randomness.py",
)
LEFT_OUT = {
    "eval/prompts/test_benchmarks.py": "reads prompts",
    "eval/prompts/test_fetch.py": "downloads",
    "eval/test_hostile.py": "reads damaged files",
    "eval/prompts/test_prompts.py": "reads prompts",
    "eval/scores/test_results.py": "reads files",
    "eval/images/test_versions.py": "reads files of other versions",
    "train/model/test_architecture.py": "reads configs",
    "train/test_bad_input.py": "ends before anything is computed",
    "train/test_config.py": "reads configs",
    "train/ranks/test_faults.py": "kills processes, whose numbers train/test_run.py compares",
    "train/checkpoints/test_resume_cost.py": "counts reads",
}

# Asked in a process of its own, because a library chooses its kernels when it is loaded. oneDNN and MKL print theirs.
OF_OPENBLAS = """
import numpy, scipy.linalg, threadpoolctl
for library in threadpoolctl.threadpool_info():
    if library["internal_api"] == "openblas":
        print("openblas:" + library["architecture"])
"""
OF_PYTORCH = """
import torch
torch.set_num_threads(1)
torch.randn(99, 99) @ torch.randn(99, 99)
torch.conv2d(torch.randn(4, 32, 32, 32), torch.randn(64, 32, 3, 3))
print("pytorch:" + torch.backends.cpu.get_cpu_capability())
"""
ANSWERS = {
    "openblas": r"^openblas:(.*)$",  # numpy's and scipy's
    "pytorch": r"^pytorch:(.*)$",
    "onednn": r"^onednn_verbose.*,cpu,isa:(.*)$",
    "mkl": r"^MKL_VERBOSE.* CNR:(\S+)",
}


@cache
def flags() -> frozenset[str]:
    """What this CPU can do."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def environment(openblas: str, pytorch: str) -> dict[str, str]:
    """Of a process that takes these kernels, whatever this process takes."""
    found = np.show_config("dicts")["SIMD Extensions"].get("found", [])  # above the build's own
    newer = [f for f in found if pytorch == "default" or re.search("AVX512|V4", f)]
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(CHOOSING)},
        "OPENBLAS_CORETYPE": openblas,
        "ATEN_CPU_CAPABILITY": pytorch,
        **BESIDE[pytorch],
        "NPY_DISABLE_CPU_FEATURES": "" if pytorch == "avx512" else ",".join(newer),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip


@cache
def taken(openblas: str, pytorch: str, question: str) -> dict[str, set[str]]:
    """The kernels that libraries take in such a process, by their own account."""
    asked = {**environment(openblas, pytorch), "ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"}
    answer = subprocess.run(
        [sys.executable, "-c", question], env=asked, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    return {name: set(re.findall(line, answer, re.M)) for name, line in ANSWERS.items()}


def confirm(openblas: str, pytorch: str) -> None:
    """AssertionError where a library did not take the kernels that were chosen."""
    chosen = {"openblas": openblas, "pytorch": pytorch, "onednn": pytorch, "mkl": pytorch}
    found = taken(openblas, pytorch, OF_OPENBLAS + OF_PYTORCH)
    others = [
        f"{library} took {sorted(found[library])} where {setting} was chosen"
        for library, setting in chosen.items()
        if not all(re.fullmatch(NAMES[library][setting], name) for name in found[library])
    ]
    assert found["openblas"], "numpy and scipy do not use OpenBLAS"
    assert not others, "; ".join(others)


def files() -> list[str]:
    """Test files whose numbers follow from kernels, relative to tests/."""
    tests = ROOT / "tests"
    paths = [path for folder in FOLDERS for path in sorted((tests / folder).rglob("test_*.py"))]
    return [*FILES, *(f for p in paths if (f := str(p.relative_to(tests))) not in LEFT_OUT)]


def lacking(needed: set[str]) -> str:
    """What this CPU cannot do of that."""
    return ", ".join(sorted(needed - flags()))


@cache
def zen_is_haswell() -> bool:
    """Whether this OpenBLAS was built without kernels of Zen's own, and has Haswell's in their place."""
    return "Haswell" in taken("Zen", "default", OF_OPENBLAS)["openblas"]


def settings() -> list[tuple[str, str]]:
    """Pairs of kernels, of OpenBLAS and of PyTorch, that this machine has."""
    return [
        (a, b)
        for a, b in PAIRS
        if not lacking(OPENBLAS[a] | PYTORCH[b]) and (a != "Zen" or not zen_is_haswell())
    ]


def cases() -> list[Case]:
    return [(openblas, pytorch, file) for openblas, pytorch in settings() for file in files()]


def check(openblas: str, pytorch: str, file: str) -> None:
    confirm(openblas, pytorch)
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(ROOT / "tests" / file)],
        cwd=ROOT, env={**environment(openblas, pytorch), "COLUMNS": "300"}, capture_output=True, text=True,
    )  # fmt: skip
    if ended.returncode:
        failed = [line for line in ended.stdout.splitlines() if re.match("(FAILED|ERROR) ", line)]
        raise AssertionError("; ".join(failed) or (ended.stdout + ended.stderr)[-1000:])


def not_run() -> list[str]:
    """What the sweep leaves out on this machine, and why."""
    why = [
        f"{library} {name}: this CPU lacks {flags}"
        for library, kernels in (("OpenBLAS", OPENBLAS), ("PyTorch", PYTORCH))
        for name, needed in kernels.items()
        if (flags := lacking(needed))
    ]
    if not lacking(OPENBLAS["Zen"]) and zen_is_haswell():
        why.append("OpenBLAS Zen: this build has Haswell's kernels in its place, which are run")
    why += [f"tests/{file}: {reason}" for file, reason in LEFT_OUT.items()]
    return [*why, "tests marked slow", "other folders, whose tests compare no computed numbers"]


SWEEP = Sweep(
    "kernels", "a test file, under a kernel of OpenBLAS and one of PyTorch", cases, check,
    lambda case: f"{case[0]} and {case[1]}", seconds=SECONDS, not_run=not_run,
)  # fmt: skip
