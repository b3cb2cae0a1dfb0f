"""Backbone folders: every type of storage, every way they can be wrong; and freezing patterns."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from softprompt import backbone as backbones
from softprompt import checkpoint, settings, tree
from softprompt.formats import Stored, native
from softprompt.vocabulary import ByteVocabulary, Vocabulary, open_vocabulary


def saved(tiny, folder, dtype="float32"):
    stored = Stored.of("tiny", tiny.cfg, tiny.params, tiny.vocabulary, {"why": "a test"})
    fingerprint = native.save(folder, stored, dtype)
    return backbones.load(folder), fingerprint


def test_float32_comes_back_bit_for_bit(tiny, tmp_path):
    loaded, fingerprint = saved(tiny, tmp_path)
    assert fingerprint == loaded.fingerprint == tiny.fingerprint
    for path, x in tiny.params.items():
        np.testing.assert_array_equal(x, loaded.params[path])
    assert loaded.cfg == tiny.cfg and loaded.vocabulary == tiny.vocabulary
    assert loaded.metadata == {"why": "a test", "stored_as": "float32"}


@pytest.mark.parametrize("dtype, error", [("bfloat16", 2**-8), ("int8", 0.5 / 127)])
def test_smaller_storage_rounds_and_is_fingerprinted_as_rounded(tiny, tmp_path, dtype, error):
    loaded, fingerprint = saved(tiny, tmp_path, dtype)
    assert fingerprint == loaded.fingerprint != tiny.fingerprint
    for path, x in tiny.params.items():
        x = np.asarray(x)
        largest = np.abs(x) if dtype == "bfloat16" else np.abs(x).max()
        assert (np.abs(x - loaded.params[path]) <= error * largest + 1e-7).all(), path
    # The same values under another roof keep the fingerprint.
    again = native.save(tmp_path / "again", Stored.of("tiny", tiny.cfg, loaded.params))
    assert again == fingerprint


def test_the_embedded_backbone_fits_in_the_package(embedded):
    size = sum(p.stat().st_size for p in native.EMBEDDED.iterdir())
    assert size <= 16_000_000
    assert embedded.vocabulary.size <= embedded.cfg.vocab_size
    # Each stage it went through is there, the last one first.
    stages, about = [], embedded.metadata
    while "task" in about:
        stages.append(about["task"])
        about = about["trained_from"]
    assert stages == ["pretrain_span_corruption_dense"]
    assert (native.EMBEDDED / native.CARD_FILE).is_file()


def test_a_wrong_path_says_what_lies_there(tmp_path):
    with pytest.raises(ValueError, match="the backbone '.*nowhere' .* does not exist"):
        backbones.load(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="INITIAL_CHECKPOINT_PATH is 3; expected 'embedded', a"):
        backbones.load(3)
    with pytest.raises(ValueError, match="VOCABULARY_FILE is 3, expected a path, 'bytes' or"):
        open_vocabulary(3)
    with pytest.raises(ValueError, match=r"holds no backbone \(it holds: notes.txt\)"):
        backbones.load(tmp_path)


def test_missing_leftover_and_misshapen_parameters_are_listed(tiny, tmp_path):
    params = {k: np.asarray(x) for k, x in tiny.params.items()}
    params["decoder/extra"] = params.pop("encoder/encoder_norm/scale")
    params["decoder/decoder_norm/scale"] = np.ones(3, np.float32)
    native.save(tmp_path, Stored.of("tiny", tiny.cfg, params))
    with pytest.raises(ValueError) as error:
        backbones.load(tmp_path)
    for part in (
        "missing encoder/encoder_norm/scale",
        "unexpected decoder/extra",
        r"decoder/decoder_norm/scale has shape (3,), expected (24,)",
    ):
        assert part in str(error.value)


def test_a_corrupt_backbone_is_found(tiny, tmp_path):
    saved(tiny, tmp_path)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(checkpoint.CorruptFile, match="is corrupt"):
        backbones.load(tmp_path)


def test_a_vocabulary_larger_than_the_embedding_is_refused(tiny, vocabulary):
    with pytest.raises(ValueError, match="8100 ids, but the embedding has 100 rows"):
        backbones.check_vocabulary(vocabulary, dataclasses.replace(tiny.cfg, vocab_size=100))


def test_two_copies_of_one_vocabulary_are_equal(vocabulary, tmp_path):
    shutil.copy(vocabulary.path, tmp_path / "copy.model")
    assert Vocabulary(tmp_path / "copy.model") == vocabulary


def test_what_is_no_vocabulary_is_named(tmp_path):
    (tmp_path / "x.model").write_bytes(b"no model at all")
    with pytest.raises(ValueError, match="x.model' is not a SentencePiece model"):
        Vocabulary(tmp_path / "x.model")
    with pytest.raises(ValueError, match="cannot read the SentencePiece model .*y.model"):
        Vocabulary(tmp_path / "y.model")


def test_t5s_own_vocabulary_loads_with_its_sentinels(fixtures):
    words = Vocabulary(fixtures / "t5_vocab.model")
    assert words.size == 32_100 and words.sentinel(0) == 32_099
    assert words.decode(words.encode("A fine film.")) == "A fine film."


def test_sentinels_are_found_as_their_model_names_them(tmp_path, vocabulary):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(pathlib.Path(vocabulary.path).read_bytes())
    for i in (1, 0):
        model.pieces.add(piece=f"<extra_id_{i}>", score=0.0, type=4)
    (tmp_path / "own.model").write_bytes(model.SerializeToString())
    words = Vocabulary(tmp_path / "own.model")
    assert words.extra_ids == 0 and words.sentinel(0) == words.size - 1
    with pytest.raises(ValueError, match="own.model' has no sentinel <extra_id_2>"):
        words.sentinel(2)
    # ByT5's are the last bytes, downwards.
    assert [ByteVocabulary().sentinel(i) for i in (0, 1)] == [258, 257]


def test_any_changed_bit_changes_the_fingerprint(tiny):
    changed = {k: np.asarray(x).copy() for k, x in tiny.params.items()}
    view = changed["encoder/layers_1/mlp/wo/kernel"].view(np.int32)
    view[3, 3] ^= 1
    assert tree.fingerprint(changed) != tiny.fingerprint
    view[3, 3] ^= 1
    assert tree.fingerprint(changed) == tiny.fingerprint


# --- patterns -----------------------------------------------------------------------------------

FLAT = {"prompt/bank": 1, "encoder/a/kernel": 2, "encoder/a/scale": 3, "decoder/kernel": 4}


@pytest.mark.parametrize(
    "trainable, expected",
    [
        (("prompt/.*",), {"prompt/bank"}),
        ((".*",), set(FLAT)),
        ((".*/scale", "prompt/bank"), {"encoder/a/scale", "prompt/bank"}),
        (("encoder/.*",), {"encoder/a/kernel", "encoder/a/scale"}),
    ],
)
def test_patterns_match_whole_paths(trainable, expected):
    trained, frozen = tree.split(FLAT, trainable)
    assert set(trained) == expected and set(frozen) == set(FLAT) - expected


def test_part_of_a_path_is_no_match():
    with pytest.raises(ValueError, match="'prompt' matches no parameter.*prompt/bank"):
        tree.split(FLAT, ("prompt",))


def test_a_flipped_bit_in_the_header_is_found(tmp_path):
    path = tmp_path / "p.safetensors"
    about = {"best": {"step": 3, "metric": 0.5}}
    checkpoint.write(path, {"x": np.ones(3, np.float32)}, about)
    whole = path.read_bytes()
    unread = whole.index(checkpoint.METADATA_DIGEST.encode())
    for at in set(range(8, whole.index(b"}}") + 2)) - set(
        range(unread, unread + len(checkpoint.METADATA_DIGEST))
    ):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(checkpoint.CorruptFile, match="p.safetensors'"):
            checkpoint.read(path)
    path.write_bytes(whole)
    assert checkpoint.read(path)[1].keys() == {"best", "sha256", "format_version"}


def test_a_file_of_an_earlier_version_is_read_and_its_broken_metadata_named(tmp_path):
    path = tmp_path / "p.safetensors"
    arrays = {"x": np.ones(3, np.float32)}
    digest = json.dumps(checkpoint._hash(arrays))
    about = {"sha256": digest, "format_version": "1", "step": "25"}
    safetensors_numpy.save_file(arrays, path, about)
    assert checkpoint.read(path)[1]["step"] == 25
    for broken in ({"step": "2{"}, {"format_version": '"1"'}):
        safetensors_numpy.save_file(arrays, path, about | broken)
        with pytest.raises(checkpoint.CorruptFile, match="p.safetensors' is corrupt: its "):
            checkpoint.read(path)


@pytest.mark.parametrize(
    "patterns, message",
    [
        (None, "FROZEN is None, expected a list"),
        (3, "FROZEN is 3, expected a list"),
        (".*", r"FROZEN is '\.\*', expected a list"),
        ([1], r"FROZEN is \[1\], expected a list"),
        ([".*", "(x"], r"FROZEN holds '\(x', which is no regular expression: missing \)"),
    ],
)
def test_what_is_no_list_of_patterns_is_refused(patterns, message):
    settings.check_patterns(TRAINABLE=("prompt/.*",), FROZEN=[])
    with pytest.raises(ValueError, match=message):
        settings.check_patterns(FROZEN=patterns)


def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    checkpoint.write(path, {"x": np.ones(3, np.float32)}, {})
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(ValueError, match="cannot write '.*p.safetensors': No space left on device"):
        checkpoint.write(path, {"x": np.zeros(3, np.float32)}, {})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
