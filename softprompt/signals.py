"""SIGTERM and Ctrl-C in a training: when it stops, and what it ends in."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from softprompt import hosts
from softprompt.logbook import say


class Stopped(BaseException):
    """SIGTERM or Ctrl-C, within `Asked.at_once`."""


class Asked:
    """Called after each step, says whether a signal asks to stop.

    `pending` says whether one came here, without asking other processes.
    """

    def __init__(self, asked: Callable[[int], bool], pending: Callable[[], bool] = lambda: False):
        self._asked, self._pending = asked, pending
        self.now = False  # Whether a signal stops what is done now.

    def __call__(self, step: int) -> bool:
        return self._asked(step)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it a signal, or one that came before, raises `Stopped`: of what is done again.

        Not in several processes, which would go apart, and not where none is heard.
        """
        self.now = True
        try:
            if self._pending():
                raise Stopped
            yield
        finally:
            self.now = False


@contextlib.contextmanager
def termination(saves: bool) -> Iterator[Asked]:
    """Yields what tells after each step whether SIGTERM or Ctrl-C, which end nothing here, came.

    After Ctrl-C the context ends in KeyboardInterrupt; a second one, and a run that `saves`
    nothing, does not wait for the step. Of several processes any may get either, and a first Ctrl-C
    is to it as SIGTERM: the coordination service, without the devices, picks a step that none has
    passed yet, and there all are told to stop.
    """
    # A shell starts what it puts into the background with Ctrl-C ignored, and so it stays.
    heard = saves and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    if hosts.several():
        before = None
        if heard and threading.current_thread() is threading.main_thread():

            def pass_on(number: int, frame: Any) -> None:
                del frame
                signal.signal(number, signal.default_int_handler)
                os.kill(os.getpid(), signal.SIGTERM)

            before = signal.signal(signal.SIGINT, pass_on)
        try:
            yield Asked(multihost_utils.reached_preemption_sync_point)
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)
        return
    if threading.current_thread() is not threading.main_thread():
        yield Asked(lambda step: False)
        return
    asked: set[int] = set()
    told = Asked(lambda step: bool(asked), lambda: bool(asked))

    def ask(number: int, frame: Any) -> None:
        del frame
        if number in asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.add(number)
        if told.now:
            told.now = False
            raise Stopped
        if number == signal.SIGINT:
            # A line that is being written when the signal comes takes no other in its midst.
            with contextlib.suppress(RuntimeError):
                say("stopping after this step, which is saved; Ctrl-C again stops at once")

    numbers = (signal.SIGTERM, signal.SIGINT) if heard else (signal.SIGTERM,)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGINT in asked:
        raise KeyboardInterrupt


def clear_caches() -> None:
    """`jax.clear_caches` between trainings, during which Ctrl-C waits.

    It calls back as weak references end, where Python prints what is raised, and loses it.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or not callable(signal.getsignal(signal.SIGINT)):
        jax.clear_caches()
        return
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        jax.clear_caches()
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt
