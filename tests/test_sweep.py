"""Sweeps: points, lines, tasks and seeds in one command; resumed, summarised, plotted."""

import csv
import json
import math

import numpy as np
import pytest

from softprompt import config, data, planning, sweep
from softprompt.__main__ import main

PARTS = ("sweeps/common.gin", "sweeps/benchmark_tasks.gin", "sweeps/super_glue_tasks.gin")
SWEEPS = [f for f in config.shipped() if f.startswith("sweeps/") and f not in PARTS]
MODEL = "models/t5_1_1_embedded.gin"


@pytest.mark.parametrize("file", SWEEPS)
def test_every_run_of_every_sweep_resolves(file):
    files, bindings = [MODEL, file], [("SWEEP_DIR", "/tmp/s"), ("FAMILY", "family")]
    if "FAMILY" not in open(config.GIN_FOLDER / file).read():
        bindings.pop()
    config.parse(files, bindings)
    spec = sweep.read(config.macros())
    planned = list(sweep.runs(spec))
    assert len(planned) == (len(spec.points) * len(spec.lines) * len(spec.tasks) * len(spec.seeds))
    assert len({run.folder for run in planned}) == len(planned)
    identities = set()
    for run in planned:
        assert planning.configure(run, files, bindings, []) in planning.BINARIES
        assert config.macros()["SEED"] == run.seed
        identities.add(planning.identity())
    assert len(identities) == len(planned)


@pytest.fixture
def small(tmp_path):
    """A sweep of two points and two lines, as flags."""
    (tmp_path / "small.gin").write_text(
        """
include 'sweeps/common.gin'
TITLE = 'Small'
AXIS = 'prompt length'
POINTS = {'1': ['EVAL_BATCH_SIZE=8'], '3': ['EVAL_BATCH_SIZE=16']}
LINES = {
  'tuned': ['runs/prompt_classify.gin', 'PROMPT_LENGTH=2', 'TRAIN_STEPS=2'],
  'majority': ['runs/baseline.gin', 'METHOD=majority', 'BINARY=baseline'],
}
TASKS = {'embedded_sentiment': ["TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 8}"]}
SEEDS = [0, 1]
"""
    )
    return [
        f"--gin_file={MODEL}", "--gin_file=small.gin", f"--gin_search_paths={tmp_path}",
        f"--gin.SWEEP_DIR={tmp_path / 'out'}", "--gin.BATCH_SIZE=4",
    ]  # fmt: skip


def test_what_a_sweeps_own_file_sets_must_be_taken_by_a_run(tmp_path, small, capsys):
    with open(tmp_path / "small.gin", "a") as file:
        file.write("TRAIN_STEPS = 7\n")
    lines = "{'': ['runs/prompt_classify.gin', 'PROMPT_LENGTH=2']}"
    assert main(["sweep", *small, f"--gin.LINES={lines}"]) == 2
    said = capsys.readouterr().err
    assert "TRAIN_STEPS is 7 in the gin files given, but every run names files that s" in said
    assert said.endswith(
        "300); give --gin.TRAIN_STEPS=… in its place, or set it where those files are named\n"
    )
    files, search = [MODEL, "small.gin"], [str(tmp_path)]
    config.parse(files, [("SWEEP_DIR", "x"), ("LINES", lines)], search)
    planned = list(sweep.runs(sweep.read(config.macros())))
    planning.check_taken(planned, files, [("TRAIN_STEPS", "3")], search)
    # Of the file's own two lines one names no file that sets it.
    (tmp_path / "small.gin").write_text((tmp_path / "small.gin").read_text() + "SHOTS = 9\n")
    config.parse(files, [("SWEEP_DIR", "x")], search)
    planned = list(sweep.runs(sweep.read(config.macros())))
    planning.check_taken(planned, files, [], search)


@pytest.mark.slow
def test_a_sweep_runs_resumes_and_reports(tmp_path, small, capsys, monkeypatch):
    # Its first attempt is cut off in the third run.
    real, calls = planning.do, []

    def cut(run, binary):
        calls.append(run)
        return None if len(calls) == 3 else real(run, binary)

    monkeypatch.setattr(planning, "do", cut)
    assert main(["sweep", *small]) == 143
    assert "the same command goes on from here" in capsys.readouterr().out
    read, reads = data._records, []

    def counted(task, split, lengths):
        reads.append((task.name, split))
        return read(task, split, lengths)

    monkeypatch.setattr(data, "_records", counted)
    assert main(["sweep", *small]) == 0
    assert len(reads) == len(set(reads)), "no split is read twice"
    out = tmp_path / "out"
    rows = list(csv.DictReader(open(out / "results.csv")))
    # Eight runs; only the one that was cut off was begun twice.
    assert len(rows) == 8 and len(calls) == 9
    scores = [float(r["score"]) for r in rows if r["line"] == "tuned" and r["point"] == "3"]
    [summary] = [
        r
        for r in csv.DictReader(open(out / "summary.csv"))
        if r["line"] == "tuned" and r["point"] == "3"
    ]
    assert float(summary["mean"]) == pytest.approx(np.mean(scores), abs=0.01)
    assert float(summary["standard_deviation"]) == pytest.approx(np.std(scores, ddof=1), abs=0.01)
    assert {r["score"] for r in rows if r["line"] == "majority"} == {"50.00"}
    assert "| tuned | 3 | " in (out / "table.md").read_text()
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert main(["sweep", *small, "--gin.BATCH_SISE=8"]) == 2
    assert "no run of this sweep knows the name 'BATCH_SISE'" in capsys.readouterr().err
    # A run by other settings is not taken for this one's.
    assert main(["sweep", *small, "--gin.LEARNING_RATE=0.2"]) == 2
    said = capsys.readouterr().err
    assert "was made by another configuration" in said
    assert "LEARNING_RATE was '0.3', is now '0.2'" in said
    assert json.loads(next(out.rglob("result.json")).read_text())["seconds"] > 0


def test_a_diverged_run_does_not_end_a_sweep(tmp_path, small, capsys):
    flags = [*small, "--gin.SEEDS=[0]", "--gin.LEARNING_RATE=1e38"]
    for _ in range(2):  # The second time from what the first left.
        assert main(["sweep", *flags]) == 0
        said = capsys.readouterr().out
        assert "| tuned | 1 | diverged |" in said, said
    rows = list(csv.DictReader(open(tmp_path / "out" / "summary.csv")))
    assert {r["standard_deviation"] for r in rows} == {""}, "one seed has none"


def test_a_run_that_evaluated_nothing_ends_a_sweep(small, capsys, monkeypatch):
    monkeypatch.setattr(
        planning, "do", lambda run, binary: planning.Outcome(run, math.nan, {}, 1.0)
    )
    assert main(["sweep", *small]) == 2
    assert "evaluated nothing (EVAL_SPLIT)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag, message",
    [
        ("EVAL_SPLIT=none", "seed 0 evaluates nothing (EVAL_SPLIT is 'none'): a sweep compares"),
        ("TASKS={'embedded_sentiment': [], 'sentimnt': []}", "task or mixture is named 'sentimnt'"),
        ("TASKS={'embedded_sentiment': [], 'mrqa_bioasq': []}", "mrqa_bioasq has no split 'train'"),
        ("TASKS={'embedded_sentiment': [], 'super_glue_cb': []}", "has no super_glue/cb/train"),
        ("SEED=3", "--gin.SEED: SEEDS sets SEED for every run; give --gin.SEEDS in its place"),
        ("EVAL_BATCH_SIZE=4", "--gin.EVAL_BATCH_SIZE: POINTS sets EVAL_BATCH_SIZE for every run"),
        ("AXIS=5", "AXIS is 5, expected a text"),
        (
            "POINTS={'1': [], '3': ['PATIENCE=x']}",
            "tuned, 3, embedded_sentiment, seed 0: PATIENCE is",
        ),
        (
            "LINES={'': ['runs/baseline.gin', 'METHOD=majority', 'BINARY=baseline']} & "
            "TASKS={'embedded_sentiment': [], 'mrqa_bioasq': []}",
            "mrqa_bioasq has no split 'train'",
        ),
        ("SHOTS=-1", "majority, 1, embedded_sentiment, seed 0: SHOTS is -1"),
        ("POINTS={'1': [], '3': ['LOSS=words']}", "LOSS is 'words', expected one of 'tokens'"),
    ],
)
def test_mistakes_are_found_before_a_run(small, tmp_path, capsys, monkeypatch, flag, message):
    monkeypatch.setenv("SOFTPROMPT_DATA_DIR", str(tmp_path))
    assert main(["sweep", *small, *(f"--gin.{one}" for one in flag.split(" & "))]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_baseline_may_be_bound_without_macros(small, tmp_path, capsys):
    text = (config.GIN_FOLDER / "runs/baseline.gin").read_text()
    text = text.replace("METHOD = %gin.REQUIRED\n", "").replace("%METHOD", "'majority'")
    (tmp_path / "own.gin").write_text(text)
    lines = "--gin.LINES={'': ['own.gin', 'BINARY=baseline']}"
    assert main(["sweep", *small[:-1], lines, "--gin.SEEDS=[0]"]) == 0
    assert "2 runs in" in capsys.readouterr().out


def test_a_flag_goes_over_what_suits_a_task_and_under_the_points(small):
    files, search = [MODEL, "small.gin"], [small[2].split("=", 1)[1]]
    given = [("SWEEP_DIR", "out"), ("TASK_FEATURE_LENGTHS", "{'inputs': 9, 'targets': 4}"),
             ("EVAL_BATCH_SIZE", "4"), ("TRAIN_STEPS", "7")]  # fmt: skip
    config.parse(files, given[:1], search)
    spec = sweep.read(config.macros())
    run = next(sweep.runs(spec))
    planning.configure(run, files, given[:1], search)
    assert config.macros()["TASK_FEATURE_LENGTHS"]["inputs"] == 32
    planning.configure(run, files, given, search)
    macros = config.macros()
    assert macros["TASK_FEATURE_LENGTHS"]["inputs"] == 9
    assert macros["EVAL_BATCH_SIZE"] == 8 and macros["TRAIN_STEPS"] == 2
    # Of the lines only one sets the steps: another one may take them from the flag.
    planning.check_free(given[3:], LINES=spec.lines)


@pytest.mark.parametrize("points", [("-3", "-1"), ("0", "0.0"), ("0", "20")])
def test_any_numbers_can_be_points(tmp_path, points):
    spec = sweep.Spec(tmp_path, "t", "a", {p: [] for p in points}, {"": []}, {"t": []}, [0])
    sweep.plot(spec, {("", point, "t"): [50.0] for point in points}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").is_file()


def test_ones_own_data_take_the_place_of_a_sweeps_tasks(tmp_path, small, capsys):
    path = tmp_path / "rows.jsonl"
    lines = [{"text": f"a {w} film", "label": i % 2} for i, w in enumerate("abcd")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = [f"--train_file={path}", f"--validation_file={path}", "--labels=good,bad"]
    assert main(["sweep", *small, *own, "--gin.SEEDS=[0]"]) == 0
    rows = list(csv.DictReader(open(tmp_path / "out" / "results.csv")))
    assert {r["task"] for r in rows} == {"user_task"} and len(rows) == 4
    assert main(["transfer", f"--gin_file={MODEL}", "--gin_file=runs/transfer.gin", *own]) == 2
    assert "softprompt transfer takes no --train_file" in capsys.readouterr().err


def test_a_finished_run_is_of_the_data_it_was_made_of(tmp_path, small, capsys, monkeypatch):
    from softprompt.tasks import sources

    monkeypatch.setattr(sources, "_data_dir", None)  # As it was, once the test is over.

    def rows(folder, *labels):
        (tmp_path / folder / "super_glue" / "cb").mkdir(parents=True)
        for split in ("train", "validation"):
            lines = [
                {"premise": f"one of {i}", "hypothesis": "none", "label": label, "idx": i}
                for i, label in enumerate(labels)
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (tmp_path / folder / "super_glue" / "cb" / f"{split}.jsonl").write_text(text)

    def run(*flags):
        lines = "{'': ['runs/baseline.gin', 'METHOD=majority', 'BINARY=baseline']}"
        given = [flag for flag in small if not flag.startswith("--gin.BATCH_SIZE")]
        code = main(["sweep", *given, f"--gin.LINES={lines}", "--gin.SEEDS=[0]", *flags])
        said = capsys.readouterr()
        return code, said.out + said.err

    rows("one", 0, 0, 1), rows("two", 1, 1, 0)
    (tmp_path / "moved").symlink_to("one")
    flags = ["--gin.TASKS={'super_glue_cb': []}", f"--gin.SWEEP_DIR={tmp_path / 'shared'}"]
    assert "--- run 2/2" in run(*flags, f"--data_dir={tmp_path / 'one'}")[1]
    code, said = run(*flags, f"--data_dir={tmp_path / 'moved'}")
    assert code == 0 and "--- run" not in said, "the same rows elsewhere"
    code, said = run(*flags, f"--data_dir={tmp_path / 'two'}")
    assert code == 2 and "the content of super_glue_cb/train was '" in said

    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 0}\n')
    own = [f"--train_file={mine}", f"--validation_file={mine}", "--labels=good,bad"]
    assert run(*own)[0] == 0
    mine.rename(tmp_path / "other.jsonl")
    own = [flag.replace("mine", "other") for flag in own]
    code, said = run(*own)
    assert code == 0 and "--- run" not in said
    with open(tmp_path / "other.jsonl", "a") as file:
        file.write('{"text": "c", "label": 1}\n')
    code, said = run(*own, "--gin.SEEDS=[0, 1]")
    assert code == 2 and "the content of user_task/train was '" in said


def test_a_malformed_sweep_is_one_sentence():
    with pytest.raises(ValueError, match="a sweep needs SWEEP_DIR, TITLE"):
        sweep.read({})
    good = dict(SWEEP_DIR="x", TITLE="t", AXIS="a", POINTS={"1": ["A=1"]}, LINES={"": ["B=2"]},
                TASKS={"t": []}, SEEDS=[0])  # fmt: skip
    assert sweep.read(good).seeds == [0]
    for name, bad in (
        ("POINTS", {"1": "A=1"}), ("LINES", {}), ("SEEDS", ["0"]), ("SEEDS", [0, 0]),
        ("SWEEP_DIR", 1), ("POINTS", {"1": [3]}), ("LINES", {"": [("A", 1)]}),
        ("TITLE", 5), ("AXIS", ["a"]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} is .*expected"):
            sweep.read({**good, name: bad})


def test_every_name_of_a_sweep_has_a_folder_of_its_own():
    for names in ({"a b": [], "a/b": []}, {1: [], "1": []}):
        with pytest.raises(ValueError, match="POINTS has the names .*which share the folder"):
            planning.settings_of("POINTS", names)
    with pytest.raises(ValueError, match=r"LINES has the name '\.\.', expected one that"):
        planning.settings_of("LINES", {"..": []})
    assert list(planning.settings_of("POINTS", {1: [], "": [], "1.5": []})) == ["1", "", "1.5"]
