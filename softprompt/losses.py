"""Losses as weighted sums and counts: padding is masked, the caller divides once."""

import jax
import jax.numpy as jnp

Array = jax.Array


def token_log_likelihood(logits: Array, targets: Array) -> Array:
    """Log-probability `[B, L]` of `targets` `[B, L]` under `logits` `[B, L, V]`, in float32."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def cross_entropy(
    logits: Array, targets: Array, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Array, Array]:
    """Summed cross-entropy in nats and the number of target tokens (those `> 0`).

    Args:
      logits: `[B, L, V]`.
      targets: `[B, L]`, 0 is padding.
      z_loss: weight of `log(Z)²`, which keeps the softmax normaliser near 1 (T5X's default
        in pre-training is 1e-4).
      label_smoothing: probability mass spread evenly over the vocabulary.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = log_z - picked
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (log_z - logits.mean(-1))
    if z_loss:
        loss = loss + z_loss * jnp.square(log_z)
    weights = (targets > 0).astype(jnp.float32)
    return jnp.sum(loss * weights), jnp.sum(weights)


def shift_right(targets: Array) -> Array:
    """Decoder inputs of `targets` `[B, L]`: shifted by one, starting with pad (T5 has no BOS)."""
    return jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
