"""Domain transfer: the plan, the table, and the command from training to the targets' figures."""

import csv
import json
import re
import shutil

import numpy as np
import pytest

from softprompt import planning, transfer
from softprompt.__main__ import main
from softprompt.formats import native
from softprompt.transfer import Figure

MACROS = {
    "TRANSFER_DIR": "out",
    "SOURCES": "squad",
    "TARGETS": ["squad", "mrqa_out_of_domain"],
    "TARGET_SPLIT": "validation",
    "METHODS": {"model tuning": ["runs/model_finetune.gin"], "prompt tuning": []},
    "SEEDS": [0, 1],
}


def test_a_plan_is_read_and_a_malformed_one_named():
    spec = transfer.read(MACROS)
    assert spec.sources == ["squad"]
    found = list(transfer.runs(spec))
    assert [(r.seed, r.line) for r in found] == [
        (0, "model tuning"), (0, "prompt tuning"), (1, "model tuning"), (1, "prompt tuning"),
    ]  # fmt: skip
    assert str(found[1].folder) == "out/runs/prompt_tuning/squad/0"
    assert found[1].settings == ["MIXTURE_OR_TASK_NAME=squad", "SEED=0", "BINARY=train"]
    for change, message in (
        ({"TRANSFER_DIR": None}, "give --gin.TRANSFER_DIR"),
        ({"TARGETS": None}, "a transfer needs TARGETS; include runs/transfer.gin"),
        ({"TARGETS": []}, r"TARGETS is \[\], expected different task names"),
        ({"SOURCES": ["a", "a"]}, "SOURCES is .*, expected different task names"),
        ({"TARGETS": ["a:b", "a/b"]}, "TARGETS has the names 'a:b' and 'a/b', which share"),
        ({"SOURCES": ".."}, r"SOURCES has the name '\.\.', expected"),
        ({"METHODS": {"a b": [], "a_b": []}}, "METHODS has the names 'a b' and 'a_b', which"),
        ({"METHODS": {"a": "b"}}, "METHODS is .*, expected {'a name'"),
        ({"SEEDS": [True]}, "SEEDS is .*, expected different integers"),
    ):
        with pytest.raises(ValueError, match=message):
            transfer.read({**MACROS, **change})


def test_the_table_has_means_deviations_and_differences(tmp_path):
    spec = transfer.read({**MACROS, "TRANSFER_DIR": str(tmp_path)})
    figures = [
        Figure("model tuning", "squad", "squad", "f1", 0, 80.0),
        Figure("prompt tuning", "squad", "squad", "f1", 0, 70.0),
        Figure("prompt tuning", "squad", "bioasq", "f1", 0, 50.0),
        Figure("model tuning", "squad", "squad", "f1", 1, 82.0),
        Figure("prompt tuning", "squad", "squad", "f1", 1, 74.0),
    ]
    lines = transfer.write(spec, figures).splitlines()
    assert lines[0] == "| source | target | figure | model tuning | prompt tuning | Δ |"
    # Sample standard deviations: sqrt(2) and sqrt(8).
    assert lines[2] == "| squad | squad | f1 | 81.0 ± 1.4 | 72.0 ± 2.8 | -9.0 |"
    assert lines[3] == "| squad | bioasq | f1 |  | 50.0 |  |"
    with open(tmp_path / "summary.csv") as file:
        first = next(csv.DictReader(file))
    assert (first["mean"], first["standard_deviation"], first["seeds"]) == ("81.00", "1.41", "2")
    page = (tmp_path / "report.html").read_text()
    assert "nan" not in re.sub("<style>.*?</style>", "", page, flags=re.DOTALL)
    assert "81.0\u00a0±\u00a01.4" in page and ">-9.0<" in page and ">50.0<" in page
    three = transfer.table(["a", "b", "c"], {("s", "t", "f"): {"a": [1.0], "b": [2.0], "c": [0.0]}})
    assert "Δ b | Δ c |" in three and "| +1.0 | -1.0 |" in three


def rows_file(path, words):
    lines = [{"text": f"a {w} film", "label": i % 2} for i, w in enumerate(words)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.slow
def test_the_command_trains_evaluates_goes_on_and_grows(tiny_folder, tmp_path, capsys):
    import seqio

    from softprompt.tasks import registry, user  # noqa: F401 (seqio's tasks, for a mixture)

    near = rows_file(tmp_path / "near.jsonl", ["fine", "dull", "warm", "grim"])
    far = rows_file(tmp_path / "far.jsonl", ["sunny", "foggy", "bright"])
    for name, path in (("near", near), ("far", far)):
        user.define_task(f"t_{name}", path, path, labels=["good", "bad"])
    if "t_both" not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add("t_both", ["t_near", "t_far"], default_rate=1.0)

    def run(*flags):
        assert main([
            "transfer", "--gin_file=models/t5_1_1_embedded.gin", "--gin_file=runs/transfer.gin",
            "--gin.ARCHITECTURE=None", f"--gin.INITIAL_CHECKPOINT_PATH={tiny_folder}",
            "--gin.SOURCES=t_near", "--gin.TARGETS=['t_both']", "--gin.TRAIN_STEPS=2",
            "--gin.EVAL_MODE=rank", "--gin.PROMPT_LENGTH=3", "--gin.BATCH_SIZE=4",
            "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 4}",
            f"--gin.TRANSFER_DIR={tmp_path / 'out'}", *flags,
        ]) == 0  # fmt: skip
        return capsys.readouterr().out

    def started(said):
        return [line for line in said.splitlines() if line.startswith("--- ")]

    said = run("--gin.SEEDS=[0]")
    assert "--- training 2/2: prompt tuning, t_near, seed 0" in said
    with open(tmp_path / "out" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(r["method"], r["target"]) for r in rows] == [
        ("model tuning", "t_far"), ("model tuning", "t_near"),
        ("prompt tuning", "t_far"), ("prompt tuning", "t_near"),
    ], "seqio sorts a mixture's tasks"  # fmt: skip
    # The figures are recomputed from the predictions, and those of the source are the training's.
    for row in rows:
        folder = tmp_path / "out" / "runs" / row["method"].replace(" ", "_") / "t_near" / "0"
        path = folder / "transfer" / "t_both" / "predictions" / f"{row['target']}.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()]
        right = [x["prediction"] == x["target"] for x in found]
        assert float(row["value"]) == pytest.approx(100 * np.mean(right), abs=0.01)
        if row["target"] == "t_near":
            trained = json.loads((folder / "result.json").read_text())["figures"]["accuracy"]
            assert float(row["value"]) == pytest.approx(trained, abs=0.01)

    said = run("--gin.SEEDS=[0]")
    assert started(said) == [], "nothing is run again"
    said = run("--gin.SEEDS=[0]", "--gin.TARGETS=['t_both', 't_far']")
    assert started(said) == [
        f"--- {method}, evaluated on t_far, t_near, seed 0"
        for method in ("model tuning", "prompt tuning")
    ], "only what is new is run"
    shutil.copytree(tmp_path / "out", tmp_path / "moved")
    said = run("--gin.SEEDS=[0]", f"--gin.TRANSFER_DIR={tmp_path / 'moved'}")
    assert started(said) == [], "a folder that was moved goes on"
    with open(tmp_path / "out" / "results.csv") as file:
        assert list(csv.DictReader(file)) == rows, "a task that is a target twice counts once"

    assert main([
        "transfer", "--gin_file=models/t5_1_1_embedded.gin", "--gin_file=runs/transfer.gin",
        "--gin.SOURCES=t_near", "--gin.TARGETS=['t_both']", "--gin.TRAIN_STEPS=3",
        f"--gin.TRANSFER_DIR={tmp_path / 'out'}",
    ]) == 2  # fmt: skip
    assert "was made by another configuration" in capsys.readouterr().err


def test_a_prompt_is_evaluated_with_the_backbone_it_was_trained_with(tmp_path, monkeypatch):
    from softprompt import config

    asked = []
    monkeypatch.setattr(
        planning, "do",
        lambda run, _: asked.append(config.macros()) or planning.Outcome(run, 1.0, {"f": 1.0}, 1),
    )  # fmt: skip
    config.parse(["models/t5_1_1_embedded.gin", "runs/prompt_finetune.gin"], complete=False)
    macros = config.macros()
    for what in (["prompts/best.safetensors"], ["prompts/best.safetensors", "backbone/x"]):
        folder = tmp_path / str(len(what))
        for name in what:
            (folder / name).parent.mkdir(parents=True)
            (folder / name).touch()
        transfer.evaluated(planning.Run("m", "", "s", 0, [], folder), "t", "test", macros)
    with pytest.raises(ValueError, match="is finished, but neither .* is there to eva"):
        transfer.evaluated(planning.Run("m", "", "s", 0, [], tmp_path / "3"), "t", "test", macros)
    alone, both = asked
    assert not alone["IGNORE_FINGERPRINT"] and both["IGNORE_FINGERPRINT"] is True
    assert both["INITIAL_CHECKPOINT_PATH"].endswith("2/backbone")


def test_a_run_stays_finished_in_a_larger_plan_alone():
    from softprompt import config

    def identity(**changed):
        values = {"TRANSFER_DIR": "x", "MODEL_DIR": "m", "MIXTURE_OR_TASK_NAME": "squad"} | changed
        bindings = [(name, value) for name, value in values.items()]
        config.parse(["models/t5_1_1_embedded.gin", "runs/transfer.gin"], bindings)
        return planning.identity()

    plain = identity()
    methods = "{'a': ['a.gin', 'b.gin', 'c.gin', 'd.gin', 'e.gin', 'f.gin', 'g.gin'], 'b': ['c']}"
    for same in ({"SEEDS": "[0, 1, 2, 3]"}, {"TRANSFER_DIR": "y"}, {"METHODS": methods},
                 {"MODEL_DIR": "n"}, {"TARGETS": "['squad']"}):  # fmt: skip
        assert identity(**same) == plain
    for other in ({"SEED": "1"}, {"TRAIN_STEPS": "7"}, {"MIXTURE_OR_TASK_NAME": "glue_mrpc"},
                  {"TASK_FEATURE_LENGTHS": "{'inputs': 8, 'targets': 8}"}):  # fmt: skip
        assert identity(**other) != plain


def test_what_was_trained_is_known_wherever_it_lies(tmp_path, tiny_folder):
    from softprompt import config

    def identity(folder):
        settings = {
            "MIXTURE_OR_TASK_NAME": "embedded_sentiment",
            "TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 8},
            "PROMPT_FILE": str(folder / "best.safetensors"),
            "INITIAL_CHECKPOINT_PATH": str(folder / "backbone"),
        }
        config.parse(transfer.EVAL_FILES, [(k, repr(v)) for k, v in settings.items()])
        return planning.identity()

    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        shutil.copytree(tiny_folder, folder / "backbone")
        (folder / "best.safetensors").write_text("one")
    assert identity(first) == identity(second)
    (second / "best.safetensors").write_text("another")
    assert identity(first) != identity(second)
    (first / "best.safetensors").write_text("another")
    shutil.rmtree(second / "backbone")
    native.save(second / "backbone", native.open_stored(first / "backbone"), "bfloat16")
    assert identity(first) != identity(second), "other weights"


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--gin.TARGETS=['squadd']", "no seqio task or mixture is named 'squadd'; did you mean"),
        ("--gin.SOURCES=mrqa_bioasq", "task mrqa_bioasq has no split 'train'; it has validation"),
        ("--gin.TARGET_SPLIT=dev", "task squad has no split 'dev'; it has train, validation"),
        ("--gin.METHODS={'a': ['x']}", "'x' is neither a .gin file nor NAME=value"),
        ("--gin.MIXTURE_OR_TASK_MODULE=no.such", "MIXTURE_OR_TASK_MODULE 'no.such': No module"),
        ("--gin.METHODS={'a': [], 'b': ['LEARNIN_RATE=3']}", "knows the name 'LEARNIN_RATE'"),
        (
            "--gin.METHODS={'a': ['EVAL_MODE=rank']} --gin.EVAL_MODE=generate",
            "--gin.EVAL_MODE: METHODS sets EVAL_MODE for every run",
        ),
        ("--gin.SEED=3", "--gin.SEED: SEEDS sets SEED for every run"),
        ("--gin.SEEDS=3", "SEEDS is 3, expected different integers"),
        ("--gin.TARGETS=mrqa_subjqa_books", "the data of mrqa_subjqa_books is not at hand"),
    ],
)
def test_mistakes_are_found_before_anything_trains(tmp_path, capsys, monkeypatch, flag, message):
    monkeypatch.delenv("SOFTPROMPT_DATA_DIR", raising=False)
    assert main([
        "transfer", "--gin_file=models/t5_1_1_embedded.gin", "--gin_file=runs/transfer.gin",
        f"--gin.TRANSFER_DIR={tmp_path / 'out'}", *re.split(" (?=--)", flag),
    ]) == 2  # fmt: skip
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()
