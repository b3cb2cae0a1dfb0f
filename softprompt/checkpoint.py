"""Files of arrays: written atomically, read with their content checked.

One format, safetensors with JSON metadata, serves prompts, training checkpoints and backbones. The
metadata carries a SHA-256 of the arrays and one of itself, so a torn or altered file is found when
it is read.
"""

import contextlib
import csv
import hashlib
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from softprompt import hosts, partition

try:
    import fcntl
except ImportError:  # Windows has none.
    fcntl = None

Path = str | os.PathLike
FORMAT_VERSION = 1
# The digest of the other metadata. Files of earlier versions lack it.
METADATA_DIGEST = "metadata_sha256"


class CorruptFile(ValueError):
    """A file that is torn, altered, or not what its name says."""


def write(path: Path, arrays: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Writes arrays and JSON metadata to `path`; readers see the old file or the whole new one.

    All of several processes call it, and the first one writes.
    """
    arrays = {name: np.asarray(hosts.fetch(x), order="C") for name, x in arrays.items()}
    if not hosts.first():
        return
    header = {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()}
    header["format_version"] = json.dumps(FORMAT_VERSION)
    header["sha256"] = json.dumps(_hash(arrays))
    header[METADATA_DIGEST] = json.dumps(_hash_texts(header))
    write_atomically(path, _sort_header(safetensors_numpy.save(arrays, metadata=header)))


def _sort_header(content: bytes) -> bytes:
    """The same safetensors file with its metadata in order: equal runs leave equal bytes."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it, what the disk refuses is one sentence, of `path`."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Writes bytes next to `path`, flushes them to disk, renames; the first process alone does."""
    if hosts.first():
        replace(path, content)


def replace(path: Path, content: bytes) -> None:
    """`write_atomically` by each process, to a folder of its own."""
    path = pathlib.Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
        except BaseException:
            pathlib.Path(temporary).unlink(missing_ok=True)
            raise


class Arrays:
    """A file that `write` made, open: metadata and shapes at once, arrays one at a time.

    Raises:
      CorruptFile: torn, altered, or another format; the message names the file.
      ValueError: no such file.
    """

    def __init__(self, path: Path):
        self._path = str(path)
        try:
            with safetensors.safe_open(path, "numpy") as file:
                texts = file.metadata() or {}
                self.shapes = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}
        except FileNotFoundError:
            raise ValueError(f"no such file: {self._path!r}") from None
        except (safetensors.SafetensorError, OSError) as error:
            raise CorruptFile(
                f"{self._path!r} is torn or is no safetensors file: {error}"
            ) from None
        if "sha256" not in texts:
            raise CorruptFile(
                f"{self._path!r} carries no checksum: it was not written by softprompt"
            )
        self.metadata = _parse(self._path, texts)
        if self.metadata["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"{self._path!r} has format version {self.metadata['format_version']}, this "
                f"softprompt reads up to {FORMAT_VERSION}: upgrade softprompt"
            )

    def read(self, name: str) -> np.ndarray:
        """One array, its content not yet checked."""
        return read_tensor(self._path, name)


def _parse(path: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """The metadata of a file from their texts, without their digest, which is checked if there."""
    texts = dict(texts)
    digest = texts.pop(METADATA_DIGEST, None)
    if digest is not None and digest != json.dumps(_hash_texts(texts)):
        raise CorruptFile(f"{path!r} is corrupt: its metadata does not fit its checksum")
    try:
        metadata = {name: json.loads(text) for name, text in texts.items()}
    except ValueError as error:
        raise CorruptFile(f"{path!r} is corrupt: its metadata is no JSON: {error}") from None
    version = metadata.get("format_version")
    if not isinstance(version, int):
        raise CorruptFile(f"{path!r} is corrupt: its format_version is {version!r}, no number")
    return metadata


def cache_folder() -> pathlib.Path:
    """Where what can be made again is kept: SOFTPROMPT_CACHE_DIR or the user's cache.

    A variable that is empty counts as none.
    """
    users = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return pathlib.Path(os.environ.get("SOFTPROMPT_CACHE_DIR") or users / "softprompt")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      CorruptFile: no JSON, or another value; the message names the file.
    """
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFile(f"{str(path)!r} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorruptFile(f"{str(path)!r} holds a JSON {type(value).__name__}, expected an object")
    return value


def read_table(
    path: Path, columns: Mapping[str, Callable[[str], Any]] | None = None
) -> list[dict[str, str]]:
    """The rows of a CSV file with a header.

    Args:
      columns: those that must be there, and what reads a cell, a ValueError where it cannot.

    Raises:
      CorruptFile: no header or one without those columns, a row with others than the header's, or
        a cell that cannot be read; the message names file and line.
    """
    found = []
    columns = columns or {}
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        header = reader.fieldnames or []
        if not header or not set(columns) <= set(header):
            raise CorruptFile(
                f"{str(path)!r}, line 1: the columns are {', '.join(header) or 'none'}"
                + (f", expected {', '.join(columns)}" if columns else "")
            )
        for row in reader:
            if None in row or None in row.values():
                raise CorruptFile(
                    f"{str(path)!r}, line {reader.line_num}: expected the header's "
                    f"{len(reader.fieldnames)} columns"
                )
            for name, read_cell in columns.items():
                try:
                    read_cell(row[name])
                except ValueError as error:
                    raise CorruptFile(
                        f"{str(path)!r}, line {reader.line_num}: {name} is {row[name]!r}: {error}"
                    ) from None
            found.append(row)
    return found


def read_tensor(path: Path, name: str) -> np.ndarray:
    """One tensor of a safetensors file.

    The file is opened anew each time: as long as it is open, whatever was read of it stays mapped
    and counts as memory of the process.
    """
    with safetensors.safe_open(path, "numpy") as file:
        return file.get_tensor(name)


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays, their content checked, and metadata of a file that `write` made: see `Arrays`."""
    file = Arrays(path)
    arrays = {name: file.read(name) for name in file.shapes}
    if _hash(arrays) != file.metadata["sha256"]:
        raise CorruptFile(f"{str(path)!r} is corrupt: its content does not fit its checksum")
    return arrays, file.metadata


def _hash(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        x = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}{x.dtype}{x.shape}".encode())
        digest.update(x.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _hash_texts(texts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()


# --- training checkpoints -----------------------------------------------------------------------


@contextlib.contextmanager
def locked(model_dir: Path | None) -> Iterator[None]:
    """Keeps other runs out of MODEL_DIR by a lock on its file `.lock`; None locks nothing.

    The first of several processes holds it. It ends with its process, however that ends. Where
    files cannot be locked (Windows, some network disks) a run goes without.

    Raises:
      ValueError: another run holds it, or MODEL_DIR cannot be written to.
    """
    with contextlib.ExitStack() as held:
        if model_dir is not None and fcntl is not None:
            hosts.shared(lambda: _lock(pathlib.Path(model_dir) / ".lock", held))
        yield


def _lock(path: pathlib.Path, held: contextlib.ExitStack) -> None:
    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(f"MODEL_DIR {str(path.parent)!r} is a file, expected a folder")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = held.enter_context(open(path, "ab"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another run is writing to MODEL_DIR {str(path.parent)!r}: wait until it ends, or "
            f"use another MODEL_DIR"
        ) from None
    except OSError:  # This disk knows no locks.
        pass


def differences(stored: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What two runs' settings, the first ones read from JSON, do not have in common, in words.

    Of settings within settings those that differ, by both names.
    """
    ours, found = json.loads(json.dumps(ours)), []
    for name in sorted({*stored, *ours}):
        before, now = stored.get(name), ours.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found += [f"{name}: {said}" for said in differences(before, now)]
        elif before != now:
            found.append(f"{name} was {before!r}, is now {now!r}")
    return found


def _names(state: Any) -> tuple[list[str], list[Any], Any]:
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    return names, [leaf for _, leaf in leaves], structure


def step_path(model_dir: Path, step: int) -> pathlib.Path:
    """Where the checkpoint of `step` lies."""
    return pathlib.Path(model_dir) / "checkpoints" / f"{step}.safetensors"


def steps(model_dir: Path) -> list[int]:
    """Steps with a checkpoint, ascending."""
    found = (pathlib.Path(model_dir) / "checkpoints").glob("*.safetensors")
    return sorted(int(p.stem) for p in found if re.fullmatch(r"\d+", p.stem))


def save_state(model_dir: Path, state: Any, metadata: Mapping[str, Any], keep: int) -> None:
    """Saves a train state (a pytree with a `step` leaf) and removes all but the last `keep`.

    Files of later steps go too: the run came back from them, since they were corrupt.
    """
    names, leaves, _ = _names(state)
    step = int(state["step"])
    write(step_path(model_dir, step), dict(zip(names, leaves, strict=True)), metadata)
    if hosts.first():
        found = steps(model_dir)
        kept = [at for at in found if at <= step][-keep:]
        for at in set(found) - set(kept):
            step_path(model_dir, at).unlink(missing_ok=True)


def restore_state(model_dir: Path, template: Any, say=print) -> tuple[Any, dict[str, Any]] | None:
    """The newest readable train state, or None where there is no checkpoint at all.

    `template` is a state of the same structure; arrays come back on its shardings. A corrupt file
    is named through `say`, and the step before it is taken. If every checkpoint is corrupt, that
    is an error: a run is never silently started over. The first of several processes reads, and
    all get what it read.
    """
    names, leaves, structure = _names(template)
    expected = dict(zip(names, leaves, strict=True))
    shapes = {name: x.shape for name, x in expected.items()}
    found = hosts.shared(lambda: _newest(model_dir, shapes, say))
    if found is None:
        return None
    arrays, metadata = found
    restored = [
        partition.place(arrays[name].astype(leaf.dtype), leaf.sharding)
        for name, leaf in expected.items()
    ]
    return jax.tree_util.tree_unflatten(structure, restored), metadata


def _newest(
    model_dir: Path, shapes: Mapping[str, tuple[int, ...]], say
) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    found = steps(model_dir)
    for step in reversed(found):
        path = step_path(model_dir, step)
        try:
            arrays, metadata = read(path)
        except CorruptFile as error:
            say(f"{error}; falling back to the checkpoint before it")
            continue
        wrong = sorted(set(shapes) ^ set(arrays)) or [
            f"{n}: {arrays[n].shape} instead of {shape}"
            for n, shape in shapes.items()
            if arrays[n].shape != shape
        ]
        if wrong:
            raise ValueError(
                f"{str(path)!r} holds the state of another run (other trainable parameters, "
                f"prompt length or optimizer): {'; '.join(wrong[:8])}. Use another MODEL_DIR"
            )
        return arrays, metadata
    if found:
        raise ValueError(
            f"every checkpoint in {str(model_dir)!r} is corrupt (steps {found}); remove the folder "
            f"'checkpoints' to start over"
        )
    return None
