"""The import of seqio and TensorFlow, which read data alone and take seconds."""

import contextlib
import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType


def import_seqio() -> ModuleType:
    """seqio, with native libraries' start-up lines kept off the terminal.

    They are written to the file descriptor itself before any level can be set. What was written is
    shown after all if the import fails. Keras, which TensorFlow imports, would import scikit-learn
    and matplotlib if it found them: a third of the time, for nothing here. TensorFlow leaves the
    accelerators to JAX, unless the program imported it before.
    """
    if "seqio" in sys.modules:
        return sys.modules["seqio"]
    ours = "tensorflow" not in sys.modules
    with tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        terminal = os.dup(2)
        os.dup2(held.fileno(), 2)
        failed = True
        try:
            with _uncollected():
                with _without("sklearn", "matplotlib"):
                    import tensorflow  # noqa: F401
                import seqio

            if ours:
                hide_accelerators()
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            if failed:
                held.seek(0)
                sys.stderr.write(held.read().decode(errors="replace"))
    return seqio


def hide_accelerators() -> None:
    """Leaves them to JAX, where TensorFlow is imported."""
    if "tensorflow" in sys.modules:
        for kind in ("GPU", "TPU"):
            sys.modules["tensorflow"].config.set_visible_devices([], kind)


@contextlib.contextmanager
def _without(*packages: str) -> Iterator[None]:
    """Lets an import find none of `packages`, unless they were imported before."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """First imports without garbage collections, which search all modules again and again.

    Later collections leave out what lies in memory by then. Nothing happens in a program that
    imported TensorFlow itself, or collects as it likes.
    """
    ours = "tensorflow" not in sys.modules and gc.isenabled()
    if ours:
        gc.disable()
    try:
        yield
    finally:
        if ours:
            gc.freeze()
            gc.enable()
