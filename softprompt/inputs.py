"""What a training run reads: batches in one of three forms, and what several runs share."""

import dataclasses
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from softprompt import data, lengths, packing, partition
from softprompt.backbone import Backbone
from softprompt.logbook import say


class Shared:
    """Calls `function(*arguments)` once, and gives its result again for equal arguments.

    Of what has no hash, such as lists, those are equal that pickle alike, else an object itself.

    Runs of one process share a backbone, tokenised tasks and compiled predictors by it.
    """

    def __init__(self):
        self._found: dict[Any, Any] = {}

    def __call__(self, function: Callable, *arguments: Any) -> Any:
        key = (function, *map(self._key, arguments))
        if key not in self._found:
            # The arguments are kept, for the identity of a dead object may be taken again.
            self._found[key] = (function(*arguments), arguments)
        return self._found[key][0]

    @staticmethod
    def _key(argument: Any) -> Any:
        if isinstance(argument, Backbone):
            return id(argument)
        try:
            hash(argument)
            return argument
        except TypeError:
            pass
        try:
            return pickle.dumps(argument)
        except (pickle.PicklingError, TypeError, AttributeError):
            return id(argument)


def batches(
    parts: Sequence[data.Examples],
    rates: Sequence[float],
    batch_size: int,
    seed: int,
    slots: np.ndarray,
    mesh: jax.sharding.Mesh,
    microbatches: int = 1,
    pack_length: int | str = 0,
    length_buckets: int = 1,
    label_length: int = 0,
) -> Callable[[int], Iterator[data.Batch]]:
    """This process's rows of every batch, from the step on that the result is called with.

    Rows hold several examples where `pack_length` is not 0 (see `packing.Packing`; 'auto': see
    `packing.row_length`), else one each: in at most `length_buckets` shapes (see
    `lengths.bucketed_batches`), or in one. `label_length` is that of the longest label, where the
    loss is that among labels. For the rest see `data.train_batches`. Says how full the rows are.
    """
    drawing = (parts, rates, batch_size, seed, slots)
    if pack_length:
        over = mesh.shape["data"] * microbatches
        if pack_length == "auto":
            # By one seed, so that runs of several have rows of one length.
            pack_length = packing.row_length(parts, rates, batch_size, 0, slots, over)
        packed = packing.Packing(*drawing, pack_length, over, label_length=label_length)
        packed = dataclasses.replace(packed, own=partition.local_rows(mesh, packed.shape[0]))
        share, count = packed.fill()
        say(
            f"packing: {packed.shape[0]} rows of {pack_length}, {100 * share:.0f}% full, "
            f"{count:.1f} examples a batch"
        )
        if count >= packing.TOO_MANY * batch_size:
            say(
                f"packing: that is {count / batch_size:.1f} times BATCH_SIZE {batch_size}; shorter "
                f"rows (PACK_LENGTH), or fewer data partitions and microbatches, come closer"
            )
        return packed
    own = partition.local_rows(mesh, batch_size)
    if length_buckets == 1:
        return data.train_batches(*drawing, own)
    bucketed = lengths.bucketed_batches(*drawing, length_buckets, own)
    share, shapes = lengths.padding(bucketed(0))
    say(f"length buckets: rows of {shapes}, {100 * share:.0f}% full")
    return bucketed
