"""The sizes of a T5: what a configuration says, and those that were released, by name."""

import dataclasses
from typing import Any

import jax.numpy as jnp

# What the backward pass recomputes: activation functions; all but dense layers; whole layers.
REMAT = ("none", "minimal", "full")
# Fields of `T5Config` that belong to a run, not to the architecture.
RUN_FIELDS = ("dropout_rate", "dtype", "remat")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5. `vocab_size` counts embedding rows, padding rows included."""

    vocab_size: int
    emb_dim: int
    num_heads: int
    num_encoder_layers: int
    num_decoder_layers: int
    head_dim: int
    mlp_dim: int
    # ("gelu", "linear") is T5 1.1's gated GELU, ("relu",) is T5 1.0.
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    # T5 1.0 reads logits off the embedding, scaled by 1/sqrt(H).
    logits_via_embedding: bool = False
    # Number of relative-position buckets, and the distance from which all share the last one.
    relative_buckets: int = 32
    relative_max_distance: int = 128
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    # One of `REMAT`.
    remat: str = "none"

    def to_json(self) -> dict[str, Any]:
        """The architecture alone (no dropout, dtype or remat), as plain JSON values."""
        sizes = dataclasses.asdict(self)
        for name in RUN_FIELDS:
            del sizes[name]
        sizes["mlp_activations"] = list(self.mlp_activations)
        return sizes

    @classmethod
    def from_json(cls, sizes: dict[str, Any], **overrides) -> "T5Config":
        """Inverse of `to_json`; unknown or missing names are an error naming them."""
        fields = [f for f in dataclasses.fields(cls) if f.name not in RUN_FIELDS]
        names = {f.name for f in fields}
        required = {f.name for f in fields if f.default is dataclasses.MISSING}
        unknown, missing = sorted(set(sizes) - names), sorted(required - set(sizes))
        if unknown or missing:
            raise ValueError(
                f"not a T5 architecture: unknown names {unknown}, missing names {missing}"
            )
        if "mlp_activations" in sizes:
            sizes = dict(sizes, mlp_activations=tuple(sizes["mlp_activations"]))
        return cls(**sizes, **overrides)


def _t5_1_1(emb_dim, num_heads, layers, head_dim, mlp_dim, vocab_size=32128) -> T5Config:
    encoder_layers, decoder_layers = layers if isinstance(layers, tuple) else (layers, layers)
    return T5Config(
        vocab_size, emb_dim, num_heads, encoder_layers, decoder_layers, head_dim, mlp_dim
    )


def _t5_1_0(emb_dim, num_heads, layers, head_dim, mlp_dim) -> T5Config:
    return T5Config(
        32128, emb_dim, num_heads, layers, layers, head_dim, mlp_dim,
        mlp_activations=("relu",), logits_via_embedding=True,
    )  # fmt: skip


# H, heads, layers, head width, MLP width. Raffel et al. 2020, section 3.7, and the released
# configurations of T5 and T5 1.1. The three with a small vocabulary are this project's own family.
SIZES = {
    "t5_1_1_small": _t5_1_1(512, 6, 8, 64, 1024),
    "t5_1_1_base": _t5_1_1(768, 12, 12, 64, 2048),
    "t5_1_1_large": _t5_1_1(1024, 16, 24, 64, 2816),
    "t5_1_1_xl": _t5_1_1(2048, 32, 24, 64, 5120),
    "t5_1_1_xxl": _t5_1_1(4096, 64, 24, 64, 10240),
    "t5_small": _t5_1_0(512, 8, 6, 64, 2048),
    "t5_base": _t5_1_0(768, 12, 12, 64, 3072),
    "t5_large": _t5_1_0(1024, 16, 24, 64, 4096),
    "t5_xl": _t5_1_0(1024, 32, 24, 128, 16384),
    "t5_xxl": _t5_1_0(1024, 128, 24, 128, 65536),
    "t5_1_1_nano": _t5_1_1(128, 2, (4, 2), 64, 256, vocab_size=8192),
    "t5_1_1_embedded": _t5_1_1(256, 4, (4, 2), 64, 512, vocab_size=8192),
    "t5_1_1_mini": _t5_1_1(512, 6, (6, 2), 64, 1024, vocab_size=8192),
}


def config(size: str, dropout_rate: float = 0.0, dtype: Any = jnp.float32) -> T5Config:
    """The configuration of a named size (a key of `SIZES`)."""
    if not isinstance(size, str) or size not in SIZES:
        raise ValueError(f"unknown T5 size {size!r}; choose one of {', '.join(SIZES)}")
    return dataclasses.replace(SIZES[size], dropout_rate=dropout_rate, dtype=jnp.dtype(dtype))
