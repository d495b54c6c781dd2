"""A packing that is killed, stopped or out of room: whole tars stay, and nothing is half-written."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from encode.pack.kinds import Options
from encode.pack.pack import pack
from tests.encode.pack.test_pack import CAPTION, COUNT, beside, write
from tests.encode.toy import jpeg


def test_a_killed_packing_goes_on_behind_its_last_whole_tar(tmp_path: Path) -> None:
    source = beside("txt", CAPTION)(tmp_path / "source")
    (source / "a/001.txt").unlink()
    code = (
        "import os, signal, sys; from pathlib import Path; from encode.pack import pack, writer\n"
        "publish, count = writer.Staged.publish, []\n"
        "def killed(self):\n"
        "    count.append(1)\n"
        "    if len(count) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return publish(self)\n"
        "writer.Staged.publish = killed\n"
        "pack.pack(Path(sys.argv[1]), Path(sys.argv[2]), pack.Options(rows=2))"
    )
    out = tmp_path / "out"
    process = subprocess.run([sys.executable, "-c", code, source, out], check=False)
    assert process.returncode == -signal.SIGKILL
    assert [p.name for p in sorted(out.glob("*"))] == [".packing", "00000.tar"]
    first = (out / "00000.tar").stat()
    packed = pack(source, out, Options(rows=2))
    assert (out / "00000.tar").stat().st_ino == first.st_ino
    fresh = pack(source, tmp_path / "fresh", Options(rows=2))
    assert fresh.record == packed.record
    assert packed.record["troubles"]["counts"] == {"without_caption": 1}
    assert [Path(t).read_bytes() for t in packed.tars] == [Path(t).read_bytes() for t in fresh.tars]
    assert not list(out.glob(".*"))


@pytest.mark.parametrize(
    ("words", "limit", "message"),
    [
        (["pack", "source", "out"], 4096, "NoRoom"),
        (["pack", "source", "out"], 30_000, "cannot pack into out"),
        (["run", "config.yaml"], 4096, "NoRoom"),
        (["run", "config.yaml"], 30_000, "cannot go on"),
    ],
)
def test_a_full_disk_has_a_message_and_leaves_nothing_half_written(
    words: list[str], limit: int, message: str, tmp_path: Path
) -> None:
    column = "{ kind: moments, encoder: flux, resolution: 256 }"
    write(
        tmp_path / "config.yaml",
        f"root: out\nsources: {{ mine: source }}\ncolumns: {{ flux: {column} }}",
    )
    beside("txt", CAPTION)(tmp_path / "source")
    for i in range(20):
        write(tmp_path / f"source/c/{i}.jpg", jpeg(i))
    limited = (
        f"import resource, runpy, sys; sys.argv = ['encode', *{words}]\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "runpy.run_module('encode', run_name='__main__', alter_sys=True)"
    )
    process = subprocess.run(
        [sys.executable, "-c", limited], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == 2, process.stderr
    assert message in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "out").exists()
    assert pack(tmp_path / "source", tmp_path / "out").record["rows"] == COUNT + 20


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_stopped_packing_says_how_to_go_on(name: str, tmp_path: Path) -> None:
    source = beside("txt", CAPTION)(tmp_path / "source")
    code = (
        "import os, signal, sys; from encode.pack import pack, writer\n"
        "publish = writer.Staged.publish\n"
        "def stopped(self):\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "    return publish(self)\n"
        "writer.Staged.publish = stopped\n"
        f"signal.signal(signal.{name}, signal.SIG_DFL)\n"
        "import argparse; parser = argparse.ArgumentParser(); pack.add_options(parser)\n"
        "sys.exit(pack.run_pack(parser.parse_args(['source', 'out', '--rows', '3'])))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == 128 + getattr(signal, name)
    assert process.stderr == f"stopped by {name}; run it again to go on from there\n"
    assert len(pack(source, tmp_path / "out", Options(rows=3)).tars) == 3
