"""A user's own data set, from files and a text template, as a task."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from softprompt.tasks import catalogue, metrics, postprocessors, records
from softprompt.tasks.catalogue import Definition


def define_task(
    name: str,
    train_file: str | os.PathLike | None = None,
    validation_file: str | os.PathLike | None = None,
    test_file: str | os.PathLike | None = None,
    template: str = "{text}",
    target: str = "label",
    labels: Sequence[str] | None = None,
    metric_fns: Sequence[Callable] | None = None,
) -> Definition:
    """JSON Lines, CSV or TSV files as the task `name` of `catalogue`.

    It is seqio's task too where `softprompt.tasks.registry` is imported.

    Args:
      train_file, validation_file, test_file: those that there are; at least one.
      template: makes the input of a row's fields, for example `"review: {text}"`.
      target: the field with the label (a name, or an index into `labels`) or the target text.
      labels: label names; None for free text.
      metric_fns: seqio metric functions; default accuracy and illegal outputs with `labels`, exact
        match without.

    Errors (file, line, what was got and expected) come when a split is read.
    """
    files = {
        split: path
        for split, path in (
            ("train", train_file),
            ("validation", validation_file),
            ("test", test_file),
        )
        if path is not None
    }
    if not files:
        raise ValueError(f"task {name!r}: give at least one of train, validation and test file")
    if isinstance(labels, str):
        raise ValueError(f"task {name!r}: labels is {labels!r}, expected a list of texts")
    labels = None if labels is None else list(labels)

    def examples(split: str) -> Iterator[dict[str, Any]]:
        for row in records.read(files[split]):
            text, answer = records.to_pair(row, template, target, labels)
            yield {"inputs": text, "targets": answer}

    if metric_fns is None:
        metric_fns = [metrics.accuracy, metrics.illegal] if labels else [metrics.sequence_accuracy]
    postprocess_fn = labels and functools.partial(postprocessors.label_to_id, label_classes=labels)
    made_of = (files, template, target, labels, list(metric_fns))
    return catalogue.add(
        Definition(
            name, examples, tuple(files), made_of[-1], postprocess_fn,
            file=files.get, made_of=made_of,
        )
    )  # fmt: skip
