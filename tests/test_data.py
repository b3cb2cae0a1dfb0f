"""Batches: trimmed, padded, and a pure function of seed and step."""

import itertools

import numpy as np
import pytest

from softprompt import data


def examples(name, count, first=10, length=4):
    inputs = [[first + i] * length for i in range(count)]
    targets = [[first + i] for i in range(count)]
    lengths = {"inputs": 8, "targets": 4}
    return data.make_examples(name, inputs, targets, [{} for _ in inputs], lengths)


def take(batches, start, count):
    return list(itertools.islice(batches(start), count))


def test_inputs_are_cut_to_their_length_and_counted(vocabulary):
    pairs = [("one two three four five six seven", "yes"), ("one", "yes")]
    cut = data.from_pairs(pairs, vocabulary, {"inputs": 4, "targets": 8}, "mine")
    assert [len(ids) for ids in cut.inputs][0] == 4 and cut.inputs[0][-1] == 1
    assert cut.cut == {"inputs": 1, "targets": 0}
    message = data.cut_message(cut, {"inputs": 4, "targets": 8})
    assert message == "mine: 1 of 2 inputs were longer than 4 tokens and were cut"


def test_an_input_as_long_as_its_feature_is_not_cut(vocabulary):
    n = len(vocabulary.encode("one two three")) + 1
    whole = data.from_pairs([("one two three", "a")], vocabulary, {"inputs": n, "targets": 8})
    assert whole.cut["inputs"] == 0 and len(whole.inputs[0]) == n


def test_a_batch_is_slots_then_tokens_then_padding():
    slots = np.array([100, 101], np.int32)
    [batch] = take(data.train_batches([examples("a", 3)], [1.0], 2, 0, slots), 0, 1)
    assert batch["encoder_ids"].shape == (2, 2 + 8)
    assert (batch["encoder_ids"][:, :2] == slots).all()
    assert (batch["encoder_ids"][:, 6] == 1).all() and (batch["encoder_ids"][:, 7:] == 0).all()


def test_every_example_comes_once_an_epoch_in_a_new_order():
    batches = data.train_batches([examples("a", 6)], [1.0], 2, 0, np.zeros(0, np.int32))
    seen = [int(row[0]) for b in take(batches, 0, 6) for row in b["encoder_ids"]]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(10, 16))
    assert seen[:6] != seen[6:]


@pytest.mark.parametrize("parts, rates", [([5], [1.0]), ([5, 3, 9], [3.0, 1.0, 2.0])])
def test_starting_at_a_step_gives_that_steps_batch(parts, rates):
    mixed = [examples(str(i), n, 100 * (i + 1)) for i, n in enumerate(parts)]
    batches = data.train_batches(mixed, rates, 4, 7, np.zeros(0, np.int32))
    whole, rest = take(batches, 0, 9), take(batches, 4, 5)
    for a, b in zip(whole[4:], rest, strict=True):
        np.testing.assert_array_equal(a["encoder_ids"], b["encoder_ids"])
        np.testing.assert_array_equal(a["targets"], b["targets"])


def test_a_mixture_draws_in_proportion_to_its_rates():
    mixed = [examples("a", 5, 100), examples("b", 5, 200)]
    batches = data.train_batches(mixed, [3.0, 1.0], 8, 0, np.zeros(0, np.int32))
    first = [int(row[0]) for b in take(batches, 0, 200) for row in b["encoder_ids"]]
    share = np.mean([i < 200 for i in first])
    assert abs(share - 0.75) < 0.04


def test_no_examples_and_no_strings_are_errors(vocabulary):
    with pytest.raises(ValueError, match="mine: there are no examples"):
        data.from_pairs([], vocabulary, {"inputs": 4, "targets": 4}, "mine")
    with pytest.raises(ValueError, match=r"mine: pair 1 is \('a', 3\), expected \(text, target\)"):
        data.from_pairs([("a", "b"), ("a", 3)], vocabulary, {"inputs": 4, "targets": 4}, "mine")


def test_sentencepiece_here_and_in_seqio_agree(vocabulary):
    """The API's tokeniser and the tasks' are one, sentinels included."""
    import seqio

    theirs = seqio.SentencePieceVocabulary(vocabulary.path, extra_ids=100)
    texts = [
        "A fine film.",
        "naïve café — 12,5%",
        "<extra_id_0> and <extra_id_99>",
        " two  blanks ",
    ]
    assert theirs.vocab_size == vocabulary.size
    for text in texts:
        assert theirs.encode(text) == vocabulary.encode(text)
        assert theirs.decode(theirs.encode(text)) == vocabulary.decode(vocabulary.encode(text))
    assert vocabulary.encode("<extra_id_0>") == [vocabulary.sentinel(0)]
