"""How commands end: codes, messages, Ctrl-C at any moment, outputs that cannot be written."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from shards.early import starts_command
from shards.exits import IN_THE_WAY, MAKE_ROOM, explained
from tests.shards.toy import moments_spec, write_column

ROOT = Path(__file__).parents[2]
NOWHERE = "/nowhere/file"
# sends SIGINT to the interpreter as soon as it looks for a module
INTERRUPTS = """
import os, signal, sys
class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts())
"""
SCRIPT = "import sys; from configs.latentbank import main; sys.exit(main())"  # as pip writes it
COMMANDS = {
    "encode": ["-m", "encode", "plan", "configs/demo/encode.yaml"],
    "shards": ["-m", "shards", "verify", "COLUMN"],
    "train": ["-m", "train", "configs/train/cpu.yaml", "data.latents=COLUMN", "data.text=COLUMN"],
    "eval": ["-m", "eval", "report", "nothing"],
    "demo": ["-m", "eval.demo", "--help"],
    "script": ["SCRIPT", "encode", "plan", "configs/demo/encode.yaml"],
}
MOMENTS = [  # modules that a command loads; those before `shards.exits` are its start
    ("encode", "shards.errors"), ("encode", "pydantic"), ("encode", "encode.plan.plan"),
    ("shards", "numpy"), ("shards", "shards.tools.verify"),
    ("train", "train.config"), ("train", "train.run"), ("train", "torch.nn"),
    ("eval", "eval.commands"), ("eval", "eval.report.report"),
    ("demo", "shards.exits"),
    ("script", "yaml"), ("script", "encode"), ("script", "encode.plan.plan"),
]  # fmt: skip


def process(
    words: Sequence[object], folder: Path, **options: object
) -> subprocess.CompletedProcess[str]:
    """Runs python; COLUMN and SCRIPT stand for a column and the script `latentbank`."""
    if "SCRIPT" in words:
        (folder / "latentbank").write_text(SCRIPT)
    if any("COLUMN" in str(word) for word in words):
        write_column(folder / "column", moments_spec())
    paths = {"COLUMN": folder / "column", "SCRIPT": folder / "latentbank"}
    line = [str(word) for word in words]
    for name, path in paths.items():
        line = [word.replace(name, str(path)) for word in line]
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1"}
    more = {"env": environment, "stdout": subprocess.PIPE, **options}
    return subprocess.run(
        [sys.executable, *line], cwd=ROOT, text=True, stderr=subprocess.PIPE, timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **more,
    )  # type: ignore[call-overload,no-any-return]  # fmt: skip


def test_a_command_opens_as_many_files_as_it_may(tmp_path: Path) -> None:
    code = (
        "import resource\nfrom shards.exits import run\n"
        "_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))\n"
        "run(lambda: print(*resource.getrlimit(resource.RLIMIT_NOFILE)))"
    )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert hard > 256
    result = process(["-c", code], tmp_path)
    assert result.stdout == f"{min(hard, 1 << 17)} {hard}\n", result.stderr


# Errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("return None", 0, ""),
        ("return 3", 3, ""),
        ("raise ConfigError('found x, expected y')", 2, "ConfigError: found x, expected y\n"),
        ("raise Bug('oops')", 1, "Traceback"),
        (f"open({NOWHERE!r})", 2,
         f"FileNotFoundError: [Errno 2] No such file or directory: '{NOWHERE}'. Check the path\n"),
        ("open('/dev/null/file', 'w')", 2,
         f"NotADirectoryError: [Errno 20] Not a directory: '/dev/null/file'. {IN_THE_WAY}\n"),
        ("with atomic.naming('/dev/full'), open('/dev/full', 'w') as file: file.write('x')", 2,
         f"OSError: [Errno 28] No space left on device: '/dev/full'. {MAKE_ROOM}\n"),
    ],
)  # fmt: skip
def test_errors_become_a_message_or_keep_their_traceback(
    body: str, code: int, stderr: str, tmp_path: Path
) -> None:
    script = (
        "import errno\nfrom configs import ConfigError\nfrom shards.exits import run\n"
        "from shards.format import atomic\n"
        f"class Bug(Exception): pass\ndef main():\n    {body}\nrun(main)\n"
    )
    result = process(["-c", script], tmp_path)
    assert result.returncode == code, result.stderr
    if stderr == "Traceback":
        assert "Traceback" in result.stderr
    else:
        assert result.stderr == stderr


def test_every_error_of_a_disk_has_a_remedy() -> None:
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EMFILE", "ENFILE", "EFBIG"):
        number = getattr(errno, name)
        explanation = explained(OSError(number, os.strerror(number), "/a/path"))
        assert explanation is not None
        assert explanation[0] == 2
        assert "'/a/path'. " in explanation[1]
    for fault in (
        ValueError("x"),
        OSError(errno.EINVAL, "x", "/a"),
        OSError("of a library, without a number"),
        BrokenPipeError(errno.EPIPE, "of a worker"),
        FileNotFoundError(errno.ENOENT, "without a path"),
    ):
        assert explained(fault) is None


def test_too_many_open_files(tmp_path: Path) -> None:
    limited = (
        "import resource, sys, shards.tools.info\n"
        "from shards.__main__ import main\nfrom shards.exits import run\n"
        "sys.argv = ['shards', 'info', 'COLUMN']\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "run(main)"
    )
    result = process(["-c", limited], tmp_path)
    assert result.returncode == 2, result.stderr
    assert "Too many open files" in result.stderr
    assert "ulimit -n" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_output_on_a_full_disk(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        result = process(["-m", "encode"], tmp_path, stdout=full)
    message = f"OSError: [Errno 28] No space left on device: '<stdout>'. {MAKE_ROOM}\n"
    assert (result.returncode, result.stderr) == (2, message)


# Ctrl-C --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "moment"), MOMENTS)
def test_ctrl_c_while_modules_are_loaded(command: str, moment: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTS)
    os.environ["INTERRUPT_AT"] = moment
    try:
        result = process(COMMANDS[command], tmp_path)
    finally:
        del os.environ["INTERRUPT_AT"]
    assert result.returncode == 130, result.stderr
    assert result.stderr.startswith("stopped by SIGINT") or not result.stderr
    assert result.stderr.count("\n") <= 1


@pytest.mark.parametrize(
    "raised",
    ["raise ImportError('a module that was interrupted') from None", "sys.exit(1)", "return 1"],
)
def test_ctrl_c_of_which_a_library_makes_something_else(raised: str, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom shards.exits import run\n"
        "def main():\n"
        "    try: os.kill(os.getpid(), signal.SIGINT)\n"
        f"    except KeyboardInterrupt: {raised}\n"
        "run(main)"
    )
    result = process(["-c", code], tmp_path)
    if raised == "return 1":  # the command has an end of its own
        assert (result.returncode, result.stderr) == (1, "")
    else:
        assert (result.returncode, result.stderr) == (130, "stopped by SIGINT\n")


@pytest.mark.parametrize(
    ("work", "stopped"),
    [("run(work)", "stopped by SIGINT\n"),
     ("run(lambda: stoppable(work))", "stopped by SIGINT; run it again to go on from there\n")],
    ids=["run", "stoppable"],
)  # fmt: skip
def test_ctrl_c_within_a_finaliser_is_not_lost(work: str, stopped: str, tmp_path: Path) -> None:
    code = (
        "import os, signal, time\nfrom shards.exits import run\nfrom shards.signals import stoppable\n"
        "class Resource:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGINT)\n"
        "def work():\n"
        "    resource = Resource()\n"
        "    del resource\n"
        "    time.sleep(60)\n"
        f"{work}"
    )
    result = process(["-c", code], tmp_path)
    assert (result.returncode, result.stderr) == (130, stopped)


@pytest.mark.parametrize("work", ["run(work)", "run(lambda: stoppable(work))"])
def test_ctrl_c_waits_for_no_thread(work: str, tmp_path: Path) -> None:
    """Such as one that hangs in the storage: the interpreter would, at its end."""
    code = (
        "import os, signal, threading, time\nfrom shards.exits import run\n"
        "from shards.signals import stoppable\n"
        "def work():\n"
        "    threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "    print('begun')\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        f"{work}"
    )
    result = process(["-c", code], tmp_path)
    assert (result.returncode, result.stdout) == (130, "begun\n"), result.stderr


def test_ctrl_c_while_the_interpreter_ends_changes_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom shards.exits import run\n"
        "class Last:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGINT, write=os.write):\n"
        "        kill(pid, number)\n"
        "        write(1, b'finalised')\n"
        "last = Last()\n"  # modules are cleared after the exit functions
        "run(lambda: 0)"
    )
    result = process(["-c", code], tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "finalised", "")


def test_a_program_that_imports_the_packages_keeps_its_own_ctrl_c(tmp_path: Path) -> None:
    code = "import signal; h = signal.getsignal(signal.SIGINT); import shards, configs, encode, train; print(h is "
    code += "signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert process(["-c", code], tmp_path).stdout == "True\n"
    for words, original, expected in (
        (["-m"], ["python", "-u", "-m", "train", "CONFIG"], True),
        (["-m"], ["python", "-m", "eval.demo"], True),
        (["-m"], ["python", "-m", "pytest", "-m", "train"], False),
        (["tool.py", "-m"], ["python", "tool.py", "-m", "train"], False),
        ([""], ["python"], False),
        (["-m"], ["python", "-m"], False),
    ):
        assert starts_command(words, original) is expected
