"""Prompts behind a network that is trained with them and gone afterwards.

While it trains, the prompt that the model reads is `P' = P + MLP(P)` (Razdaibiedina et al. 2023,
arXiv 2305.03937: residual prompt tuning) or `P' = MLP(P)` (Li & Liang 2021,
arXiv 2101.00190, section 4.3). Both collapse to the plain array P', which is all that is saved.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.prompted import PROMPT
from softprompt.tree import Flat

NETWORK = "prompt/network/"
ACTIVATIONS = ("relu", "gelu", "tanh")


@dataclasses.dataclass(frozen=True)
class Mlp:
    """Down to `bottleneck`, activation, up to H, and layer norm; for each prompt vector alone.

    Attributes:
      bottleneck: width between the two maps.
      shared: one network for all vectors; else one for each position of the prompt.
      residual: adds the vector itself to what the network makes of it.
      layer_norm: of the network's output, with a learnt scale and bias.
      activation: one of `ACTIVATIONS`.

    The residual form with ReLU and layer norm is that of Razdaibiedina et al., (residual False,
    layer norm False, tanh) that of Li & Liang. A deep prompt goes through the same network, layer
    by layer.
    """

    bottleneck: int = 400
    shared: bool = True
    residual: bool = True
    layer_norm: bool = True
    activation: str = "relu"

    def __post_init__(self):
        if not isinstance(self.bottleneck, int) or self.bottleneck < 1:
            raise ValueError(
                f"BOTTLENECK is {self.bottleneck!r}, expected an integer of at least 1"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"ACTIVATION is {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}"
            )

    def init(self, key: jax.Array, prompt: Flat) -> Flat:
        """`prompt` (`prompt/bank` `[P, H]`, perhaps `prompt/deep`) and the network's parameters.

        Maps start uniform within 1/sqrt of what they sum over.
        """
        rows, width = np.shape(prompt[PROMPT])
        count = () if self.shared else (rows,)
        keys = iter(jax.random.split(key, 4))
        sizes = {"down": (width, self.bottleneck), "up": (self.bottleneck, width)}
        network: dict[str, Any] = {}
        for name, (inputs, outputs) in sizes.items():
            bound = inputs**-0.5
            for part, shape in (("kernel", (inputs, outputs)), ("bias", (outputs,))):
                drawn = jax.random.uniform(next(keys), (*count, *shape), jnp.float32, -bound, bound)
                network[f"{NETWORK}{name}/{part}"] = drawn
        if self.layer_norm:
            network[f"{NETWORK}norm/scale"] = jnp.ones((*count, width))
            network[f"{NETWORK}norm/bias"] = jnp.zeros((*count, width))
        return {**prompt, **network}

    def collapse(self, flat: Flat) -> Flat:
        """The same parameters with P' in place of P, and without the network."""
        network = {k.removeprefix(NETWORK): x for k, x in flat.items() if k.startswith(NETWORK)}
        rest = {k: x for k, x in flat.items() if not k.startswith(NETWORK)}
        prompts = {k: self._apply(network, x) for k, x in rest.items() if k.startswith("prompt/")}
        return {**rest, **prompts}

    def _apply(self, network: Flat, x: jax.Array) -> jax.Array:
        """P' of P `[..., P, H]`."""
        spec = "...pi,io->...po" if self.shared else "...pi,pio->...po"
        y = jnp.einsum(spec, x, network["down/kernel"]) + network["down/bias"]
        y = getattr(jax.nn, self.activation)(y)
        y = jnp.einsum(spec, y, network["up/kernel"]) + network["up/bias"]
        if self.layer_norm:
            y = y - y.mean(-1, keepdims=True)
            y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + 1e-5)
            y = y * network["norm/scale"] + network["norm/bias"]
        return x + y if self.residual else y
