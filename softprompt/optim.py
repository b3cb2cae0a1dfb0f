"""Optimizers and learning-rate schedules, thin over optax, with the paper's settings as defaults.

An optimizer here is a function of a schedule, so that gin can name both:
`optim.adafactor.learning_rate = @optim.constant()`.
"""

import jax.numpy as jnp
import optax
import optax.contrib

from softprompt.settings import check_numbers

Schedule = optax.Schedule


def constant(value: float = 0.3) -> Schedule:
    """The paper's schedule: constant 0.3 (Lester et al. 2021, section 3; appendix A.1)."""
    check_numbers(LEARNING_RATE=(value, 0))
    return optax.constant_schedule(value)


def rsqrt(value: float = 1.0, warmup_steps: int = 10_000) -> Schedule:
    """T5's pre-training schedule, `value / sqrt(max(step, warmup_steps))` (Raffel 2020, 3.1.2)."""
    check_numbers(LEARNING_RATE=(value, 0), WARMUP_STEPS=(warmup_steps, 0))
    return lambda step: value / jnp.maximum(step, max(warmup_steps, 1)) ** 0.5


def warmup_linear(peak: float, steps: int, warmup_steps: int = 0, final: float = 0.0) -> Schedule:
    """Linear from 0 to `peak` in `warmup_steps`, then linear to `final` at step `steps`."""
    check_numbers(LEARNING_RATE=(peak, 0), steps=(steps, 1), WARMUP_STEPS=(warmup_steps, 0))
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
    if not callable(learning_rate):
        check_numbers(learning_rate=(learning_rate, 0))
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


def scaled_muon(
    learning_rate: Schedule | float,
    adam_b1: float = 0.9,
    adam_b2: float = 0.98,
    consistent_rms: float = 0.4,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for hidden kernels, Adam for the rest, steps relative to each matrix.

    T5's initial scales differ a hundredfold between embeddings and kernels, which one absolute
    learning rate cannot serve; so every step is multiplied by its matrix's root-mean-square, as
    Adafactor does. Hidden kernels are the paths that end in `kernel`, but not the output head.
    """

    def dimensions(params):
        hidden = optax.contrib.MuonDimensionNumbers()
        return {
            path: hidden if path.endswith("/kernel") and "logits_dense" not in path else None
            for path in params
        }

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.contrib.muon(
            1.0,
            muon_weight_dimension_numbers=dimensions,
            consistent_rms=consistent_rms,
            adam_b1=adam_b1,
            adam_b2=adam_b2,
        ),
        optax.scale_by_param_block_rms(),
        # Muon's own rate of 1 has turned the sign already.
        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
    )
