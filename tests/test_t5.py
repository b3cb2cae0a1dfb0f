"""T5 against an independent implementation's logits, and the model's own invariants."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS, TINY, golden
from test_decode import equations

from softprompt import backbone as backbones
from softprompt import losses, partition, products, t5, t5_config, t5_layers, tree
from softprompt.prompted import PromptedT5


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("family", golden.FAMILIES)
def test_logits_equal_those_of_hugging_face(family, prompted):
    cfg = t5_config.T5Config(**golden.SIZES, **golden.FAMILIES[family])
    given = golden.inputs()
    rows = len(given["prompt"]) if prompted else 0
    shapes = tree.flatten(backbones.abstract(cfg)["params"])
    params = {path: golden.draw(path, x.shape) for path, x in shapes.items()}
    ids = given["encoder"]
    if prompted:
        params["prompt/bank"] = given["prompt"]
        slots = np.tile(cfg.vocab_size + np.arange(rows, dtype=np.int32), (len(ids), 1))
        ids = np.concatenate([slots, ids], axis=1)
    with jax.default_matmul_precision("float32"):
        logits = PromptedT5(cfg, rows).apply(
            {"params": tree.unflatten(params)}, ids, given["decoder"]
        )
    expected = np.load(GOLDENS / "t5.npz")[family + ("_prompted" if prompted else "")]
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_paths_and_axes_are_those_of_t5x():
    variables = backbones.abstract(TINY)
    params = tree.flatten(variables["params"])
    axes = {p.removesuffix("_axes"): a for p, a in tree.flatten(variables["params_axes"]).items()}
    assert params.keys() == axes.keys()
    some = {
        "token_embedder/embedding": ("vocab", "embed"),
        "encoder/relpos_bias/rel_embedding": ("heads", "relpos_buckets"),
        "encoder/layers_0/pre_attention_layer_norm/scale": ("embed",),
        "encoder/layers_0/attention/query/kernel": ("embed", "joined_kv"),
        "encoder/layers_2/attention/out/kernel": ("joined_kv", "embed"),
        "encoder/layers_1/mlp/wi_0/kernel": ("embed", "mlp"),
        "encoder/layers_1/mlp/wo/kernel": ("mlp", "embed"),
        "encoder/encoder_norm/scale": ("embed",),
        "decoder/layers_0/encoder_decoder_attention/key/kernel": ("embed", "joined_kv"),
        "decoder/layers_1/pre_cross_attention_layer_norm/scale": ("embed",),
        "decoder/decoder_norm/scale": ("embed",),
        "decoder/logits_dense/kernel": ("embed", "vocab"),
    }
    assert {p: tuple(axes[p].names) for p in some} == some


@pytest.mark.parametrize(
    "size, millions",
    # As published (Raffel et al. 2020, section 3.7; the T5 1.1 releases), with 32,128 rows.
    [("t5_small", 61), ("t5_base", 223), ("t5_large", 738), ("t5_xl", 2852), ("t5_xxl", 11307),
     ("t5_1_1_small", 77), ("t5_1_1_base", 248), ("t5_1_1_large", 783), ("t5_1_1_xl", 2850),
     ("t5_1_1_xxl", 11135)],
)  # fmt: skip
def test_sizes_have_the_published_number_of_parameters(size, millions):
    count = tree.count(tree.flatten(backbones.abstract(t5_config.config(size))["params"]))
    assert round(count / 1e6) == millions


def test_padding_and_other_rows_change_nothing(tiny):
    module, params = PromptedT5(tiny.cfg), {"params": tree.unflatten(tiny.params)}
    ids = jnp.array([[5, 9, 7, 1], [8, 2, 1, 0]])
    out = jnp.array([[0, 4, 6], [0, 3, 5]])
    together = module.apply(params, ids, out)
    alone = module.apply(params, ids[1:, :3], out[1:])
    wider = module.apply(params, jnp.pad(ids, ((0, 0), (0, 5))), out)
    np.testing.assert_allclose(together[1], alone[0], atol=1e-5)
    np.testing.assert_allclose(together, wider, atol=1e-5)


def test_the_decoder_sees_no_later_token(tiny):
    module, params = PromptedT5(tiny.cfg), {"params": tree.unflatten(tiny.params)}
    ids = jnp.array([[5, 9, 7, 1]])
    one = module.apply(params, ids, jnp.array([[0, 4, 6, 8]]))
    other = module.apply(params, ids, jnp.array([[0, 4, 7, 2]]))
    np.testing.assert_allclose(one[:, :2], other[:, :2], atol=1e-6)
    assert np.abs(one[:, 2] - other[:, 2]).max() > 1e-3


def test_packed_segments_give_what_separate_rows_give(tiny):
    """Two prompted examples in one row: a block each, behind prompts of their own."""
    rows, vocab = 5, tiny.cfg.vocab_size
    bank = np.random.default_rng(0).normal(size=(rows, tiny.cfg.emb_dim)).astype(np.float32)
    module = PromptedT5(tiny.cfg, rows)
    params = {"params": tree.unflatten({**tiny.params, "prompt/bank": bank})}
    first = jnp.array([[vocab, vocab + 1, 5, 9, 1]])
    second = jnp.array([[vocab + 2, vocab + 3, vocab + 4, 7, 8, 6, 1]])
    outs = jnp.array([[0, 4]]), jnp.array([[0, 3, 11]])
    packed = module.apply(
        params,
        jnp.concatenate([first, second], 1),
        jnp.concatenate(outs, 1),
        jnp.array([[1] * 5 + [2] * 7]),
        jnp.array([[1] * 2 + [2] * 3]),
    )
    alone = [module.apply(params, i, o) for i, o in zip((first, second), outs, strict=True)]
    np.testing.assert_allclose(packed, jnp.concatenate(alone, 1), atol=1e-5)


def test_slots_read_the_bank_wherever_they_stand(tiny):
    """A bank row equal to a token's embedding is that token, in front or in the middle."""
    embedding = np.asarray(tiny.params["token_embedder/embedding"])
    bank = embedding[[5, 42]]
    plain = PromptedT5(tiny.cfg).apply(
        {"params": tree.unflatten(tiny.params)}, jnp.array([[5, 9, 42, 1]]), jnp.array([[0, 4]])
    )
    vocab = tiny.cfg.vocab_size
    slotted = PromptedT5(tiny.cfg, 2).apply(
        {"params": tree.unflatten({**tiny.params, "prompt/bank": bank})},
        jnp.array([[vocab, 9, vocab + 1, 1]]),
        jnp.array([[0, 4]]),
    )
    np.testing.assert_array_equal(plain, slotted)


def test_a_layer_is_traced_once_for_all_layers_of_a_stack(tiny, monkeypatch):
    seen, activated = [], t5_layers._activated
    monkeypatch.setattr(t5_layers, "_activated", lambda *a: (seen.append(a), activated(*a))[1])
    cfg, params = tiny.cfg, tree.unflatten(tiny.params)
    ids = jax.ShapeDtypeStruct((2, 7), jnp.int32)
    jax.eval_shape(lambda x: PromptedT5(cfg).apply({"params": params}, x, x), ids)
    assert cfg.num_encoder_layers > 1 and cfg.num_decoder_layers > 1
    assert len(seen) == 2  # One encoder layer and one decoder layer.


@pytest.mark.parametrize("direct", [False, True])
def test_attention_and_its_gradient_are_those_of_a_softmax_over_weights(direct):
    layer = t5_layers.Attention(TINY)
    x, source, cotangent = (
        jax.random.normal(jax.random.key(i), (2, n, TINY.emb_dim)) for i, n in enumerate((4, 6, 4))
    )
    bias = 3 * jax.random.normal(jax.random.key(3), (2, TINY.num_heads, 4, 6))
    bias = bias.at[0, :, :, 4:].set(t5.MASKED)
    kept = jax.random.bernoulli(jax.random.key(4), 0.7, (2, TINY.num_heads, 1, 6))
    params = layer.init(
        jax.random.key(5), x, source, bias, method=lambda m, x, s, b: m(x, m.keys_values(s), b)
    )
    cfg = dataclasses.replace(TINY, dropout_rate=0.3)
    layer, way = t5_layers.Attention(cfg), "direct" if direct else "keys_values"

    def ours(x, source, bias):
        run = lambda m: m(x, getattr(m, way)(source), bias, kept)  # noqa: E731
        return (layer.apply(params, method=run) * cotangent).sum()

    def plain(x, source, bias):
        kernels = params["params"]

        def heads(name, x):
            return (x @ kernels[name]["kernel"]).reshape(*x.shape[:2], TINY.num_heads, -1)

        q, k, v = heads("query", x), heads("key", source), heads("value", source)
        weights = jax.nn.softmax(jnp.einsum("bqad,bsad->baqs", q, k) + bias) * kept / 0.7
        y = jnp.einsum("baqs,bsad->bqad", weights, v).reshape(2, 4, -1)
        return (y @ kernels["out"]["kernel"] * cotangent).sum()

    found = jax.value_and_grad(ours, argnums=(0, 1, 2))(x, source, bias)
    expected = jax.value_and_grad(plain, argnums=(0, 1, 2))(x, source, bias)
    assert float(jnp.abs(expected[1][2]).max()) > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_few_queries_find_without_keys_and_values_what_many_find_with_them(weights):
    mesh = partition.make_mesh(devices=1)
    flat = dict(backbones.random(TINY, 1, mesh=mesh, weights=weights).params)
    bank = np.random.default_rng(0).normal(size=(3, TINY.emb_dim)).astype(np.float32)
    module = PromptedT5(TINY, 3)
    ids = jnp.array(
        [[*range(TINY.vocab_size, TINY.vocab_size + 3), 5, 9, 1, 0], [8, 2, 1] + [0] * 4]
    )
    out = jnp.array([[0, 4, 6], [0, 3, 5]])

    @jax.jit
    def logits(bank, out):
        return module.apply({"params": tree.unflatten({**flat, "prompt/bank": bank})}, ids, out)

    grad = jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(logits(*x)[:, :3]))))
    found = []
    # What follows a position changes nothing there, but more positions are no longer few.
    for length in (3, 40):
        assert t5_layers.few(TINY, length) == (length == 3)
        padded = jnp.pad(out, ((0, 0), (0, length - 3)))
        found.append((logits(bank, padded)[:, :3], grad(bank, padded)))
    for few, many in zip(*found, strict=True):
        np.testing.assert_allclose(few, many, rtol=1e-4, atol=1e-5 * np.abs(many).max())
    assert np.abs(found[0][1]).max() > 1e-3


def test_bfloat16_activations_give_float32_logits(tiny):
    cfg = dataclasses.replace(tiny.cfg, dtype=jnp.bfloat16)
    params = {"params": tree.unflatten(tiny.params)}
    ids, out = jnp.array([[5, 9, 7, 1]]), jnp.array([[0, 4]])
    half = PromptedT5(cfg).apply(params, ids, out)
    full = PromptedT5(tiny.cfg).apply(params, ids, out)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, full, atol=0.1 * float(jnp.abs(full).max()))


# --- losses -------------------------------------------------------------------------------------


def test_cross_entropy_masks_padding_and_divides_nothing():
    logits = jnp.array([[[2.0, 0.0, 1.0], [0.0, 3.0, 0.0], [9.0, 0.0, 0.0]]])
    targets = jnp.array([[2, 1, 0]])
    loss, count = losses.cross_entropy(logits, targets)
    log_p = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(loss, -(log_p[0, 0, 2] + log_p[0, 1, 1]), rtol=1e-6)
    assert count == 2
    smoothed, _ = losses.cross_entropy(logits, targets, label_smoothing=0.3)
    uniform = -(log_p[0, 0].mean() + log_p[0, 1].mean())
    np.testing.assert_allclose(smoothed, 0.7 * loss + 0.3 * uniform, rtol=1e-5)
    with_z, _ = losses.cross_entropy(logits, targets, z_loss=0.1)
    z = jax.nn.logsumexp(logits[0, :2], axis=-1)
    np.testing.assert_allclose(with_z, loss + 0.1 * (z**2).sum(), rtol=1e-5)


def test_decoder_inputs_start_with_padding():
    np.testing.assert_array_equal(losses.shift_right(jnp.array([[4, 5, 1]])), [[0, 4, 5]])


SPECS = (
    ("btk,kn->btn", (3, 5, 8), (8, 6)),
    ("baqd,basd->baqs", (3, 2, 4, 8), (3, 2, 5, 8)),
    ("baqd,ahd->baqh", (3, 2, 4, 8), (2, 16, 8)),
    ("baqh,ahd->baqd", (3, 2, 4, 16), (2, 16, 8)),
    ("baqd,adh->baqh", (3, 2, 4, 8), (2, 8, 16)),
    ("baqh,bhs->baqs", (3, 2, 4, 16), (3, 16, 5)),
    ("baqs,bsh->baqh", (3, 2, 4, 5), (3, 5, 16)),
)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("spec, of_x, of_y", SPECS)
def test_a_product_by_itself_and_its_gradients_are_those_of_einsum(spec, of_x, of_y, dtype):
    out = jax.eval_shape(lambda x, y: jnp.einsum(spec, x, y), jnp.ones(of_x), jnp.ones(of_y)).shape
    x, y, weights = (
        jax.random.normal(jax.random.key(i), shape, dtype)
        for i, shape in enumerate((of_x, of_y, out))
    )

    def ours(x, y):
        return (products.product(spec, x, y, dtype) * weights).sum()

    def plain(x, y):
        return (jnp.einsum(spec, x, y) * weights).sum()

    found = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(x, y)
    wide = [a.astype(jnp.float32) for a in (x, y)]
    expected = jax.value_and_grad(plain, argnums=(0, 1))(*wide)
    near = 1e-5 if dtype == jnp.float32 else 0.02
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=near, atol=near * np.abs(b).max() + 10 * near)


def test_gradients_of_many_prompts_share_an_int8_matrix(rng):
    values = jnp.asarray(rng.integers(-127, 128, (5, 6)), jnp.int8)
    scale, x = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in (6, (3, 2, 4, 5)))

    def loss(x):
        y = products.int8_product("btk,kn->btn", x, values, scale, jnp.float32)
        return jnp.sum(jnp.sin(0.01 * y))

    grad = jax.vmap(jax.grad(loss))
    made = [y.aval for e in equations(jax.make_jaxpr(grad)(x).jaxpr) for y in e.outvars]
    assert {y.shape for y in made if y.dtype == jnp.int8 and y.size > 1} == {(5, 6)}
    np.testing.assert_allclose(grad(x), jnp.stack([jax.grad(loss)(one) for one in x]), rtol=1e-5)


def test_a_padded_row_is_a_number_in_float16_too(tiny):
    flat = tree.unflatten(tiny.params)
    ids = np.array([[5, 9, 7, 1], [8, 1, 0, 0], [0, 0, 0, 0]], np.int32)
    targets = np.array([[4, 6, 1]] * 3, np.int32)
    wide = PromptedT5(tiny.cfg).apply({"params": flat}, ids, targets)
    narrow = PromptedT5(dataclasses.replace(tiny.cfg, dtype=jnp.float16))
    params = jax.tree.map(lambda x: x.astype(jnp.float16), flat)
    found = narrow.apply({"params": params}, ids, targets)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:2], wide[:2], atol=0.02 * np.abs(wide).max())
