"""A tokenizer that is a `tokenizer.json` alone segments as its SentencePiece model does."""

import base64
import json
import os
import pathlib

import pytest
from conftest import folder_of
from sentencepiece import sentencepiece_model_pb2

from softprompt import formats
from softprompt.formats import hf, native, tokenizer
from softprompt.vocabulary import Vocabulary, open_vocabulary

TEXTS = [
    "a fine film, and 1,234 more of them",
    "  Ｆｕｌｌ　ｗｉｄｔｈ, ﬁne ligatures … and ½ ",
    "review: naïve café\tthe <extra_id_0> of <extra_id_99>.",
    "漢字 and emoji 🎈",
    "",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTPROMPT_CACHE_DIR", str(tmp_path / "cache"))


def as_transformers(model: pathlib.Path) -> dict:
    """What transformers 5 writes of a SentencePiece model, as far as it segments texts."""
    read = sentencepiece_model_pb2.ModelProto()
    read.ParseFromString(model.read_bytes())
    table = base64.b64encode(read.normalizer_spec.precompiled_charsmap).decode()
    pieces = [[p.piece, p.score] for p in read.pieces]
    pieces += [[f"<extra_id_{i}>", 0.0] for i in reversed(range(100))]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": 0, "content": "<pad>", "special": True},
            *({"id": len(pieces) - 1 - i, "content": f"<extra_id_{i}>"} for i in range(100)),
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Precompiled", "precompiled_charsmap": table}],
        },
        "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": False},
    }


def written(folder: pathlib.Path, content: dict) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    (folder / tokenizer.FILE).write_text(json.dumps(content))
    return folder / tokenizer.FILE


def test_texts_become_the_same_ids(tmp_path, vocabulary):
    path = written(tmp_path, as_transformers(pathlib.Path(vocabulary.path)))
    found = open_vocabulary(tokenizer.sentencepiece_file(path))
    assert found == vocabulary and found.size == vocabulary.size
    assert found.encode_batch(TEXTS) == vocabulary.encode_batch(TEXTS)
    assert [found.decode(found.encode(x)) for x in TEXTS] == [
        vocabulary.decode(vocabulary.encode(x)) for x in TEXTS
    ]
    assert found.sentinel(7) == vocabulary.sentinel(7)


def test_a_folder_with_nothing_else_has_its_vocabulary(tmp_path, tiny):
    stored = formats.Stored.of("tiny", tiny.cfg, tiny.params, tiny.vocabulary)
    hf.save(tmp_path / "a", stored)
    content = as_transformers(tmp_path / "a" / hf.VOCABULARY_FILE)
    (tmp_path / "a" / hf.VOCABULARY_FILE).unlink()
    path = written(tmp_path / "a", content)
    found = formats.open_stored(tmp_path / "a")
    assert found.vocabulary == tiny.vocabulary
    native.save(tmp_path / "b", found)
    assert formats.open_stored(tmp_path / "b").vocabulary == tiny.vocabulary

    added = {"id": tiny.vocabulary.size, "content": "<="}
    path.write_text(json.dumps(content | {"added_tokens": [added, "?"]}))
    with pytest.raises(ValueError, match="its tokenizer has '<=' beyond the pieces") as error:
        formats.open_stored(tmp_path / "a")
    named = str(error.value).rpartition("name '")[2].partition("'")[0]
    assert open_vocabulary(named) == tiny.vocabulary

    path.write_text(json.dumps(content | {"model": {"type": "BPE"}}))
    assert formats.open_stored(tmp_path / "a").vocabulary is None
    about = json.dumps({"tokenizer_class": hf.BYT5})
    (tmp_path / "a" / "tokenizer_config.json").write_text(about)
    assert formats.open_stored(tmp_path / "a").vocabulary.path == "bytes"


def test_other_sentinels_and_bytes_stay_pieces(tmp_path, vocabulary):
    content = as_transformers(pathlib.Path(vocabulary.path))
    content["model"]["byte_fallback"] = True
    content["model"]["vocab"][-100:] = [
        *([f"<0x{i:02X}>", 0.0] for i in range(256)),
        ["▁<extra_id_0>", 0.0],
    ]
    found = open_vocabulary(tokenizer.sentencepiece_file(written(tmp_path, content)))
    assert found.extra_ids == 0 and found.sentinel(0) == found.size - 1
    spelled = [found.piece(i) for i in found.encode("漢")]
    assert spelled[-3:] == ["<0xE6>", "<0xBC>", "<0xA2>"]
    assert found.encode("<extra_id_0>") == [found.sentinel(0)]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"unk_id": 0}, "id of its unknown token is 0, expected 2"),
        ({"vocab": [["a"]]}, "no tokenizer of a T5"),
        ({"vocab": None}, "no tokenizer of a T5"),
        (
            {"vocab": [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["a", 0.0], ["a", 0.0]]},
            "no tokenizer of a T5: .*a is already defined",
        ),
    ],
)
def test_a_file_of_another_form_is_named(tmp_path, vocabulary, change, message):
    content = as_transformers(pathlib.Path(vocabulary.path))
    content["model"] |= change
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=f"tokenizer.json' .*{message}"):
        tokenizer.sentencepiece_file(path)
    assert not os.path.exists(tmp_path / "cache")


def test_what_transformers_saves_of_t5s_vocabulary(tmp_path):
    reason = "transformers is not installed: its own file is read"
    transformers = pytest.importorskip("transformers", reason=reason)
    model = folder_of("SOFTPROMPT_TEST_FIXTURES", "T5's vocabulary") / "t5_vocab.model"
    vocabulary = Vocabulary(model)
    theirs = transformers.T5Tokenizer.from_pretrained(str(model.parent), vocab_file=str(model))
    theirs.save_pretrained(tmp_path)
    (tmp_path / hf.VOCABULARY_FILE).unlink(missing_ok=True)
    found = open_vocabulary(tokenizer.sentencepiece_file(tmp_path / tokenizer.FILE))
    assert found == vocabulary
    assert found.encode_batch(TEXTS) == vocabulary.encode_batch(TEXTS)
