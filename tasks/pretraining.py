"""Pre-training tasks over unlabelled text: span corruption and prefix language modelling.

- `pretrain_span_corruption` is T5's objective (Raffel et al. 2020, section 3.1.4: 15% noise, mean
  span 3, sentinels).
- `pretrain_span_corruption_dense` is the same with 50% noise: more than three times the loss terms
  per step. Their table 6 finds rates from 10% to 50% about as good.
- `pretrain_prefix_lm` is the "LM adaptation" objective (Lester et al. 2021, section 3.3): a prefix
  as input, its continuation as target.

All read the corpus that `use_corpus` or SOFTPROMPT_CORPUS names: a folder of JSON Lines shards
`train*.jsonl` and `validation*.jsonl` (also `.gz`, `.xz` and `.zst`) with a field `text`, or a TFDS
data set with such a field, written `tfds:c4/en:3.1.0`.
"""

import functools
import os
import pathlib

import numpy as np

from softprompt import vocabulary
from softprompt.importing import import_seqio
from softprompt.tasks.catalogue import vocabulary_path
from softprompt.tasks.features import FEATURES

seqio = import_seqio()

import tensorflow as tf  # noqa: E402 (as seqio imports it)

_corpus: str | None = None
TFDS = "tfds:"


def use_corpus(corpus: str | os.PathLike | None) -> None:
    """Names the text to pre-train on (a folder, or `tfds:NAME`), over SOFTPROMPT_CORPUS."""
    global _corpus
    _corpus = None if corpus is None else str(corpus)


def _named_corpus() -> str:
    corpus = _corpus or os.environ.get("SOFTPROMPT_CORPUS")
    if not corpus:
        raise ValueError(
            "no text to pre-train on: name a folder of JSON Lines shards, or tfds:NAME, by CORPUS "
            "in gin or by the environment variable SOFTPROMPT_CORPUS"
        )
    return corpus


def shards(split: str) -> list[str]:
    """Paths of the shards of `split`, sorted; an error says where they were looked for."""
    folder = _named_corpus()
    paths = sorted(str(p) for p in pathlib.Path(folder).glob(f"{split}*.jsonl*"))
    if not paths:
        raise ValueError(f"{folder!r} holds no shards {split}*.jsonl (or .gz, .xz, .zst)")
    return paths


def sizes(split: str) -> dict[str, int] | None:
    """Bytes of each shard of `split`, by its name; None for text of TFDS."""
    if _named_corpus().startswith(TFDS):
        return None
    return {os.path.basename(path): os.path.getsize(path) for path in shards(split)}


def _documents(split: str, shuffle_files: bool = False, seed: int | None = None):
    corpus = _named_corpus()
    if corpus.startswith(TFDS):
        loader = seqio.LazyTfdsLoader(corpus.removeprefix(TFDS))
        return loader.load(split, shuffle_files, seed).map(lambda x: {"text": x["text"]})
    paths = shards(split)
    if shuffle_files:
        # Shards in an order of the seed's own: a run too short to read all of them still differs
        # from another seed's. The chunks are shuffled after splitting.
        paths = np.random.default_rng(seed).permutation(paths).tolist()

    def generate():
        for path in paths:
            for text in vocabulary.read_documents(path):
                yield {"text": text}

    return tf.data.Dataset.from_generator(
        generate, output_signature={"text": tf.TensorSpec([], tf.string)}
    )


def split_into_chunks(
    dataset: tf.data.Dataset, length: int, documents: int = 64
) -> tf.data.Dataset:
    """Concatenates tokenised `targets`, EOS between documents, and cuts chunks of `length`.

    What is left at the end of every `documents` documents (less than one chunk) is dropped.
    """

    def chunk(batch):
        flat = batch["targets"].flat_values
        usable = tf.size(flat) // length * length
        return tf.data.Dataset.from_tensor_slices(
            {"targets": tf.reshape(flat[:usable], [-1, length])}
        )

    return dataset.ragged_batch(documents).flat_map(chunk)


def span_lengths(inputs_length: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """Chunk length whose corrupted inputs, with EOS, fill `inputs_length`, and targets' length.

    A chunk of n tokens with k = round(n·density) noise tokens in s = round(k / mean_span) spans
    gives inputs of n - k + s + 1 and targets of k + s + 1 tokens.
    """

    def sizes(n):
        noise = round(n * noise_density)
        spans = max(round(noise / mean_span), 1)
        return n - noise + spans + 1, noise + spans + 1

    n = inputs_length
    while sizes(n + 1)[0] <= inputs_length:
        n += 1
    return n, sizes(n)[1]


def _random_parts(total: int, parts: int, seed) -> tf.Tensor:
    """Splits `total` into `parts` positive integers, each split equally likely."""
    cuts = tf.random.experimental.stateless_shuffle(
        tf.cast(tf.range(total - 1) < parts - 1, tf.int32), seed
    )
    part = tf.cumsum(tf.concat([[0], cuts], 0))
    return tf.math.segment_sum(tf.ones_like(part), part)


def corrupt_spans(
    tokens: tf.Tensor, seed: tf.Tensor, noise_density: float, mean_span: float, sentinel0: int
) -> dict[str, tf.Tensor]:
    """One corrupted example, without EOS, from `tokens` `[n]` (n known) and a seed `[2]`."""
    n = tokens.shape[0]
    noise = round(n * noise_density)
    spans = max(round(noise / mean_span), 1)
    seeds = tf.random.experimental.stateless_split(seed, 2)
    noise_spans = _random_parts(noise, spans, seeds[0])
    kept_spans = _random_parts(n - noise, spans, seeds[1])
    # kept, noise, kept, noise, …: odd runs are noise.
    runs = tf.reshape(tf.stack([kept_spans, noise_spans], axis=1), [-1])
    run = tf.repeat(tf.range(2 * spans), runs)
    is_noise = run % 2 == 1
    first = tf.concat([[True], run[1:] != run[:-1]], 0)
    sentinel = tf.cast(sentinel0 - run // 2, tokens.dtype)

    def fill(dropped):
        # The first token of each dropped run becomes its sentinel, the rest of it vanishes.
        filled = tf.where(dropped, sentinel, tokens)
        return tf.boolean_mask(filled, ~dropped | first)

    inputs = fill(is_noise)
    # Targets: sentinel, span, sentinel, span, …
    targets = fill(~is_noise)
    return {
        "inputs": tf.ensure_shape(inputs, [n - noise + spans]),
        "targets": tf.ensure_shape(targets, [noise + spans]),
    }


def span_corruption(
    dataset: tf.data.Dataset,
    sequence_length: dict[str, int],
    output_features,
    noise_density: float = 0.15,
    mean_span: float = 3.0,
) -> tf.data.Dataset:
    """Chunks of text whose corrupted inputs fill `sequence_length["inputs"]`."""
    chunk, targets_length = span_lengths(sequence_length["inputs"], noise_density, mean_span)
    if sequence_length["targets"] < targets_length:
        raise ValueError(
            f"span corruption of {sequence_length['inputs']} inputs makes {targets_length} "
            f"targets; TASK_FEATURE_LENGTHS gives targets {sequence_length['targets']}"
        )
    del output_features
    sentinel0 = vocabulary.open_vocabulary(vocabulary_path()).sentinel(0)

    @seqio.map_over_dataset(num_seeds=1)
    def corrupt(x, seed):
        tokens = tf.ensure_shape(x["targets"], [chunk])
        return corrupt_spans(tokens, seed, noise_density, mean_span, sentinel0)

    return corrupt(split_into_chunks(dataset, chunk))


def prefix_lm(
    dataset: tf.data.Dataset, sequence_length: dict[str, int], output_features
) -> tf.data.Dataset:
    """Chunks split at a random point: the prefix is the input, the continuation the target.

    The chunk is as long as inputs and targets together; the split leaves neither side longer than
    its feature, nor empty.
    """
    del output_features
    inputs, targets = sequence_length["inputs"] - 1, sequence_length["targets"] - 1
    chunk = inputs + targets

    @seqio.map_over_dataset(num_seeds=1)
    def cut(x, seed):
        # Uniform over window lengths, so that short prefixes and short continuations are both seen.
        seeds = tf.random.experimental.stateless_split(seed, 2)
        prefix = tf.random.stateless_uniform([], seeds[0], 1, inputs + 1, tf.int32)
        return {
            "inputs": x["targets"][inputs - prefix : inputs],
            "targets": x["targets"][inputs:],
        }

    return cut(split_into_chunks(dataset, chunk))


def _register(name: str, objective) -> None:
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(_documents, splits=("train", "validation")),
        preprocessors=[
            functools.partial(
                seqio.preprocessors.rekey, key_map={"inputs": None, "targets": "text"}
            ),
            seqio.preprocessors.tokenize_and_append_eos,
            _only_targets,
            objective,
            seqio.preprocessors.append_eos,
        ],
        output_features=FEATURES,
        metric_fns=[],
    )


def _only_targets(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.map(lambda x: {"targets": x["targets"]}, num_parallel_calls=tf.data.AUTOTUNE)


_register("pretrain_span_corruption", span_corruption)
_register("pretrain_span_corruption_dense", functools.partial(span_corruption, noise_density=0.5))
_register("pretrain_prefix_lm", prefix_lm)
