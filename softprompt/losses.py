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


def label_cross_entropy(scores: Array, targets: Array, label_ids: Array) -> tuple[Array, Array]:
    """Summed cross-entropy in nats of the right label among the labels, and the number of rows.

    The softmax runs over the labels alone (Gao et al. 2021, section 3), so that nothing is spent
    on telling labels from other text.

    Args:
      scores: log-likelihood `[..., C]` of each label.
      targets: `[..., L]`, each row one of the labels; a row of 0 is padding.
      label_ids: `[C, M]`, padded with 0; a label of padding alone is none.
    """
    length = max(targets.shape[-1], label_ids.shape[1])
    targets, label_ids = (
        jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])
        for x in (targets, label_ids)
    )
    is_label = (label_ids > 0).any(-1)
    is_target = (targets[..., None, :] == label_ids).all(-1) & is_label
    scores = jnp.where(is_label, scores, -jnp.inf)
    picked = jnp.sum(jnp.where(is_target, jax.nn.log_softmax(scores), 0.0))
    return -picked, jnp.sum(is_target).astype(jnp.float32)


def shift_right(targets: Array, segments: Array | None = None) -> Array:
    """Decoder inputs of `targets` `[B, L]`: shifted by one, starting with pad (T5 has no BOS).

    With `segments` `[B, L]` every segment starts with pad.
    """
    shifted = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    if segments is None:
        return shifted
    return jnp.where(segments == jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1], shifted, 0)
