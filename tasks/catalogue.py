"""The tasks that there are, as definitions that need neither seqio nor TensorFlow.

`softprompt.tasks.registry` registers them with seqio, for programs that go by seqio. A run of ours
reads a definition as it is, and so starts without importing either: same texts, same ids.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from softprompt.logbook import track
from softprompt.vocabulary import EMBEDDED, EOS_ID, AnyVocabulary, open_vocabulary

# Kinds of an example's fields.
STRING, STRINGS, INT = "a text", "a list of texts", "a whole number"
_KINDS = {
    STRING: lambda x: isinstance(x, str),
    STRINGS: lambda x: isinstance(x, list) and all(isinstance(part, str) for part in x),
    INT: lambda x: isinstance(x, int | np.integer) and not isinstance(x, bool),
}
Example = dict[str, Any]
# What a task gives a model, in this order.
FEATURES = ("inputs", "targets")

_vocabulary: str | None = None


def features_of(task: Any) -> list[str]:
    """Which of inputs and targets a seqio task has; one without targets is an error."""
    found = [feature for feature in FEATURES if feature in task.output_features]
    if "targets" not in found:
        names = ", ".join(map(repr, task.output_features))
        raise ValueError(f"task {task.name} has the features {names}, expected a feature 'targets'")
    return found


def use_vocabulary(path: Any) -> None:
    """Makes all tasks tokenise with the SentencePiece model at `path`.

    A task is defined before it is known which backbone it will feed; the training, evaluation and
    inference binaries name the backbone's. None is the embedded one, 'bytes' ByT5's vocabulary.
    """
    global _vocabulary
    _vocabulary = None if path is None else str(path)


def vocabulary_path() -> str:
    """What `use_vocabulary` named last, as `softprompt.vocabulary.open_vocabulary` takes it."""
    return _vocabulary or str(EMBEDDED)


_opened = functools.lru_cache(maxsize=8)(open_vocabulary)


def vocabulary() -> AnyVocabulary:
    """What tasks are tokenised with: the backbone's vocabulary, once `use_vocabulary` named it."""
    return _opened(vocabulary_path())


@dataclasses.dataclass(frozen=True, eq=False)
class Definition:
    """A text-to-text task, with what a seqio task has that an evaluation asks for.

    Attributes:
      name: of the task.
      source: the examples of a split: `inputs`, `targets` and the fields of `extras`.
      splits: their names.
      metric_fns: as seqio's, of `(targets, predictions)`.
      postprocessor: as seqio's `postprocess_fn`; None for texts as they are.
      extras: fields besides `inputs` and `targets`, with their kinds.
      file: the file that a split's rows are read from; None where they come from elsewhere. One
        that is missing may be an error.
      made_of: what tells whether another definition would be the same one.
    """

    name: str
    source: Callable[[str], Iterator[Example]]
    splits: Sequence[str]
    metric_fns: Sequence[Callable]
    postprocessor: Callable | None = None
    extras: Mapping[str, str] = dataclasses.field(default_factory=dict)
    file: Callable[[str], str | os.PathLike | None] = lambda split: None
    made_of: Any = None

    score_metric_fns = predict_with_aux_metric_fns = metric_objs = ()

    @property
    def predict_metric_fns(self) -> Sequence[Callable]:
        return self.metric_fns

    def postprocess_fn(self, text: str, **about: Any) -> Any:
        return text if self.postprocessor is None else self.postprocessor(text, **about)

    def examples(self, split: str) -> list[Example]:
        """All examples of a split; a field of another kind than its own is an error."""
        found = list(track(self.source(split), f"{self.name}: reading {split}", "examples"))
        for name, kind in {"inputs": STRING, "targets": STRING, **self.extras}.items():
            wrong = {type(x[name]).__name__ for x in found if not _KINDS[kind](x[name])}
            if wrong:
                raise ValueError(
                    f"{self.name}, split {split!r}: the field {name!r} holds "
                    f"{', '.join(sorted(wrong))}, expected {kind} in every row"
                )
        return found

    def records(self, split: str) -> list[Example]:
        """All examples of a split, tokenised and with EOS; their texts as `…_pretokenized`."""
        found = self.examples(split)
        records = [{name: example[name] for name in self.extras} for example in found]
        for feature in ("inputs", "targets"):
            texts = [example[feature] for example in found]
            for record, text, ids in zip(
                records, texts, vocabulary().encode_batch(texts), strict=True
            ):
                record[f"{feature}_pretokenized"] = text
                record[feature] = np.array([*ids, EOS_ID], np.int32)
        return records


tasks: dict[str, Definition] = {}
# Of each mixture its tasks and their rates.
mixtures: dict[str, list[tuple[str, float]]] = {}
# Told the name of every task and mixture that is defined from then on.
followers: list[Callable[[str], None]] = []


def add(definition: Definition) -> Definition:
    """Makes a task known; one of that name is replaced, unless it would be the same.

    Raises:
      ValueError: a mixture has the name.
    """
    name, before = definition.name, tasks.get(definition.name)
    if name in mixtures:
        raise ValueError(f"{name!r} is a mixture of tasks, expected another name for a task")
    same = before is not None and definition.made_of is not None
    if same and before.made_of == definition.made_of:
        return before
    tasks[name] = definition
    for follow in followers:
        follow(name)
    return definition


def add_mixture(name: str, parts: Sequence[tuple[str, float]]) -> None:
    """Makes a mixture of tasks known; one of that name is replaced.

    Raises:
      ValueError: a task has the name.
    """
    if name in tasks:
        raise ValueError(f"{name!r} is a task, expected another name for a mixture")
    mixtures[name] = list(parts)
    for follow in followers:
        follow(name)


def names() -> list[str]:
    """Of all tasks and mixtures."""
    return [*tasks, *mixtures]


def find(name: str) -> list[tuple[Definition, float]]:
    """The tasks of a task or mixture, with their rates; in seqio's order, by name."""
    return [(tasks[part], rate) for part, rate in sorted(mixtures.get(name, [(name, 1.0)]))]
