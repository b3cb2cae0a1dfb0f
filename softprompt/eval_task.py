"""What is evaluated on: a task's examples, its labels, and how predictions become figures."""

import contextlib
import dataclasses
import functools
import reprlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from softprompt import data
from softprompt.logbook import say
from softprompt.vocabulary import EOS_ID, Vocabulary

TOKENS = "tokens"
LABELS = "labels"
# Of seqio's `ModelOutputType`.
PREDICTION = "PREDICTION"
SCORE = "SCORE"
Figures = dict[str, float]


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """What is evaluated on: examples, and how a model's outputs become figures.

    Attributes:
      examples: tokenised, with their records.
      labels: the label strings, index = class id, or None where any text may be the answer.
      judge: predicted strings, in the examples' order, to figures; None for a task whose metrics
        all judge the targets' scores.
      judge_scores: the log-likelihood `[examples]` of each target, in nats, to figures; None for a
        task without such metrics.
    """

    examples: data.Examples
    labels: Sequence[str] | None
    judge: Callable[[list[str]], Figures] | None
    judge_scores: Callable[[np.ndarray], Figures] | None = None

    @property
    def name(self) -> str:
        return self.examples.name

    def figures(self, predictions: Sequence[str]) -> Figures:
        """Figures of predicted strings; see `check_predicted`."""
        self.check_predicted()
        return self.judge(list(predictions))

    def check_predicted(self) -> None:
        """Raises unless some of its metrics judge predictions."""
        if self.judge is None:
            raise ValueError(
                f"the metrics of {self.name} judge the scores of its targets alone, expected some "
                f"that judge predictions: only an evaluation of one prompt does without"
            )

    def named(self, figures: Figures, several: bool) -> Figures:
        """The figures with the task's name before each where it is one of several."""
        prefix = f"{self.name}/" if several else ""
        return {prefix + name: value for name, value in figures.items()}

    def blank(self) -> Figures:
        """The figures of a model that predicts nothing: what they are called."""
        count, found = len(self.examples), {}
        if self.judge is not None:
            found |= self.judge([""] * count)
        if self.judge_scores is not None:
            found |= self.judge_scores(np.zeros(count))
        return found


def from_task(
    task: Any, split: str, feature_lengths: Mapping[str, int], vocabulary: Vocabulary
) -> EvalTask:
    """A seqio task's split with its postprocessor and metrics.

    As by seqio's `Evaluator`, metric functions of `(targets, predictions)` are given what the
    postprocessor makes of strings, those of `(targets, scores)` the targets' log-likelihoods, and
    metric objects what their `model_output_type` asks for. Those of `aux_values` are left out, and
    a line says so.

    Raises:
      ValueError: all its metrics are of another kind.
    """
    objects, others = _metric_objects(task)
    scored = bool(task.score_metric_fns or objects[SCORE])
    predicted = bool(task.predict_metric_fns or objects[PREDICTION])
    if others:
        said = f"the task {task.name} has the metrics {', '.join(others)}"
        if not scored and not predicted:
            raise ValueError(f"{said}, expected some of predictions or of the targets' scores")
        say(f"{said}, which are left out: predictions and the targets' scores are judged")
    examples = data.from_task(task, split, feature_lengths)
    records = examples.records
    targets = [_postprocessed(task, target_text(r, vocabulary), r, True) for r in records]

    left_out: set[str] = set()

    def as_figures(found: Sequence[Mapping[str, Any]]) -> Figures:
        figures, others = _as_floats(task.name, found)
        if new := others.keys() - left_out:
            said = ", ".join(f"{name!r} (a {others[name]})" for name in sorted(new))
            say(f"{task.name}: left out, for a figure is a number: {said}")
            left_out.update(new)
        return figures

    def judge(predictions: list[str]) -> Figures:
        answers = [
            _postprocessed(task, text, record, False)
            for text, record in zip(predictions, records, strict=True)
        ]
        found = [_of_function(task, f, targets, answers) for f in task.predict_metric_fns]
        of_object = functools.partial(_of_object, task, records, predictions, vocabulary)
        return as_figures(found + [of_object(metric) for metric in objects[PREDICTION]])

    def judge_scores(scores: np.ndarray) -> Figures:
        found = [_of_function(task, f, targets, scores) for f in task.score_metric_fns]
        of_object = functools.partial(_of_object, task, records, scores, vocabulary)
        return as_figures(found + [of_object(metric) for metric in objects[SCORE]])

    return EvalTask(
        examples,
        label_classes(task),
        judge if predicted or not scored else None,
        judge_scores if scored else None,
    )


@contextlib.contextmanager
def _calling(function: Any, what: str) -> Iterator[None]:
    """Says what failed, if calling a task's own function does, and at which of its lines."""
    try:
        yield
    except Exception as error:
        file = getattr(getattr(_plain(function), "__code__", None), "co_filename", None)
        frames = traceback.extract_tb(error.__traceback__)
        place = next((x for x in reversed(frames) if x.filename == file), frames[-1])
        raise ValueError(
            f"{what} failed ({place.filename}, line {place.lineno}): {type(error).__name__}: "
            f"{error}"
        ) from error


def _plain(function: Any) -> Any:
    """A function without the arguments that are bound to it."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _postprocessed(task: Any, text: str, record: Mapping[str, Any], is_target: bool) -> Any:
    """What a task's postprocessor makes of a text."""
    kind = "target" if is_target else "prediction"
    what = f"the postprocessor of the task {task.name}, given the {kind} {reprlib.repr(text)},"
    with _calling(task.postprocessor, what):
        return task.postprocess_fn(text, example=record, is_target=is_target)


def _of_function(task: Any, function: Any, targets: Sequence[Any], outputs: Any) -> Mapping:
    """What a metric function makes of predictions or of scores."""
    name = getattr(_plain(function), "__name__", function)
    with _calling(function, f"the metric {name!r} of the task {task.name}"):
        found = function(targets, outputs)
    if not isinstance(found, Mapping):
        raise ValueError(
            f"the metric {name!r} of the task {task.name} gave {reprlib.repr(found)}, expected "
            f"figures by name"
        )
    return found


def _metric_objects(task: Any) -> tuple[dict[str, list[Any]], list[str]]:
    """A task's metric objects by what they judge, and what those of its metrics are that do not.

    Its functions are not among the objects.
    """
    objects = task.metric_objs[: len(task.metric_objs) - len(task.metric_fns)]
    found: dict[str, list[Any]] = {PREDICTION: [], SCORE: []}
    others = [f"{f.__name__} of aux_values" for f in task.predict_with_aux_metric_fns]
    for metric in objects:
        kind = metric.model_output_type.name
        others += [] if kind in found else [f"{metric!r} of {kind}"]
        found.get(kind, []).append(metric)
    return found, others


def _of_object(
    task: Any, records: Sequence[Mapping], outputs: Any, vocabulary: Vocabulary, metric: Any
) -> Mapping[str, Any]:
    """What a metric object makes of predicted strings or of scores."""
    import seqio

    kind = metric if isinstance(metric, type) else type(metric)
    collects = issubclass(kind, seqio.metrics.CollectingMetric)
    if metric.model_output_type.name == PREDICTION and not collects:
        rows = [np.array([*vocabulary.encode(text), EOS_ID], np.int32) for text in outputs]
        outputs = data.pad(rows, len(rows), max(map(len, rows)))
    features = task.output_features
    with _calling(kind.from_model_output, f"the metric {kind.__name__!r} of the task {task.name}"):
        found = metric.from_model_output(records, np.asarray(outputs), features)
        return found.actual_compute(records, features)[0] if collects else found.compute()


def _as_floats(task: str, found: Sequence[Mapping[str, Any]]) -> tuple[Figures, dict[str, str]]:
    """All figures, seqio's `Scalar` among them, and what else metrics give: its kind by name.

    Two figures of one name are an error, as seqio has it.
    """
    figures, others = {}, {}
    for name, value in (item for metrics in found for item in metrics.items()):
        if name in figures:
            raise ValueError(f"{task}: two of its metrics give a figure {name!r}, expected one")
        value = getattr(value, "value", value)
        try:
            figures[name] = float(value)
        except (TypeError, ValueError):
            others[name] = type(value).__name__
    return figures, others


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


def check_metric(name: str | None, tasks: Sequence[EvalTask]) -> None:
    """Raises unless `name` (perhaps with a "-" before it) is a figure that `tasks` give."""
    if name is None or not tasks:
        return
    known = [figure for task in tasks for figure in task.named(task.blank(), len(tasks) > 1)]
    if name.lstrip("-") not in known:
        raise ValueError(f"BEST_METRIC {name!r} is not among the figures {', '.join(known)}")


def check_figures(what: str, tasks: Sequence[EvalTask]) -> None:
    """Raises, beginning with `what` asks for them, where none of `tasks` gives a figure."""

    def gives(task: EvalTask) -> bool:
        try:
            return bool(task.blank())
        except ValueError:  # A metric that wants a text: told where it has one.
            return True

    if tasks and not any(map(gives, tasks)):
        names = ", ".join(task.name for task in tasks)
        raise ValueError(f"{what}, but nothing tells a better step: {names} has no metrics")


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
