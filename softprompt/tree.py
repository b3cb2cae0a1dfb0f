"""Parameter trees by path: flatten, match by pattern, split into trainable and frozen, fingerprint.

A *flat tree* is a dict `{"encoder/layers_0/attention/query/kernel": array}`; it is itself a pytree.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from softprompt import hosts

Flat = dict[str, Any]


def flatten(nested: Mapping[str, Any]) -> Flat:
    """Nested dicts to a flat tree, sorted by path."""
    return dict(sorted(traverse_util.flatten_dict(nested, sep="/").items()))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def split(
    flat: Mapping[str, Any], trainable: Sequence[str], frozen: Sequence[str] = (".*",)
) -> tuple[Flat, Flat]:
    """Splits a flat tree into (trainable, frozen) by patterns that match a whole path.

    A path that matches `trainable` trains; any other must match `frozen`. A trainable pattern that
    matches nothing, or a path that no pattern covers, is a ValueError naming it.

    >>> split({"prompt/bank": 1, "encoder/w": 2}, trainable=["prompt/.*"])
    ({'prompt/bank': 1}, {'encoder/w': 2})
    """
    for pattern in trainable:
        if not any(re.fullmatch(pattern, path) for path in flat):
            raise ValueError(
                f"the trainable pattern {pattern!r} matches no parameter; parameters are, "
                f"for example, {', '.join(_examples(flat))}"
            )
    trained = {path: x for path, x in flat.items() if matches(path, trainable)}
    rest = {path: x for path, x in flat.items() if path not in trained}
    uncovered = [path for path in rest if not matches(path, frozen)]
    if uncovered:
        raise ValueError(
            f"no rule says whether these parameters train or stay frozen: {', '.join(uncovered)}"
        )
    return trained, rest


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether any pattern matches the whole path."""
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def _examples(flat: Mapping[str, Any], count: int = 4) -> list[str]:
    paths = [path for path in flat if path.startswith("prompt/")]
    return (paths + [path for path in flat if path not in paths])[:count]


def check_same_paths(
    got: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Raises a ValueError listing every missing, leftover or wrongly shaped path of `got`.

    Both map paths to shapes.
    """
    problems = [f"missing {path}" for path in expected if path not in got]
    problems += [f"unexpected {path}" for path in got if path not in expected]
    problems += [
        f"{path} has shape {tuple(got[path])}, expected {tuple(shape)}"
        for path, shape in expected.items()
        if path in got and tuple(got[path]) != tuple(shape)
    ]
    if problems:
        shown = "; ".join(problems[:20])
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{what} does not fit the model: {shown}{more}")


class Fingerprint:
    """16 hexadecimal digits of a SHA-256 over paths, shapes and float32 values, taken in order.

    Any changed bit of a float32 tree changes it. A tree stored in fewer bits has the fingerprint
    of its values, not of their storage.
    """

    def __init__(self):
        self._digest = hashlib.sha256()
        self._last = ""

    def add(self, path: str, value: Any) -> None:
        """Takes in the next parameter; paths must come sorted."""
        assert path > self._last, (path, self._last)
        self._last = path
        x = np.ascontiguousarray(hosts.fetch(value).astype(np.float32, copy=False))
        self._digest.update(f"{path}{x.shape}".encode())
        self._digest.update(x.data)

    def __str__(self) -> str:
        return self._digest.hexdigest()[:16]


def fingerprint(flat: Mapping[str, Any]) -> str:
    """The `Fingerprint` of a whole tree."""
    found = Fingerprint()
    for path in sorted(flat):
        found.add(path, flat[path])
    return str(found)


def count(flat: Mapping[str, Any]) -> int:
    """Number of scalars in the tree."""
    return sum(int(np.prod(np.shape(x))) for x in flat.values())
