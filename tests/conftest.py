"""What every test gets: no network, one thread, no limit to time but that of a test, and no GPU test where there is no
GPU.
"""

import os

import pytest
from hypothesis import HealthCheck, settings

from tests.forks import lighten
from tests.shards.objects import server, url  # noqa: F401 - fixtures: S3 on loopback

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A machine that has much else to do draws slowly, which says nothing of a test.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


# What takes longest is started first, so that no process is left alone with it at the end.
LONG = (
    "encode/test_faults.py", "train/test_learning.py", "train/test_run.py", "train/test_faults.py", "demo/test_road.py",
    "encode/test_job.py", "shards/test_remote.py",
)  # fmt: skip


def _turn(item: pytest.Item) -> int:
    file = item.path.as_posix()
    return next((i for i, name in enumerate(LONG) if file.endswith(name)), len(LONG))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_turn)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # only now: the import takes two seconds

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """All that tests import is there, and they fork some thousand times."""
    if not session.config.option.collectonly:
        lighten()
