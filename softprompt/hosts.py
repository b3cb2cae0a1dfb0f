"""Many processes as one run: how they start, what they agree on, who writes, how they end.

Every process runs the same program on arrays that span them all, so all must call the functions
marked *collective* here in the same order. With one process each function is the plain thing it
says: no other branch exists for one host.
"""

import contextlib
import json
import math
import os
import pickle
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # The coordination service's store has no public name.
from jax.experimental import multihost_utils

from softprompt import mistakes

T = TypeVar("T")
# Seconds in which all processes of a job must have started, and those between two lines meanwhile.
START_TIMEOUT, REMINDER = 300, 15
# Seconds that a process which fails gives the others to say that they do, too.
LAST_WORDS = 3
# What processes agree on, in this order, or where they tell each other why not; and that they fail.
AGREEMENTS = ("settings", "data")
FAILED = "failed"
_agreed: set[str] = set()
# How the errors of a job's communication begin, of whichever class.
LOST = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")
# A process that has sent no sign of life for so many seconds is lost, and the others end.
HEARTBEAT_TIMEOUT = 30
# Bytes sent to the other processes at a time, each through a device's memory.
CHUNK = 1 << 26


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    distributed: str | None = None,
) -> None:
    """Joins this process to its job, before any device is used; without arguments it stays alone.

    Args:
      coordinator_address: `host:port` at which process 0 is reached, the same for all.
      num_processes, process_id: how many there are, and which one this is, from 0.
      distributed: 'auto' takes what is not given from the cluster (SLURM, TPU pods, Kubernetes,
        Open MPI: see `jax.distributed.initialize`).

    Raises:
      ValueError: flags that do not fit together, no cluster found, or no coordinator reached.
    """
    given = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    if all(value is None for value in given.values()) and distributed is None:
        return
    missing = [name for name, value in given.items() if value is None]
    if distributed is None and missing:
        raise ValueError(
            f"a run of several processes needs {', '.join(given)}, got no {', '.join(missing)}; "
            f"--distributed=auto takes them from the cluster"
        )
    if coordinator_address is not None:
        named = re.fullmatch(r".+:(\d+)", coordinator_address)
        if not named or not 0 < int(named[1]) < 2**16:
            raise ValueError(
                f"--coordinator_address is {coordinator_address!r}, expected HOST:PORT, its port "
                f"from 1 to 65535"
            )
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"--num_processes is {num_processes}, expected at least 1")
    if None not in (process_id, num_processes) and not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id is {process_id}, expected 0 to {num_processes - 1}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    who = "a process of a job" if process_id is None else f"process {process_id} of {num_processes}"
    where = f" at {coordinator_address}" if coordinator_address else ""
    try:
        with _waiting(f"{who} waits for the others{where}"):
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
                cluster_detection_method=None if distributed else "deactivate",
                initialization_timeout=2 * START_TIMEOUT,  # It would abort.
            )
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        hint = "; give " + ", ".join(missing) if missing else ""
        raise ValueError(f"the job of several processes did not start: {reason}{hint}") from None


@contextlib.contextmanager
def _waiting(what: str) -> Iterator[None]:
    """Within it, `what` is said now and again; Ctrl-C, or `START_TIMEOUT`, ends the process.

    JAX waits for the other processes where no exception of Python's reaches it.
    """
    done = threading.Event()

    def remind():
        began = time.monotonic()
        while not done.wait(REMINDER):
            passed = time.monotonic() - began
            print(f"{what} ({passed:.0f} s)", file=sys.stderr, flush=True)
            if passed > START_TIMEOUT:
                said = f"softprompt: the job of several processes did not start: {what}, in vain"
                print(said, file=sys.stderr, flush=True)
                os._exit(2)

    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.getsignal(signal.SIGINT)
        if before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=remind, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        if before is not None:
            signal.signal(signal.SIGINT, before)


def agree(what: str, own: Mapping[str, Any]) -> None:
    """Raises, on every process, unless all of a job have the same settings or data. Collective.

    A process that failed before it came here (see `job`) has told the others why, and they end with
    it. No device is used.

    Args:
      what: one of `AGREEMENTS`.
      own: what must be the same, by name; compared as texts.
    """
    _, count = _place()
    if count == 1 or what in _agreed:
        return
    _tell(what, json.dumps({"own": {name: f"{value}" for name, value in own.items()}}))
    every = [json.loads(_told(what, number)) for number in range(count)]
    for number, told in enumerate(every):
        if "error" in told:
            error, who = told["error"], f"process {number} of {count}"
            raise ValueError(error if error.startswith("process ") else f"{who}: {error}")
    for number, told in enumerate(every):
        here, there = told["own"], every[0]["own"]
        for name in {**there, **here}:
            if here.get(name) != there.get(name):
                differ = _apart(here.get(name, "nothing"), there.get(name, "nothing"))
                raise ValueError(
                    f"process {number} of {count} has {name} {differ[0]}, process 0 has "
                    f"{differ[1]}: start all processes with the same settings and data"
                )
    _agreed.add(what)


def _apart(*texts: str) -> list[str]:
    """Texts that differ, from a little before where they begin to, and not all too long."""
    at = max(0, len(os.path.commonprefix(texts)) - 20)
    cut = [f"…{text[at:]}" if at else text for text in texts]
    return [f"{text[:60]}…" if len(text) > 61 else text for text in cut]


def _tell(what: str, text: str) -> None:
    """Tells the other processes, once."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # It was told, or nobody is there.
        distributed.global_state.client.key_value_set(f"softprompt/{what}/{_place()[0]}", text)


def _told(what: str, number: int, seconds: float = math.inf) -> str:
    """What process `number` tells; waits for it, which is lost if its heart stops, or `seconds`.

    Ctrl-C is heard between two attempts.
    """
    last = time.monotonic() + seconds
    client, key = distributed.global_state.client, f"softprompt/{what}/{number}"
    while True:
        try:
            return client.blocking_key_value_get(key, 500)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error) or time.monotonic() > last:
                raise


def several() -> bool:
    """Whether this process is one of a job's; asking uses no device."""
    return _place()[1] > 1


def _place() -> tuple[int, int]:
    """Which process of a job this is, and of how many; JAX's public names start the devices."""
    state = distributed.global_state
    return (state.process_id, state.num_processes) if state.client else (0, 1)


def first() -> bool:
    """Whether this is the process that writes files and speaks: the first, or the only one."""
    return _place()[0] == 0


def fetch(x: Any) -> np.ndarray:
    """The whole value of an array on the host. Collective where other hosts hold parts of it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(jax.device_get(x))


def shared(function: Callable[[], T]) -> T:
    """What `function()` gives, or raises, on the first process; the others do not call it.

    Collective. So all go on from the same file even where only the first process sees it.
    """
    if not several():
        return function()
    outcome: tuple[Any, Exception | None] = (None, None)
    if first():
        try:
            outcome = (function(), None)
        except Exception as error:  # raised again below, on every process
            outcome = (None, error)
    content = pickle.dumps(outcome) if first() else b""
    # Two numbers: devices count in 32 bits.
    high, low = multihost_utils.broadcast_one_to_all(np.int32(divmod(len(content), CHUNK)), first())
    size = int(high) * CHUNK + int(low)
    received = bytearray()
    for at in range(0, size, CHUNK):
        # Bytes, not numbers: a sum over processes would turn -0.0 into 0.0.
        piece = np.zeros(min(CHUNK, size - at), np.uint8)
        if first():
            piece[:] = np.frombuffer(content, np.uint8, len(piece), at)
        received += multihost_utils.broadcast_one_to_all(piece, first()).tobytes()
    value, error = pickle.loads(received)
    if error is not None:
        raise error
    return value


@contextlib.contextmanager
def job(agrees: bool = False, saves: bool = True, **flags: Any) -> Iterator[None]:
    """`start`, and within it this process's part of the job; at its end waits for the others.

    `agrees` says that every process comes to all `AGREEMENTS`: one that fails before waits for the
    others to hear of it there. SIGTERM to one of several is heard by what `saves` on it (see
    `signals.termination`), or else ends the process, and so the others.

    A process that fails says why and leaves: its closed connections tell the others, which would
    wait for it for ever. Where all fail at once they leave together. Alone, an exception passes
    through.
    """
    jax.config.update("jax_enable_preemption_service", saves)
    start(**flags)
    try:
        if several() and not saves and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
        yield
        if jax.distributed.is_initialized():
            # Nobody leaves while the first one still writes.
            jax.distributed.shutdown()
    except BaseException as error:
        if not several():
            raise
        reason, code = _reason(error)
        print(f"softprompt: {reason}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        pending = agrees and code == 2 and len(_agreed) < len(AGREEMENTS)
        _leave_together(reason, START_TIMEOUT if pending else LAST_WORDS)
        os._exit(code)


def _terminate(number: int, frame: Any) -> None:
    raise mistakes.Terminated


def _leave_together(reason: str, seconds: float) -> None:
    """Waits for others that fail, too; the first, who hosts them, is the last to leave."""
    for what in AGREEMENTS:
        _tell(what, json.dumps({"error": reason}))
    _tell(FAILED, reason)
    last = time.monotonic() + seconds
    with contextlib.suppress(jax.errors.JaxRuntimeError, KeyboardInterrupt):
        for number in range(_place()[1]):
            _told(FAILED, number, last - time.monotonic())
        if first():
            time.sleep(0.5)


def _reason(error: BaseException) -> tuple[str, int]:
    """What is said of the error, and the exit code."""
    who = "process {} of {}".format(*_place())
    if LOST.match(str(error)):
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return (
            f"{who} stops: work that spans the processes failed, most likely because another one "
            f"was lost ({text}). Start the job again: it goes on from its last checkpoint",
            1,
        )
    if told := mistakes.told(error):
        return (f"{who}: {told[0]}" if told[1] in (130, 143) else told[0]), told[1]
    return f"{who} failed\n" + "".join(traceback.format_exception(error)), 1
