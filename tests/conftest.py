"""What every test gets: no network, one thread, no limit to time but that of a test, and no GPU test where there is no
GPU.
"""

import os
import signal
import threading

import pytest
from hypothesis import HealthCheck, settings

from tests.forks import lighten
from tests.shards.objects import server, url  # noqa: F401 - fixtures: S3 on loopback

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["COLUMNS"] = "160"  # whatever terminal the tests are started from

# A shell that starts the tests in the background has them, and the processes that they start, ignore
# these, and what is ignored at the start stays ignored.
if threading.current_thread() is threading.main_thread():
    for number, default in {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGQUIT: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, default)

# A machine that has much else to do draws slowly, which says nothing of a test.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


# What takes longest is started first, so that no process is left alone with it at the end.
LONG = (
    "encode/run/test_faults.py",
    "train/step/test_learning.py",
    "train/test_run.py",
    "train/ranks/test_faults.py",
    "demo/test_pipeline.py",
    "encode/run/test_job.py",
    "shards/store/test_remote.py",
)


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
