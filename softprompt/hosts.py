"""Many processes as one run: how they start, what they agree on, who writes, how they end.

Every process runs the same program on arrays that span them all, so all must call the functions
marked *collective* here in the same order. With one process each function is the plain thing it
says: no other branch exists for one host.
"""

import contextlib
import os
import pickle
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")
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
    if coordinator_address is not None and not re.fullmatch(r".+:\d+", coordinator_address):
        raise ValueError(f"--coordinator_address is {coordinator_address!r}, expected HOST:PORT")
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"--num_processes is {num_processes}, expected at least 1")
    if None not in (process_id, num_processes) and not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id is {process_id}, expected 0 to {num_processes - 1}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            cluster_detection_method=None if distributed else "deactivate",
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        hint = "; give " + ", ".join(missing) if missing else ""
        raise ValueError(f"the job of several processes did not start: {reason}{hint}") from None


def several() -> bool:
    """Whether this process is one of a job's; asking uses no device."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that writes files and speaks: the first, or the only one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


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
    high, low = multihost_utils.broadcast_one_to_all(np.int32(divmod(len(content), CHUNK)))
    size = int(high) * CHUNK + int(low)
    received = bytearray()
    for at in range(0, size, CHUNK):
        # Bytes, not numbers: a sum over processes would turn -0.0 into 0.0.
        piece = np.zeros(min(CHUNK, size - at), np.uint8)
        if first():
            piece[:] = np.frombuffer(content, np.uint8, len(piece), at)
        received += multihost_utils.broadcast_one_to_all(piece).tobytes()
    value, error = pickle.loads(received)
    if error is not None:
        raise error
    return value


@contextlib.contextmanager
def job(**flags: Any) -> Iterator[None]:
    """`start`, and within it this process's part of the job; at its end waits for the others.

    A process that fails says why and leaves at once: its closed connections tell the others,
    which would wait for it for ever. Alone, an exception passes through.
    """
    start(**flags)
    try:
        yield
        if jax.distributed.is_initialized():
            # Nobody leaves while the first one still writes.
            jax.distributed.shutdown()
    except BaseException as error:
        if not several():
            raise
        print(f"softprompt: {_reason(error)}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2 if isinstance(error, ValueError) else 1)


def _reason(error: BaseException) -> str:
    if isinstance(error, ValueError):
        return str(error)
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return "\n" + "".join(traceback.format_exception(error))
    return (
        f"process {jax.process_index()} of {jax.process_count()} stops: work that spans the "
        f"processes failed, most likely because another one was lost ({text}). Start the job "
        f"again: it goes on from its last checkpoint"
    )
