"""Logits of two small T5s, computed by Hugging Face's PyTorch implementation.

    pip install torch transformers && python tests/goldens/t5.py

writes `t5.npz` beside this file. Weights are drawn from each parameter's path, so that only inputs
and logits are stored; tests/test_t5.py draws the same ones.
"""

import pathlib
import zlib

import numpy as np

SIZES = dict(
    vocab_size=61,
    emb_dim=24,
    num_heads=4,
    num_encoder_layers=3,
    num_decoder_layers=2,
    head_dim=8,
    mlp_dim=40,
)
FAMILIES = {
    "t5_1_0": dict(mlp_activations=("relu",), logits_via_embedding=True),
    "t5_1_1": dict(mlp_activations=("gelu", "linear"), logits_via_embedding=False),
}


def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of the parameter at `path`, of the size that T5's own initialisers give."""
    x = np.random.default_rng(zlib.crc32(path.encode())).normal(size=shape).astype(np.float32)
    if path.endswith("scale"):
        return 1 + x / 10
    return x if "embedding" in path else x / np.sqrt(np.float32(shape[0]))


def inputs() -> dict[str, np.ndarray]:
    """Encoder ids with padding, long enough for the last relative buckets; decoder ids."""
    rng = np.random.default_rng(7)
    encoder = rng.integers(2, SIZES["vocab_size"], (3, 150)).astype(np.int32)
    for row, length in enumerate((150, 90, 7)):
        encoder[row, length:] = 0
    decoder = rng.integers(2, SIZES["vocab_size"], (3, 40)).astype(np.int32)
    decoder[:, 0] = 0
    prompt = rng.normal(size=(5, SIZES["emb_dim"])).astype(np.float32)
    return {"encoder": encoder, "decoder": decoder, "prompt": prompt}


# Ours -> theirs; a kernel is the transpose of a PyTorch weight.
ENCODER = {
    "pre_attention_layer_norm/scale": "layer.0.layer_norm.weight",
    "attention/query/kernel": "layer.0.SelfAttention.q.weight",
    "attention/key/kernel": "layer.0.SelfAttention.k.weight",
    "attention/value/kernel": "layer.0.SelfAttention.v.weight",
    "attention/out/kernel": "layer.0.SelfAttention.o.weight",
    "pre_mlp_layer_norm/scale": "layer.1.layer_norm.weight",
    "mlp/wi/kernel": "layer.1.DenseReluDense.wi.weight",
    "mlp/wi_0/kernel": "layer.1.DenseReluDense.wi_0.weight",
    "mlp/wi_1/kernel": "layer.1.DenseReluDense.wi_1.weight",
    "mlp/wo/kernel": "layer.1.DenseReluDense.wo.weight",
}
DECODER = {
    "pre_self_attention_layer_norm/scale": "layer.0.layer_norm.weight",
    "self_attention/query/kernel": "layer.0.SelfAttention.q.weight",
    "self_attention/key/kernel": "layer.0.SelfAttention.k.weight",
    "self_attention/value/kernel": "layer.0.SelfAttention.v.weight",
    "self_attention/out/kernel": "layer.0.SelfAttention.o.weight",
    "pre_cross_attention_layer_norm/scale": "layer.1.layer_norm.weight",
    "encoder_decoder_attention/query/kernel": "layer.1.EncDecAttention.q.weight",
    "encoder_decoder_attention/key/kernel": "layer.1.EncDecAttention.k.weight",
    "encoder_decoder_attention/value/kernel": "layer.1.EncDecAttention.v.weight",
    "encoder_decoder_attention/out/kernel": "layer.1.EncDecAttention.o.weight",
    "pre_mlp_layer_norm/scale": "layer.2.layer_norm.weight",
    "mlp/wi/kernel": "layer.2.DenseReluDense.wi.weight",
    "mlp/wi_0/kernel": "layer.2.DenseReluDense.wi_0.weight",
    "mlp/wi_1/kernel": "layer.2.DenseReluDense.wi_1.weight",
    "mlp/wo/kernel": "layer.2.DenseReluDense.wo.weight",
}
BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
TOP = {
    "token_embedder/embedding": "shared.weight",
    "decoder/logits_dense/kernel": "lm_head.weight",
    "encoder/encoder_norm/scale": "encoder.final_layer_norm.weight",
    "decoder/decoder_norm/scale": "decoder.final_layer_norm.weight",
    "encoder/relpos_bias/rel_embedding": f"encoder.{BIAS}",
    "decoder/relpos_bias/rel_embedding": f"decoder.{BIAS}",
}


def our_path(theirs: str) -> str | None:
    """Our path of a PyTorch parameter; None for a second name of the embedding."""
    for ours, name in TOP.items():
        if name == theirs:
            return ours
    if theirs.endswith("embed_tokens.weight"):
        return None
    stack, _, block, rest = theirs.split(".", 3)
    table = ENCODER if stack == "encoder" else DECODER
    [ours] = [ours for ours, name in table.items() if name == rest]
    return f"{stack}/layers_{block}/{ours}"


def logits(family: str, prompted: bool) -> np.ndarray:
    """Logits `[B, L, V]` of the PyTorch model."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    settings = FAMILIES[family]
    tied = settings["logits_via_embedding"]
    config = T5Config(
        vocab_size=SIZES["vocab_size"],
        d_model=SIZES["emb_dim"],
        d_kv=SIZES["head_dim"],
        d_ff=SIZES["mlp_dim"],
        num_layers=SIZES["num_encoder_layers"],
        num_decoder_layers=SIZES["num_decoder_layers"],
        num_heads=SIZES["num_heads"],
        feed_forward_proj="relu" if tied else "gated-gelu",
        tie_word_embeddings=tied,
        dropout_rate=0.0,
    )
    model = T5ForConditionalGeneration(config).eval()
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            path = our_path(name)
            if path is None:
                continue
            transposed = path.endswith("kernel") or path.endswith("rel_embedding")
            shape = tuple(weight.shape)[::-1] if transposed else tuple(weight.shape)
            value = draw(path, shape)
            weight.copy_(torch.from_numpy(value.T.copy() if transposed else value))
        given = inputs()
        ids = torch.from_numpy(given["encoder"]).long()
        embedded = model.shared(ids)
        mask = (ids > 0).long()
        if prompted:
            rows = torch.from_numpy(given["prompt"]).expand(len(ids), -1, -1)
            embedded = torch.cat([rows, embedded], dim=1)
            mask = torch.cat([torch.ones(len(ids), rows.shape[1], dtype=mask.dtype), mask], dim=1)
        return model(
            inputs_embeds=embedded,
            attention_mask=mask,
            decoder_input_ids=torch.from_numpy(given["decoder"]).long(),
        ).logits.numpy()


if __name__ == "__main__":
    arrays = {
        f"{family}{'_prompted' if prompted else ''}": logits(family, prompted)
        for family in FAMILIES
        for prompted in (False, True)
    }
    np.savez_compressed(pathlib.Path(__file__).with_suffix(".npz"), **arrays)
