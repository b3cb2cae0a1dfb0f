"""Which lengths compile: buckets for batches of like lengths."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from softprompt import data

# Batches that are drawn together, sorted by length and shuffled: enough for batches of like
# lengths, few enough for a batch's examples to stay close to where the shuffled order has them.
WINDOW = 32


def bucket_lengths(lengths: Sequence[int], count: int) -> list[int]:
    """At most `count` lengths, ascending, that pad `lengths` the least.

    Each of `lengths` is padded to the next bucket; the last bucket is the longest of them. Buckets
    are multiples of `data.LENGTH_MULTIPLE`. Worked example: lengths 3, 5, 30 and two buckets give
    [8, 32].
    """
    if count < 1 or not len(lengths):
        raise ValueError(f"got {count} buckets for {len(lengths)} lengths, expected one at least")
    values, weights = np.unique([data.round_up(int(n)) for n in lengths], return_counts=True)
    below = np.concatenate([[0], np.cumsum(weights)])
    # cost[k][j]: the least padded total of the first j values in k buckets, the last at value j-1.
    cost, chosen = np.full(len(values) + 1, np.inf), []
    cost[0] = 0
    for _ in range(min(count, len(values))):
        grown, start = np.full_like(cost, np.inf), np.zeros(len(values) + 1, int)
        grown[0] = 0
        for j in range(1, len(values) + 1):
            totals = cost[:j] + values[j - 1] * (below[j] - below[:j])
            start[j] = int(np.argmin(totals))
            grown[j] = totals[start[j]]
        cost = grown
        chosen.append(start)
    buckets, j = [], len(values)
    for start in reversed(chosen):
        if j:
            buckets.append(int(values[j - 1]))
            j = start[j]
    return buckets[::-1]


def bucketed_batches(
    parts: Sequence[data.Examples],
    rates: Sequence[float],
    batch_size: int,
    seed: int,
    slots: np.ndarray,
    buckets: int,
    own: slice = slice(None),
) -> Callable[[int], Iterator[data.Batch]]:
    """`data.train_batches` in at most `buckets` shapes, its examples grouped by length.

    The examples of `WINDOW` successive batches are sorted by the length of their input, cut into
    batches again, and these shuffled: every example still comes once an epoch, and which ones
    batch k holds depends on the seed and k alone. Call the result with the step to start from; for
    the arguments see `data.train_batches`.
    """
    # No window spans an epoch: an example would meet itself in a batch.
    window = max(1, min(WINDOW, sum(map(len, parts)) // batch_size))
    targets_length = max(len(ids) for part in parts for ids in part.targets)

    def groups(start: int) -> Iterator[list[tuple[data.Examples, int]]]:
        first, skipped = divmod(start, window)
        drawn = data.drawn(parts, rates, batch_size, seed, first * window)
        for number in itertools.count(first):
            rows = list(itertools.chain.from_iterable(itertools.islice(drawn, window)))
            order = np.argsort([len(part.inputs[i]) for part, i in rows], kind="stable")
            order = order.reshape(window, batch_size)
            shuffled = np.random.default_rng([seed, 2, number]).permutation(window)
            for k in shuffled[skipped:]:
                yield [rows[i] for i in order[k]]
            skipped = 0

    def longest(group) -> int:
        return max(len(part.inputs[i]) for part, i in group)

    sample = [longest(group) for group in itertools.islice(groups(0), 8 * window)]
    most = max(len(ids) for part in parts for ids in part.inputs)
    edges = bucket_lengths([*sample, most], buckets)

    def generate(start: int) -> Iterator[data.Batch]:
        for group in groups(start):
            length = next(edge for edge in edges if edge >= longest(group))
            inputs = [part.inputs[i] for part, i in group[own]]
            targets = [part.targets[i] for part, i in group[own]]
            yield {
                "encoder_ids": data.pad(inputs, len(inputs), length, slots),
                "targets": data.pad(targets, len(targets), targets_length),
            }

    return generate


def padding(batches: Iterator[data.Batch], count: int = 100) -> tuple[float, list[int]]:
    """Share of encoder positions that are no padding in `count` batches, and the lengths seen."""
    sample = [batch["encoder_ids"] for batch in itertools.islice(batches, count)]
    filled = sum(int((ids > 0).sum()) for ids in sample) / sum(ids.size for ids in sample)
    return filled, sorted({ids.shape[1] for ids in sample})
