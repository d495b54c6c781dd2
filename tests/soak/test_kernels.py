"""Tests under chosen kernels: what fails is named, and a library that took other kernels is noticed."""

from pathlib import Path

import pytest

from tests.soak import kernels

pytestmark = pytest.mark.skipif(not kernels.flags(), reason="needs the CPU flags of Linux on x86")
OLDEST = ("Prescott", "default")  # which every such CPU runs

TESTS = """
import numpy, os, pytest, torch

def test_that_holds():
    assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    assert os.environ["OPENBLAS_CORETYPE"] == "Prescott"
    assert "OPENBLAS_L2_SIZE" not in os.environ

def test_that_holds_elsewhere():
    assert torch.backends.cpu.get_cpu_capability() != "DEFAULT", "for one kernel only"
"""


def test_a_test_that_holds_for_other_kernels_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENBLAS_L2_SIZE", "512")
    file = tmp_path / "test_two.py"
    file.write_text(TESTS)
    with pytest.raises(
        AssertionError, match=r"^FAILED \S+test_two.py::test_that_holds_elsewhere - [^;]*$"
    ):
        kernels.check(*OLDEST, str(file))


def test_variables_that_are_not_heard_fail_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    misspelt = dict.fromkeys(
        ("OPENBLAS_CORETYPE", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"), "?"
    )
    usual = kernels.environment(*OLDEST)
    monkeypatch.setattr(kernels, "environment", lambda *_: usual | misspelt)
    monkeypatch.setattr(kernels, "taken", kernels.taken.__wrapped__)  # without its cache
    with pytest.raises(AssertionError, match=r"openblas took .*pytorch took .*onednn took "):
        kernels.confirm(*OLDEST)


def test_every_file_that_is_named_exists() -> None:
    tests = kernels.ROOT / "tests"
    for file in (*kernels.files(), *kernels.LEFT_OUT):
        assert (tests / file).is_file()
    assert not set(kernels.files()) & set(kernels.LEFT_OUT)
