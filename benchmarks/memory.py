"""The dry run's figure against the memory that a step really takes (Linux, CPU).

    python benchmarks/memory.py [--size t5_1_1_small] [--batch 4 8] [--dtype bfloat16] [--keep]

For each batch size a process of its own compiles the train step, makes random weights, takes two
steps, and reads from the kernel by how much these raised its resident memory at most (VmHWM, reset
before them, so that what compiling and drawing took does not count); the step's arguments are
added, which lie in memory by then. With `--keep` the process keeps what it frees, as
`softprompt train` does.

    python benchmarks/memory.py --table --batch 8

prints the dry run's figures alone, for T5 1.1 small to XXL with bfloat16 and int8 weights, with
`--topology=v5p:1x1x1` those of one device of that kind (see `softprompt.topology`).
"""

import argparse
import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from softprompt import heap, memory, optim, partition, t5_config, topology

PROMPT, INPUTS, TARGETS = 100, 512, 16


def run_of(args: argparse.Namespace, batch: int) -> memory.Run:
    """A prompt-tuning run in the paper's settings."""
    cfg = dataclasses.replace(t5_config.config(args.size, 0.1, args.dtype), remat=args.remat)
    among = topology.describe(args.topology)[0] if args.topology else None
    mesh = partition.make_mesh(devices=1, among=among)
    optimizer = optim.adafactor(0.3)
    return memory.Run(
        cfg, args.weights, mesh, optimizer, PROMPT, batch, PROMPT + INPUTS, TARGETS,
        microbatches=args.microbatches,
    )  # fmt: skip


def status(name: str) -> int:
    """A figure of the kernel's about this process, in bytes."""
    text = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", text)[1])


def measure(run: memory.Run) -> int:
    """Bytes by which two steps raise this process's peak of resident memory."""
    import ctypes

    lowered, state, fixed, batch = memory.lower(run)
    step = lowered.compile()
    rng = np.random.default_rng(0)

    def draw(shape: jax.ShapeDtypeStruct) -> jax.Array:
        values = 0.02 * rng.standard_normal(shape.shape, np.float32)
        if shape.dtype in (jnp.int8, jnp.int32):
            values = np.ones(shape.shape)
        return jax.device_put(values.astype(shape.dtype), shape.sharding)

    state, fixed, batch = jax.tree.map(draw, (state, fixed, batch))
    arguments = sum(x.nbytes for x in jax.tree.leaves((state, fixed, batch)))
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    for _ in range(2):
        state = step(state, fixed, batch)
    jax.block_until_ready(state)
    return status("VmHWM") - before + arguments


def table(args: argparse.Namespace) -> None:
    """A line for each size, type of the weights and policy of rematerialisation."""
    print("| T5 1.1 | weights | REMAT | weights, GiB | temporaries, GiB | peak, GiB |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for size in args.sizes:
        for weights in (None, "int8"):
            for remat in t5_config.REMAT:
                args.size, args.weights, args.remat = f"t5_1_1_{size}", weights, remat
                found = memory.need(run_of(args, args.batch[0]))
                sizes = (found.weights, found.temporaries, found.peak)
                cells = " | ".join(f"{n / 2**30:.2f}" for n in sizes)
                cells += " (refused)" if found.refused else ""
                print(f"| {size} | {weights or args.dtype} | {remat} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="t5_1_1_small", choices=list(t5_config.SIZES))
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--remat", default="none", choices=t5_config.REMAT)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="the heap, as `softprompt train`")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="the dry run's figures, all sizes")
    sizes = ["small", "base", "large", "xl", "xxl"]
    parser.add_argument("--sizes", nargs="+", default=sizes, choices=sizes, help="of --table")
    parser.add_argument("--topology", help="of --table: compile for such a device, as v5p:1x1x1")
    args = parser.parse_args()
    if args.topology and not args.table:
        parser.error("--topology is for --table")
    if args.table:
        args.dtype = "bfloat16"
        table(args)
        return
    if args.one:
        if args.keep:
            heap.keep()  # Before the mesh asks for devices.
            heap.compute_within_calls()
        run = run_of(args, args.batch[0])
        print(json.dumps([memory.need(run).peak, measure(run)]))
        return
    print("| batch | dry run, GB | measured, GB | ratio |\n| --- | --- | --- | --- |", flush=True)
    for batch in args.batch:
        flags = [*sys.argv[1:], "--one", "--batch", str(batch)]
        out = subprocess.run(
            [sys.executable, __file__, *flags], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        said, took = json.loads(out.splitlines()[-1])
        print(f"| {batch} | {said / 1e9:.3f} | {took / 1e9:.3f} | {said / took:.2f} |", flush=True)


if __name__ == "__main__":
    main()
