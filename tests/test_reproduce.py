"""Reruns of the paper: plans, printed figures and their sources, and tables beside ours."""

import dataclasses
import json
import pathlib

import pytest

from softprompt import (
    checkpoint,
    compare,
    config,
    experiments,
    members,
    needs,
    planning,
    provenance,
    published,
    reproduce,
    standins,
    sweep,
    transfer,
)
from softprompt.__main__ import main
from softprompt.experiments import EXPERIMENTS, Options, plan
from softprompt.tasks import records, sources


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("SOFTPROMPT_DATA_DIR", raising=False)
    yield
    sources.use_data_dir(None)


def rows_at(root, *folders):
    """A data folder whose sets have a row in each split."""
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for split in ("train", "validation"):
            (root / folder / f"{split}.jsonl").write_text("{}\n")
    sources.use_data_dir(root)
    return root


def test_data_is_looked_for_in_a_folder_that_is_there(tmp_path, capsys):
    assert main(["reproduce", "table2", "--plan", f"--data_dir={tmp_path / 'none'}"]) == 2
    assert "none': there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_name_has_a_plan_on_the_embedded_backbone_alone(name, tmp_path):
    planned = plan(name, Options(output_dir=tmp_path))
    assert planned.runs
    if name != "figure4":
        # It says that it is reduced, and what of the paper's it leaves out.
        assert "100 steps in place of 30,000" in planned.reduced[0] and planned.missing
        assert planned.folder == tmp_path / f"{name}-reduced" and planned.done
        assert sum(group.runs for group in planned.groups) >= 1
    if name == "figure3a":
        assert len(planned.runs) == 10 and "150, embedded_sentiment, seed 0" in planned.runs
    if name in ("figure3c", "figure3d", "figure1"):
        assert "benchmarks/family.sh" in planned.missing[0]
    if name == "figure1":
        assert [group.name for group in planned.groups] == ["prompt tuning", "model tuning"]
        assert planned.runs[0].startswith("prompt tuning, 8.7,")
    if name == "table3":
        assert len(planned.tasks) == 3 and "5 prompts at once" in planned.runs[0]


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("table9", Options(), "NAME is 'table9', expected one of figure1, figure3a"),
        ("figure3a", Options(backbones=["/no/such"]), "the backbone '/no/such' .* does not exist"),
        ("table1", Options(backbones=["embedded", "x"]), "table1 takes one --backbone, got"),
        ("figure3c", Options(family="/no/family"), "--family '/no/family' is not a folder"),
        *(
            (name, Options(bindings=[(macro, value)]), message)
            for name, macro, value, message in (
                ("table3", "SEEDS", "3", "SEEDS is 3, expected a list such as"),
                ("table3", "SEEDS", "[]", r"SEEDS is \[\], expected a list such as"),
                ("table3", "SEEDS", "[0]", r"SEEDS is \[0\], expected two or more: prompts vote"),
                ("table3", "SEEDS", "None", "SEEDS is None, expected two or more: prompts vote"),
                ("table3", "TASKS", "['squad']", "for each of its tasks, expected TASKS None"),
                ("table2", "TARGET_SPLIT", "valid", "no split 'valid'; it has train, validation"),
                ("figure4", "NOPE", "3", "--gin.NOPE: figure4 has no run to set it for"),
            )
        ),
    ],
)
def test_what_is_not_there_is_one_sentence(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        plan(name, dataclasses.replace(options, output_dir=tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["figure3a", "table1", "table2", "table3"])
def test_the_full_form_needs_data(name, tiny_folder, tmp_path):
    rows_at(tmp_path)
    with pytest.raises(ValueError, match="there is no folder") as error:
        plan(name, Options(backbones=[str(tiny_folder)], data=True))
    assert "\n" not in str(error.value)


def test_the_full_form_has_the_papers_settings(tiny_folder, tmp_path):
    rows_at(tmp_path, "super_glue/rte", "super_glue/wsc.fixed")
    options = Options(backbones=[str(tiny_folder)], data=True, output_dir=tmp_path)
    planned = plan("figure3a", options)
    assert not planned.reduced and planned.folder == tmp_path / "figure3a"
    # Two tasks, five lengths, three seeds; the other six are named with their reason.
    assert len(planned.runs) == 30 and len(planned.missing) == 6
    assert planned.missing[0].startswith("super_glue_boolq: the data folder")
    planned.groups[0].configure(str(tmp_path / "run"))
    settings = experiments.config.macros()
    assert settings["TRAIN_STEPS"] == 30000 and settings["LEARNING_RATE"] == 0.3
    assert settings["PROMPT_LENGTH"] == 150 and settings["LOSS"] == "tokens"
    assert settings["INITIAL_CHECKPOINT_PATH"] == str(tiny_folder)
    # WSC has no labels: the prompt starts from the words of the paper's footnote 7.
    assert settings["CLASS_LABELS"] == ["commonsense", "pronoun", "resolution"]
    # Initialisation from labels is no choice for it.
    assert any("super_glue_wsc" in text for text in plan("figure3b", options).missing)
    planned = plan("table3", options)
    planned.groups[0].configure(str(tmp_path / "run"))
    settings = experiments.config.macros()
    assert settings["TRAIN_STEPS"] == 30000 and settings["EVAL_MODE"] == "generate"
    assert list(planned.tasks) == ["super_glue_rte", "super_glue_wsc"]


def test_transfers_take_the_sets_at_hand(tiny_folder, tmp_path):
    rows_at(tmp_path, "squad", "mrqa/bioasq", "mrqa/subjqa_electronics", "glue/mrpc", "glue/qqp")
    options = Options(backbones=[str(tiny_folder)], data=True, output_dir=tmp_path)
    planned = plan("table1", options)
    assert planned.runs[0] == (
        "model tuning, squad, seed 0; evaluated on squad, mrqa_bioasq, mrqa_subjqa_electronics"
    )
    assert len(planned.runs) == 6 and len(planned.missing) == 5
    assert "mrqa_textbookqa" in planned.missing[0]
    with pytest.raises(ValueError, match="has no mrqa/race/validation.jsonl"):
        plan("table1", dataclasses.replace(options, bindings=[("TARGETS", "['mrqa_race']")]))
    assert len(plan("table2", options).runs) == 12
    reduced = plan("table2", Options(data=True, output_dir=tmp_path))
    assert len(reduced.runs) == 4 and not reduced.missing
    reduced.groups[0].configure(str(tmp_path / "run"))
    assert experiments.config.macros()["LOSS"] == "labels"


def test_points_of_a_family_without_their_backbone_are_named(tmp_path):
    (tmp_path / "embedded" / "pretrain" / "backbone").mkdir(parents=True)
    planned = plan("figure3c", Options(family=str(tmp_path), output_dir=tmp_path))
    assert len(planned.runs) == 4 and "span corruption + sentinel" in planned.runs[1]
    assert planned.missing[0].startswith("LM adaptation (pre-training): there is no backbone ")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="has none of the backbones"):
        plan("figure1", Options(family=str(tmp_path / "none")))


def test_the_stand_in_halves_are_the_whole(tmp_path):
    short, long = standins.by_length("sentiment", tmp_path)
    assert (short, long) == ("embedded_sentiment_short", "embedded_sentiment_long")
    for split in ("train", "validation"):
        halves = [
            [json.loads(x)["text"] for x in open(tmp_path / f"sentiment_{h}" / f"{split}.jsonl")]
            for h in ("short", "long")
        ]
        whole = records.read(records.EMBEDDED_FOLDER / "sentiment" / f"{split}.jsonl")
        assert sorted(sum(halves, [])) == sorted(row["text"] for row in whole)
        assert max(map(len, halves[0])) < min(map(len, halves[1]))


# --- what the paper prints ----------------------------------------------------------------------


def test_every_printed_figure_and_finding_has_its_source():
    for name, figures in published.FIGURES.items():
        assert len({figure.key for figure in figures}) == len(figures)
        for figure in figures:
            table = "table 4" if name == "figure4" else name.replace("table", "table ")
            assert figure.source == f"Lester et al. 2021, {table}"
    assert [len(published.FIGURES[name]) for name in ("table1", "table2", "table3")] == [14, 8, 36]
    for name in EXPERIMENTS:
        assert name in published.FIGURES or name in published.FINDINGS
        for statement, where in published.FINDINGS.get(name, ()):
            assert statement and any(word in where for word in ("section", "table", "figure"))


def test_the_printed_differences_of_table_1_are_those_of_its_figures():
    by_key = {figure.key: figure.value for figure in published.TABLE1}
    differences = [
        round(value - by_key[(*key[:3], "model tuning")], 1)
        for key, value in by_key.items()
        if key[3] == "prompt tuning"
    ]
    assert differences == [-0.1, 12.5, 1.2, 0.9, 0.4, -1.2, -1.8]


def test_our_counts_are_those_of_table_4_but_for_its_misprints():
    ours = compare.counts()
    differ = {figure.key for figure in published.TABLE4 if ours[figure.key].value != figure.value}
    assert differ == {figure.key for figure in published.TABLE4 if figure.note}
    assert ours["xxl", "50", "total"].value == 11_135_537_152


def test_the_ways_to_adapt_take_what_the_paper_says():
    from softprompt import t5_config

    for size in ("large", "xl", "xxl"):
        found = compare.per_task(t5_config.config(f"t5_1_1_{size}"), 100)
        share = {name: count / found["model tuning"] for name, count in found.items()}
        assert 0.001 < share["prefix tuning"] < 0.02
        assert share["prompt tuning"] < (0.0001 if size != "large" else 0.0002)


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Needs without measuring."""
    cost = lambda group: needs.Cost(group, 3 * 2**30, 0.5, 100)  # noqa: E731
    monkeypatch.setattr(needs, "of", cost)


def test_a_sweep_is_run_and_set_beside_what_the_paper_says(tmp_path, monkeypatch, capsys, quick):
    calls = []

    def stub(files, bindings):
        calls.append(dict(bindings))
        folder = tmp_path / "figure3a-reduced"
        rows = [
            "line,point,task,mean,standard_deviation,seeds",
            ",20,embedded_sentiment,71.50,0.00,1",
        ]
        (folder / "summary.csv").parent.mkdir(parents=True)
        (folder / "summary.csv").write_text("\n".join(rows) + "\n")
        return True

    monkeypatch.setattr(sweep, "sweep", stub)
    flags = ["reproduce", "figure3a", f"--output_dir={tmp_path}"]
    assert main([*flags, "--plan"]) == 0 and not calls
    said = capsys.readouterr().out
    assert "needs: 10 x prompt tuning, 3.0 GiB per device" in said.replace("3.00", "3.0")
    # 10 runs of 100 steps of half a second.
    assert "about 0.14 hours of training in all" in said
    assert main([*flags, "--gin.TRAIN_STEPS=7"]) == 0
    assert calls[0]["TRAIN_STEPS"] == "7" and calls[0]["SEEDS"] == "[0]"
    text = (tmp_path / "figure3a-reduced" / "reproduce.md").read_text()
    assert "- reduced: 7 steps in place of 30,000" in text
    assert "| 20, embedded_sentiment | - |  | 71.5 |" in text
    assert "Lester et al. 2021, section 3.2, figure 3a" in text
    assert "- not run: SuperGLUE: no data named" in text
    assert text in capsys.readouterr().out
    # What SIGTERM stopped leaves no comparison.
    monkeypatch.setattr(sweep, "sweep", lambda *a: False)
    assert not reproduce.run("figure3b", Options(output_dir=tmp_path))
    assert not (tmp_path / "figure3b-reduced" / "reproduce.md").exists()


def test_a_plan_counts_what_is_left_and_refuses_results_of_other_settings(tmp_path, capsys, quick):
    def plan_of(*more):
        return main(["reproduce", "figure3a", f"--output_dir={tmp_path}", "--plan", *more])

    options = Options(output_dir=tmp_path)
    planned = plan("figure3a", options)
    config.parse(planned.files, (), complete=False)
    config.parse(planned.files, planning.known(planned.bindings))
    run = list(sweep.runs(sweep.read(config.macros())))[3]
    planning.configure(run, planned.files, planned.bindings, [])
    result = {"score": 70.0, "figures": {"accuracy": 70.0}, "seconds": 1.0}
    result["configuration"] = planning.identity()
    run.folder.mkdir(parents=True)
    (run.folder / "result.json").write_text(json.dumps(result))
    assert plan_of() == 0
    said = capsys.readouterr().out
    assert said.count("\nrun: ") == 9 and f"\ndone: {run}\n" in said
    assert "10 results, 9 still to be made" in said and "needs: 9 x prompt tuning" in said
    assert plan_of("--gin.TRAIN_STEPS=7") == 2
    assert "was made by another configuration" in capsys.readouterr().err


def test_a_transfer_has_papers_and_ours_in_one_row(tmp_path, monkeypatch, tiny_folder, quick):
    rows_at(tmp_path, "squad", "mrqa/bioasq")

    def stub(files, bindings):
        (tmp_path / "table1").mkdir()
        (tmp_path / "table1" / "summary.csv").write_text(
            "source,target,figure,method,mean,standard_deviation,seeds\n"
            "squad,mrqa_bioasq,f1,prompt tuning,12.34,1.50,3\n"
            "squad,mrqa_bioasq,em,prompt tuning,5.00,0.00,1\n"
        )
        return True

    monkeypatch.setattr(transfer, "transfer", stub)
    options = Options(backbones=[str(tiny_folder)], data=True, output_dir=tmp_path)
    assert reproduce.run("table1", options)
    lines = (tmp_path / "table1" / "reproduce.md").read_text().splitlines()
    source = "Lester et al. 2021, table 1"
    assert (
        f"| squad, mrqa_bioasq, f1, prompt tuning | 79.1 ± 0.3 | {source} | 12.3 ± 1.5 |" in lines
    )
    assert f"| squad, mrqa_race, f1, model tuning | 59.8 ± 0.6 | {source} | not run |" in lines
    assert "| squad, mrqa_bioasq, em, prompt tuning | - |  | 5.0 |" in lines
    csv = (tmp_path / "table1" / "reproduce.csv").read_text()
    assert f'squad / mrqa_bioasq / f1 / prompt tuning,79.1,0.3,"{source}",12.34,1.5,3' in csv


def test_populations_train_and_vote_once(tmp_path, monkeypatch, quick):
    trained, voted = [], []

    def population(files, bindings):
        folder = pathlib.Path(dict(bindings)["POPULATION_DIR"].strip("'"))
        trained.append(folder)
        for seed in range(3):
            path = folder / f"seed{seed}" / "prompts" / "best.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch() if not path.exists() else None
        statuses = {f"seed{n}": "finished" if n < 3 else "diverged" for n in range(5)}
        rows = ["name,status", *map(",".join, statuses.items())]
        (folder / "population.csv").write_text("\n".join(rows) + "\n")
        return True

    def evaluate(name):
        def vote():
            macros = experiments.config.macros()
            folder = pathlib.Path(macros["EVAL_OUTPUT_DIR"])
            voted.append(macros)
            report = {"average": {"accuracy": 70.0, "illegal": 0.0}, "best": 1,
                      "prompts": [{"accuracy": 68.0}, {"accuracy": 72.0}],
                      "ensemble": {"accuracy": 73.0}}  # fmt: skip
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{macros['MIXTURE_OR_TASK_NAME']}.json").write_text(json.dumps(report))
            return {"accuracy": 73.0}

        return vote

    monkeypatch.setattr(members, "run", population)
    monkeypatch.setattr(config, "configured", lambda f: evaluate(f.__name__))
    options = Options(output_dir=tmp_path)
    assert reproduce.run("table3", options) and len(trained) == len(voted) == 3
    assert len(voted[0]["PROMPT_FILES"]) == 3 and voted[0]["EVAL_MODE"] == "rank"
    text = (tmp_path / "table3-reduced" / "reproduce.md").read_text()
    for column, value in (("average", "70.0"), ("best", "72.0"), ("ensemble", "73.0")):
        assert f"| embedded_sentiment, accuracy, {column} | - |  | {value} |" in text
    assert "| super_glue_boolq, accuracy, ensemble | 91.7 | Lester et al. 2021, table 3 |" in text
    # Again: the populations resume by themselves, and nothing is voted on twice.
    assert reproduce.run("table3", options) and len(trained) == 6 and len(voted) == 3
    more = dataclasses.replace(options, bindings=[("SEEDS", "[0, 1, 2, 3, 4, 5]")])
    assert all(plan("table3", options).done) and not any(plan("table3", more).done)
    one = tmp_path / "table3-reduced" / list(plan("table3", options).tasks)[1] / "ensemble"
    (one / "result.json").rename(one / "aside.json")
    assert plan("table3", options).done == [True, False, True]
    (one / "aside.json").rename(one / "result.json")
    # Of other prompts, though all of them are older than the vote, there is another one.
    for _ in range(2):
        assert reproduce.run("table3", dataclasses.replace(options, bindings=[("SEEDS", "[0, 2]")]))
        assert len(voted) == 6
    names = [pathlib.Path(path).parts[-3] for path in voted[3]["PROMPT_FILES"]]
    assert names == ["seed0", "seed2"]


def test_super_glue_has_a_mean_only_where_all_of_it_ran(tmp_path):
    tasks = list(experiments.SUPER_GLUE)
    for i, task in enumerate(tasks):
        figures = {"a": float(i), "b": float(i + 2)}
        report = {"average": figures, "best": 0, "prompts": [figures], "ensemble": figures}
        (tmp_path / task / "ensemble").mkdir(parents=True)
        (tmp_path / task / "ensemble" / f"{task}.json").write_text(json.dumps(report))
    found = compare.of_ensembles(tmp_path, tasks)
    assert found[published.SUPER_GLUE, "mean", "ensemble"].value == 4.5
    assert (published.SUPER_GLUE, "mean", "best") not in compare.of_ensembles(tmp_path, tasks[:7])


def test_the_command_lists_counts_and_refuses(tmp_path, capsys):
    assert main(["reproduce", "--list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in EXPERIMENTS)
    assert main(["reproduce", "figure4", f"--output_dir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "| xxl, 100, trainable | 409,600 | Lester et al. 2021, table 4 | 409,600 |" in said
    assert "as printed; 20 x 512 is 10,240" in said
    assert main(["reproduce", "table9"]) == 2
    assert "expected one of figure1, figure3a" in capsys.readouterr().err
    # What gin says of where an error arose is no part of the sentence.
    flags = [f"--output_dir={tmp_path}", "--plan", "--gin.TRAIN_STEPS=x"]
    assert main(["reproduce", "table3", *flags]) == 2
    assert capsys.readouterr().err == "softprompt: steps is 'x', expected a number of at least 1\n"


@pytest.mark.slow
def test_the_embedded_backbone_reproduces_a_figure_to_the_end(tmp_path, capsys):
    flags = ["reproduce", "figure3d", f"--output_dir={tmp_path}", "--gin.TRAIN_STEPS=2"]
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert "2 still to be made" in said and "needs: 2 x prompt tuning" in said
    results = list((tmp_path / "figure3d-reduced" / "runs").rglob("result.json"))
    figures = [json.loads(path.read_text())["figures"]["accuracy"] for path in results]
    text = (tmp_path / "figure3d-reduced" / "reproduce.md").read_text()
    assert len(figures) == 2 and all(f"{x:.1f} |" in text for x in figures)
    assert main(flags) == 0, "nothing runs again"
    said = capsys.readouterr().out
    assert "0 still to be made" in said and "needs:" not in said and "--- run" not in said
    assert provenance.versions()["jax"] in text


def test_a_torn_summary_is_refused_by_its_line(tmp_path):
    (tmp_path / "summary.csv").write_text("task,mean,standard_deviation,seeds\nrte,50.0,1.0\n")
    with pytest.raises(checkpoint.CorruptFile, match=r"summary.csv', line 2: expected the header"):
        compare.of_summary(tmp_path, ["task"])
