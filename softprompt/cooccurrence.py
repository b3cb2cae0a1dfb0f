"""Token embeddings from co-occurrence counts: where pre-training on little text starts.

A matrix of positive pointwise mutual information between tokens a few positions apart, cut to its
leading singular vectors, is what skip-gram with negative sampling factorises (Levy & Goldberg 2014,
"Neural Word Embedding as Implicit Matrix Factorization"; contexts smoothed by a power of 0.75 and
weighted by 1/distance as in Levy et al. 2015). Counting costs seconds where training an embedding
from random values costs most of a small budget.
"""

import io
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from softprompt import checkpoint
from softprompt.settings import check_counts
from softprompt.vocabulary import EOS_ID, open_vocabulary, read_documents

MOST_TOKENS = 20_000
CHUNK = 1 << 24


def counts(pieces: Iterable[np.ndarray], size: int, window: int = 8) -> np.ndarray:
    """Directed co-occurrences `[size, size]` float32: entry (a, b) sums 1/d over b at d after a.

    Args:
      pieces: token ids, one array per stretch of text.
      window: the largest distance d that counts.
    """
    if size > MOST_TOKENS:
        raise ValueError(
            f"the vocabulary has {size} pieces; the dense table of co-occurrences is for at most "
            f"{MOST_TOKENS}"
        )
    table = np.zeros(size * size, np.float32)
    for ids in pieces:
        ids = ids.astype(np.int64)
        for d in range(1, window + 1):
            for start in range(0, len(ids) - d, CHUNK):
                after = ids[start + d : start + d + CHUNK]
                pair = ids[start : start + len(after)] * size + after
                table += np.bincount(pair, minlength=size * size).astype(np.float32) / d
    return table.reshape(size, size)


def embeddings(table: np.ndarray, width: int, seed: int = 0) -> np.ndarray:
    """`[V, width]` float32 of mean square 1 per row, from directed counts `[V, V]`.

    T5 initialises its embedding with unit variance, so its first norm sees the same scale.
    Tokens that never occur keep random rows.
    """
    from sklearn.utils.extmath import randomized_svd

    both = table + table.T
    seen = both.sum(1) > 0
    context = both.sum(0) ** 0.75
    context = np.log(np.maximum(context / context.sum(), 1e-12))
    information = np.log(np.maximum(both, 1e-9))
    information -= np.log(np.maximum(both.sum(1, keepdims=True), 1e-9))
    information -= context
    information = np.where(both > 0, np.maximum(information, 0), 0).astype(np.float32)
    left, values, _ = randomized_svd(information, width, n_iter=3, random_state=seed)
    rows = left * np.sqrt(values)
    rows[~seen] = np.random.default_rng(seed).standard_normal((int((~seen).sum()), width))
    rms = np.sqrt(np.mean(rows**2, axis=1, keepdims=True))
    return (rows / np.maximum(rms, 1e-9)).astype(np.float32)


def start_from(params: Mapping[str, Any], path: str | os.PathLike) -> dict[str, Any]:
    """`params` with the embedding of a `.npy` file, and an untied head that scores by it.

    The head's kernel is the embedding over sqrt(H), the scale of T5's own initialiser. Rows that
    the file lacks (padding, sentinels beyond it) keep their random values.
    """
    import jax

    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"EMBEDDINGS_FILE {str(path)!r} cannot be read: {error}") from None
    name, head = "token_embedder/embedding", "decoder/logits_dense/kernel"
    size, width = params[name].shape
    if rows.ndim != 2 or rows.shape[1] != width or len(rows) > size:
        raise ValueError(
            f"EMBEDDINGS_FILE {str(path)!r} has shape {rows.shape}, expected (at most {size}, "
            f"{width}) for this architecture"
        )

    def place(key: str, value: np.ndarray) -> jax.Array:
        return jax.device_put(value.astype(params[key].dtype), params[key].sharding)

    table = np.array(params[name], np.float32)
    table[: len(rows)] = rows
    changed = {name: place(name, table)}
    if head in params:
        kernel = np.array(params[head], np.float32)
        kernel[:, : len(rows)] = rows.T / np.sqrt(width)
        changed[head] = place(head, kernel)
    return {**params, **changed}


def make(
    inputs: Sequence[str | os.PathLike],
    vocabulary_file: str | os.PathLike,
    output: str | os.PathLike,
    width: int,
    window: int = 8,
    seed: int = 0,
) -> np.ndarray:
    """Embeddings of the texts in JSON Lines shards, written to `output` (`.npy`).

    Raises:
      ValueError: a number out of its range, a text that cannot be read, or no text at all.
    """
    from softprompt.logbook import say

    if pathlib.Path(output).suffix != ".npy":
        raise ValueError(f"--output is {str(output)!r}, expected a file that ends in .npy")
    check_counts(width=(width, 1), window=(window, 1), seed=(seed, 0))
    vocabulary = open_vocabulary(vocabulary_file)
    if width > vocabulary.size:
        raise ValueError(
            f"width is {width}, expected at most the vocabulary's size, {vocabulary.size}"
        )
    pathlib.Path(output).absolute().parent.mkdir(parents=True, exist_ok=True)

    def pieces():
        for path in inputs:
            ids = vocabulary.encode_batch(list(read_documents(path)))
            rows = [np.array([*x, EOS_ID], np.int32) for x in ids]
            flat = np.concatenate([np.zeros(0, np.int32), *rows])
            say(f"{path}: {len(flat) / 1e6:.1f}M tokens")
            yield flat

    table = counts(pieces(), vocabulary.size, window)
    if not table.any():
        raise ValueError(f"{', '.join(map(str, inputs))} hold no text to count co-occurrences in")
    rows = embeddings(table, width, seed)
    content = io.BytesIO()
    np.save(content, rows)
    checkpoint.write_atomically(output, content.getvalue())
    return rows
