"""README and docs: their size, links, errors by name, and commands."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import configs
from encode import __main__ as encode_main
from eval import commands as eval_main
from shards import __main__ as shards_main
from tests import config_page
from tests.eval.study import costs
from train import __main__ as train_main
from train.config import TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FAMILIES = {  # module and the base of its named errors
    "shards.errors": "ShardsError",
    "encode.errors": "EncodeError",
    "eval.errors": "EvalError",
    "configs": "ConfigError",
    "train.checkpoints.checkpoint": "CheckpointError",
    "train.step.skips": "NonFiniteLoss",
}


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not target.startswith(("http://", "https://", "#")):
                yield page, target.partition("#")[0]


@pytest.mark.parametrize(("page", "target"), list(links()), ids=lambda value: str(value)[-40:])
def test_links_lead_somewhere(page: Path, target: str) -> None:
    assert (page.parent / target).exists()


@pytest.mark.parametrize(("module", "base"), FAMILIES.items())
def test_each_named_error_is_explained(module: str, base: str) -> None:
    names = re.findall(r"`(\w+)`", (ROOT / "docs/troubleshooting.md").read_text())
    family = getattr(importlib.import_module(module), base)
    errors = {cls.__name__ for cls in below(family) if cls.__module__ == module}
    errors |= {base} if not any(cls.__module__ == module for cls in below(family)) else set()
    assert errors - set(names) == set()


def below(cls: type) -> Iterator[type]:
    """Subclasses of a class at any depth."""
    for sub in cls.__subclasses__():
        yield sub
        yield from below(sub)


def test_the_page_of_keys_is_that_of_the_models() -> None:
    """After a change of a key, its default or the comment at it: `python -m tests.config_page`."""
    assert config_page.PAGE.read_text(encoding="utf-8") == config_page.page()


def test_the_costs_of_the_six_vaes_are_those_of_the_command() -> None:
    """After a change of what `study plan` says: `python -m tests.eval.study.costs`, and the sentence in studies.md."""
    page = costs.PAGE.read_text(encoding="utf-8")
    assert page == costs.page(page)
    totals = re.search(r"that `study run` does\*\* \| ([\d,]+) \| ([\d,]+) \|", page)
    assert totals
    text = " ".join((ROOT / "docs/studies.md").read_text(encoding="utf-8").split())
    assert f"{totals[1]} GPU hours of an H100 at 0.70 B parameters, {totals[2]} at 2.66 B" in text


def test_the_job_of_kuberay_is_one_pod_that_runs_a_study() -> None:
    """Its fields were compared with the schema of RayJob, ray.io/v1, of KubeRay 1.7."""
    page = (ROOT / "docs/running-studies.md").read_text(encoding="utf-8")
    block = re.search(r"```yaml\n(apiVersion: ray\.io/v1\n.*?)```", page, re.DOTALL)
    assert block
    job = yaml.safe_load(block[1])
    assert job["kind"] == "RayJob"
    spec, head = job["spec"], job["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert set(spec) == {
        "entrypoint",
        "runtimeEnvYAML",
        "submissionMode",
        "backoffLimit",
        "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished",
        "rayClusterSpec",
    }
    assert set(spec["rayClusterSpec"]) == {"rayVersion", "authOptions", "headGroupSpec"}
    verb = spec["entrypoint"].removeprefix("python -m eval study ")
    parser = argparse.ArgumentParser()
    eval_main.VERBS["study"][1](parser)
    assert str(parser.parse_args(verb.split()).study) == "/shared/flux.yaml"
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["HF_HUB_OFFLINE"] == "1"
    pod = head["template"]["spec"]
    (container,) = pod["containers"]
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    assert head["rayStartParams"]["num-gpus"] == resources["limits"]["nvidia.com/gpu"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


# Commands ------------------------------------------------------------------------------------------

# (package, verb) -> the test that runs it; the others need a GPU, a cluster or weights from outside
RUN_BY = {
    ("make", "demo"): "tests/demo/test_pipeline.py",
    ("make", "test"): "Makefile",
    ("shards", "info"): "tests/shards/tools/test_info.py",
    ("shards", "verify"): "tests/shards/tools/test_commands.py",
    ("shards", "repair"): "tests/shards/tools/test_commands.py",
    ("shards", "gc"): "tests/shards/tools/test_commands.py",
    ("shards", "digest"): "tests/shards/tools/test_commands.py",
    ("shards", "diff"): "tests/shards/tools/test_diff.py",
    ("shards", "convert"): "tests/shards/tools/test_commands.py",
    ("shards", "copy"): "tests/shards/tools/test_transfer.py",
    ("shards", "stage"): "tests/shards/tools/test_transfer.py",
    ("shards", "mask"): "tests/shards/tools/test_mask.py",
    ("shards", "norm"): "tests/shards/tools/test_norm.py",
    ("shards", "order"): "tests/shards/tools/test_commands.py",
    ("encode", "plan"): "tests/encode/plan/test_plan.py",
    ("encode", "run"): "tests/encode/run/test_job.py",
    ("encode", "check"): "tests/encode/models/test_check.py",
    ("encode", "status"): "tests/encode/report/test_status.py",
    ("encode", "retry-failed"): "tests/encode/run/test_job.py",
    ("encode", "download"): "tests/encode/source/test_download.py",
    ("encode", "pack"): "tests/encode/pack/test_pack.py",
    ("train", "CONFIG"): "tests/train/test_run.py",
    ("train", "init"): "tests/train/test_starter.py",
    ("train", "config"): "tests/test_keys.py",
    ("encode", "init"): "tests/demo/test_road.py",
    ("encode", "config"): "tests/test_keys.py",
    ("train", "plan"): "tests/train/plan/test_plan.py",
    ("train", "import"): "tests/train/checkpoints/test_reference.py",
    ("train", "export"): "tests/train/checkpoints/test_reference.py",
    ("eval", "generate"): "tests/eval/images/test_ranks.py",
    ("eval", "probe"): "tests/eval/report/test_panel.py",
    ("eval", "reconstruct"): "tests/eval/test_reconstruct.py",
    ("eval", "preview"): "tests/eval/latents/test_preview.py",
    ("eval", "prompts"): "tests/eval/prompts/test_fetch.py",
    ("eval", "score"): "tests/eval/distances/test_distances.py",
    ("eval", "fid"): "tests/eval/distances/test_distances.py",
    ("eval", "report"): "tests/eval/report/test_report.py",
    ("eval", "watch"): "tests/eval/test_watch.py",
    ("eval", "sweep"): "tests/eval/report/test_sweeps.py",
    ("eval", "train"): "tests/eval/test_online.py",
    ("eval", "study"): "tests/eval/study/test_run.py",
    ("ray", "job"): "tests/encode/run/test_job.py",
    ("sbatch", "configs/train/slurm.sbatch"): "tests/train/ranks/test_slurm.py",
}
STARTS = ("python ", "torchrun ", "latentbank ", "make ", "ray ", "sbatch ")


def commands() -> list[tuple[str, str]]:
    """Returns (page, command) of the indented blocks, comments and line ends taken away."""
    commands = []
    for page in PAGES:
        text = re.sub(r" *\\\n\s*", " ", page.read_text())
        for line in text.splitlines():
            command = re.sub(r"\s+#.*", "", line).strip()
            if line.startswith("    ") and command.startswith(STARTS):
                commands.append((page.name, command))
    return commands


def verb_of(command: str) -> tuple[str, str]:
    """Returns the package and verb, or the program and its first word."""
    if stage := re.search(r"-m (shards|encode|train|eval)\s+(\S+)", command):
        verb = stage[2]
        return stage[1], "CONFIG" if stage[1] == "train" and verb not in train_main.VERBS else verb
    program, word, *_ = command.split()
    return program, word


def test_commands_are_found() -> None:
    assert len(commands()) > 40
    assert {verb_of(command)[0] for _, command in commands()} >= {
        "shards",
        "encode",
        "train",
        "eval",
    }


@pytest.mark.parametrize(("page", "command"), commands())
def test_each_command_has_a_test_that_runs_it(page: str, command: str) -> None:
    assert verb_of(command) in RUN_BY, f"{page}: {command}"
    assert (ROOT / RUN_BY[verb_of(command)]).exists()


@pytest.mark.parametrize(
    ("page", "command"),
    [c for c in commands() if re.search(r"-m (shards|encode|train|eval) ", c[1])],
)
def test_each_command_is_one_that_the_program_takes(page: str, command: str) -> None:
    """Its verb and options exist; a config of the repository takes the keys that it sets."""
    package, verb = verb_of(command)
    words = shlex.split(command.partition(f"-m {package} ")[2])
    if "..." in words or "[a.b=value" in words:
        return  # the form of a command
    if verb == "CONFIG":
        config, *overrides = words
        if (ROOT / config).exists():
            configs.load(TrainConfig, ROOT / config, overrides)
        else:
            assert config == "CONFIG" or config.startswith("my/")  # which the user writes
        return
    match package:
        case "shards":
            shards_main.parser().parse_args(words)
        case "encode":
            parser = argparse.ArgumentParser()
            encode_main.add_options(verb, parser)
            parser.parse_intermixed_args(words[1:])
        case "train":
            train_main.verb_parser(verb)[0].parse_intermixed_args(words[1:])
        case "eval":
            parser = argparse.ArgumentParser()
            eval_main.VERBS[verb][1](parser)
            parser.parse_args(words[1:])
