"""SuperGLUE (Wang et al. 2019) as seqio tasks `super_glue_<name>`, and `_named` with the name kept.

The mixture `super_glue` draws from the eight tasks in proportion to their examples.
"""

import functools

from softprompt.tasks import catalogue, metrics, postprocessors, preprocessors
from softprompt.tasks.catalogue import INT, STRINGS
from softprompt.tasks.sources import Spec, define_both

BOOLEAN = ["False", "True"]
ENTAILMENT = ["entailment", "not_entailment"]

# Name: text's first word, fields in T5's order, labels, metrics.
CLASSIFICATION = {
    "boolq": ("boolq", ("passage", "question"), BOOLEAN, [metrics.accuracy]),
    "cb": (
        "cb",
        ("hypothesis", "premise"),
        ["entailment", "contradiction", "neutral"],
        [metrics.mean_f1(3), metrics.accuracy],
    ),
    "copa": (
        "copa",
        ("choice1", "choice2", "premise", "question"),
        ["choice1", "choice2"],
        [metrics.accuracy],
    ),
    "rte": ("rte", ("hypothesis", "premise"), ENTAILMENT, [metrics.accuracy]),
    "wic": ("wic", ("sentence1", "sentence2", "word"), BOOLEAN, [metrics.accuracy]),
    # The diagnostics are worded as RTE and have a test split alone.
    "axb": ("rte", ("hypothesis", "premise"), ENTAILMENT, [metrics.matthews, metrics.accuracy]),
    "axg": ("rte", ("hypothesis", "premise"), ENTAILMENT, [metrics.accuracy]),
}
# Training examples, as T5's mixtures count them (Raffel et al. 2020, appendix on mixtures).
EXAMPLES = {
    "boolq": 9_427,
    "cb": 250,
    "copa": 400,
    "multirc": 27_243,
    "record": 138_854,
    "rte": 2_490,
    "wic": 5_428,
    "wsc": 259,
}


def _axb(row):
    """AX-b names the sentences otherwise."""
    renamed = type(row)(row)
    renamed.where = row.where
    renamed["premise"], renamed["hypothesis"] = row["sentence1"], row["sentence2"]
    return preprocessors.fields(renamed, "rte", ("hypothesis", "premise"), ENTAILMENT)


def _tfds(name: str) -> str:
    return f"super_glue/{name}:1.0.3"


for _name, (_word, _fields, _labels, _metrics) in CLASSIFICATION.items():
    _text = functools.partial(preprocessors.fields, name=_word, features=_fields, labels=_labels)
    define_both(
        Spec(
            name=f"super_glue_{_name}",
            folder=f"super_glue/{_name}",
            tfds_name=_tfds(_name),
            text=_axb if _name == "axb" else _text,
            metric_fns=[*_metrics, metrics.illegal],
            postprocess_fn=functools.partial(postprocessors.label_to_id, label_classes=_labels),
            splits=("test",) if _name.startswith("ax") else ("train", "validation", "test"),
        )
    )

define_both(
    Spec(
        name="super_glue_multirc",
        folder="super_glue/multirc",
        tfds_name=_tfds("multirc"),
        text=functools.partial(preprocessors.multirc, labels=BOOLEAN),
        metric_fns=[metrics.multirc_f1a, metrics.multirc_exact_match, metrics.illegal],
        postprocess_fn=functools.partial(postprocessors.multirc, label_classes=BOOLEAN),
        extras={f"idx/{part}": INT for part in ("paragraph", "question", "answer")},
    )
)
define_both(
    Spec(
        name="super_glue_record",
        folder="super_glue/record",
        tfds_name=_tfds("record"),
        text=preprocessors.record,
        metric_fns=[metrics.record],
        postprocess_fn=postprocessors.record,
        extras={"answers": STRINGS, "idx/passage": INT, "idx/query": INT},
    )
)
# Generates the noun that the pronoun refers to; trained on the rows where it is given (259).
define_both(
    Spec(
        name="super_glue_wsc",
        folder="super_glue/wsc.fixed",
        tfds_name=_tfds("wsc.fixed"),
        text=preprocessors.wsc,
        train_text=functools.partial(preprocessors.wsc, only_correct=True),
        metric_fns=[metrics.accuracy],
        postprocess_fn=postprocessors.wsc,
        extras={"label": INT, "idx": INT},
    )
)

for _suffix in ("", "_named"):
    _parts = [(f"super_glue_{name}{_suffix}", float(count)) for name, count in EXAMPLES.items()]
    catalogue.add_mixture(f"super_glue{_suffix}", _parts)
