"""Our model under T5X's own trainer, and T5X's launch lines; needs T5X, which is on no registry."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import folder_of

pytest.importorskip(
    "t5x", reason="T5X does not import here: it is installed from source (see README)"
)
from t5x import partitioning, trainer, utils

from softprompt import backbone as backbones
from softprompt import config, convert, data, formats, optim, t5x_host, train, tree
from softprompt import prompt as prompts
from softprompt.prompted import PromptedT5

pytestmark = pytest.mark.slow
TASK, P, LENGTHS = "embedded_question_type", 8, {"inputs": 40, "targets": 8}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The embedded backbone as a T5X checkpoint."""
    path = tmp_path_factory.mktemp("t5x") / "backbone" / "checkpoint_0"
    path.parent.mkdir()
    convert.convert("embedded", path, "t5x")
    return path


def host_trainer(stored, folder):
    model = t5x_host.PromptedModel(
        "t5_1_1_embedded", str(stored), "embedded", TASK, prompt_length=P,
        prompt_init=prompts.class_labels, optimizer=lambda: optim.adafactor(0.3),
    )  # fmt: skip
    rules = partitioning.standard_logical_axis_rules(additional_rules=(("prompt", None),))
    partitioner = partitioning.PjitPartitioner(num_partitions=1, logical_axis_rules=rules)
    shapes = {"encoder_input_tokens": (4, 40), "decoder_input_tokens": (4, 8)}
    initializer = utils.TrainStateInitializer(
        model.optimizer_def, model.get_initial_variables, shapes, partitioner
    )
    restore = utils.RestoreCheckpointConfig(
        str(stored), mode="specific", dtype="float32", fallback_to_scratch=True,
        state_transformation_fns=[
            lambda a, b, **kw: t5x_host.restore_prompt(a, b, from_scratch=True, **kw)
        ],
    )  # fmt: skip
    state = initializer.from_checkpoint([restore], init_rng=jax.random.PRNGKey(0))
    made = trainer.Trainer(
        model, state, partitioner, [], str(folder), initializer.train_state_axes,
        jax.random.PRNGKey(0), lambda step: 0.3, None,
    )  # fmt: skip
    return model, made


def test_ten_steps_under_either_trainer_give_the_same_prompt(stored, tmp_path, embedded):
    model, host = host_trainer(stored, tmp_path)
    flat = lambda: t5x_host._flatten(host.train_state.params)  # noqa: E731
    before = {path: np.array(x) for path, x in flat().items()}
    initial = before.pop(train.PROMPT)
    np.testing.assert_array_equal(initial, model.initial_prompt)
    # Only the prompt has optimizer state.
    sizes = jax.tree.leaves(host.train_state.param_states)
    assert 0 < sum(np.size(x) for x in sizes) < 2 * initial.size

    [(task, _)] = data.get_tasks(TASK)
    examples = data.from_task(task, "train", LENGTHS)
    slots = train_slots = np.asarray(model._slots)
    batches = data.train_batches([examples], [1.0], 4, 0, train_slots)

    def features(batch):
        targets = batch["targets"]
        return {
            "encoder_input_tokens": batch["encoder_ids"][:, len(slots) :],
            "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": targets,
            "decoder_loss_weights": (targets > 0).astype(np.int32),
        }

    host.train(map(features, batches(0)), 10)
    after = {path: np.array(x) for path, x in flat().items()}
    theirs = after.pop(train.PROMPT)
    assert {k: x.tobytes() for k, x in after.items()} == {k: x.tobytes() for k, x in before.items()}

    ours = train.fit(embedded, batches, optim.adafactor(0.3), 10, prompt=initial)
    assert np.abs(theirs - initial).max() > 0.5
    np.testing.assert_allclose(theirs, ours.trained[train.PROMPT], rtol=0, atol=1e-4)


def t5x(binary, stored, folder, *flags):
    """Runs `python -m t5x.<binary>` as the README says."""
    values = {
        "INITIAL_CHECKPOINT_PATH": str(stored),
        "MIXTURE_OR_TASK_NAME": TASK,
        "PROMPT_LENGTH": P,
        "VOCABULARY_FILE": "embedded",
        "TASK_FEATURE_LENGTHS": LENGTHS,
    }
    run = subprocess.run(
        [
            sys.executable, "-m", f"t5x.{binary}", f"--gin_search_paths={config.GIN_FOLDER}",
            "--gin_file=models/t5_1_1_embedded.gin", *flags,
            *(f"--gin.{name}={value!r}" for name, value in values.items()),
        ],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stderr


def ours(prompt, folder):
    """The figures of a prompt in a file under our own binary."""
    run = subprocess.run(
        [
            sys.executable, "-m", "softprompt", "eval", "--gin_file=models/t5_1_1_embedded.gin",
            "--gin_file=runs/prompt_eval.gin", f"--gin.MIXTURE_OR_TASK_NAME={TASK}",
            f"--gin.TASK_FEATURE_LENGTHS={LENGTHS}", f"--gin.PROMPT_FILE={prompt}",
            f"--gin.EVAL_OUTPUT_DIR={folder}",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((folder / f"{TASK}.json").read_text())


def inferred(stored, folder, name, *flags):
    """What T5X's inference answers."""
    out = folder / name
    infer = ["--gin_file=t5x/prompt_infer.gin", f"--gin.INFER_OUTPUT_DIR={str(out)!r}"]
    t5x("infer", stored, folder, *infer, *flags)
    return predictions(out)


def predictions(folder):
    [file] = [p for p in folder.glob("*.jsonl*") if p.suffix != ".COMPLETED"]
    return [json.loads(x)["prediction"] for x in file.read_text().splitlines()]


def test_the_launch_lines_train_resume_evaluate_and_infer(stored, tmp_path, embedded, capsys):
    tune = [
        "--gin_file=t5x/prompt_finetune.gin", "--gin_file=prompts/from_class_labels.gin",
        f"--gin.MODEL_DIR={str(tmp_path / 'run')!r}", "--gin.BATCH_SIZE=16",
        "--gin.EVAL_PERIOD=150", "--gin.CHECKPOINT_PERIOD=75",
    ]  # fmt: skip
    t5x("train", stored, tmp_path, *tune, "--gin.TRAIN_STEPS=75")
    t5x("train", stored, tmp_path, *tune, "--gin.TRAIN_STEPS=150")
    lifted = tmp_path / "p.safetensors"
    convert.convert(str(tmp_path / "run" / "checkpoint_150"), lifted, "prompt", backbone="embedded")
    same = formats.open_stored(tmp_path / "run" / "checkpoint_150")
    assert tree.fingerprint({k: same.read(k) for k in same.shapes}) == embedded.fingerprint

    # The prompt in T5X's checkpoint, the same one as a file, and the file under our own binary.
    found = {}
    evaluate = "--gin_file=t5x/prompt_eval.gin"
    for name, where, flags in (
        ("checkpoint", tmp_path / "run" / "checkpoint_150", []),
        ("file", stored, [f"--gin.PROMPT_FILE={str(lifted)!r}"]),
    ):
        out = tmp_path / name
        t5x("eval", where, tmp_path, evaluate, f"--gin.EVAL_OUTPUT_DIR={str(out)!r}", *flags)
        [metrics] = out.rglob(f"{TASK}-metrics.jsonl")
        found[name] = json.loads(metrics.read_text().splitlines()[-1])
        found[name].pop("step")
    found["ours"] = ours(lifted, tmp_path / "ours")
    assert found["checkpoint"] == found["file"] == pytest.approx(found["ours"])

    trained = tmp_path / "run" / "checkpoint_150"
    assert inferred(trained, tmp_path, "trained") == predictions(tmp_path / "ours" / "predictions")
    # Trained, it may answer all texts alike, and the comparison says little: one that is not.
    untrained = tmp_path / "untrained.npy"
    np.save(untrained, np.random.default_rng(0).uniform(-0.5, 0.5, (P, embedded.cfg.emb_dim)))
    ours(untrained, tmp_path / "other")
    flag = f"--gin.PROMPT_FILE={str(untrained)!r}"
    answers = inferred(stored, tmp_path, "untrained", flag)
    assert answers == predictions(tmp_path / "other" / "predictions")
    assert len(set(answers)) >= 10


def test_a_prompt_in_both_places_or_neither_is_refused():
    leaf = np.zeros(3)
    with_prompt = {"target": {"prompt": {"bank": leaf}, "x": leaf}, "state": {"step": 3}}
    without = {"target": {"x": leaf}, "state": {"step": 3}}
    restore = t5x_host.restore_prompt
    with pytest.raises(ValueError, match="holds a prompt .* which one"):
        restore(with_prompt, {}, prompt_file="p.npy")
    with pytest.raises(ValueError, match="holds no prompt: give PROMPT_FILE"):
        restore(without, {})
    assert restore(with_prompt, {}, is_resuming=True) is with_prompt
    assert restore(with_prompt, {}, from_scratch=True) == {"target": {"x": leaf}}
    peers = {"target": {"encoder": {"prompt": {"prompt": {"prompt": leaf}}}}}
    assert list(restore(peers, {})["target"]) == ["prompt"]


@pytest.mark.parametrize("source", ["embedded", "fixture"])
def test_logits_equal_those_of_t5x_own_model(source, embedded, monkeypatch):
    from t5x.examples.t5 import layers, network

    backbone = embedded
    if source == "fixture":
        folder = folder_of("SOFTPROMPT_TEST_FIXTURES", "a folder with a T5X checkpoint")
        where = folder / "t5x_t5_1_1_tiny" / "checkpoint_3"
        backbone = backbones.load(where, relative_max_distance=8)
    cfg = backbone.cfg
    # T5X's minimal model has its buckets written into it.
    buckets = dict(num_buckets=cfg.relative_buckets, max_distance=cfg.relative_max_distance)
    bias = layers.RelativePositionBiases
    monkeypatch.setattr(layers, "RelativePositionBiases", lambda **kw: bias(**{**kw, **buckets}))
    sizes = {k: v for k, v in cfg.to_json().items() if not k.startswith("relative")}
    theirs = network.Transformer(network.T5Config(**sizes, dtype="float32", dropout_rate=0.0))
    rng = np.random.default_rng(0)
    encoder = rng.integers(2, cfg.vocab_size, (3, 40)).astype(np.int32)
    encoder[1, 25:] = encoder[2, 3:] = 0
    targets = rng.integers(2, cfg.vocab_size, (3, 12)).astype(np.int32)
    decoder = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    variables = {"params": tree.unflatten(backbone.params)}
    with jax.default_matmul_precision("highest"):
        expected = theirs.apply(variables, encoder, decoder, targets, enable_dropout=False)
        found = PromptedT5(cfg).apply(variables, encoder, decoder)
    assert float(np.abs(expected).max()) > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
