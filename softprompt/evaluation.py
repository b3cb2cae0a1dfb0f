"""Evaluation: predictions of a prompted model, judged by a task's own metrics."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt import checkpoint, data, decode, lengths, losses, partition, tree
from softprompt.backbone import Backbone
from softprompt.logbook import track
from softprompt.prompted import PromptedT5, bank_slots
from softprompt.vocabulary import EOS_ID, Vocabulary

GENERATE = "generate"
RANK = "rank"
TOKENS = "tokens"
LABELS = "labels"


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """What is evaluated on: examples, and how predicted strings become figures.

    Attributes:
      examples: tokenised, with their records.
      labels: the label strings, index = class id, or None where any text may be the answer.
      judge: predicted strings, in the examples' order, to figures.
    """

    examples: data.Examples
    labels: Sequence[str] | None
    judge: Callable[[list[str]], dict[str, float]]

    @property
    def name(self) -> str:
        return self.examples.name


def from_task(
    task: Any, split: str, feature_lengths: Mapping[str, int], vocabulary: Vocabulary
) -> EvalTask:
    """A seqio task's split with its postprocessor and metric functions."""
    examples = data.from_task(task, split, feature_lengths)
    targets = [
        task.postprocess_fn(target_text(record, vocabulary), example=record, is_target=True)
        for record in examples.records
    ]

    def judge(predictions: list[str]) -> dict[str, float]:
        answers = [
            task.postprocess_fn(text, example=record, is_target=False)
            for text, record in zip(predictions, examples.records, strict=True)
        ]
        figures: dict[str, float] = {}
        for metric_fn in task.predict_metric_fns:
            found = metric_fn(targets, answers)
            figures |= {k: float(getattr(v, "value", v)) for k, v in found.items()}
        return figures

    return EvalTask(examples, label_classes(task), judge)


def target_text(record: Mapping[str, Any], vocabulary: Vocabulary) -> str:
    """The target as the task wrote it: a vocabulary may lack some of its characters."""
    text = record.get("targets_pretokenized")
    return vocabulary.decode(record["targets"]) if text is None else plain(text)


def label_classes(task: Any) -> list[str] | None:
    """The label strings of a seqio task, which its postprocessor carries (None: free text)."""
    keywords = getattr(task.postprocessor, "keywords", None) or {}
    labels = keywords.get("label_classes")
    return None if labels is None else list(labels)


def from_pairs(examples: data.Examples, labels: Sequence[str] | None) -> EvalTask:
    """(text, target) examples, judged by accuracy in per cent and by outputs that are no label."""
    targets = [record["targets_pretokenized"] for record in examples.records]

    def judge(predictions: list[str]) -> dict[str, float]:
        hits = [p == t for p, t in zip(predictions, targets, strict=True)]
        figures = {"accuracy": 100 * float(np.mean(hits))}
        if labels is not None:
            figures["illegal"] = float(sum(p not in labels for p in predictions))
        return figures

    return EvalTask(examples, labels, judge)


def encode_labels(
    labels: Sequence[str], vocabulary: Vocabulary, prefix: Sequence[int] = ()
) -> np.ndarray:
    """Label ids `[C, L]` behind `prefix` and with EOS, padded with 0.

    Labels with the same ids, or none at all, are an error.
    """
    rows = [np.array([*prefix, *vocabulary.encode(text), EOS_ID], np.int32) for text in labels]
    seen: dict[tuple[int, ...], str] = {}
    for text, ids in zip(labels, rows, strict=True):
        if len(ids) == len(prefix) + 1:
            raise ValueError(f"the label {text!r} has no tokens, expected a text")
        key = tuple(ids.tolist())
        if key in seen:
            raise ValueError(f"the labels {seen[key]!r} and {text!r} have the same tokens")
        seen[key] = text
    return data.pad(rows, len(rows), max(map(len, rows)))


def training_labels(
    loss: str,
    parts: Sequence[data.Examples],
    labels: Sequence[Sequence[str] | None],
    vocabulary: Vocabulary,
    prefix: Sequence[int] = (),
) -> np.ndarray | None:
    """Label ids `[C, L]` to train `parts` by, or None for the loss 'tokens'.

    Args:
      loss: 'tokens' (of the target text) or 'labels' (the right label among the labels).
      labels: those of each of `parts`. For the loss 'labels' they must be the same everywhere, and
        every target must be one of them.
      prefix: ids before every target.
    """
    if loss not in (TOKENS, LABELS):
        raise ValueError(f"LOSS is {loss!r}, expected {TOKENS!r} or {LABELS!r}")
    if loss == TOKENS:
        return None
    for part, own in zip(parts, labels, strict=True):
        if own is None:
            raise ValueError(f"LOSS is {LABELS!r}, but {part.name} has no labels")
        if list(own) != list(labels[0]):
            raise ValueError(
                f"LOSS is {LABELS!r}, but {parts[0].name} has the labels {list(labels[0])} and "
                f"{part.name} {list(own)}"
            )
    ids = encode_labels(labels[0], vocabulary, prefix)
    known = {tuple(row[row > 0].tolist()) for row in ids}
    for part in parts:
        for i, target in enumerate(part.targets):
            if tuple(target.tolist()) not in known:
                raise ValueError(
                    f"{part.name}: target {i} is {vocabulary.decode(target)!r}, expected one of "
                    f"the labels {list(labels[0])}"
                )
    return ids


class Predictor:
    """Predicts strings for examples; compiles once per shape.

    Args:
      backbone: for its architecture, vocabulary and mesh; parameters are passed at each call.
      prompt_length: P slots before every input (0: none), or the lengths of N prompts, whose rows
        follow one another in the bank; `which` then names the prompt of each example.
      mode: 'generate' decodes text, 'rank' picks the likeliest of the task's labels.
      beams: beam search with so many beams; 1 is greedy.
      temperature, top_k, top_p: sampling, when temperature > 0.
      prefix: ids before every target, which are no part of a predicted text.
      seed: of sampling; but for rounding, what an example gets depends on it and on the example's
        number alone.
      evaluations: how often the same examples are predicted; None for other ones without end. See
        `lengths.cuts`: more shapes compile where they are used more often.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt_length: int | Sequence[int],
        mode: str = GENERATE,
        batch_size: int = 32,
        decode_length: int = 64,
        beams: int = 1,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        prefix: Sequence[int] = (),
        evaluations: int | None = 1,
    ):
        if mode not in (GENERATE, RANK):
            raise ValueError(f"EVAL_MODE is {mode!r}, expected {GENERATE!r} or {RANK!r}")
        if backbone.vocabulary is None:
            raise ValueError(
                f"the backbone {backbone.name!r} has no vocabulary to predict text with"
            )
        if temperature > 0 and beams > 1:
            raise ValueError(
                f"the temperature is {temperature:g} and there are {beams} beams: texts are either "
                f"sampled or searched for, so leave out one of the two"
            )
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p:g}, expected more than 0 and at most 1")
        if not temperature and (top_k or top_p < 1):
            raise ValueError(
                f"top_k is {top_k} and top_p {top_p:g}, but the temperature is 0, which samples "
                f"nothing: raise it, or leave them out"
            )
        self.backbone = backbone
        self.mode = mode
        self.prefix = tuple(prefix)
        self.evaluations = evaluations
        # A batch is split over the mesh's data axis.
        self.batch_size = data.round_up(batch_size, backbone.mesh.shape["data"])
        prompt_lengths = [prompt_length] if isinstance(prompt_length, int) else prompt_length
        self.slots = bank_slots(backbone.cfg.vocab_size, prompt_lengths)
        self.decode_length = decode_length
        module = PromptedT5(backbone.cfg, sum(prompt_lengths))

        def generate(flat, ids, numbers):
            params = tree.unflatten(flat)
            if temperature > 0:
                keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(
                    numbers
                )
                return decode.sample(
                    module, params, ids, decode_length, keys, temperature, top_k, top_p
                )
            if beams > 1:
                return decode.beam(module, params, ids, decode_length, beams)[0]
            return decode.greedy(module, params, ids, decode_length)

        # Every process gets every row's result.
        jit = functools.partial(jax.jit, out_shardings=partition.replicated(backbone.mesh))
        self._generate = jit(generate)
        self._generate_scored = jit(
            lambda flat, ids: decode.greedy_scored(module, tree.unflatten(flat), ids, decode_length)
        )
        self._score = jit(
            lambda flat, ids, labels: decode.score_labels(module, tree.unflatten(flat), ids, labels)
        )
        self._loss = jit(functools.partial(_token_loss, module))
        self._rows = partition.batch_sharding(backbone.mesh)

    def _batches(self, examples: data.Examples, which: Sequence[int] | None = None):
        if which is None and len(self.slots) > 1:
            raise ValueError(f"there are {len(self.slots)} prompts: say which one is whose")
        slots = [self.slots[k] for k in ([0] * len(examples) if which is None else which)]
        prompt_length = max(map(len, self.slots))
        cuts = lengths.cuts(
            list(map(len, examples.inputs)), self.batch_size, prompt_length,
            self.backbone.mesh.shape["data"], self.evaluations,
        )  # fmt: skip
        batches = lengths.eval_batches(examples, cuts, slots, prompt_length)
        for indices, batch in track(batches, f"{examples.name}: predicting", "batches", len(cuts)):
            yield indices, {k: partition.place(x, self._rows) for k, x in batch.items()}

    def _of_rows(self, values: np.ndarray, batch: data.Batch) -> jax.Array:
        """What each example of a batch has, `[examples, …]`, for its rows: 0 for padding."""
        found = np.zeros((len(batch["encoder_ids"]), *values.shape[1:]), values.dtype)
        found[: len(values)] = values
        return partition.place(found, self._rows)

    def generate(
        self,
        flat: tree.Flat,
        examples: data.Examples,
        which: Sequence[int] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[str]:
        """A decoded string per example; `which` names the prompt of each.

        `numbers` are those by which sampling tells the examples apart, by default their places.
        """
        texts = [""] * len(examples)
        numbers = np.asarray(range(len(examples)) if numbers is None else numbers, np.int32)
        for indices, batch in self._batches(examples, which):
            of_rows = self._of_rows(numbers[indices], batch)
            ids = np.asarray(self._generate(flat, batch["encoder_ids"], of_rows))
            for i, row in zip(indices, ids, strict=False):
                texts[i] = self._text(row)
        return texts

    def _text(self, ids: np.ndarray) -> str:
        if tuple(ids[: len(self.prefix)].tolist()) == self.prefix:
            ids = ids[len(self.prefix) :]
        return self.backbone.vocabulary.decode(ids)

    def generate_scored(
        self, flat: tree.Flat, examples: data.Examples, which: Sequence[int] | None = None
    ) -> tuple[list[str], np.ndarray]:
        """Greedy strings, and the log-likelihood `[examples]` of each in nats."""
        texts, scores = [""] * len(examples), np.zeros(len(examples), np.float32)
        for indices, batch in self._batches(examples, which):
            ids, found = map(np.asarray, self._generate_scored(flat, batch["encoder_ids"]))
            scores[indices] = found[: len(indices)]
            for i, row in zip(indices, ids, strict=False):
                texts[i] = self._text(row)
        return texts, scores

    def score(
        self,
        flat: tree.Flat,
        examples: data.Examples,
        labels: Sequence[str] | Sequence[Sequence[str]],
        which: Sequence[int] | None = None,
        others: Sequence[Sequence[str]] = (),
    ) -> np.ndarray:
        """Log-likelihood `[examples, C]` of each label.

        `labels` are those of all examples, or a list with those of each one; C is then the most
        that one has, and what an example lacks scores -inf. `others` are those that examples of
        other calls have: what compiles has room for them.
        """
        vocabulary = self.backbone.vocabulary
        shared = isinstance(labels[0], str)
        given = [tuple(labels)] if shared else [tuple(own) for own in labels]
        sets = list(dict.fromkeys([*given, *map(tuple, others)]))
        of_example = np.array([sets.index(own) for own in given])
        encoded = [encode_labels(own, vocabulary, self.prefix) for own in sets]
        count, length = (max(ids.shape[axis] for ids in encoded) for axis in (0, 1))
        label_ids = np.zeros((len(sets), count, length), np.int32)
        for ids, own in zip(label_ids, encoded, strict=True):
            ids[: own.shape[0], : own.shape[1]] = own
        scores = np.zeros((len(examples), count), np.float32)
        for indices, batch in self._batches(examples, which):
            ids = label_ids[0]
            if not shared:
                ids = self._of_rows(label_ids[of_example[indices]], batch)
            found = np.asarray(self._score(flat, batch["encoder_ids"], ids))
            scores[indices] = found[: len(indices)]
        if not shared:
            scores[(label_ids == 0).all(-1)[of_example]] = -np.inf
        return scores

    def loss(self, flat: tree.Flat, examples: data.Examples) -> float:
        """Mean cross-entropy in nats per target token."""
        total = np.zeros(2)
        for _, batch in self._batches(examples):
            total += np.asarray(self._loss(flat, batch))
        return float(total[0] / total[1])

    def predict(self, flat: tree.Flat, task: EvalTask) -> tuple[list[str], np.ndarray | None]:
        """Predicted strings, and label scores where labels were ranked.

        A task without labels is always generated. A generated label is recognised also where the
        vocabulary lacks some of its characters.
        """
        if self.mode == RANK and task.labels is not None:
            scores = self.score(flat, task.examples, task.labels)
            return [task.labels[i] for i in scores.argmax(-1)], scores
        return self.recognised(self.generate(flat, task.examples), task.labels), None

    def predict_mixed(
        self,
        flat: tree.Flat,
        examples: data.Examples,
        which: Sequence[int],
        labels: Sequence[Sequence[str] | None],
        first: int = 0,
    ) -> list[str]:
        """A string per example of mixed tasks, each by the prompt that `which` names.

        `labels` are those of each prompt: the likeliest is picked, or a text is generated (None).
        `first` is the number of the first example, for sampling.
        """
        found = [""] * len(examples)
        which = np.asarray(which)
        ranks = np.array([own is not None for own in labels])[which]
        ranked, free = np.flatnonzero(ranks), np.flatnonzero(~ranks)
        if len(ranked):
            sets = [labels[k] for k in which[ranked]]
            others = [own for own in labels if own is not None]
            scores = self.score(flat, examples.take(ranked), sets, which[ranked], others)
            for i, own, row in zip(ranked, sets, scores, strict=True):
                found[i] = own[int(row.argmax())]
        if len(free):
            texts = self.generate(flat, examples.take(free), which[free], first + free)
            for i, text in zip(free, texts, strict=True):
                found[i] = text
        return found

    def recognised(self, texts: Sequence[str], labels: Sequence[str] | None) -> list[str]:
        """Generated texts, labels among them spelled as the task spells them."""
        vocabulary = self.backbone.vocabulary
        spelled = {vocabulary.decode(vocabulary.encode(text)): text for text in labels or ()}
        return [spelled.get(text, text) for text in texts]


def _token_loss(module: PromptedT5, flat: tree.Flat, batch) -> jax.Array:
    decoder_ids = losses.shift_right(batch["targets"])
    logits = module.apply({"params": tree.unflatten(flat)}, batch["encoder_ids"], decoder_ids)
    return jnp.stack(losses.cross_entropy(logits, batch["targets"]))


def check_metric(name: str | None, tasks: Sequence[EvalTask]) -> None:
    """Raises unless `name` (perhaps with a "-" before it) is a figure that `tasks` give."""
    if name is None or not tasks:
        return
    known = []
    for task in tasks:
        prefix = f"{task.name}/" if len(tasks) > 1 else ""
        known += [prefix + figure for figure in task.judge([""] * len(task.examples))]
    if name.lstrip("-") not in known:
        raise ValueError(f"BEST_METRIC {name!r} is not among the figures {', '.join(known)}")


def evaluate(
    predictor: Predictor,
    flat: tree.Flat,
    tasks: Sequence[EvalTask],
    folder: str | os.PathLike | None = None,
    step: int | None = None,
) -> dict[str, float]:
    """Figures of all tasks, named `metric` for one task and `task/metric` for several.

    With `folder`, predictions are written to `<folder>/predictions/<task>[-<step>].jsonl`.
    """
    figures = {}
    for task in tasks:
        predictions, scores = predictor.predict(flat, task)
        figures |= judged(task, predictions, len(tasks) > 1)
        if folder is not None:
            suffix = "" if step is None else f"-{step}"
            path = pathlib.Path(folder) / "predictions" / f"{task.name}{suffix}.jsonl"
            write_predictions(path, task, predictions, scores)
    return figures


def judged(task: EvalTask, predictions: Sequence[str], several: bool) -> dict[str, float]:
    """The task's figures of these predictions, its name before each where it is one of several."""
    prefix = f"{task.name}/" if several else ""
    return {prefix + name: value for name, value in task.judge(list(predictions)).items()}


def write_predictions(
    path: str | os.PathLike,
    task: EvalTask,
    predictions: Sequence[str],
    scores: np.ndarray | None,
) -> None:
    """One JSON object per example: input, target, prediction, and label scores if there are any."""
    lines = []
    for i, (record, prediction) in enumerate(zip(task.examples.records, predictions, strict=True)):
        row = {
            "input": plain(record.get("inputs_pretokenized", "")),
            "target": plain(record.get("targets_pretokenized", "")),
            "prediction": prediction,
        }
        if "idx" in record:
            row["idx"] = plain(record["idx"])
        if scores is not None:
            row["scores"] = {
                label: round(float(s), 4) for label, s in zip(task.labels, scores[i], strict=True)
            }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    checkpoint.write_atomically(path, "".join(lines).encode())


def plain(value: Any) -> Any:
    """A record's field as JSON can hold it."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, np.ndarray):
        return [plain(x) for x in value.tolist()] if value.ndim else plain(value.item())
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return value
