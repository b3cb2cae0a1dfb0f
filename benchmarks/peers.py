"""Prompt tuning on this machine, side by side with its peers: see benchmarks/README.md.

    python benchmarks/peers.py --data_dir=DIR --vocabulary_file=spiece.model \\
      --peft_python=PEFT_VENV/bin/python [--t5x_python=…] [--output=results.json]

T5 1.1 small with random weights, a prompt of 100 vectors, the tasks at their real lengths. Each
side runs in a process of its own; repetitions take turns, so that other work on the machine
disturbs all sides alike. Reported are medians over the repetitions, and medians of the ratios
within a repetition. A peer that is not installed is reported as absent.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

HERE = pathlib.Path(__file__).parent
TASKS = ("rte", "wic", "boolq")
# (side, case, layout) measured for each task.
CASES = (
    ("ours", "train", "buckets"),
    ("ours", "train", "packed"),
    ("bf16", "train", "buckets"),
    ("peft", "train", "longest"),
    ("peft", "train", "512"),
    ("ours", "decode", "buckets"),
    ("bf16", "decode", "buckets"),
    ("peft", "decode", "sorted"),
    ("ours", "rank", "buckets"),
)
RATIOS = (
    (("ours", "train", "buckets"), ("peft", "train", "longest")),
    (("ours", "train", "packed"), ("peft", "train", "longest")),
    (("ours", "train", "buckets"), ("peft", "train", "512")),
    (("ours", "decode", "buckets"), ("peft", "decode", "sorted")),
    (("ours", "rank", "buckets"), ("ours", "decode", "buckets")),
)


class Worker:
    """A side in its own process."""

    def __init__(self, python: str, settings: dict):
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        # A file: a pipe that nobody reads would fill up.
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [python, str(HERE / "worker.py"), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
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


def absent(python: str | None, modules: str) -> str | None:
    """Why a peer can not be measured, or None."""
    if python is None:
        return "not asked for"
    found = subprocess.run([python, "-c", f"import {modules}"], capture_output=True, text=True)
    if found.returncode:
        return f"absent: {found.stderr.strip().splitlines()[-1]}"
    return None


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


def measure(workers: dict[str, Worker], tasks: list[str], repeats: int, say) -> dict:
    """Examples per second of every case: `{task: {case: {"rates": […], …}}}`."""
    results: dict = {}
    for task in tasks:
        results[task] = {}
        for side, case, layout in CASES:
            if side in workers:
                key = {"case": case, "task": task, "layout": layout}
                say(f"preparing {side} {case} {layout} on {task}")
                found = workers[side].ask(call="prepare", **key)
                results[task][f"{side} {case} {layout}"] = {**found, "rates": [], "shares": []}
        for repeat in range(repeats):
            say(f"{task}: repetition {repeat + 1} of {repeats}")
            peaks = {side: worker.ask(call="peak")["flops"] for side, worker in workers.items()}
            for name, kept in results[task].items():
                side, case, layout = name.split()
                key = {"case": case, "task": task, "layout": layout}
                seconds = workers[side].ask(call="time", **key)["seconds"]
                kept["rates"].append(kept["examples"] / seconds)
                if case == "train" and "flops" in kept:
                    kept["shares"].append(kept["flops"] / seconds / peaks[side])
    return results


def report(results: dict, details: dict, about: dict, missing: dict) -> list[str]:
    """The tables, in Markdown."""
    lines = [f"{about['cpu']}, {about['cores']} cores, load average {about['load_average']} at the "
             f"start, Python {about['python']}.", ""]  # fmt: skip
    lines += [f"{peer}: {why}." for peer, why in missing.items()]
    tasks = list(results)
    lines += ["", "| examples/s | " + " | ".join(tasks) + " |", "| --- |" + " --- |" * len(tasks)]
    for name in next(iter(results.values())):
        cells = []
        for task in tasks:
            kept = results[task][name]
            fill = kept["filled"] / kept["positions"]
            cell = f"{statistics.median(kept['rates']):.2f} ({100 * fill:.0f}% full"
            if kept["shares"]:
                cell += f", {100 * statistics.median(kept['shares']):.0f}% of peak"
            cells.append(cell + ")")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| ratio | " + " | ".join(tasks) + " |", "| --- |" + " --- |" * len(tasks)]
    for one, other in RATIOS:
        names = " ".join(one), " ".join(other)
        if all(name in results[task] for name in names for task in tasks):
            cells = []
            for task in tasks:
                rates = [results[task][name]["rates"] for name in names]
                ratios = [a / b for a, b in zip(*rates, strict=True)]
                cells.append(f"{statistics.median(ratios):.2f}")
            lines.append(f"| {names[0]} / {names[1]} | " + " | ".join(cells) + " |")
    lines += ["", "| RTE | first step, s | checkpoint, MB | blocks, s | peak memory, GB |",
              "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for side, found in details.items():
        if "checkpoint_bytes" in found:
            lines.append(
                f"| {side} | {found['first_step']:.1f} | {found['checkpoint_bytes'] / 1e6:.2f} | "
                f"{found['checkpoint_seconds']:.3f} | {found['peak_memory'] / 1e9:.2f} |"
            )
        else:
            cells = ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in found.items())
            lines.append(f"| {side} | {cells} | | | |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", help="folder of JSON Lines data sets (super_glue/rte/…)")
    parser.add_argument("--vocabulary_file", help="T5's SentencePiece model")
    parser.add_argument("--tokens", help="token arrays; written where --data_dir is given")
    parser.add_argument("--peft_python", help="an interpreter with torch, transformers and peft")
    parser.add_argument("--t5x_python", help="an interpreter with t5x, flaxformer, prompt_tuning")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=5, help="per case and repetition")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--decode_length", type=int, default=8)
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="one thread a side and its own CPU seconds: for a machine that others use too",
    )
    parser.add_argument("--no_details", action="store_true", help="examples per second alone")
    parser.add_argument("--output", help="all figures as JSON")
    args = parser.parse_args()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    about = machine()
    missing = {
        "PEFT": absent(args.peft_python, "torch, transformers, peft"),
        "T5X": absent(args.t5x_python, "t5x, flaxformer, prompt_tuning.train.models"),
    }
    missing["T5X"] = (
        missing["T5X"] or "installed, but this benchmark does not drive it: not measured"
    )
    missing = {peer: why for peer, why in missing.items() if why}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        tokens = pathlib.Path(args.tokens) if args.tokens else folder / "tokens.npz"
        if args.data_dir:
            write_tokens(tokens, args.data_dir, args.vocabulary_file)
        common = {
            "tokens": str(tokens), "prompt_length": 100, "dtype": "float32",
            "batch_size": args.batch_size, "decode_length": args.decode_length,
            "batches": args.batches, "cpu_time": args.cpu_time,
        }  # fmt: skip
        sides = {
            "ours": (sys.executable, {**common, "side": "ours"}),
            "bf16": (sys.executable, {**common, "side": "ours", "dtype": "bfloat16"}),
        }
        if "PEFT" not in missing:
            sides["peft"] = (args.peft_python, {**common, "side": "peft"})
        details: dict = {}
        if not args.no_details:
            for side, (python, settings) in sides.items():
                for layout in ("longest", "512") if side == "peft" else ("buckets", "packed"):
                    say(f"memory and start of {side} {layout}")
                    place = folder / f"saved-{side}-{layout}"
                    details[f"{side} {layout}"] = lean(python, settings, layout, place)
            if args.data_dir:
                say("first steps of softprompt train")
                details["softprompt train"] = first_steps(folder, args)
        workers = {side: Worker(*found) for side, found in sides.items()}
        results = measure(workers, args.tasks.split(","), args.repeats, say)
        for worker in workers.values():
            worker.close()
    print("\n".join(report(results, details, about, missing)))
    if args.output:
        found = {"machine": about, "missing": missing, "details": details, "results": results}
        pathlib.Path(args.output).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
