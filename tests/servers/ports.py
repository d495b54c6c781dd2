"""Ports of loopback for servers that tests start."""

import secrets
import socket
from contextlib import suppress
from pathlib import Path


def free_port() -> int:
    """A port that nothing uses, and that no other process gets by chance: not one of those that the kernel hands
    out, where it leaves some.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = range(20_000, first if first > 21_000 else 60_000)
    while True:
        port = secrets.choice(ports)
        with socket.socket() as place, suppress(OSError):
            place.bind(("127.0.0.1", port))
            return port
