"""SQuAD and MRQA question answering, AG News and Rotten Tomatoes, and the embedded data sets."""

import functools

from softprompt.tasks import metrics, postprocessors, preprocessors, records
from softprompt.tasks.sources import STRING, STRINGS, Spec, register, register_both
from softprompt.tasks.user import register_task

_QA = dict(
    text=preprocessors.squad,
    metric_fns=[metrics.squad],
    postprocess_fn=postprocessors.all_answers,
    extras={"answers": STRINGS, "id": STRING},
)
# SQuAD's text has no task name to drop.
register(
    Spec("squad", "squad", tfds_name="squad/v1.1:3.0.0", splits=("train", "validation"), **_QA)
)
# Out-of-domain sets in SQuAD's fields, from a local folder (Fisch et al. 2019; Miller et al. 2020).
for _name in (
    "bioasq",
    "squadshifts_amazon",
    "squadshifts_new_wiki",
    "squadshifts_reddit",
    "subjqa_books",
    "subjqa_electronics",
    "subjqa_restaurants",
):
    register(Spec(f"mrqa_{_name}", f"mrqa/{_name}", splits=("train", "validation"), **_QA))

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
    register_both(
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
    register_task(
        f"embedded_{_name}",
        train_file=records.EMBEDDED_FOLDER / _name / "train.jsonl",
        validation_file=records.EMBEDDED_FOLDER / _name / "validation.jsonl",
        template=_spec.template,
        labels=_spec.labels,
    )
