"""Predicted text to what the metrics compare. An output outside the label list is -1."""

from collections.abc import Sequence
from typing import Any

ILLEGAL = -1


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def label_to_id(text: str, label_classes: Sequence[str], **unused) -> int:
    """Class id of a label's text; -1 for any other text."""
    return label_classes.index(text) if text in label_classes else ILLEGAL


def multirc(
    text: str, label_classes: Sequence[str], example=None, is_target: bool = False, **unused
) -> dict[str, Any]:
    """Class id as `value`; targets also carry the question as `group`."""
    result = {"value": label_to_id(text, label_classes)}
    return result | {"group": int(example["idx/question"])} if is_target else result


def record(text: str, example=None, is_target: bool = False, **unused) -> dict[str, Any]:
    """The answer as `value`; targets carry all answers and the query as `group`."""
    if not is_target:
        return {"value": text}
    return {
        "value": [_text(answer) for answer in example["answers"]],
        "group": (int(example["idx/passage"]), int(example["idx/query"])),
    }


def all_answers(text: str, example=None, is_target: bool = False, **unused):
    """The predicted answer; for targets, the list of right ones."""
    return [_text(answer) for answer in example["answers"]] if is_target else text


def to_float(text: str, **unused) -> float:
    """The number in the text; -1 where there is none."""
    try:
        return float(text)
    except ValueError:
        return float(ILLEGAL)


_DETERMINERS = frozenset(
    "a an the this that these those my your his her our their whose which some few many much "
    "each every".split()
)


def wsc(text: str, example=None, is_target: bool = False, **unused) -> int:
    """1 if the predicted noun is the referent asked about, else 0; -1 for an empty prediction.

    Case and determiners are ignored, and either may be part of the other ("the fuzzy bunny",
    "bunny"), unless just one of them is a possessive.
    """
    if is_target:
        return int(example["label"])

    def strip(noun: str) -> str:
        return " ".join(w for w in noun.strip().lower().split(" ") if w not in _DETERMINERS)

    predicted, referent = strip(text), strip(_text(example["targets_pretokenized"]))
    if not predicted:
        return ILLEGAL
    if ("'" in predicted) != ("'" in referent):
        return 0
    a, b = set(predicted.split(" ")), set(referent.split(" "))
    return int(a <= b or b <= a)
