"""Ensembles of prompts (Lester et al. 2021, section 6): one batch, one backbone, a majority vote.

Every example goes through the backbone once with each of N prompts, in the same batches. Labels
that tie are told apart by their scores summed over all prompts, generated texts by the
log-likelihood summed over the prompts that gave them; what still ties goes to the first label, or
to the first prompt's text. A target that metrics judge by its score has the mean of the
probabilities that the prompts give it. Scores are rounded before they count, so that the
predictions file, which holds every vote, gives the same result again.
"""

import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from softprompt import eval_task, evaluation, tree
from softprompt.eval_task import EvalTask
from softprompt.evaluation import Predictor

DIGITS = 4


@dataclasses.dataclass(frozen=True)
class Votes:
    """What N prompts say of E examples.

    Attributes:
      texts: `[N][E]`, each prompt's predictions.
      scores: log-likelihood `[N, E, C]` of each label, or `[N, E]` of each generated text, in nats.
      labels: the C labels that were ranked, or None where texts were generated.
      target_scores: log-likelihood `[N, E]` of each target, in nats, where metrics judge them.
    """

    texts: Sequence[Sequence[str]]
    scores: np.ndarray
    labels: Sequence[str] | None
    target_scores: np.ndarray | None = None

    def majority(self) -> list[str]:
        """The text with the most votes for each example."""
        found = []
        for i in range(self.scores.shape[1]):
            votes = [texts[i] for texts in self.texts]
            found.append(vote(votes, self.scores[:, i].tolist(), self.labels))
        return found

    def agreement(self, chosen: Sequence[str]) -> np.ndarray:
        """The share `[E]` of prompts that predict `chosen`, of each example: a confidence."""
        if len(chosen) != len(self.texts[0]):
            raise ValueError(
                f"got {len(chosen)} predictions, expected {len(self.texts[0])}: one for each text"
            )
        return np.mean([[a == b for a, b in zip(t, chosen, strict=True)] for t in self.texts], 0)

    def probabilities(self) -> np.ndarray:
        """Probability `[E, C]` among the labels, the mean over prompts; an error without labels."""
        if self.labels is None:
            raise ValueError("these votes are generated texts, expected labels for a probability")
        shifted = np.exp(self.scores - self.scores.max(-1, keepdims=True))
        return (shifted / shifted.sum(-1, keepdims=True)).mean(0)

    def targets_together(self) -> np.ndarray:
        """Log of each target's probability `[E]`, the mean over prompts."""
        return np.logaddexp.reduce(self.target_scores, 0) - math.log(len(self.target_scores))

    def mean_probability(self) -> list[str]:
        """The label of the highest mean probability for each example."""
        return [self.labels[k] for k in self.probabilities().argmax(-1)]


def vote(votes: Sequence[str], scores: Sequence[Any], labels: Sequence[str] | None = None) -> str:
    """The majority of one example's votes.

    Args:
      votes: each prompt's prediction.
      scores: each prompt's log-likelihoods of the `labels`, or without labels that of its text.
    """
    counts = {text: votes.count(text) for text in votes}
    tied = [text for text, n in counts.items() if n == max(counts.values())]
    if labels is None:
        total = {
            text: math.fsum(s for v, s in zip(votes, scores, strict=True) if v == text)
            for text in tied
        }
    else:
        tied = [label for label in labels if label in tied]
        total = {text: math.fsum(row[list(labels).index(text)] for row in scores) for text in tied}
    return max(tied, key=total.get)


def collect(predictor: Predictor, flat: tree.Flat, task: EvalTask) -> Votes:
    """The votes of all prompts of `predictor` and of the bank in `flat`, in shared batches."""
    count = len(predictor.slots)
    repeated = task.examples.take(np.repeat(np.arange(len(task.examples)), count))
    which = np.tile(np.arange(count), len(task.examples))
    if predictor.mode == evaluation.RANK and task.labels is not None:
        scores = predictor.score(flat, repeated, task.labels, which)
        texts = [task.labels[k] for k in scores.argmax(-1)]
        labels = list(task.labels)
    else:
        texts, scores = predictor.generate_scored(flat, repeated, which)
        texts, labels = predictor.recognised(texts, task.labels), None

    def of_prompts(values: np.ndarray) -> np.ndarray:
        values = np.asarray(values, np.float64).reshape(-1, count, *values.shape[1:])
        return np.round(np.moveaxis(values, 1, 0), DIGITS)

    of_targets = None
    if task.judge_scores is not None:
        of_targets = of_prompts(predictor.score_targets(flat, repeated, which))
    return Votes([texts[k::count] for k in range(count)], of_prompts(scores), labels, of_targets)


def columns(votes: Votes) -> dict[str, list[Any]]:
    """For each example the vote, its agreement, and every vote."""
    chosen = votes.majority()
    found = {
        "prediction": chosen,
        "agreement": [round(float(x), DIGITS) for x in votes.agreement(chosen)],
    }
    if votes.labels is not None:
        found["mean_probability"] = [
            {label: round(float(p), 6) for label, p in zip(votes.labels, mean, strict=True)}
            for mean in votes.probabilities()
        ]
    if votes.target_scores is not None:
        found["target_score"] = [round(float(x), DIGITS) for x in votes.targets_together()]
    prompts = range(len(votes.texts))
    return found | {"votes": [[_vote(votes, n, i) for n in prompts] for i in range(len(chosen))]}


def _vote(votes: Votes, n: int, i: int) -> dict[str, Any]:
    found: dict[str, Any] = {"prediction": votes.texts[n][i]}
    if votes.labels is None:
        found["log_likelihood"] = float(votes.scores[n, i])
    else:
        found["scores"] = dict(zip(votes.labels, votes.scores[n, i].tolist(), strict=True))
    if votes.target_scores is not None:
        found["target_score"] = float(votes.target_scores[n, i])
    return found


@dataclasses.dataclass(frozen=True)
class Report:
    """Figures of each prompt, of their average, of the best prompt, and of the ensemble.

    `agreement` is the mean share of prompts behind a vote, `unanimous` the share of examples where
    it is 1, and the last two the shares of votes equal to the target's text among those and among
    the others (None where there are none), all in per cent.
    """

    names: Sequence[str]
    prompts: Sequence[dict[str, float]]
    average: dict[str, float]
    best: int
    ensemble: dict[str, float]
    mean_probability: dict[str, float] | None
    agreement: float
    unanimous: float
    right_if_unanimous: float | None
    right_if_divided: float | None

    def table(self) -> str:
        """The columns of the paper's table 3 as rows, and each prompt, in Markdown."""
        rows = [*zip(self.names, self.prompts, strict=True), ("average", self.average)]
        rows += [(f"best ({self.names[self.best]})", self.prompts[self.best])]
        rows += [("ensemble, majority vote", self.ensemble)]
        if self.mean_probability is not None:
            rows += [("ensemble, mean probability", self.mean_probability)]
        columns = list(self.average)
        lines = ["| prompt | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
        for name, figures in rows:
            cells = " | ".join(f"{figures[column]:.2f}" for column in columns)
            lines.append(f"| {name} | {cells} |")
        return "\n".join(lines)


def report(names: Sequence[str], task: EvalTask, votes: Votes, choose) -> Report:
    """The figures of `votes`; `choose` makes of a prompt's figures the value to maximise."""
    of_targets = [{}] * len(votes.texts)
    together: dict[str, float] = {}
    if votes.target_scores is not None:
        of_targets = [task.judge_scores(scores) for scores in votes.target_scores]
        together = task.judge_scores(votes.targets_together())
    each = [task.figures(texts) | own for texts, own in zip(votes.texts, of_targets, strict=True)]
    mean = None if votes.labels is None else task.figures(votes.mean_probability()) | together
    chosen = votes.majority()
    agreement = votes.agreement(chosen)
    whole = agreement == 1
    targets = [eval_task.plain(r.get("targets_pretokenized", "")) for r in task.examples.records]
    right = np.array([a == b for a, b in zip(chosen, targets, strict=True)])

    def share(hits: np.ndarray) -> float | None:
        return 100 * float(hits.mean()) if len(hits) else None

    return Report(
        names=list(names),
        prompts=each,
        average={k: float(np.mean([figures[k] for figures in each])) for k in each[0]},
        best=int(np.argmax([choose(figures) for figures in each])),
        ensemble=task.figures(chosen) | together,
        mean_probability=mean,
        agreement=100 * float(agreement.mean()),
        unanimous=100 * float(whole.mean()),
        right_if_unanimous=share(right[whole]),
        right_if_divided=share(right[~whole]),
    )


def cost(
    together: Predictor, flat: tree.Flat, alone: Sequence[tuple[Predictor, tree.Flat]], task
) -> dict[str, float]:
    """Examples per second by one ensemble and by N runs of one prompt each, both compiled before.

    An example counts once however many prompts see it.
    """

    def seconds(runs: Sequence[tuple[Predictor, tree.Flat]]) -> float:
        for predictor, params in runs:
            collect(predictor, params, task)
        began = time.monotonic()
        for predictor, params in runs:
            collect(predictor, params, task)
        return time.monotonic() - began

    count = len(task.examples)
    one, many = count / seconds([(together, flat)]), count / seconds(alone)
    return {"examples_per_second": one, "examples_per_second_separately": many}


def evaluate(
    predictor: Predictor,
    flat: tree.Flat,
    tasks: Sequence[EvalTask],
    names: Sequence[str],
    choose,
    folder: str | os.PathLike | None = None,
) -> dict[str, Report]:
    """A report of each task by its name; predictions go to `<folder>/predictions/<task>.jsonl`."""
    found = {}
    for task in tasks:
        votes = collect(predictor, flat, task)
        if folder is not None:
            path = pathlib.Path(folder) / "predictions" / f"{task.name}.jsonl"
            evaluation.write_predictions(path, task, columns(votes))
        found[task.name] = report(names, task, votes, choose)
    return found
