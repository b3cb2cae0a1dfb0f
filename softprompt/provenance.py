"""How a run was made: its command, versions, commit and devices, kept beside its figures."""

import contextlib
import contextvars
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import jax

from softprompt import checkpoint, config
from softprompt.backbone import Backbone

Files = dict[pathlib.Path, bytes]
_held: contextvars.ContextVar[Files | None] = contextvars.ContextVar("held", default=None)


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """What `write` is given within it is written at its end; nothing, where that is an error."""
    files: Files = {}
    token = _held.set(files)
    try:
        yield
    finally:
        _held.reset(token)
    _write(files)


def _write(files: Files) -> None:
    for path, text in files.items():
        checkpoint.write_atomically(path, text)


def write(folder: pathlib.Path, backbone: Backbone, about: Mapping[str, Any]) -> None:
    """Writes `config.gin`, the operative one, and `run.json`: `about`, and how the run was made."""
    facts = {
        **about,
        **invocation(),
        "versions": versions(),
        "commit": commit(),
        "devices": [str(d) for d in jax.devices()],
        "platform": platform.platform(),
        "mesh": dict(backbone.mesh.shape),
    }
    texts = {"config.gin": config.operative(), "run.json": json.dumps(facts, indent=2)}
    keep = _write if _held.get() is None else _held.get().update
    keep({folder / name: text.encode() for name, text in texts.items()})


def write_of_many(path: pathlib.Path, about: Mapping[str, Any]) -> None:
    """Writes what is said of many runs together, such as a sweep: `about`, and how they came."""
    facts = {**about, **invocation(), "versions": versions(), "commit": commit()}
    facts["platform"] = platform.platform()
    checkpoint.write_atomically(path, json.dumps(facts, indent=2).encode())


def invocation() -> dict[str, Any]:
    """The command of this process, the folder it was given in, and variables that bear on it."""
    names = ("SOFTPROMPT_DATA_DIR", "JAX_PLATFORMS", "XLA_FLAGS", "CUDA_VISIBLE_DEVICES")
    variables = {name: os.environ[name] for name in names if name in os.environ}
    return {"command": sys.argv, "directory": os.getcwd(), "variables": variables}


def versions() -> dict[str, str]:
    """Versions of what a run's figures depend on."""
    names = ("softprompt", "jax", "jaxlib", "flax", "optax", "seqio", "numpy", "sentencepiece")
    return {"python": platform.python_version(), **{n: metadata.version(n) for n in names}}


def commit() -> str | None:
    """The commit of a checkout, None for an installed package or without git."""
    root = pathlib.Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed.
        return None
    return found.stdout.strip() or None
