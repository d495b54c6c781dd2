"""The records that a run has written so far: a file of JSON lines, in the order of their steps."""

import json
import mmap
from pathlib import Path


def forget_after(path: Path, step: int) -> None:
    """Drop the records of steps after `step`, which are from before a crash, and a last line that it cut off.

    Looks at the end of the file only: after a million steps it costs what it costs after ten."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
            end = lines.rfind(b"\n") + 1
            while end:
                start = lines.rfind(b"\n", 0, end - 1) + 1
                if json.loads(lines[start:end])["step"] <= step:
                    break
                end = start
        file.truncate(end)
