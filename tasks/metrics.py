"""seqio metric functions `(targets, predictions) -> figures`, in per cent, as T5 computes them."""

import collections
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from softprompt.tasks.postprocessors import ILLEGAL

Figures = dict[str, float]
MetricFn = Callable[[Sequence[Any], Sequence[Any]], Figures]


def accuracy(targets, predictions) -> Figures:
    """Share of equal pairs."""
    return {
        "accuracy": 100
        * float(np.mean([t == p for t, p in zip(targets, predictions, strict=True)]))
    }


def sequence_accuracy(targets, predictions) -> Figures:
    """Share of texts predicted exactly."""
    return {"sequence_accuracy": accuracy(targets, predictions)["accuracy"]}


def illegal(targets, predictions) -> Figures:
    """Number of outputs outside the label list."""
    values = [p["value"] if isinstance(p, dict) else p for p in predictions]
    return {"illegal": float(sum(v == ILLEGAL for v in values))}


def f1(targets, predictions) -> Figures:
    """F1 of class 1; an illegal output counts as the wrong class."""
    from sklearn import metrics

    targets, predictions = np.asarray(targets), np.array(predictions)
    wrong = ~np.isin(predictions, (0, 1))
    predictions[wrong] = 1 - targets[wrong]
    return {"f1": 100 * float(metrics.f1_score(targets, predictions, zero_division=0.0))}


def mean_f1(num_classes: int) -> MetricFn:
    """Unweighted mean of the F1 of each class (CommitmentBank's metric)."""

    def metric(targets, predictions) -> Figures:
        from sklearn import metrics

        score = metrics.f1_score(
            targets, predictions, labels=range(num_classes), average="macro", zero_division=0.0
        )
        return {f"mean_{num_classes}class_f1": 100 * float(score)}

    return metric


def matthews(targets, predictions) -> Figures:
    """Matthews correlation (CoLA's metric)."""
    from sklearn import metrics

    return {"matthews_corrcoef": 100 * float(metrics.matthews_corrcoef(targets, predictions))}


def pearson(targets, predictions) -> Figures:
    """Pearson correlation (STS-B); 0 where one side is constant, since it is undefined there."""
    from scipy import stats

    if np.ptp(targets) == 0 or np.ptp(predictions) == 0:
        return {"pearson_corrcoef": 0.0}
    return {"pearson_corrcoef": 100 * float(stats.pearsonr(targets, predictions)[0])}


def spearman(targets, predictions) -> Figures:
    """Spearman rank correlation (STS-B); 0 where one side is constant."""
    from scipy import stats

    if np.ptp(targets) == 0 or np.ptp(predictions) == 0:
        return {"spearman_corrcoef": 0.0}
    return {"spearman_corrcoef": 100 * float(stats.spearmanr(targets, predictions)[0])}


def multirc_f1a(targets, predictions) -> Figures:
    """F1 over all answers (MultiRC)."""
    return f1([t["value"] for t in targets], [p["value"] for p in predictions])


def multirc_exact_match(targets, predictions) -> Figures:
    """Share of questions with every answer right (MultiRC)."""
    right: dict[Any, bool] = collections.defaultdict(lambda: True)
    for target, prediction in zip(targets, predictions, strict=True):
        right[target["group"]] &= target["value"] == prediction["value"]
    return {"exact_match": 100 * float(np.mean(list(right.values())))}


def record(targets, predictions) -> Figures:
    """Exact match and token F1, best over the answers, once per query (ReCoRD)."""
    first = {}
    for target, prediction in zip(targets, predictions, strict=True):
        first.setdefault(target["group"], (target["value"], prediction["value"]))
    return squad(*zip(*first.values(), strict=True))


def squad(targets, predictions) -> Figures:
    """Exact match and token F1, best over the answers of each question (SQuAD)."""
    exact, overlap = [], []
    for answers, prediction in zip(targets, predictions, strict=True):
        prediction = normalize_answer(prediction)
        answers = [normalize_answer(a) for a in answers]
        exact.append(max(a == prediction for a in answers))
        overlap.append(max(_token_f1(a, prediction) for a in answers))
    return {"em": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(overlap))}


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and spare blanks (Rajpurkar et al. 2016)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _token_f1(answer: str, prediction: str) -> float:
    answer_words, predicted_words = answer.split(), prediction.split()
    common = sum(
        (collections.Counter(answer_words) & collections.Counter(predicted_words)).values()
    )
    return 2 * common / (len(answer_words) + len(predicted_words)) if common else 0.0
