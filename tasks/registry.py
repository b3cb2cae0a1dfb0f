"""Importing this module registers every task with seqio, whatever was imported or parsed before.

Tasks and mixtures that are defined later are registered as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any

from softprompt.importing import import_seqio
from softprompt.tasks import builtin, catalogue  # noqa: F401 (the first defines the tasks)
from softprompt.tasks.catalogue import INT, STRING, STRINGS, Definition
from softprompt.tasks.features import FEATURES

seqio = import_seqio()

import tensorflow as tf  # noqa: E402 (as seqio imports it)

TYPES = {STRING: tf.string, STRINGS: tf.string, INT: tf.int64}


def dataset_of(definition: Definition) -> Callable[..., tf.data.Dataset]:
    """A seqio dataset function over a definition's examples, read whole at each call.

    They become columns: a generator's rows would each be a call from TensorFlow back to Python.
    """
    kinds = {"inputs": STRING, "targets": STRING, **definition.extras}

    def dataset_fn(split: str, shuffle_files: bool = False, seed: int | None = None):
        del shuffle_files, seed  # One file; seqio shuffles the examples.
        # Read now, so that a user's error surfaces as it is and not from inside TensorFlow.
        found = definition.examples(split)
        columns = {
            name: _column([example[name] for example in found], kind)
            for name, kind in kinds.items()
        }
        return tf.data.Dataset.from_tensor_slices(columns)

    return dataset_fn


def _column(values: Sequence[Any], kind: str) -> tf.Tensor | tf.RaggedTensor:
    """A field of all examples."""
    if kind == STRINGS:
        return tf.ragged.constant(values, TYPES[kind], ragged_rank=1)
    return tf.constant(values, TYPES[kind], (len(values),))


def register(name: str) -> None:
    """Registers a task or mixture of `catalogue` with seqio; one of that name is replaced."""
    mixture = name in catalogue.mixtures
    registry = seqio.MixtureRegistry if mixture else seqio.TaskRegistry
    if name in registry.names():
        registry.remove(name)
    if mixture:
        registry.add(name, catalogue.mixtures[name])
        return
    definition = catalogue.tasks[name]
    registry.add(
        name,
        source=seqio.FunctionDataSource(dataset_of(definition), splits=tuple(definition.splits)),
        preprocessors=[
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=FEATURES,
        metric_fns=list(definition.metric_fns),
        postprocess_fn=definition.postprocessor,
    )


for _name in catalogue.names():
    if _name not in seqio.MixtureRegistry.names():  # A mixture of one's own stays.
        register(_name)
catalogue.followers.append(register)
