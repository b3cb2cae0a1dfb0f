"""`softprompt population`: members from gin's lists, and what a single run would have left."""

import csv

import numpy as np
import pytest

import softprompt
from softprompt import members, population, train
from softprompt.__main__ import main

MODEL = "--gin_file=models/t5_1_1_embedded.gin"
COMMON = ["--gin.TRAIN_STEPS=2", "--gin.BATCH_SIZE=4", "--gin.PROMPT_LENGTH=3",
          "--gin.TASK_FEATURE_LENGTHS={'inputs': 48, 'targets': 8}"]  # fmt: skip


def test_members_are_the_product_of_the_lists_and_of_what_is_free():
    lists = {"SEEDS": [0, 1], "LEARNING_RATES": [0.1], "TASKS": None, "MEMBERS": None}
    found = members.plan(lists)
    assert found == [{"LEARNING_RATE": 0.1, "SEED": 0}, {"LEARNING_RATE": 0.1, "SEED": 1}]
    free = [{"SEED": 7}, {"INIT": "prompts/from_text.gin", "PROMPT_TEXT": "a b"}]
    found = members.plan({**lists, "MEMBERS": free})
    assert [one["SEED"] for one in found] == [7, 0, 1]
    assert members.name_of(found[1]) == "from_text-rate0.1-seed0-prompt_text_a_b"


@pytest.mark.parametrize("macros, message", [
    ({"SEEDS": 3}, "SEEDS is 3, expected a list"),
    ({"SEEDS": []}, r"SEEDS is \[\], expected a list"),
    ({"SEEDS": [1, 1]}, "SEEDS has 1 twice, expected different values"),
    ({"INITS": [3]}, "INIT is 3, expected the name of a gin file"),
    ({"MEMBERS": [{"INIT": 3}]}, "INIT is 3, expected the name of a gin file"),
    ({"MEMBERS": [{"SEEDS": [5]}]}, r"MEMBERS: {'SEEDS': \[5\]} has SEEDS, expected settings"),
    *(({"MEMBERS": x}, "MEMBERS is .*, expected a list of") for x in (["x"], [], 3, [{}, {3: 1}])),
])  # fmt: skip
def test_lists_that_make_no_members_are_named(macros, message):
    with pytest.raises(ValueError, match=message):
        members.plan(macros)


def outcome(name, score):
    best = {train.PROMPT: np.zeros((1, 2), np.float32)}
    metrics = {} if score is None else {"accuracy": score}
    status = population.FINISHED if score is not None else population.DIVERGED
    return population.Outcome(name, status, train.Result(9, best, best, 5, score, metrics))


def test_members_are_ranked_and_seeds_averaged(tmp_path):
    planned, outcomes = [], []
    for rate, scores in ((0.1, (50.0, 60.0)), (0.3, (70.0, None))):
        for seed, score in enumerate(scores):
            own = {"LEARNING_RATE": rate, "SEED": seed}
            planned.append(members.Planned(f"rate{rate}-seed{seed}", own, own))
            outcomes.append(outcome(planned[-1].name, score))
    summary = members.write(tmp_path, planned, outcomes)
    with open(tmp_path / "population.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["rank"], row["name"]) for row in rows] == [
        ("1", "rate0.3-seed0"), ("2", "rate0.1-seed1"), ("3", "rate0.1-seed0"),
        ("4", "rate0.3-seed1"),
    ]  # fmt: skip
    assert rows[3]["status"] == "diverged" and rows[3]["score"] == "nan"
    # The sample deviation of 50 and 60 is 7.07.
    assert "| 0.1 | 55.00 ± 7.07 | 2 | rate0.1-seed1 |" in summary
    assert (tmp_path / "summary.md").read_text() == summary
    page = (tmp_path / "report.html").read_text()
    assert "55.00 ± 7.07" in page and "4 prompts over one backbone" in page
    ranking = page[page.index('id="ranking"') :]
    places = [ranking.index(f">rate{name}<") for name in ("0.3-seed0", "0.1-seed1", "0.1-seed0")]
    assert places == sorted(places)


def test_what_was_not_evaluated_is_not_told_to_have_diverged(tmp_path):
    own = {"SEED": 0}
    one = outcome("a", None)
    for status, shown in ((population.INTERRUPTED, "–"), (population.DIVERGED, "diverged")):
        found = population.Outcome("a", status, one.result)
        assert f"| {shown} | 1 | a |" in members.write(
            tmp_path, [members.Planned("a", own, own)], [found]
        )


@pytest.mark.slow
def test_a_population_leaves_what_each_run_alone_leaves(tmp_path, capsys):
    """Two tasks of other labels and lengths, one member of another length and loss."""
    folder = tmp_path / "many"
    command = ["population", MODEL, "--gin_file=runs/population.gin", *COMMON,
               "--gin_file=prompts/from_class_labels.gin", f"--gin.POPULATION_DIR={folder}",
               "--gin.TASKS=['embedded_sentiment', 'embedded_entailment']", "--gin.SEEDS=[0]",
               "--gin.MEMBERS=[{}, {'PROMPT_LENGTH': 5, 'LOSS': 'tokens', 'SEED': 3, "
               "'MIXTURE_OR_TASK_NAME': 'embedded_sentiment'}]"]  # fmt: skip
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "3 prompts over the backbone" in said and "population.csv, summary.md" in said
    single = tmp_path / "one"
    one = "embedded_sentiment-length5-seed3-loss_tokens"
    assert main(["train", MODEL, "--gin_file=runs/prompt_classify.gin", *COMMON,
                 "--gin_file=prompts/from_class_labels.gin", f"--gin.MODEL_DIR={single}",
                 "--gin.MIXTURE_OR_TASK_NAME=embedded_sentiment", "--gin.PROMPT_LENGTH=5",
                 "--gin.LOSS=tokens", "--gin.SEED=3"]) == 0  # fmt: skip
    a, b = (
        softprompt.load_prompt(path / "prompts" / "best.safetensors")
        for path in (folder / one, single)
    )
    np.testing.assert_allclose(a.array, b.array, atol=2e-5)
    # The checksum is that of the last digits too.
    assert {**a.metadata, "sha256": None} == {**b.metadata, "sha256": None}
    names = lambda path: {  # noqa: E731
        str(p.relative_to(path)) for p in path.rglob("*") if "events" not in str(p)
    }
    assert names(folder / one) == names(single)
    rows = (folder / "population.csv").read_text().splitlines()
    assert len(rows) == 4 and one in "".join(rows)
    # Nothing is left to do: the same command says so at once, and the figures stay.
    assert main(command) == 0
    assert (folder / "population.csv").read_text().splitlines() == rows


def test_long_settings_make_no_long_names():
    texts = ["a" * 300, "a" * 299 + "b", "好" * 90]
    names = [members.name_of({"PROMPT_TEXT": text}) for text in texts]
    assert len(set(names)) == 3 and all(len(name.encode()) < 256 for name in names)


def test_mistakes_name_the_member(tmp_path, capsys):
    command = ["population", MODEL, "--gin_file=runs/population.gin",
               "--gin.TASKS=['embedded_sentiment']",
               f"--gin.POPULATION_DIR={tmp_path}"]  # fmt: skip
    assert main([*command, "--gin.MEMBERS=[{'NO_SUCH': 1}]", "--gin.SEEDS=[0]"]) == 2
    said = capsys.readouterr().err
    assert "embedded_sentiment-seed0-no_such_1: --gin.NO_SUCH: no gin file given knows" in said
    assert main([*command, "--gin.SEEDS=[1]", "--gin.PROMPT_LENGTHS=[5, 0]"]) == 2
    said = capsys.readouterr().err
    assert "length0-seed1: a population tunes plain prompts" in said and "no prompt" in said
    assert not list(tmp_path.iterdir()), "the first member, which nothing is wrong with, left files"
