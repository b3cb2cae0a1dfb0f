"""Deep and reparameterised prompts: the backbone stays, runs go on, and plain arrays come out."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from test_train import LENGTHS, batches_of, bits, fit, prompt_of

import softprompt
from softprompt import convert, dropout, evaluation, prompt, train, tree
from softprompt.__main__ import main
from softprompt.prompted import PromptedT5, slots
from softprompt.reparameterise import Mlp

NETWORK = Mlp(bottleneck=6)
LI_LIANG = Mlp(7, residual=False, layer_norm=False, activation="tanh")


def deep_of(backbone, rows=5, depth="all"):
    return prompt.deep_rows(backbone, prompt_of(backbone, rows), depth)


def with_prompt(backbone, array, deep=None):
    flat = {**backbone.params, train.PROMPT: jnp.asarray(array)}
    return flat if deep is None else {**flat, train.DEEP: jnp.asarray(deep)}


def encoded(backbone, flat, ids, rows=5):
    module = PromptedT5(backbone.cfg, rows)
    with jax.default_matmul_precision("highest"):
        return module.apply({"params": tree.unflatten(flat)}, ids, method="encode")[0]


def ids_of(backbone, rows=5):
    front = slots(backbone.cfg.vocab_size, rows)
    return jnp.asarray([[*front, 7, 8, 9, 1, 0], [*front, 11, 12, 1, 0, 0]], jnp.int32)


# --- the thesis ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "network, depth", [(None, "all"), (NETWORK, 1), (Mlp(6, shared=False), "all"), (LI_LIANG, 1)]
)
def test_training_moves_the_prompt_and_no_bit_of_the_backbone(tiny, pairs, network, depth):
    before = bits(tiny.params)
    deep = deep_of(tiny, depth=depth)
    start = prompt_of(tiny)
    result = fit(tiny, pairs, steps=2, deep=deep, reparameterisation=network)
    assert bits(tiny.params) == before
    assert set(result.trained) == {train.PROMPT} | ({train.DEEP} if depth == "all" else set())
    assert (np.abs(result.trained[train.PROMPT] - start) > 0).mean() > 0.99
    if depth == "all":
        assert (np.abs(result.trained[train.DEEP] - deep) > 0).mean() > 0.99


def test_a_prompt_of_which_a_part_trains_is_kept_whole(tiny, pairs):
    deep = deep_of(tiny)
    result = fit(tiny, pairs, 1, deep=deep, trainable=("prompt/bank",))
    np.testing.assert_array_equal(result.trained[train.DEEP], deep)
    assert np.abs(result.trained[train.PROMPT] - prompt_of(tiny)).min() > 0


def test_a_resumed_run_ends_bit_identical(tiny, pairs, tmp_path):
    figures = {2: 3.0, 4: 1.0, 6: 2.0, 7: 0.0}
    settings = dict(
        deep=deep_of(tiny),
        reparameterisation=NETWORK,
        eval_period=2,
        evaluate=lambda flat, step: {"x": figures[step]},
        save=lambda *_: None,
    )
    whole = fit(tiny, pairs, 7, **settings)
    fit(tiny, pairs, 4, model_dir=tmp_path, **settings)
    resumed = fit(tiny, pairs, 7, model_dir=tmp_path, **settings)
    assert bits(resumed.trained) == bits(whole.trained)
    assert resumed.best_step == 2 and bits(resumed.best) == bits(whole.best)
    with pytest.raises(ValueError, match="another run"):
        fit(tiny, pairs, 9, model_dir=tmp_path, reparameterisation=NETWORK)


# --- deep prompts -------------------------------------------------------------------------------


def test_deep_rows_replace_what_each_layer_reads_at_the_slots(tiny):
    """Against layers applied one by one, with the rows written over the slots' states."""
    array, ids = prompt_of(tiny), ids_of(tiny)
    deep = np.random.default_rng(3).normal(size=deep_of(tiny).shape).astype("f4")
    flat = with_prompt(tiny, array, deep)

    def by_hand(module, ids):
        stack, x = module.t5.encoder, module.t5.embed(ids).at[:, :5].set(array)
        at = jnp.arange(ids.shape[1])
        bias = stack.relpos_bias(at, at) + jnp.where(ids > 0, 0.0, -1e10)[:, None, None]
        for i, layer in enumerate(stack.layers):
            x = layer.whole(x.at[:, :5].set(deep[i - 1]) if i else x, bias, dropout.Kept())
        return stack.encoder_norm(x)

    module = PromptedT5(tiny.cfg, 5)
    with jax.default_matmul_precision("highest"):
        expected = module.apply({"params": tree.unflatten(flat)}, ids, method=by_hand)
    real = np.asarray(ids > 0)
    np.testing.assert_allclose(encoded(tiny, flat, ids)[real], expected[real], atol=2e-5)
    plain = encoded(tiny, with_prompt(tiny, array), ids)
    assert np.abs(plain - expected)[real].max() > 0.1
    shallow = encoded(tiny, with_prompt(tiny, array, deep[:1]), ids)
    assert np.abs(shallow - plain)[real].max() > 0.1
    if len(deep) > 1:
        assert np.abs(shallow - expected)[real].max() > 1e-3


def test_deep_rows_start_as_the_states_of_the_prompt_itself(tiny):
    """Without a text, then, the deep prompt is the plain one."""
    array = prompt_of(tiny)
    ids = jnp.asarray(slots(tiny.cfg.vocab_size, 5))[None]
    plain = encoded(tiny, with_prompt(tiny, array), ids)
    deep = encoded(tiny, with_prompt(tiny, array, deep_of(tiny)), ids)
    np.testing.assert_allclose(deep, plain, atol=1e-5)


@pytest.mark.parametrize("depth", [0, 99, "every", True, 1.5])
def test_a_depth_that_the_encoder_has_not_is_refused(tiny, depth):
    with pytest.raises(ValueError, match=f"PROMPT_DEPTH is {depth!r}, expected 'all' or from 1 to"):
        deep_of(tiny, depth=depth)


def test_a_deep_prompt_is_tuned_saved_and_used(tiny, pairs, tmp_path):
    labels = ["positive", "negative"]
    tuned = softprompt.tune(
        tiny, pairs, pairs, labels, 3, 2, 4, prompt_depth="all", lengths=LENGTHS, log_period=9
    )
    layers = tiny.cfg.num_encoder_layers
    assert tuned.deep.shape == (layers - 1, 3, tiny.cfg.emb_dim)
    path = tmp_path / "deep.safetensors"
    tuned.save(path)
    again = softprompt.load_prompt(path, tiny)
    assert bits({"a": again.array, "d": again.deep}) == bits({"a": tuned.array, "d": tuned.deep})
    texts = [text for text, _ in pairs]
    scores = [softprompt.score_labels(tiny, texts, labels, p) for p in (tuned, again)]
    np.testing.assert_array_equal(*scores)
    without = softprompt.score_labels(tiny, texts, labels, dataclasses.replace(tuned, deep=None))
    assert np.abs(scores[0] - without).max() > 1e-3
    assert again.metadata["prompt_depth"] == layers

    shallow = dataclasses.replace(
        tiny, cfg=dataclasses.replace(tiny.cfg, num_encoder_layers=layers - 1)
    )
    with pytest.raises(ValueError, match=f"rows for {layers} encoder layers, the backbone 'tiny'"):
        softprompt.load_prompt(path, shallow)


def test_what_cannot_hold_a_deep_prompt_refuses_it(tiny, tmp_path):
    path, array = tmp_path / "deep.safetensors", prompt_of(tiny)
    prompt.save(path, array, {"task": "x"}, deep_of(tiny))
    with pytest.raises(ValueError, match="is a deep prompt, with rows for"):
        prompt.load(path)
    for to, name in (("npy", "p.npy"), ("peft", "adapter")):
        with pytest.raises(ValueError, match=f"is a deep prompt.*--to {to} holds the input's"):
            convert.convert(str(path), tmp_path / name, to)
        assert not (tmp_path / name).exists()
    convert.convert(str(path), tmp_path / "copy.safetensors", "prompt")
    copied, deep, metadata = prompt.load_deep(tmp_path / "copy.safetensors")
    np.testing.assert_array_equal(copied, array)
    np.testing.assert_array_equal(deep, deep_of(tiny))
    assert metadata["task"] == "x"
    assert "deep_shape" in convert.inspect(str(path))[0]
    prompt.save(path, array, {}, deep_of(tiny)[:, :2])
    with pytest.raises(ValueError, match="is no prompt: its deep rows have shape"):
        prompt.load_deep(path)


# --- networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [NETWORK, Mlp(6, shared=False), LI_LIANG])
def test_the_network_is_the_formula(network, rng):
    start = rng.normal(size=(4, 9)).astype("f4")
    flat = network.init(jax.random.key(0), {train.PROMPT: start})
    p = {k.rsplit("/", 2)[-2] + "_" + k.rsplit("/", 1)[-1]: np.asarray(x) for k, x in flat.items()}
    expected = []
    for i, x in enumerate(start):
        own = {k: v if network.shared else v[i] for k, v in p.items() if not k.endswith("bank")}
        y = x @ own["down_kernel"] + own["down_bias"]
        y = np.maximum(y, 0) if network.activation == "relu" else np.tanh(y)
        y = y @ own["up_kernel"] + own["up_bias"]
        if network.layer_norm:
            y = (y - y.mean()) / np.sqrt(y.var() + 1e-5) * own["norm_scale"] + own["norm_bias"]
        expected.append(x + y if network.residual else y)
    collapsed = network.collapse({**flat, "encoder/w": 1})
    assert set(collapsed) == {train.PROMPT, "encoder/w"}
    np.testing.assert_allclose(collapsed[train.PROMPT], expected, atol=1e-5)


def test_the_collapsed_prompt_is_what_was_trained_and_evaluated(tiny, pairs, tmp_path):
    """The loss that the last step reports is that of the saved plain array before it."""
    seen, saved = {}, {}

    def evaluate(flat, step):
        assert not [k for k in flat if k.startswith("prompt/network")]
        seen[step] = np.asarray(flat[train.PROMPT])
        return {"x": 1.0}

    def save(path, trained, note):
        saved[path.name] = trained

    result = fit(
        tiny, pairs, 3, reparameterisation=NETWORK, evaluate=evaluate, eval_period=2,
        model_dir=tmp_path, save=save, log_period=1,
    )  # fmt: skip
    assert set(saved["2"]) == {train.PROMPT} and saved["2"][train.PROMPT].shape == (5, 24)
    np.testing.assert_array_equal(saved["2"][train.PROMPT], seen[2])
    np.testing.assert_array_equal(saved["3"][train.PROMPT], result.trained[train.PROMPT])
    batches = batches_of(tiny, pairs, 5)(2)
    batch = {k: jnp.asarray(x) for k, x in next(batches).items()}
    flat = with_prompt(tiny, saved["2"][train.PROMPT])
    total, count = evaluation._row_losses(PromptedT5(tiny.cfg, 5), flat, batch).sum(-1)
    line = (tmp_path / "train.jsonl").read_text().splitlines()[-1]
    assert f'"loss": {float(total / count):.4f}' in line[:40] or np.isclose(
        float(line.split('"loss": ')[1].split(",")[0]), total / count, rtol=1e-4
    )


def test_senseless_networks_are_refused():
    with pytest.raises(ValueError, match="BOTTLENECK is 0"):
        Mlp(0)
    with pytest.raises(ValueError, match="ACTIVATION is 'sine', expected one of relu, gelu, tanh"):
        Mlp(activation="sine")


def test_the_commands_train_count_evaluate_and_infer(tiny_folder, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a fine film", "label": 0}\n{"text": "a dull film", "label": 1}\n')
    run, model = tmp_path / "run", "--gin_file=models/t5_1_1_embedded.gin"
    own = [f"--gin.INITIAL_CHECKPOINT_PATH={tiny_folder}"]
    width = TINY.emb_dim
    assert main([
        "train", model, *own, "--gin.ARCHITECTURE=None",
        "--gin_file=runs/prompt_finetune.gin", "--gin_file=prompts/deep.gin",
        "--gin_file=prompts/reparameterised.gin", f"--gin.MODEL_DIR={run}", "--labels=good,bad",
        f"--train_file={rows}", f"--validation_file={rows}", "--gin.PROMPT_LENGTH=3",
        "--gin.TRAIN_STEPS=2", "--gin.BATCH_SIZE=2", "--gin.EVAL_MODE=rank",
        "--gin.BOTTLENECK=5", "--gin.PROMPT_DEPTH=2",
    ]) == 0  # fmt: skip
    said = capsys.readouterr().out
    before, after = re.search("fingerprint before (.*), after (.*)", said).groups()
    assert before == after
    assert "could not be written" not in said
    assert "A deep prompt of 2 layers" in (run / "report.html").read_text()
    facts = json.loads((run / "run.json").read_text())
    network = width * 5 + 5 + 5 * width + width + 2 * width
    assert facts["trainable_parameters"] == 2 * 3 * width + network
    assert facts["parameters_per_task"] == 2 * 3 * width
    assert facts["bytes_per_task"] == 4 * 2 * 3 * width
    assert facts["prompt_depth"] == 2 and facts["network"]["bottleneck"] == 5
    assert f"trainable parameters {2 * 3 * width + network:,}" in said and "576 bytes" in said
    best = run / "prompts" / "best.safetensors"
    array, deep, _ = prompt.load_deep(best)
    assert array.shape == (3, width) and deep.shape == (1, 3, width)
    shared = [model, *own, f"--gin.PROMPT_FILE={best}", "--labels=good,bad"]
    assert main(["eval", model, "--gin_file=runs/prompt_eval.gin", *shared[1:],
                 f"--validation_file={rows}", "--gin.EVAL_MODE=rank"]) == 0  # fmt: skip
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    trained = json.loads((run / "eval" / "metrics.jsonl").read_text().splitlines()[-1])
    assert figures["accuracy"] == trained["accuracy"]
    out = tmp_path / "out.jsonl"
    assert main(["infer", model, "--gin_file=runs/prompt_infer.gin", *shared[1:],
                 f"--gin.INPUT_FILE={rows}", f"--gin.OUTPUT_FILE={out}"]) == 0  # fmt: skip
    assert len(out.read_text().splitlines()) == 2
    capsys.readouterr()
    assert main(["train", model, "--gin_file=runs/prompt_finetune.gin", f"--gin.MODEL_DIR={run}",
                 "--gin.MIXTURE_OR_TASK_NAME=embedded_sentiment", "--gin.PROMPT_LENGTH=0",
                 "--gin.PROMPT_DEPTH=2"]) == 2  # fmt: skip
    assert "PROMPT_LENGTH is 0: there is no prompt to be deep" in capsys.readouterr().err
