"""Tasks read as they do through seqio, which a run of ours does without."""

import subprocess
import sys

import numpy as np
import pytest
import seqio

from softprompt import data, offline_cache, settings
from softprompt.tasks import builtin, catalogue, registry, sources  # noqa: F401

EMBEDDED = [name for name in catalogue.tasks if name.startswith("embedded_")]


def same(ours, theirs):
    """Whether a record of a definition says what seqio's says, up to the order of tied pieces.

    Of segmentations with the same score, up to rounding, TensorFlow Text may take another one.
    """
    for name, value in ours.items():
        found = theirs[name]
        if isinstance(value, str):
            found = found.decode()
        elif isinstance(value, list):
            found = [x.decode() for x in found.tolist()]
        elif name in ("inputs", "targets"):
            value, found = np.sort(value), np.sort(found)
        np.testing.assert_array_equal(value, found, strict=isinstance(value, np.ndarray))
    return set(theirs) == set(ours)


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_tasks_read_the_same_through_seqio(name):
    check(name, "validation")


@pytest.mark.parametrize("path", ["bytes", None])
def test_a_vocabulary_is_bound_late(path):
    catalogue.use_vocabulary(path)
    try:
        check(EMBEDDED[0], "validation")
    finally:
        catalogue.use_vocabulary(None)


def check(name, split):
    definition, task = catalogue.tasks[name], seqio.get_mixture_or_task(name)
    assert catalogue.find(name) == [(definition, 1.0)] and data.get_tasks(name) == [(task, 1.0)]
    ours, theirs = (data._records(one, split, None) for one in (definition, task))
    assert len(ours) == len(theirs) > 0 and all(map(same, ours, theirs))
    tied = sum(
        a["inputs"].tolist() != b["inputs"].tolist() for a, b in zip(ours, theirs, strict=True)
    )
    assert tied <= 1 + len(ours) / 200
    assert list(task.splits) == list(definition.splits)
    assert task.predict_metric_fns == list(definition.predict_metric_fns)
    assert definition.metric_objs == definition.score_metric_fns == ()
    for record, other in zip(ours, theirs, strict=True):
        text = record["targets_pretokenized"]
        for is_target in (True, False):
            a = definition.postprocess_fn(text, example=record, is_target=is_target)
            assert a == task.postprocess_fn(text, example=other, is_target=is_target)


def test_benchmark_tasks_read_the_same_through_seqio(task_data):
    sources.use_data_dir(task_data)
    read = []
    try:
        for name in catalogue.tasks:
            spec = sources._specs.get(name)
            if spec is None or not (task_data / spec.folder / "validation.jsonl").is_file():
                continue
            if (task_data / spec.folder / "validation.jsonl").stat().st_size < 2_000_000:
                check(name, "validation")
                read.append(name)
    finally:
        sources.use_data_dir(None)
    assert {"super_glue_rte", "super_glue_wsc", "super_glue_cb_named"} <= set(read)


def test_mixtures_have_the_rates_that_seqio_has():
    for name in catalogue.mixtures:
        mixture = seqio.get_mixture_or_task(name)
        theirs = [(task.name, mixture.get_rate(task)) for task in mixture.tasks]
        assert theirs == [(task.name, rate) for task, rate in catalogue.find(name)]


def test_seqio_reads_a_definition_where_it_has_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(seqio.utils, "_GLOBAL_CACHE_DIRECTORIES", [str(tmp_path)])
    [(task, _)] = data.get_tasks(EMBEDDED[0])
    assert isinstance(task, seqio.Task) and offline_cache.folder_of(task, "validation") is None


def test_a_field_of_another_kind_is_named():
    rows = [{"inputs": "a", "targets": "b", "idx": value} for value in (1, "2", None)]
    found = catalogue.Definition(
        "odd", lambda split: iter(rows), ("train",), (), None, {"idx": catalogue.INT}
    )
    message = "odd, split 'train': the field 'idx' holds NoneType, str, expected a whole number"
    with pytest.raises(ValueError, match=message):
        found.examples("train")


def test_a_definition_replaces_one_of_its_name_also_in_seqio(tmp_path):
    from softprompt.tasks import user

    for text in ("first", "second"):
        (tmp_path / f"{text}.jsonl").write_text(f'{{"text": "{text}", "label": "x"}}\n')
        user.define_task("catalogue_mine", validation_file=tmp_path / f"{text}.jsonl")
        [(definition, _)] = catalogue.find("catalogue_mine")
        task = seqio.get_mixture_or_task("catalogue_mine")
        for found, expected in ((definition, text), (task, text.encode())):
            [record] = data._records(found, "validation", None)
            assert record["inputs_pretokenized"] == expected


def test_files_that_are_named_again_are_the_same_task(tmp_path):
    from softprompt.tasks import user

    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n')
    first = user.define_task("catalogue_again", path, labels=["x"])
    task = seqio.get_mixture_or_task("catalogue_again")
    assert user.define_task("catalogue_again", path, labels=["x"]) is first
    assert seqio.get_mixture_or_task("catalogue_again") is task
    assert user.define_task("catalogue_again", path, labels=["x", "y"]) is not first
    assert seqio.get_mixture_or_task("catalogue_again") is not task


def test_a_mixture_of_ones_own_reaches_seqio_and_keeps_its_name(tmp_path):
    from softprompt.tasks import user

    for rate in (1.0, 3.0):
        catalogue.add_mixture("catalogue_mixed", [(EMBEDDED[0], rate), (EMBEDDED[1], 1.0)])
        rates = {task.name: rate for task, rate in data.get_tasks("catalogue_mixed")}
        assert rates == {EMBEDDED[0]: rate, EMBEDDED[1]: 1.0}
    with pytest.raises(ValueError, match="'catalogue_mixed' is a mixture of tasks, expected anot"):
        user.define_task("catalogue_mixed", tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=f"'{EMBEDDED[0]}' is a task, expected another name"):
        catalogue.add_mixture(EMBEDDED[0], [(EMBEDDED[1], 1.0)])


TRAIN = """if True:
    import sys
    from softprompt.__main__ import main

    found = main(["train", "--gin_file=models/t5_1_1_embedded.gin",
        "--gin_file=runs/prompt_finetune.gin", *FLAGS, "--gin.TRAIN_STEPS=STEPS",
        "--gin.BATCH_SIZE=4", "--gin.EVAL_PERIOD=1"])
    print(found, "tensorflow" in sys.modules, "seqio" in sys.modules)
"""


def run(flags, steps, cwd):
    code = TRAIN.replace("*FLAGS", ", ".join(map(repr, flags))).replace("=STEPS", f"={steps}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.stdout.splitlines()[-1].startswith("0 "), done.stderr
    return done.stdout.splitlines()[-1].split()


def test_a_run_on_files_imports_no_tensorflow(tmp_path):
    rows = [f'{{"text": "n {i}", "label": {i % 2}}}\n' for i in range(8)]
    (tmp_path / "t.jsonl").write_text("".join(rows))
    lengths = "{'inputs': 16, 'targets': 4}"
    flags = ["--train_file=t.jsonl", "--validation_file=t.jsonl", "--labels=even,odd",
             "--gin.MODEL_DIR='m'", f"--gin.TASK_FEATURE_LENGTHS={lengths}"]  # fmt: skip
    assert run(flags, 1, tmp_path) == ["0", "False", "False"]
    # A module of one's own needs seqio; the run is the same one.
    mixture = 'seqio.MixtureRegistry.add("mixed", ["embedded_sentiment"], 1.0)'
    (tmp_path / "mine.py").write_text(f"import seqio\n{mixture}\n")
    modules = "['softprompt.tasks.registry', 'mine']"
    flags += [f"--gin.MIXTURE_OR_TASK_MODULE={modules}"]
    assert run(flags, 2, tmp_path) == ["0", "True", "True"]


def test_unknown_names_are_told_without_seqio():
    code = """if True:
        from softprompt import settings
        settings.load_tasks("super_glue_rt", settings.BUILTIN, None)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        "no seqio task or mixture is named 'super_glue_rt'; did you mean super_glue_rte"
        in done.stderr
    )
    assert settings.BUILTIN == "softprompt.tasks.registry"
    code = """if True:
        import sys
        from softprompt import settings
        try:
            settings.import_modules("no_such_package.tasks")
        finally:
            print("seqio" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MIXTURE_OR_TASK_MODULE 'no_such_package.tasks': No module named" in done.stderr
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    "text, message",
    [("def f(:\n", "SyntaxError: invalid syntax"), ("1 / 0\n", "ZeroDivisionError: division")],
)
def test_a_module_of_tasks_that_cannot_be_imported_is_named(tmp_path, monkeypatch, text, message):
    name = f"tasks_{len(text)}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"MIXTURE_OR_TASK_MODULE '{name}': {message}"):
        settings.import_modules(name)


def test_a_source_that_is_not_there_is_one_sentence(vocabulary):
    import seqio

    from softprompt.tasks.features import FEATURES

    seqio.TaskRegistry.add(
        "absent_lines",
        source=seqio.TextLineDataSource({"train": "/nowhere/lines.tsv"}),
        preprocessors=[
            lambda dataset: dataset.map(lambda x: {"inputs": x, "targets": x}),
            seqio.preprocessors.tokenize,
        ],
        output_features=FEATURES,
    )
    [(task, _)] = data.get_tasks("absent_lines")
    with pytest.raises(ValueError, match=r"task absent_lines, split 'train': .*/nowhere/lines.tsv"):
        data.from_task(task, "train", {"inputs": 8, "targets": 8})
