"""How long a device waits for batches: the real input pipeline before a simulated device.

    python benchmarks/input_pipeline.py [--size t5_1_1_xl] [--batch_size 32] [--utilisation 0.5]

Examples of RTE's lengths (drawn at random: 83 tokens on the average, at most 290) go through
tokenised memory, shuffling, padding or packing, the reading thread and the placement on 8 virtual
devices, as in training. The train step is simulated by a clock: a step starts when its batch has
been handed over and the step before it is done, and lasts as long as its matrix products take on
8 devices of `--peak` operations per second at `--utilisation`. Prints, packed and not, the time of
a step and the share of the time in which the devices had nothing to do: by the processor time that
the thread took for each batch, replayed with a processor of its own, and as it went on this machine
with whatever else it did.
"""

import argparse
import os
import time

import numpy as np

from softprompt import data, packing, partition, pipeline, prompted, t5_config, throughput

PROMPT_LENGTH = 100


class Clock:
    """A device that finishes each step a given time after it could start."""

    def __init__(self):
        self.done = time.perf_counter()
        self.idle = 0.0

    def dispatch(self, seconds: float) -> None:
        now = time.perf_counter()
        self.idle += max(0.0, now - self.done)
        self.done = max(now, self.done) + seconds

    def is_ready(self) -> bool:
        return time.perf_counter() >= self.done


def examples(cfg: t5_config.T5Config, count: int, mean: float, longest: int) -> data.Examples:
    """Random tokens in RTE's lengths: a gamma distribution, cut at both ends."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(4.0, mean / 4.0, count).astype(int), 20, longest)
    inputs = [rng.integers(2, cfg.vocab_size, n).tolist() for n in lengths]
    targets = [rng.integers(2, cfg.vocab_size, 3 + i % 3).tolist() for i in range(count)]
    limits = {"inputs": longest, "targets": 8}
    return data.make_examples("rte", inputs, targets, [{}] * count, limits)


def replay(made: list[float], steps: list[float], ahead: int) -> float:
    """Share of the time in which a device idles that takes these batches, in seconds each.

    `made` is what each batch costs the reading thread, which works on a processor of its own and
    stops while `ahead` batches wait in the queue and one more for a place.
    """
    ready, taken, done, idle = 0.0, [], 0.0, 0.0
    for i, (cost, length) in enumerate(zip(made, steps, strict=True)):
        room = taken[i - ahead - 1] if i > ahead else 0.0
        ready = max(ready, room) + cost
        start = max(done, ready)
        # The first batch is waited for while the step is compiled.
        idle += start - done if i else 0.0
        taken.append(start)
        done = start + length
    return idle / (done - taken[0])


def measure(
    make, cfg: t5_config.T5Config, mesh, operations: float, steps: int, ahead: int
) -> dict[str, float]:
    """Means of a step and of a batch in seconds, and shares of time that the device waited."""
    costs, lasting = [], []

    def place(batch):
        lengths = throughput.example_lengths(batch)
        placed = partition.place_rows(batch, mesh)
        costs.append(time.thread_time())
        lasting.append(2 * throughput.forward_flops(cfg, *lengths) / operations)
        return lasting[-1], placed

    with pipeline.Prefetch(make(0), place, ahead) as stream:
        seconds, _ = stream.next()
        device, began, waited = Clock(), time.perf_counter(), stream.waited
        for _ in range(steps):
            device.dispatch(seconds)
            # The host runs at most one step ahead, as little as it may in training.
            time.sleep(max(0.0, device.done - time.perf_counter() - seconds))
            seconds, _ = stream.next(device)
        elapsed = time.perf_counter() - began
        waited = stream.waited - waited
    made = np.diff(costs)
    return {
        "step": float(np.mean(lasting)),
        "batch": float(np.mean(made)),
        "replayed": replay(made.tolist(), lasting[1:], ahead),
        "here": device.idle / elapsed,
        "logged": waited / elapsed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="t5_1_1_xl", choices=list(t5_config.SIZES))
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--peak", type=float, default=989e12, help="of a device; an H100's in bf16")
    parser.add_argument("--utilisation", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ahead", type=int, default=4)
    parser.add_argument("--mean", type=float, default=83)
    parser.add_argument("--longest", type=int, default=290)
    args = parser.parse_args()
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"
    cfg = t5_config.config(args.size)
    mesh = partition.make_mesh()
    part = examples(cfg, 2490, args.mean, args.longest)
    slots = prompted.slots(cfg.vocab_size, PROMPT_LENGTH)
    operations = mesh.size * args.peak * args.utilisation
    packed = packing.Packing([part], [1.0], args.batch_size, 0, slots, 1024, mesh.size)
    for name, make in (
        ("padded", data.train_batches([part], [1.0], args.batch_size, 0, slots)),
        ("packed", packed),
    ):
        found = measure(make, cfg, mesh, operations, args.steps, args.ahead)
        print(
            f"{args.size} {name}: step {1e3 * found['step']:.1f} ms, a batch "
            f"{1e3 * found['batch']:.2f} ms of processor time; data wait "
            f"{100 * found['replayed']:.2f}% with a processor for the thread, "
            f"{100 * found['here']:.2f}% here (logged: {100 * found['logged']:.2f}%)",
            flush=True,
        )


if __name__ == "__main__":
    main()
