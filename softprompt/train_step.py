"""One training step: loss, gradients of the trainable partition alone, and the state it changes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from softprompt import data, decode, dropout, losses, partition, tree, xla
from softprompt.products import platform
from softprompt.prompted import PromptedT5
from softprompt.reparameterise import Mlp
from softprompt.t5_config import T5Config

State = dict[str, Any]
# Where a batch has dropout's masks.
MASKS = "dropout_masks"


def make_loss(
    module: PromptedT5,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    labelled: bool = False,
    collapse: Callable[[tree.Flat], tree.Flat] = dict,
) -> Callable[..., tuple[jax.Array, tuple[jax.Array, jax.Array]]]:
    """The loss `(trainable, frozen, batch, label_ids) -> mean, (sum, count)` of a batch.

    It is that of the target tokens or, if `labelled`, that of the right label among `label_ids`
    `[C, L]`. For dropout see `with_dropout`. `collapse` makes the model's parameters of all
    parameters.
    """

    def loss_fn(trainable, frozen, batch, label_ids):
        params, ids = tree.unflatten(collapse({**frozen, **trainable})), batch["encoder_ids"]
        segments, masks = batch.get("encoder_segments"), batch.get(MASKS)
        if labelled:
            examples = _examples(batch, label_ids)
            scores = decode.score_labels(module, params, ids, label_ids, masks, segments, examples)
            targets = batch["targets"].reshape(*scores.shape[:-1], -1)
            loss, count = losses.label_cross_entropy(scores, targets, label_ids)
            return loss / count, (loss, count)
        logits = module.apply(
            {"params": params},
            ids,
            losses.shift_right(batch["targets"], batch.get("decoder_segments")),
            segments,
            batch.get("decoder_segments"),
            masks,
        )
        loss, count = losses.cross_entropy(logits, batch["targets"], z_loss, label_smoothing)
        return loss / count, (loss, count)

    return loss_fn


@functools.partial(jax.jit, static_argnums=0)
def step_key(seed: int, step: jax.Array) -> jax.Array:
    """The key of what is drawn for the step after `step` others."""
    return jax.random.fold_in(jax.random.key(seed), step)


def with_dropout(
    batch: Mapping[str, Any],
    cfg: T5Config,
    key: jax.Array,
    label_ids: np.ndarray | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Mapping[str, Any]:
    """The batch and what dropout keeps of it, if there is dropout and it is not there yet.

    A step draws its own, the same ones, where its batch comes without: see `dropout.draw` for why
    not to leave it that. `label_ids` as in `make_loss`.
    """
    if not cfg.dropout_rate or MASKS in batch:
        return batch
    rows, length = batch["encoder_ids"].shape
    targets = batch["targets"].shape[1]
    if label_ids is not None:
        targets = _examples(batch, label_ids) * label_ids.size
    return {**batch, MASKS: dropout.draw(key, cfg, rows, length, targets, sharding)}


def _examples(batch: Mapping[str, Any], label_ids: np.ndarray) -> int:
    """How many examples a row has room for: packed targets lie a label's width apart."""
    if "encoder_segments" not in batch:
        return 1
    return batch["targets"].shape[1] // label_ids.shape[-1]


def advance(
    state: State,
    optimizer: optax.GradientTransformation,
    grads: tree.Flat,
    mean: jax.Array,
    loss: jax.Array,
    count: jax.Array,
) -> State:
    """The state after a step with these gradients, loss and count.

    A step whose loss or update is not finite changes nothing, and neither does any step after it:
    `state["bad_step"]` names it (else -1).
    """
    updates, opt = optimizer.update(grads, state["opt"], state["trainable"])
    moved = optax.apply_updates(state["trainable"], updates)
    # A gradient that is not finite shows in its update.
    finite = jnp.isfinite(mean) & jnp.isfinite(optax.tree.norm(updates))
    good = finite & (state["bad_step"] < 0)

    def choose(new, old):
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

    return {
        "trainable": choose(moved, state["trainable"]),
        "opt": choose(opt, state["opt"]),
        "step": state["step"] + 1,
        "loss_sum": state["loss_sum"] + jnp.where(good, loss, 0),
        "count_sum": state["count_sum"] + jnp.where(good, count, 0),
        "bad_step": jnp.where(
            finite | (state["bad_step"] >= 0), state["bad_step"], state["step"] + 1
        ),
    }


def make_step(
    module: PromptedT5,
    optimizer: optax.GradientTransformation,
    seed: int = 0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    label_ids: np.ndarray | None = None,
    reparameterisation: Mlp | None = None,
    microbatches: int = 1,
) -> Callable[[State, tree.Flat, Mapping[str, Any]], State]:
    """The train step `(state, frozen, batch) -> state`, to be jitted.

    With `label_ids` `[C, L]` the loss is that among the labels: see `make_loss`. Only
    `state["trainable"]` is differentiated; with `reparameterisation` it is the prompt before that
    network, and the network. With `microbatches` n the batch is computed in n equal parts one after
    the other, part i of rows i, i + n, …; their losses and gradients are summed and divided once,
    by the count of the whole batch. For a step that is not finite see `advance`.
    """
    collapse = reparameterisation.collapse if reparameterisation else dict
    loss_fn = make_loss(module, z_loss, label_smoothing, label_ids is not None, collapse)

    def step(state: State, frozen: tree.Flat, batch: dict[str, Any]) -> State:
        batch = with_dropout(batch, module.cfg, step_key(seed, state["step"]), label_ids)
        if microbatches == 1:
            (mean, (loss, count)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state["trainable"], frozen, batch, label_ids
            )
        else:

            def summed(trainable, part):
                return loss_fn(trainable, frozen, part, label_ids)[1]

            loss, count, grads = _accumulated(summed, state["trainable"], batch, microbatches)
            mean, grads = loss / count, jax.tree.map(lambda g: g / count, grads)
        return advance(state, optimizer, grads, mean, loss, count)

    return step


def jit_step(step: Callable, platform: str | None = None) -> Any:
    """`jax.jit(step)`, whose first argument is given away, with XLA's options for a train step."""
    return jax.jit(step, donate_argnums=0, compiler_options=xla.step_options(platform))


def settle(states: Any) -> None:
    """On a CPU, waits for the step that was dispatched last; elsewhere steps queue up.

    XLA's CPU client gives a step its temporaries when it is queued. And the devices of a CPU take
    queued steps on the threads that compute: waiting for each other in sums over devices they can
    have all of them, and XLA aborts the process after 40 s.
    """
    if platform() == "cpu":
        jax.block_until_ready(states)


def _accumulated(loss_fn, trainable, batch, parts: int):
    """Sums over a batch's parts: of the loss, of its count, and of its gradient."""
    rows = len(batch["targets"])
    if rows % parts:
        raise ValueError(f"a batch of {rows} rows cannot be cut into {parts} equal microbatches")
    # Rows stay on the devices they are on: part i takes every parts-th row from row i.
    split = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), dict(batch)
    )

    def add(sums, part):
        (loss, count), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable, part)
        return jax.tree.map(jnp.add, sums, (loss, count, grads)), None

    zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable))
    return jax.lax.scan(add, zero, split)[0]


def rows_for(batch_size: int, mesh: jax.sharding.Mesh, microbatches: int) -> int:
    """`batch_size` rounded up to rows that the mesh's data axis takes in equal microbatches.

    Raises:
      ValueError: `microbatches` does not divide `batch_size`.
    """
    if microbatches < 1 or batch_size % microbatches:
        raise ValueError(
            f"MICROBATCHES is {microbatches}, expected a divisor of BATCH_SIZE, which is "
            f"{batch_size}"
        )
    return data.round_up(batch_size, mesh.shape["data"] * microbatches)


def abstract_state(
    trainable: tree.Flat, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> State:
    """Shapes, types and shardings of the state; `trainable` may be arrays or their shapes.

    Moments are sharded as their parameters are.
    """
    everywhere = partition.replicated(mesh)

    def place(path, leaf):
        # Moments are dicts with the parameters' own keys.
        param = trainable.get(getattr(path[-1], "key", None)) if path else None
        same = param is not None and param.shape == leaf.shape
        sharding = param.sharding if same else everywhere
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    moments = jax.eval_shape(optimizer.init, trainable)
    scalars = {"step": jnp.int32, "loss_sum": jnp.float32, "count_sum": jnp.float32,
               "bad_step": jnp.int32}  # fmt: skip
    return {
        "trainable": {
            path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for path, x in trainable.items()
        },
        "opt": jax.tree_util.tree_map_with_path(place, moments),
        **{k: jax.ShapeDtypeStruct((), t, sharding=everywhere) for k, t in scalars.items()},
    }


def init_state(
    trainable: tree.Flat, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> State:
    """The state before the first step, sharded as its parameters are."""
    everywhere = partition.replicated(mesh)
    shapes = abstract_state(trainable, optimizer, mesh)["opt"]
    places = jax.tree.map(lambda x: x.sharding, shapes)
    # A copy: the train step gives its state's buffers away.
    trainable = {path: jnp.copy(x) for path, x in trainable.items()}
    scalars = {
        "step": np.int32(0),
        "loss_sum": np.float32(0),
        "count_sum": np.float32(0),
        "bad_step": np.int32(-1),
    }
    return {
        "trainable": trainable,
        "opt": jax.jit(optimizer.init, out_shardings=places)(trainable),
        **{name: partition.place(x, everywhere) for name, x in scalars.items()},
    }
