"""Ensembles: votes, ties, and figures that the predictions file gives again."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import TINY

from softprompt import backbone as backbones
from softprompt import data, eval_task, evaluation, partition, prompt, selection, train, voting
from softprompt.voting import Votes, vote

LABELS = ["positive", "negative", "none"]

# One layer each: what compiles is small.
SMALL = dataclasses.replace(TINY, num_encoder_layers=1, num_decoder_layers=1)


@pytest.fixture(scope="module")
def tiny(vocabulary):
    return backbones.random(SMALL, 0, vocabulary, partition.make_mesh(devices=1), "small")


def test_the_majority_wins_and_ties_go_to_the_summed_scores():
    assert vote(["a", "b", "b"], [-1.0, -9.0, -9.0]) == "b"
    # Two votes each: the texts' log-likelihoods are summed over their own voters.
    assert vote(["a", "b", "a", "b"], [-1.0, -2.0, -4.0, -2.5]) == "b"
    assert vote(["a", "b"], [-1.0, -1.0]) == "a", "what still ties goes to the first prompt"
    scores = [[-1.0, -2.0, -3.0], [-5.0, -1.0, -3.0]]
    # One vote for each of the first two: the scores of both prompts are summed, the third's too
    # high sum has no vote.
    assert vote(["positive", "negative"], scores, LABELS) == "negative"
    assert vote(["negative", "positive"], [[0.0, 0.0, 9.0]] * 2, LABELS) == "positive"


def test_the_mean_probability_may_overrule_the_majority():
    scores = np.log([[[0.51, 0.49]], [[0.51, 0.49]], [[0.01, 0.99]]])
    votes = Votes([["a"], ["a"], ["b"]], scores, ["a", "b"])
    assert votes.majority() == ["a"] and votes.mean_probability() == ["b"]
    np.testing.assert_allclose(votes.probabilities(), [[1.03 / 3, 1.97 / 3]], rtol=1e-6)
    np.testing.assert_allclose(votes.agreement(["a"]), [2 / 3])


def test_texts_have_no_probability():
    votes = Votes([["x", "y"], ["x", "z"]], np.zeros((2, 2)), None)
    assert votes.majority() == ["x", "y"]
    for call in (votes.probabilities, votes.mean_probability):
        with pytest.raises(ValueError, match="votes are generated texts, expected labels"):
            call()


def made(tiny, pairs, mode):
    rng = np.random.default_rng(5)
    prompts = [rng.normal(size=(n, tiny.cfg.emb_dim)).astype("f4") * 3 for n in (4, 2, 6)]
    bank, lengths = prompt.bank(prompts, tiny.cfg.emb_dim)
    examples = data.from_pairs(pairs, tiny.vocabulary, {"inputs": 16, "targets": 8})
    task = eval_task.from_pairs(examples, LABELS[:2] if mode == "rank" else None)
    predictor = evaluation.Predictor(tiny, lengths, mode, 8, 3)
    return prompts, task, predictor, {**tiny.params, train.PROMPT: bank}


@pytest.mark.parametrize("mode", ["rank", "generate"])
def test_an_ensemble_is_its_prompts_and_its_file_gives_the_vote_again(tiny, pairs, tmp_path, mode):
    prompts, task, predictor, flat = made(tiny, pairs, mode)
    names = ["a", "b", "c"]
    choose = lambda figures: selection.choose_metric(figures, None)  # noqa: E731
    report = voting.evaluate(predictor, flat, [task], names, choose, tmp_path)["pairs"]
    for array, figures in zip(prompts, report.prompts, strict=True):
        alone = evaluation.Predictor(tiny, len(array), mode, 8, 3)
        single = evaluation.evaluate(alone, {**tiny.params, train.PROMPT: array}, [task])
        assert single == figures
    rows = [json.loads(x) for x in (tmp_path / "predictions/pairs.jsonl").read_text().splitlines()]
    again = []
    for row in rows:
        votes = [one["prediction"] for one in row["votes"]]
        if mode == "rank":
            labels = list(row["votes"][0]["scores"])
            scores = [[one["scores"][label] for label in labels] for one in row["votes"]]
        else:
            labels, scores = None, [one["log_likelihood"] for one in row["votes"]]
            assert all(score < 0 for score in scores)
        again.append(vote(votes, scores, labels))
        assert row["prediction"] == again[-1]
        assert row["agreement"] == round(votes.count(again[-1]) / 3, 4)
    assert task.judge(again) == report.ensemble
    accuracies = [figures["accuracy"] for figures in report.prompts]
    assert report.average["accuracy"] == pytest.approx(np.mean(accuracies))
    assert report.best == int(np.argmax([choose(figures) for figures in report.prompts]))
    table = report.table()
    assert "| average |" in table and f"best ({names[report.best]})" in table
    assert ("mean probability" in table) == (mode == "rank")


def test_the_cost_is_that_of_both_ways(tiny, pairs):
    prompts, task, predictor, flat = made(tiny, pairs, "rank")
    alone = [
        (evaluation.Predictor(tiny, (len(x),), "rank", 8, 3), {**tiny.params, train.PROMPT: x})
        for x in prompts[:1]
    ]
    found = voting.cost(predictor, flat, alone, task)
    assert set(found) == {"examples_per_second", "examples_per_second_separately"}
    assert all(value > 0 for value in found.values())
