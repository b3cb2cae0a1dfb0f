"""`softprompt train --dry_run`: what a run needs of each device's memory, and what would fit.

From gin's values to a report; what a run needs is measured by `memory`.
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

from softprompt import (
    data,
    formats,
    packing,
    prompt,
    prompted,
    t5_config,
    topology,
    train,
    train_step,
)
from softprompt.memory import NAMES, Need, Run, need

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


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


def describe(run: Run) -> str:
    """The settings that decide about memory, as gin has them."""
    rows = f" ({run.rows} packed rows)" if run.packed else ""
    return (
        f"BATCH_SIZE={run.batch_size or run.rows}{rows} MICROBATCHES={run.microbatches} "
        f"REMAT={run.cfg.remat!r} WEIGHTS={run.weights!r}"
    )


def texts(
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
