"""Prompt tuning on this machine, side by side with its peers: see benchmarks/README.md.

    python benchmarks/peers.py --data_dir=DIR --vocabulary_file=spiece.model \\
      --peft_python=PEFT_VENV/bin/python [--t5x_python=…] [--output=results.json]

T5 1.1 small with random weights, a prompt of 100 vectors, the tasks at their real lengths. Each
side runs in a process of its own; repetitions take turns, so that other work on the machine
disturbs all sides alike. Reported are medians over the repetitions, and medians of the ratios
within a repetition. A peer that is not installed is reported as absent. Each figure is said and
written to --output as soon as it is measured; the same command goes on where it was interrupted.
"""

import argparse
import dataclasses
import hashlib
import json
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

HERE = pathlib.Path(__file__).parent
TASKS = ("rte", "wic", "boolq")
# (side, case, layout) measured for each task.
CASES = (
    ("ours", "train", "buckets"),
    ("ours", "train", "packed"),
    ("bf16", "train", "buckets"),
    ("peft", "train", "longest"),
    ("peft", "train", "512"),
    ("t5x", "train", "512"),
    ("t5x", "train", "128"),
    ("ours", "decode", "buckets"),
    ("bf16", "decode", "buckets"),
    ("peft", "decode", "sorted"),
    ("t5x", "decode", "512"),
    ("ours", "rank", "buckets"),
)
# What start, checkpoint and memory are measured with.
LAYOUTS = {"peft": ("longest", "512"), "t5x": ("512", "128")}
# What must import for a peer to be measured.
PEFT = ("torch", "transformers", "peft")
T5X = (
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
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        sys.exit(f"{name} does not import: {type(error).__name__}: {error}")
"""


class Worker:
    """A side in its own process."""

    def __init__(self, python: str, settings: dict):
        quiet = {"TOKENIZERS_PARALLELISM": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
        script = "t5x_worker.py" if settings["side"] == "t5x" else "worker.py"
        # A file: a pipe that nobody reads would fill up.
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [python, str(HERE / script), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **quiet},
        )

    def ask(self, **call) -> dict:
        """The answer to a call; the worker's own message where it failed."""
        try:
            print(json.dumps(call), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()
            raise ValueError(f"{call}: {said[-1] if said else 'the worker ended'}")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()


def write_tokens(path: pathlib.Path, data_dir: str, vocabulary_file: str) -> None:
    """The tasks' token arrays, in one .npz that needs neither TensorFlow nor seqio to read."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import softprompt.tasks.registry  # noqa: F401
    from softprompt import data
    from softprompt.tasks import features, sources

    sources.use_data_dir(data_dir)
    features.use_vocabulary(vocabulary_file)
    arrays = {}
    for name in TASKS:
        task = data.get_tasks(f"super_glue_{name}")[0][0]
        for split in ("train", "validation"):
            found = data.from_task(task, split, {"inputs": 512, "targets": 16})
            for feature in ("inputs", "targets"):
                rows = getattr(found, feature)
                arrays[f"{name}/{split}/{feature}/ids"] = np.concatenate(rows)
                arrays[f"{name}/{split}/{feature}/ends"] = np.cumsum([len(x) for x in rows])
    np.savez(path, **arrays)


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    cpu = platform.processor()
    found = pathlib.Path("/proc/cpuinfo")
    if found.exists():
        lines = found.read_text(encoding="utf-8").splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": str(len(os.sched_getaffinity(0))),
        "load_average": " ".join(f"{x:.1f}" for x in os.getloadavg()),
        "python": platform.python_version(),
    }


def absent(python: str | None, modules: tuple[str, ...]) -> str | None:
    """Why a peer can not be measured, or None."""
    if python is None:
        return "not asked for"
    try:
        found = subprocess.run([python, "-c", IMPORT, *modules], capture_output=True, text=True)
    except OSError as error:
        return f"absent: {python} does not start: {error.strerror}"
    if found.returncode:
        said = found.stderr.strip().splitlines() or [f"exit status {found.returncode}"]
        return f"absent: {said[-1]}"
    return None


def digest(tokens: pathlib.Path) -> str:
    """A hash of the token arrays."""
    found = hashlib.sha256()
    with np.load(tokens) as file:
        for name in sorted(file.files):
            found.update(name.encode() + file[name].tobytes())
    return found.hexdigest()[:16]


def first_steps(folder: pathlib.Path, args) -> dict[str, float]:
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
            "--gin.TASK_FEATURE_LENGTHS={'inputs': 512, 'targets': 16}",
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
            if "step 1/1" in line and kind not in found:
                found[kind] = time.perf_counter() - began
        if run.wait() or kind not in found:
            raise ValueError(f"softprompt train failed: {''.join(said[-3:])}")
    return found


def lean(python: str, settings: dict, layout: str, folder: pathlib.Path) -> dict[str, float]:
    """Seconds to the first step's end, a checkpoint's size and time, and peak memory, on RTE."""
    began = time.perf_counter()
    worker = Worker(python, settings)
    key = {"case": "train", "task": "rte", "layout": layout}
    worker.ask(call="prepare", batches=1, **key)
    found = {"first_step": time.perf_counter() - began}
    worker.ask(call="prepare", **key)
    worker.ask(call="time", **key)
    saved = worker.ask(call="checkpoint", folder=str(folder))
    found |= {"checkpoint_bytes": saved["bytes"], "checkpoint_seconds": saved["seconds"]}
    found["peak_memory"] = worker.ask(call="memory")["bytes"]
    worker.close()
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


def measure(
    workers: dict[str, Worker], tasks: list[str], repetitions: int, record: Record, done
) -> None:
    """Examples per second of every case that the record lacks, into it.

    Its results are `{task: {case: {"rates": […], "shares": […], "examples": …}}}`.
    """
    for task in tasks:
        results = record.found["results"].setdefault(task, {})
        names = [" ".join(case) for case in CASES if case[0] in workers]

        def ask(name: str, call: str, task: str = task) -> dict:
            side, case, layout = name.split()
            return workers[side].ask(call=call, case=case, task=task, layout=layout)

        for name in names:
            if len(record.rates(task, name)) < repetitions:
                found = ask(name, "prepare")
                results[name] = {"rates": [], "shares": [], **results.get(name, {}), **found}
                done(("prepare", name, task), f"{task} {name}: ready, {filled(found)}")
        for repetition in range(repetitions):
            due = [name for name in names if len(results[name]["rates"]) <= repetition]
            sides = {name.split()[0] for name in due}
            peaks = {side: workers[side].ask(call="peak")["flops"] for side in sides}
            for name in due:
                kept = results[name]
                seconds = ask(name, "time")["seconds"]
                kept["rates"].append(kept["examples"] / seconds)
                if " train " in name and "flops" in kept:
                    kept["shares"].append(kept["flops"] / seconds / peaks[name.split()[0]])
                record.write()
                line = f"{task} {name}: {kept['rates'][-1]:.2f} examples/s, {filled(kept)}"
                done(("time", name, task), f"{line} ({repetition + 1} of {repetitions})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", help="folder of JSON Lines data sets (super_glue/rte/…)")
    parser.add_argument("--vocabulary_file", help="T5's SentencePiece model")
    parser.add_argument("--tokens", help="token arrays; written where --data_dir is given")
    parser.add_argument("--peft_python", help="an interpreter with torch, transformers and peft")
    parser.add_argument("--t5x_python", help="an interpreter with t5x, flaxformer, prompt_tuning")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--batches", type=int, default=5, help="per case and repetition")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--decode_length", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8, help="fewer: a trial of the command")
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="one thread a side and its own CPU seconds: for a machine that others use too",
    )
    parser.add_argument("--no_details", action="store_true", help="examples per second alone")
    parser.add_argument("--output", help="all figures as JSON; an interrupted run goes on there")
    args = parser.parse_args()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    tasks, about = args.tasks.split(","), machine()
    # As `softprompt --cpu_devices` splits a CPU: as many as cores, as far as they divide a batch.
    cores = 1 if args.cpu_time else int(about["cores"])
    missing = {"PEFT": absent(args.peft_python, PEFT), "T5X": absent(args.t5x_python, T5X)}
    missing = {peer: why for peer, why in missing.items() if why}
    for peer, why in missing.items():
        say(f"{peer}: {why}")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        tokens = pathlib.Path(args.tokens) if args.tokens else folder / "tokens.npz"
        if args.data_dir:
            write_tokens(tokens, args.data_dir, args.vocabulary_file)
        common = {
            "prompt_length": 100, "dtype": "float32", "layers": args.layers,
            "batch_size": args.batch_size, "decode_length": args.decode_length,
            "batches": args.batches, "cpu_time": args.cpu_time,
            "cpu_devices": math.gcd(args.batch_size, cores),
        }  # fmt: skip
        local = {**common, "tokens": str(tokens)}
        sides = {
            "ours": (sys.executable, {**local, "side": "ours"}),
            "bf16": (sys.executable, {**local, "side": "ours", "dtype": "bfloat16"}),
        }
        if "PEFT" not in missing:
            sides["peft"] = (args.peft_python, {**local, "side": "peft"})
        if "T5X" not in missing:
            sides["t5x"] = (args.t5x_python, {**local, "side": "t5x"})
        same = {"tokens": digest(tokens), "sides": list(sides)}
        same |= {name: about[name] for name in ("cpu", "cores")}
        record = Record(args.output, {**common, **same}, about, missing)
        details = [] if args.no_details else details_due(sides, record, bool(args.data_dir))
        due = plan(sides, tasks, args.repetitions, record, details)
        progress = Progress(due, say)
        for name in details:
            if name == "softprompt train":
                found = first_steps(folder, args)
            else:
                side, layout = name.split()
                found = lean(*sides[side], layout, folder / f"saved-{side}-{layout}")
            record.found["details"][name] = found
            record.write()
            said = ", ".join(f"{x} {value:.4g}" for x, value in found.items())
            progress.done(("details", name, "rte"), f"{name}: {said}")
        if len(due) > len(details):
            workers = {side: Worker(*found) for side, found in sides.items()}
            measure(workers, tasks, args.repetitions, record, progress.done)
            for worker in workers.values():
                worker.close()
    results = {task: record.found["results"][task] for task in tasks}
    print("\n".join(report(results, record.found["details"], record.found["machine"], missing)))


if __name__ == "__main__":
    main()
