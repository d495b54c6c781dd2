"""Items that threads make before they are asked for, in their order: one thread, or those of a pool."""

from __future__ import annotations

import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
# seconds for which `close` waits for the item in progress; storage may hang for ever
PATIENCE = 5.0


class _End:
    """Follows the last item: nothing more comes, or the error that ended the items."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Prefetcher(Iterator[Item], Generic[Item]):
    """The items of an iterator that runs in a thread of its own, up to `depth` of them made ahead.

    An error of the iterator is raised from `next`, in its turn and again ever after. `close` ends
    the thread once the item in progress is made; so does the end of this object, or of the
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
            item = self._take()
            if not isinstance(item, _End):
                return item
            self._end = item
        raise self._end.error or StopIteration

    def wait(self, seconds: float) -> bool:
        """Returns whether `next` would return or raise at once, after at most `seconds`."""
        items = self._queue
        with items.not_empty:
            return self._end is not None or items.not_empty.wait_for(
                lambda: bool(items.queue), seconds
            )

    def _take(self) -> Item | _End:
        while not self._stop.is_set():
            try:
                return self._queue.get(timeout=1.0)
            except queue.Empty:  # `close`, from another thread, leaves nobody who puts more
                continue
        return _End()


def _make(items: Iterable[Any], output: queue.Queue[Any], stop: threading.Event) -> None:
    end = _End()
    try:
        for item in items:
            if not _put(output, item, stop):
                return
    except BaseException as error:  # whatever it is, the consumer waits for it, and raises it
        end = _End(error)
    _put(output, end, stop)


def _put(output: queue.Queue[Any], item: Any, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            output.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False


def _halt(stop: threading.Event, thread: threading.Thread) -> None:
    """Ends the thread, also when the interpreter ends: a thread that is killed in the midst of a
    tensor takes the process with it.
    """
    stop.set()
    if thread is not threading.current_thread():
        thread.join(PATIENCE)


def map_ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Generator[Result, None, None]:
    """Yields function(item) of each item in order, made by the threads of a pool, up to `depth`
    items before their turn.

    An error of the function is raised in its turn. At the end, an error or `close`, what has not
    begun is cancelled and the rest waited for: what the function uses may be closed after that.
    """
    results: deque[Future[Result]] = deque()
    try:
        for item in items:
            results.append(pool.submit(function, item))
            if len(results) > depth:
                yield results.popleft().result()
        while results:
            yield results.popleft().result()
    finally:
        wait([result for result in results if not result.cancel()])
