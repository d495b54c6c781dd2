"""What becomes of pictures in a process that is short of memory.

    python -m tests.encode.scarce FOLDER MIB...

Prints, as JSON, for each file of the folder a list: what `decode` gives where so many MiB of address
space are left, "MemoryError" or its status and the digest of the pixels. Each is tried in a process
of its own that has never decoded anything large, whose free memory would serve.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from encode.source.images import decode

KINDS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "JPEG2000")


def limit(mebibytes: float) -> None:
    """Let this process have so much more address space than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + int(mebibytes * (1 << 20))
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def lift() -> None:
    """Take the limit away again."""
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def outcome(data: bytes, then: Callable[[], None] = lambda: None) -> str:
    """What `decode` gives; `then` is called before the pixels are looked at."""
    try:
        image, status = decode(data)
    except MemoryError:
        return "MemoryError"
    then()
    pixels = b"" if image is None else image.tobytes()
    return f"{status.name} {hashlib.sha256(pixels).hexdigest()[:16]}"


def limited(data: bytes, mebibytes: float) -> str:
    """The outcome in a forked process of that limit."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        limit(mebibytes)
        os.write(write, outcome(data, lift).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        found = pipe.read().decode()
    os.waitpid(child, 0)
    return found


if __name__ == "__main__":
    for kind in KINDS:  # loads the decoders
        buffer = io.BytesIO()
        Image.new("RGB", (9, 8)).save(buffer, kind)
        decode(buffer.getvalue())
    files = {path.name: path.read_bytes() for path in Path(sys.argv[1]).iterdir()}
    print(json.dumps({n: [limited(d, float(m)) for m in sys.argv[2:]] for n, d in files.items()}))
