"""Mixed-task batches: a prompt per row gives what batches of one prompt each give."""

import dataclasses
import re

import numpy as np
import pytest
from conftest import TINY

import softprompt
from softprompt import backbone as backbones
from softprompt import data, eval_task, evaluation, partition, prompt, throughput, train

PAIRS = [("a fine film", "positive"), ("a dull film", "negative")]
TEXTS = [f"a text of {'some ' * n}words" for n in (1, 4, 2, 7, 3, 1, 5)]
WHICH = [0, 1, 2, 0, 1, 2, 2]
LABELS = [["positive", "negative"], ["person", "place", "a long name"], ["yes", "no"]]

# One layer each: what compiles is small.
SMALL = dataclasses.replace(TINY, num_encoder_layers=1, num_decoder_layers=1)


@pytest.fixture(scope="module")
def tiny(vocabulary):
    return backbones.random(SMALL, 0, vocabulary, partition.make_mesh(devices=1), "small")


def prompts_of(backbone, lengths):
    rng = np.random.default_rng(2)
    return [rng.normal(size=(n, backbone.cfg.emb_dim)).astype(np.float32) for n in lengths]


def test_a_mixed_batch_gives_the_texts_and_scores_of_separate_ones(tiny):
    found = prompts_of(tiny, (3, 9, 0))
    each = [found[k] if len(found[k]) else None for k in WHICH]
    texts = softprompt.generate(tiny, TEXTS, each, max_tokens=4, batch_size=8)
    scores = softprompt.score_labels(tiny, TEXTS, [LABELS[k] for k in WHICH], each, batch_size=8)
    chosen = softprompt.classify(tiny, TEXTS, [LABELS[k] for k in WHICH], each)
    assert scores.shape == (7, 3) and np.isneginf(scores[0, 2])
    for k, array in enumerate(found):
        of = [i for i, which in enumerate(WHICH) if which == k]
        own = [TEXTS[i] for i in of]
        one = array if len(array) else None
        alone = softprompt.generate(tiny, own, one, max_tokens=4, batch_size=8)
        assert [texts[i] for i in of] == alone
        alone = softprompt.score_labels(tiny, own, LABELS[k], one, batch_size=8)
        np.testing.assert_allclose(scores[of][:, : len(LABELS[k])], alone, atol=2e-5)
        assert [chosen[i] for i in of] == [LABELS[k][c] for c in alone.argmax(-1)]


def test_a_sampled_text_depends_on_the_seed_and_its_number_alone(tiny):
    """Not on the batch that it is in; on several devices see `test_partition`."""
    [array] = prompts_of(tiny, (3,))

    def sampled(**settings):
        return softprompt.generate(tiny, TEXTS, array, max_tokens=4, temperature=1.0, **settings)

    found = sampled(batch_size=8)
    assert sampled(batch_size=2) == found and len(set(found)) > 1
    assert sampled(batch_size=8, seed=1) != found
    # The same text at other places is sampled anew.
    assert len(set(softprompt.generate(tiny, 5 * TEXTS[:1], array, 4, temperature=1.0))) > 1


def test_in_rows_of_one_shape_the_scores_are_the_same_to_the_last_digits(tiny):
    """Prompts of one length and one set of labels: nothing differs but the rows of the bank."""
    found = prompts_of(tiny, (4, 4))
    bank, lengths = prompt.bank(found, tiny.cfg.emb_dim)
    examples = data.from_pairs([(t, "") for t in TEXTS[:4]], tiny.vocabulary,
                               {"inputs": 16, "targets": 8})  # fmt: skip
    mixed = evaluation.Predictor(tiny, lengths, "rank", 4)
    alone = evaluation.Predictor(tiny, 4, "rank", 4)
    scores = mixed.score({**tiny.params, train.PROMPT: bank}, examples, LABELS[0], [0, 1, 0, 1])
    for k in (0, 1):
        single = alone.score({**tiny.params, train.PROMPT: found[k]}, examples, LABELS[0])
        np.testing.assert_allclose(scores[k::2], single[k::2], rtol=0, atol=1e-6)
        assert np.abs(scores[k::2] - single[1 - k :: 2]).max() > 1e-3


def test_wrong_prompts_are_sentences(tiny):
    [array] = prompts_of(tiny, (3,))
    with pytest.raises(ValueError, match="got 1 prompts for 2 texts, expected one for each"):
        softprompt.generate(tiny, TEXTS[:2], [array])
    with pytest.raises(ValueError, match="got labels of 1 texts for 2 texts"):
        softprompt.score_labels(tiny, TEXTS[:2], [["a", "b"]], [array, array])
    other = softprompt.Prompt(array, {"backbone": "x", "backbone_fingerprint": "0" * 16})
    with pytest.raises(ValueError, match="the prompt 'prompt 0' was trained for the backbone 'x'"):
        softprompt.generate(tiny, TEXTS[:1], [other])
    predictor = evaluation.Predictor(tiny, [3, 3])
    examples = data.from_pairs([("a", "")], tiny.vocabulary, {"inputs": 16, "targets": 8})
    with pytest.raises(ValueError, match="there are 2 prompts: say which one is whose"):
        predictor.generate(dict(tiny.params), examples)


def zeros(count=3, width=SMALL.emb_dim):
    return np.zeros((count, width), np.float32)


@pytest.mark.parametrize("call, message", [
    (lambda b: softprompt.classify(b, TEXTS, "person"), "labels: got 'person', expected a list"),
    (lambda b: softprompt.tune(b, [("a", "b")], labels="abc"), "labels: got 'abc', expected a"),
    (lambda b: softprompt.tune(b, [("a", "b")], [("a", "b")], patience=2, eval_period=0),
     "patience is 2, but nothing is evaluated before the end: eval_period is 0"),
    (lambda b: softprompt.evaluate(b, [("a", "b")], labels="abc"), "labels: got 'abc', expected"),
    (lambda b: softprompt.ensemble(b, TEXTS, [zeros()], []), "labels: got an empty list, expected"),
    (lambda b: softprompt.classify(b, TEXTS, []), "labels: got an empty list, expected one or"),
    (lambda b: softprompt.classify(b, ["a", 3], ["x"]), "text 1 is 3, expected a string"),
    (lambda b: softprompt.load_backbone(dtype="int8"), "dtype is 'int8', expected 'float32', 'bf"),
    (lambda b: softprompt.load_backbone(dtype="float64"), "dtype is 'float64', expected 'float32'"),
    (lambda b: softprompt.load_backbone(dtype="float61"), "dtype is 'float61', expected 'float32'"),
    (lambda b: softprompt.classify(b, TEXTS, [1, 2]), "labels: got 1 in the list, expected texts"),
    (lambda b: softprompt.classify(b, TEXTS[:2], [["a"], "b"]), "labels of text 1: got 'b', exp"),
    (lambda b: softprompt.read_pairs("x.csv", labels="a,b"), "labels: got 'a,b', expected a list"),
    (lambda b: softprompt.classify(b, TEXTS, ["a", ""]), "the label '' has no tokens, expected a"),
    (lambda b: softprompt.evaluate(b, [("a", "B")], labels=["b"]), "target 'B' is not among the l"),
    (lambda b: softprompt.tune(b, [("a", "b")], [("a", "c")], ["b", "d"], train_steps=1),
     "validation: the target 'c' is not among the labels"),
    (lambda b: softprompt.evaluate(b, [{"text": "a", "label": "b"}]), "validation: pair 0 is {'te"),
    (lambda b: softprompt.evaluate(b, [("a", "b")], [[0.0]]), "prompt is a list, expected a Promp"),
    (lambda b: softprompt.generate(b, TEXTS, temperature=1, seed=1.5), "seed is 1.5, expected an"),
    (lambda b: softprompt.generate(b, TEXTS, top_k=5), "top_k is 5 and top_p 1, but the temperat"),
    (lambda b: softprompt.generate(b, TEXTS, top_p=0.5), "top_k is 0 and top_p 0.5, but the temp"),
    (lambda b: softprompt.generate(b, TEXTS, max_tokens=0), "max_tokens is 0, expected an integer"),
    (lambda b: softprompt.generate(b, TEXTS, beams=0), "beams is 0, expected an integer of at"),
    (lambda b: softprompt.generate(b, TEXTS, beams=1.5), "beams is 1.5, expected an integer of at"),
    (lambda b: softprompt.generate(b, TEXTS, temperature=-1.0), "temperature is -1.0, expected a"),
    (lambda b: softprompt.generate(b, TEXTS, temperature=1, beams=2), "sampled or searched for"),
    (lambda b: softprompt.generate(b, TEXTS, batch_size=0), "batch_size is 0, expected an int"),
    (lambda b: softprompt.score_labels(b, TEXTS, ["a"], batch_size=0), "batch_size is 0, expect"),
    (lambda b: softprompt.classify(b, TEXTS, ["a"], batch_size=0), "batch_size is 0, expected"),
    (lambda b: softprompt.evaluate(b, [("a", "b")], batch_size=0), "batch_size is 0, expected"),
    (lambda b: softprompt.ensemble(b, TEXTS, [zeros()], batch_size=0), "batch_size is 0, expected"),
    (lambda b: softprompt.generate(b, TEXTS, zeros() + np.nan), "prompt holds numbers that are n"),
    (lambda b: softprompt.generate(b, TEXTS, zeros(0)), r"prompt has shape \(0, 24\), expected"),
    (lambda b: softprompt.generate(b, TEXTS, softprompt.Prompt(zeros(0), {})), "prompt has shape"),
    (lambda b: softprompt.generate(b, TEXTS, softprompt.Prompt(zeros(), {}, zeros()[None] / 0)),
     "prompt holds numbers that are not finite"),
    (lambda b: softprompt.generate(b, TEXTS, softprompt.Prompt(zeros(), {}, zeros())),
     r"prompt has deep rows of shape \(3, 24\), expected \(layers - 1, 3, 24\)"),
    (lambda b: softprompt.load_prompt("p.npy", ignore_fingerprint=True), "the backbone to use"),
    *(
        (call, "backbone is 'embedded', expected what load_backbone returns") for call in (
            lambda b: softprompt.tune("embedded", PAIRS),
            lambda b: softprompt.tune_many("embedded", [{}], train_data=PAIRS),
            lambda b: softprompt.evaluate("embedded", PAIRS),
            lambda b: softprompt.classify("embedded", TEXTS, ["a"]),
            lambda b: softprompt.score_labels("embedded", TEXTS, ["a"]),
            lambda b: softprompt.generate("embedded", TEXTS),
            lambda b: softprompt.ensemble("embedded", TEXTS, [zeros()]),
            lambda b: softprompt.load_prompt("p.npy", "embedded"),
        )
    ),
    (lambda b: softprompt.tune(b, 3), r"train data is 3, expected \(text, target\) pairs"),
    (lambda b: softprompt.tune(b, softprompt.embedded_data("sentiment")),
     "^train data is .{1,50}, expected .text, target. pairs"),
    (lambda b: softprompt.tune(b, PAIRS, 3, train_steps=1), "validation data is 3, expected"),
    (lambda b: softprompt.tune_many(b, [{}], train_data=None), "train data is None, expected"),
    (lambda b: softprompt.evaluate(b, None), "validation data is None, expected"),
    (lambda b: softprompt.generate(b, 3), "texts is 3, expected a list of texts"),
    (lambda b: softprompt.load_prompt(3), "path is 3, expected that of a prompt"),
    (lambda b: softprompt.read_pairs(3), "path is 3, expected that of a JSON Lines"),
    (lambda b: softprompt.read_pairs("a.csv", 3), "template is 3, expected a text with fields"),
    (lambda b: softprompt.read_pairs("a.csv", target=0), "target is 0, expected the name of"),
    (lambda b: softprompt.Prompt(np.zeros((1, 2)), {}).save(3), "path is 3, expected that of a .s"),
    *(
        (lambda b, x=x: softprompt.tune_many(b, x, train_data=PAIRS), "members is .*, expected a l")
        for x in ("abc", {"seed": 1}, [None], 3, [{3: 1}])
    ),
    (lambda b: softprompt.tune_many(b, [{}], 3, train_data=PAIRS), "model_dir is 3, expected a pa"),
    (lambda b: softprompt.tune(b, PAIRS, model_dir=3), "model_dir is 3, expected a path or None"),
    (lambda b: softprompt.tune(b, PAIRS, prompt_init="random"), "prompt_init is 'random', exp"),
    (lambda b: softprompt.tune_many(b, [{"prompt_init": 3}], train_data=PAIRS), "prompt_init is 3"),
    (lambda b: softprompt.tune(b, PAIRS, prompt_init=lambda _, n, source: np.zeros((n, 3))),
     r"what the initialiser '<lambda>' gives has shape \(\d+, 3\), expected \(P, \d+\)"),
    (lambda b: softprompt.tune(b, PAIRS, prompt_init=lambda _, n, source: source.embedding[:n - 1]),
     r"what the initialiser '<lambda>' gives has \d+ rows, expected \d+"),
    (lambda b: softprompt.tune(b, PAIRS, reparameterisation=True), "reparameterisation is True, e"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:invalid value")
def test_wrong_arguments_are_sentences(tiny, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny)


def test_labels_may_be_arrays(tiny):
    found = softprompt.classify(tiny, TEXTS[:2], np.array(LABELS[0]))
    assert set(map(type, found)) == {str} and set(found) <= set(LABELS[0])
    assert softprompt.classify(tiny, TEXTS[:2], np.array([LABELS[0], LABELS[0]])) == found


def test_texts_may_come_one_by_one_and_numbers_from_numpy(tiny, pairs):
    found = softprompt.classify(tiny, (text for text in TEXTS[:2]), LABELS[0])
    assert found == softprompt.classify(tiny, TEXTS[:2], LABELS[0])
    labels = sorted({target for _, target in pairs})
    two, one = np.int64(2), np.int32(1)
    prompt = softprompt.tune(
        tiny, pairs, labels=labels, prompt_length=two, train_steps=one, batch_size=np.int64(4)
    )
    assert prompt.array.shape[0] == 2


def test_labels_of_a_call_come_before_those_of_a_task(tiny, tmp_path, monkeypatch):
    from softprompt.tasks import user

    path = tmp_path / "rows.csv"
    path.write_text("text,label\na fine film,good\na dull film,bad\n")
    user.define_task("free_text", validation_file=path)

    def asked(predictor, flat, tasks):
        return predictor.mode, tasks[0].labels, len(tasks[0].examples)

    monkeypatch.setattr(evaluation, "evaluate", asked)
    lengths = {"inputs": 16, "targets": 4}
    found = softprompt.evaluate(tiny, "free_text", labels=["good"], lengths=lengths)
    assert found == ("rank", ["good"], 2)
    assert softprompt.evaluate(tiny, "free_text", lengths=lengths) == ("generate", None, 2)
    pairs = zip(["a fine film", "a dull film"], ["good", "bad"], strict=True)
    found = softprompt.evaluate(tiny, pairs, labels=["good", "bad"], lengths=lengths)
    assert found == ("rank", ["good", "bad"], 2)


def test_a_prompt_behind_a_sentinel_is_used_behind_it(tiny, monkeypatch):
    [array] = prompts_of(tiny, (3,))
    behind = softprompt.Prompt(array, {"target_sentinel": True})
    prefix = (tiny.vocabulary.sentinel(0),)
    examples = data.from_pairs([(TEXTS[0], "")], tiny.vocabulary, softprompt.api.LENGTHS)
    flat, _ = prompt.attach(tiny, [array])
    predictor = evaluation.Predictor(tiny, 3, "rank", prefix=prefix)
    np.testing.assert_allclose(
        softprompt.score_labels(tiny, TEXTS[:1], LABELS[0], behind),
        predictor.score(flat, examples, LABELS[0]),
        atol=1e-6,
    )

    class Made(Exception):
        pass

    def made(*_, prefix, **settings):
        raise Made(prefix)

    monkeypatch.setattr(evaluation, "Predictor", made)
    for call in (
        lambda one: softprompt.generate(tiny, TEXTS[:1], one),
        lambda one: softprompt.generate(tiny, TEXTS[:2], [one, None]),
        lambda one: softprompt.score_labels(tiny, TEXTS[:1], LABELS[0], one),
        lambda one: softprompt.classify(tiny, TEXTS[:1], LABELS[0], one),
        lambda one: softprompt.ensemble(tiny, TEXTS[:1], [one, one]),
        lambda one: softprompt.evaluate(tiny, [("a", "b")], one),
    ):
        for one, expected in ((behind, prefix), (array, ())):
            with pytest.raises(Made) as found:
                call(one)
            assert found.value.args == (expected,)
    with pytest.raises(ValueError, match="prompt 0, prompt 1: some of these .* TARGET_SENTINEL"):
        softprompt.ensemble(tiny, TEXTS[:1], [behind, array])


def test_a_prompt_of_another_backbone_is_used_where_that_was_asked_for(tiny, tmp_path):
    other = backbones.random(SMALL, 1, tiny.vocabulary, tiny.mesh, "other")
    [array] = prompts_of(tiny, (3,))
    path = tmp_path / "p.safetensors"
    theirs = {"backbone": other.name, "backbone_fingerprint": other.fingerprint}
    softprompt.Prompt(array, theirs).save(path)
    with pytest.raises(ValueError, match=r"'other' .*load_prompt\(path, backbone, ignore_finger"):
        softprompt.load_prompt(path, tiny)
    found = softprompt.load_prompt(path, tiny, ignore_fingerprint=True)
    assert found.metadata["backbone_fingerprint"] == other.fingerprint
    assert softprompt.classify(tiny, TEXTS[:1], LABELS[0], found)[0] in LABELS[0]
    third = backbones.random(SMALL, 2, tiny.vocabulary, tiny.mesh, "third")
    with pytest.raises(ValueError, match="was trained for the backbone 'other'"):
        softprompt.score_labels(third, TEXTS[:1], LABELS[0], found)


@pytest.mark.parametrize("name", ["../esc", "/tmp/esc", "a/b", "..", ".", "", "a\\b"])
def test_a_member_stays_in_the_folder(tiny, pairs, tmp_path, name):
    with pytest.raises(ValueError, match="a member has the name .*, expected that of a folder in"):
        softprompt.tune_many(tiny, [{"name": name}], tmp_path / "runs", train_data=pairs)
    assert not list(tmp_path.iterdir())


def test_a_deep_prompt_shares_no_batch_and_is_not_cut_silently(tiny):
    cfg = dataclasses.replace(tiny.cfg, num_encoder_layers=2)
    two = backbones.random(cfg, 0, tiny.vocabulary, tiny.mesh, "two layers")
    [plain] = prompts_of(two, (3,))
    deep = softprompt.Prompt(plain, {}, np.ones((1, 3, cfg.emb_dim), np.float32))
    for call in (softprompt.generate, softprompt.ensemble):
        with pytest.raises(ValueError, match="prompt 1 has rows for deeper layers, expected"):
            call(two, TEXTS[:2], [plain, deep])
    scores = [softprompt.score_labels(two, TEXTS[:1], LABELS[0], p) for p in (deep, [deep])]
    np.testing.assert_array_equal(*scores)


def test_an_ensemble_of_the_python_api_votes(tiny):
    votes = softprompt.ensemble(tiny, TEXTS[:2], prompts_of(tiny, (3, 2, 5)), LABELS[0])
    assert votes.scores.shape == (3, 2, 2)
    chosen = votes.majority()
    assert set(chosen) <= set(LABELS[0]) and (votes.agreement(chosen) >= 2 / 3).all()


def test_many_prompts_are_tuned_as_each_is_alone(tiny, pairs, tmp_path, monkeypatch):
    backbone = tiny
    add, counted = throughput.Meter.add, []

    def keep(meter, batch, label_ids=None):
        counted.append(label_ids)
        add(meter, batch, label_ids)

    monkeypatch.setattr(throughput.Meter, "add", keep)
    settings = dict(
        train_data=pairs, validation_data=pairs, labels=["positive", "negative"], train_steps=2,
        batch_size=4, lengths={"inputs": 16, "targets": 8},
    )  # fmt: skip
    members = [{"prompt_length": 3}, {"seed": 1, "prompt_length": 5, "name": "longer"}]
    found = softprompt.tune_many(backbone, members, tmp_path, **settings)
    one = softprompt.tune(backbone, seed=1, prompt_length=5, **settings)
    # Two steps of two members and one of a run, whose first one compiles and does not count, all by
    # the loss among the same labels.
    expected = eval_task.encode_labels(["positive", "negative"], backbone.vocabulary)
    assert len(counted) == 5 and all(np.array_equal(x, expected) for x in counted)
    np.testing.assert_allclose(found[1].array, one.array, atol=2e-5)
    assert found[0].array.shape == (3, 24) and found[0].metadata["status"] == "finished"
    assert {**found[1].metadata, "status": None} == {**one.metadata, "status": None}
    kept = softprompt.load_prompt(tmp_path / "longer" / "prompts" / "best.safetensors")
    np.testing.assert_array_equal(kept.array, found[1].array)
    with pytest.raises(ValueError, match="member '0' has stpes, which is none of its settings"):
        softprompt.tune_many(backbone, [{"stpes": 3}], **settings)


@pytest.mark.parametrize("form, says", [
    ({"length_buckets": 2}, r"length buckets: rows of \[\d+(, \d+)?\]"),
    ({"pack_length": "auto"}, r"packing: \d+ rows of \d+"),
])  # fmt: skip
def test_a_prompt_is_tuned_in_buckets_and_in_packed_rows(tiny, pairs, capsys, form, says):
    settings = dict(
        train_data=[(f"{text} " * k, label) for k, (text, label) in enumerate(pairs, 1)],
        labels=["positive", "negative"], prompt_length=3, train_steps=1, batch_size=4,
        lengths={"inputs": 32, "targets": 8},
    )  # fmt: skip
    initial = softprompt.tune(tiny, **settings, learning_rate=0.0).array
    found = softprompt.tune(tiny, **settings, **form).array
    assert re.search(says, capsys.readouterr().out)
    assert np.isfinite(found).all() and not np.array_equal(found, initial)
