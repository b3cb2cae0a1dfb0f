"""How a process's memory is kept on a CPU: a step's temporaries come from the same pages again."""

import ctypes
import functools
import pathlib
import sys
import threading
import time


@functools.cache
def keep(huge_after: float = 30.0) -> None:
    """Tells glibc to keep freed memory instead of returning it to the kernel (on Linux alone).

    XLA's CPU client frees and allocates a step's temporaries at every step: by default each time
    from fresh pages, whose faults took a quarter of a pre-training step. What the heap has grown to
    after `huge_after` seconds, and every minute from then on, is put into huge pages.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # Another C library.
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # malloc.h
    mallopt(trim_threshold, -1)
    mallopt(top_pad, 2**26)
    mallopt(mmap_max, 0)
    mallopt(arena_max, 1)

    def collapse() -> None:
        time.sleep(huge_after)
        while True:
            _into_huge_pages()
            time.sleep(60)

    threading.Thread(target=collapse, name="huge pages", daemon=True).start()


def compute_within_calls() -> None:
    """Has a CPU compute within the call that asks for it; before JAX has devices, for trainings.

    Else a step's temporaries are taken while the last one's are still there, and what lies between
    them keeps the heap that `keep` keeps from being used again: it grew to five steps' temporaries.
    Decoding alone is faster without.
    """
    import jax  # `softprompt --help` does without.

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def _into_huge_pages() -> None:
    """Puts what the heap holds into huge pages, in place (Linux 6.1; before, nothing happens).

    Steps take some 7% less time so. Asked for from the start, such pages would cost a virtual
    machine's first step seconds.
    """
    madvise, huge, collapse = ctypes.CDLL(None).madvise, 2**21, 25  # linux/mman.h
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in pathlib.Path("/proc/self/maps").read_bytes().splitlines():
        if line.endswith(b"[heap]"):
            start, end = (int(x, 16) for x in line.split()[0].split(b"-"))
            start, end = -(-start // huge) * huge, end // huge * huge
            if end > start:
                madvise(start, end - start, collapse)
