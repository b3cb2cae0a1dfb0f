"""Initialisers and files of prompts (Lester et al. 2021, section 2 and 3.2).

An initialiser is a function `(key, length, source) -> [P, H]` float32, where `source` shows it the
backbone's embedding `[V, H]` and vocabulary. Each one has a gin file in `gin/prompts/`.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from softprompt import partition, tree
from softprompt.formats import prompts
from softprompt.prompted import DEEP, PROMPT, PromptedT5, slots
from softprompt.settings import check_type
from softprompt.t5_config import T5Config
from softprompt.vocabulary import Vocabulary

# Lester et al. 2021, section 3.2: sampled from "the 5,000 most common tokens", which are the first
# ones of a SentencePiece vocabulary, sorted by likelihood.
POPULATION = 5000


@dataclasses.dataclass(frozen=True)
class Source:
    """What an initialiser may look at: embedding `[V, H]` float32, vocabulary, class labels.

    With `backbone` (a `backbone.Backbone`) prompts of other backbones are refused.

    Attributes:
      origin: where an initialiser notes what it chose, for the run's and the prompt's metadata.
    """

    embedding: np.ndarray
    vocabulary: Vocabulary | None = None
    class_labels: Sequence[str] | None = None
    backbone: Any = None
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)


Initializer = Callable[[jax.Array, int, Source], np.ndarray]


def random_uniform(key: jax.Array, length: int, source: Source, scale: float = 0.5) -> np.ndarray:
    """Uniform in [-scale, scale]."""
    shape = (length, source.embedding.shape[1])
    return np.asarray(jax.random.uniform(key, shape, minval=-scale, maxval=scale))


def sampled_vocab(
    key: jax.Array, length: int, source: Source, population_size: int = POPULATION
) -> np.ndarray:
    """Embeddings of tokens drawn from the `population_size` most frequent ones.

    Without replacement while the population lasts.
    """
    real = source.vocabulary.size if source.vocabulary else len(source.embedding)
    population = min(population_size, real)
    ids = jax.random.choice(key, population, (length,), replace=length > population)
    return np.asarray(source.embedding[np.asarray(ids)], np.float32)


def class_labels(
    key: jax.Array,
    length: int,
    source: Source,
    labels: Sequence[str] | None = None,
    population_size: int = POPULATION,
) -> np.ndarray:
    """One row per class label (the mean of its tokens), the rest sampled from the vocabulary.

    `labels` defaults to the task's. Where there are more labels than rows, the first ones are used.
    """
    labels = labels or source.class_labels
    if not labels:
        raise ValueError(
            "class-label initialisation needs CLASS_LABELS, and the task has no label list; set "
            "CLASS_LABELS or choose prompts/from_sampled_vocab.gin"
        )
    rows = sampled_vocab(key, length, source, population_size)
    for i, label in enumerate(labels[:length]):
        rows[i] = source.embedding[_encode(label, source)].mean(0)
    return rows


def text(
    key: jax.Array,
    length: int,
    source: Source,
    text: str,
    population_size: int = POPULATION,
) -> np.ndarray:
    """Embeddings of a text's tokens, in order; the rest sampled from the vocabulary.

    A text longer than the prompt is an error that says how long it is.
    """
    ids = _encode(text, source)
    if len(ids) > length:
        raise ValueError(
            f"the initial text has {len(ids)} tokens, the prompt {length}; shorten the text or set "
            f"PROMPT_LENGTH to at least {len(ids)}"
        )
    rows = sampled_vocab(key, length, source, population_size)
    rows[: len(ids)] = source.embedding[ids]
    return rows


def file(
    key: jax.Array,
    length: int,
    source: Source,
    path: str | os.PathLike,
    ignore_fingerprint: bool = False,
) -> np.ndarray:
    """The prompt in a file, in any format that `formats.prompts` reads; P must be `length`.

    Another task's prompt, for example (SPoT: Vu et al. 2022, arXiv 2110.07904). One that
    was trained for another backbone is refused unless `ignore_fingerprint`.
    """
    del key
    prompt, metadata = load(path)
    if source.backbone is not None:
        check_backbone(path, prompt, metadata, source.backbone, ignore_fingerprint)
    expected = (length, source.embedding.shape[1])
    if prompt.shape != expected:
        raise ValueError(
            f"the prompt {str(path)!r} has shape {prompt.shape}, expected {expected} "
            f"(PROMPT_LENGTH, width of the backbone)"
        )
    source.origin["initialised_from"] = str(path)
    return prompt


def initial(init: Initializer, seed: int, length: int, source: Source) -> np.ndarray:
    """What an initialiser gives for `source.backbone`: finite rows `[P, H]`, as float32."""
    found = init(jax.random.key(seed), length, source)
    name = f"what the initialiser {getattr(init, '__name__', init)!r} gives"
    check_rows(name, found, None, source.backbone)
    if len(found) != length:
        raise ValueError(f"{name} has {len(found)} rows, expected {length}")
    return np.asarray(found, np.float32)


def layers_read(depth: int | str, cfg: T5Config) -> int:
    """D, the encoder layers that read the prompt anew; 'all' is every one."""
    layers = cfg.num_encoder_layers
    depth = layers if depth == "all" else depth
    if not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth <= layers:
        raise ValueError(
            f"PROMPT_DEPTH is {depth!r}, expected 'all' or from 1 to the backbone's {layers} "
            f"encoder layers"
        )
    return depth


def deep_rows(backbone: Any, array: np.ndarray, depth: int | str) -> np.ndarray | None:
    """Initial rows `[D - 1, P, H]` of the layers that a deep prompt reaches beyond the input.

    They are the states that the prompt `array` `[P, H]` itself, without any text, has there: a
    deep prompt starts on the ground that each layer was trained on.

    Args:
      backbone: a `backbone.Backbone`.
      depth: as in `layers_read`; 1 gives None.
    """
    depth = layers_read(depth, backbone.cfg)
    if depth == 1:
        return None
    module = PromptedT5(backbone.cfg, len(array))
    whole = partition.replicated(backbone.mesh)
    bank = jax.device_put(array, whole)

    def states(flat: tree.Flat, ids: np.ndarray) -> jax.Array:
        return module.apply({"params": tree.unflatten(flat)}, ids, method="layer_inputs")

    ids = slots(backbone.cfg.vocab_size, len(array))[None]
    found = jax.jit(states, out_shardings=whole)({**backbone.params, PROMPT: bank}, ids)
    return np.asarray(found[: depth - 1, 0], np.float32)


def _encode(text: str, source: Source) -> list[int]:
    if source.vocabulary is None:
        raise ValueError("this initialisation needs a vocabulary, and the backbone has none")
    ids = source.vocabulary.encode(text)
    if not ids:
        raise ValueError(f"{text!r} has no tokens to initialise a prompt from")
    return ids


# --- files --------------------------------------------------------------------------------------

load = prompts.read
load_deep = prompts.read_deep
save = prompts.write


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A tuned prompt `[P, H]` float32, and what it was tuned on.

    `metadata` holds backbone and its fingerprint, task, length, initialisation, step and metrics;
    `deep` the rows `[D - 1, P, H]` of a deep prompt; `accepted_for` the fingerprint of a backbone
    that it may be used with though `metadata` name another.
    """

    array: np.ndarray
    metadata: Mapping[str, Any]
    deep: np.ndarray | None = None
    accepted_for: str | None = None

    def save(self, path: str | os.PathLike) -> None:
        """Writes a `.safetensors` file, atomically; another ending is an error."""
        check_type("path", path, str | os.PathLike, "that of a .safetensors file")
        save(path, self.array, self.metadata, self.deep)


def describe(
    backbone: Any,
    task: str,
    length: int,
    init: Initializer,
    loss: str,
    seed: int,
    deep: np.ndarray | None = None,
    reparameterisation: Any = None,
) -> dict[str, Any]:
    """A prompt's metadata beside its step and figures: where it belongs, and how it is trained."""
    return {
        "backbone": backbone.name,
        "backbone_fingerprint": backbone.fingerprint,
        "backbone_weights": backbone.weights,
        "task": task,
        "prompt_length": length,
        "initialisation": getattr(init, "__name__", str(init)),
        "loss": loss,
        "seed": seed,
        **({} if deep is None else {"prompt_depth": len(deep) + 1}),
        **({} if reparameterisation is None else {"network": vars(reparameterisation)}),
    }


def saver(about: Mapping[str, Any], labels: Sequence[str] | None) -> Callable[..., None]:
    """The `save` of `train.fit`: the prompt among what was trained, with `about` and labels."""

    def save(path: Any, trained: Mapping[str, np.ndarray], note: Mapping[str, Any]) -> None:
        if PROMPT in trained:
            note = {**about, "class_labels": labels and list(labels), **note}
            array, deep = trained[PROMPT], trained.get(DEEP)
            prompts.write(f"{path}.safetensors", array, note, deep)

    return save


def load_for(
    path: str | os.PathLike, backbone: Any, ignore_fingerprint: bool = False, deep: bool = True
) -> Prompt:
    """The prompt in a file, for a `backbone.Backbone`.

    Raises what `load_deep` (`load`, unless `deep`), `check_backbone` and `check_depth` do.
    """
    if deep:
        array, further, metadata = load_deep(path)
    else:
        (array, metadata), further = load(path), None
    check_backbone(path, array, metadata, backbone, ignore_fingerprint)
    check_depth(path, further, backbone)
    return Prompt(array, metadata, further, backbone.fingerprint if ignore_fingerprint else None)


def bank(prompts: Sequence[np.ndarray | None], width: int) -> tuple[np.ndarray, list[int]]:
    """The rows `[R, H]` of prompts of any lengths, one after the other, and the lengths.

    None is no prompt, of length 0. `prompted.bank_slots` makes the slots of each.
    """
    none = np.zeros((0, width), np.float32)
    rows = [none if array is None else np.asarray(array, np.float32) for array in prompts]
    return np.concatenate([none, *rows]), [len(array) for array in rows]


def attach(
    backbone: Any, prompts: Sequence[np.ndarray | None], deep: np.ndarray | None = None
) -> tuple[tree.Flat, list[int]]:
    """A backbone's parameters with a bank of the prompts, and the length of each: see `bank`.

    A single prompt may have rows `deep` `[D - 1, P, H]` of deeper layers.
    """
    rows, lengths = bank(prompts, backbone.cfg.emb_dim)
    everywhere = partition.replicated(backbone.mesh)
    flat = dict(backbone.params)
    if len(rows):
        flat[PROMPT] = partition.place(rows, everywhere)
    if deep is not None:
        flat[DEEP] = partition.place(deep, everywhere)
    return flat, lengths


def check_rows(name: str, array: Any, deep: Any, backbone: Any) -> None:
    """Raises unless rows `[P, H]`, and `deep` `[D - 1, P, H]` or None, are finite, H the width."""
    shape, width = np.shape(array), backbone.cfg.emb_dim
    if len(shape) != 2 or not shape[0] or shape[1] != width:
        raise ValueError(
            f"{name} has shape {shape}, expected (P, {width}) with at least one row for the "
            f"backbone {backbone.name!r}"
        )
    if deep is not None and (np.ndim(deep) != 3 or np.shape(deep)[1:] != shape):
        raise ValueError(
            f"{name} has deep rows of shape {np.shape(deep)}, expected (layers - 1, "
            f"{shape[0]}, {width})"
        )
    for rows in (array, deep):
        if rows is not None and not np.isfinite(rows).all():
            raise ValueError(f"{name} holds numbers that are not finite, expected finite rows")


def check_depth(path: str | os.PathLike, deep: np.ndarray | None, backbone: Any) -> None:
    """Raises where a deep prompt has rows for more layers than the encoder has."""
    layers = backbone.cfg.num_encoder_layers
    if deep is not None and len(deep) >= layers:
        raise ValueError(
            f"the prompt {str(path)!r} has rows for {len(deep) + 1} encoder layers, the backbone "
            f"{backbone.name!r} has {layers}"
        )


def check_backbone(
    path: str | os.PathLike,
    array: np.ndarray,
    metadata: Mapping[str, Any],
    backbone: Any,
    ignore_fingerprint: bool = False,
) -> None:
    """Raises where a prompt is of another width, or was trained for another backbone.

    Of a prompt without metadata (`.npy`) only the width can be checked.
    """
    if array.shape[1] != backbone.cfg.emb_dim:
        raise ValueError(
            f"the prompt {str(path)!r} has width {array.shape[1]}, the backbone {backbone.name!r} "
            f"has {backbone.cfg.emb_dim}"
        )
    trained_for = metadata.get("backbone_fingerprint")
    if trained_for in (None, backbone.fingerprint) or ignore_fingerprint:
        return
    raise ValueError(
        f"the prompt {str(path)!r} was trained for the backbone "
        f"{metadata.get('backbone')!r} ({trained_for}), this one is {backbone.name!r} "
        f"({backbone.fingerprint}); load that backbone, or override with "
        f"--ignore_fingerprint of train, eval and infer (in Python load_prompt(path, backbone, "
        f"ignore_fingerprint=True))"
    )
