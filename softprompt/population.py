"""A population: many prompts trained in one run over one frozen backbone, each as if alone.

A step takes the next batch of every member, and runs them through the backbone as one batch
`[N, B, T]`, each row with its own member's prompt. The loss of a member is divided by the count of
its own rows, so its gradient is the one it has alone. Optimizer, schedule, order of data,
evaluation, patience and checkpoints are each member's own, and so is its folder: it is what
`train.fit` leaves, and either of the two goes on with what the other left.
"""

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from softprompt import (
    checkpoint,
    partition,
    selection,
    signals,
    throughput,
    train,
    train_step,
    tree,
    xla,
)
from softprompt.backbone import Backbone
from softprompt.logbook import Logbook, duration, say
from softprompt.prompted import PROMPT, PromptedT5
from softprompt.train import Result
from softprompt.train_step import State

Batch = Mapping[str, np.ndarray]

RUNNING = "running"
FINISHED = "finished"
EARLY = "stopped early"
DIVERGED = "diverged"
INTERRUPTED = "interrupted"


@dataclasses.dataclass(frozen=True)
class Member:
    """One prompt of a population: its name, and the arguments of `train.fit` that make it."""

    name: str
    batches: Callable[[int], Iterator[Batch]]
    optimizer: optax.GradientTransformation
    train_steps: int
    prompt: np.ndarray
    evaluate: Callable[[tree.Flat, int], dict[str, float]] | None = None
    eval_period: int = 0
    best_metric: str | None = None
    patience: int = 0
    checkpoint_period: int = 0
    keep: int = 2
    log_period: int = 50
    model_dir: str | os.PathLike | None = None
    save: selection.Save | None = None
    identity: Mapping[str, Any] | None = None
    seed: int = 0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    label_ids: np.ndarray | None = None

    @classmethod
    def of(cls, name: str, arguments: Mapping[str, Any]) -> "Member":
        """The member that a call of `train.fit` with these arguments would train.

        Raises:
          ValueError: it would train anything but a plain prompt.
        """
        arguments = {k: v for k, v in arguments.items() if k not in ("backbone", "frozen")}
        patterns = list(arguments.pop("trainable", ["prompt/.*"]))
        known = {field.name for field in dataclasses.fields(cls)}
        plain = {"microbatches": 1}
        further = [
            k for k, v in arguments.items()
            if k not in known and v is not None and not (k in plain and v == plain[k])
        ]  # fmt: skip
        if arguments.get("prompt") is None:
            further.append("no prompt")
        if patterns != ["prompt/.*"] or further:
            raise ValueError(
                f"{name}: a population tunes plain prompts, TRAINABLE ['prompt/.*']; got TRAINABLE "
                f"{', '.join([str(patterns), *further])}"
            )
        return cls(name, **{k: v for k, v in arguments.items() if k in known})


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a member ends with: as `train.fit` returns it, and how it ended."""

    name: str
    status: str
    result: Result


class _Run:
    """A member on its way: its state on the device, its next batch, its best step."""

    def __init__(self, member: Member, backbone: Backbone):
        width = backbone.cfg.emb_dim
        if np.ndim(member.prompt) != 2 or np.shape(member.prompt)[1] != width:
            raise ValueError(
                f"{member.name}: the prompt has shape {np.shape(member.prompt)}, expected "
                f"(P, {width}) for the backbone {backbone.name!r}"
            )
        self.member, self.status = member, RUNNING
        self._frozen = backbone.params
        self._everywhere = partition.replicated(backbone.mesh)
        prompt = jax.device_put(np.asarray(member.prompt, np.float32), self._everywhere)
        self.state = train_step.init_state({PROMPT: prompt}, member.optimizer, backbone.mesh)
        self.best = selection.Best(member.model_dir, member.save, member.best_metric)
        folder, restored = member.model_dir, None
        if folder is not None:
            restored = checkpoint.restore_state(folder, self.state, say)
        if restored:
            self.state = restored[0]
            at, ours = int(self.state["step"]), dict(member.identity or {})
            train.check_identity(restored[1]["identity"], ours, folder, at, member.train_steps)
            say(f"{member.name}: resuming from step {at}")
            self.best.restore(restored[1]["best"], {PROMPT})
        self.step = self._saved = int(self.state["step"])
        self._judged = selection.judged(restored[1]["best"]) if restored else 0
        self._log = Logbook(folder, self.step, self._judged)
        if not restored and folder is not None and member.save:
            prompt = np.asarray(member.prompt, np.float32)
            member.save(pathlib.Path(folder) / "prompts" / "initial", {PROMPT: prompt}, {"step": 0})
        self.result: Result | None = None
        self._stream = member.batches(self.step)
        self.batch = dict(next(self._stream))
        # What goes together is told by the first batches, also where a run goes on.
        self.first = self.batch if not self.step else next(member.batches(0))
        self._behind: tuple[int, Iterator[Batch]] | None = None
        self._settle()

    def batch_at(self, step: int) -> Batch:
        """The batch of a step that is this member's next one, or lies behind it."""
        if step == self.step:
            return self.batch
        if self._behind is None or self._behind[0] != step:
            self._behind = step, self.member.batches(step)
        stream = self._behind[1]
        self._behind = step + 1, stream
        return next(stream)

    def _settle(self) -> None:
        """Ends the run if it is at its last step or out of patience."""
        member = self.member
        if self.step >= member.train_steps:
            if member.evaluate and self.best.judged < self.step:  # Nothing was left to do.
                self._evaluate()
                self._save_checkpoint()
            self.end(FINISHED)
            return
        period = member.eval_period if member.evaluate and self.step else 0
        judged = max(self.best.judged, self._judged)
        if period and self.step % period == 0 and judged < self.step:  # It was stopped before.
            self._evaluate()
            self._save_checkpoint()
        if self.best.out_of_patience(member.patience):
            say(
                f"{member.name}: stopping early at step {self.step}: no better figure since "
                f"{self.best.step}"
            )
            self.end(EARLY)

    def end(self, status: str) -> None:
        """Saves what there is to save, and fetches the result from the device."""
        member, now = self.member, self._trained()
        self.status = status
        if status in (FINISHED, EARLY):
            if self.step > self._saved:
                self._save_checkpoint()
            if not member.evaluate:
                self.best.save_unjudged(self.step, now)
        self._log.close()
        stopped = status == INTERRUPTED
        self.result = Result.of(self.step, now, self.best, stopped)

    def stop(self, moved: bool) -> None:
        """Ends the run before its end, saved where it has `moved` since it was."""
        if moved and self._saved < self.step:
            self._save_checkpoint()
        self.end(INTERRUPTED)

    def _trained(self) -> dict[str, np.ndarray]:
        return {path: np.asarray(jax.device_get(x)) for path, x in self.state["trainable"].items()}

    def _save_checkpoint(self) -> None:
        member = self.member
        if member.model_dir is not None:
            about = {"best": self.best.facts, "identity": member.identity or {}}
            checkpoint.save_state(member.model_dir, self.state, about, member.keep)
        self._saved = self.step

    def after(self, asked: signals.Asked) -> float | None:
        """What is due after the step just taken; returns the mean loss if it was read."""
        member = self.member
        self.step += 1
        step, last = self.step, self.step == member.train_steps
        stopping = asked(step)

        def due(period: int) -> bool:
            return last or bool(period and step % period == 0)

        due_eval = member.evaluate is not None and due(member.eval_period)
        due_log, due_save = due(member.log_period), due(member.checkpoint_period)
        loss = None
        if due_log or due_eval or due_save or stopping:
            try:
                train._check_finite(self.state, member.save, member.model_dir, self._trained)
            except train.Diverged as error:
                say(f"{member.name}: {error}")
                self.end(DIVERGED)
                return None
        if due_log:
            loss = float(self.state["loss_sum"]) / max(float(self.state["count_sum"]), 1)
            self._log.write("train", step, {"loss": loss})
            zero = jax.device_put(np.float32(0), self._everywhere)
            self.state = {**self.state, "loss_sum": zero, "count_sum": jnp.copy(zero)}
        if due_eval and not stopping:
            if last:  # An evaluation that fails loses nothing.
                self._save_checkpoint()
            try:
                self._evaluate(asked)
            except signals.Stopped:
                stopping = True
        if due_save or stopping:
            self._save_checkpoint()
        if stopping and not (last and (not member.evaluate or self.best.judged == step)):
            self.end(INTERRUPTED)
        else:
            self._settle()
        if self.status == RUNNING:
            self.batch = dict(next(self._stream))
        return loss

    def _evaluate(self, asked: signals.Asked | None = None) -> None:
        member = self.member
        with asked.at_once() if asked else contextlib.nullcontext():
            figures = member.evaluate({**self._frozen, **self.state["trainable"]}, self.step)
        self.best.judge(self.step, figures, self._log, self._trained, f"{member.name}: ")


class _Group:
    """Members whose rows go through the backbone in one batch, and their compiled step."""

    def __init__(self, runs: Sequence[_Run], backbone: Backbone):
        self.runs = list(runs)
        self._frozen = dict(backbone.params)
        self._rows = NamedSharding(backbone.mesh, PartitionSpec(None, *partition.spec(("batch",))))
        self._cfg, self._by_rows = backbone.cfg, partition.batch_sharding(backbone.mesh)
        # A mask of dropout is drawn for a shape, and is to be the one that a member draws alone.
        self._one_shape = backbone.cfg.dropout_rate > 0
        self._label_ids = None
        if self.runs[0].member.label_ids is not None:
            labels = [run.member.label_ids for run in self.runs]
            widest = tuple(max(x.shape[axis] for x in labels) for axis in (0, 1))
            self._label_ids = np.stack([_padded(x, widest) for x in labels])
        self._step = jax.jit(self._make_step(), compiler_options=xla.step_options())

    def _make_step(self):
        members, label_ids = [run.member for run in self.runs], self._label_ids
        lengths = [len(member.prompt) for member in members]
        one = members[0]
        loss_fn = train_step.make_loss(
            PromptedT5(self._cfg, max(lengths)),
            one.z_loss,
            one.label_smoothing,
            label_ids is not None,
        )

        def gradient(bank, frozen, batch, labels):
            return jax.value_and_grad(loss_fn, has_aux=True)({PROMPT: bank}, frozen, batch, labels)

        def step(states: list[State], frozen: tree.Flat, batch: Mapping[str, jax.Array]):
            # The bank [N, P, H] of all members; rows that a shorter prompt lacks have no slots.
            bank = jnp.stack(
                [
                    jnp.pad(state["trainable"][PROMPT], ((0, max(lengths) - n), (0, 0)))
                    for state, n in zip(states, lengths, strict=True)
                ]
            )
            axes = (0, None, 0, None if label_ids is None else 0)
            (mean, (loss, count)), grads = jax.vmap(gradient, axes)(bank, frozen, batch, label_ids)
            return [
                train_step.advance(
                    state,
                    member.optimizer,
                    {PROMPT: grads[PROMPT][i, : lengths[i]]},
                    mean[i],
                    loss[i],
                    count[i],
                )
                for i, (member, state) in enumerate(zip(members, states, strict=True))
            ]

        return step

    def step(self, active: Sequence[_Run]) -> None:
        """A step of the members that are `active`; the lanes of the others are idle.

        Batches are padded to the longest of the step, which in length buckets is another one at
        every step: there are as many compiled shapes as buckets. Members that are ahead count for
        the length, so that one that catches up takes the shapes it would have taken with them.
        """
        active = [run for run in self.runs if run in active]
        step = active[0].step
        if self._one_shape:
            alike: dict[tuple, list[_Run]] = {}
            for run in active:
                alike.setdefault(tuple(x.shape for x in run.batch.values()), []).append(run)
            for together in alike.values():
                self._step_of(together, [run.batch for run in together])
        else:
            ahead = [run.batch_at(step) for run in self.runs if run.step > step]
            self._step_of(active, [run.batch for run in active] + ahead)

    def _step_of(self, active: Sequence[_Run], batches: Sequence[Batch]) -> None:
        """A step of `active` members, as long as the longest of `batches`."""
        batch = {}
        for name in active[0].batch:
            shape = tuple(max(one[name].shape[axis] for one in batches) for axis in (0, 1))
            idle = np.zeros(shape, np.int32)
            rows = [_padded(run.batch[name], shape) if run in active else idle for run in self.runs]
            batch[name] = np.stack(rows)
        batch = self._with_dropout(jax.device_put(batch, self._rows))
        states = self._step([run.state for run in self.runs], self._frozen, batch)
        train_step.settle(states)
        for run, state in zip(self.runs, states, strict=True):
            if run in active:
                run.state = state

    def _with_dropout(self, batch: Mapping[str, jax.Array]) -> Mapping[str, Any]:
        """The batch and what dropout keeps of each member's rows, if there is dropout."""
        if not self._cfg.dropout_rate:
            return batch

        def draw(batch, key, labels):
            return train_step.with_dropout(batch, self._cfg, key, labels, self._by_rows)

        keys = [train_step.step_key(run.member.seed, run.state["step"]) for run in self.runs]
        axes = (0, 0, None if self._label_ids is None else 0)
        return jax.vmap(draw, axes)(batch, jnp.stack(keys), self._label_ids)


def _padded(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.pad(x, [(0, most - n) for n, most in zip(x.shape, shape, strict=True)])


def _grouped(runs: Sequence[_Run], backbone: Backbone) -> list[_Group]:
    """Members of one kind of loss together, as long as their rows are no less than half as long.

    With dropout only members of like rows go together, since those of another shape take a step of
    their own: see `_Group`. In packed rows the targets lie as far apart as the longest label is
    long: it is the same in all.
    """

    def kind(run: _Run) -> tuple:
        member, labels = run.member, run.member.label_ids
        found = (labels is not None, member.z_loss, member.label_smoothing, *sorted(run.first))
        if backbone.cfg.dropout_rate > 0:
            found += tuple(x.shape for _, x in sorted(run.first.items()))
            found += () if labels is None else labels.shape
        elif labels is not None and "encoder_segments" in run.first:
            found += labels.shape[1:]
        return found

    def width(run: _Run) -> int:
        return run.first["encoder_ids"].shape[1]

    kinds: dict[tuple, list[list[_Run]]] = {}
    for run in sorted(runs, key=width, reverse=True):
        together = kinds.setdefault(kind(run), [[]])
        if together[-1] and 2 * width(run) < width(together[-1][0]):
            together.append([])
        together[-1].append(run)
    return [_Group(found, backbone) for lists in kinds.values() for found in lists]


def fit(backbone: Backbone, members: Sequence[Member]) -> list[Outcome]:
    """Trains all members to their ends, from step 0 or from where their folders stop.

    A member that ends leaves its lane idle; once half of a batch is idle, the rest go on in a
    smaller one (so there are at most log2(N) compilations more). Members that a kill left behind
    the others catch up first, in the batches they had: the run ends with the same bits. One that
    diverges ends alone. SIGTERM saves all. Memory grows with the rows of all members.

    Raises:
      ValueError: two members of one name, a prompt of another width, or a folder that holds another
        run or is written to by one.
    """
    names = [member.name for member in members]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two members of the population have the name {', '.join(twice)}")
    if not names:
        raise ValueError("the population has no members")
    with contextlib.ExitStack() as folders:
        for member in members:
            folders.enter_context(train.own_folder(member.model_dir))
        return _train([_Run(member, backbone) for member in members], backbone)


def _train(runs: Sequence[_Run], backbone: Backbone) -> list[Outcome]:
    """Takes the steps of all runs until each has ended, or SIGTERM ends them."""
    meter = throughput.Meter(backbone.cfg, 2, backbone.mesh.size)
    groups = _grouped(runs, backbone)
    running = [run for run in runs if run.status == RUNNING]
    for step in sorted({run.step for run in runs if run.status != RUNNING}):
        groups = _without_ended(groups, min([step, *(run.step for run in running)]), backbone)
    clock: tuple[int, float] | None = None
    rounds = 0
    saves = all(run.member.model_dir is not None for run in runs)
    with signals.termination(saves) as asked:
        while running:
            now = min(run.step for run in running)
            active = [run for run in running if run.step == now]
            for run in active:
                meter.add(run.batch, run.member.label_ids)
            for group in groups:
                if any(run in active for run in group.runs):
                    group.step(active)
            rounds += 1
            if clock is None:  # Compiled now.
                jax.block_until_ready([run.state for run in active])
                clock = (rounds, time.monotonic())
                meter.restart()
            read = {run: loss for run in active if (loss := run.after(asked)) is not None}
            if asked(now + 1):
                for run in running:
                    if run.status == RUNNING:
                        run.stop(run in active)
            if read:
                _tell(read, runs, rounds - clock[0], time.monotonic() - clock[1], meter.read())
            running = [run for run in runs if run.status == RUNNING]
            smaller = _without_ended(groups, now + 1, backbone)
            if smaller != groups:
                groups, clock = smaller, None
    if any(run.status == INTERRUPTED for run in runs):
        say("stopped by a signal; the same command goes on from here")
    return [Outcome(run.member.name, run.status, run.result) for run in runs]


def _without_ended(groups: Sequence[_Group], step: int, backbone: Backbone) -> list[_Group]:
    """Groups of which at least half had ended by `step`, without those; the others as they are.

    What goes together at a step thus depends on nothing but who ends when.
    """
    kept = []
    for group in groups:
        alive = [run for run in group.runs if run.status == RUNNING or run.step > step]
        if 2 * len(alive) > len(group.runs):
            kept.append(group)
        elif alive:
            kept.append(_Group(alive, backbone))
    return kept


def _tell(
    read: Mapping[_Run, float],
    runs: Sequence[_Run],
    rounds: int,
    elapsed: float,
    rates: Mapping[str, float],
) -> None:
    """A line of progress; the time left is that of the longest member, if none stops early."""
    losses, furthest = list(read.values()), max(run.step for run in read)
    going = [run for run in runs if run.status == RUNNING]
    remaining = max((run.member.train_steps - run.step for run in going), default=0)
    rate = rounds / max(elapsed, 1e-9)
    left = duration(remaining / rate) if rate else ("?" if remaining else "0s")
    say(
        f"step {furthest}  {len(going)} of {len(runs)} prompts left  loss {np.mean(losses):.4f} "
        f"({min(losses):.4f} to {max(losses):.4f})  {rate:.2f} steps/s  "
        f"{rates['tokens_per_second']:,.0f} tokens/s  MFU {100 * rates['mfu']:.0f}%  {left} left"
    )
