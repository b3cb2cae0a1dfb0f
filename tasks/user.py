"""A user's own data set, from files and a text template, as a seqio task."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from softprompt.tasks import metrics, postprocessors, records
from softprompt.tasks.sources import add_task


def register_task(
    name: str,
    train_file: str | os.PathLike | None = None,
    validation_file: str | os.PathLike | None = None,
    test_file: str | os.PathLike | None = None,
    template: str = "{text}",
    target: str = "label",
    labels: Sequence[str] | None = None,
    metric_fns: Sequence[Callable] | None = None,
) -> None:
    """Registers JSON Lines, CSV or TSV files as the seqio task `name`.

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
    add_task(name, examples, tuple(files), metric_fns, postprocess_fn)
