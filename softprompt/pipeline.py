"""Batches made ahead: a thread reads, packs and places them while the device computes."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import jax

T = TypeVar("T")
# How often a waiting main thread looks whether the device has run out of work, in seconds.
LOOK = 0.001


class Prefetch(Generic[T]):
    """An iterator's values, made ahead by a thread and given in their order.

    Used as a context, which ends the thread. Whatever the iterator raises is raised by `next` in
    its place in the order, as it was; so is its end (StopIteration).

    Args:
      batches: read by the thread alone.
      place: applied to each in the thread, for example a transfer to the device. It must not wait
        for other processes.
      ahead: how many finished ones may wait; the thread makes no more.

    >>> with Prefetch(iter([1, 2]), lambda x: 10 * x) as values:
    ...     values.next(), values.next()
    (10, 20)
    """

    def __init__(self, batches: Iterator[Any], place: Callable[[Any], T], ahead: int = 4):
        self._batches, self._place = batches, place
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="batches", daemon=True)
        self.waited = 0.0
        self._thread.start()

    def _fill(self) -> None:
        while not self._stop.is_set():
            try:
                item = (self._place(next(self._batches)), None)
            except BaseException as error:  # raised in the main thread instead
                item = (None, error)
            while not self._stop.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if item[1] is not None:
                return

    def next(self, last: jax.Array | None = None) -> T:
        """The next value.

        `last` is a result of the step that was dispatched last. Time spent here while that step
        still computes is no loss; what is spent after it is added to `waited` (seconds), without
        waiting for the device.
        """
        idle_since = None
        while True:
            if idle_since is None and (last is None or last.is_ready()):
                idle_since = time.perf_counter()
            try:
                value, error = self._ready.get(timeout=LOOK if idle_since is None else 0.1)
                break
            except queue.Empty:
                continue
        if idle_since is not None:
            self.waited += time.perf_counter() - idle_since
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        """Ends the thread; it finishes the value it is at."""
        self._stop.set()
        self._thread.join()
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
