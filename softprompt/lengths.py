"""Which shapes compile: buckets for batches of like lengths, in training and in evaluation."""

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from softprompt import data

# Batches that are drawn together, sorted by length and shuffled: enough for batches of like
# lengths, few enough for a batch's examples to stay close to where the shuffled order has them.
WINDOW = 32
# Of an evaluation: the most shapes, and of what their lengths are multiples.
EVAL_SHAPES = 12
EVAL_MULTIPLE = 4
# In encoder positions, on a CPU (docs/performance.md): what a batch costs, for decoding reads all
# weights token by token, however few the rows, and what compiling a shape costs.
BATCH_COST = 512
COMPILE_COST = 8192
# Of an evaluation that is timed, or that comes again and again.
MANY_EVALUATIONS = 16
# Three lengths per doubling from 32 on: a quarter of a row is padding at most.
FIXED_LENGTHS = (
    16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512,
    640, 768, 1024, 1280, 1536, 2048,
)  # fmt: skip


def bucket_lengths(lengths: Sequence[int], count: int) -> list[int]:
    """At most `count` lengths, ascending, that pad `lengths` the least.

    Each of `lengths` is padded to the next bucket; the last bucket is the longest of them. Buckets
    are multiples of `data.LENGTH_MULTIPLE`. Worked example: lengths 3, 5, 30 and two buckets give
    [8, 32].
    """
    if count < 1 or not len(lengths):
        raise ValueError(f"got {count} buckets for {len(lengths)} lengths, expected one at least")
    values, weights = np.unique([data.round_up(int(n)) for n in lengths], return_counts=True)
    return [int(values[j - 1]) for j in _ends(values, weights, count, lambda n, value: n * value)]


def _ends(
    values: np.ndarray,
    weights: np.ndarray,
    most: int,
    price: Callable[[np.ndarray, int], np.ndarray],
) -> list[int]:
    """Where to cut ascending `values` into at most `most` runs, at the least price in all.

    `price(n, value)` is that of runs of `n` examples whose last value is `value`; `weights` count
    the examples of each value. Run k holds the values from one end (0 at first) to the next.
    """
    below = np.concatenate([[0], np.cumsum(weights)])
    # cost[j]: the least price of the first j values in so many runs.
    cost = np.full(len(values) + 1, np.inf)
    cost[0] = 0
    chosen, totals = [], []
    for _ in range(min(most, len(values))):
        grown, start = np.full_like(cost, np.inf), np.zeros(len(values) + 1, int)
        for j in range(1, len(values) + 1):
            found = cost[:j] + price(below[j] - below[:j], values[j - 1])
            start[j] = int(np.argmin(found))
            grown[j] = found[start[j]]
        cost = grown
        chosen.append(start)
        totals.append(cost[-1])
    ends, j = [], len(values)
    for start in reversed(chosen[: int(np.argmin(totals)) + 1]):
        ends.append(j)
        j = start[j]
    return ends[::-1]


class Cut(NamedTuple):
    """A batch of an evaluation: which examples, how many rows, and the length of their inputs."""

    indices: np.ndarray
    rows: int
    length: int


def cuts(
    lengths: Sequence[int],
    batch_size: int,
    prompt_length: int,
    multiple: int = 1,
    evaluations: int | None = 1,
) -> list[Cut]:
    """Batches of every example once, shortest inputs first, of at most `EVAL_SHAPES` shapes.

    Each shape takes a run of the sorted examples, in batches of the same number of rows: what all
    cost together, padding, `BATCH_COST` and the share in compiling included, is the least there is.

    Args:
      lengths: of the inputs.
      batch_size: the most rows of a batch.
      prompt_length: positions before every input.
      multiple: of which every number of rows is one, `batch_size` too.
      evaluations: of the same examples; each bears its share of `COMPILE_COST`. None: of other
        examples without end, which have shapes in common: `batch_size` rows, and lengths among
        `FIXED_LENGTHS`.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(lengths, kind="stable")
    if not len(order):
        return []
    if evaluations is None:
        found = []
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            n = int(lengths[indices].max())
            length = next((b for b in FIXED_LENGTHS if b >= n), data.round_up(n, 512))
            found.append(Cut(indices, batch_size, length))
        return found

    def shape(n):
        batches = -(-n // batch_size)
        return batches, data.round_up(-(-n // batches), multiple)

    def price(n, length):
        batches, rows = shape(n)
        return batches * (rows * (prompt_length + length) + BATCH_COST) + COMPILE_COST / evaluations

    values, weights = np.unique(data.round_up(lengths, EVAL_MULTIPLE), return_counts=True)
    found, begun = [], 0
    for end in _ends(values, weights, EVAL_SHAPES, price):
        examples = order[begun : int(weights[:end].sum())]
        begun += len(examples)
        _, rows = shape(len(examples))
        for start in range(0, len(examples), rows):
            found.append(Cut(examples[start : start + rows], int(rows), int(values[end - 1])))
    return found


def eval_batches(
    examples: data.Examples, cuts: Sequence[Cut], slots: Sequence[np.ndarray], prompt_length: int
) -> Iterator[tuple[np.ndarray, data.Batch]]:
    """(indices, batch) of each cut, its shape `(rows, prompt_length + length)`.

    `slots` are those before each example, at most `prompt_length`; other rows are padding.
    """
    if not cuts:
        return
    targets_length = data.longest(examples.targets)
    for indices, rows, length in cuts:
        inputs = [np.concatenate([slots[i], examples.inputs[i]]) for i in indices]
        targets = [examples.targets[i] for i in indices]
        yield (
            indices,
            {
                "encoder_ids": data.pad(inputs, rows, prompt_length + length),
                "targets": data.pad(targets, rows, targets_length),
            },
        )


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
    window = max(1, min(WINDOW, sum(map(len, parts)) // batch_size))
    targets_length = max(len(ids) for part in parts for ids in part.targets)

    def groups(start: int) -> Iterator[list[tuple[data.Examples, int]]]:
        first, skipped = divmod(start, window)
        drawn = data.drawn(parts, rates, batch_size, seed, first * window)
        for number in itertools.count(first):
            rows = list(itertools.chain.from_iterable(itertools.islice(drawn, window)))
            # A window may span an epoch's end: what comes again goes behind all that comes once, or
            # sorting would put an example beside itself.
            seen: collections.Counter = collections.Counter()
            keys = []
            for part, i in rows:
                keys.append((seen[id(part), i], len(part.inputs[i])))
                seen[id(part), i] += 1
            order = np.array(sorted(range(len(rows)), key=keys.__getitem__))
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
