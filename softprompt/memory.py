"""Memory of a training run per device, from its compiled program, before anything is loaded.

The train step is lowered from shapes, types and shardings alone, and compiled for the devices at
hand or for others (`topology`); XLA's buffer assignment then says what it needs. Nothing of the
backbone is allocated.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from softprompt import backbone as backbones
from softprompt import (
    data,
    partition,
    t5_config,
    train,
    train_step,
    tree,
)
from softprompt.prompted import PromptedT5
from softprompt.reparameterise import Mlp

# What a step's need is the sum of.
NAMES = {
    "weights": "frozen weights",
    "trained": "trained parameters",
    "optimizer": "optimizer state",
    "batch": "batch",
    "temporaries": "activations, temporaries",
    "start": "what trained weights were",
    "kernels": "of kernels, an estimate",
}
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
