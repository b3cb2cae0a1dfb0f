"""GLUE (Wang et al. 2018) as seqio tasks `glue_<name>`, and `_named` with the task's name kept."""

import functools

from softprompt.tasks import metrics, postprocessors, preprocessors
from softprompt.tasks.sources import Spec, define_both

ENTAILMENT = ["entailment", "not_entailment"]
NLI = ["entailment", "neutral", "contradiction"]
SENTENCES = ("sentence1", "sentence2")
DEFAULT_SPLITS = ("train", "validation", "test")
MNLI_SPLITS = {
    "train": "train",
    "validation": "validation_matched",
    "validation_matched": "validation_matched",
    "validation_mismatched": "validation_mismatched",
    "test_matched": "test_matched",
    "test_mismatched": "test_mismatched",
}

# Name: text's first word, fields in T5's order, labels, metrics, splits.
CLASSIFICATION = {
    "cola": (
        "cola", ("sentence",), ["unacceptable", "acceptable"], [metrics.matthews], DEFAULT_SPLITS
    ),
    "sst2": (
        "sst2", ("sentence",), ["negative", "positive"], [metrics.accuracy], DEFAULT_SPLITS
    ),
    "mrpc": (
        "mrpc", SENTENCES, ["not_equivalent", "equivalent"],
        [metrics.f1, metrics.accuracy], DEFAULT_SPLITS,
    ),
    "qqp": (
        "qqp", ("question1", "question2"), ["not_duplicate", "duplicate"],
        [metrics.f1, metrics.accuracy], DEFAULT_SPLITS,
    ),
    "mnli": ("mnli", ("hypothesis", "premise"), NLI, [metrics.accuracy], MNLI_SPLITS),
    "mnli_matched": (
        "mnli", ("hypothesis", "premise"), NLI, [metrics.accuracy], ("validation", "test")
    ),
    "mnli_mismatched": (
        "mnli", ("hypothesis", "premise"), NLI, [metrics.accuracy], ("validation", "test")
    ),
    "qnli": ("qnli", ("question", "sentence"), ENTAILMENT, [metrics.accuracy], DEFAULT_SPLITS),
    "rte": ("rte", SENTENCES, ENTAILMENT, [metrics.accuracy], DEFAULT_SPLITS),
}  # fmt: skip

for _name, (_word, _fields, _labels, _metrics, _splits) in CLASSIFICATION.items():
    define_both(
        Spec(
            name=f"glue_{_name}",
            folder=f"glue/{_name}",
            tfds_name=f"glue/{_name}:2.0.0",
            text=functools.partial(
                preprocessors.fields, name=_word, features=_fields, labels=_labels
            ),
            metric_fns=[*_metrics, metrics.illegal],
            postprocess_fn=functools.partial(postprocessors.label_to_id, label_classes=_labels),
            splits=_splits,
        )
    )

define_both(
    Spec(
        name="glue_stsb",
        folder="glue/stsb",
        tfds_name="glue/stsb:2.0.0",
        text=preprocessors.stsb,
        metric_fns=[metrics.pearson, metrics.spearman],
        postprocess_fn=postprocessors.to_float,
    )
)
