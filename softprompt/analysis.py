"""What tuned prompts look like (Lester et al. 2021, section 7): `softprompt analyse`.

Nearest vocabulary tokens of every position and clusters of them, class labels that persist from
the initialisation, drift from it, and similarity between prompts (SPoT, Vu et al. 2022, section
3.1). Everything here is NumPy on prompts `[P, H]` and an embedding `[V, H]`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from softprompt import formats
from softprompt import similarity as spot
from softprompt.backbone import Backbone
from softprompt.formats import prompts
from softprompt.similarity import unit
from softprompt.vocabulary import AnyVocabulary

METRICS = ("cosine", "euclidean")
# Two tokens belong together that are closer than all but one in a thousand random pairs.
TOGETHER = 0.999


@dataclasses.dataclass(frozen=True)
class Words:
    """The tokens that neighbours are looked for among: embedding `[V, H]` float32, vocabulary."""

    name: str
    embedding: np.ndarray
    vocabulary: AnyVocabulary


@dataclasses.dataclass(frozen=True)
class Named:
    """A prompt `[P, H]`, the name it is shown by, what its file says, and what it started from."""

    name: str
    path: str
    array: np.ndarray
    metadata: Mapping[str, Any]
    initial: np.ndarray | None = None


# --- reading ------------------------------------------------------------------------------------


def read(
    paths: Sequence[str | os.PathLike], initial: str | os.PathLike | None = None
) -> list[Named]:
    """The prompts in files or in the folders of runs (their best one), all of one width.

    Of a deep prompt the rows of the input layer, which stand among token embeddings, are taken.
    What a prompt started from is `initial` or, beside it, `initial.safetensors` of the same shape,
    as a run leaves it.

    Raises:
      ValueError: nothing there, or widths that differ.
    """
    found, names = [], _short_names([str(p) for p in paths])
    for path, name in zip(paths, names, strict=True):
        where = pathlib.Path(path)
        if (best := where / "prompts" / "best.safetensors").is_file():
            where = best
        array, deep, metadata = prompts.read_deep(where if "://" not in str(path) else path)
        if deep is not None:
            metadata = {**metadata, "prompt_depth": len(deep) + 1}
        beside = where.parent / "initial.safetensors"
        start = initial
        if start is None and where.suffix == ".safetensors" and beside.is_file():
            start = beside
        first = None if start is None else prompts.read_deep(start)[0]
        if first is not None and first.shape != array.shape:
            if initial is not None:
                raise ValueError(
                    f"--initial {str(initial)!r} has shape {first.shape}, the prompt "
                    f"{str(path)!r} {array.shape}"
                )
            first = None
        found.append(Named(name, str(where), array, metadata, first))
    for prompt in found[1:]:
        if prompt.array.shape[1] != found[0].array.shape[1]:
            raise ValueError(
                f"the prompt {found[0].path!r} has width {found[0].array.shape[1]}, "
                f"{prompt.path!r} {prompt.array.shape[1]}: they belong to different backbones"
            )
    return found


def _short_names(paths: Sequence[str]) -> list[str]:
    """The shortest endings of the paths that tell them apart, without file endings."""
    # A folder's name may hold a point: `sentiment-rate0.3-seed0`. `.` and `..` name none.
    parts = [
        (path.resolve() if path.name in ("", "..") else path).parts
        if path.is_dir()
        else path.with_suffix("").parts
        for path in map(pathlib.Path, paths)
    ]
    parts = [p[:-2] if p[-2:] == ("prompts", "best") and len(p) > 2 else p for p in parts]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({i})" for i, name in enumerate(names)]


def words_of(
    backbone: str | os.PathLike, vocabulary_file: str | os.PathLike | None = None
) -> Words:
    """The vocabulary tokens of a backbone; nothing but its embedding is read."""
    stored = formats.open_stored(backbone, vocabulary_file)
    if stored.vocabulary is None:
        raise ValueError(
            f"the backbone {str(backbone)!r} has no vocabulary; give --vocabulary_file"
        )
    embedding = stored.read("token_embedder/embedding").astype(np.float32)
    return Words(stored.name, embedding[: stored.vocabulary.size], stored.vocabulary)


def words_in(backbone: Backbone) -> Words:
    """The vocabulary tokens of a loaded backbone. Collective: see `hosts`."""
    rows = backbone.embedding()[: backbone.vocabulary.size]
    return Words(backbone.name, rows, backbone.vocabulary)


def words_for(
    found: Sequence[Named],
    backbone: str | os.PathLike | None,
    vocabulary_file: str | os.PathLike | None = None,
) -> Words | None:
    """Those of `backbone`; without one those of the embedded backbone, if it is the prompts' own.

    Raises:
      ValueError: the backbone has another width, or no vocabulary.
    """
    if backbone is None:
        own = formats.open_stored("embedded").fingerprint
        if any(p.metadata.get("backbone_fingerprint") != own for p in found):
            return None
        backbone = "embedded"
    words = words_of(backbone, vocabulary_file)
    for prompt in found:
        if prompt.array.shape[1] != words.embedding.shape[1]:
            raise ValueError(
                f"the prompt {prompt.path!r} has width {prompt.array.shape[1]}, the backbone "
                f"{words.name!r} has {words.embedding.shape[1]}"
            )
    return words


# --- figures ------------------------------------------------------------------------------------


def nearest_tokens(
    array: np.ndarray, embedding: np.ndarray, count: int = 5, metric: str = "cosine"
) -> tuple[np.ndarray, np.ndarray]:
    """Ids `[P, count]` of the nearest embedding rows, and their cosines or distances.

    Lester et al. 2021, section 7, by cosine; 'euclidean' gives distances.
    """
    if metric == "cosine":
        values = unit(array) @ unit(embedding).T
        ids = np.argsort(-values, axis=1, kind="stable")[:, :count]
    else:
        squares = (array**2).sum(1)[:, None] + (embedding**2).sum(1) - 2 * array @ embedding.T
        values = np.sqrt(np.maximum(squares, 0))
        ids = np.argsort(values, axis=1, kind="stable")[:, :count]
    return ids, np.take_along_axis(values, ids, axis=1)


def drift(initial: np.ndarray, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """L2 distance and cosine `[P]` of each position from what it started as."""
    return np.linalg.norm(array - initial, axis=1), (unit(array) * unit(initial)).sum(1)


def similarity(arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Similarities `[N, N]` of prompts `[P, H]` (their lengths may differ).

    `mean_prompt` is the cosine of the mean vectors and `mean_position` the mean over all pairs of
    positions, both SPoT's; `best_match` is the mean over positions of the cosine with the most
    similar position of the other prompt, over both directions.
    """
    units = [unit(a) for a in arrays]

    def best_match(a: np.ndarray, b: np.ndarray) -> float:
        cosines = a @ b.T
        return float(cosines.max(1).mean() + cosines.max(0).mean()) / 2

    return {
        "mean_prompt": spot.matrix(arrays, "average"),
        "best_match": np.array([[best_match(a, b) for b in units] for a in units]),
        "mean_position": spot.matrix(arrays, "per_token"),
    }


def groups(ids: np.ndarray) -> list[list[int]]:
    """Positions joined wherever two of them share at least half of their nearest tokens `[P, k]`.

    Positions that share with no other are left out.
    """
    sets = [set(row) for row in ids.tolist()]
    found: list[set[int]] = []
    for i, own in enumerate(sets):
        near = [g for g in found if any(2 * len(own & sets[j]) >= ids.shape[1] for j in g)]
        found = [g for g in found if g not in near] + [{i}.union(*near)]
    return sorted((sorted(g) for g in found if len(g) > 1), key=lambda g: (-len(g), g))


def chance(embedding: np.ndarray, sample: int = 1500) -> tuple[float, float]:
    """Mean and 99.9th percentile of the cosine of two different tokens drawn at random."""
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(embedding), min(sample, len(embedding)), replace=False)
    rows = unit(embedding[np.sort(chosen)])
    cosines = (rows @ rows.T)[np.triu_indices(len(rows), 1)]
    return float(cosines.mean()), float(np.quantile(cosines, TOGETHER))


def token_clusters(ids: Sequence[int], embedding: np.ndarray, cosine: float) -> list[list[int]]:
    """Agglomerative clusters (average linkage) of tokens, cut at a cosine; of two tokens or more.

    The largest come first.
    """
    from sklearn.cluster import AgglomerativeClustering

    ids = sorted(set(ids))
    if len(ids) < 2:
        return []
    model = AgglomerativeClustering(
        n_clusters=None, distance_threshold=1 - cosine, metric="cosine", linkage="average"
    )
    label = model.fit_predict(embedding[ids])
    found = [[ids[i] for i in np.flatnonzero(label == k)] for k in range(label.max() + 1)]
    return sorted((c for c in found if len(c) > 1), key=lambda c: (-len(c), c))


def labels_found(
    array: np.ndarray,
    labels: Sequence[str],
    words: Words,
    count: int,
    initialised: bool,
) -> list[dict[str, Any]]:
    """Where class labels are among the `count` nearest tokens.

    A label stands for the mean embedding of its tokens, as class-label initialisation takes it;
    its rank at a position is one more than the number of tokens with a larger cosine. With
    `initialised`, position i started as label i, and the label persists if it is still among the
    nearest there.
    """
    cosines = unit(array) @ unit(words.embedding).T
    found = []
    for i, label in enumerate(labels):
        ids = words.vocabulary.encode(label)
        if not ids:
            raise ValueError(f"the label {label!r} has no tokens in this vocabulary")
        mean = words.embedding[ids].mean(0)
        own = unit(array) @ unit(mean)
        # A label of one token is that token: rounding must not put it behind itself.
        rank = 1 + (cosines > own[:, None] + 1e-6).sum(1)
        entry = {
            "label": label,
            "positions": np.flatnonzero(rank <= count).tolist(),
            "best_rank": int(rank.min()),
            "best_position": int(rank.argmin()),
        }
        if initialised and i < len(array):
            entry |= {"initialised_at": i, "rank_there": int(rank[i])}
            entry["persists"] = bool(rank[i] <= count)
        found.append(entry)
    return found


# --- the whole ----------------------------------------------------------------------------------


def _of_prompt(
    prompt: Named, words: Words | None, count: int, metric: str, labels: Sequence[str] | None
) -> dict[str, Any]:
    array = prompt.array
    cosines = unit(array) @ unit(array).T
    off = cosines[~np.eye(len(array), dtype=bool)]
    positions: list[dict[str, Any]] = [
        {"position": i, "norm": _round(np.linalg.norm(row))} for i, row in enumerate(array)
    ]
    found = {
        "name": prompt.name,
        "path": prompt.path,
        "shape": list(array.shape),
        "metadata": dict(prompt.metadata),
        "positions": positions,
        "mean_cosine_between_positions": _round(off.mean()) if len(off) else None,
    }
    if prompt.initial is not None:
        lengths, turned = drift(prompt.initial, array)
        for entry, length, cosine in zip(positions, lengths, turned, strict=True):
            entry["drift"] = {"l2": _round(length), "cosine": _round(cosine)}
        found["drift"] = {"l2": _round(lengths.mean()), "cosine": _round(turned.mean())}
    if words is None:
        return found
    ids, values = nearest_tokens(array, words.embedding, count, metric)
    piece = words.vocabulary.piece
    for entry, near, close in zip(positions, ids, values, strict=True):
        entry["neighbours"] = [
            {"token": piece(t), "id": int(t), metric: _round(c)}
            for t, c in zip(near, close, strict=True)
        ]
    rows = unit(words.embedding[ids])
    inside = np.einsum("pkh,plh->pkl", rows, rows)[:, *np.triu_indices(ids.shape[1], 1)]
    usual, limit = chance(words.embedding)
    found["cosine_among_neighbours"] = _round(inside.mean()) if inside.size else None
    found["cosine_of_random_tokens"] = _round(usual)
    found["groups"] = groups(ids)
    found["token_clusters"] = [
        {
            "tokens": [piece(t) for t in cluster],
            "positions": np.flatnonzero(np.isin(ids, cluster).any(1)).tolist(),
        }
        for cluster in token_clusters(ids.ravel().tolist(), words.embedding, limit)
    ]
    labels = labels or prompt.metadata.get("class_labels")
    if labels:
        started = prompt.metadata.get("initialisation") == "class_labels"
        found["labels"] = labels_found(array, labels, words, count, started)
    return found


def _round(value: Any) -> float:
    return round(float(value), 4)


def analyse(
    found: Sequence[Named],
    words: Words | None = None,
    count: int = 5,
    metric: str = "cosine",
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Everything about prompts, as JSON can hold it; without `words`, nothing about tokens.

    Args:
      count: nearest tokens per position.
      metric: 'cosine' or 'euclidean', of the nearest tokens.
      labels: class labels to look for; default those that the prompt's file names.
    """
    if metric not in METRICS:
        raise ValueError(f"--metric is {metric!r}, expected one of {', '.join(METRICS)}")
    if count < 1:
        raise ValueError(f"--neighbours is {count}, expected at least 1")
    matrices = similarity([p.array for p in found])
    return {
        "backbone": words and words.name,
        "neighbours": count,
        "metric": metric,
        "prompts": [_of_prompt(p, words, count, metric, labels) for p in found],
        "similarity": {
            "names": [p.name for p in found],
            **{name: np.round(m, 4).tolist() for name, m in matrices.items()},
        },
    }
