"""What prompt tuning is held against, on the same tasks, by the same metrics.

- `majority`: the commonest training target, always.
- `none`: the bare backbone.
- `priming`: prompt design, as GPT-3's few-shot priming (Brown et al. 2020; Lester et al. 2021,
  figure 1): a description and k training examples as text before every input.
- `probe`: a linear classifier on mean-pooled encoder states (scikit-learn's logistic regression).

Model tuning is `softprompt train` with runs/model_finetune.gin.
"""

import collections

import jax
import numpy as np

from softprompt import data, lengths, tree
from softprompt.backbone import Backbone
from softprompt.eval_task import EvalTask, target_text
from softprompt.prompted import PromptedT5
from softprompt.vocabulary import EOS_ID

METHODS = ("majority", "none", "priming", "probe")


def target_texts(examples: data.Examples, vocabulary) -> list[str]:
    """The target of each example as the task wrote it."""
    return [target_text(record, vocabulary) for record in examples.records]


def majority(train: data.Examples, task: EvalTask, vocabulary) -> list[str]:
    """The commonest target of `train` for every example of `task`."""
    [(commonest, _)] = collections.Counter(target_texts(train, vocabulary)).most_common(1)
    return [commonest] * len(task.examples)


def prime(
    train: data.Examples,
    examples: data.Examples,
    vocabulary,
    shots: int,
    length: int,
    seed: int = 0,
    description: str = "",
    separator: str = " answer: ",
) -> tuple[data.Examples, dict[str, int]]:
    """`examples` behind a description and `shots` examples of `train`, in the input's own tokens.

    The targets take turns among the shots, each example drawn at random. `separator` stands between
    an input and its target. Where an input leaves too little of `length` tokens, the last shots are
    left out for it, then the description, then the separator, never a part of one; the input stays.

    Returns the primed examples, and of how many some 'shots', the 'description' or the 'separator'
    was left out.
    """
    if shots > len(train):
        raise ValueError(f"SHOTS is {shots}, but {train.name} has {len(train)} training examples")
    rng = np.random.default_rng(seed)
    by_target: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
    for i in rng.permutation(len(train)):
        by_target[tuple(train.targets[i].tolist())].append(int(i))
    turns = [queue[k] for k in range(shots) for queue in by_target.values() if k < len(queue)]
    mark = vocabulary.encode(separator.strip())

    def question(ids: np.ndarray) -> list[int]:
        return [*ids[ids != EOS_ID].tolist(), *mark]

    demonstrations = [
        question(train.inputs[i]) + train.targets[i][train.targets[i] != EOS_ID].tolist()
        for i in turns[:shots]
    ]
    opening = vocabulary.encode(description) if description else []
    inputs, lost = [], {"shots": 0, "description": 0, "separator": 0}
    for ids in examples.inputs:
        asked = [*question(ids), EOS_ID]
        if len(asked) > length:
            lost["separator"] += 1
            asked = ids.tolist()
        front = opening if len(opening) + len(asked) <= length else []
        lost["description"] += front != opening
        for shot in demonstrations:
            # Shots stand behind their description or not at all.
            if front[: len(opening)] != opening or len(front) + len(shot) + len(asked) > length:
                lost["shots"] += 1
                break
            front = front + shot
        inputs.append(np.array([*front, *asked], np.int32))
    return (
        data.Examples(examples.name, inputs, examples.targets, examples.records, examples.cut),
        lost,
    )


def pooled(backbone: Backbone, examples: data.Examples, batch_size: int = 32) -> np.ndarray:
    """Encoder states averaged over each example's tokens, `[examples, H]`."""
    module = PromptedT5(backbone.cfg)

    def mean_state(flat: tree.Flat, ids: jax.Array) -> jax.Array:
        encoded, segments = module.apply({"params": tree.unflatten(flat)}, ids, method="encode")
        weights = (segments > 0).astype(np.float32)[..., None]
        return (encoded.astype(np.float32) * weights).sum(1) / weights.sum(1).clip(1)

    encode = jax.jit(mean_state)
    states = np.zeros((len(examples), backbone.cfg.emb_dim), np.float32)
    none = [np.zeros(0, np.int32)] * len(examples)
    cuts = lengths.cuts(list(map(len, examples.inputs)), batch_size, 0)
    for indices, batch in lengths.eval_batches(examples, cuts, none, 0):
        found = np.asarray(encode(dict(backbone.params), batch["encoder_ids"]))
        states[indices] = found[: len(indices)]
    return states


def probe(
    backbone: Backbone, train: data.Examples, task: EvalTask, seed: int = 0, most: int = 20_000
) -> tuple[list[str], int]:
    """Targets predicted by logistic regression on `pooled` states, and how many weights it has.

    Of `train`, at most `most` examples drawn at random are used. The regularisation is chosen among
    1e-3 … 10 by three-fold cross-validation on them (by fewer folds, or taken as 1, where a class
    has fewer examples). A task without labels is an error.
    """
    if task.labels is None:
        raise ValueError(f"METHOD 'probe' is for tasks with labels, {task.name} has none")
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    part = train.take(np.random.default_rng(seed).permutation(len(train))[:most])
    targets = target_texts(part, backbone.vocabulary)
    if len(set(targets)) == 1:
        return [targets[0]] * len(task.examples), 0
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    folds = min(3, *collections.Counter(targets).values())
    if folds > 1:
        strengths = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
        model = GridSearchCV(model, {"logisticregression__C": strengths}, cv=folds)
    model.fit(pooled(backbone, part), targets)
    _, linear = getattr(model, "best_estimator_", model)
    # The scaler's mean and deviation fold into them.
    count = linear.coef_.size + linear.intercept_.size
    return model.predict(pooled(backbone, task.examples)).tolist(), count
