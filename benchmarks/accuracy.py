"""What a tuned prompt gains on the embedded backbone: the README's tables.

    python benchmarks/accuracy.py                       # the embedded data sets, three seeds
    python benchmarks/accuracy.py --data_dir=DIR        # SuperGLUE and SST-2 through the binaries

Each line is printed as it is measured. Accuracy in per cent on the validation examples.
"""

import argparse
import collections
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

import softprompt
from softprompt import optim, quickstart
from softprompt.tasks import records

SEEDS = (0, 1, 2)
# Of the benchmark tasks, whose texts are long: two CPU cores take a minute or four for each.
TASK_STEPS, TASK_BATCH_SIZE, TASK_LENGTHS = 200, 16, {"inputs": 192, "targets": 16}
# Task -> its folder, and flags that differ from runs/prompt_classify.gin.
TASKS = {
    "super_glue_rte": ("super_glue/rte", []),
    "super_glue_cb": ("super_glue/cb", []),
    "super_glue_copa": ("super_glue/copa", []),
    "super_glue_wic": ("super_glue/wic", []),
    "super_glue_boolq": ("super_glue/boolq", []),
    # WSC's answer is a text, not one of some labels (Lester et al. 2021, appendix A.2).
    "super_glue_wsc": (
        "super_glue/wsc.fixed", ["--gin.LOSS=tokens", "--gin.EVAL_MODE=generate"]
    ),
    "glue_sst2": ("glue/sst2", []),
}  # fmt: skip


def embedded() -> None:
    """Frozen, majority and tuned accuracy of each embedded data set, over the seeds."""
    backbone = softprompt.load_backbone()
    for name in records.EMBEDDED:
        data = softprompt.embedded_data(name)
        targets = [target for _, target in data.validation]
        majority = 100 * max(collections.Counter(targets).values()) / len(targets)
        settings = dict(labels=data.labels, lengths=quickstart.LENGTHS)
        before = softprompt.evaluate(backbone, data.validation, **settings)["accuracy"]
        after = []
        for seed in SEEDS:
            prompt = softprompt.tune(
                backbone,
                data.train,
                prompt_length=quickstart.PROMPT_LENGTH,
                train_steps=quickstart.STEPS,
                learning_rate=optim.warmup_linear(quickstart.LEARNING_RATE, quickstart.STEPS),
                seed=seed,
                **settings,
            )
            found = softprompt.evaluate(backbone, data.validation, prompt, **settings)
            after.append(found["accuracy"])
        print(
            f"| {name} | {majority:.1f} | {before:.1f} | {np.mean(after):.1f} ± {np.std(after):.1f}"
            f" ({', '.join(f'{x:.1f}' for x in after)}) |",
            flush=True,
        )


def majority_class(folder: pathlib.Path) -> float:
    """Share of the commonest label among the validation examples, in per cent."""
    [file] = folder.glob("validation.jsonl*")
    labels = [row["label"] for row in records.read(file)]
    return 100 * max(collections.Counter(labels).values()) / len(labels)


def tasks(data_dir: str, names: list[str]) -> None:
    """Trains and evaluates each task by `softprompt train`."""
    for name in names:
        place, flags = TASKS[name]
        with tempfile.TemporaryDirectory() as folder:
            common = [f"--data_dir={data_dir}", f"--gin.MIXTURE_OR_TASK_NAME={name}"]
            common.append(f"--gin.TASK_FEATURE_LENGTHS={TASK_LENGTHS}")
            run = [sys.executable, "-m", "softprompt"]
            model = "--gin_file=models/t5_1_1_embedded.gin"
            out = pathlib.Path(folder)
            bare = [*run, "eval", model, "--gin_file=runs/prompt_eval.gin", *common]
            bare += ["--gin.PROMPT_FILE=None", f"--gin.EVAL_OUTPUT_DIR={out / 'bare'}"]
            bare += [flag for flag in flags if "LOSS" not in flag] or ["--gin.EVAL_MODE=rank"]
            subprocess.run(bare, check=True, stdout=subprocess.DEVNULL)
            tune = [*run, "train", model, "--gin_file=runs/prompt_classify.gin", *common]
            if not flags:
                tune.append("--gin_file=prompts/from_class_labels.gin")
            tune += [f"--gin.MODEL_DIR={out}", f"--gin.TRAIN_STEPS={TASK_STEPS}"]
            tune += [f"--gin.BATCH_SIZE={TASK_BATCH_SIZE}", *flags]
            subprocess.run(tune, check=True, stdout=subprocess.DEVNULL)
            before = json.loads((out / "bare" / f"{name}.json").read_text())
            after = json.loads((out / "eval" / "metrics.jsonl").read_text().splitlines()[-1])
            after.pop("step")
            majority = majority_class(pathlib.Path(data_dir) / place)
        figures = [", ".join(f"{k} {v:.1f}" for k, v in x.items()) for x in (before, after)]
        print(f"| {name} | {majority:.1f} | {figures[0]} | {figures[1]} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_dir", help="folder of JSON Lines data sets")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    args = parser.parse_args()
    if args.data_dir:
        tasks(args.data_dir, args.tasks)
    else:
        embedded()


if __name__ == "__main__":
    main()
