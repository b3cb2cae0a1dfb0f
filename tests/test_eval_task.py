"""seqio's metrics: functions and objects, of predictions and of the targets' scores."""

import functools
import json
import types

import flax.struct
import numpy as np
import pytest
import seqio
import tensorflow as tf

from softprompt import (
    eval_task,
    evaluation,
    losses,
    prompt,
    report,
    runs,
    train,
    tree,
    voting,
)
from softprompt.prompted import PromptedT5
from softprompt.tasks import catalogue, features

LENGTHS = {"inputs": 16, "targets": 8}
SPLIT = "validation"


def choices(split, shuffle_files=False, seed=None):
    """Three questions with two choices each; the second one is right where q is odd."""
    del split, shuffle_files, seed
    rows = [(q, c) for q in range(3) for c in range(2)]
    return tf.data.Dataset.from_tensor_slices(
        {
            "inputs": [f"question {q}" for q, _ in rows],
            "targets": [("yes", "not at all")[c] for _, c in rows],
            "idx": [[q, c] for q, c in rows],
            "right": [c == q % 2 for q, c in rows],
        }
    )


def right(text, example, is_target):
    """What a metric is told of a target: its question, and whether it is the right choice."""
    return (int(example["idx"][0]), bool(example["right"])) if is_target else text.upper()


def picked(targets, scores):
    best = {}
    for (question, is_right), score in zip(targets, scores, strict=True):
        best[question] = max(best.get(question, (-np.inf, None)), (float(score), is_right))
    return {"picked": seqio.metrics.Scalar(100 * np.mean([hit for _, hit in best.values()]))}


def shouted(targets, predictions):
    return {"shouted": float(np.mean([text == text.upper() for text in predictions]))}


def with_aux(targets, predictions, aux_values):
    return {"aux": 0.0}


@flax.struct.dataclass
class Tokens(seqio.metrics.Metric):
    """Mean number of predicted tokens: an object that is given ids."""

    model_output_type: seqio.metrics.ModelOutputType = seqio.metrics.ModelOutputType.PREDICTION
    mean: float = 0.0

    @classmethod
    def from_model_output(cls, inputs, model_output, features, target_field_name="targets"):
        assert len(inputs) == len(model_output) and "targets" in features
        return cls(mean=float((model_output > 0).sum(-1).mean()))

    def compute(self):
        return {"tokens": self.mean}


@pytest.fixture
def make(tiny, request):
    """A task with these metrics, judged with the vocabulary of `tiny`."""
    names = []

    def make(metric_fns=(), metric_objs=None):
        names.append(f"choices_{request.node.name.split('[')[0]}_{len(names)}")
        feature = seqio.Feature(vocabulary=features.VOCABULARY, add_eos=True)
        task = seqio.TaskRegistry.add(
            names[-1],
            source=seqio.FunctionDataSource(choices, splits=[SPLIT]),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features={"inputs": feature, "targets": feature},
            postprocess_fn=right,
            metric_fns=list(metric_fns),
            metric_objs=metric_objs,
        )
        return eval_task.from_task(task, SPLIT, LENGTHS, tiny.vocabulary)

    catalogue.use_vocabulary(tiny.vocabulary.path)
    yield make
    for name in names:
        seqio.TaskRegistry.remove(name)


def by_hand(backbone, examples, prefix=()):
    """The log-likelihood of each target, each by itself and without padding."""
    module, params = PromptedT5(backbone.cfg, 0), tree.unflatten(backbone.params)
    scores = []
    for inputs, ids in zip(examples.inputs, examples.targets, strict=True):
        ids = np.concatenate([np.array(prefix, np.int32), ids])[None]
        logits = module.apply({"params": params}, inputs[None], losses.shift_right(ids))
        scores.append(float(losses.token_log_likelihood(logits, ids).sum()))
    return np.array(scores)


def test_functions_of_scores_judge_the_targets_log_likelihoods(make, tiny, tmp_path):
    task = make([picked])
    expected = by_hand(tiny, task.examples)
    predictor = evaluation.Predictor(tiny, 0, batch_size=4)
    predictor.generate = None  # Nothing is predicted where no metric judges it.
    figures = evaluation.evaluate(predictor, tiny.params, [task], tmp_path)
    pairs = expected.reshape(3, 2)
    hits = [row.argmax() == q % 2 for q, row in enumerate(pairs)]
    assert figures == {"picked": pytest.approx(100 * np.mean(hits))}
    rows = [json.loads(x) for x in open(tmp_path / "predictions" / f"{task.name}.jsonl")]
    np.testing.assert_allclose([row["target_score"] for row in rows], expected, atol=2e-3)
    assert [row["target"] for row in rows] == ["yes", "not at all"] * 3
    assert "prediction" not in rows[0]
    found = runs.Predictions(task.name, None, rows, None)
    run = types.SimpleNamespace(predictions=[found], facts={"task": task.name})
    assert "The least likely targets" in report._of_task(found, run)

    behind = evaluation.Predictor(tiny, 0, batch_size=4, prefix=(7, 9))
    found = behind.score_targets(tiny.params, task.examples)
    np.testing.assert_allclose(found, by_hand(tiny, task.examples, (7, 9)), rtol=1e-5)
    with pytest.raises(ValueError, match="judge the scores of its targets alone, expected some"):
        task.figures([""] * 6)


def test_functions_of_both_kinds_stand_side_by_side(make, tiny, tmp_path):
    task = make([picked, shouted])
    figures = evaluation.evaluate(evaluation.Predictor(tiny, 0), tiny.params, [task], tmp_path)
    assert list(figures) == ["shouted", "picked"] and figures["shouted"] == 1.0
    row = json.loads(open(tmp_path / "predictions" / f"{task.name}.jsonl").readline())
    assert {"prediction", "target_score"} < set(row)
    eval_task.check_metric("picked", [task])
    with pytest.raises(ValueError, match="'best' is not among the figures shouted, picked"):
        eval_task.check_metric("best", [task])
    assert list(task.figures(["a"] * 6)) == ["shouted"]


def test_metric_objects_give_what_their_functions_give(make, tiny):
    of = functools.partial(
        seqio.metrics.PassthroughLegacyMetric.from_metric_fn, postprocess_fn=right
    )
    functions, objects = make([picked, shouted]), make([], [of(shouted), of(picked), Tokens()])
    predictions, scores = ["yes", "no way", "", "a", "b", "c"], np.arange(6.0)
    expected = functions.judge(predictions) | functions.judge_scores(scores)
    found = objects.judge(predictions)
    lengths = [len(tiny.vocabulary.encode(text)) + 1 for text in predictions]
    assert found.pop("tokens") == pytest.approx(np.mean(lengths))
    assert found | objects.judge_scores(scores) == expected


def test_metrics_of_other_outputs_are_left_out_and_named(make, capsys):
    assert list(make([with_aux, shouted]).blank()) == ["shouted"]
    said = capsys.readouterr().out
    assert "has the metrics with_aux of aux_values, which are left out" in said
    with pytest.raises(ValueError, match="has the metrics with_aux of aux_values, expected some"):
        make([with_aux])


def test_an_ensemble_scores_targets_by_their_mean_probability(make, tiny, tmp_path):
    task = make([picked, shouted])
    rng = np.random.default_rng(0)
    prompts = [rng.normal(size=(n, tiny.cfg.emb_dim)).astype("f4") for n in (3, 2)]
    bank, lengths = prompt.bank(prompts, tiny.cfg.emb_dim)
    predictor = evaluation.Predictor(tiny, lengths, batch_size=4)
    flat = {**tiny.params, train.PROMPT: bank}

    def choose(figures):
        return figures["picked"]

    found = voting.evaluate(predictor, flat, [task], ["a", "b"], choose, tmp_path)[task.name]
    alone = []
    for array, figures in zip(prompts, found.prompts, strict=True):
        single, params = (
            evaluation.Predictor(tiny, len(array)),
            {**tiny.params, train.PROMPT: array},
        )
        alone.append(single.score_targets(params, task.examples))
        assert figures == evaluation.evaluate(single, params, [task])
    together = np.log(np.exp(alone).mean(0))
    assert found.ensemble["picked"] == task.judge_scores(together)["picked"]
    rows = [json.loads(x) for x in open(tmp_path / "predictions" / f"{task.name}.jsonl")]
    np.testing.assert_allclose([row["target_score"] for row in rows], together, atol=1e-3)
    kept = [[vote["target_score"] for vote in row["votes"]] for row in rows]
    np.testing.assert_allclose(kept, np.transpose(alone), atol=1e-3)
    assert found.table().startswith("| prompt | shouted | picked |")


def test_what_is_no_number_is_left_out_and_named_once(make, capsys):
    def odd(targets, predictions):
        value = seqio.metrics.Text("as it is")
        return {"said": value, "many": np.arange(2.0), "one": np.float32(1)}

    task = make([odd])
    capsys.readouterr()
    for _ in range(2):
        assert task.figures(["a"] * 6) == {"one": 1.0}
    said = capsys.readouterr().out
    assert said.endswith(
        ": left out, for a figure is a number: 'many' (a ndarray), 'said' (a Text)\n"
    )
    assert said.count("left out") == 1


def test_what_fails_in_a_tasks_own_functions_is_named_with_its_place(make, monkeypatch):
    def broken(targets, predictions):
        return {"found": json.loads(predictions[0])}  # Fails within a library.

    def asked(text, example, is_target):
        return example["none"] if is_target else text

    file = r"\(.*test_eval_task.py, line "
    task = make([functools.partial(broken)])
    line = broken.__code__.co_firstlineno + 1
    said = rf"the metric 'broken' of the task choices_\w+ failed {file}{line}\): JSONDecodeError"
    with pytest.raises(ValueError, match=said):
        task.figures(["a"] * 6)
    monkeypatch.setitem(globals(), "right", functools.partial(asked))
    said = rf"the postprocessor of the task \w+, given the target '.+', failed {file}\d+\): KeyErr"
    with pytest.raises(ValueError, match=said):
        make([shouted])


def test_a_metric_that_gives_no_figures_is_named(make):
    def listed(targets, predictions):
        return [1.0, 2.0]

    with pytest.raises(ValueError, match=r"the metric 'listed' of .* gave \[1.0, 2.0\], expected"):
        make([listed]).figures(["a"] * 6)


def test_a_metric_object_that_fails_is_named(make):
    class Broken(Tokens):
        def compute(self):
            return 1 / 0

    task = make(metric_objs=[Broken])
    with pytest.raises(ValueError, match=r"the metric 'Broken' of the task .* ZeroDivisionError"):
        task.figures(["a"] * 6)


def test_two_figures_of_one_name_are_refused_as_by_seqio(make):
    task = make([shouted, functools.partial(shouted)])
    with pytest.raises(
        ValueError, match=r"choices_\w+: two of its metrics give a figure 'shouted'"
    ):
        task.figures(["a"] * 6)


def test_a_task_without_metrics_is_predicted(make, tiny, capsys):
    task = make()
    assert evaluation.evaluate(evaluation.Predictor(tiny, 0), tiny.params, [task]) == {}
    assert task.judge_scores is None and len(task.examples) == 6
    with pytest.raises(ValueError, match=r"PATIENCE is 3, but nothing .*: choices_\w+ has no met"):
        eval_task.check_figures("PATIENCE is 3", [task])

    def wants_text(targets, predictions):
        return {"first": ord(predictions[0])}

    eval_task.check_figures("PATIENCE is 3", [task, make([wants_text])])
    capsys.readouterr()
    evaluation.say_generated("generate", [task])
    assert capsys.readouterr().out == ""
    evaluation.say_generated("rank", [task])
    assert f"without labels texts are generated: {task.name}\n" in capsys.readouterr().out
