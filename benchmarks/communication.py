"""What the devices send each other in a train step, read off the compiled program.

    python benchmarks/communication.py --size t5_1_1_xl --devices 8 --model 1
    python benchmarks/communication.py --size t5_1_1_xxl --devices 64 --model 8 --layers 2

Compiles the train step for virtual devices on abstract shapes (no weights exist) and prints a line
for every kind of collective: over which mesh axis, how many, of which type and how many bytes of
results per device. With `--layers N` encoder and decoder have N layers each, which compiles in
seconds; a layer's collectives are the same in all, so two such runs give the full depth.
`--where` adds the operations that each line comes from.
"""

import argparse
import collections
import dataclasses
import os
import re

import jax
import jax.numpy as jnp
import numpy as np

from softprompt import backbone, optim, partition, prompted, t5, train, tree

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
OPERATION = re.compile(rf"= (.*?) ({KINDS})(?:-start)?\(")
ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")
BYTES = {"pred": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "s64": 8}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation: its kind, mesh axis, array types, bytes of results, and origin."""

    kind: str
    axis: str
    dtypes: str
    bytes: int
    origin: str


def collectives(program: str, model: int) -> list[Collective]:
    """The collectives in a compiled program's text, for a mesh whose model axis has `model`."""
    found = []
    for line in program.splitlines():
        match = OPERATION.search(line)
        if not match:
            continue
        arrays = ARRAY.findall(match[1])
        size = sum(
            BYTES[kind] * int(np.prod([int(n) for n in dims.split(",") if n], dtype=np.int64))
            for kind, dims in arrays
        )
        origin = re.search(r'op_name="([^"]*)"', line)
        dtypes = "+".join(sorted({kind for kind, _ in arrays}))
        if re.search(r"to_apply=\S*promoted", line):
            # XLA's CPU compiler sums bfloat16 as float32; accelerators send it as it is.
            dtypes, size = dtypes.replace("f32", "bf16"), size // 2
        place = origin[1] if origin else "?"
        found.append(Collective(match[2], axis(line, model), dtypes, size, place))
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
    cfg: t5.T5Config, mesh: jax.sharding.Mesh, rows: int, batch: int, inputs: int, targets: int
) -> jax.stages.Lowered:
    """The train step of a prompt of `rows` vectors, lowered on shapes alone."""
    variables = backbone.abstract(cfg, rows)
    places = partition.shardings(variables, mesh)
    everywhere = partition.replicated(mesh)

    def shape(x, sharding, dtype=None):
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding)

    params = {
        path: shape(x, places[path], jnp.float32 if path == train.PROMPT else cfg.dtype)
        for path, x in tree.flatten(variables["params"]).items()
    }
    trained, frozen = tree.split(params, ("prompt/.*",))
    optimizer = optim.adafactor(0.3)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    state = {
        "trainable": trained,
        "opt": jax.tree.map(
            lambda x: shape(x, everywhere), jax.eval_shape(optimizer.init, trained)
        ),
        "step": count, "bad_step": count, "loss_sum": scalar, "count_sum": scalar,
    }  # fmt: skip
    over = partition.batch_sharding(mesh)
    ids = {
        name: jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=over)
        for name, length in (("encoder_ids", rows + inputs), ("targets", targets))
    }
    step = train.make_step(prompted.PromptedT5(cfg, rows), optimizer)
    return jax.jit(step, donate_argnums=0).lower(state, frozen, ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="t5_1_1_xl", choices=list(t5.SIZES))
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--model", type=int, default=1, help="devices of the model axis")
    parser.add_argument("--prompt_length", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=0, help="0: four rows per data shard")
    parser.add_argument("--inputs", type=int, default=256)
    parser.add_argument("--targets", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, default=0, help="0: all of the size's")
    parser.add_argument("--where", action="store_true")
    args = parser.parse_args()
    flag = f"--xla_force_host_platform_device_count={args.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    jax.config.update("jax_platforms", "cpu")
    mesh = partition.make_mesh(model=args.model)
    cfg = t5.config(args.size, dtype=args.dtype)
    if args.layers:
        cfg = dataclasses.replace(
            cfg, num_encoder_layers=args.layers, num_decoder_layers=args.layers
        )
    batch = args.batch_size or 4 * mesh.shape["data"]
    # Traced as for an accelerator: on a CPU products of bfloat16 give float32 (see `t5._einsum`).
    jax.default_backend = lambda: "tpu"
    lowered = abstract_step(cfg, mesh, args.prompt_length, batch, args.inputs, args.targets)
    # Machine code is not run here: only what the partitioner and the simplifiers leave counts.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    found = collectives(lowered.compile(options).as_text(), args.model)
    print(
        f"{args.size}, {cfg.num_encoder_layers}+{cfg.num_decoder_layers} layers, mesh "
        f"{dict(mesh.shape)}, {batch} rows of {args.prompt_length}+{args.inputs} and {args.targets}"
    )
    lines = collections.defaultdict(list)
    for one in found:
        lines[one.axis, one.kind, one.dtypes, one.bytes].append(one.origin)
    for (over, kind, dtypes, size), origins in sorted(lines.items()):
        print(f"{over:6} {len(origins):5} x {kind:14} {dtypes:10} {size:>14,} bytes")
        if args.where:
            shown = collections.Counter(re.sub(r"layers_\d+", "layers_*", o) for o in origins)
            for origin, count in shown.most_common(8):
                print(f"           {count:4} {origin[-110:]}")
    for over in sorted({one.axis for one in found}):
        total = sum(one.bytes for one in found if one.axis == over)
        print(f"{over}: {total:,} bytes per device and step")


if __name__ == "__main__":
    main()
