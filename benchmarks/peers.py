"""Prompt tuning on this machine, side by side with its peers: see benchmarks/README.md.

    python benchmarks/peers.py --data_dir=DIR --vocabulary_file=spiece.model \\
      --peft_python=PEFT_VENV/bin/python [--t5x_python=…] [--output=results.json]

T5 1.1 with random weights, a prompt of 100 vectors, the tasks at their real lengths. Each
side runs in a process of its own; repetitions take turns, so that other work on the machine
disturbs all sides alike. Reported are medians over the repetitions, and medians of the ratios
within a repetition. A peer that is not installed is reported as absent. Each figure is said and
written to --output as soon as it is measured; the same command goes on where it was interrupted.

    python benchmarks/peers.py --device=gpu --size=xl --tokens=tokens.npz --peft_python=…

compares ours and PEFT on a GPU, in bfloat16, from token arrays that the first command wrote.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import math
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import numpy as np
from peers_record import Progress, Record
from peers_report import filled, report
from peers_side import Failed, Side, Worker, last_error

TASKS = ("rte", "wic", "boolq")
# (side, case, layout) measured for each task.
CASES = (
    ("ours", "train", "buckets"),
    ("ours", "train", "packed"),
    ("bf16", "train", "buckets"),
    ("peft", "train", "longest"),
    ("peft", "train", "512"),
    ("peft_bf16", "train", "longest"),
    ("t5x", "train", "512"),
    ("t5x", "train", "128"),
    ("ours", "decode", "buckets"),
    ("bf16", "decode", "buckets"),
    ("peft", "decode", "sorted"),
    ("peft_bf16", "decode", "sorted"),
    ("t5x", "decode", "512"),
    ("ours", "rank", "buckets"),
    ("int8", "train", "buckets"),
    ("int8", "decode", "buckets"),
)
# T5 1.1's sizes: H, heads of 64, layers of each stack, width of the MLP.
SIZES = {
    "small": {"width": 512, "heads": 6, "layers": 8, "mlp": 1024},
    "base": {"width": 768, "heads": 12, "layers": 12, "mlp": 2048},
    "large": {"width": 1024, "heads": 16, "layers": 24, "mlp": 2816},
    "xl": {"width": 2048, "heads": 32, "layers": 24, "mlp": 5120},
    "xxl": {"width": 4096, "heads": 64, "layers": 24, "mlp": 10240},
}
# What start, checkpoint and memory are measured with.
LAYOUTS = {"peft": ("longest", "512"), "peft_bf16": ("longest",), "t5x": ("512", "128")}
# What a worker's figures are reported under.
PEERS = {"peft": "PEFT", "peft_bf16": "PEFT in bfloat16", "t5x": "T5X"}
# What must import for a side to be measured.
OURS = ("jax", "flax", "softprompt.train", "softprompt.packing")
PEFT = ("torch", "transformers", "peft")
T5X = (
    "jax",
    "flax",
    "t5x.trainer",
    "t5x.gin_utils",
    "flaxformer.architectures.t5.t5_architecture",
    "prompt_tuning.train.layers",
    "prompt_tuning.train.prompts",
    "prompt_tuning.train.optim",
    "prompt_tuning.train.partitioning",
    "prompt_tuning.train.utils",
)
IMPORT = """
import importlib, importlib.metadata, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        said = " ".join(str(error).split())
        sys.exit(f"{name} does not import: {type(error).__name__}: {said}")
for name in sorted({x.split(".")[0] for x in sys.argv[1:]}):
    try:
        print(name, importlib.metadata.version(name.replace("_", "-")))
    except importlib.metadata.PackageNotFoundError:
        pass
"""
# For every process, this one among them: without JAX's own filter the last line of an error is its
# message. On the CPU no side sees a GPU; on a GPU none takes its memory before it needs it.
ENVIRONMENT = {
    "JAX_TRACEBACK_FILTERING": "off",
    "TOKENIZERS_PARALLELISM": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
ENVIRONMENT_OF = {
    "cpu": {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    "gpu": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
}


def write_tokens(path: pathlib.Path, data_dir: str, vocabulary_file: str) -> None:
    """The tasks' token arrays, in one .npz that needs neither TensorFlow nor seqio to read."""
    import softprompt.tasks.registry  # noqa: F401
    from softprompt import data
    from softprompt.tasks import catalogue, sources

    sources.use_data_dir(data_dir)
    catalogue.use_vocabulary(vocabulary_file)
    arrays = {}
    for name in TASKS:
        task = data.get_tasks(f"super_glue_{name}")[0][0]
        for split in ("train", "validation"):
            found = data.from_task(task, split, {"inputs": 512, "targets": 16})
            for feature in ("inputs", "targets"):
                rows = getattr(found, feature)
                arrays[f"{name}/{split}/{feature}/ids"] = np.concatenate(rows)
                arrays[f"{name}/{split}/{feature}/ends"] = np.cumsum([len(x) for x in rows])
    with open(path, "wb") as file:  # By its name savez would add ".npz" to it.
        np.savez(file, **arrays)


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on.

    Raises:
      Failed: there is no such device.
    """
    cpu = platform.processor()
    found = pathlib.Path("/proc/cpuinfo")
    if found.exists():
        lines = found.read_text(encoding="utf-8").splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    gpu = {}
    if device == "gpu":
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise Failed(f"--device=gpu: nvidia-smi finds none ({error})") from None
        gpu = {"gpu": said.splitlines()[0].strip()}
    return {
        **gpu,
        "cpu": cpu,
        "cores": str(len(os.sched_getaffinity(0))),
        "load_average": " ".join(f"{x:.1f}" for x in os.getloadavg()),
        "python": platform.python_version(),
    }


def versions(python: str | None, modules: tuple[str, ...]) -> str:
    """The packages that a side is measured with.

    Raises:
      Failed: it cannot be measured, and why.
    """
    if python is None:
        raise Failed("not asked for")
    try:
        found = subprocess.run([python, "-c", IMPORT, *modules], capture_output=True, text=True)
    except OSError as error:
        raise Failed(f"absent: {python} does not start: {error.strerror}") from None
    if found.returncode:
        said = found.stderr.strip().splitlines() or [f"exit status {found.returncode}"]
        raise Failed(f"absent: {said[-1]}")
    return ", ".join(found.stdout.strip().splitlines())


def digest(tokens: pathlib.Path) -> str:
    """A hash of the token arrays."""
    found = hashlib.sha256()
    with np.load(tokens) as file:
        for name in sorted(file.files):
            found.update(name.encode() + file[name].tobytes())
    return found.hexdigest()[:16]


def first_steps(folder: pathlib.Path, args, devices: int) -> dict[str, float]:
    """Seconds from the start of `softprompt train` to the end of its first step.

    Cold, and once more with what the first run left in the compilation cache.
    """
    from loading import stored

    from softprompt.formats import native
    from softprompt.vocabulary import open_vocabulary

    random = stored("t5_1_1_small", np.float32)
    vocabulary = open_vocabulary(args.vocabulary_file)
    native.save(folder / "backbone", dataclasses.replace(random, vocabulary=vocabulary))
    found = {}
    for kind in ("cold", "cached"):
        command = [
            sys.executable, "-m", "softprompt", "train", "--gin_file=models/t5_1_1_small.gin",
            "--gin_file=runs/prompt_finetune.gin", f"--data_dir={args.data_dir}",
            "--gin.MIXTURE_OR_TASK_NAME=super_glue_rte", "--gin.EVAL_SPLIT=none",
            f"--gin.INITIAL_CHECKPOINT_PATH={folder / 'backbone'}",
            "--gin.TASK_FEATURE_LENGTHS={'inputs': 512, 'targets': 16}", f"--cpu_devices={devices}",
            f"--gin.MODEL_DIR={folder / kind}", "--gin.TRAIN_STEPS=1", "--gin.BATCH_SIZE=16",
        ]  # fmt: skip
        began = time.perf_counter()
        run = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "SOFTPROMPT_CACHE_DIR": str(folder / "cache")},
        )  # fmt: skip
        said = []
        for line in run.stdout:
            said.append(line)
            if "compiled and done in" in line and kind not in found:
                found[kind] = time.perf_counter() - began
        if run.wait() or kind not in found:
            raise ValueError(f"softprompt train failed: {last_error(''.join(said))}")
    return found


def lean(python: str, settings: dict, layout: str, folder: pathlib.Path) -> dict[str, float]:
    """Seconds to the first step's end, a checkpoint's size and time, and peak memory, on RTE."""
    began = time.perf_counter()
    key = {"case": "train", "task": "rte", "layout": layout}
    with contextlib.closing(Worker(python, settings)) as worker:
        worker.ask(call="prepare", batches=1, **key)
        found = {"first_step": time.perf_counter() - began}
        worker.ask(call="prepare", **key)
        worker.ask(call="time", **key)
        saved = worker.ask(call="checkpoint", folder=str(folder))
        found |= {"checkpoint_bytes": saved["bytes"], "checkpoint_seconds": saved["seconds"]}
        found["peak_memory"] = worker.ask(call="memory")["bytes"]
    return found


def details_due(sides: dict, record: Record, training: bool) -> list[str]:
    """Names of the measurements of start, checkpoint and memory that the record lacks."""
    names = [f"{side} {x}" for side in sides for x in LAYOUTS.get(side, ("buckets", "packed"))]
    names += ["softprompt train"] if training else []
    return [name for name in names if name not in record.found["details"]]


def plan(
    sides: dict, tasks: list[str], repetitions: int, record: Record, details: list[str]
) -> list[tuple[str, str, str]]:
    """The measurements to make: `(kind, name, task)`."""
    found = [("details", name, "rte") for name in details]
    for task in tasks:
        for name in (" ".join(case) for case in CASES if case[0] in sides):
            due = max(0, repetitions - len(record.rates(task, name)))
            found += [("prepare", name, task)] * bool(due) + [("time", name, task)] * due
    return found


def lost(side: str, error: Failed, record: Record, progress: Progress) -> None:
    """Goes on without a peer that failed; ours may not fail."""
    if side not in PEERS:
        raise error
    record.found["missing"][PEERS[side]] = f"failed: {error}"
    record.write()
    progress.drop(side, f"{PEERS[side]} failed: {error}")


def measure(
    workers: dict[str, Side], tasks: list[str], repetitions: int, record: Record,
    progress: Progress,
) -> None:  # fmt: skip
    """Examples per second of every case that the record lacks, into it.

    Its results are `{task: {case: {"rates": […], "shares": […], "examples": …}}}`. A peer that
    fails leaves `workers`.
    """

    def ask(name: str, call: str, task: str) -> dict | None:
        side, case, layout = name.split()
        if side not in workers:
            return None
        try:
            return workers[side].ask(call=call, case=case, task=task, layout=layout)
        except Failed as error:
            del workers[side]
            lost(side, error, record, progress)
            return None

    for task in tasks:
        results = record.found["results"].setdefault(task, {})
        names = [" ".join(case) for case in CASES if case[0] in workers]
        for name in names:
            if len(record.rates(task, name)) < repetitions:
                found = ask(name, "prepare", task)
                if found:
                    results[name] = {"rates": [], "shares": [], **results.get(name, {}), **found}
                    unit = ("prepare", name, task)
                    progress.done(unit, f"{task} {name}: ready, {filled(found)}")
        for repetition in range(repetitions):
            due = [x for x in names if x in results and len(results[x]["rates"]) <= repetition]
            # Of the sides that tell their products: ours.
            sides = {name.split()[0] for name in due if "flops" in results[name]}
            peaks = {side: workers[side].ask(call="peak")["flops"] for side in sides}
            for name in due:
                kept = results[name]
                found = ask(name, "time", task)
                if not found:
                    continue
                kept["rates"].append(kept["examples"] / found["seconds"])
                if "flops" in kept:
                    share = kept["flops"] / found["seconds"] / peaks[name.split()[0]]
                    kept["shares"].append(share)
                record.write()
                line = f"{task} {name}: {kept['rates'][-1]:.2f} examples/s, {filled(kept)}"
                unit = ("time", name, task)
                progress.done(unit, f"{line} ({repetition + 1} of {repetitions})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", help="folder of JSON Lines data sets (super_glue/rte/…)")
    parser.add_argument("--vocabulary_file", help="T5's SentencePiece model")
    parser.add_argument("--tokens", help="token arrays; written where --data_dir is given")
    parser.add_argument("--peft_python", help="an interpreter with torch, transformers and peft")
    parser.add_argument("--t5x_python", help="an interpreter with t5x, flaxformer, prompt_tuning")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--batches", type=int, default=5,
        help="of each case and repetition; twice as many where inputs are decoded by length",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--decode_length", type=int, default=8)
    parser.add_argument("--layers", type=int, help="fewer: a trial of the command")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--remat", choices=("none", "minimal", "full"), default="none")
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="one thread a side and its own CPU seconds: for a machine that others use too",
    )
    parser.add_argument(
        "--no_bfloat16",
        action="store_true",
        help="float32 alone: for a processor that has no products in bfloat16",
    )
    parser.add_argument("--no_details", action="store_true", help="examples per second alone")
    parser.add_argument("--output", help="all figures as JSON; an interrupted run goes on there")
    args = parser.parse_args()
    if not args.data_dir and not args.tokens:
        parser.error("give --data_dir with --vocabulary_file, or --tokens")
    if args.data_dir and not args.vocabulary_file:
        parser.error("--data_dir needs --vocabulary_file: lengths are those in T5's pieces")
    if args.tokens and not args.data_dir and not pathlib.Path(args.tokens).is_file():
        parser.error(f"--tokens: there is no file {args.tokens}")
    if args.batch_size < 2:
        parser.error(f"--batch_size is {args.batch_size}, expected at least 2 (512 takes half)")
    if args.output and not pathlib.Path(args.output).absolute().parent.is_dir():
        parser.error(f"--output: there is no folder {pathlib.Path(args.output).absolute().parent}")
    tasks = args.tasks.split(",")
    if unknown := [name for name in tasks if name not in TASKS]:
        parser.error(f"--tasks: {', '.join(unknown)} is none of {', '.join(TASKS)}")
    if args.device == "gpu" and (args.t5x_python or args.cpu_time):
        parser.error("--device=gpu compares with PEFT alone, by the clock")
    if args.device == "gpu" and args.no_bfloat16:
        parser.error("--no_bfloat16 is for a CPU: on a GPU all sides compute in it")
    if args.t5x_python and args.size != "small":
        parser.error("--t5x_python is for --size=small")
    os.environ.update({**ENVIRONMENT, **ENVIRONMENT_OF[args.device]})
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    about = machine(args.device)
    # As `softprompt --cpu_devices` splits a CPU: as many as cores, as far as they divide a batch.
    cores = 1 if args.cpu_time else int(about["cores"])
    # Ours is imported here as well: what is on disk is then as warm for one as for the other.
    packages, missing = {"ours": versions(sys.executable, OURS)}, {}
    for side, python, modules in (
        ("peft", args.peft_python, PEFT), ("t5x", args.t5x_python, T5X)
    ):  # fmt: skip
        try:
            packages[side] = versions(python, modules)
        except Failed as why:
            missing[PEERS[side]] = str(why)
            say(f"{PEERS[side]}: {why}")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        tokens = pathlib.Path(args.tokens) if args.tokens else folder / "tokens.npz"
        if args.data_dir:
            write_tokens(tokens, args.data_dir, args.vocabulary_file)
        architecture = SIZES[args.size]
        if args.layers:
            architecture = {**architecture, "layers": args.layers}
        common = {
            "device": args.device, "architecture": architecture, "prompt_length": 100,
            "dtype": "float32" if args.device == "cpu" else "bfloat16", "weights": None,
            "remat": args.remat, "batch_size": args.batch_size, "decode_length": args.decode_length,
            # By length there are few, and the longest take most of the time.
            "batches": args.batches, "decode_batches": 2 * args.batches, "cpu_time": args.cpu_time,
            "training": True,
            "cpu_devices": math.gcd(args.batch_size, cores),
        }  # fmt: skip
        local = {**common, "tokens": str(tokens)}
        second = {
            "cpu": ("bf16", {"dtype": "bfloat16"}),
            "gpu": ("int8", {"weights": "int8"}),
        }[args.device]
        sides = {
            "ours": (sys.executable, {**local, "side": "ours"}),
            second[0]: (sys.executable, {**local, "side": "ours", **second[1]}),
        }
        if args.no_bfloat16:
            del sides["bf16"]
        for side, python in (("peft", args.peft_python), ("t5x", args.t5x_python)):
            if side in packages:
                sides[side] = (python, {**local, "side": side})
        if "peft" in sides and "bf16" in sides:
            sides["peft_bf16"] = (args.peft_python, {**sides["peft"][1], "dtype": "bfloat16"})
        same = {"tokens": digest(tokens)}
        same |= {name: about[name] for name in ("gpu", "cpu", "cores") if name in about}
        same |= {f"packages of {side}": found for side, found in packages.items()}
        record = Record(args.output, {**common, **same}, about, missing)
        training = bool(args.data_dir) and args.device == "cpu" and args.size == "small"
        details = [] if args.no_details else details_due(sides, record, training)
        due = plan(sides, tasks, args.repetitions, record, details)
        progress = Progress(due, say)
        for name in details:
            side, layout = name.split()
            if name == "softprompt train":
                found = first_steps(folder, args, common["cpu_devices"])
            elif side in sides:
                try:
                    found = lean(*sides[side], layout, folder / f"saved-{side}-{layout}")
                except Failed as error:
                    del sides[side]
                    lost(side, error, record, progress)
                    continue
            else:
                continue
            record.found["details"][name] = found
            record.write()
            said = ", ".join(f"{x} {value:.4g}" for x, value in found.items())
            progress.done(("details", name, "rte"), f"{name}: {said}")
        if len(due) > len(details):
            # On a GPU one after the other: its memory holds one of them.
            turns = [sides] if args.device == "cpu" else [{k: v} for k, v in sides.items()]
            for together in turns:
                workers = {side: Side(*found) for side, found in together.items()}
                measure(workers, tasks, args.repetitions, record, progress)
                for worker in workers.values():
                    worker.close()
    print("\n".join(report(record.found, tasks)))


if __name__ == "__main__":
    try:
        main()
    except (Failed, ValueError) as mistake:
        sys.exit(f"peers.py: {mistake}")
