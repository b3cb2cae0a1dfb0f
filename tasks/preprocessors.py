"""Rows of the benchmarks as T5's text, byte for byte (Raffel et al. 2020, appendix D).

Each function yields text-to-text examples of a row: `inputs`, `targets` and the fields that the
metrics need. They keep the task's name as first word where T5 has one; `drop_name` removes it, as
Lester et al. 2021 do (appendix A.2).
"""

import functools
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from softprompt.tasks.records import Row

Example = dict[str, Any]
TextFn = Callable[[Row], Iterator[Example]]
_PUNCTUATION = re.compile(f"([{re.escape(string.punctuation)}])")


def fields(
    row: Row, name: str, features: Sequence[str], labels: Sequence[str]
) -> Iterator[Example]:
    """`name field: value field: value …` and the label's name."""
    text = " ".join([name, *(f"{field}: {row.text(field)}" for field in features)])
    yield {
        "inputs": text,
        "targets": row.label("label", labels),
        "idx": row.get("idx", 0),
    }


def multirc(row: Row, labels: Sequence[str]) -> Iterator[Example]:
    """One answer candidate of a question, with markup removed and the ids that group candidates."""
    [example] = fields(row, "multirc", ("question", "answer", "paragraph"), labels)
    example["inputs"] = re.sub("</?b>", "", example["inputs"].replace("<br>", " "))
    index = row["idx"]
    del example["idx"]
    yield example | {f"idx/{part}": index[part] for part in ("paragraph", "question", "answer")}


def record(row: Row) -> Iterator[Example]:
    """One example per correct answer; the highlights become sentences of the passage."""
    passage = re.sub("([.?!\"'])\n@highlight\n", r"\1 ", row.text("passage"))
    passage = passage.replace("\n@highlight\n", ". ")
    entities = ", ".join(row["entities"])
    text = f"record query: {row.text('query')} entities: {entities} passage: {passage}"
    given = row["answers"]
    answers = [given] if isinstance(given, str) else list(given)
    for answer in answers or ["<unk>"]:
        yield {
            "inputs": text,
            "targets": answer,
            "answers": answers,
            "idx/passage": row["idx"]["passage"],
            "idx/query": row["idx"]["query"],
        }


def wsc(row: Row, only_correct: bool = False) -> Iterator[Example]:
    """The pronoun between asterisks; the target is the noun it may refer to.

    With `only_correct` (training), rows whose noun is not the referent are left out: 259 of 554
    rows stay (Raffel et al. 2020, section 2.3; Lester et al. 2021, appendix A.2).
    """
    label = row.get("label", 0)
    if only_correct and label != 1:
        return
    yield {
        "inputs": f"wsc: {_mark_pronoun(row)}",
        "targets": row["span1_text"],
        "label": int(label),
        "idx": row.get("idx", 0),
    }


def _mark_pronoun(row: Row) -> str:
    words, pronoun, at = row.text("text").split(" "), row["span2_text"], row["span2_index"]
    if not 0 < at < len(words):
        raise ValueError(f"{row.where}: span2_index is {at}, expected 1 to {len(words) - 1}")
    strip = False
    if words[at] != pronoun:
        if words[at].startswith(pronoun):
            # Punctuation sticks to the pronoun: it becomes a word of its own.
            words[at : at + 1] = [pronoun, words[at].removeprefix(pronoun)]
            strip = True
        elif at + 1 < len(words) and words[at + 1] == pronoun:
            # One row of the data set points at the word before its pronoun.
            at += 1
        else:
            raise ValueError(
                f"{row.where}: word {at} of the text is {words[at]!r}, expected {pronoun!r}"
            )
    text = " ".join([*words[:at], "X", *words[at + 1 :]])
    text = text.replace(" X ", f" *{pronoun}* ")
    return text.rstrip(" ") if strip else text


def stsb(row: Row) -> Iterator[Example]:
    """Similarity rounded to the nearest 0.2, as text."""
    score = np.round(np.float32(float(row.text("label"))) * np.float32(5)) / np.float32(5)
    yield {
        "inputs": f"stsb sentence1: {row.text('sentence1')} sentence2: {row.text('sentence2')}",
        "targets": f"{score:.1f}",
        "idx": row.get("idx", 0),
    }


def squad(row: Row) -> Iterator[Example]:
    """Question and context with spaces around punctuation; all answers are kept for the metrics.

    TFDS's MRQA lists its answers without their places, and calls the `id` `qid`.
    """
    given = row["answers"]
    given = given["text"] if isinstance(given, Mapping) else given
    answers = [_pad_punctuation(text) for text in ([given] if isinstance(given, str) else given)]
    if not answers:
        raise ValueError(f"{row.where}: the question has no answer")
    question, context = map(_pad_punctuation, (row.text("question"), row.text("context")))
    yield {
        "inputs": _collapse(f"question: {question} context: {context}"),
        "targets": answers[0],
        "answers": answers,
        "id": row["qid"] if "qid" in row else row["id"],
    }


def _pad_punctuation(text: str) -> str:
    return _collapse(_PUNCTUATION.sub(r" \1 ", text))


def _collapse(text: str) -> str:
    # T5's white space is ASCII's.
    return re.sub(r"[ \t\n\f\r]+", " ", text)


def drop_name(text_fn: TextFn) -> TextFn:
    """The same text without its first word, the task's name."""

    @functools.wraps(text_fn)
    def dropped(row: Row) -> Iterator[Example]:
        for example in text_fn(row):
            yield example | {"inputs": example["inputs"].split(" ", 1)[1]}

    return dropped
