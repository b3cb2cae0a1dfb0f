"""Small random models of each T5 family, written by Hugging Face's transformers, and their outputs.

    pip install torch "transformers<5" && python tests/goldens/hf.py

writes a folder for each family beside this file, in `hf/`: what `save_pretrained` gives, and
`outputs.npz` with logits and greedy tokens of the PyTorch model, padding and a prompt included.
tests/test_formats.py compares ours with them always, and where torch is installed with a fresh run.
"""

import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "hf"
# Heads times their width differ from the model's; depths differ where the family's do.
COMMON = dict(
    vocab_size=96, d_model=24, d_kv=8, d_ff=40, num_heads=4, num_layers=3, num_decoder_layers=3
)
FAMILIES = {
    "t5_1_0": dict(feed_forward_proj="relu"),
    "t5_1_1": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    # An LM-adapted T5 1.1 is a T5 1.1; Flan-T5 too, and its config names the activation apart.
    "flan_t5": dict(
        feed_forward_proj="gated-gelu", dense_act_fn="gelu_new", tie_word_embeddings=False,
        num_layers=2, num_decoder_layers=2, num_heads=6,
    ),
    "mt5": dict(vocab_size=250, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "byt5": dict(
        vocab_size=384, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        num_layers=4, num_decoder_layers=1, tokenizer_class="ByT5Tokenizer",
    ),
}  # fmt: skip
DECODE_LENGTH = 12


def inputs(vocab_size: int, width: int) -> dict[str, np.ndarray]:
    """Encoder ids with padding, past the last relative buckets; decoder inputs; a prompt."""
    rng = np.random.default_rng(11)
    encoder = rng.integers(2, vocab_size, (3, 140)).astype(np.int32)
    for row, length in enumerate((140, 60, 5)):
        encoder[row, length:] = 0
    decoder = rng.integers(2, vocab_size, (3, 9)).astype(np.int32)
    decoder[:, 0] = 0
    prompt = rng.normal(size=(7, width)).astype(np.float32)
    return {"encoder": encoder, "decoder": decoder, "prompt": prompt}


def model(family: str):
    """A random model, its parameters large enough for outputs to differ."""
    import torch
    import transformers

    settings = {**COMMON, **FAMILIES[family]}
    kind = "MT5" if family == "mt5" else "T5"
    config = getattr(transformers, f"{kind}Config")(
        **settings, decoder_start_token_id=0, dropout_rate=0.0
    )
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for name, x in made.named_parameters():
            if "layer_norm" in name:
                x.add_(torch.randn_like(x) / 5)
            elif "relative_attention_bias" in name or "lm_head" in name:
                x.copy_(torch.randn_like(x))
            elif x.ndim == 2 and "shared" not in name:
                x.copy_(torch.randn_like(x) / x.shape[1] ** 0.5)
    return made


def outputs(made) -> dict[str, np.ndarray]:
    """Logits and greedy tokens of a PyTorch model, with and without the prompt."""
    import torch

    given = inputs(made.config.vocab_size, made.config.d_model)
    ids = torch.tensor(given["encoder"]).long()
    mask = (ids != 0).long()
    embedded = made.get_input_embeddings()(ids)
    prompt = torch.tensor(given["prompt"])[None].expand(len(ids), -1, -1)
    prompted = torch.cat([prompt, embedded], 1)
    wide = torch.cat([torch.ones(len(ids), prompt.shape[1], dtype=mask.dtype), mask], 1)
    found = {}
    with torch.no_grad():
        for name, x, m in (("plain", embedded, mask), ("prompted", prompted, wide)):
            decoder = torch.tensor(given["decoder"]).long()
            logits = made(inputs_embeds=x, attention_mask=m, decoder_input_ids=decoder).logits
            tokens = made.generate(
                inputs_embeds=x, attention_mask=m, max_new_tokens=DECODE_LENGTH, do_sample=False,
                num_beams=1,
            )  # fmt: skip
            found[f"{name}_logits"] = logits.numpy()
            found[f"{name}_greedy"] = tokens.numpy()[:, 1:].astype(np.int32)
    return found


if __name__ == "__main__":
    for family in FAMILIES:
        made = model(family)
        made.save_pretrained(FOLDER / family)
        np.savez_compressed(FOLDER / family / "outputs.npz", **outputs(made))
