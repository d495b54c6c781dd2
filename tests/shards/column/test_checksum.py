"""The checksum of rows."""

from __future__ import annotations

import google_crc32c
import numpy as np
import pytest

from shards.column.checksum import LARGE, crc32c


@pytest.mark.parametrize("size", [0, 1, 9, LARGE - 1, LARGE, LARGE + 1, 1 << 20])
def test_the_sum_is_that_of_the_library(size: int) -> None:
    """Of small data and large, of what may be written to and what may not, at odd addresses too."""
    data = np.random.default_rng(size).integers(0, 256, size + 1, dtype=np.uint8)
    expected = int(google_crc32c.value(data[1:].tobytes()))
    view = memoryview(data)[1:]
    for form in (data[1:], view, view.toreadonly(), bytes(view), bytearray(view)):
        assert crc32c(form) == expected
    if size % 2 == 0:
        assert crc32c(np.frombuffer(data[1:].tobytes(), np.float16)) == expected


def test_the_check_value_of_the_sum() -> None:
    """RFC 3720, B.4: 32 bytes of zeros, of ones, and 0 to 31."""
    sums = {bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, bytes(range(32)): 0x46DD794E}
    for data, expected in sums.items():
        assert crc32c(data) == expected
        assert crc32c(data * 4096) == int(google_crc32c.value(data * 4096))
