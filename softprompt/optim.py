"""Optimizers and learning-rate schedules, thin over optax, with the paper's settings as defaults.

An optimizer here is a function of a schedule, so that gin can name both:
`optim.adafactor.learning_rate = @optim.constant()`.
"""

import jax.numpy as jnp
import optax

Schedule = optax.Schedule


def constant(value: float = 0.3) -> Schedule:
    """The paper's schedule: constant 0.3 (Lester et al. 2021, section 3; appendix A.1)."""
    return optax.constant_schedule(value)


def rsqrt(value: float = 1.0, warmup_steps: int = 10_000) -> Schedule:
    """T5's pre-training schedule, `value / sqrt(max(step, warmup_steps))` (Raffel 2020, 3.1.2)."""
    return lambda step: value / jnp.maximum(step, warmup_steps) ** 0.5


def warmup_linear(peak: float, steps: int, warmup_steps: int = 0, final: float = 0.0) -> Schedule:
    """Linear from 0 to `peak` in `warmup_steps`, then linear to `final` at step `steps`."""
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, max(warmup_steps, 1)),
            optax.linear_schedule(peak, final, max(steps - warmup_steps, 1)),
        ],
        [warmup_steps],
    )


def adafactor(
    learning_rate: Schedule | float = 0.3,
    weight_decay_rate: float = 1e-5,
    decay_rate: float = 0.8,
    multiply_by_parameter_scale: bool = False,
    clipping_threshold: float = 1.0,
    momentum: float | None = None,
) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern 2018); the defaults are those the paper tunes prompts with.

    Weight decay 1e-5 (not multiplied by the learning rate), second-moment decay 0.8, no parameter
    scaling (Lester et al. 2021, section 3 and appendix A).
    """
    return optax.adafactor(
        learning_rate=learning_rate,
        weight_decay_rate=weight_decay_rate,
        decay_rate=decay_rate,
        multiply_by_parameter_scale=multiply_by_parameter_scale,
        clipping_threshold=clipping_threshold,
        momentum=momentum,
        min_dim_size_to_factor=128,
    )


def adamw(
    learning_rate: Schedule | float = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping the global gradient norm."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay),
    )


def scaled_adam(
    learning_rate: Schedule | float,
    b1: float = 0.9,
    b2: float = 0.98,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Adam whose step is relative to each matrix's root-mean-square, as Adafactor's is.

    T5's initial scales differ a hundredfold between embeddings and kernels, which one absolute
    learning rate cannot serve; for T5 pre-training on a small budget this reaches a given loss
    sooner than Adafactor (Nawrot 2023, nanoT5, section 4.2).
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1=b1, b2=b2),
        optax.scale_by_param_block_rms(),
        optax.scale_by_learning_rate(learning_rate),
    )
