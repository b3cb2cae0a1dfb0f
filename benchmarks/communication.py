"""What the devices send each other in a train step, read off the compiled program.

    python benchmarks/communication.py --size t5_1_1_xl --devices 8 --model 1 2 4 8
    python benchmarks/communication.py --size t5_1_1_xxl --devices 64 --model 1 8 64
    python benchmarks/communication.py --size t5_1_1_xl --topology v5e:2x4 --model 2

Compiles the train step for virtual devices, or for those of `--topology` (see
`softprompt.topology`), on abstract shapes (no weights exist), once for each
number of devices along the model axis, and prints every kind of collective: along which mesh axis,
how many arrays, of which type, and bytes of results per device. All layers of a stack communicate
alike: the step is compiled with one and with two layers a stack, and their difference counts for
each further layer. `--full` compiles all layers instead (minutes). `--where` names the operations
that the collectives of the deepest compiled step come from.
"""

import argparse
import collections
import dataclasses
import os
import re

import jax
import numpy as np

from softprompt import memory, optim, partition, products, t5_config, topology

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
OPERATION = re.compile(rf"= (.*?) ({KINDS})(?:-start)?\(")
ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")
BYTES = {"pred": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "s64": 8}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array of a collective: its kind, mesh axis, type, bytes of the result, and origin."""

    kind: str
    axis: str
    dtype: str
    bytes: int
    origin: str


def collectives(program: str, model: int) -> list[Collective]:
    """The collectives in a compiled program's text, for a mesh whose model axis has `model`."""
    found = []
    for line in program.splitlines():
        match = OPERATION.search(line)
        if not match:
            continue
        origin = re.search(r'op_name="([^"]*)"', line)
        for dtype, dims in ARRAY.findall(match[1]):
            if re.search(r"to_apply=\S*promoted", line):
                # XLA's CPU compiler sums bfloat16 as float32; accelerators send it as it is.
                dtype = dtype.replace("f32", "bf16")
            size = int(np.prod([int(n) for n in dims.split(",") if n], dtype=np.int64))
            found.append(
                Collective(
                    match[2], axis(line, model), dtype, BYTES[dtype] * size,
                    origin[1] if origin else "?",
                )
            )  # fmt: skip
    return found


def axis(line: str, model: int) -> str:
    """The mesh axis along which a collective's devices differ: numbered along `model` first."""
    group = first_group(line)
    if group is None:
        return "all" if model > 1 else "data"
    # With model=1 all groups are groups of the data axis.
    if len({n % model for n in group}) == 1:
        return "data"
    return "model" if len({n // model for n in group}) == 1 else "all"


def first_group(line: str) -> list[int] | None:
    """The first of the groups of devices in which a collective works (None: all in one)."""
    numbers = lambda text: [int(n) for n in re.findall(r"\d+", text or "")]  # noqa: E731
    if match := re.search(r"replica_groups=mesh\[(.*?)\](.*?)\{(.*?)\}", line):
        # mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}
        shape = [int(n) for n in re.findall(r"=(\d+)", match[1])]
        names, over = re.findall(r"'(\w+)'", match[1]), re.findall(r"'(\w+)'", match[3])
        devices = np.arange(np.prod(shape))
        if order := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?", match[2]):
            devices = devices.reshape(numbers(order[1])).transpose(numbers(order[2]) or None)
        chosen = tuple(slice(None) if name in over else 0 for name in names)
        return devices.reshape(shape)[chosen].reshape(-1).tolist()
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        devices = np.arange(np.prod(numbers(match[2]))).reshape(numbers(match[2]))
        return devices.transpose(numbers(match[3]) or None).reshape(numbers(match[1]))[0].tolist()
    match = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", line)
    return numbers(match[1]) if match else None


def abstract_step(
    cfg: t5_config.T5Config,
    mesh: jax.sharding.Mesh,
    rows: int,
    batch: int,
    inputs: int,
    targets: int,
) -> jax.stages.Lowered:
    """The train step of a prompt of `rows` vectors, lowered on shapes alone."""
    run = memory.Run(cfg, None, mesh, optim.adafactor(0.3), rows, batch, rows + inputs, targets)
    return memory.lower(run)[0]


def count(found: list[Collective]) -> dict[tuple[str, str, str], np.ndarray]:
    """(arrays, bytes) of each mesh axis, kind and type."""
    totals: dict[tuple[str, str, str], np.ndarray] = {}
    for one in found:
        key = (one.axis, one.kind, one.dtype)
        totals[key] = totals.get(key, np.zeros(2, np.int64)) + [1, one.bytes]
    return totals


def compiled(cfg: t5_config.T5Config, mesh, layers: int, *shape: int) -> list[Collective]:
    """The collectives of a step with so many layers in each stack."""
    cfg = dataclasses.replace(cfg, num_encoder_layers=layers, num_decoder_layers=layers)
    # No machine code is run: what the partitioner and the simplifiers leave is counted.
    options = memory.CPU_OPTIONS if mesh.devices.flat[0].platform == "cpu" else {}
    program = abstract_step(cfg, mesh, *shape).compile(options).as_text()
    return collectives(program, mesh.shape["model"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="t5_1_1_xl", choices=list(t5_config.SIZES))
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--topology", help="compile for its devices, such as v5e:2x4")
    parser.add_argument("--model", type=int, nargs="+", default=[1], help="along the model axis")
    parser.add_argument("--prompt_length", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=0, help="0: four rows a device")
    parser.add_argument("--inputs", type=int, default=256)
    parser.add_argument("--targets", type=int, default=8)
    parser.add_argument("--dropout_rate", type=float, default=0.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--full", action="store_true", help="compile all layers")
    parser.add_argument("--where", action="store_true", help="name the operations")
    args = parser.parse_args()
    flag = f"--xla_force_host_platform_device_count={args.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    jax.config.update("jax_platforms", "cpu")
    devices = None
    if args.topology:
        devices = topology.describe(args.topology)[0]
        args.devices = len(devices)
    cfg = t5_config.config(args.size, args.dropout_rate, args.dtype)
    depth = cfg.num_encoder_layers
    batch = args.batch_size or 4 * args.devices
    shape = (args.prompt_length, batch, args.inputs, args.targets)
    # Traced as for an accelerator: on a CPU bfloat16 products are float32 (`products.einsum`).
    products.platform = lambda: "tpu"
    for model in args.model:
        mesh = partition.make_mesh(model=model, among=devices)
        if args.full:
            deepest = compiled(cfg, mesh, depth, *shape)
            totals = count(deepest)
        else:
            one, deepest = (compiled(cfg, mesh, layers, *shape) for layers in (1, 2))
            first, second = count(one), count(deepest)
            totals = {k: x + (depth - 2) * (x - first.get(k, 0)) for k, x in second.items()}
        print(
            f"{args.size}, {depth}+{depth} layers, mesh {dict(mesh.shape)}, {batch} rows of "
            f"{args.prompt_length}+{args.inputs} and {args.targets}"
        )
        for (over, kind, dtype), (arrays, size) in sorted(totals.items()):
            print(f"  {over:5}  {arrays:5} x {kind:14} {dtype:5} {size:>15,} bytes", flush=True)
        if args.where:
            origins = collections.Counter(
                (one.axis, one.bytes, re.sub(r"layers_\d+", "layers_*", one.origin))
                for one in deepest
            )
            for (over, size, origin), times in sorted(origins.items()):
                print(f"    {over:5} {times} x {size:,} bytes  {origin[-120:]}")


if __name__ == "__main__":
    main()
