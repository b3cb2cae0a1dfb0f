"""`--dry_run`: what it reads of settings and sizes, refuses, suggests and says."""

import pytest
from test_memory import tiny_run

from softprompt import dry_run, memory, optim, partition
from softprompt.__main__ import main


def fake(run):
    """A need of 100 for weights and 10 for each row of a part, less with rematerialisation."""
    each = {"none": 10, "minimal": 6, "full": 2}[run.cfg.remat]
    weights = 25 if run.weights == "int8" else 100
    return memory.Need(weights, 0, 0, 0, each * run.rows // run.microbatches)


@pytest.mark.parametrize(
    "limit, expected",
    [(420, [(32, 1, "none", None)]), (180, [(8, 1, "none", None)]),
     (179, [(8, 2, "none", None), (8, 1, "minimal", None)]),
     (109, [(8, 8, "minimal", None), (8, 2, "full", None)]),
     (60, [(8, 4, "none", "int8"), (8, 2, "minimal", "int8"), (8, 1, "full", "int8")]),
     (20, [])],
)  # fmt: skip
def test_suggestions_fit(limit, expected):
    run = tiny_run()
    found = dry_run.suggest(run, fake(run), limit, fake)
    assert all(needed.peak <= limit for _, needed in found)
    assert [(r.rows, r.microbatches, r.cfg.remat, r.weights) for r, _ in found] == expected


def test_parts_of_packed_rows_divide_the_batch():
    run = tiny_run(packed=True, rows=33, batch_size=32)
    found = dry_run.suggest(run, fake(run), 280, fake)
    assert [(r.batch_size, r.rows, r.microbatches) for r, _ in found[:1]] == [(32, 34, 2)]
    assert "BATCH_SIZE=32 (34 packed rows) MICROBATCHES=2" in dry_run.advice(run, found)
    few = run.but(rows=6, batch_size=16)
    least = dry_run.suggest(few, fake(few), 115, fake)[0][0]
    assert (least.rows, least.microbatches) == (8, 8), "with 16 parts it would have 16 rows"
    found = dry_run.suggest(run, fake(run), 1000, fake)
    assert [(r.batch_size, r.rows) for r, _ in found] == [(64, 66)]


def test_memory_is_that_of_the_container(tmp_path):
    assert dry_run.host_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  2048 kB\nMemFree: 1 kB\n")
    assert dry_run.host_memory(tmp_path) == 2 * 2**20
    group = tmp_path / "sys/fs/cgroup/memory.max"
    group.parent.mkdir(parents=True)
    for text, expected in (("max\n", 2 * 2**20), ("1000000\n", 10**6)):
        group.write_text(text)
        assert dry_run.host_memory(tmp_path) == expected


def settings(**changes):
    """Arguments of `launch.train` that a dry run asks for."""
    return {
        "architecture": "t5_1_1_embedded", "dropout_rate": 0.1, "dtype": "float32",
        "remat": "none", "task_feature_lengths": {"inputs": 512, "targets": 16},
        "prompt_length": 100, "batch_size": 16, "microbatches": 1, "pack_length": 0,
        "weights": None, "optimizer": optim.adafactor, "trainable": ["prompt/.*"],
        "frozen": [".*"], "prompt_depth": 1, "reparameterisation": None, **changes,
    }  # fmt: skip


def test_rows_may_be_shorter_than_the_longest_example_that_could_be():
    mesh = partition.make_mesh(devices=1)
    run = dry_run.of_settings(settings(pack_length=264, prompt_depth="all"), mesh)
    assert (run.rows, run.encoder_length, run.batch_size, run.depth) == (16, 264, 16, 4)
    with pytest.raises(ValueError, match="PACK_LENGTH is 100, but the longest input with its"):
        dry_run.of_settings(settings(pack_length=100), mesh)


@pytest.mark.parametrize(
    "name, value",
    [("BATCH_SIZE", 0), ("DTYPE", "fp16"), ("TASK_FEATURE_LENGTHS", {"inputs": 8}),
     ("PROMPT_LENGTH", -1), ("MICROBATCHES", 2.0), ("DROPOUT_RATE", 1.0), ("PROMPT_DEPTH", 5),
     ("PACK_LENGTH", "all"), ("TRAINABLE", "prompt"), ("LOG_PERIOD", 0)],
)  # fmt: skip
def test_what_a_run_would_refuse_is_refused(name, value, capsys):
    flags = ["--gin_file=models/t5_1_1_embedded.gin", "--gin_file=runs/prompt_finetune.gin"]
    assert main(["train", *flags, "--dry_run", f"--gin.{name}={value!r}"]) == 2
    said = capsys.readouterr().err.strip()
    assert f"{name} is {value!r}, " in said and len(said.splitlines()) == 1


def test_a_run_without_its_file_is_told_which_kind_it_lacks(capsys):
    assert main(["train", "--gin_file=models/t5_1_1_embedded.gin", "--dry_run"]) == 2
    assert "no gin file given sets launch.train; add one such as" in capsys.readouterr().err


def test_sizes_are_read_with_their_units():
    assert dry_run.parse_size("80GiB") == 80 * 2**30 and dry_run.parse_size("1.5 GB") == 1.5e9
    for text in ("80 cows", "80"):
        with pytest.raises(ValueError, match=f"--device_memory is '{text}', expected a number and"):
            dry_run.parse_size(text)


def test_the_command_needs_no_checkpoint_and_loads_nothing(tmp_path, capsys):
    flags = [
        "train",
        "--gin_file=models/t5_1_1_embedded.gin",
        "--gin_file=runs/prompt_finetune.gin",
    ]
    flags += ["--gin.INITIAL_CHECKPOINT_PATH=/nowhere", "--gin.BATCH_SIZE=2", "--dry_run"]
    flags += ["--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 8}", "--device_memory=1GiB"]
    assert main([*flags, f"--gin.MODEL_DIR={tmp_path}/run"]) == 0
    said = capsys.readouterr().out
    assert "frozen weights" in said and "peak" in said and "1.000  fits" in said
    assert "fits: BATCH_SIZE=" in said
    assert not (tmp_path / "run").exists()
    flags += ["--gin.PACK_LENGTH=auto", f"--gin.MODEL_DIR={tmp_path}/run"]
    assert main(flags) != 0
    assert "PACK_LENGTH 'auto' is chosen by the data" in capsys.readouterr().err
