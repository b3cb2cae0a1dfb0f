"""Where a train step's time goes: parts of it compiled alone, in CPU seconds of one thread.

    python benchmarks/step.py [--size=t5_1_1_small] [--dtype=bfloat16] [--rows=4] [--length=256]

Each line: CPU seconds (the best of three), operations per second, and their share of those that a
large matrix product of the same type reaches. CPU seconds, so that other work counts little.
"""

import argparse
import dataclasses
import os
import time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--size", default="t5_1_1_small")
parser.add_argument("--dtype", default="float32")
parser.add_argument("--rows", type=int, default=4)
parser.add_argument("--length", type=int, default=256, help="T, slots included")
parser.add_argument("--targets", type=int, default=8, help="L")
parser.add_argument("--prompt_length", type=int, default=100)
args = parser.parse_args()
# Before JAX starts its threads.
os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from softprompt import backbone, losses, prompted, t5_config, throughput, train, tree, xla  # noqa: E402


def best(function, *operands) -> float:
    """CPU seconds of the fastest of three calls."""
    jax.block_until_ready(function(*operands))
    times = []
    for _ in range(3):
        began = time.process_time()
        jax.block_until_ready(function(*operands))
        times.append(time.process_time() - began)
    return min(times)


def main() -> None:
    cfg, rows = t5_config.config(args.size, dtype=args.dtype), args.prompt_length
    module, rng = prompted.PromptedT5(cfg, rows), np.random.default_rng(0)
    shapes = tree.flatten(backbone.abstract(cfg)["params"])
    frozen = {
        path: jnp.asarray(0.05 * rng.standard_normal(x.shape, np.float32), cfg.dtype)
        for path, x in shapes.items()
    }
    bank = jnp.asarray(rng.uniform(-0.5, 0.5, (rows, cfg.emb_dim)), jnp.float32)
    text = rng.integers(3, cfg.vocab_size - 200, (args.rows, args.length - rows))
    own = np.tile(prompted.slots(cfg.vocab_size, rows), (args.rows, 1))
    ids = np.concatenate([own, text], 1).astype(np.int32)
    targets = rng.integers(3, cfg.vocab_size - 200, (args.rows, args.targets)).astype(np.int32)

    def encode(bank, frozen, ids, targets):
        params = tree.unflatten({**frozen, train.PROMPT: bank})
        encoded, _ = module.apply({"params": params}, ids, method="encode")
        return encoded.astype(jnp.float32).sum()

    def loss(bank, frozen, ids, targets):
        params = tree.unflatten({**frozen, train.PROMPT: bank})
        logits = module.apply({"params": params}, ids, losses.shift_right(targets))
        total, count = losses.cross_entropy(logits, targets)
        return total / count

    peak = throughput.measure_peak(cfg.dtype, time.process_time)
    print(f"matrix product: {peak / 1e9:.0f} GFLOP per CPU second", flush=True)
    encoder, decoder = np.full(args.rows, args.length), np.full(args.rows, args.targets)
    whole = throughput.forward_flops(cfg, encoder, decoder)
    only_encoder = dataclasses.replace(cfg, num_decoder_layers=0)
    alone = throughput.forward_flops(only_encoder, encoder, 0 * decoder)
    for name, function, flops in (
        ("encoder, forward", encode, alone),
        ("encoder, forward and backward", jax.grad(encode), 2 * alone),
        ("loss, forward", loss, whole),
        ("loss, forward and backward", jax.grad(loss), 2 * whole),
    ):
        compiled = jax.jit(function, compiler_options=xla.step_options())
        seconds = best(compiled, bank, frozen, ids, targets)
        print(
            f"{name}: {seconds:.3f} s, {flops / seconds / 1e9:.0f} GFLOP/s, "
            f"{100 * flops / seconds / peak:.0f}% of the product",
            flush=True,
        )


if __name__ == "__main__":
    main()
