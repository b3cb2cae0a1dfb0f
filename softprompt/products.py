"""Products with frozen weights, and softmax around one: in one's own type, or int8 times a scale.

Each has gradients of its own, which keep and multiply no more than a prompt's training needs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def platform() -> str:
    """What is traced for: the platform of `jax.default_device`, or else JAX's own."""
    device = jax.config.jax_default_device
    return getattr(device, "platform", device) or jax.default_backend()


def einsum(spec: str, x: Array, y: Array, dtype: Any) -> Array:
    """`jnp.einsum(spec, x, y)`, accumulated in float32 and returned as `dtype`.

    XLA's CPU backend has kernels for bfloat16 operands (AVX512-BF16, AMX: twice as fast as
    float32) only where the result is float32, the output's last axis comes from the second
    operand, both operands have one type, and the axes that both share with the output lead.
    """
    operands, out = spec.split("->")
    of_x, of_y = operands.split(",")
    if out[-1] not in of_y:
        of_x, of_y, x, y = of_y, of_x, y, x
    if platform() != "cpu":
        return jnp.einsum(f"{of_x},{of_y}->{out}", x, y, preferred_element_type=dtype)
    shared = [axis for axis in of_x if axis in of_y and axis in out]
    in_front, behind = (_leading(shared, axes) for axes in (of_x, out))
    if x.dtype == jnp.bfloat16 and in_front != of_x:
        x = jnp.einsum(f"{of_x}->{in_front}", x)
        y = jnp.einsum(f"{in_front},{of_y}->{behind}", x, y, preferred_element_type=jnp.float32)
        return jnp.einsum(f"{behind}->{out}", y.astype(dtype))
    y = jnp.einsum(f"{of_x},{of_y}->{out}", x, y, preferred_element_type=jnp.float32)
    return y.astype(dtype)


def _leading(first: list[str], axes: str) -> str:
    """The axes with those of `first` before all others."""
    return "".join([*first, *(axis for axis in axes if axis not in first)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(spec: str, x: Array, y: Array, dtype: Any) -> Array:
    """`einsum` whose gradients are products in the operands' own type."""
    return einsum(spec, x, y, dtype)


def _product_forward(spec, x, y, dtype):
    return einsum(spec, x, y, dtype), (x, y)


def _product_backward(spec, dtype, operands, grad):
    del dtype
    x, y = operands
    inputs, out = spec.split("->")
    of_x, of_y = inputs.split(",")
    grad = grad.astype(x.dtype)
    return (
        einsum(f"{out},{of_y}->{of_x}", grad, y, x.dtype),
        einsum(f"{of_x},{out}->{of_y}", x, grad, y.dtype),
    )


product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def int8_product(spec: str, x: Array, values: Array, scale: Array, dtype: Any) -> Array:
    """`product` of `x` with a frozen int8 matrix, times `scale`, broadcast against the result.

    The values become `x`'s type for the moment of the product. Barriers tie that to `x` (and to
    the gradient in the backward pass): else XLA makes the wider copies of all matrices once, and
    keeps them through the backward pass or a whole loop.
    """
    x, values = jax.lax.optimization_barrier((x, values))
    y = einsum(spec, x, values.astype(x.dtype), jnp.float32)
    return (y * scale).astype(dtype)


def _int8_product_forward(spec, x, values, scale, dtype):
    return int8_product.fun(spec, x, values, scale, dtype), (values, scale, jnp.zeros((), x.dtype))


@jax.custom_batching.custom_vmap
def _own_copy(values: Array, grad: Array) -> Array:
    """`values`, by zeros that no compiler may assume, for they could be NaN.

    The CPU backend drops barriers before it merges equal operations, and would take the forward
    pass's copy in their place.
    """
    return values + (0 * grad.ravel()[0]).astype(values.dtype)


@_own_copy.def_vmap
def _own_copy_of_all(size: int, batched: list[bool], values: Array, grad: Array):
    """One copy for the gradients of all prompts of a population."""
    del size
    return _own_copy(values, grad), batched[0]


def _int8_product_backward(spec, dtype, saved, grad):
    del dtype
    values, scale, like = saved
    inputs, out = spec.split("->")
    of_x, of_y = inputs.split(",")
    grad, values = jax.lax.optimization_barrier((grad, values))
    values = _own_copy(values, grad)
    grad = (grad.astype(jnp.float32) * scale).astype(like.dtype)
    back = einsum(f"{out},{of_y}->{of_x}", grad, values.astype(like.dtype), like.dtype)
    return back, None, None


int8_product.defvjp(_int8_product_forward, _int8_product_backward)


def _as_kept(kept: Any, grads: Any) -> tuple[Any, Any]:
    """What the forward pass kept, as it was rounded, for the backward pass.

    Accelerators' compilers may leave the rounding out, and then keep float32 values through both
    passes beside the rounded ones, or what these are made of: a barrier that waits for the
    gradient stops them. The CPU's compiler keeps what it is told, and more beside a barrier.
    """
    return (kept, grads) if platform() == "cpu" else jax.lax.optimization_barrier((kept, grads))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def exponentials(logits: Array, dtype: Any) -> tuple[Array, Array]:
    """Softmax's numerators as `dtype`, and their float32 sums `[..., 1]` over the last axis.

    `logits` are float32. The backward pass takes the numerators as they were rounded: only those
    are kept, and of all that a layer keeps they are the most.
    """
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    return weights.astype(dtype), weights.sum(-1, keepdims=True)


def _exponentials_forward(logits, dtype):
    weights, total = exponentials.fun(logits, dtype)
    return (weights, total), weights


def _exponentials_backward(dtype, weights, grads):
    del dtype
    weights, (of_weights, of_total) = _as_kept(weights, grads)
    return ((of_weights.astype(jnp.float32) + of_total) * weights.astype(jnp.float32),)


exponentials.defvjp(_exponentials_forward, _exponentials_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def divide(x: Array, total: Array, dtype: Any) -> Array:
    """`x / total` as `dtype`, `total` of one value a row; the backward pass does without `x`."""
    return (x / total).astype(dtype)


def _divide_forward(x, total, dtype):
    y = divide.fun(x, total, dtype)
    return y, (y, total)


def _divide_backward(dtype, saved, grad):
    del dtype
    (y, total), grad = _as_kept(saved, grad)
    grad = grad.astype(jnp.float32) / total
    return grad, -(grad * y.astype(jnp.float32)).sum(-1, keepdims=True)


divide.defvjp(_divide_forward, _divide_backward)


MASKED = -1e10


def where_not(mask: Array, dtype: Any) -> Array:
    """What is added to logits to attend to nothing but `mask`; float16 has no number as low."""
    return jnp.where(mask, 0.0, max(MASKED, float(jnp.finfo(dtype).min) / 2))


def attention(query: Array, key: Array, value: Array, bias: Array) -> Array:
    """`[B, A, Q, D]` for queries of that shape and keys and values `[B, A, S, D]`.

    `bias` broadcasts to `[B, A, Q, S]`. Logits and softmax are float32 whatever the operands are.
    """
    logits = product("baqd,basd->baqs", query, key, jnp.float32) + bias.astype(jnp.float32)
    # The softmax divides what it weighs instead of its weights, of which there are more.
    weights, total = exponentials(logits, query.dtype)
    return divide(product("baqs,basd->baqd", weights, value, jnp.float32), total, query.dtype)


# A matrix of weights, and scales that broadcast against what it is multiplied into, if it is int8.
Matrix = tuple[Array, Array | None]


def multiply(spec: str, x: Array, matrix: Matrix, dtype: Any) -> Array:
    """`product` of `x` and a matrix of weights, which may be kept as int8."""
    kernel, scale = matrix
    if scale is None:
        return product(spec, x, kernel.astype(x.dtype), dtype)
    return int8_product(spec, x, kernel, scale, dtype)
