"""Examples to batches: tokenised in memory, ordered by a pure function of seed and step.

A batch holds `encoder_ids` `[B, P + T]` (P slots, then tokens; 0 is padding) and `targets`
`[B, L]`. Which examples batch k holds depends on nothing but the seed and k, so a run can stop
and go on anywhere. TensorFlow and seqio are imported only by the functions that read seqio tasks.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from softprompt.vocabulary import EOS_ID, Vocabulary

Batch = dict[str, np.ndarray]
LENGTH_MULTIPLE = 8
EVAL_BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048)


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokenised examples, each ending in EOS and no longer than its feature length.

    Attributes:
      name: of the task they come from.
      inputs, targets: token ids, one array per example.
      records: the fields each example came from (text, idx, …), for metrics and reports.
      cut: how many inputs and targets were longer than the feature length and were cut.
    """

    name: str
    inputs: list[np.ndarray]
    targets: list[np.ndarray]
    records: list[dict[str, Any]]
    cut: dict[str, int]

    def __len__(self) -> int:
        return len(self.targets)


def trim(ids: Sequence[int], length: int) -> np.ndarray:
    """Ids with EOS at the end, at most `length` of them."""
    ids = np.asarray(ids, np.int32)
    if not len(ids) or ids[-1] != EOS_ID:
        ids = np.append(ids, np.int32(EOS_ID))
    return ids if len(ids) <= length else np.append(ids[: length - 1], np.int32(EOS_ID))


def make_examples(
    name: str,
    inputs: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    records: Sequence[dict[str, Any]],
    lengths: Mapping[str, int],
) -> Examples:
    """Trims token ids to `lengths` (`inputs`, `targets`), counting what was cut."""
    if not len(targets):
        raise ValueError(f"{name}: there are no examples")
    cut = {}
    trimmed = {}
    for feature, rows in (("inputs", inputs), ("targets", targets)):
        trimmed[feature] = [trim(ids, lengths[feature]) for ids in rows]
        full = (len(ids) + (not len(ids) or ids[-1] != EOS_ID) for ids in rows)
        cut[feature] = sum(n > lengths[feature] for n in full)
    return Examples(name, trimmed["inputs"], trimmed["targets"], list(records), cut)


def from_pairs(
    pairs: Sequence[tuple[str, str]],
    vocabulary: Vocabulary,
    lengths: Mapping[str, int],
    name: str = "pairs",
) -> Examples:
    """Examples from (text, target) pairs, without TensorFlow."""
    for i, pair in enumerate(pairs):
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(f"{name}: pair {i} is {pair!r}, expected (text, target) strings")
    texts, targets = [p[0] for p in pairs], [p[1] for p in pairs]
    records = [
        {"inputs_pretokenized": text, "targets_pretokenized": target} for text, target in pairs
    ]
    return make_examples(
        name, vocabulary.encode_batch(texts), vocabulary.encode_batch(targets), records, lengths
    )


def cut_message(examples: Examples, lengths: Mapping[str, int]) -> str | None:
    """A sentence on what was cut, or None."""
    parts = [
        f"{n} of {len(examples)} {feature} were longer than {lengths[feature]} tokens and were cut"
        for feature, n in examples.cut.items()
        if n
    ]
    return f"{examples.name}: {'; '.join(parts)}" if parts else None


# --- batches ------------------------------------------------------------------------------------


def pad(
    rows: Sequence[np.ndarray], batch_size: int, length: int, prefix: np.ndarray | None = None
) -> np.ndarray:
    """Rows as `[batch_size, len(prefix) + length]` int32, right-padded with 0.

    Rows beyond `len(rows)` are all padding.
    """
    start = 0 if prefix is None else len(prefix)
    out = np.zeros((batch_size, start + length), np.int32)
    for i, ids in enumerate(rows):
        out[i, :start] = prefix if start else 0
        out[i, start : start + len(ids)] = ids
    return out


def round_up(n: int, multiple: int = LENGTH_MULTIPLE) -> int:
    """`n` rounded up to a multiple."""
    return -(-n // multiple) * multiple


def longest(rows: Sequence[np.ndarray]) -> int:
    """Length of the longest row, rounded up so that few shapes compile."""
    return round_up(max(len(ids) for ids in rows))


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `n` examples in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def train_batches(
    parts: Sequence[Examples],
    rates: Sequence[float],
    batch_size: int,
    seed: int,
    slots: np.ndarray,
) -> Callable[[int], Iterator[Batch]]:
    """Endless shuffled batches of a mixture; call the result with the step to start from.

    Every row's part is drawn with probability proportional to `rates`, and each part is gone
    through in a new order every epoch. All batches have one shape.

    Args:
      parts: examples of each task.
      rates: relative sampling rate of each part.
      slots: slot ids put before each input, `[P]`.
    """
    inputs_length = max(longest(part.inputs) for part in parts)
    targets_length = max(longest(part.targets) for part in parts)
    shares = np.asarray(rates, np.float64) / np.sum(rates)

    def draw(step: int) -> np.ndarray:
        if len(parts) == 1:
            return np.zeros(batch_size, np.int64)
        return np.random.default_rng([seed, 1, step]).choice(len(parts), batch_size, p=shares)

    def generate(start: int) -> Iterator[Batch]:
        taken = np.zeros(len(parts), np.int64)
        if len(parts) == 1:
            taken[0] = start * batch_size
        else:
            for step in range(start):
                taken += np.bincount(draw(step), minlength=len(parts))
        orders: dict[int, tuple[int, np.ndarray]] = {}
        step = start
        while True:
            rows = []
            for k in draw(step):
                n = len(parts[k])
                epoch, position = divmod(int(taken[k]), n)
                if orders.get(k, (None,))[0] != epoch:
                    orders[k] = (epoch, permutation(n, seed, epoch))
                rows.append((parts[k], orders[k][1][position]))
                taken[k] += 1
            yield {
                "encoder_ids": pad(
                    [part.inputs[i] for part, i in rows], batch_size, inputs_length, slots
                ),
                "targets": pad([part.targets[i] for part, i in rows], batch_size, targets_length),
            }
            step += 1

    return generate


def eval_batches(
    examples: Examples, batch_size: int, slots: np.ndarray
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Every example once: (indices, batch), shortest inputs first, in few shapes.

    Input lengths are those of `EVAL_BUCKETS`; rows past `len(indices)` are padding.
    """
    order = np.argsort([len(ids) for ids in examples.inputs], kind="stable")
    targets_length = longest(examples.targets)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        n = max(len(examples.inputs[i]) for i in indices)
        length = next((b for b in EVAL_BUCKETS if b >= n), round_up(n, 512))
        yield (
            indices,
            {
                "encoder_ids": pad(
                    [examples.inputs[i] for i in indices], batch_size, length, slots
                ),
                "targets": pad([examples.targets[i] for i in indices], batch_size, targets_length),
            },
        )


# --- seqio --------------------------------------------------------------------------------------


def get_tasks(name: str) -> list[tuple[Any, float]]:
    """The seqio tasks of a task or mixture, with their rates.

    An unknown name is an error that lists near names.
    """
    import difflib

    import seqio

    known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.4)
        raise ValueError(
            f"no seqio task or mixture is named {name!r}; "
            + (f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(sorted(known))}")
            + " (MIXTURE_OR_TASK_MODULE names the module that registers tasks)"
        )
    found = seqio.get_mixture_or_task(name)
    if isinstance(found, seqio.Mixture):
        return [(task, found.get_rate(task)) for task in found.tasks]
    return [(found, 1.0)]


def from_task(task: Any, split: str, lengths: Mapping[str, int]) -> Examples:
    """All examples of a seqio task's split, tokenised, in memory."""
    if split not in task.splits:
        raise ValueError(
            f"task {task.name} has no split {split!r}; it has {', '.join(task.splits)}"
        )
    dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False)
    records = list(dataset.as_numpy_iterator())
    if not records:
        raise ValueError(f"task {task.name}, split {split!r}: there are no examples")
    inputs = [r.get("inputs", np.zeros(0, np.int32)) for r in records]
    targets = [r["targets"] for r in records]
    return make_examples(task.name, inputs, targets, records, lengths)


def first_examples(task: Any, split: str, lengths: Mapping[str, int], count: int) -> Examples:
    """The first `count` examples of a split too large for memory, always the same ones."""
    dataset = task.get_dataset(sequence_length=dict(lengths), split=split, shuffle=False, seed=0)
    records = list(dataset.take(count).as_numpy_iterator())
    return make_examples(
        task.name, [r["inputs"] for r in records], [r["targets"] for r in records], records, lengths
    )


def stream_batches(
    name: str, split: str, lengths: Mapping[str, int], batch_size: int, seed: int
) -> Callable[[int], Iterator[Batch]]:
    """Endless batches of a task too large for memory (pre-training text), read as they are needed.

    seqio's pipeline is deterministic for a seed; starting at step k reads past k batches.
    """
    import seqio
    import tensorflow as tf

    get_tasks(name)

    def generate(start: int) -> Iterator[Batch]:
        dataset = seqio.get_mixture_or_task(name).get_dataset(
            sequence_length=dict(lengths), split=split, shuffle=True, seed=seed, num_epochs=None
        )
        dataset = dataset.map(
            lambda x: {
                "encoder_ids": tf.cast(x["inputs"][: lengths["inputs"]], tf.int32),
                "targets": tf.cast(x["targets"][: lengths["targets"]], tf.int32),
            }
        )
        dataset = dataset.padded_batch(
            batch_size,
            {"encoder_ids": [lengths["inputs"]], "targets": [lengths["targets"]]},
            drop_remainder=True,
        )
        options = tf.data.Options()
        options.deterministic = True
        dataset = dataset.with_options(options).skip(start).prefetch(8)
        yield from dataset.as_numpy_iterator()

    return generate
