"""`softprompt quickstart`: the main job on the embedded default, without TensorFlow."""

import os
import pathlib
import shlex
import sys
import time

import softprompt
from softprompt import optim, tree
from softprompt.logbook import duration, say, size
from softprompt.prompt import random_uniform

TASK = "question_type"
PROMPT_LENGTH = 20
STEPS = 300
BATCH_SIZE = 32
# The paper's rate, but falling to 0: constant, so small a prompt on so few examples overfits.
LEARNING_RATE = 0.3
LENGTHS = {"inputs": 128, "targets": 8}
SHOWN = 6


def run(
    output_dir: str | os.PathLike,
    task: str | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> bool:
    """Tunes a prompt on an embedded data set and says what happened; False if SIGTERM ended it."""
    began = time.monotonic()
    task, folder = task or TASK, pathlib.Path(output_dir)
    steps = STEPS if steps is None else steps
    if steps < 1:
        raise ValueError(f"--steps is {steps}, expected at least 1")
    data = softprompt.embedded_data(task)
    backbone = softprompt.load_backbone()
    say(
        f"backbone  {backbone.name}, {tree.count(backbone.params) / 1e6:.1f}M parameters, frozen, "
        f"fingerprint {backbone.fingerprint}"
    )
    say(
        f"task      {task}: {len(data.train)} training and {len(data.validation)} validation "
        f"examples, labels {', '.join(data.labels)}"
    )
    targets = [target for _, target in data.validation]
    majority = 100 * max(targets.count(label) for label in data.labels) / len(targets)

    def accuracy(prompt) -> float:
        return softprompt.evaluate(
            backbone, data.validation, prompt, data.labels, lengths=LENGTHS, batch_size=BATCH_SIZE
        )["accuracy"]

    before = accuracy(None)
    say(f"accuracy  without a prompt {before:.1f}%, majority class {majority:.1f}%")
    width = backbone.cfg.emb_dim
    say(f"tuning    {PROMPT_LENGTH} x {width} numbers, {steps} steps of {BATCH_SIZE} examples")
    prompt = softprompt.tune(
        backbone,
        data.train,
        labels=data.labels,
        prompt_length=PROMPT_LENGTH,
        train_steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=optim.warmup_linear(LEARNING_RATE, steps),
        # The best start on this backbone: see docs/ablations.md.
        prompt_init=random_uniform,
        log_period=max(steps // 10, 1),
        checkpoint_period=max(steps // 4, 1),
        model_dir=folder / task,
        lengths=LENGTHS,
        seed=seed,
    )
    if prompt.metadata["step"] < steps:
        return False  # The training has reported it.
    path = folder / f"{task}.safetensors"
    prompt.save(path)
    after = accuracy(prompt)
    say(f"accuracy  with the tuned prompt {after:.1f}% (without {before:.1f}%)")
    say(
        f"backbone  fingerprint before {backbone.fingerprint}, after "
        f"{tree.fingerprint(backbone.params)}"
    )
    say(f"prompt    {path}, {path.stat().st_size} bytes ({size(path.stat().st_size)})")
    shown = data.validation[:SHOWN]
    predicted = softprompt.classify(backbone, [text for text, _ in shown], data.labels, prompt)
    for (text, target), answer in zip(shown, predicted, strict=True):
        mark = "right" if answer == target else f"wrong: {target}"
        say(f"          {text}  ->  {answer} ({mark})")
    say(f"done in {duration(time.monotonic() - began)}; next, the same through gin:")
    say(
        f"  {program()} train --gin_file=models/t5_1_1_embedded.gin "
        "--gin_file=runs/prompt_classify.gin --gin_file=prompts/from_random_uniform.gin "
        f"--gin.MIXTURE_OR_TASK_NAME=embedded_{task} --gin.TRAIN_STEPS={steps} "
        f"--gin.EVAL_PERIOD={max(steps // 3, 1)} --gin.MODEL_DIR={shlex.quote(str(folder / 'gin'))}"
    )
    return True


def program() -> str:
    """This program as the user called it, so that a printed command can be pasted."""
    called = sys.argv[0]
    return called if pathlib.Path(called).name == "softprompt" else "python -m softprompt"
