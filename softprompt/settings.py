"""What the binaries' settings name: lengths and counts, a user's files, tasks, a vocabulary."""

import dataclasses
import importlib.util
import math
import os
import re
import reprlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from softprompt import data
from softprompt.backbone import Backbone
from softprompt.importing import import_seqio
from softprompt.tasks import catalogue
from softprompt.vocabulary import AnyVocabulary

# The module of the tasks that the package brings.
BUILTIN = "softprompt.tasks.registry"


@dataclasses.dataclass(frozen=True)
class UserData:
    """A user's own data set, as files: see `softprompt.tasks.user.define_task`."""

    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    template: str = "{text}"
    target: str = "label"
    labels: Sequence[str] | None = None


# Its fields as gin's macros name them, and as flags of the command line are called.
USER_DATA = {
    "train_file": "TRAIN_FILE",
    "validation_file": "VALIDATION_FILE",
    "test_file": "TEST_FILE",
    "template": "TEXT_TEMPLATE",
    "target": "TARGET_FIELD",
    "labels": "LABELS",
}


def check_dtype(dtype: Any, name: str = "DTYPE") -> None:
    """Raises unless `dtype` is that of activations: a name, or what NumPy and JAX call so."""
    known = ("float32", "bfloat16", "float16")
    try:
        good = jnp.dtype(dtype).name in known
    except TypeError:
        good = False
    if not good:
        raise ValueError(f"{name} is {dtype!r}, expected 'float32', 'bfloat16' or 'float16'")


def check_settings(dtype: str, lengths: Mapping[str, int], **counts: tuple[Any, int]) -> None:
    """Raises where a type, a feature length or a count `NAME=(value, least)` makes no sense."""
    check_dtype(dtype)
    if not isinstance(lengths, Mapping) or set(lengths) != {"inputs", "targets"}:
        raise ValueError(
            f"TASK_FEATURE_LENGTHS is {lengths!r}, expected {{'inputs': …, 'targets': …}}"
        )
    check_counts(**counts, **{f"TASK_FEATURE_LENGTHS[{k!r}]": (n, 2) for k, n in lengths.items()})


def check_counts(**counts: tuple[Any, int]) -> None:
    """Raises unless each `NAME=(value, least)` is an integer of at least `least`."""
    for name, (value, least) in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")


def check_labels(name: str, value: Any) -> None:
    """Raises unless `value` is a list of labels, or None for texts."""
    if isinstance(value, str):
        raise ValueError(f"{name} is {value!r}, expected a list such as {value.split(',')!r}")
    good = value is None or are_texts(value) and len(value) > 0
    check_kinds(**{name: (value, good, "a list of texts or None")})


def check_path(name: str, value: Any, optional: bool = False) -> None:
    """Raises unless `value` can be a path or, if `optional`, is None."""
    if not isinstance(value, str | os.PathLike) and not (optional and value is None):
        raise ValueError(f"{name} is {value!r}, expected a path: \"'{value}'\" is text to gin")


def check_numbers(**numbers: tuple[Any, float] | tuple[Any, float, float]) -> None:
    """Raises unless each `NAME=(value, least)` is a finite number of at least `least`.

    One of `NAME=(value, least, limit)` must be less than `limit`, too.
    """
    for name, (value, least, *limit) in numbers.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        below_limit = number and all(value < x for x in limit)
        if not below_limit or not math.isfinite(value) or value < least:
            most = "".join(f" and less than {x:g}" for x in limit)
            raise ValueError(f"{name} is {value!r}, expected a number of at least {least:g}{most}")


def check_kinds(**settings: tuple[Any, bool, str]) -> None:
    """Raises unless each `NAME=(value, good, expected)` is good."""
    for name, (value, good, expected) in settings.items():
        if not good:
            raise ValueError(f"{name} is {value!r}, expected {expected}")


def check_type(name: str, value: Any, kinds: Any, expected: str) -> None:
    """Raises unless `value` is of a type of `kinds`, joined by `|`; a long one is shown in part."""
    if not isinstance(value, kinds):
        raise ValueError(f"{name} is {reprlib.repr(value)}, expected {expected}")


def are_texts(value: Any) -> bool:
    """Whether it is a list or tuple of texts."""
    return isinstance(value, list | tuple) and all(isinstance(x, str) for x in value)


def are_settings(value: Any) -> bool:
    """Whether it is a list or tuple of mappings whose keys are texts."""
    lists = isinstance(value, list | tuple)
    return lists and all(isinstance(x, Mapping) and are_texts([*x]) for x in value)


def check_patterns(**patterns: Any) -> None:
    """Raises unless each `NAME=patterns` is a list or tuple of regular expressions."""
    for name, found in patterns.items():
        expected = "a list of regular expressions: ('prompt/.*',)"
        check_kinds(**{name: (found, are_texts(found), expected)})
        for pattern in found:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{name} holds {pattern!r}, which is no regular expression: {error}"
                ) from None


def import_modules(modules: str | Sequence[str] | None) -> None:
    """Imports the modules that register tasks.

    The package's own tasks, if nothing else is named, are defined without seqio.
    """
    named = modules is None or isinstance(modules, str) or are_texts(modules)
    check_kinds(MIXTURE_OR_TASK_MODULE=(modules, named, "a module's name, a list of them or None"))
    names = [modules] if isinstance(modules, str) else modules or []
    if set(names) <= {BUILTIN}:
        from softprompt.tasks import builtin  # noqa: F401

        return
    for module in names:  # What is misspelled is found before seqio is imported, for seconds.
        package = module.partition(".")[0]
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            raise ValueError(f"MIXTURE_OR_TASK_MODULE {module!r}: No module named {package!r}")
    import_seqio()
    for module in names:
        try:
            importlib.import_module(module)
        except Exception as error:
            hint, kind = "", ""
            if not isinstance(error, ModuleNotFoundError | ValueError):
                kind = f"{type(error).__name__}: "
            if "not registered" in str(error) and BUILTIN not in sys.modules:
                hint = f"; the package's own tasks are there behind {BUILTIN!r}, named before it"
            raise ValueError(f"MIXTURE_OR_TASK_MODULE {module!r}: {kind}{error}{hint}") from error


def load_tasks(name: str, modules: str | Sequence[str] | None, user: UserData | None):
    """The tasks under `name` and their rates, once modules and user have defined theirs."""
    check_kinds(MIXTURE_OR_TASK_NAME=(name, isinstance(name, str), "the name of a task"))
    import_modules(modules)
    if user and (user.train_file or user.validation_file or user.test_file):
        from softprompt.tasks.user import define_task

        check_labels("LABELS", user.labels)
        files = {
            split: getattr(user, f"{split}_file")
            for split in ("train", "validation", "test")
            if getattr(user, f"{split}_file")
        }
        define_task(
            name,
            **{f"{split}_file": path for split, path in files.items()},
            template=user.template,
            target=user.target,
            labels=user.labels,
        )
    elif user not in (None, UserData()):
        given = [own for k, own in USER_DATA.items() if getattr(user, k) != getattr(UserData, k)]
        raise ValueError(
            f"{', '.join(given)}: these say how to read files of your own, and none is given; the "
            f"task {name!r} has its own text and labels"
        )
    return data.get_tasks(name)


def use_vocabulary(backbone: Backbone) -> AnyVocabulary:
    """Makes the backbone's vocabulary the one that tasks are tokenised with."""
    if backbone.vocabulary is None:
        raise ValueError(f"the backbone {backbone.name!r} has no vocabulary; give VOCABULARY_FILE")
    catalogue.use_vocabulary(backbone.vocabulary.path)
    return backbone.vocabulary
