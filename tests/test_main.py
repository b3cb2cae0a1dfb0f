"""The command line end to end, the Python API, and the README's example."""

import contextlib
import importlib
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest

import softprompt
from softprompt import (
    banks,
    checkpoint,
    data,
    evaluation,
    members,
    prompt,
    quickstart,
    reproduce,
    sweep,
    train_step,
    transfer,
    tree,
)
from softprompt.__main__ import main, split_gin
from softprompt.importing import _without
from softprompt.tasks import catalogue
from softprompt.vocabulary import EMBEDDED

ROOT = pathlib.Path(__file__).parent.parent
MODEL = "--gin_file=models/t5_1_1_embedded.gin"


def train(folder, *flags):
    return main(
        [
            "train",
            MODEL,
            "--gin_file=runs/prompt_finetune.gin",
            f"--gin.MODEL_DIR={folder}",
            "--gin.PROMPT_LENGTH=4",
            "--gin.TRAIN_STEPS=3",
            "--gin.BATCH_SIZE=4",
            "--gin.EVAL_MODE=rank",
            *flags,
        ]
    )


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    words = ["fine", "dull", "warm", "grim"]
    lines = [{"body": f"a {w} film", "mark": i % 2} for i, w in enumerate(words)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_data_set_of_ones_own_goes_through_flags_alone(tmp_path, rows, capsys):
    flags = [f"--train_file={rows}", f"--validation_file={rows}", "--labels=good,bad"]
    flags += ["--template=review: {body}", "--target=mark"]
    folder = tmp_path / "run"
    assert train(folder, *flags) == 0
    said = capsys.readouterr().out
    before, after = re.search("fingerprint before (.*), after (.*)", said).groups()
    assert before == after == softprompt.load_backbone().fingerprint
    best = folder / "prompts" / "best.safetensors"
    prompt = softprompt.load_prompt(best)
    assert prompt.array.shape == (4, 256) and prompt.metadata["task"] == "user_task"
    facts = json.loads((folder / "run.json").read_text())
    assert facts["backbone_fingerprint"] == before and facts["versions"]["jax"]
    assert len((folder / "train.jsonl").read_text().splitlines()) == 1
    predictions = folder / "eval" / "predictions" / "user_task-3.jsonl"
    first = json.loads(predictions.read_text().splitlines()[0])
    assert first["input"] == "review: a fine film" and set(first["scores"]) == {"good", "bad"}

    shared = [MODEL, f"--gin.PROMPT_FILE={best}", "--labels=good,bad", "--template=review: {body}"]
    run = ["eval", "--gin_file=runs/prompt_eval.gin", *shared, f"--validation_file={rows}"]
    assert main([run[0], *shared[:1], *run[1:2], *shared[1:], *run[-1:], "--target=mark",
                 "--gin.EVAL_MODE=rank"]) == 0  # fmt: skip
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["split"] == "validation" and 0 <= figures["accuracy"] <= 100

    out = tmp_path / "out.jsonl"
    infer = ["infer", shared[0], "--gin_file=runs/prompt_infer.gin", *shared[1:]]
    assert main([*infer, f"--gin.INPUT_FILE={rows}", f"--gin.OUTPUT_FILE={out}"]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["body"] for r in found] == [
        "a fine film",
        "a dull film",
        "a warm film",
        "a grim film",
    ]
    assert all(r["prediction"] in ("good", "bad") for r in found)


def test_a_run_goes_on_with_its_own_settings_and_data_alone(tmp_path, rows, capsys):
    flags = [f"--train_file={rows}", f"--validation_file={rows}", "--labels=good,bad"]
    flags += ["--template={body}", "--target=mark"]
    folder = tmp_path / "run"
    assert train(folder, *flags) == 0
    kept = (folder / "run.json").read_bytes(), (folder / "config.gin").read_bytes()
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text().replace("grim", "sunny"))
    for changed, message in (
        ([*flags, "--gin.LEARNING_RATE=0.1"], "bindings: constant.value was 0.3, is"),
        ([*flags, "--gin.SEED=1"], "seed was 0, is now 1"),
        ([*flags, "--gin.TRAIN_STEPS=2"], "is at step 3 already, TRAIN_STEPS is 2"),
        ([f"--train_file={other}", *flags[1:]], "examples was "),
        ([*flags, "--gin.EVAL_SPLIT=valid"], "EVAL_SPLIT is 'valid': user_task has train, valid"),
        ([*flags, "--gin.EVAL_SPLIT=train"], "eval_split was 'validation', is now 'train'"),
        ([*flags, "--gin.EVAL_MODE=generate"], "eval_mode was 'rank', is now 'generate'"),
        ([*flags, "--gin.FROZEN=['.*', 'x']"], "frozen was ['.*'], is now ['.*', 'x']"),
        ([*flags, f"--validation_file={other}"], "held_out was "),
    ):
        capsys.readouterr()
        assert train(folder, *changed) == 2
        assert message in capsys.readouterr().err
    # What is refused leaves the run as it was.
    assert ((folder / "run.json").read_bytes(), (folder / "config.gin").read_bytes()) == kept
    assert train(folder, *flags, "--gin.TRAIN_STEPS=4") == 0
    assert "resuming from step 3" in capsys.readouterr().out


def test_a_run_and_its_prompt_name_the_prompt_they_started_from(tmp_path, rows):
    flags = [f"--train_file={rows}", f"--validation_file={rows}", "--labels=good,bad"]
    flags += ["--template={body}", "--target=mark"]
    assert train(tmp_path / "first", *flags) == 0
    start = tmp_path / "first" / "prompts" / "best.safetensors"
    flags += ["--gin_file=prompts/from_file.gin", f"--gin.PROMPT_FILE={start}"]
    second = tmp_path / "second"
    assert train(second, *flags) == 0
    assert json.loads((second / "run.json").read_text())["initialised_from"] == str(start)
    assert prompt.load(second / "prompts" / "best.safetensors")[1]["initialised_from"] == str(start)


def test_predictions_go_on_where_they_stopped_but_not_with_other_settings(
    tmp_path, rows, capsys, monkeypatch
):
    infer = ["infer", MODEL, "--gin_file=runs/prompt_infer.gin", "--labels=good,bad"]
    infer += ["--template=review: {body}", f"--gin.INPUT_FILE={rows}", "--gin.PROMPT_FILE=None"]
    out, again = tmp_path / "out.jsonl", [*infer, f"--gin.OUTPUT_FILE={tmp_path}/again.jsonl"]
    assert main([*infer, f"--gin.OUTPUT_FILE={out}"]) == 0
    whole, predict = out.read_bytes(), evaluation.Predictor.predict_mixed

    def stop_at_the_third(self, flat, examples, which, labels, first):
        if len(list(tmp_path.glob("*.partial"))[0].read_bytes()):
            raise KeyboardInterrupt
        return predict(self, flat, examples, which, labels, first)

    monkeypatch.setattr("softprompt.infer.CHUNK", 2)
    monkeypatch.setattr(evaluation.Predictor, "predict_mixed", stop_at_the_third)
    with contextlib.suppress(KeyboardInterrupt):
        main(again)
    monkeypatch.setattr(evaluation.Predictor, "predict_mixed", predict)
    # And in the middle of the line after those.
    with open(tmp_path / "again.jsonl.partial", "ab") as file:
        file.write(b'{"body":')
    assert main([*again, "--gin.SEED=1"]) == 2
    said = capsys.readouterr().err
    assert "holds 2 predictions of another run: seed was 0, is now 1" in said
    assert main(again) == 0
    assert (tmp_path / "again.jsonl").read_bytes() == whole
    assert not list(tmp_path.glob("again.jsonl.*"))


@pytest.mark.parametrize(
    "pattern, tuned", [("prompt/.*|decoder/logits_dense/.*", True), ("prompt.*", False)]
)
def test_a_backbone_is_kept_if_and_only_if_some_of_it_trained(
    tmp_path, rows, tiny_folder, pattern, tuned
):
    flags = [f"--train_file={rows}", "--labels=good,bad", "--template={body}", "--target=mark"]
    flags += ["--gin.ARCHITECTURE=None", f"--gin.INITIAL_CHECKPOINT_PATH={tiny_folder}"]
    flags += [f"--gin.TRAINABLE=['{pattern}']", "--gin.TARGET_SENTINEL=True"]
    assert train(tmp_path / "run", *flags) == 0
    assert (tmp_path / "run" / "backbone").exists() == tuned
    if tuned:
        before, after = (
            softprompt.load_backbone(path) for path in (tiny_folder, tmp_path / "run" / "backbone")
        )
        assert banks.target_prefix(after, [(None, None)]) == (after.vocabulary.sentinel(0),)
        assert not banks.target_prefix(before, [(None, None)])
        moved = [k for k, x in after.params.items() if not np.array_equal(x, before.params[k])]
        assert moved == ["decoder/logits_dense/kernel"]


def test_packed_batches_stay_what_they_were(tmp_path, rows, tiny_folder, capsys):
    flags = [f"--train_file={rows}", "--labels=good,bad", "--template={body}", "--target=mark"]
    flags += ["--gin.ARCHITECTURE=None", f"--gin.INITIAL_CHECKPOINT_PATH={tiny_folder}"]
    flags += ["--gin.PACK_LENGTH=16", "--gin.BATCH_SIZE=3"]
    assert train(tmp_path / "run", *flags, "--gin.TRAIN_STEPS=1") == 0
    assert train(tmp_path / "run", *flags, "--gin.MICROBATCHES=3") == 2
    assert "packed_rows was " in capsys.readouterr().err


def test_what_a_prompt_is_chosen_by_and_the_type_beside_int8_stay_what_they_were(
    tmp_path, rows, tiny_folder, capsys
):
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.ones((4, 24), np.float32))
    flags = [f"--train_file={rows}", "--labels=good,bad", "--template={body}", "--target=mark"]
    flags += ["--gin.ARCHITECTURE=None", f"--gin.INITIAL_CHECKPOINT_PATH={tiny_folder}"]
    flags += ["--gin_file=prompts/from_most_similar.gin", f"--gin.PROMPT_FILES={tmp_path}/a.npy"]
    flags += ["--gin.TRAIN_STEPS=1", "--gin.WEIGHTS=int8", f"--gin.TRIAL_PROMPT={tmp_path}/a.npy"]
    assert train(tmp_path / "run", *flags) == 0
    for changed, message in (
        (f"TRIAL_PROMPT={tmp_path}/b.npy", "b.npy"),
        ("DTYPE=bfloat16", "dtype was 'float32', is now 'bfloat16'"),
    ):
        capsys.readouterr()
        assert train(tmp_path / "run", *flags, f"--gin.{changed}") == 2
        assert message in capsys.readouterr().err


def test_a_batch_that_is_rounded_up_is_told_of(tmp_path, rows, tiny_folder, capsys, monkeypatch):
    monkeypatch.setattr("softprompt.train_step.rows_for", lambda *_: 8)
    flags = [f"--train_file={rows}", "--labels=good,bad", "--template={body}", "--target=mark"]
    flags += ["--gin.ARCHITECTURE=None", f"--gin.INITIAL_CHECKPOINT_PATH={tiny_folder}"]
    assert train(tmp_path / "run", *flags, "--gin.TRAIN_STEPS=1") == 0
    assert "BATCH_SIZE 4 is rounded up to 8 rows" in capsys.readouterr().out


def test_packed_rows_of_a_length_that_was_found_train_by_the_loss_among_labels(
    tmp_path, rows, capsys
):
    flags = [f"--train_file={rows}", "--labels=good,bad", "--template={body}", "--target=mark"]
    flags += ["--gin.PACK_LENGTH='auto'", "--gin.LOSS='labels'"]
    assert train(tmp_path / "run", *flags) == 0
    said = capsys.readouterr().out
    length, share = map(int, re.search(r"packing: \d+ rows of (\d+), (\d+)% full", said).groups())
    assert 8 <= length <= 64 and share > 50


@pytest.mark.slow
def test_pretraining_goes_on_with_its_own_text_alone(tmp_path, capsys):
    def pretrain(steps):
        flags = ["models/t5_1_1_nano.gin", "runs/pretrain.gin"]
        flags = [f"--gin_file={file}" for file in flags]
        settings = {
            "MODEL_DIR": tmp_path / "run", "CORPUS": tmp_path / "text", "BATCH_SIZE": 2,
            "VOCABULARY_FILE": EMBEDDED, "TRAIN_STEPS": steps, "WARMUP_STEPS": 8,
            "EVAL_EXAMPLES": 2, "TASK_FEATURE_LENGTHS": {"inputs": 16, "targets": 8},
        }  # fmt: skip
        return main(["train", *flags, *(f"--gin.{k}={v}" for k, v in settings.items())])

    (tmp_path / "text").mkdir()
    rows = [json.dumps({"text": f"Line {i} of a text that is long enough."}) for i in range(90)]
    for split in ("train", "validation"):
        (tmp_path / "text" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    assert pretrain(1) == 0
    assert "step 1/1" in capsys.readouterr().out
    (tmp_path / "text" / "train-2.jsonl").write_text(rows[0] + "\n")
    assert pretrain(2) == 2
    said = capsys.readouterr().err
    assert "holds another run" in said and "shards: train-2.jsonl was None, is now" in said


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--gin.NO_SUCH=3"], "no gin file given knows the name 'NO_SUCH'"),
        ([], "required gin macros have no value: MIXTURE_OR_TASK_NAME"),
        (["--gin.MIXTURE_OR_TASK_NAME=glue_sst"], "did you mean glue_sst2"),
        (
            ["--gin.MIXTURE_OR_TASK_NAME=embedded_sentiment", "--gin.INITIAL_CHECKPOINT_PATH=/no"],
            "the backbone '/no' (INITIAL_CHECKPOINT_PATH) does not exist",
        ),
        (["--train_file=/no/rows.jsonl"], "no such file: '/no/rows.jsonl'"),
        (["--cpu_devices=0"], "--cpu_devices is 0, expected at least 1"),
        (
            ["--gin.MIXTURE_OR_TASK_NAME=embedded_sentiment", "--gin.TRAINABLE=('x',)"],
            "the trainable pattern 'x' matches no parameter",
        ),
        *(
            (["--gin.MIXTURE_OR_TASK_NAME=embedded_sentiment", f"--gin.{setting}"], message)
            for setting, message in (
                ("BATCH_SIZE=0", "BATCH_SIZE is 0, expected an integer of at least 1"),
                ("TRAIN_STEPS=abc", "TRAIN_STEPS is 'abc', expected an integer"),
                ("PROMPT_LENGTH=-1", "PROMPT_LENGTH is -1, expected"),
                ("DTYPE=float31", "DTYPE is 'float31', expected 'float32'"),
                ("BEST_METRIC=f1", "BEST_METRIC 'f1' is not among the figures accuracy"),
                ("MODEL_PARTITIONS=3", "a mesh of "),
                ("TASK_FEATURE_LENGTHS={'inputs': 8}", "TASK_FEATURE_LENGTHS is {'inputs': 8}"),
                (f"MODEL_DIR={__file__}/run", "cannot write"),
                ("MODEL_DIR=2024", "MODEL_DIR is 2024, expected a path"),
                ("LEARNING_RATE=nan", "LEARNING_RATE is 'nan', expected a number"),
                ("SEED=abc", "SEED is 'abc', expected an integer"),
                ("DROPOUT_RATE=1.5", "DROPOUT_RATE is 1.5, expected a number of at least 0 and le"),
                ("DROPOUT_RATE=-1", "DROPOUT_RATE is -1, expected"),
                ("Z_LOSS=much", "Z_LOSS is 'much', expected a number of at least 0"),
                ("LABEL_SMOOTHING=1", "LABEL_SMOOTHING is 1, expected"),
                ("INITIAL_CHECKPOINT_PATH=3", "INITIAL_CHECKPOINT_PATH is 3, expected a path"),
                ("VOCABULARY_FILE=[]", "VOCABULARY_FILE is [], expected a path"),
                ("MIXTURE_OR_TASK_NAME=[1]", "MIXTURE_OR_TASK_NAME is [1], expected the name"),
                ("MIXTURE_OR_TASK_MODULE=True", "MIXTURE_OR_TASK_MODULE is True, expected"),
                ("MIXTURE_OR_TASK_MODULE=[1]", "MIXTURE_OR_TASK_MODULE is [1], expected"),
                ("PROMPT_INIT=prompt.text", "PROMPT_INIT is 'prompt.text', expected a function, w"),
                ("TRAINABLE=prompt/.*", "TRAINABLE is 'prompt/.*', expected a list of regular"),
                ("FROZEN=None", "FROZEN is None, expected a list of regular"),
                ("ARCHITECTURE=[]", "unknown T5 size []; choose one of"),
                ("DATA_PARTITIONS={}", "DATA_PARTITIONS is {}, expected a number of devices or"),
                ("TRAINABLE=()", "TRAINABLE is (), expected one pattern or more"),
                ("TARGET_SENTINEL=false", "TARGET_SENTINEL is 'false', expected True or False"),
                ("PATIENCE=2", "PATIENCE is 2, but nothing is evaluated before the end: EVAL_P"),
                ("launch.train.stream=True", "PROMPT_LENGTH is 4, expected 0: text that is str"),
                ("launch.train.backbone_steps=25", "BACKBONE_STEPS is 25, expected a list of"),
                ("launch.train.backbone_dtype=fp32", "STORE_AS is 'fp32', expected one of 'fl"),
                ("launch.train.eval_examples=0", "EVAL_EXAMPLES is 0, expected an integer of"),
                ("launch.train.optimizer=@optim.adafactor()", "expected a function, without '()'"),
            )
        ),
        *(
            (["--gin.MIXTURE_OR_TASK_NAME=embedded_sentiment", *settings], message)
            for settings, message in (
                (
                    ["--gin.LOSS=labels", "--gin.Z_LOSS=0.1"],
                    "Z_LOSS is 0.1 and LABEL_SMOOTHING is 0.0, expected 0 for LOSS 'labels'",
                ),
                (
                    ["--gin.EVAL_PERIOD=2", "--gin.launch.train.backbone_steps=[2, 4]"],
                    "BACKBONE_STEPS [4] are no steps from 1 to TRAIN_STEPS 3",
                ),
            )
        ),
        *(
            (["--gin_file=prompts/from_class_labels.gin", "--train_file=/no", setting], message)
            for setting, message in (
                ("--gin.CLASS_LABELS=good", "CLASS_LABELS is 'good', expected a list such as"),
                ("--gin.CLASS_LABELS=[1]", "CLASS_LABELS is [1], expected a list of texts or None"),
                ("--gin.LABELS=3", "LABELS is 3, expected a list of texts"),
                ("--gin.LABELS=a,b", "LABELS is 'a,b', expected a list such as ['a', 'b']"),
            )
        ),
    ],
)
def test_bad_input_is_one_sentence_and_a_failure(tmp_path, capsys, flags, message):
    assert train(tmp_path / "run", *flags) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_empty_variable_names_no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "SOFTPROMPT_CACHE_DIR"):
        monkeypatch.setenv(name, "")
    assert checkpoint.cache_folder() == tmp_path / ".cache" / "softprompt"


def test_a_flag_is_named_as_it_was_given(tmp_path, capsys):
    assert train(tmp_path / "run", "--ignore_fingerprint") == 2
    assert "softprompt: --ignore_fingerprint: no gin file given knows" in capsys.readouterr().err


def test_gin_flags_are_told_from_the_others():
    rest, bindings = split_gin(["train", "--gin.A=1=2", "--x", "--gin.B", "3"])
    assert rest == ["train", "--x"] and bindings == [("A", "1=2"), ("B", "3")]


def test_inspect_prints_what_files_say_of_themselves(capsys):
    assert main(["inspect", "embedded"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["metadata"]["trained_from"] and "## Data and licences" in said["model_card"]


def test_what_sigterm_stopped_exits_as_a_shell_has_it(tmp_path, monkeypatch, capsys):
    real = train_step.jit_step

    def jit_step(step):
        def stopped(*arguments):
            signal.raise_signal(signal.SIGTERM)
            return real(step)(*arguments)

        return stopped

    flags = ["--gin.MIXTURE_OR_TASK_NAME=embedded_sentiment", "--gin.EVAL_SPLIT=none"]
    with monkeypatch.context() as patch:
        patch.setattr(train_step, "jit_step", jit_step)
        assert train(tmp_path / "run", *flags) == 143
    assert "stopped by a signal after step 1" in capsys.readouterr().out
    assert train(tmp_path / "run", *flags) == 0
    for module, name, command in (
        (sweep, "sweep", ["sweep"]), (transfer, "transfer", ["transfer"]),
        (members, "run", ["population"]), (reproduce, "run", ["reproduce", "figure4"]),
        (quickstart, "run", ["quickstart"]),
    ):  # fmt: skip
        for done, code in ((True, 0), (False, 143)):
            monkeypatch.setattr(module, name, lambda *_, done=done, **__: done)
            assert main(command) == code


def test_the_quickstart_runs_to_its_end(tmp_path, capsys):
    folder = tmp_path / "a b"
    assert main(["quickstart", f"--output_dir={folder}", "--steps=2"]) == 0
    said = capsys.readouterr().out
    assert f"--gin.MODEL_DIR={folder}/gin" in shlex.split(said.splitlines()[-1])
    for part in ("without a prompt", "step 2/2", "with the tuned prompt", "bytes", "next"):
        assert part in said


def test_importing_softprompt_takes_neither_tensorflow_nor_gin():
    code = (
        "import sys, softprompt; softprompt.embedded_data('sentiment');"
        "print([m for m in ('tensorflow', 'seqio', 'gin', 'torch') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_starting_up_writes_nothing_that_is_not_ours(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "softprompt", "train", MODEL, "--gin_file=runs/prompt_finetune.gin",
         "--gin.MIXTURE_OR_TASK_NAME=embedded_sentiment", f"--gin.MODEL_DIR={tmp_path}",
         "--gin.TRAIN_STEPS=1", "--gin.PROMPT_LENGTH=2", "--gin.EVAL_SPLIT=none"],
        capture_output=True, text=True, cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith("TF_")},
    )  # fmt: skip
    assert run.returncode == 0 and run.stderr == ""


def test_freed_memory_stays_with_the_process_and_comes_into_huge_pages():
    code = """if True:
        import ctypes, json, mmap, numpy as np, re, time
        from softprompt.heap import keep

        def heap():
            found = open("/proc/self/smaps").read()
            parts = re.findall("heap.*?VmFlags", found, re.DOTALL)
            return [sum(int(re.search(f"{name}: *([0-9]+)", part)[1]) for part in parts)
                    for name in ("Rss", "AnonHugePages")]

        huge = mmap.mmap(-1, 2**23, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        huge.write(bytes(2**23))
        at = ctypes.addressof(ctypes.c_char.from_buffer(huge))
        able = ctypes.CDLL(None).madvise(ctypes.c_void_p(-(-at // 2**21) * 2**21), 2**21, 25) == 0
        keep(huge_after=1)
        blocks = [np.ones(2**17) for _ in range(256)]  # 256 MiB
        before = heap()
        del blocks
        ends = time.monotonic() + 30
        while able and heap()[1] < 2**17 and time.monotonic() < ends:
            time.sleep(0.1)
        print(json.dumps([able, before, heap()]))
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    able, (used, _), (kept, huge) = json.loads(run.stdout)
    assert kept >= used > 2**18
    if not able:
        pytest.skip("this kernel puts nothing into huge pages on demand")
    assert huge > 2**17


@pytest.mark.slow
def test_a_cpu_is_split_into_devices_that_share_a_batch(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "softprompt", "train", MODEL, "--gin_file=runs/prompt_finetune.gin",
         "--gin.MIXTURE_OR_TASK_NAME=embedded_sentiment", f"--gin.MODEL_DIR={tmp_path}",
         "--gin.TRAIN_STEPS=1", "--gin.PROMPT_LENGTH=2", "--gin.EVAL_SPLIT=none",
         "--cpu_devices=2"],
        capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    )  # fmt: skip
    assert run.returncode == 0 and "mesh {'data': 2, 'model': 1}" in run.stdout, run.stderr


# --- Python -------------------------------------------------------------------------------------


def test_the_readme_example_runs(tmp_path, monkeypatch, capsys):
    _, code = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(code.strip().splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("train_steps=200", "train_steps=2"), "README.md", "exec"), {})
    assert list(tmp_path.glob("*.safetensors"))
    assert capsys.readouterr().out


def test_the_readmes_own_task_is_read(tmp_path, vocabulary, monkeypatch):
    code, _ = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    for name in ("train.tsv", "dev.tsv"):
        pathlib.Path(name).write_text("a fine film\tgood\na dull one\tbad\n")
    catalogue.use_vocabulary(vocabulary.path)
    exec(compile(code, "my_tasks.py", "exec"), {})
    task = importlib.import_module("seqio").get_mixture_or_task("my_reviews")
    lengths = {"inputs": 8, "targets": 8}
    found = data.from_task(task, "train", lengths)
    expected = data.from_pairs(
        [("a fine film", "good"), ("a dull one", "bad")], vocabulary, lengths
    )
    assert [x.tolist() for x in found.inputs] == [x.tolist() for x in expected.inputs]
    assert task.metric_fns[0](["good", "bad"], ["good", "good"]) == {"accuracy": 50.0}


def test_generation_scores_and_classes_agree(tiny):
    texts, labels = ["a fine film", "a dull day"], ["positive", "negative"]
    prompt = np.random.default_rng(0).normal(size=(3, tiny.cfg.emb_dim)).astype(np.float32)
    scores = softprompt.score_labels(tiny, texts, labels, prompt)
    assert scores.shape == (2, 2) and (scores < 0).all()
    expected = [labels[i] for i in scores.argmax(1)]
    assert softprompt.classify(tiny, texts, labels, prompt) == expected
    assert len(softprompt.generate(tiny, texts, prompt, max_tokens=3)) == 2
    before = tree.fingerprint(tiny.params)
    assert before == tiny.fingerprint


def test_wrong_calls_are_sentences(tiny, pairs):
    with pytest.raises(ValueError, match="expected a list of texts, got one string"):
        softprompt.generate(tiny, "a film")
    with pytest.raises(ValueError, match="choose sentiment, question_type, entailment"):
        softprompt.embedded_data("poems")
    with pytest.raises(ValueError, match="'negative' is not among the labels"):
        softprompt.tune(tiny, pairs, labels=["positive"], train_steps=1)
    with pytest.raises(ValueError, match="train_steps is 0, expected an integer of at least 1"):
        softprompt.tune(tiny, pairs, train_steps=0)
    with pytest.raises(ValueError, match="prompt is the path 'x': give load_prompt of it"):
        softprompt.generate(tiny, ["a film"], "x")
    with pytest.raises(ValueError, match=r"prompt has shape \(2, 3\), expected \(P, 24\)"):
        softprompt.generate(tiny, ["a film"], np.ones((2, 3)))
    with pytest.raises(ValueError, match="expected for an ensemble a list of one or more"):
        softprompt.ensemble(tiny, ["a film"], [])
    with pytest.raises(ValueError, match="got no texts"):
        softprompt.generate(tiny, [], [])


def test_tuning_goes_on_with_its_own_data_and_rate_alone(tiny, pairs, tmp_path):
    settings = dict(prompt_length=2, batch_size=4, model_dir=tmp_path)
    softprompt.tune(tiny, pairs, train_steps=2, **settings)
    with pytest.raises(ValueError, match="held_out was None, is now "):
        softprompt.tune(tiny, pairs, pairs[:4], train_steps=3, **settings)
    with pytest.raises(ValueError, match="examples was "):
        softprompt.tune(tiny, pairs[:8], train_steps=3, **settings)
    with pytest.raises(ValueError, match="learning_rate was "):
        softprompt.tune(tiny, pairs, train_steps=3, learning_rate=0.1, **settings)
    assert softprompt.tune(tiny, pairs, train_steps=3, **settings).metadata["step"] == 3


def test_text_commands_name_what_is_wrong(tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    words = ["vocabulary", f"--output={tmp_path / 'new' / 'v.model'}"]
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "a b c"}\n')
    for flags, message in (
        ([*words, str(tmp_path / "no.jsonl")], "no.jsonl': No such file"),
        ([*words, str(empty)], "hold no text to train a vocabulary on"),
        ([*words, str(few), "--size=9000"], "no vocabulary of 9000 pieces from this text"),
    ):
        assert main(flags) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert message in said[-1], said


def test_a_sentinel_before_targets_is_remembered_by_the_prompt(tmp_path, rows, capsys):
    flags = [f"--train_file={rows}", f"--validation_file={rows}", "--labels=good,bad"]
    flags += ["--template=review: {body}", "--target=mark"]
    folder, output = tmp_path / "run", tmp_path / "eval"
    assert train(folder, *flags, "--gin.TARGET_SENTINEL=True") == 0
    best = folder / "prompts" / "best.safetensors"
    assert softprompt.load_prompt(best).metadata["target_sentinel"] is True
    assert (
        main(
            [
                "eval",
                MODEL,
                "--gin_file=runs/prompt_eval.gin",
                f"--gin.PROMPT_FILE={best}",
                f"--gin.EVAL_OUTPUT_DIR={output}",
                "--gin.EVAL_MODE=rank",
                *flags,
            ]
        )
        == 0
    )
    # The scores are those of labels behind the sentinel, as the training run's own evaluation had.
    again = (output / "predictions" / "user_task.jsonl").read_text()
    first = (folder / "eval" / "predictions" / "user_task-3.jsonl").read_text()
    scores = [[json.loads(x)["scores"] for x in text.splitlines()] for text in (again, first)]
    np.testing.assert_allclose(*([list(s.values()) for s in found] for found in scores), atol=1e-4)


def test_a_package_is_hidden_from_an_import_alone(tmp_path, monkeypatch):
    (tmp_path / "some_extra.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with _without("some_extra", "json"):
        with pytest.raises(ImportError):
            importlib.import_module("some_extra")
        assert importlib.import_module("json") is json
    assert importlib.import_module("some_extra").__name__ == "some_extra"


def test_imports_are_not_searched_for_garbage_but_later_objects_are():
    code = """if True:
        import gc
        from softprompt.importing import import_seqio

        passes = []
        gc.callbacks.append(lambda phase, info: passes.append(phase))
        import_seqio()
        during, frozen = len(passes), gc.get_freeze_count()
        gc.collect()
        import_seqio()
        print(during, frozen > 100_000, len(passes), gc.isenabled(), gc.get_freeze_count() - frozen)
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["0", "True", "2", "True", "0"]
