"""Backbones and prompts of others: read right, written back bit for bit, refused with a reason."""

import dataclasses
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
from conftest import GOLDENS, TINY, folder_of
from safetensors import numpy as safetensors_numpy

from softprompt import analysis, checkpoint, convert, decode, formats, prompt, t5_config, tree
from softprompt import backbone as backbones
from softprompt.formats import Stored, hf, native, prompts, t5x
from softprompt.prompted import PromptedT5, slots
from softprompt.vocabulary import ByteVocabulary

_spec = importlib.util.spec_from_file_location("goldens_hf", GOLDENS / "hf.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

needs_torch = pytest.mark.skipif(
    not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")),
    reason="torch and transformers are not installed: the comparison needs their T5",
)
needs_peft = pytest.mark.skipif(
    not importlib.util.find_spec("peft"), reason="peft is not installed: it is compared with"
)


# --- the same outputs as transformers -----------------------------------------------------------


def ours(backbone) -> dict[str, np.ndarray]:
    """What `golden.outputs` gives, of our model."""
    given = golden.inputs(backbone.cfg.vocab_size, backbone.cfg.emb_dim)
    length = len(given["prompt"])
    found = {}
    for name, rows in (("plain", 0), ("prompted", length)):
        flat = dict(backbone.params)
        ids = given["encoder"]
        if rows:
            flat["prompt/bank"] = jnp.asarray(given["prompt"])
            front = np.tile(slots(backbone.cfg.vocab_size, rows), (len(ids), 1))
            ids = np.concatenate([front, ids], 1)
        module, params = PromptedT5(backbone.cfg, rows), tree.unflatten(flat)
        with jax.default_matmul_precision("highest"):
            logits = module.apply({"params": params}, ids, given["decoder"])
            encoded = decode.encode(module, params, jnp.asarray(ids))
            tokens = decode.greedy(module, params, encoded, golden.DECODE_LENGTH)
        found[f"{name}_logits"] = np.asarray(logits)
        found[f"{name}_greedy"] = np.asarray(tokens)
    return found


def assert_same_outputs(found, expected):
    for name, x in expected.items():
        if name.endswith("logits"):
            assert np.abs(found[name] - x).max() <= 1e-4, name
            assert np.abs(x).max() > 1
        else:
            width = x.shape[1]
            np.testing.assert_array_equal(found[name][:, :width], x, err_msg=name)


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_outputs_equal_those_of_transformers(family):
    folder = golden.FOLDER / family
    assert_same_outputs(ours(backbones.load(folder)), np.load(folder / "outputs.npz"))


@needs_torch
@pytest.mark.parametrize("family", golden.FAMILIES)
def test_transformers_agrees_live_and_loads_what_is_written(family, tmp_path):
    import transformers

    made = golden.model(family)
    made.save_pretrained(tmp_path / "theirs")
    backbone = backbones.load(tmp_path / "theirs")
    expected = golden.outputs(made)
    assert_same_outputs(ours(backbone), expected)
    convert.convert(str(tmp_path / "theirs"), tmp_path / "ours", "hf")
    again, report = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, x in golden.outputs(again.eval()).items():
        np.testing.assert_allclose(x, expected[name], atol=1e-5)


# --- every pair of formats, bit for bit ---------------------------------------------------------

CONFIGS = {
    "1.1, unequal depths": dict(num_encoder_layers=3, num_decoder_layers=1),
    "1.0, tied": dict(mlp_activations=("relu",), logits_via_embedding=True),
    "other buckets": dict(relative_buckets=16, relative_max_distance=40),
}


PAIRS = list(itertools.permutations(convert.BACKBONES, 2))


def random_stored(dtype="float32", vocabulary=None, **changes) -> Stored:
    cfg = dataclasses.replace(TINY, **changes)
    shapes = {k: x.shape for k, x in tree.flatten(backbones.abstract(cfg)["params"]).items()}
    rng = np.random.default_rng(3)
    params = {k: rng.normal(size=s).astype(dtype) for k, s in shapes.items()}
    params["encoder/layers_0/mlp/wo/kernel"][:] = 0  # zeros must not pass for lost chunks
    return Stored.of("random", cfg, params, vocabulary)


def assert_same_bits(a: Stored, b: Stored):
    assert set(a.shapes) == set(b.shapes)
    for path in a.shapes:
        x, y = np.asarray(a.read(path)), np.asarray(b.read(path))
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), path


@pytest.mark.parametrize("first, second", PAIRS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_every_pair_of_formats_round_trips(first, second, name, dtype, tmp_path):
    stored = random_stored(dtype, **CONFIGS[name])
    distance = stored.cfg.relative_max_distance
    convert.BACKBONES[first](tmp_path / "a", stored)
    to = dict(relative_max_distance=distance)
    convert.convert(str(tmp_path / "a"), tmp_path / "b", second, **to)
    convert.convert(str(tmp_path / "b"), tmp_path / "c", first, **to)
    for folder in "abc":
        found = formats.open_stored(tmp_path / folder, relative_max_distance=distance)
        assert_same_bits(found, stored)
        assert found.cfg.to_json() == stored.cfg.to_json()


def test_what_a_format_cannot_say_is_refused(tmp_path):
    native.save(tmp_path / "a", random_stored(mlp_activations=("silu", "linear")))
    convert.convert(str(tmp_path / "a"), tmp_path / "b", "hf")
    with pytest.raises(ValueError, match="t5x cannot record .*silu"):
        convert.convert(str(tmp_path / "a"), tmp_path / "c", "t5x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_the_vocabulary_comes_along(tmp_path, vocabulary, capsys):
    stored = random_stored(vocabulary=vocabulary)
    native.save(tmp_path / "a", stored)
    convert.convert(str(tmp_path / "a"), tmp_path / "b", "hf")
    convert.convert(str(tmp_path / "b"), tmp_path / "c", "t5x")
    assert "no place for the vocabulary" in capsys.readouterr().out
    assert formats.open_stored(tmp_path / "b").vocabulary == vocabulary
    assert formats.open_stored(tmp_path / "c").vocabulary is None
    assert formats.open_stored(tmp_path / "c", vocabulary.path).vocabulary == vocabulary


def test_bytes_are_a_vocabulary_too(tmp_path):
    stored = random_stored(vocabulary=ByteVocabulary())
    native.save(tmp_path / "a", stored)
    convert.convert(str(tmp_path / "a"), tmp_path / "b", "hf")
    convert.convert(str(tmp_path / "b"), tmp_path / "c", "softprompt")
    for folder in "abc":
        assert formats.open_stored(tmp_path / folder).vocabulary == ByteVocabulary()
    assert backbones.load(golden.FOLDER / "byt5").vocabulary == ByteVocabulary()


def test_large_models_are_written_in_shards(tmp_path, monkeypatch):
    stored = random_stored()
    monkeypatch.setattr(hf, "SHARD_BYTES", 100_000)
    hf.save(tmp_path, stored)
    assert len(list(tmp_path.glob("model-0*.safetensors"))) > 3
    assert_same_bits(formats.open_stored(tmp_path), stored)


def test_a_head_tied_without_scaling_becomes_one_of_its_own(tmp_path):
    """transformers 5 ties every T5's head, and says apart whether its outputs are scaled."""
    shutil.copytree(golden.FOLDER / "t5_1_1", tmp_path / "a")
    tensors = safetensors_numpy.load_file(tmp_path / "a" / hf.MODEL_FILE)
    expected = tensors["shared.weight"]
    del tensors["lm_head.weight"]
    safetensors_numpy.save_file(tensors, tmp_path / "a" / hf.MODEL_FILE)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config |= {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    stored = formats.open_stored(tmp_path / "a")
    assert not stored.cfg.logits_via_embedding
    np.testing.assert_array_equal(stored.read("decoder/logits_dense/kernel"), expected.T)
    # An untied head under a config of transformers 5 keeps its own values.
    shutil.copytree(golden.FOLDER / "t5_1_1", tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    own = safetensors_numpy.load_file(tmp_path / "b" / hf.MODEL_FILE)["lm_head.weight"]
    stored = formats.open_stored(tmp_path / "b")
    np.testing.assert_array_equal(stored.read("decoder/logits_dense/kernel"), own.T)


def test_a_tied_embedding_is_found_under_any_of_its_names(tmp_path):
    shutil.copytree(golden.FOLDER / "t5_1_0", tmp_path / "a")
    expected = formats.open_stored(tmp_path / "a")
    tensors = safetensors_numpy.load_file(tmp_path / "a" / hf.MODEL_FILE)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tensors["decoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    safetensors_numpy.save_file(tensors, tmp_path / "b" / hf.MODEL_FILE)
    assert_same_bits(formats.open_stored(tmp_path / "b"), expected)


def test_a_hub_name_is_found_in_the_users_cache(tmp_path, monkeypatch):
    constants = pytest.importorskip(
        "huggingface_hub.constants", reason="huggingface_hub is not installed"
    )
    place = tmp_path / "models--some--t5"
    shutil.copytree(golden.FOLDER / "flan_t5", place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    stored = formats.open_stored("some/t5")
    assert stored.name == "some/t5" and stored.cfg.num_heads == 6
    with pytest.raises(ValueError, match="'other/t5' .* hub did not give a model"):
        formats.open_stored("other/t5")


def test_loading_takes_a_dtype_and_the_mesh(tmp_path):
    t5x.save(tmp_path, random_stored())
    loaded = backbones.load(tmp_path, "bfloat16")
    assert {x.dtype for x in loaded.params.values()} == {jnp.dtype("bfloat16")}
    assert loaded.fingerprint == backbones.load(tmp_path).fingerprint


@pytest.mark.slow
def test_each_device_holds_its_shard_alone(tmp_path):
    code = (
        "import sys, numpy as np; from softprompt import backbone, partition;"
        "b = backbone.load(sys.argv[1], mesh=partition.make_mesh(2, 4));"
        "x = b.params['token_embedder/embedding'];"
        "print({s.data.shape for s in x.addressable_shards}, len(x.addressable_shards),"
        " b.fingerprint)"
    )
    flags = "--xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, "-c", code, str(golden.FOLDER / "t5_1_1")],
        capture_output=True, text=True, check=True, env={**os.environ, "XLA_FLAGS": flags},
    )  # fmt: skip
    alone = backbones.load(golden.FOLDER / "t5_1_1").fingerprint
    assert run.stdout.strip() == f"{{(24, 24)}} 8 {alone}"


# --- T5X's own checkpoint -----------------------------------------------------------------------


def test_a_checkpoint_that_t5x_wrote_loads():
    folder = folder_of("SOFTPROMPT_TEST_FIXTURES", "a folder with a T5X checkpoint")
    where = folder / "t5x_t5_1_1_tiny" / "checkpoint_3"
    loaded = backbones.load(
        where, vocabulary_file=folder / "t5_vocab.model", relative_max_distance=8
    )
    cfg = loaded.cfg
    assert (cfg.vocab_size, cfg.emb_dim, cfg.num_heads, cfg.head_dim) == (32128, 4, 2, 2)
    assert (cfg.num_encoder_layers, cfg.num_decoder_layers, cfg.mlp_dim) == (2, 2, 8)
    assert (cfg.relative_buckets, cfg.relative_max_distance) == (4, 8)
    assert cfg.mlp_activations == ("gelu", "linear") and not cfg.logits_via_embedding
    assert loaded.vocabulary.size == 32100 and loaded.fingerprint == "c93c9055d1a574e6"


def test_inline_arrays_plain_zarr_and_urls_are_read(tmp_path, monkeypatch):
    import tensorstore as ts

    stored = random_stored()
    t5x.save(tmp_path / "zarr", stored)
    # T5X's oldest versions hold every array in the index itself.
    monkeypatch.setattr(t5x, "INLINE_BYTES", 1 << 40)
    t5x.save(tmp_path / "inline", stored)
    assert [p.name for p in (tmp_path / "inline").iterdir()] == [t5x.INDEX]
    assert_same_bits(formats.open_stored(tmp_path / "inline"), stored)
    # Another chunking, and no compression.
    value = stored.read("token_embedder/embedding")
    place = tmp_path / "zarr" / "target.token_embedder.embedding"
    shutil.rmtree(place)
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{place}/"},
        "metadata": {
            "shape": list(value.shape), "chunks": [1000, 7], "compressor": None, "dtype": "<f4"
        },
    }  # fmt: skip
    ts.open(spec, create=True).result().write(value).result()
    assert_same_bits(formats.open_stored((tmp_path / "zarr").as_uri()), stored)


@pytest.mark.parametrize("name", t5x.PROMPTS)
def test_a_prompt_is_lifted_out_of_a_t5x_checkpoint(name, tmp_path, capsys):
    stored = random_stored()
    array = np.random.default_rng(0).normal(size=(6, TINY.emb_dim)).astype(np.float32)
    params = {path: stored.read(path) for path in stored.shapes} | {name: array}
    t5x.save(tmp_path / "c", Stored.of("with a prompt", stored.cfg, params))
    convert.convert(str(tmp_path / "c"), tmp_path / "p.safetensors", "prompt")
    found, metadata = prompt.load(tmp_path / "p.safetensors")
    np.testing.assert_array_equal(found, array)
    assert metadata["parameter"] == name
    # The backbone beside it loads as ever, and elsewhere lies without it.
    assert_same_bits(formats.open_stored(tmp_path / "c"), stored)
    convert.convert(str(tmp_path / "c"), tmp_path / "hf", "hf")
    assert f"without the prompt {name}: --to prompt writes it" in capsys.readouterr().out
    assert_same_bits(formats.open_stored(tmp_path / "hf"), stored)


# --- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", convert.PROMPTS)
def test_prompts_round_trip(kind, tmp_path):
    array = np.random.default_rng(0).normal(size=(6, 12)).astype(np.float32)
    prompts.write(tmp_path / "a.safetensors", array, {"task": "t"})
    out = tmp_path / f"b{convert.SUFFIXES.get(kind, '')}"
    convert.convert(str(tmp_path / "a.safetensors"), out, kind)
    convert.convert(str(out), tmp_path / "c.safetensors", "prompt")
    for path in (out, tmp_path / "c.safetensors"):
        np.testing.assert_array_equal(prompt.load(path)[0], array)


def test_an_array_of_bfloat16_is_a_prompt(tmp_path):
    array = np.array([[1.5, -2.0], [0.25, 3.0]], ml_dtypes.bfloat16)
    np.save(tmp_path / "p.npy", array)
    found, _ = prompt.load(tmp_path / "p.npy")
    assert found.dtype == np.float32 and np.array_equal(found, array.astype(np.float32))


def test_published_prompts_are_read():
    folder = folder_of("SOFTPROMPT_TEST_FIXTURES", "a folder with published prompts")
    for name in ("mrpc", "rte", "sst2"):
        path = folder / "prompts_t5_1_1_lm100k_base" / f"{name}.npy"
        array, metadata = prompt.load(path)
        assert array.shape == (100, 768) and array.dtype == np.float32 and metadata == {}
        np.testing.assert_array_equal(array, np.load(path))


def write_adapter(folder, rows=8, **changes):
    array = np.random.default_rng(0).normal(size=(rows, 12)).astype(np.float32)
    prompts.write_peft(folder, array, {"backbone": "some/t5"})
    file = folder / prompts.ADAPTER_CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return array


def test_doubled_rows_of_peft_are_halved_and_said(tmp_path, capsys):
    array = write_adapter(tmp_path / "a", num_virtual_tokens=4, num_transformer_submodules=2)
    convert.convert(str(tmp_path / "a"), tmp_path / "p.safetensors", "prompt")
    found, metadata = prompt.load(tmp_path / "p.safetensors")
    np.testing.assert_array_equal(found, array[:4])
    assert metadata["backbone"] == "some/t5"
    assert "only ever uses the first 4" in capsys.readouterr().out


@needs_torch
@needs_peft
@pytest.mark.parametrize("modules", [1, 2])
def test_peft_and_ours_generate_the_same(modules, tmp_path):
    import peft
    import torch

    base = golden.model("t5_1_1")
    base.save_pretrained(tmp_path / "base")
    settings = dict(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=7, num_transformer_submodules=modules
    )
    wrapped = peft.get_peft_model(base, peft.PromptTuningConfig(**settings)).eval()
    wrapped.save_pretrained(tmp_path / "theirs")
    convert.convert(str(tmp_path / "theirs"), tmp_path / "p.safetensors", "prompt")
    convert.convert(str(tmp_path / "p.safetensors"), tmp_path / "again", "peft")
    backbone = backbones.load(tmp_path / "base")
    given = golden.inputs(backbone.cfg.vocab_size, backbone.cfg.emb_dim)
    ids = torch.tensor(given["encoder"]).long()
    array = prompt.load(tmp_path / "p.safetensors")[0]
    flat = {**backbone.params, "prompt/bank": jnp.asarray(array)}
    front = np.tile(slots(backbone.cfg.vocab_size, 7), (len(ids), 1))
    module, params = PromptedT5(backbone.cfg, 7), tree.unflatten(flat)
    rows = jnp.asarray(np.concatenate([front, given["encoder"]], 1))
    encoded = decode.encode(module, params, rows)
    mine = decode.greedy(module, params, encoded, golden.DECODE_LENGTH)
    reread = peft.PeftModel.from_pretrained(golden.model("t5_1_1"), tmp_path / "again").eval()
    for model in (wrapped, reread):
        with torch.no_grad():
            theirs = model.generate(
                input_ids=ids, attention_mask=(ids != 0).long(), do_sample=False,
                max_new_tokens=golden.DECODE_LENGTH,
            ).numpy()[:, 1:]  # fmt: skip
        np.testing.assert_array_equal(np.asarray(mine)[:, : theirs.shape[1]], theirs)


def test_nearest_tokens_are_those_of_largest_cosine(rng):
    embedding = rng.normal(size=(50, 8)).astype(np.float32)
    ids, cosines = analysis.nearest_tokens(3 * embedding[[7, 30]], embedding, 4)
    np.testing.assert_array_equal(ids[:, 0], [7, 30])
    np.testing.assert_allclose(cosines[:, 0], 1, rtol=1e-5)
    assert (np.diff(cosines) <= 0).all()


def test_inspect_shows_what_a_prompt_is(tmp_path, embedded):
    ids = embedded.vocabulary.encode("good")
    array = np.asarray(embedded.params["token_embedder/embedding"])[ids]
    about = {"task": "reviews", "backbone_fingerprint": embedded.fingerprint}
    prompts.write(tmp_path / "p.safetensors", array, about)
    text = "\n".join(convert.inspect(str(tmp_path / "p.safetensors")))
    assert "reviews" in text and f"{embedded.vocabulary.piece(ids[0])} 1.00" in text
    assert '"name": "t5_1_1_embedded"' in "\n".join(convert.inspect("embedded"))


# --- bad input: the file, the numbers, and nothing written -------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def spoil_hf(folder, what):
    config = json.loads((folder / "config.json").read_text())
    tensors = safetensors_numpy.load_file(folder / hf.MODEL_FILE)
    if what == "torn":
        return truncate(folder / hf.MODEL_FILE)
    if what == "width":
        config["d_model"] = 32
    if what == "text":
        config["num_layers"] = "3"
    if what == "index":
        (folder / hf.INDEX_FILE).write_text('{"weight_map": 3}')
    if what == "layers":
        config["num_layers"] = 2
    if what == "kind":
        config["model_type"] = "bert"
    if what == "missing":
        del tensors["decoder.final_layer_norm.weight"]
    if what == "leftover":
        tensors["encoder.adapter.weight"] = np.ones(3, np.float32)
    if what == "no head":
        del tensors["lm_head.weight"]
    if what == "pickled":
        (folder / hf.MODEL_FILE).rename(folder / "pytorch_model.bin")
    else:
        safetensors_numpy.save_file(tensors, folder / hf.MODEL_FILE)
    (folder / "config.json").write_text({"json": "{", "list": "[]"}.get(what) or json.dumps(config))


@pytest.mark.parametrize(
    "what, message",
    [
        ("torn", r"model.safetensors' is torn"),
        ("width", r"decoder_norm/scale has shape \(24,\), expected \(32,\)"),
        ("layers", r"unexpected encoder.block.2.layer.0.SelfAttention.k.weight"),
        ("kind", r"model type 'bert', expected 't5' or 'mt5'"),
        ("missing", r"missing decoder.final_layer_norm.weight"),
        ("leftover", r"unexpected encoder.adapter.weight"),
        ("no head", r"there is no lm_head.weight"),
        ("pickled", r"only pickled \(pytorch_model.bin\)"),
        ("json", r"config.json' is no JSON"),
        ("list", r"config.json' holds a JSON list, expected an object"),
        ("text", r"config.json': num_layers is '3', expected a positive integer"),
        ("index", r"index.json' has no weight_map"),
    ],
)
def test_a_bad_hugging_face_folder_is_named(what, message, tmp_path):
    shutil.copytree(golden.FOLDER / "t5_1_1", tmp_path / "a")
    spoil_hf(tmp_path / "a", what)
    with pytest.raises(ValueError, match=message):
        convert.convert(str(tmp_path / "a"), tmp_path / "b", "t5x")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_vocabulary_too_large_for_the_embedding_is_refused(tmp_path, vocabulary):
    shutil.copytree(golden.FOLDER / "t5_1_1", tmp_path / "a")
    shutil.copy(vocabulary.path, tmp_path / "a" / hf.VOCABULARY_FILE)
    with pytest.raises(ValueError, match=rf"has {vocabulary.size} ids, .* 96 rows"):
        backbones.load(tmp_path / "a")


def test_tokens_beside_the_vocabulary_are_not_left_out_silently(tmp_path, vocabulary):
    hf.save(tmp_path, random_stored(vocabulary=vocabulary))
    size = vocabulary.size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra_id_0>": size - 1}))
    assert formats.open_stored(tmp_path).vocabulary == vocabulary
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"added_tokens_decoder": {str(size): {"content": "<="}}}))
    with pytest.raises(ValueError, match="its tokenizer has '<=' beyond the pieces of its Sen"):
        formats.open_stored(tmp_path)
    found = formats.open_stored(tmp_path, tmp_path / "spiece.model")
    assert found.vocabulary == vocabulary
    # What is of another form, or null, says nothing.
    file.write_text(json.dumps(config | {"added_tokens_decoder": {str(size): "<="}}))
    sizes = json.loads((tmp_path / "config.json").read_text()) | {"d_kv": None}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    assert formats.open_stored(tmp_path).cfg.head_dim == 64


def test_a_torn_t5x_checkpoint_is_named(tmp_path):
    t5x.save(tmp_path / "a", random_stored())
    name = "target.token_embedder.embedding"
    for spoil, message in (
        (lambda f: (f / name / "0.0").unlink(), rf"{name}' has \d chunks, expected 2"),
        (lambda f: truncate(f / name / "0.0"), rf"{name}' is torn"),
        (lambda f: truncate(f / t5x.INDEX), r"checkpoint' is torn or no T5X index"),
        (lambda f: shutil.rmtree(f / name), rf"{name}' is missing or torn"),
    ):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        spoil(tmp_path / "b")
        with pytest.raises(checkpoint.CorruptFile, match=message):
            convert.convert(str(tmp_path / "b"), tmp_path / "c", "hf")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    for target in (3, {"x": {"driver": "zarr"}}):
        (tmp_path / "b" / t5x.INDEX).write_bytes(msgpack.packb({"target": target}))
        with pytest.raises(checkpoint.CorruptFile, match="b/checkpoint' is no T5X index"):
            formats.open_stored(tmp_path / "b")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(peft_type="LORA"), "type 'LORA', expected 'PROMPT_TUNING'"),
        (dict(num_virtual_tokens=5), r"shape \(8, 12\), its adapter_config.json says \(5, 12\)"),
        (dict(token_dim=16), r"says \(8, 16\)"),
        (dict(num_virtual_tokens=None), "num_virtual_tokens is None, expected an integer"),
    ],
)
def test_a_bad_adapter_is_named(changes, message, tmp_path):
    write_adapter(tmp_path / "a", **changes)
    with pytest.raises(ValueError, match=message):
        convert.convert(str(tmp_path / "a"), tmp_path / "p.safetensors", "prompt")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a", "x", "--to", "npy"], "'x' should end with '.npy'"),
        (["a", "x.npy", "--to", "npy"], "'a' holds no prompt"),
        (["p.npy", "x", "--to", "hf"], "'p.npy' is a prompt, --to hf is for backbones"),
        (["nowhere", "x", "--to", "hf"], "does not exist"),
        (["p.npy", "a", "--to", "peft"], "'a' exists already"),
        (["p.npy", "x", "--to", "peft", "--dtype", "int8"], "--dtype has no meaning"),
        (["a", "x", "--to", "hf", "--dtype", "int8"], "cannot store weights as 'int8'"),
        (["p.npy", "x", "--to", "peft", "--backbone", "a"], "has width 5, the backbone"),
        (["p.npy", "p.npy/x", "--to", "peft"], "cannot write 'p.npy/x'"),
        (["a", "x", "--to", "softprompt", "--vocabulary_file", "no.model"], "no.model"),
        (["a", "nowhere/x", "--to", "hf"], None),
    ],
)
def test_convert_names_what_is_wrong(arguments, message, tmp_path, monkeypatch, capsys):
    from softprompt.__main__ import main

    monkeypatch.chdir(tmp_path)
    shutil.copytree(golden.FOLDER / "t5_1_1", tmp_path / "a")
    np.save(tmp_path / "p.npy", np.ones((3, 5), np.float32))
    assert main(["convert", *arguments]) == (0 if message is None else 2)
    if message is not None:
        assert message in capsys.readouterr().err
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "p.npy"]


# --- memory -------------------------------------------------------------------------------------

MEASURE = """
import re, sys
import jax
from softprompt import backbone
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
jax.block_until_ready(jax.numpy.ones(3))
before = peak()
loaded = backbone.load(sys.argv[1], sys.argv[2])
print(before, peak(), sum(x.nbytes for x in loaded.params.values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("kind", convert.BACKBONES)
def test_loading_holds_each_tensor_once(kind, tmp_path):
    """0.2 GB here; `benchmarks/loading.py` measures T5 1.1 large."""
    cfg = dataclasses.replace(
        t5_config.config("t5_1_1_small"), num_encoder_layers=4, num_decoder_layers=2
    )
    shapes = {k: x.shape for k, x in tree.flatten(backbones.abstract(cfg)["params"]).items()}
    params = {k: np.full(s, 0.5, np.float32) for k, s in shapes.items()}
    convert.BACKBONES[kind](tmp_path / "a", Stored.of("small", cfg, params))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "a"), "float32"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    before, peak, size = map(int, run.stdout.split())
    assert size < peak - before <= 1.2 * size + 200e6, (before, peak, size)
