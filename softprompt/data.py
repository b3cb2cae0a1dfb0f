"""Examples to batches: tokenised in memory, ordered by a pure function of seed and step.

A batch holds `encoder_ids` `[B, P + T]` (P slots, then tokens; 0 is padding) and `targets`
`[B, L]`. Which examples batch k holds depends on nothing but the seed and k, so a run can stop
and go on anywhere. TensorFlow and seqio are imported only by the functions that read seqio tasks.
"""

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from softprompt import offline_cache
from softprompt.logbook import say, track
from softprompt.tasks import catalogue
from softprompt.vocabulary import EOS_ID, Vocabulary

Batch = dict[str, np.ndarray]
LENGTH_MULTIPLE = 8
# A text that any two vocabularies cut differently.
PROBE = "Is this tokenised as the backbone's texts are? 1,024 times, naïvely."


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

    def take(self, indices: Sequence[int]) -> "Examples":
        """The examples at `indices`, in their order."""
        inputs, targets, records = (
            [found[i] for i in indices] for found in (self.inputs, self.targets, self.records)
        )
        return Examples(self.name, inputs, targets, records, self.cut)


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
    for feature, rows in zip(catalogue.FEATURES, (inputs, targets), strict=True):
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


def drawn(
    parts: Sequence[Examples], rates: Sequence[float], count: int, seed: int, start: int = 0
) -> Iterator[list[tuple[Examples, int]]]:
    """Endless groups of `count` (part, index of its example), from group `start` on.

    Every member's part is drawn with probability proportional to `rates`, and each part is gone
    through in a new order every epoch.
    """
    shares = np.asarray(rates, np.float64) / np.sum(rates)

    def draw(step: int) -> np.ndarray:
        if len(parts) == 1:
            return np.zeros(count, np.int64)
        return np.random.default_rng([seed, 1, step]).choice(len(parts), count, p=shares)

    taken = np.zeros(len(parts), np.int64)
    if len(parts) == 1:
        taken[0] = start * count
    else:
        for step in range(start):
            taken += np.bincount(draw(step), minlength=len(parts))
    orders: dict[int, tuple[int, np.ndarray]] = {}
    for step in itertools.count(start):
        group = []
        for k in draw(step):
            epoch, position = divmod(int(taken[k]), len(parts[k]))
            if orders.get(k, (None,))[0] != epoch:
                orders[k] = (epoch, permutation(len(parts[k]), seed, epoch))
            group.append((parts[k], int(orders[k][1][position])))
            taken[k] += 1
        yield group


def train_batches(
    parts: Sequence[Examples],
    rates: Sequence[float],
    batch_size: int,
    seed: int,
    slots: np.ndarray,
    own: slice = slice(None),
) -> Callable[[int], Iterator[Batch]]:
    """Endless shuffled batches of a mixture, an example in each row; all of one shape.

    Call the result with the step to start from. `slots` `[P]` are put before each input; for
    `parts`, `rates` and `seed` see `drawn`. Of each batch only the rows `own` are made: those of
    this process (`partition.local_rows`). They are the same rows whoever makes them.
    """
    inputs_length = max(longest(part.inputs) for part in parts)
    targets_length = max(longest(part.targets) for part in parts)

    def generate(start: int) -> Iterator[Batch]:
        for rows in drawn(parts, rates, batch_size, seed, start):
            inputs = [part.inputs[i] for part, i in rows[own]]
            targets = [part.targets[i] for part, i in rows[own]]
            yield {
                "encoder_ids": pad(inputs, len(inputs), inputs_length, slots),
                "targets": pad(targets, len(targets), targets_length),
            }

    return generate


def fingerprint(parts: Sequence[Examples]) -> str:
    """A hash of examples as they are tokenised, 16 characters."""
    found = hashlib.sha256()
    for part in parts:
        for rows in (part.inputs, part.targets):
            found.update(np.array([len(ids) for ids in rows], np.int64).tobytes())
            for ids in rows:
                found.update(np.ascontiguousarray(ids, np.int32).data)
    return found.hexdigest()[:16]


# --- seqio --------------------------------------------------------------------------------------


def get_tasks(name: str) -> list[tuple[Any, float]]:
    """The tasks of a task or mixture, with their rates.

    Definitions of `softprompt.tasks.catalogue` are taken as they are, but where the program goes by
    seqio: it imported `softprompt.tasks.registry`, or has offline caches. What is not among them is
    seqio's. An unknown name is an error that lists near names.
    """
    import difflib

    seqio = sys.modules.get("seqio")
    if name in catalogue.names():
        cached = seqio is not None and seqio.get_global_cache_dirs()
        if not cached and "softprompt.tasks.registry" not in sys.modules:
            return catalogue.find(name)
        from softprompt.tasks import registry  # noqa: F401 (registers what is defined)
    known = set(catalogue.names())
    if seqio is not None:
        known |= {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in known:
        near = difflib.get_close_matches(name, sorted(known), n=5, cutoff=0.4)
        raise ValueError(
            f"no seqio task or mixture is named {name!r}; "
            + (f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(sorted(known))}")
            + " (MIXTURE_OR_TASK_MODULE names the module that registers tasks)"
        )
    found = seqio.get_mixture_or_task(name)
    if isinstance(found, seqio.Mixture):
        return [(task, found.get_rate(task)) for task in found.tasks]
    return [(found, 1.0)]


def _check_vocabulary(task: Any) -> None:
    """Raises unless a seqio task tokenises as the backbone does."""
    ours = catalogue.vocabulary()
    for feature in catalogue.features_of(task):
        theirs = task.output_features[feature].vocabulary.encode(PROBE)
        # seqio.PassThroughVocabulary gives the text back: its tasks bring ids.
        if theirs != PROBE and sorted(theirs) != sorted(ours.encode(PROBE)):
            raise ValueError(
                f"the {feature} of task {task.name} are tokenised by another vocabulary than the "
                f"backbone's, {ours.path!r}: softprompt.tasks.features.VOCABULARY stands for it in "
                "a seqio.Feature"
            )


def _check_ids(task: Any, records: Sequence[Mapping[str, Any]]) -> None:
    """Raises where a seqio task's records hold ids that the backbone's vocabulary has not."""
    size = catalogue.vocabulary().size
    for feature in catalogue.features_of(task):
        ids = [record[feature] for record in records if feature in record]
        largest = max((int(x.max()) for x in ids if len(x)), default=0)
        if largest >= size:
            raise ValueError(
                f"the {feature} of task {task.name} hold the id {largest}, expected less than "
                f"{size}, the size of the backbone's vocabulary"
            )


_kept: contextvars.ContextVar[dict[Any, list] | None] = contextvars.ContextVar("kept", default=None)


@contextlib.contextmanager
def keeping_records() -> Iterator[None]:
    """Within it every split is read and tokenised once for all runs, and stays in memory."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def from_task(task: Any, split: str, lengths: Mapping[str, int]) -> Examples:
    """All examples of a task's split, tokenised, in memory; from seqio's offline cache if any."""
    # Our tasks take no heed of the lengths: without them it is known what was cut.
    heeded = None if task.name in catalogue.names() else dict(lengths)
    kept = _kept.get()
    if kept is None:
        return _examples(task, _records(task, split, heeded), lengths)
    key = (task, split, catalogue.vocabulary_path(), *sorted((heeded or {}).items()))
    if key not in kept:
        kept[key] = _records(task, split, heeded)
    return _examples(task, kept[key], lengths)


def check_split(task: Any, split: str) -> None:
    """Raises where a task lacks the split."""
    if split not in task.splits:
        raise ValueError(
            f"task {task.name} has no split {split!r}; it has {', '.join(task.splits)}"
        )


def _examples(task: Any, records: Sequence[dict[str, Any]], lengths: Mapping[str, int]) -> Examples:
    inputs = [r.get("inputs", np.zeros(0, np.int32)) for r in records]
    targets = [r["targets"] for r in records]
    return make_examples(task.name, inputs, targets, records, lengths)


def _records(task: Any, split: str, lengths: Mapping[str, int] | None) -> list[dict[str, Any]]:
    """A split's records, whose inputs and targets `make_examples` cuts.

    `lengths` are what seqio gives to the preprocessors.
    """
    check_split(task, split)
    if isinstance(task, catalogue.Definition):
        records = task.records(split)
    else:
        _check_vocabulary(task)
        cached = offline_cache.folder_of(task, split)
        if cached is not None:
            say(f"{task.name}: {split} is read from the cache {cached!r}")
        records = _read(task, split, lengths, cached)
        _check_ids(task, records)
    if not records:
        raise ValueError(f"task {task.name}, split {split!r}: there are no examples")
    return records


def _read(
    task: Any, split: str, lengths: Mapping[str, int] | None, cached: str | None
) -> list[dict[str, Any]]:
    """A seqio task's records, from its cache or its source; what fails there is one sentence."""
    try:
        dataset = _dataset(
            task,
            sequence_length=lengths,
            split=split,
            shuffle=False,
            use_cached=cached is not None,
            trim_output_features=False,
        )
        records = list(track(_rows(dataset), f"{task.name}: reading {split}", "examples"))
    except MemoryError:
        raise
    except ValueError as error:  # A sentence of seqio's.
        raise ValueError(f"task {task.name}, split {split!r}: {error}") from error
    except Exception as error:  # Of the task's own functions, or of TensorFlow.
        said = re.sub(r"\{\{.*?\}\}\s*", "", str(error)).strip().split("\n")[0]
        where = f"the cache {cached!r}" if cached else "its source or a preprocessor"
        raise ValueError(
            f"task {task.name}, split {split!r}: {where} failed: {type(error).__name__}: {said}"
        ) from error
    if cached is not None:
        offline_cache.check_tokens(task, records)
    return records


def _rows(dataset: Any, size: int = 256) -> Iterator[dict[str, Any]]:
    """`dataset.as_numpy_iterator()`, read in batches: three times as fast for short rows."""
    import tensorflow as tf

    spec = dataset.element_spec
    plain = isinstance(spec, dict) and all(
        isinstance(x, tf.TensorSpec) and x.shape.rank in (0, 1) for x in spec.values()
    )
    if not plain:
        yield from dataset.as_numpy_iterator()
        return
    for batch in dataset.ragged_batch(size):
        columns = {}
        for name, column in batch.items():
            if isinstance(column, tf.RaggedTensor):
                splits = column.row_splits.numpy()
                columns[name] = np.split(np.array(column.values), splits[1:-1])
            else:
                columns[name] = np.array(column)
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def _dataset(task: Any, **settings: Any) -> Any:
    """`task.get_dataset`, without AutoGraph where the task's preprocessors need none.

    Converting them costs seconds of every start. One that has Python's control flow over tensors
    raises a TypeError without conversion.
    """
    import tensorflow as tf

    get = functools.partial(task.get_dataset, **settings)
    try:
        return tf.autograph.experimental.do_not_convert(get)()
    except TypeError:
        return get()


def prefix_targets(examples: Examples, prefix: Sequence[int]) -> Examples:
    """The examples with the ids `prefix` before every target."""
    front = np.array(prefix, np.int32)
    targets = [np.concatenate([front, x]) for x in examples.targets]
    return dataclasses.replace(examples, targets=targets)


def first_examples(task: Any, split: str, lengths: Mapping[str, int], count: int) -> Examples:
    """The first `count` examples of a split too large for memory, always the same ones."""
    _check_vocabulary(task)
    dataset = _dataset(task, sequence_length=dict(lengths), split=split, shuffle=False, seed=0)
    taken = dataset.take(count).as_numpy_iterator()
    records = list(track(taken, f"{task.name}: reading {split}", "examples", count))
    _check_ids(task, records)
    return _examples(task, records, lengths)


def stream_batches(
    name: str,
    split: str,
    lengths: Mapping[str, int],
    batch_size: int,
    seed: int,
    own: slice = slice(None),
) -> Callable[[int], Iterator[Batch]]:
    """Endless batches of a task too large for memory (pre-training text), read as they are needed.

    seqio's pipeline is deterministic for a seed; starting at step k reads past k batches. For
    `own` see `train_batches`: the text of the other rows is read too, to keep the order.
    """
    import seqio
    import tensorflow as tf

    for task, _ in get_tasks(name):
        if not isinstance(task, catalogue.Definition):
            _check_vocabulary(task)

    def generate(start: int) -> Iterator[Batch]:
        dataset = seqio.get_mixture_or_task(name).get_dataset(
            sequence_length=dict(lengths), split=split, shuffle=True, seed=seed, num_epochs=None
        )
        dataset = dataset.map(
            lambda x: {
                "encoder_ids": tf.cast(x.get("inputs", [EOS_ID])[: lengths["inputs"]], tf.int32),
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
        dataset = dataset.with_options(options).skip(start)
        dataset = dataset.map(lambda batch: {k: x[own] for k, x in batch.items()}).prefetch(8)
        yield from dataset.as_numpy_iterator()

    return generate
