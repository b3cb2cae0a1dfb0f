"""SQuAD and MRQA question answering, AG News and Rotten Tomatoes, and the embedded data sets."""

import functools

from softprompt.tasks import catalogue, metrics, postprocessors, preprocessors, records
from softprompt.tasks.catalogue import STRING, STRINGS
from softprompt.tasks.sources import Spec, define, define_both
from softprompt.tasks.user import define_task

_QA = dict(
    text=preprocessors.squad,
    metric_fns=[metrics.squad],
    postprocess_fn=postprocessors.all_answers,
    extras={"answers": STRINGS, "id": STRING},
)
# SQuAD's text has no task name to drop.
define(Spec("squad", "squad", tfds_name="squad/v1.1:3.0.0", splits=("train", "validation"), **_QA))
# MRQA's sets (Fisch et al. 2019), from TFDS or from a local folder in SQuAD's fields. Those out of
# domain, which the paper transfers to (its table 1), have one split, TFDS's 'test'.
MRQA_IN_DOMAIN = {
    "squad": "squad", "newsqa": "news_qa", "triviaqa": "trivia_qa", "searchqa": "search_qa",
    "hotpotqa": "hotpot_qa", "naturalquestions": "natural_questions",
}  # fmt: skip
MRQA_OUT_OF_DOMAIN = {
    "textbookqa": "textbook_qa", "race": "race", "bioasq": "bio_asq",
    "relationextraction": "relation_extraction", "duorc": "duo_rc", "drop": "drop",
}  # fmt: skip
# Further out-of-domain sets in the same fields, from a local folder alone (Miller et al. 2020,
# arXiv 2004.14444; Bjerva et al. 2020, arXiv 2004.14283).
LOCAL_OUT_OF_DOMAIN = (
    "squadshifts_amazon",
    "squadshifts_new_wiki",
    "squadshifts_reddit",
    "subjqa_books",
    "subjqa_electronics",
    "subjqa_restaurants",
)
for _name, _tfds in {**MRQA_IN_DOMAIN, **MRQA_OUT_OF_DOMAIN}.items():
    define(
        Spec(
            f"mrqa_{_name}",
            f"mrqa/{_name}",
            tfds_name=f"mrqa/{_tfds}:1.0.0",
            tfds_splits={} if _name in MRQA_IN_DOMAIN else {"validation": "test"},
            splits=("train", "validation") if _name in MRQA_IN_DOMAIN else ("validation",),
            **_QA,
        )
    )
for _name in LOCAL_OUT_OF_DOMAIN:
    # SQuADShifts' Wikipedia set was gathered as SQuAD was, and has examples to train on too.
    _splits = ("train", "validation") if _name == "squadshifts_new_wiki" else ("validation",)
    define(Spec(f"mrqa_{_name}", f"mrqa/{_name}", splits=_splits, **_QA))

# What a transfer is evaluated on: the paper's sets, and those that a local folder may have.
for _mixture, _names in {
    "mrqa_paper": [f"mrqa_{name}" for name in MRQA_OUT_OF_DOMAIN],
    "mrqa_out_of_domain": [f"mrqa_{name}" for name in ("bioasq", *LOCAL_OUT_OF_DOMAIN)],
    "glue_paraphrase": ["glue_mrpc", "glue_qqp"],
}.items():
    catalogue.add_mixture(_mixture, [(name, 1.0) for name in _names])

_CLASSIFICATION = {
    "ag_news_subset": (
        ("title", "description"), ["World", "Sports", "Business", "Sci/Tech"],
        "ag_news_subset:1.0.0", ("train", "test"),
    ),
    "rotten_tomatoes": (
        ("text",), ["negative", "positive"],
        "rotten_tomatoes_reviews:1.0.0", ("train", "validation", "test"),
    ),
}  # fmt: skip
for _name, (_fields, _labels, _tfds, _splits) in _CLASSIFICATION.items():
    define_both(
        Spec(
            name=_name,
            folder=_name,
            tfds_name=_tfds,
            text=functools.partial(
                preprocessors.fields, name=_name, features=_fields, labels=_labels
            ),
            metric_fns=[metrics.accuracy, metrics.illegal],
            postprocess_fn=functools.partial(postprocessors.label_to_id, label_classes=_labels),
            splits=_splits,
        )
    )

for _name, _spec in records.EMBEDDED.items():
    define_task(
        f"embedded_{_name}",
        train_file=records.EMBEDDED_FOLDER / _name / "train.jsonl",
        validation_file=records.EMBEDDED_FOLDER / _name / "validation.jsonl",
        template=_spec.template,
        labels=_spec.labels,
    )
