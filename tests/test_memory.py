"""Weights as int8, rematerialisation, gradient accumulation, and what a dry run says they need."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY
from test_train import LENGTHS, batches_of, fit, prompt_of

from softprompt import backbone as backbones
from softprompt import (
    data,
    eval_task,
    int8,
    memory,
    optim,
    packing,
    partition,
    prompted,
    segments,
    t5_layers,
    train,
    train_step,
    tree,
)
from softprompt.formats import Stored, native
from softprompt.prompted import PromptedT5
from softprompt.reparameterise import Mlp


def rounded(backbone):
    """The backbone with its matrices as int8, and one whose float32 weights have those values."""
    params = {}
    for path, x in backbone.params.items():
        params[path] = x
        if int8.kept(path):
            pair = int8.quantize(path, np.asarray(x))
            params[path], params[path + int8.SCALE] = map(jnp.asarray, pair)
    same = {path: jnp.asarray(int8.value(params, path)) for path in int8.parameters(params)}
    return dataclasses.replace(backbone, params=params), dataclasses.replace(backbone, params=same)


def gradient(backbone, batch, rows=5, label_ids=None, **settings):
    """Mean loss of a batch and the gradient of the prompt, by one step of plain descent."""
    cfg = dataclasses.replace(backbone.cfg, remat=settings.pop("remat", "none"))
    module, optimizer = PromptedT5(cfg, rows), optax.sgd(1.0)
    prompt = jnp.asarray(prompt_of(backbone, rows))
    state = train_step.init_state({train.PROMPT: prompt}, optimizer, backbone.mesh)
    step = train_step.jit_step(
        train_step.make_step(module, optimizer, label_ids=label_ids, **settings)
    )
    after = step(state, backbone.params, batch)
    loss = float(after["loss_sum"] / after["count_sum"])
    return loss, np.asarray(prompt - after["trainable"][train.PROMPT])


def batch_of(backbone, pairs, size=4):
    return next(batches_of(backbone, pairs, 5, batch_size=size)(0))


def test_results_of_activation_functions_do_not_wait_for_the_backward_pass(embedded, monkeypatch):
    cfg = dataclasses.replace(embedded.cfg, num_decoder_layers=1)
    run = memory.Run(cfg, None, embedded.mesh, optax.sgd(1.0), 20, 16, 148, 8)
    with_them = memory.need(run).temporaries
    monkeypatch.setattr(t5_layers, "_activated", t5_layers._activated.__wrapped__)
    assert with_them < 0.9 * memory.need(run).temporaries


# --- int8 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_int8_weights_give_the_loss_and_gradient_of_their_values(tiny, pairs, tied):
    if tied:
        cfg = dataclasses.replace(TINY, logits_via_embedding=True, mlp_activations=("relu",))
        tiny = backbones.random(cfg, 0, tiny.vocabulary, tiny.mesh)
    narrow, same = rounded(tiny)
    batch = batch_of(tiny, pairs)
    loss, grad = gradient(narrow, batch)
    expected_loss, expected = gradient(same, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    np.testing.assert_allclose(grad, expected, atol=1e-4 * np.abs(expected).max())
    assert not np.array_equal(grad, gradient(tiny, batch)[1]), "rounding shows"


@pytest.mark.parametrize("label_ids", [None, np.array([[5, 1], [9, 1]], np.int32)])
def test_int8_weights_train_in_bfloat16(tiny, pairs, label_ids):
    """With so few targets cross-attention makes no keys and values, by other products."""
    batch = batch_of(tiny, pairs)
    if label_ids is not None:
        batch = {**batch, "targets": np.array([[5, 1], [9, 1], [9, 1], [5, 1]], np.int32)}
    assert t5_layers.few(tiny.cfg, batch["targets"].shape[1])
    narrow, same = rounded(tiny)
    cfg = dataclasses.replace(tiny.cfg, dtype=jnp.bfloat16)
    narrow = dataclasses.replace(narrow, cfg=cfg)
    loss, grad = gradient(narrow, batch, label_ids=label_ids)
    expected_loss, expected = gradient(same, batch, label_ids=label_ids)
    np.testing.assert_allclose(loss, expected_loss, rtol=0.02)
    assert np.corrcoef(np.ravel(grad), np.ravel(expected))[0, 1] > 0.98


def test_every_matrix_is_int8_once_loaded(tiny, tmp_path):
    native.save(tmp_path, Stored.of("tiny", tiny.cfg, tiny.params, tiny.vocabulary))
    loaded = backbones.load(tmp_path, "bfloat16", mesh=tiny.mesh, weights="int8")
    assert loaded.weights == "int8" and loaded.fingerprint == tiny.fingerprint
    wide = {path for path, x in loaded.params.items() if x.dtype != jnp.int8}
    assert all(path.endswith(("scale", "rel_embedding")) for path in wide)
    drawn = backbones.random(loaded.cfg, 0, tiny.vocabulary, tiny.mesh, weights="int8")
    for path, x in loaded.params.items():
        assert x.dtype == drawn.params[path].dtype
        np.testing.assert_allclose(
            np.asarray(x, "f4"), np.asarray(drawn.params[path], "f4"), rtol=1e-6, atol=1
        )
        if int8.kept(path):
            error = np.abs(int8.value(loaded.params, path) - np.asarray(tiny.params[path]))
            assert (error <= np.asarray(loaded.params[path + int8.SCALE]) * 0.5001).all()
    np.testing.assert_allclose(
        loaded.embedding(), tiny.params["token_embedder/embedding"], atol=0.02
    )


def test_stored_int8_is_taken_as_it_is(embedded):
    loaded = backbones.load("embedded", mesh=embedded.mesh, weights="int8")
    assert loaded.fingerprint == embedded.fingerprint
    for path in ("token_embedder/embedding", "decoder/logits_dense/kernel"):
        np.testing.assert_array_equal(int8.value(loaded.params, path), embedded.params[path])


def test_a_prompt_says_what_weights_it_was_trained_on_and_is_taken_again(tmp_path):
    import softprompt

    backbone = softprompt.load_backbone(weights="int8")
    pairs = [("so warm", "good"), ("so cold", "bad")]
    prompt = softprompt.tune(
        backbone, pairs, labels=["good", "bad"], prompt_length=3, train_steps=1, batch_size=2,
        lengths=LENGTHS, model_dir=tmp_path,
    )  # fmt: skip
    assert prompt.metadata["backbone_weights"] == "int8"
    again = softprompt.load_backbone(weights="int8")
    file = tmp_path / "prompts" / "best.safetensors"
    assert softprompt.load_prompt(file, again).metadata["backbone_weights"] == "int8"
    assert len(softprompt.classify(again, ["so warm"], ["good", "bad"], prompt)) == 1
    with pytest.raises(ValueError, match="backbone_weights was 'int8', is now 'float32'"):
        softprompt.tune(
            softprompt.load_backbone(), pairs, labels=["good", "bad"], prompt_length=3,
            train_steps=2, batch_size=2, lengths=LENGTHS, model_dir=tmp_path,
        )  # fmt: skip


@pytest.mark.parametrize("pattern", [".*", "decoder/logits_dense/kernel", ".*/kernel:scale"])
def test_int8_weights_cannot_be_trained(tiny, pairs, pattern):
    with pytest.raises(ValueError, match="TRAINABLE names .* WEIGHTS 'int8' keeps as int8"):
        fit(rounded(tiny)[0], pairs, trainable=(pattern, "prompt/.*"))


def test_what_is_not_int8_trains_beside_it(tiny, pairs):
    narrow = rounded(tiny)[0]
    before = tree.fingerprint(narrow.params)
    result = fit(narrow, pairs, 1, trainable=("encoder/.*norm/scale",))
    assert len(result.trained) == 2 * TINY.num_encoder_layers + 1
    assert tree.fingerprint(narrow.params) == before


def test_unknown_weights_and_policies_are_refused():
    with pytest.raises(ValueError, match="WEIGHTS is 'int4', expected None .* or 'int8'"):
        backbones.load("embedded", weights="int4")
    run = tiny_run()
    with pytest.raises(ValueError, match="REMAT is 'some', expected one of none, minimal, full"):
        memory.lower(run.but(remat="some"))


SHARDED = """
import sys, numpy as np, jax
sys.path.insert(0, sys.argv[1])
from conftest import TINY
from test_memory import batch_of, gradient
from softprompt import backbone as backbones, evaluation, data, partition
from softprompt.formats import native
from softprompt.vocabulary import Vocabulary
words = Vocabulary(native.EMBEDDED / native.VOCABULARY_FILE)
pairs = [(f"number {i} of the lot", "odd" if i % 2 else "even") for i in range(8)]
for data_axis, model, parts in ((1, 1, 1), (2, 4, 4)):
    mesh = partition.make_mesh(data_axis, model, devices=data_axis * model)
    backbone = backbones.random(TINY, 0, words, mesh, weights="int8")
    shape = lambda path: backbone.params[path].addressable_shards[0].data.shape
    assert shape("encoder/layers_0/mlp/wi_0/kernel") == (24, 40 // model)
    assert shape("encoder/layers_0/mlp/wi_0/kernel:scale") == (1, 40 // model)
    assert shape("encoder/layers_0/mlp/wo/kernel:scale") == (1, 24)
    assert shape("token_embedder/embedding:scale") == (8192 // model, 1)
    batch = jax.device_put(batch_of(backbone, pairs, 8), partition.batch_sharding(mesh))
    loss, grad = gradient(backbone, batch, microbatches=parts)
    print(loss, *grad.ravel())
"""


@pytest.mark.slow
def test_int8_weights_shard_over_the_model_axis_and_microbatches_over_the_data_axis():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, "-c", SHARDED, str(pathlib.Path(__file__).parent)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = np.array([[float(x) for x in line.split()] for line in run.stdout.splitlines()])
    assert len(found) == 2
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-4)


# --- rematerialisation and gradient accumulation --------------------------------------------------


@pytest.mark.parametrize("remat", ["minimal", "full"])
def test_rematerialisation_changes_no_loss_and_no_gradient(tiny, pairs, remat):
    batch = batch_of(tiny, pairs)
    loss, grad = gradient(tiny, batch)
    again, same = gradient(tiny, batch, remat=remat)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    np.testing.assert_allclose(same, grad, atol=1e-5 * np.abs(grad).max())


def packed_batch(backbone, pairs):
    examples = data.from_pairs(pairs, backbone.vocabulary, LENGTHS)
    slots = prompted.slots(backbone.cfg.vocab_size, 5)
    return next(packing.Packing([examples], [1.0], 8, 0, slots, 32, rows_multiple=4)(0))


@pytest.mark.parametrize("kind", ["tokens", "packed", "labels", "uneven"])
def test_microbatches_give_the_gradient_of_the_whole_batch(tiny, pairs, kind):
    label_ids = None
    batch = packed_batch(tiny, pairs) if kind == "packed" else batch_of(tiny, pairs)
    if kind == "labels":
        label_ids = eval_task.encode_labels(["positive", "negative"], tiny.vocabulary)
    if kind == "uneven":
        # Parts with different numbers of target tokens: one has none at all.
        batch = dict(batch, targets=batch["targets"] * np.array([[1], [0], [1], [0]]))
        batch["targets"][0, 2:] = 0
    loss, grad = gradient(tiny, batch, label_ids=label_ids)
    for parts in (2, 4):
        split_loss, split = gradient(tiny, batch, label_ids=label_ids, microbatches=parts)
        np.testing.assert_allclose(split_loss, loss, rtol=1e-5)
        np.testing.assert_allclose(split, grad, atol=1e-5 * np.abs(grad).max())


@pytest.mark.parametrize(
    "remat, parts, weights",
    [
        ("none", 2, "float32"),
        ("minimal", 1, "float32"),
        ("full", 2, "float32"),
        ("none", 1, "int8"),
    ],
)
def test_a_step_attends_by_segments_under_every_saving(
    tiny, pairs, monkeypatch, remat, parts, weights
):
    """And nothing asks for the gradient of the backbone's bias, which would take whole rows."""
    backbone = rounded(tiny)[0] if weights == "int8" else tiny
    batch = packed_batch(tiny, pairs)
    loss, grad = gradient(backbone, batch)
    monkeypatch.setattr(segments, "LONG", 1)
    monkeypatch.setattr(segments, "_cores", lambda: 1)
    monkeypatch.delattr(segments, "_whole")
    took, attend = [], segments.attend
    monkeypatch.setattr(segments, "attend", lambda *x: took.append(x) or attend(*x))
    again, same = gradient(backbone, batch, remat=remat, microbatches=parts)
    assert took
    np.testing.assert_allclose(again, loss, rtol=1e-5)
    np.testing.assert_allclose(same, grad, atol=1e-5 * np.abs(grad).max())


def test_microbatches_must_divide_the_batch(tiny):
    assert train_step.rows_for(32, tiny.mesh, 4) == 32
    with pytest.raises(ValueError, match="MICROBATCHES is 3, expected a divisor of BATCH_SIZE"):
        train_step.rows_for(32, tiny.mesh, 3)


# --- what a run needs ----------------------------------------------------------------------------


def tiny_run(**changes):
    """A model whose memory is its many layers' activations."""
    cfg = dataclasses.replace(
        TINY, vocab_size=64, num_encoder_layers=6, num_decoder_layers=1, mlp_dim=128
    )
    mesh = partition.make_mesh(devices=1)
    run = memory.Run(cfg, None, mesh, optim.adafactor(0.3), 4, 8, 64, 8)
    return run.but(**changes) if changes else run


@pytest.fixture(scope="module")
def whole():
    return memory.need(tiny_run())


def test_a_need_is_what_the_arrays_and_the_program_take(whole):
    run = tiny_run()
    params = backbones.random(run.cfg, mesh=run.mesh).params
    assert whole.weights == sum(x.nbytes for x in params.values())
    assert whole.trained == 4 * 24 * 4
    assert whole.batch == 8 * (64 + 8) * 4
    assert whole.peak == sum(dataclasses.astuple(whole))
    assert whole.kernels == whole.temporaries // 3
    # At least the inputs of every layer and its MLP's outputs live through the forward pass.
    assert whole.temporaries > 6 * 8 * 64 * (24 + 2 * 128) * 4


@pytest.mark.parametrize("platform, share", [("cpu", 12), ("gpu", 24)])
def test_the_devices_of_a_cpu_hold_the_frozen_weights_once(platform, share):
    devices = [types.SimpleNamespace(platform=platform)] * 2
    mesh = types.SimpleNamespace(devices=np.array(devices), local_devices=devices)
    place = partition.replicated(partition.make_mesh(devices=1))
    shapes = {"a": jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=place)}
    assert memory.shared_size(shapes, mesh) == share


def test_rematerialisation_saves_memory(whole):
    minimal, full = (memory.need(tiny_run(remat=r)).temporaries for r in ("minimal", "full"))
    assert full < minimal < whole.temporaries
    assert full < 0.51 * whole.temporaries


def test_microbatches_save_memory(whole):
    assert memory.need(tiny_run(microbatches=4)).temporaries < 0.4 * whole.temporaries


def test_int8_weights_are_never_all_widened_at_once():
    # Few tokens, so that what the program takes beside its arguments is copies of weights.
    wide = dataclasses.replace(tiny_run().cfg, emb_dim=128, mlp_dim=512)
    run = tiny_run(cfg=wide, encoder_length=8, rows=1, weights="int8")
    found, float32 = memory.need(run), memory.need(run.but(weights=None))
    assert found.weights < 0.27 * float32.weights
    assert found.temporaries < 0.5 * float32.weights
    in_parts = memory.need(run.but(rows=2, microbatches=2))
    assert in_parts.temporaries < 0.5 * float32.weights


def test_what_a_prompt_is_made_of_counts():
    network = Mlp(16, shared=False)
    prompt = {train.PROMPT: np.ones((4, 24)), train.DEEP: np.ones((2, 4, 24))}
    made = [4 * np.size(x) for x in network.init(jax.random.key(0), prompt).values()]
    run = tiny_run(depth=3, reparameterisation=network)
    for patterns, size in ((("prompt/.*",), sum(made)), (("prompt/deep",), 2 * 4 * 24 * 4)):
        _, state, _, _ = memory.lower(run.but(trainable=patterns))
        assert memory.size_on_device(state["trainable"]) == size
        assert memory.size_on_device(state["opt"]) > size / 2


def test_weights_that_train_lie_there_twice(whole):
    cfg = dataclasses.replace(tiny_run().cfg, num_encoder_layers=1)
    found = memory.need(tiny_run(cfg=cfg, trainable=(".*",), prompt_length=0))
    assert found.weights == 0 and found.start == found.trained > 0
    assert whole.start == 0


@pytest.mark.slow
def test_more_steps_take_no_more_memory(tmp_path):
    """The next step's temporaries lie where the last one's were: the dry run counts them once."""
    taken = []
    for steps in (2, 10):
        flags = [
            "train", "--gin_file=models/t5_1_1_embedded.gin", "--gin_file=runs/prompt_finetune.gin",
            "--gin.MIXTURE_OR_TASK_NAME=embedded_sentiment", "--gin.PROMPT_LENGTH=230",
            "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 8}", "--gin.BATCH_SIZE=16",
            "--gin.LENGTH_BUCKETS=1", "--gin.EVAL_SPLIT=none", f"--gin.TRAIN_STEPS={steps}",
            "--gin.CHECKPOINT_PERIOD=0", f"--gin.MODEL_DIR={tmp_path / str(steps)}",
        ]  # fmt: skip
        code = (
            "import resource; from softprompt.__main__ import main; "
            f"assert main({flags!r}) == 0; "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
        )
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
        said = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True)
        assert said.returncode == 0, said.stderr
        taken.append(int(said.stdout.split()[-1]))
    # A step's temporaries are some 0.4 GB of 0.9: they were taken anew four times and more.
    assert taken[1] < 1.2 * taken[0]
