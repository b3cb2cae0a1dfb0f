"""What prompt tuning is held against: majority, priming, probe, and the command that runs them."""

import json

import numpy as np
import pytest

from softprompt import baselines, data, eval_task
from softprompt.__main__ import main
from softprompt.vocabulary import EOS_ID

LENGTHS = {"inputs": 48, "targets": 8}
LABELS = ["positive", "negative"]


@pytest.fixture
def train(pairs, vocabulary):
    return data.from_pairs(pairs, vocabulary, LENGTHS, "reviews")


@pytest.fixture
def asked(vocabulary):
    texts = [("a good day", "positive"), ("a bad day " * 12, "negative")]
    return data.from_pairs(texts, vocabulary, LENGTHS, "asked")


def test_majority_is_the_commonest_training_target(train, asked, pairs, vocabulary):
    more = data.from_pairs([*pairs, ("so so", "negative")], vocabulary, LENGTHS)
    task = eval_task.from_pairs(asked, LABELS)
    assert baselines.majority(more, task, vocabulary) == ["negative"] * 2
    assert task.judge(baselines.majority(more, task, vocabulary))["accuracy"] == 50


def shots_of(ids, vocabulary):
    """The pieces of a primed input, at its separators."""
    mark = vocabulary.encode("answer:")
    parts, ids = [[]], ids.tolist()
    while ids:
        if ids[: len(mark)] == mark:
            parts.append([])
            ids = ids[len(mark) :]
        else:
            parts[-1].append(ids.pop(0))
    return parts


def test_shots_stand_before_the_input_in_its_own_tokens(train, asked, pairs, vocabulary):
    described = "is the review positive or negative?"
    primed, lost = baselines.prime(train, asked, vocabulary, 2, 60, 0, described)
    opening = vocabulary.encode(described)
    ids = primed.inputs[0]
    assert ids[: len(opening)].tolist() == opening and ids[-1] == EOS_ID
    assert ids.tolist().count(EOS_ID) == 1
    first, second, third, end = shots_of(ids[len(opening) :], vocabulary)
    assert end == [EOS_ID]
    asked_ids = asked.inputs[0][:-1].tolist()
    # An answer, then the next question.
    known = {tuple(vocabulary.encode(text)): label for text, label in pairs}
    labels = {label: vocabulary.encode(label) for label in LABELS}
    one = known[tuple(first)]
    assert second[: len(labels[one])] == labels[one]
    other = known[tuple(second[len(labels[one]) :])]
    assert other != one, "the classes take turns"
    assert third == labels[other] + asked_ids
    assert primed.targets is asked.targets and primed.records is asked.records


def test_the_seed_draws_the_shots(train, asked, vocabulary):
    drawn = [
        baselines.prime(train, asked, vocabulary, 4, 200, seed)[0].inputs[0].tolist()
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    counts = np.array(drawn[0])
    for label in LABELS:
        assert np.isin(counts, vocabulary.encode(label)).sum() >= 2


def test_what_has_no_room_is_left_out_whole_and_counted(train, asked, vocabulary):
    long = asked.inputs[1]
    for length in range(len(long), 140):
        primed, lost = baselines.prime(train, asked, vocabulary, 6, length, 0, "good or bad?")
        ids = primed.inputs[1]
        assert len(ids) <= length and ids[-1] == EOS_ID
        mark = [] if lost["separator"] else vocabulary.encode("answer:")
        tail = [*long[:-1].tolist(), *mark, EOS_ID]
        assert ids[-len(tail) :].tolist() == tail, "the input itself is never cut"
        front = ids[: -len(tail)].tolist()
        opening = vocabulary.encode("good or bad?")
        assert front[: len(opening)] == (opening if front else [])
        ends = [vocabulary.encode(label) for label in LABELS]
        assert not front[len(opening) :] or any(front[-len(e) :] == e for e in ends)
        if length == len(long):
            assert lost == {"shots": 2, "description": 1, "separator": 1} and not front
    assert lost == {"shots": 0, "description": 0, "separator": 0}
    with pytest.raises(ValueError, match="SHOTS is 13, but reviews has 12 training examples"):
        baselines.prime(train, asked, vocabulary, 13, 100)


def test_pooled_states_do_not_see_padding_or_batch_mates(tiny, train):
    whole = baselines.pooled(tiny, train, batch_size=12)
    alone = baselines.pooled(tiny, train, batch_size=1)
    np.testing.assert_allclose(whole, alone, atol=1e-4)
    assert whole.shape == (12, tiny.cfg.emb_dim) and np.ptp(whole, axis=0).max() > 1e-3


def test_the_probe_learns_what_the_states_hold(embedded, train):
    task = eval_task.from_pairs(train, LABELS)
    found, count = baselines.probe(embedded, train, task)
    # Of two classes: a weight per state, and an intercept.
    assert count == embedded.cfg.emb_dim + 1
    assert task.judge(found)["accuracy"] >= 80
    two = data.Examples("two", train.inputs[5:7], train.targets[5:7], train.records[5:7], {})
    assert set(baselines.probe(embedded, two, task)[0]) <= set(LABELS), "one example of each class"
    one = data.Examples("one", train.inputs[:2], train.targets[:2], train.records[:2], {})
    assert baselines.probe(embedded, one, task) == (["positive"] * 12, 0)
    with pytest.raises(ValueError, match="'probe' is for tasks with labels, reviews has none"):
        baselines.probe(embedded, train, eval_task.from_pairs(train, None))


def test_the_command_reports_every_method(tiny_folder, tmp_path, capsys, pairs):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in pairs))
    shared = [
        "baseline", "--gin_file=models/t5_1_1_embedded.gin", "--gin_file=runs/baseline.gin",
        f"--train_file={path}", f"--validation_file={path}", f"--gin.EVAL_OUTPUT_DIR={tmp_path}",
        "--labels=positive,negative", f"--gin.INITIAL_CHECKPOINT_PATH={tiny_folder}",
    ]  # fmt: skip
    figures = {}
    for method, *flags in (
        ("majority",),
        ("none",),
        ("priming", "--gin.SHOTS=2", "--gin.DESCRIPTION=good or bad?"),
        ("priming", "--gin.SHOTS=12", "--gin.EVAL_MODE=generate",
         "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 4}"),
    ):  # fmt: skip
        assert main([*shared, f"--gin.METHOD={method}", *flags]) == 0
        said = capsys.readouterr().out.splitlines()
        figures[method] = json.loads(said[-1])
        assert figures[method]["method"] == method
        assert json.loads((tmp_path / "run.json").read_text())["trainable_parameters"] == 0
        assert json.loads((tmp_path / "user_task.json").read_text())["accuracy"] >= 0
    assert figures["majority"]["accuracy"] == 50
    assert said[-3:-1] == [
        "user_task: 12 of 12 inputs have no room for all 12 shots",
        f"{tmp_path / 'user_task.json'} is replaced, as are the predictions beside it",
    ]
    lines = (tmp_path / "predictions" / "user_task.jsonl").read_text().splitlines()
    assert len(lines) == 12 and "scores" not in lines[0], "generated"
    assert main([*shared, "--gin.METHOD=guess"]) == 2
    assert "METHOD is 'guess', expected one of majority" in capsys.readouterr().err
