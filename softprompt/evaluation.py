"""Evaluation: predictions of a prompted model, judged by a task's own metrics."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt import checkpoint, data, decode, lengths, losses, partition, tree, xla
from softprompt.backbone import Backbone
from softprompt.eval_task import EvalTask, Figures, encode_labels, plain
from softprompt.logbook import say, track
from softprompt.prompted import PromptedT5, bank_slots

GENERATE = "generate"
RANK = "rank"


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

        def generate(flat, encoded, numbers):
            params = tree.unflatten(flat)
            if temperature > 0:
                keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(
                    numbers
                )
                return decode.sample(
                    module, params, encoded, decode_length, keys, temperature, top_k, top_p
                )
            if beams > 1:
                return decode.beam(module, params, encoded, decode_length, beams)[0]
            return decode.greedy(module, params, encoded, decode_length)

        def generate_scored(flat, encoded):
            return decode.greedy_scored(module, tree.unflatten(flat), encoded, decode_length)

        # Every process gets every row's result.
        jit = functools.partial(jax.jit, out_shardings=partition.replicated(backbone.mesh))
        self._rows = partition.batch_sharding(backbone.mesh)
        self._encode = jax.jit(
            lambda flat, ids: decode.encode(module, tree.unflatten(flat), ids),
            out_shardings=self._rows,
        )
        options = xla.loop_options(backbone.cfg.dtype)
        self._generate = jit(generate, compiler_options=options)
        self._generate_scored = jit(generate_scored, compiler_options=options)
        self._score = jit(
            lambda flat, ids, labels: decode.score_labels(module, tree.unflatten(flat), ids, labels)
        )
        self._losses = jit(functools.partial(_row_losses, module))

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
            # The encoder's output, which no name keeps, is gone before the next batch's is there.
            found = self._generate(flat, self._encode(flat, batch["encoder_ids"]), of_rows)
            ids = np.asarray(found)
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
            made = self._generate_scored(flat, self._encode(flat, batch["encoder_ids"]))
            ids, found = map(np.asarray, made)
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
            total += np.asarray(self._losses(flat, batch), np.float64).sum(-1)
        return float(total[0] / total[1])

    def score_targets(
        self, flat: tree.Flat, examples: data.Examples, which: Sequence[int] | None = None
    ) -> np.ndarray:
        """Log-likelihood `[examples]` of each example's own target, in nats."""
        prefix = np.array(self.prefix, np.int32)
        targets = [np.concatenate([prefix, ids]) for ids in examples.targets]
        scores = np.zeros(len(examples), np.float32)
        examples = dataclasses.replace(examples, targets=targets)
        for indices, batch in self._batches(examples, which):
            scores[indices] = -np.asarray(self._losses(flat, batch))[0, : len(indices)]
        return scores

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


def _row_losses(module: PromptedT5, flat: tree.Flat, batch) -> jax.Array:
    """Cross-entropy and number of target tokens of each row, `[2, B]`."""
    decoder_ids = losses.shift_right(batch["targets"])
    logits = module.apply({"params": tree.unflatten(flat)}, batch["encoder_ids"], decoder_ids)
    rows = jax.vmap(losses.cross_entropy)(logits, batch["targets"])
    return jnp.stack(rows)


def say_generated(mode: str, tasks: Sequence[EvalTask]) -> None:
    """Says which tasks' texts are generated although labels were to be ranked: they have none."""
    if mode == RANK and (free := [task.name for task in tasks if task.labels is None]):
        say(f"EVAL_MODE is {RANK!r}, but without labels texts are generated: {', '.join(free)}")


def outputs(
    predictor: Predictor, flat: tree.Flat, task: EvalTask
) -> tuple[Figures, dict[str, list[Any]]]:
    """Figures of what a model gives for a task, and that itself: for each example a value.

    Strings are predicted, and targets scored, where the task's metrics judge them.
    """
    figures, columns = {}, {}
    if task.judge is not None:
        columns["prediction"], scores = predictor.predict(flat, task)
        figures |= task.figures(columns["prediction"])
        if scores is not None:
            columns["scores"] = [
                {label: round(float(s), 4) for label, s in zip(task.labels, row, strict=True)}
                for row in scores
            ]
    if task.judge_scores is not None:
        scores = predictor.score_targets(flat, task.examples)
        columns["target_score"] = [round(float(s), 4) for s in scores]
        figures |= task.judge_scores(scores)
    return figures, columns


def evaluate(
    predictor: Predictor,
    flat: tree.Flat,
    tasks: Sequence[EvalTask],
    folder: str | os.PathLike | None = None,
    step: int | None = None,
) -> Figures:
    """Figures of all tasks, named `metric` for one task and `task/metric` for several.

    With `folder`, predictions are written to `<folder>/predictions/<task>[-<step>].jsonl`.
    """
    figures = {}
    for task in tasks:
        found, columns = outputs(predictor, flat, task)
        figures |= task.named(found, len(tasks) > 1)
        if folder is not None:
            suffix = "" if step is None else f"-{step}"
            path = pathlib.Path(folder) / "predictions" / f"{task.name}{suffix}.jsonl"
            write_predictions(path, task, columns)
    return figures


def write_predictions(
    path: str | os.PathLike, task: EvalTask, columns: Mapping[str, Sequence[Any]]
) -> None:
    """One JSON object per example: its input and target, and of each column its value."""
    lines = []
    for i, record in enumerate(task.examples.records):
        row = {
            "input": plain(record.get("inputs_pretokenized", "")),
            "target": plain(record.get("targets_pretokenized", "")),
        }
        if "idx" in record:
            row["idx"] = plain(record["idx"])
        row |= {name: values[i] for name, values in columns.items()}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    checkpoint.write_atomically(path, "".join(lines).encode())
