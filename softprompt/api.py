"""The Python API: load a backbone, use a prompt; `tuning` makes one. Needs no TensorFlow, no gin.

import softprompt

backbone = softprompt.load_backbone()
data = softprompt.embedded_data("question_type")
prompt = softprompt.tune(
    backbone, data.train, data.validation, labels=data.labels, prompt_length=20, train_steps=200
)
prompt.save("question_type.safetensors")
softprompt.classify(backbone, ["question: Who wrote it?"], data.labels, prompt)
"""

import dataclasses
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from softprompt import backbone as backbones
from softprompt import (
    banks,
    data,
    eval_task,
    evaluation,
    voting,
)
from softprompt import prompt as prompts
from softprompt.backbone import Backbone
from softprompt.prompt import Prompt
from softprompt.settings import (
    BUILTIN,
    check_counts,
    check_dtype,
    check_numbers,
    check_settings,
    check_type,
    import_modules,
)
from softprompt.tasks import catalogue
from softprompt.tree import Flat

Pair = tuple[str, str]
Data = Sequence[Pair] | str | os.PathLike
LENGTHS = {"inputs": 512, "targets": 64}


@dataclasses.dataclass(frozen=True)
class EmbeddedData:
    """One of the small labelled data sets that the package carries, as (text, label) pairs."""

    name: str
    train: list[Pair]
    validation: list[Pair]
    labels: list[str]


def load_backbone(
    path: str | os.PathLike = "embedded",
    dtype: Any = "float32",
    vocabulary_file: str | os.PathLike | None = None,
    weights: str | None = None,
    remat: str = "none",
) -> Backbone:
    """Loads a frozen T5, by default the one that the package carries.

    `path` may be a folder of ours, of Hugging Face's or of T5X's, or a hub name; `vocabulary_file`
    a SentencePiece model where the source brings none. `weights='int8'` keeps matrices as int8,
    with activations in `dtype`; `remat` ('minimal', 'full') saves memory in `tune`. See
    `backbone.load` and docs/memory.md.
    """
    check_dtype(dtype, "dtype")
    return backbones.load(
        path, dtype, vocabulary_file=vocabulary_file, weights=weights, remat=remat
    )


def load_prompt(
    path: str | os.PathLike, backbone: Backbone | None = None, ignore_fingerprint: bool = False
) -> Prompt:
    """Reads a prompt file (`.safetensors`, or `.npy` `[P, H]`).

    With `backbone`, a prompt that was trained for another one is refused (ValueError) unless
    `ignore_fingerprint`; then it can be used with `backbone`, and its metadata stay as they are.
    """
    if ignore_fingerprint and backbone is None:
        raise ValueError("ignore_fingerprint is True, expected with it the backbone to use")
    check_type("path", path, str | os.PathLike, "that of a prompt")
    if backbone is not None:
        _check_backbone(backbone)
        return prompts.load_for(path, backbone, ignore_fingerprint)
    array, deep, metadata = prompts.load_deep(path)
    return Prompt(array, metadata, deep)


def embedded_data(name: str) -> EmbeddedData:
    """The data set 'sentiment', 'question_type' or 'entailment'."""
    from softprompt.tasks import records

    spec = records.EMBEDDED.get(name)
    if spec is None:
        raise ValueError(f"no embedded data set {name!r}; choose {', '.join(records.EMBEDDED)}")
    read = {
        split: records.read_pairs(
            records.EMBEDDED_FOLDER / name / f"{split}.jsonl", spec.template, "label", spec.labels
        )
        for split in ("train", "validation")
    }
    return EmbeddedData(name, read["train"], read["validation"], list(spec.labels))


def read_pairs(
    path: str | os.PathLike,
    template: str = "{text}",
    target: str = "label",
    labels: Sequence[str] | None = None,
) -> list[Pair]:
    """(text, target) pairs of a JSON Lines, CSV or TSV file (also `.gz`).

    `template` makes the text from a row's fields; the field `target` holds a label name, an index
    into `labels`, or, without `labels`, the target text. Errors name file and line.
    """
    from softprompt.tasks import records

    check_type("path", path, str | os.PathLike, "that of a JSON Lines, CSV or TSV file")
    check_type("template", template, str, "a text with fields in braces")
    check_type("target", target, str, "the name of a field")
    labels = None if labels is None else label_list(labels)
    return records.read_pairs(path, template, target, labels)


def examples_of(
    source: Data, split: str, backbone: Backbone, lengths: Mapping[str, int], labels
) -> tuple[data.Examples, eval_task.EvalTask]:
    """Examples and their judge, from pairs or from a seqio task's name."""
    vocabulary = _vocabulary(backbone)
    if isinstance(source, str | os.PathLike):
        import_modules(BUILTIN)
        catalogue.use_vocabulary(vocabulary.path)
        tasks = data.get_tasks(str(source))
        if len(tasks) > 1:
            raise ValueError(f"{source!r} is a mixture; name one of its tasks")
        task = eval_task.from_task(tasks[0][0], split, lengths, vocabulary)
        task = dataclasses.replace(task, labels=labels or task.labels)
        return task.examples, task
    expected = "(text, target) pairs or the name of a seqio task"
    check_type(f"{split} data", source, Iterable, expected)
    pairs = list(source)
    for i, pair in enumerate(pairs):
        if not _is_list(pair):
            raise ValueError(f"{split}: pair {i} is {pair!r}, expected (text, target) strings")
    examples = data.from_pairs(pairs, vocabulary, lengths, split)
    for _, target in pairs:
        if labels is not None and target not in labels:
            raise ValueError(f"{split}: the target {target!r} is not among the labels {labels}")
    return examples, eval_task.from_pairs(examples, labels)


def _check_backbone(backbone: Any) -> None:
    check_type("backbone", backbone, Backbone, "what load_backbone returns")


def _vocabulary(backbone: Backbone):
    _check_backbone(backbone)
    if backbone.vocabulary is None:
        raise ValueError(
            f"the backbone {backbone.name!r} has no vocabulary: give load_backbone a "
            f"vocabulary_file, such as T5's spiece.model"
        )
    return backbone.vocabulary


def predictor_of(backbone, prompt_length, labels, lengths, batch_size, evaluations=1, **settings):
    """A predictor that ranks where there are labels, and else generates."""
    mode = evaluation.RANK if labels else evaluation.GENERATE
    return evaluation.Predictor(
        backbone, prompt_length, mode, batch_size, lengths["targets"], evaluations=evaluations,
        **settings,
    )  # fmt: skip


def _checked(name: str, prompt: Prompt | np.ndarray | None, backbone: Backbone) -> Prompt | None:
    """A prompt, also of an array, if its rows are finite and the backbone's."""
    if prompt is None:
        return None
    if isinstance(prompt, str | os.PathLike):
        raise ValueError(f"{name} is the path {str(prompt)!r}: give load_prompt of it")
    if isinstance(prompt, list | tuple):
        raise ValueError(f"{name} is a {type(prompt).__name__}, expected a Prompt or an array")
    found = prompt if isinstance(prompt, Prompt) else Prompt(prompt, {})
    prompts.check_rows(name, found.array, found.deep, backbone)
    accepted = found.accepted_for == backbone.fingerprint
    prompts.check_backbone(name, found.array, found.metadata, backbone, accepted)
    prompts.check_depth(name, found.deep, backbone)
    return found


@dataclasses.dataclass(frozen=True)
class _Bank:
    """Parameters with prompts, the length of each, and the ids before every target."""

    flat: Flat
    lengths: list[int]
    prefix: tuple[int, ...]


def _banked(backbone: Backbone, named: Mapping[str, Prompt | np.ndarray | None]) -> _Bank:
    """A bank of all prompts; errors call each by its name."""
    _check_backbone(backbone)
    found = {name: _checked(name, one, backbone) for name, one in named.items()}
    deep = {name: one.deep for name, one in found.items() if one and one.deep is not None}
    if deep and len(found) > 1:
        raise ValueError(
            f"{next(iter(deep))} has rows for deeper layers, expected prompts of the input alone "
            f"where several share a batch: give it by itself"
        )
    arrays = [one and one.array for one in found.values()]
    flat, lengths = prompts.attach(backbone, arrays, next(iter(deep.values()), None))
    prefix = banks.target_prefix(backbone, list(found.items()))
    return _Bank(flat, lengths, prefix)


def _numbered(found: Sequence[Prompt | np.ndarray | None]) -> dict[str, Any]:
    return {f"prompt {i}": one for i, one in enumerate(found)}


Prompts = Prompt | np.ndarray | None | Sequence[Prompt | np.ndarray | None]


def _with_prompts(
    backbone: Backbone, prompt: Prompts, count: int
) -> tuple[_Bank, list[int] | None]:
    """A bank, and which of its prompts each of `count` inputs has (None: one for all)."""
    if not isinstance(prompt, list | tuple):
        return _banked(backbone, {"prompt": prompt}), None
    if len(prompt) != count:
        raise ValueError(f"got {len(prompt)} prompts for {count} texts, expected one for each")
    places: dict[int, int] = {}
    which = [places.setdefault(id(one), len(places)) for one in prompt]
    unique = [prompt[which.index(place)] for place in range(len(places))]
    return _banked(backbone, _numbered(unique)), which


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)


def label_list(labels: Any, name: str = "labels") -> list[str]:
    """Labels as a list; a single text, or none at all, is an error."""
    if not _is_list(labels):
        raise ValueError(f"{name}: got {labels!r}, expected a list of texts")
    if not len(labels):
        raise ValueError(f"{name}: got an empty list, expected one or more texts")
    for label in labels:
        if not isinstance(label, str):
            raise ValueError(f"{name}: got {label!r} in the list, expected texts alone")
    return [str(label) for label in labels]


def _label_lists(labels: Any, count: int) -> list[str] | list[list[str]]:
    """The labels of all texts, or a list with those of each of `count` texts."""
    if not _is_list(labels) or not len(labels) or not _is_list(labels[0]):
        return label_list(labels)
    if len(labels) != count:
        raise ValueError(f"got labels of {len(labels)} texts for {count} texts")
    return [label_list(own, f"labels of text {i}") for i, own in enumerate(labels)]


def _text_list(texts: Iterable[str]) -> list[str]:
    """The texts as a list; none, or what is no text, is an error."""
    if isinstance(texts, str):
        raise ValueError("expected a list of texts, got one string")
    check_type("texts", texts, Iterable, "a list of texts")
    texts = list(texts)
    if not texts:
        raise ValueError("got no texts")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {i} is {text!r}, expected a string")
    return texts


def _texts(backbone: Backbone, texts: Sequence[str], lengths: Mapping[str, int]) -> data.Examples:
    return data.from_pairs([(t, "") for t in texts], _vocabulary(backbone), lengths, "texts")


def generate(
    backbone: Backbone,
    texts: Sequence[str],
    prompt: Prompts = None,
    max_tokens: int = 64,
    beams: int = 1,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
) -> list[str]:
    """A text for each text: greedy, by beam search (beams > 1), or sampled (temperature > 0).

    `prompt` is one for all texts, or a list with the prompt of each: they share batches. What is
    sampled for a text depends on `seed` and on its place among the texts.
    """
    check_counts(
        max_tokens=(max_tokens, 1), beams=(beams, 1), top_k=(top_k, 0), seed=(seed, 0),
        batch_size=(batch_size, 1),
    )  # fmt: skip
    check_numbers(temperature=(temperature, 0), top_p=(top_p, 0))
    lengths, texts = {**LENGTHS, "targets": max_tokens}, _text_list(texts)
    examples = _texts(backbone, texts, lengths)
    bank, which = _with_prompts(backbone, prompt, len(texts))
    predictor = predictor_of(
        backbone, bank.lengths, None, lengths, batch_size, prefix=bank.prefix, beams=beams,
        temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
    )  # fmt: skip
    return predictor.generate(bank.flat, examples, which)


def score_labels(
    backbone: Backbone,
    texts: Sequence[str],
    labels: Sequence[str] | Sequence[Sequence[str]],
    prompt: Prompts = None,
    batch_size: int = 32,
) -> np.ndarray:
    """Log-likelihood `[texts, labels]` (nats, EOS included) of each label after each text.

    `prompt` is one for all texts, or a list with the prompt of each; `labels` are those of all
    texts, or a list with those of each. Then a label that a text lacks scores -inf.
    """
    check_counts(batch_size=(batch_size, 1))
    texts = _text_list(texts)
    examples = _texts(backbone, texts, LENGTHS)
    labels = _label_lists(labels, len(texts))
    bank, which = _with_prompts(backbone, prompt, len(texts))
    predictor = predictor_of(
        backbone, bank.lengths, labels, LENGTHS, batch_size, prefix=bank.prefix
    )
    return predictor.score(bank.flat, examples, labels, which)


def classify(
    backbone: Backbone,
    texts: Sequence[str],
    labels: Sequence[str] | Sequence[Sequence[str]],
    prompt: Prompts = None,
    batch_size: int = 32,
) -> list[str]:
    """The likeliest label of each text (rank classification); lists as in `score_labels`."""
    texts = _text_list(texts)
    labels = _label_lists(labels, len(texts))
    best = score_labels(backbone, texts, labels, prompt, batch_size).argmax(-1)
    sets = [labels] * len(texts) if isinstance(labels[0], str) else labels
    return [own[i] for own, i in zip(sets, best, strict=True)]


def ensemble(
    backbone: Backbone,
    texts: Sequence[str],
    prompt: Sequence[Prompt | np.ndarray],
    labels: Sequence[str] | None = None,
    max_tokens: int = 64,
    batch_size: int = 32,
) -> voting.Votes:
    """What each of N prompts says of each text, all in shared batches over one backbone.

    With `labels` the likeliest is each prompt's vote, without them its greedy text. The result's
    `majority()` and, of labels, `mean_probability()` are the ensemble's predictions, and
    `agreement(predictions)` says how many of the prompts are behind them.
    """
    check_counts(max_tokens=(max_tokens, 1), batch_size=(batch_size, 1))
    if not isinstance(prompt, list | tuple) or not len(prompt):
        raise ValueError(
            f"prompt is {reprlib.repr(prompt)}, expected for an ensemble a list of one or more "
            f"prompts"
        )
    labels = None if labels is None else label_list(labels)
    lengths, texts = {**LENGTHS, "targets": max_tokens}, _text_list(texts)
    task = eval_task.EvalTask(_texts(backbone, texts, lengths), labels, lambda _: {})
    bank = _banked(backbone, _numbered(prompt))
    predictor = predictor_of(
        backbone, bank.lengths, labels, lengths, batch_size, prefix=bank.prefix
    )
    return voting.collect(predictor, bank.flat, task)


def evaluate(
    backbone: Backbone,
    source: Data,
    prompt: Prompt | np.ndarray | None = None,
    labels: Sequence[str] | None = None,
    split: str = "validation",
    lengths: Mapping[str, int] = LENGTHS,
    batch_size: int = 32,
) -> dict[str, float]:
    """Figures of a prompt (None: of the bare backbone) on pairs or on a seqio task's split."""
    check_settings("float32", lengths, batch_size=(batch_size, 1))
    labels = None if labels is None else label_list(labels)
    bank = _banked(backbone, {"prompt": prompt})
    task = examples_of(source, split, backbone, lengths, labels)[1]
    predictor = predictor_of(
        backbone, bank.lengths, task.labels, lengths, batch_size, prefix=bank.prefix
    )
    return evaluation.evaluate(predictor, bank.flat, [task])


__all__: list[str] = [
    "Backbone",
    "Prompt",
    "classify",
    "embedded_data",
    "ensemble",
    "evaluate",
    "generate",
    "load_backbone",
    "load_prompt",
    "read_pairs",
    "score_labels",
]
