"""`softprompt eval` and `infer`: what they use a bank of prompts for."""

import json

import numpy as np
import pytest

import softprompt
from softprompt import banks, checkpoint, decode, infer, lengths
from softprompt.__main__ import main

MODEL = "--gin_file=models/t5_1_1_embedded.gin"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    backbone = softprompt.load_backbone()
    rng = np.random.default_rng(4)
    for name, length in (("a", 3), ("b", 6), ("c", 2)):
        array = rng.normal(size=(length, backbone.cfg.emb_dim)).astype(np.float32)
        about = {"backbone": backbone.name, "backbone_fingerprint": backbone.fingerprint}
        softprompt.Prompt(array, about).save(folder / f"{name}.safetensors")
    return folder


def test_rows_that_name_their_prompts_share_batches(tmp_path, files, capsys):
    rows = [
        {"prompt": "mood", "text": "a fine film"},
        {"prompt": str(files / "c.safetensors"), "text": "some words"},
        {"prompt": "kind", "question": "Who wrote it?"},
        {"prompt": "mood", "text": "a dull film"},
    ]
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {
        "mood": {"file": str(files / "a.safetensors"), "labels": ["good", "bad"]},
        "kind": {"file": str(files / "b.safetensors"), "template": "question: {question}",
                 "labels": ["person", "place", "time"]},
    }  # fmt: skip
    command = ["infer", MODEL, "--gin_file=runs/mixed_infer.gin", f"--gin.INPUT_FILE={path}",
               f"--gin.OUTPUT_FILE={out}", f"--gin.PROMPTS={named!r}",
               "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 4}"]  # fmt: skip
    assert main(command) == 0
    found = [json.loads(line)["prediction"] for line in out.read_text().splitlines()]
    backbone = softprompt.load_backbone()
    load = lambda name: softprompt.load_prompt(files / f"{name}.safetensors")  # noqa: E731
    films = ["a fine film", "a dull film"]
    mood = softprompt.classify(backbone, films, ["good", "bad"], load("a"))
    [kind] = softprompt.classify(
        backbone, ["question: Who wrote it?"], ["person", "place", "time"], load("b")
    )
    [text] = softprompt.generate(backbone, ["some words"], load("c"), max_tokens=4)
    assert found == [mood[0], text, kind, mood[1]]

    path.write_text('{"prompt": "moods", "text": "x"}\n')
    assert main(command) == 2
    said = capsys.readouterr().err.strip()
    assert "rows.jsonl:1: prompt is 'moods', which is neither a file nor one of PROMPTS" in said
    path.write_text('{"text": "x"}\n')
    assert main(command) == 2
    assert "no field 'prompt' names its prompt" in capsys.readouterr().err


def test_what_infer_reads_at_once_changes_neither_shapes_nor_samples(
    tmp_path, files, capsys, monkeypatch
):
    """Its shapes are bounded however many rows there are, and a row's sample is its own."""
    labels = {"a": ["good", "bad"], "b": ["one", "two", "a long third"], "c": None}
    names = {
        name: {"file": str(files / f"{name}.safetensors"), "labels": own}
        for name, own in labels.items()
    }
    path, shapes, batches = tmp_path / "rows.jsonl", set(), lengths.eval_batches
    ranked, score = set(), decode.score_labels
    with open(path, "w") as file:
        for i in range(9):
            row = {"prompt": "aabbccabc"[i], "text": "words " * (1 + 3 * i)}
            file.write(json.dumps(row) + "\n")

    def seen(*arguments):
        for indices, batch in batches(*arguments):
            shapes.add(batch["encoder_ids"].shape)
            yield indices, batch

    def compiled(module, params, ids, label_ids):
        ranked.add((ids.shape, label_ids.shape))
        return score(module, params, ids, label_ids)

    monkeypatch.setattr(lengths, "eval_batches", seen)
    monkeypatch.setattr(decode, "score_labels", compiled)
    found = []
    for chunk in (512, 2):
        monkeypatch.setattr(infer, "CHUNK", chunk)
        out = tmp_path / f"{chunk}.jsonl"
        command = ["infer", MODEL, "--gin_file=runs/mixed_infer.gin", f"--gin.INPUT_FILE={path}",
                   f"--gin.OUTPUT_FILE={out}", f"--gin.PROMPTS={names!r}", "--gin.BATCH_SIZE=4",
                   "--gin.TEMPERATURE=1.0",
                   "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 4}"]  # fmt: skip
        assert main(command) == 0
        found.append(out.read_text())
    assert found[0] == found[1]
    # Six positions for the longest prompt, whichever ones a chunk names.
    assert shapes <= {(4, 6 + n) for n in lengths.FIXED_LENGTHS} and len(shapes) > 1
    # And for the most and the longest labels.
    assert len({of_labels for _, of_labels in ranked}) == 1


def test_eval_takes_many_prompts_and_reads_each_once(tmp_path, files, capsys, monkeypatch):
    read, whole = [], checkpoint.read
    monkeypatch.setattr(checkpoint, "read", lambda path: read.append(str(path)) or whole(path))
    rows = tmp_path / "rows.jsonl"
    lines = [{"text": f"a {w} film", "label": w} for w in ("good", "bad", "good", "bad")]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["eval", MODEL, "--gin_file=runs/prompt_ensemble.gin", f"--validation_file={rows}",
               "--labels=good,bad", f"--gin.EVAL_OUTPUT_DIR={tmp_path}",
               "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 4}"]  # fmt: skip
    pattern = f"--gin.PROMPT_FILES=['{files}/*.safetensors']"
    assert main([*command, pattern, "--gin.MEASURE_COST=True"]) == 0
    assert [path for path in read if str(files) in path] == sorted(map(str, files.iterdir()))
    said = capsys.readouterr().out
    assert "ensemble, majority vote" in said and "| average |" in said
    report = json.loads((tmp_path / "user_task.json").read_text())
    assert len(report["prompts"]) == 3 and report["examples_per_second"] > 0
    votes = (tmp_path / "predictions" / "user_task.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["votes"]) for line in votes] == [3] * 4
    assert report["names"] == ["a.safetensors", "b.safetensors", "c.safetensors"]
    page = (tmp_path / "report.html").read_text()
    assert "3 prompts that vote" in page and "ensemble, majority vote" in page
    assert "examples/s together" in page and "prompts stand behind a vote" in page
    for value, message in (
        ("['/no/*.safetensors']", "PROMPT_FILES: no file fits the pattern '/no/*.safetensors'"),
        ("3", "PROMPT_FILES is 3, expected a path, a pattern or a list of them"),
        (f"['{files}/a.safetensors']", "PROMPT_FILES names 1 file, expected two or more"),
    ):
        assert main([*command, f"--gin.PROMPT_FILES={value}"]) == 2
        assert message in capsys.readouterr().err
    alone = "--gin.PROMPT_FILE=3"
    assert main([*command, "--gin.PROMPT_FILES=None", alone]) == 2
    assert "PROMPT_FILE is 3, expected a path" in capsys.readouterr().err
    assert main([*command, "--gin.PROMPT_FILES=None", "--gin.BEAMS=4"]) == 2
    assert "BEAMS is 4, but EVAL_MODE 'rank' ranks labels" in capsys.readouterr().err


def test_weights_of_another_type_are_named_for_every_prompt(tmp_path, tiny, capsys):
    for name, weights in (("a", "int8"), ("b", "float32")):
        about = {"backbone_fingerprint": tiny.fingerprint, "backbone_weights": weights}
        array = np.ones((2, tiny.cfg.emb_dim), np.float32)
        softprompt.Prompt(array, about).save(tmp_path / f"{name}.safetensors")
    banks.read(tiny, sorted(tmp_path.iterdir()), ignore_fingerprint=False, deep=False)
    said = capsys.readouterr().out
    assert said == f"{tmp_path / 'a.safetensors'}: trained on int8 weights, these are float32\n"


def test_a_file_votes_once(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.npy").write_text("")
    assert len(banks.listed(f"{tmp_path}/*.npy")) == 2
    with pytest.raises(ValueError, match="names a file more than once: .*a.npy"):
        banks.listed([f"{tmp_path}/*.npy", f"{tmp_path}/a.npy"])


@pytest.mark.parametrize("line, flags, message", [
    ('{"text": "a"}', ["--gin.LABELS='a,b'"], "LABELS is 'a,b', expected a list such as ['a'"),
    ('{"text": "a"}', ["--gin.LABELS=[1, 2]"], "LABELS is [1, 2], expected a list of texts"),
    ('{"text": "a"}', ["--gin.LABELS=[]"], "LABELS is [], expected a list of texts"),
    ('{"text": "a"}', ["--gin.TEXT_TEMPLATE=['a']"], "TEXT_TEMPLATE is ['a'], expected a text"),
    ('{"text": "a"}', ["--gin.TEXT_TEMPLATE='a text'"], "the template 'a text' names no field"),
    ('{"text": "a"}', ["--gin.SEED=-1"], "SEED is -1, expected an integer of at least 0"),
    ('{"text": "a"}', ["--gin.INPUT_FILE=3"], "INPUT_FILE is 3, expected a path"),
    ('{"text": "a"}', ["--gin_file=runs/mixed_infer.gin", "--gin.PROMPTS=['a']"],
     "PROMPTS is ['a'], expected {NAME: a path"),
    ('{"text": "a", "prompt": "a"}', ["--gin_file=runs/mixed_infer.gin",
     "--gin.PROMPTS={'a': {'file': 'a.npy', 'labels': []}}"], "LABELS of PROMPTS['a'] is []"),
    ('{"text": "a"}', ["--gin.OUTPUT_FILE=FOLDER/a.jsonl.gz"], "a.jsonl.gz', expected a name that"),
    ('{"text": "a"}', ["--gin.OUTPUT_FILE=FOLDER"], "is a folder, expected a file"),
    ('{"text": "a"}', ["--gin.OUTPUT_FILE=FOLDER/rows.jsonl/x"], "cannot write"),
    ('{"text": "a"}', ["--gin.OUTPUT_FILE=FOLDER/./rows.jsonl"], "is INPUT_FILE, expected another"),
    ('{"text": "a"}', ["--labels=a,b", "--gin.BEAMS=4"], "got LABELS, which are ranked, with BEAM"),
    ('{"text": "a"}', ["--gin.TOP_K=4"], "top_k is 4 and top_p 1, but the temperature is 0"),
    ('{"text": "a"}', ["--gin.TEMPERATURE=hot"], "TEMPERATURE is 'hot', expected a number"),
    ('{"text": "a"}', ["--gin.TEMPERATURE=1", "--gin.BEAMS=4"], "sampled or searched for"),
    ('{"text": "a"}', ["--gin.TOP_P=1.5"], "top_p is 1.5, expected more than 0"),
    ('{"text": "a", "prediction": "b"}', [], "rows.jsonl:1: the row has a field 'prediction'"),
    ('{"text": "a", "x": "\\ud83d"}', [], "rows.jsonl:1: half of a surrogate pair is no text"),
    ('{"text": "a", "prompt": "' + 300 * "p" + '"}', ["--gin_file=runs/mixed_infer.gin"],
     "which is neither a"),
])  # fmt: skip
def test_what_infer_cannot_do_is_a_sentence(tmp_path, capsys, line, flags, message):
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    flags = [flag.replace("FOLDER", str(tmp_path)) for flag in flags]
    assert main([
        "infer", "--gin_file=models/t5_1_1_embedded.gin", "--gin_file=runs/prompt_infer.gin",
        f"--gin.INPUT_FILE={tmp_path / 'rows.jsonl'}", "--gin.PROMPT_FILE=None",
        f"--gin.OUTPUT_FILE={tmp_path / 'out.jsonl'}", *flags,
    ]) == 2  # fmt: skip
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out.jsonl*"))


@pytest.mark.parametrize("files, names", [
    (["runs/a/best.npy", "runs/b/best.npy"], ["a", "b"]),
    (["x/a.npy", "y/z/b.npy"], ["x/a.npy", "y/z/b.npy"]),
    (["p", "p/q"], ["p", "p/q"]),
    (["p", "p"], ["p", "p"]),
])  # fmt: skip
def test_prompts_are_named_by_what_tells_their_paths_apart(files, names):
    assert banks.told_apart(files) == names
