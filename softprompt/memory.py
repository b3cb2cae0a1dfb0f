"""Memory of a training run per device, from its compiled program, before anything is loaded.

The train step is lowered from shapes, types and shardings alone, and compiled for the devices at
hand or for others (`topology`); XLA's buffer assignment then says what it needs. Nothing of the
backbone is allocated.
"""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from softprompt import backbone as backbones
from softprompt import (
    data,
    formats,
    packing,
    partition,
    prompt,
    prompted,
    t5_config,
    topology,
    train,
    train_step,
    tree,
)
from softprompt.prompted import PromptedT5
from softprompt.reparameterise import Mlp

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
# Code is generated without optimisation: it plays no part in what memory the program needs.
CPU_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run's shapes.

    Attributes:
      cfg: architecture, type of activations, rematerialisation.
      weights: 'int8', or None for `cfg.dtype`.
      mesh: the devices.
      optimizer: of the trained parameters.
      prompt_length: P.
      rows: of a batch, a multiple of the mesh's data axis times `microbatches`.
      encoder_length: P + T.
      targets_length: L.
      packed: whether several examples share a row.
      batch_size: examples of a packed batch, on the average; else `rows`.
      microbatches: equal parts that a batch is computed in.
      labels: C, for the loss among the labels, 0 for that of the target text.
      label_length: of the longest label, if packed; else `targets_length`.
      trainable, frozen: patterns of paths.
      depth: D, encoder layers that read the prompt anew.
      reparameterisation: a network that the prompt is trained behind.
    """

    cfg: t5_config.T5Config
    weights: str | None
    mesh: jax.sharding.Mesh
    optimizer: optax.GradientTransformation
    prompt_length: int
    rows: int
    encoder_length: int
    targets_length: int
    packed: bool = False
    batch_size: int = 0
    microbatches: int = 1
    labels: int = 0
    label_length: int = 0
    trainable: Sequence[str] = ("prompt/.*",)
    frozen: Sequence[str] = (".*",)
    depth: int = 1
    reparameterisation: Mlp | None = None

    def but(self, **changes: Any) -> "Run":
        """The same run with other values; `remat` goes into the configuration."""
        cfg = changes.pop("cfg", self.cfg)
        if "remat" in changes:
            cfg = dataclasses.replace(cfg, remat=changes.pop("remat"))
        return dataclasses.replace(self, cfg=cfg, **changes)

    @property
    def device(self) -> jax.Device:
        """The first device, for what all have in common."""
        return self.mesh.devices.flat[0]

    @property
    def part(self) -> int:
        """Rows of a microbatch."""
        return self.rows // self.microbatches

    def cut(self, microbatches: int) -> "Run":
        """The same run in so many parts, with as many more rows as equal parts take."""
        rows = data.round_up(self.rows, self.mesh.shape["data"] * microbatches)
        return self.but(rows=rows, microbatches=microbatches)


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes that a run takes on each device, by what they are for.

    `temporaries` are activations and everything else that lives within a step; `start` are the
    backbone's own values of what trains, which a run keeps beside. `kernels` is an estimate of what
    a CPU's kernels allocate for themselves, uncounted by the compiler. `refused` is whether the
    compiler refuses the program for want of memory: the peak then is what it says that it takes, as
    far as it says it.
    """

    weights: int
    trained: int
    optimizer: int
    batch: int
    temporaries: int
    start: int = 0
    kernels: int = 0
    refused: bool = False

    @property
    def peak(self) -> int:
        return sum(getattr(self, name) for name in NAMES)

    @property
    def by_rows(self) -> int:
        """The part that grows with the rows of a step."""
        return self.temporaries + self.kernels

    def fits(self, limit: int) -> bool:
        """Whether `limit` bytes of a device are enough."""
        return not self.refused and self.peak <= limit


def size_on_device(shapes: Any) -> int:
    """Bytes of a tree of shapes on each of the devices they are spread over."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(shapes)
    )


def shared_size(shapes: tree.Flat, mesh: jax.sharding.Mesh) -> int:
    """Bytes of frozen arrays on each device; those of a CPU share one copy of every shard."""
    if mesh.devices.flat[0].platform != "cpu":
        return size_on_device(shapes)
    held = 0
    for x in shapes.values():
        indices = x.sharding.addressable_devices_indices_map(x.shape).values()
        distinct = {partition.span(index, x.shape) for index in indices}
        held += len(distinct) * size_on_device(x)
    return -(-held // len(mesh.local_devices))


def lower(run: Run) -> tuple[jax.stages.Lowered, train_step.State, tree.Flat, dict[str, Any]]:
    """The run's train step, lowered, with the shapes of its state, frozen parameters and batch."""
    params: dict[str, Any] = dict(backbones.layout(run.cfg, run.mesh, run.weights))
    if run.prompt_length:
        params |= _prompt_layout(run)
    trained, fixed = tree.split(params, run.trainable, run.frozen)
    train.check_trainable(trained)
    trained = {
        path: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
        for path, x in trained.items()
    }
    state = train_step.abstract_state(trained, run.optimizer, run.mesh)
    spread = partition.batch_sharding(run.mesh)
    widths = {"encoder_ids": run.encoder_length, "targets": run.targets_length}
    if run.packed:
        widths["encoder_segments"] = run.encoder_length
        widths["decoder_segments"] = run.targets_length
    batch = {
        name: jax.ShapeDtypeStruct((run.rows, width), jnp.int32) for name, width in widths.items()
    }
    label_ids = None
    if run.labels:
        label_ids = np.ones((run.labels, run.label_length or run.targets_length), np.int32)
    batch = jax.eval_shape(
        lambda batch: train_step.with_dropout(batch, run.cfg, jax.random.key(0), label_ids), batch
    )
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread), dict(batch)
    )
    step = train_step.make_step(
        PromptedT5(run.cfg, run.prompt_length),
        run.optimizer,
        label_ids=label_ids,
        reparameterisation=run.reparameterisation,
        microbatches=run.microbatches,
    )
    with jax.default_device(run.device):  # See `products.platform`.
        lowered = train_step.jit_step(step, run.device.platform).lower(state, fixed, batch)
    return lowered, state, fixed, batch


def _prompt_layout(run: Run) -> tree.Flat:
    """Shapes of what a prompt is made of: its bank, the rows of deeper layers, its network."""
    found = {train.PROMPT: backbones.prompt_layout(run.cfg, run.mesh, run.prompt_length)}
    if run.depth > 1:
        shape = (run.depth - 1, run.prompt_length, run.cfg.emb_dim)
        found[train.DEEP] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if run.reparameterisation is not None:
        found = jax.eval_shape(run.reparameterisation.init, jax.random.key(0), found)
    everywhere = partition.replicated(run.mesh)
    return {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
        for path, x in found.items()
    }


def need(run: Run) -> Need:
    """Compiles the run's train step and reads off what it needs."""
    lowered, state, fixed, batch = lower(run)
    options = CPU_OPTIONS if run.device.platform == "cpu" else {}
    counted = Need(
        weights=shared_size(fixed, run.mesh),
        trained=size_on_device(state["trainable"]),
        optimizer=size_on_device(state["opt"]),
        batch=size_on_device(batch),
        temporaries=0,
        start=size_on_device(
            {k: x for k, x in state["trainable"].items() if not k.startswith("prompt/")}
        ),
    )
    try:
        stats = lowered.compile(compiler_options=options).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        others = max(0, said_in_refusing(str(error)) - (counted.peak - counted.start))
        return dataclasses.replace(counted, temporaries=others, refused=True)
    if stats is None:
        raise ValueError(f"the backend {run.device.platform!r} does not say what memory it needs")
    # Results that do not lie where an argument lay.
    fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
    temporaries = stats.temp_size_in_bytes + max(fresh, 0) + stats.generated_code_size_in_bytes
    kernels = 0
    if run.device.platform == "cpu":
        # By runs that were measured: see docs/memory.md.
        kernels = temporaries // (2 if run.cfg.remat == "full" else 3)
    return dataclasses.replace(counted, temporaries=temporaries, kernels=kernels)


def said_in_refusing(text: str) -> int:
    """Bytes that a program takes with its arguments, as a TPU's compiler refuses it; 0 if unsaid.

    It says 'memory required … (40.00G) exceeds available HBM (15.75G)' or 'Used 40.00G of 15.75G'.
    """
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of", text)
    if not found:
        return 0
    number, unit = (group for group in found.groups() if group)
    return int(float(number) * 2 ** (10 * (1 + "KMGT".index(unit))))


# --- what fits ----------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """Bytes of '80GiB' or '24 GB'."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B|B)\s*", text)
    if not found:
        raise ValueError(
            f"--device_memory is {text!r}, expected a number and a unit: {', '.join(UNITS)}"
        )
    return int(float(found[1]) * UNITS[found[2]])


def device_memory(mesh: jax.sharding.Mesh) -> int | None:
    """Bytes that each device has, as the runtime says; on CPU the host's, shared by its devices."""
    device = mesh.local_devices[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None and device.platform == "cpu":
        host = host_memory()
        return host and host // len(mesh.local_devices)
    return limit


def host_memory(root: pathlib.Path = pathlib.Path("/")) -> int | None:
    """Bytes that this process may take: what the machine has, or less where a container has less.

    None where the kernel does not say.
    """
    try:
        text = (root / "proc/meminfo").read_text()
    except OSError:
        return None
    found = [1024 * int(re.search(r"MemTotal:\s+(\d+)", text)[1])]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # Of control groups 2 and 1.
        with contextlib.suppress(OSError, ValueError):
            found.append(int((root / "sys/fs/cgroup" / name).read_text()))
    return min(found)


def suggest(
    run: Run, first: Need, limit: int, measure: Callable[[Run], Need] = need
) -> list[tuple[Run, Need]]:
    """Runs that fit `limit` bytes per device, compiled, best first.

    If `run`, which needs `first`, fits: the largest power of two times its rows that does. If not:
    for every policy of rematerialisation, cheapest first, the fewest microbatches that fit; if none
    does, the same with int8 weights. Needs grow linearly with rows, so few candidates compile.
    """
    if first.fits(limit):
        return _larger(run, first, limit, measure)
    found = []
    for weights in dict.fromkeys((run.weights, "int8")):
        if weights == "int8" != run.weights and not train.prompt_alone(run.trainable):
            continue
        for remat in t5_config.REMAT[t5_config.REMAT.index(run.cfg.remat) :]:
            fitting = _fewest_parts(run.but(weights=weights, remat=remat), limit, measure)
            found += [fitting] if fitting else []
            if fitting and fitting[0].microbatches == run.microbatches:
                break
        if found:
            break
    return found


def _larger(run: Run, first: Need, limit: int, measure) -> list[tuple[Run, Need]]:
    fixed = first.peak - first.by_rows
    times = 1
    while fixed + 2 * times * first.by_rows <= limit and times < 64:
        times *= 2
    while times > 1:
        larger = run.but(rows=run.rows * times, batch_size=run.batch_size * times)
        needed = measure(larger)
        if needed.fits(limit):
            return [(larger, needed)]
        times //= 2
    return [(run, first)]


def _fewest_parts(run: Run, limit: int, measure) -> tuple[Run, Need] | None:
    """The run in the fewest microbatches that fit, or None."""
    most = (run.batch_size or run.rows) // run.mesh.shape["data"]
    candidates = [run.cut(n) for n in range(run.microbatches, most + 1) if most % n == 0]
    least, least_need = candidates[-1], measure(candidates[-1])
    if not least_need.fits(limit):
        return None
    # One row costs at most what a part of one row does: a first guess that is rather too low.
    room = (limit - (least_need.peak - least_need.by_rows)) / least_need.by_rows
    for candidate in candidates[:-1]:
        if candidate.part <= room * least.part:
            needed = measure(candidate)
            if needed.fits(limit):
                return candidate, needed
    return least, least_need


# --- from gin's values to a report --------------------------------------------------------------


def of_settings(settings: Mapping[str, Any], mesh: jax.sharding.Mesh, labels: int = 0) -> Run:
    """The run that `launch.train` would do with these keyword arguments, at full feature lengths.

    They must have passed `train_settings.check`. The architecture is ARCHITECTURE's, else read off
    the headers of the checkpoint. How long examples really are only the data tells: shorter ones
    need less.
    """
    lengths, length = settings["task_feature_lengths"], settings["prompt_length"]
    batch_size, microbatches = settings["batch_size"], settings["microbatches"]
    if (pack := settings["pack_length"]) == "auto":
        raise ValueError(
            "PACK_LENGTH 'auto' is chosen by the data, which a dry run does not read; give it the "
            "row length that the run says"
        )
    name, path = settings.get("architecture"), settings.get("initial_checkpoint_path")
    if name is not None:
        cfg = t5_config.config(name)
    elif path is not None:
        cfg = formats.open_stored(path, settings.get("vocabulary_file")).cfg
    else:
        raise ValueError("give ARCHITECTURE or INITIAL_CHECKPOINT_PATH to say how large it is")
    cfg = dataclasses.replace(
        cfg,
        dropout_rate=settings["dropout_rate"],
        dtype=jnp.dtype(settings["dtype"]),
        remat=settings["remat"],
    )
    inputs, targets = (data.round_up(lengths[feature]) for feature in ("inputs", "targets"))
    rows = batch_size = train_step.rows_for(batch_size, mesh, microbatches)
    width = length + inputs
    label_length = 0
    if pack:
        # Rows may be shorter than the longest example that there could be.
        longest = max(1, min(lengths["inputs"], pack - length))
        found = [np.ones(n, np.int32) for n in (longest, lengths["targets"])]
        full = data.Examples("full", [found[0]], [found[1]], [{}], {})
        slots = prompted.slots(cfg.vocab_size, length)
        over = mesh.shape["data"] * microbatches
        label_length = lengths["targets"] if labels else 0
        rows, width, targets = packing.Packing(
            [full], [1.0], batch_size, 0, slots, pack, over, label_length=label_length
        ).shape
    return Run(
        cfg=cfg,
        weights=settings["weights"],
        mesh=mesh,
        optimizer=settings["optimizer"](),
        prompt_length=length,
        rows=rows,
        encoder_length=width,
        targets_length=targets,
        packed=bool(pack),
        batch_size=batch_size if pack else 0,
        microbatches=microbatches,
        labels=labels,
        label_length=label_length,
        trainable=tuple(settings["trainable"]),
        frozen=tuple(settings["frozen"]),
        depth=prompt.layers_read(settings["prompt_depth"], cfg),
        reparameterisation=settings["reparameterisation"],
    )


def report(run: Run, found: Need, limit: int | None) -> str:
    """What a dry run prints of the run as it is."""
    gib = 2**30
    kept = run.weights or jnp.dtype(run.cfg.dtype).name
    lines = [
        f"one train step on {run.mesh.size} x {run.device.device_kind} "
        f"(mesh {dict(run.mesh.shape)}): {describe(run)}",
        f"encoder length {run.encoder_length} (prompt {run.prompt_length}), target length "
        f"{run.targets_length}, weights {kept}, activations {jnp.dtype(run.cfg.dtype).name}",
        "per device, GiB",
    ]
    for name, title in NAMES.items():
        if name != "kernels" or found.kernels:
            lines.append(f"  {title:28} {getattr(found, name) / gib:9.3f}")
    lines.append(f"  {'peak':28} {found.peak / gib:9.3f}")
    if run.device.platform == "cpu":
        lines.append("on a CPU the process itself takes up to half a GiB besides")
    if limit is None:
        lines.append("the device's memory is not known: give --device_memory=80GiB")
        return "\n".join(lines)
    fits = "fits" if found.fits(limit) else "does not fit"
    if found.refused:
        fits += ": the device's compiler refuses it for want of memory"
    lines.append(f"  {'device':28} {limit / gib:9.3f}  {fits}")
    return "\n".join(lines)


def advice(run: Run, suggested: Sequence[tuple[Run, Need]]) -> str:
    """What a dry run prints of other settings."""
    if not suggested:
        return (
            "nothing that was tried fits: use a larger MODEL_PARTITIONS, shorter "
            "TASK_FEATURE_LENGTHS or a smaller BATCH_SIZE"
        )
    if suggested[0][0] == run:
        return "twice the batch size is not expected to fit"
    return "\n".join(
        f"fits: {describe(other)}: peak {needed.peak / 2**30:.3f}" for other, needed in suggested
    )


NAMES = {
    "weights": "frozen weights",
    "trained": "trained parameters",
    "optimizer": "optimizer state",
    "batch": "batch",
    "temporaries": "activations, temporaries",
    "start": "what trained weights were",
    "kernels": "of kernels, an estimate",
}


def describe(run: Run) -> str:
    """The settings that decide about memory, as gin has them."""
    rows = f" ({run.rows} packed rows)" if run.packed else ""
    return (
        f"BATCH_SIZE={run.batch_size or run.rows}{rows} MICROBATCHES={run.microbatches} "
        f"REMAT={run.cfg.remat!r} WEIGHTS={run.weights!r}"
    )


def dry_run(
    settings: Mapping[str, Any],
    stated: str | None = None,
    labels: int = 0,
    elsewhere: str | None = None,
) -> Iterator[str]:
    """What `launch.train` with these keyword arguments needs, then what fits, as texts.

    `stated` is the device's memory. `elsewhere` names devices to compile for (see
    `topology.describe`), None takes those at hand. The second text takes a few more compilations.
    """
    devices, room = topology.describe(elsewhere) if elsewhere else (None, None)
    mesh = settings["mesh"](among=devices) if elsewhere else settings["mesh"]()
    run = of_settings(settings, mesh, labels)
    limit = parse_size(stated) if stated else room or device_memory(mesh)
    found = need(run)
    yield report(run, found, limit)
    if limit is not None:
        yield advice(run, suggest(run, found, limit))
