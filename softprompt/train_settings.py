"""What is wrong with `launch.train`'s settings, told from them alone: before anything is read."""

import types
from collections.abc import Mapping
from typing import Any

from softprompt import backbone, config, eval_task, evaluation
from softprompt.settings import (
    check_kinds,
    check_labels,
    check_numbers,
    check_path,
    check_patterns,
    check_settings,
)
from softprompt.t5_config import REMAT

# How a trained backbone may be stored, and bytes of a number.
STORED_AS = {"float32": 4, "bfloat16": 2, "int8": 1}


def check(settings: Mapping[str, Any]) -> None:
    """Raises where one of `launch.train`'s arguments, or two together, make no sense.

    CLASS_LABELS, a macro of gin's that initialisers of the prompt read, is checked with them.

    Args:
      settings: all arguments, by name.

    Raises:
      ValueError: it says the setting's name in gin files, what it is, and what was expected.
    """
    s = types.SimpleNamespace(**settings)
    _check_values(s)
    _check_together(s)


def _check_values(s: types.SimpleNamespace) -> None:
    """Each setting by itself."""
    check_settings(
        s.dtype,
        s.task_feature_lengths,
        TRAIN_STEPS=(s.train_steps, 1),
        BATCH_SIZE=(s.batch_size, 1),
        PROMPT_LENGTH=(s.prompt_length, 0),
        PACK_LENGTH=(0 if s.pack_length == "auto" else s.pack_length, 0),
        LENGTH_BUCKETS=(s.length_buckets, 1),
        EVAL_BATCH_SIZE=(s.eval_batch_size, 1),
        EVAL_PERIOD=(s.eval_period, 0),
        PATIENCE=(s.patience, 0),
        CHECKPOINT_PERIOD=(s.checkpoint_period, 0),
        KEEP_CHECKPOINTS=(s.keep_checkpoints, 1),
        LOG_PERIOD=(s.log_period, 1),
        MICROBATCHES=(s.microbatches, 1),
        SEED=(s.seed, 0),
        EVAL_EXAMPLES=(1 if s.eval_examples is None else s.eval_examples, 1),
    )
    check_numbers(
        DROPOUT_RATE=(s.dropout_rate, 0, 1),
        Z_LOSS=(s.z_loss, 0),
        LABEL_SMOOTHING=(s.label_smoothing, 0, 1),
    )
    check_path("MODEL_DIR", s.model_dir)
    for name, path in (
        ("INITIAL_CHECKPOINT_PATH", s.initial_checkpoint_path),
        ("VOCABULARY_FILE", s.vocabulary_file),
        ("EMBEDDINGS_FILE", s.embeddings_file),
        ("CORPUS", s.text_corpus),
    ):
        check_path(name, path, optional=True)
    check_labels("CLASS_LABELS", config.macros().get("CLASS_LABELS"))
    check_patterns(TRAINABLE=s.trainable, FROZEN=s.frozen)
    for name, value, known in (
        ("LOSS", s.loss, (eval_task.TOKENS, eval_task.LABELS)),
        ("EVAL_MODE", s.eval_mode, (evaluation.GENERATE, evaluation.RANK)),
        ("STORE_AS", s.backbone_dtype, STORED_AS),
        ("WEIGHTS", s.weights, backbone.WEIGHTS),
        ("REMAT", s.remat, REMAT),
    ):
        good = isinstance(value, str | None) and value in known
        check_kinds(**{name: (value, good, f"one of {', '.join(map(repr, known))}")})
    steps = isinstance(s.backbone_steps, list | tuple) and {*map(type, s.backbone_steps)} <= {int}
    named = s.best_metric is None or isinstance(s.best_metric, str)
    check_kinds(
        PROMPT_INIT=(
            s.prompt_init,
            callable(s.prompt_init),
            "a function, with '@' before its name",
        ),
        TRAINABLE=(s.trainable, bool(s.trainable), "one pattern or more"),
        BACKBONE_STEPS=(s.backbone_steps, steps, "a list of steps"),
        BEST_METRIC=(s.best_metric, named, "the name of a figure or None"),
        **{
            f"launch.train.{name}": (value, callable(value), "a function, without '()' behind it")
            for name, value in (("optimizer", s.optimizer), ("mesh", s.mesh))
        },
    )


def _check_together(s: types.SimpleNamespace) -> None:
    """Settings that rule each other out."""
    if not s.prompt_length and (s.prompt_depth != 1 or s.reparameterisation is not None):
        raise ValueError("PROMPT_LENGTH is 0: there is no prompt to be deep or reparameterised")
    if odd := [k for k in s.backbone_steps if not s.eval_period or k % s.eval_period]:
        raise ValueError(
            f"BACKBONE_STEPS {odd} are no multiples of EVAL_PERIOD, which is {s.eval_period}"
        )
    if late := [k for k in s.backbone_steps if not 0 < k <= s.train_steps]:
        raise ValueError(
            f"BACKBONE_STEPS {late} are no steps from 1 to TRAIN_STEPS {s.train_steps}"
        )
    if s.patience and not s.eval_period:
        raise ValueError(
            f"PATIENCE is {s.patience}, but nothing is evaluated before the end: EVAL_PERIOD is 0"
        )
    if s.loss == eval_task.LABELS and (s.z_loss or s.label_smoothing):
        raise ValueError(
            f"Z_LOSS is {s.z_loss} and LABEL_SMOOTHING is {s.label_smoothing}, expected 0 for LOSS "
            f"{s.loss!r}: they belong to {eval_task.TOKENS!r}"
        )
    if s.stream and s.target_sentinel:
        raise ValueError(
            "TARGET_SENTINEL is True, expected False: streamed targets stay as they are"
        )
    if s.stream and s.prompt_length:
        raise ValueError(
            f"PROMPT_LENGTH is {s.prompt_length}, expected 0: text that is streamed has no slots"
        )
    if s.stream and (s.pack_length or s.length_buckets > 1):
        raise ValueError(
            f"PACK_LENGTH is {s.pack_length!r} and LENGTH_BUCKETS is {s.length_buckets}, expected "
            f"0 and 1: text that is streamed comes in rows of one length"
        )
