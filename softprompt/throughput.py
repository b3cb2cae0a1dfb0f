"""Throughput: tokens per second, and the share of the device's matrix-product peak they take."""

import functools
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.t5_config import T5Config


def forward_flops(cfg: T5Config, encoder: np.ndarray, decoder: np.ndarray) -> float:
    """Floating-point operations of one forward pass, two for each multiply-add.

    Args:
      encoder, decoder: numbers of tokens of each row (prompt slots are tokens, padding is none).

    Matrix products alone: projections, attention scores and sums, MLP and the output head.
    Cross-attention is counted as it is done, without keys and values where that is less
    (`t5_layers.few`).
    """
    encoder, decoder = (np.asarray(x, np.float64) for x in (encoder, decoder))
    inner = cfg.num_heads * cfg.head_dim
    projection = cfg.emb_dim * inner
    mlp = (len(cfg.mlp_activations) + 1) * cfg.emb_dim * cfg.mlp_dim
    # Scores and sums of values: one multiply-add each per head width and pair of positions.
    per_encoder_layer = (4 * projection + mlp) * encoder + 2 * inner * encoder**2
    without = 2 * projection * decoder + 2 * cfg.num_heads * cfg.emb_dim * decoder * encoder
    with_them = 2 * projection * encoder + 2 * inner * decoder * encoder
    cross = 2 * projection * decoder + np.minimum(without, with_them)
    per_decoder_layer = (4 * projection + mlp) * decoder + 2 * inner * decoder**2 + cross
    head = cfg.emb_dim * cfg.vocab_size * decoder
    total = cfg.num_encoder_layers * per_encoder_layer + cfg.num_decoder_layers * per_decoder_layer
    return 2 * float(np.sum(total + head))


def example_lengths(batch: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Tokens of each example's input and target in a batch of `encoder_ids` and `targets`.

    In packed rows an example attends to itself alone: it counts as if it had a row of its own.
    """
    if "encoder_segments" not in batch:
        return [np.count_nonzero(batch[name], axis=1) for name in ("encoder_ids", "targets")]
    most = int(batch["encoder_segments"].max(initial=0)) + 1
    found = []
    for name in ("encoder_segments", "decoder_segments"):
        segments = batch[name]
        places = segments + most * np.arange(len(segments))[:, None]
        counts = np.bincount(places.ravel(), minlength=most * len(segments))
        found.append(counts.reshape(len(segments), most)[:, 1:].ravel())
    return found


def measure_peak(dtype: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Operations per second of a large matrix product on one device.

    The best of some runs, so that other work on the machine counts as little as it can.
    """
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    # Results in float32: XLA's fast CPU kernels for bfloat16 have no others.
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(8):
        began = clock()
        product(x).block_until_ready()
        best = min(best, clock() - began)
    return 2 * size**3 / best


# What a run measures its utilisation by, once in a process.
peak = functools.cache(measure_peak)


class Meter:
    """Counts what batches hold between two readings.

    Args:
      passes: forward passes that a step costs: 3 where all weights train, 2 where a prompt alone
        does (the gradient goes back through the frozen weights, but theirs is never computed).
      devices: how many share a step.
      share: of a step's rows that the counted batches hold; the rows of other processes are taken
        to be like ours.
    """

    def __init__(self, cfg: T5Config, passes: int, devices: int, share: float = 1.0):
        self._cfg, self._passes, self._devices, self._share = cfg, passes, devices, share
        self.restart()

    def restart(self) -> None:
        """Forgets what was counted: evaluations and compilation are not training."""
        self._began = time.perf_counter()
        self._tokens = self._flops = self._waited = 0.0

    def leave_out(self, seconds: float) -> None:
        """Counts `seconds` just passed as none: a step whose shapes were compiled, not added."""
        self._began += seconds

    def add(self, batch: Mapping[str, np.ndarray], label_ids: np.ndarray | None = None) -> None:
        """Counts a batch of `encoder_ids` `[B, T]` and `targets` `[B, L]`, perhaps packed.

        Where the loss is among `label_ids` `[C, L]`, every example's decoder has all of these, and
        the attention of one to another, which is masked, counts too; tokens are the targets' alone.
        """
        inputs, targets = example_lengths(batch)
        self._tokens += int(inputs.sum() + targets.sum())
        decoded = targets
        if label_ids is not None:
            decoded = np.where(inputs > 0, np.count_nonzero(label_ids), 0)
        self._flops += self._passes * forward_flops(self._cfg, inputs, decoded)

    def wait(self, seconds: float) -> None:
        """Counts time in which the device waited for a batch."""
        self._waited += seconds

    def read(self) -> dict[str, float]:
        """Tokens per second, model FLOPs utilisation and data wait since the last reading.

        Utilisation is that of useful work: padding counts as none (Chowdhery et al. 2022,
        appendix B, where nothing is padded), against `peak` on every device (of a CPU: in every
        process). `data_wait` is the share of the time in which the device had nothing to do
        because no batch was ready.
        """
        elapsed = max(time.perf_counter() - self._began, 1e-9)
        # The devices that a CPU is split into share its cores, all of which `peak` took.
        units = jax.process_count() if jax.default_backend() == "cpu" else self._devices
        reachable = peak(jnp.dtype(self._cfg.dtype).name) * units
        figures = {
            "tokens_per_second": self._tokens / self._share / elapsed,
            "mfu": self._flops / self._share / elapsed / reachable,
            "data_wait": min(self._waited / elapsed, 1.0),
        }
        self.restart()
        return figures
