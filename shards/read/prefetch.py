"""An iterator whose items are made in a thread, before they are asked for."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
PATIENCE = (
    5.0  # seconds for which `close` waits for the item in progress; storage may hang for ever
)


class _End:
    """What stands behind the last item: nothing, or the error that ended them."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Ahead(Iterator[Item], Generic[Item]):
    """The items of another iterator, up to `depth` of them made ahead. What goes wrong there is raised from `next`,
    in its turn and again ever after.

    `close` ends the thread once the item that it works on is made; so does the end of this object, or of the
    interpreter. A thread that hangs is left behind after PATIENCE seconds.
    """

    def __init__(self, items: Iterable[Item], depth: int, name: str) -> None:
        self._queue: queue.Queue[Item | _End] = queue.Queue(depth)
        self._end: _End | None = None
        self._stop = threading.Event()
        thread = threading.Thread(
            target=_make, name=name, daemon=True, args=(items, self._queue, self._stop)
        )
        self.close: Callable[[], Any] = weakref.finalize(self, _halt, self._stop, thread)
        thread.start()

    def __next__(self) -> Item:
        if self._end is None:
            item = self._taken()
            if not isinstance(item, _End):
                return item
            self._end = item
        raise self._end.error or StopIteration

    def wait(self, seconds: float) -> bool:
        """Returns whether `next` would return or raise at once, after waiting `seconds` at most for that."""
        items = self._queue
        with items.not_empty:
            return self._end is not None or items.not_empty.wait_for(
                lambda: bool(items.queue), seconds
            )

    def _taken(self) -> Item | _End:
        while not self._stop.is_set():
            try:
                return self._queue.get(timeout=1.0)
            except (
                queue.Empty
            ):  # only `close`, from another thread, leaves a thread that puts nothing more
                continue
        return _End()


def _make(items: Iterable[Any], made: queue.Queue[Any], stop: threading.Event) -> None:
    end = _End()
    try:
        for item in items:
            if not _put(made, item, stop):
                return
    except BaseException as error:  # whatever it is, the consumer waits for it, and raises it
        end = _End(error)
    _put(made, end, stop)


def _put(made: queue.Queue[Any], item: Any, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            made.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False


def _halt(stop: threading.Event, thread: threading.Thread) -> None:
    """End the thread, also when the interpreter ends: killed in the midst of a tensor, it would take the process with
    it.
    """
    stop.set()
    if thread is not threading.current_thread():
        thread.join(PATIENCE)
