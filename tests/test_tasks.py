"""Tasks: T5's texts, label handling, metrics by hand, pre-training objectives, users' own files."""

import gzip
import json
import os
import pathlib

import numpy as np
import pytest

from softprompt import data, eval_task, settings
from softprompt.tasks import metrics, postprocessors, preprocessors, records, super_glue, user
from softprompt.tasks.records import Row
from softprompt.vocabulary import read_documents


def only(examples):
    [example] = examples
    return example


def test_classification_reads_as_t5_prints_it():
    row = Row({"premise": "It rains.", "hypothesis": "It is wet.", "label": 1, "idx": 3})
    example = only(
        preprocessors.fields(row, "rte", ("hypothesis", "premise"), super_glue.ENTAILMENT)
    )
    assert example["inputs"] == "rte hypothesis: It is wet. premise: It rains."
    assert example["targets"] == "not_entailment"


def test_the_task_name_can_be_dropped():
    row = Row({"sentence": "a film", "label": 0})
    text = lambda r: preprocessors.fields(r, "sst2", ("sentence",), ["negative", "positive"])  # noqa: E731
    assert only(preprocessors.drop_name(text)(row))["inputs"] == "sentence: a film"


def test_wsc_marks_the_pronoun_and_trains_on_true_referents():
    row = {
        "text": "Ann told Eve that she had won.",
        "span1_text": "Ann",
        "span2_text": "she",
        "span2_index": 4,
        "label": 0,
        "idx": 0,
    }
    example = only(preprocessors.wsc(Row(row)))
    assert example["inputs"] == "wsc: Ann told Eve that *she* had won."
    assert example["targets"] == "Ann"
    assert list(preprocessors.wsc(Row(row), only_correct=True)) == []


def test_record_has_an_example_per_answer():
    row = Row(
        {
            "passage": "One.\n@highlight\nTwo",
            "query": "@placeholder won",
            "entities": ["A", "B"],
            "answers": ["A", "B"],
            "idx": {"passage": 1, "query": 2},
        }
    )
    first, second = preprocessors.record(row)
    assert first["inputs"] == "record query: @placeholder won entities: A, B passage: One. Two"
    assert [first["targets"], second["targets"]] == ["A", "B"]


def test_an_illegal_output_is_counted_and_wrong():
    assert postprocessors.label_to_id("maybe", ["no", "yes"]) == -1
    assert metrics.illegal([0, 1, 1], [0, -1, 1]) == {"illegal": 1.0}
    assert metrics.accuracy([0, 1, 1, 0], [0, -1, 1, 1]) == {"accuracy": 50.0}


def test_f1_exact_match_and_squad_by_hand():
    # tp 1, fp 1, fn 1; the illegal output counts as the wrong class.
    assert metrics.f1([1, 1, 0, 0], [1, -1, 1, 0])["f1"] == pytest.approx(50.0)
    targets = [{"value": v, "group": g} for v, g in ((1, 0), (0, 0), (1, 1))]
    predictions = [{"value": v} for v in (1, 1, 1)]
    assert metrics.multirc_exact_match(targets, predictions) == {"exact_match": 50.0}
    scores = metrics.squad([["the red cat"], ["a dog", "dog house"]], ["red cat!", "house"])
    assert scores["em"] == 50.0 and scores["f1"] == pytest.approx(100 * (1 + 2 / 3) / 2)


def test_rows_come_from_jsonl_csv_and_gzip(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"x, y",1\n')
    (tmp_path / "a.tsv").write_text("text\tlabel\nx y\t0\n")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"text": "z", "label": "b"}\n\n')
    pairs = [
        records.read_pairs(tmp_path / name, "t: {text}", "label", ["a", "b"])
        for name in ("a.csv", "a.tsv", "a.jsonl.gz")
    ]
    assert pairs == [[("t: x, y", "b")], [("t: x y", "a")], [("t: z", "b")]]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is empty"),
        ('{"text": "a", "label": 0}\n{"text": ', r"rows.jsonl:2: malformed JSON"),
        (f'{{"text": {5000 * "1"}}}', r"rows.jsonl:1: malformed JSON: Exceeds the limit"),
        ('["a"]', r"rows.jsonl:1: expected a JSON object"),
        ('{"text": "a", "label": "c"}', r"rows.jsonl:1: the label 'c' is not one of a, b"),
        ('{"text": "a", "label": 2}', r"rows.jsonl:1: the label is 2, expected 0 to 1"),
        ('{"text": "a", "label": "²"}', r"rows.jsonl:1: the label '²' is not one of a, b"),
        ('{"text": "a", "label": NaN}', r"rows.jsonl:1: the label is nan, expected 0 to 1"),
        ('{"text": "a", "label": Infinity}', r"rows.jsonl:1: the label is inf, expected 0 to 1"),
        ('{"body": "a", "label": 0}', r"rows.jsonl:1: no field 'text'; the fields are body, label"),
        ('{"text": null, "label": 0}', r"rows.jsonl:1: 'text' is None, expected a text"),
        ('{"text": ["a"], "label": 0}', r"rows.jsonl:1: 'text' is \['a'\], expected a text"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        records.read_pairs(path, "{text}", "label", ["a", "b"])


def test_text_may_be_a_number_but_no_list_and_a_column_has_one_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": 3, "label": true}\n{"text": "a", "label": {}}\n')
    rows = list(records.read(path))
    assert records.to_pair(rows[0], "{text}", "label", None) == ("3", "True")
    with pytest.raises(ValueError, match=r"rows.jsonl:2: 'label' is \{\}, expected a text"):
        records.to_pair(rows[1], "{text}", "label", None)
    path = tmp_path / "rows.csv"
    path.write_text("text,label,text\na,0,b\n")
    with pytest.raises(ValueError, match="rows.csv:1: the header has text twice"):
        list(records.read(path))
    path.write_text("\ntext,label\na,0\n")
    with pytest.raises(ValueError, match="rows.csv:1: expected the names of the columns, got a bl"):
        list(records.read(path))


@pytest.mark.parametrize(
    "labels, values, expected",
    [
        (["1", "2", "3"], ["1", 1, 3.0, 0, "0"], ["1", "1", "3", None, None]),
        (["-1", "1"], [-1, 1, "-1", 0], ["-1", "1", "-1", None]),
        (["1", "0"], [0, 1, True, "1"], ["0", "1", "1", "1"]),
        (["true", "false"], [True, False, "true", 0], ["true", "false", "true", "true"]),
        (["False", "True"], [True, 1, "0", -1], ["True", "True", "False", "<unk>"]),
        (["no", "yes"], [True, 1.0, "1", "yes"], ["yes"] * 4),
    ],
)
def test_a_number_is_an_index_unless_labels_are_numbers_themselves(labels, values, expected):
    for value, name in zip(values, expected, strict=True):
        row = Row({"label": value})
        if name is None:
            with pytest.raises(ValueError, match=f"the label {value!r} is not one of {labels[0]}"):
                row.label("label", labels)
        else:
            assert row.label("label", labels) == name


def test_a_table_may_hold_long_texts(tmp_path):
    (tmp_path / "a.csv").write_text(f"text,label\r\n\r\n{'word ' * 40_000},a\r\n")
    [(text, label)] = records.read_pairs(tmp_path / "a.csv", "{text}", "label", ["a"])
    assert len(text) == 200_000 and label == "a"


def test_a_quotation_mark_swallows_no_rows_of_a_tsv(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"so ""good""\nit is"\ta\n')
    assert records.read_pairs(path, "{text}", "label", None) == [('so "good"\nit is', "a")]
    path.write_text('text\tlabel\n"It is\ta\nso good"\tb\n')
    with pytest.raises(ValueError, match="a.tsv:3: a text in quotation marks holds tabs and line"):
        records.read_pairs(path, "{text}", "label", None)


def test_a_benchmark_s_row_without_its_text_is_refused():
    row = Row({"premise": None, "hypothesis": "It is wet.", "label": 1}, "a.jsonl", 4)
    with pytest.raises(ValueError, match="a.jsonl:4: 'premise' is None, expected a text"):
        list(preprocessors.fields(row, "rte", ("hypothesis", "premise"), super_glue.ENTAILMENT))
    row = Row({"sentence1": "a", "sentence2": "b", "label": None}, "a.jsonl", 5)
    with pytest.raises(ValueError, match="a.jsonl:5: 'label' is None, expected a text"):
        list(preprocessors.stsb(row))
    row = Row({"id": "q", "question": "Who?", "context": "She.", "answers": "She"})
    assert only(preprocessors.squad(row))["answers"] == ["She"]


def test_files_of_ones_own_become_a_task(tmp_path, vocabulary):
    path = tmp_path / "v.jsonl"
    path.write_text("".join(json.dumps({"q": f"n {i}", "y": i % 2}) + "\n" for i in range(4)))
    user.define_task("mine", validation_file=path, template="q: {q}", target="y", labels=["e", "o"])
    [(task, rate)] = data.get_tasks("mine")
    judged = eval_task.from_task(task, "validation", {"inputs": 16, "targets": 4}, vocabulary)
    assert rate == 1.0 and judged.labels == ["e", "o"]
    assert vocabulary.decode(judged.examples.inputs[1]) == "q: n 1"
    assert judged.judge(["e", "o", "o", "?"]) == {"accuracy": 50.0, "illegal": 1.0}
    with pytest.raises(ValueError, match="task 'mine': labels is 'e,o', expected a list of texts"):
        user.define_task("mine", validation_file=path, labels="e,o")


def test_a_label_beyond_the_vocabulary_is_still_itself(tmp_path, embedded, monkeypatch):
    from softprompt import evaluation

    vocabulary = embedded.vocabulary
    labels = ["so", "not_so"]
    assert "_" not in vocabulary.decode(vocabulary.encode("not_so"))
    path = tmp_path / "v.jsonl"
    path.write_text("".join(json.dumps({"q": f"n {i}", "y": i % 2}) + "\n" for i in range(4)))
    user.define_task("beyond", validation_file=path, template="q: {q}", target="y", labels=labels)
    [(task, _)] = data.get_tasks("beyond")
    judged = eval_task.from_task(task, "validation", {"inputs": 16, "targets": 8}, vocabulary)
    assert judged.judge(["so", "not_so", "not_so", "?"]) == {"accuracy": 50.0, "illegal": 1.0}
    predictor = evaluation.Predictor(embedded, 0, evaluation.GENERATE, 4, 8)
    decoded = [vocabulary.decode(vocabulary.encode(x)) for x in ("not_so", "so", "neither", "so")]
    monkeypatch.setattr(predictor, "generate", lambda flat, examples: decoded)
    assert predictor.predict({}, judged)[0] == ["not_so", "so", "neither", "so"]


def write_cache(folder, examples):
    """A split's offline cache, in the layout that seqio's own cache job leaves."""
    import tensorflow as tf

    folder.mkdir(parents=True)
    features = {}
    with tf.io.TFRecordWriter(str(folder / "train.tfrecord-00000-of-00001")) as out:
        for example in examples:
            fields = {}
            for name, value in example.items():
                if isinstance(value, str):
                    features[name] = {"shape": [], "dtype": "string"}
                    held = tf.train.BytesList(value=[value.encode()])
                    fields[name] = tf.train.Feature(bytes_list=held)
                else:
                    features[name] = {"shape": [None], "dtype": "int32"}
                    fields[name] = tf.train.Feature(int64_list=tf.train.Int64List(value=value))
            record = tf.train.Example(features=tf.train.Features(feature=fields))
            out.write(record.SerializeToString())
    info = {"num_shards": 1, "features": features, "seqio_version": "0.0.20"}
    (folder / "info.train.json").write_text(json.dumps(info))
    (folder / "stats.train.json").write_text(json.dumps({"examples": len(examples)}))
    (folder / "COMPLETED").touch()


@pytest.fixture
def cached_task(tmp_path, monkeypatch, vocabulary):
    """A task of one row, cached as another text than its file has."""
    import seqio

    from softprompt.tasks import catalogue, registry  # noqa: F401 (registers what is defined)

    catalogue.use_vocabulary(vocabulary.path)
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"text": "from the file", "label": "no"}) + "\n")
    user.define_task("cached_task", train_file=path, validation_file=path)
    texts = {"inputs_pretokenized": "from the cache", "targets_pretokenized": "yes"}
    tokens = {k.split("_")[0]: vocabulary.encode(v) for k, v in texts.items()}
    write_cache(tmp_path / "caches" / "cached_task", [{**texts, **tokens}])
    monkeypatch.setattr(seqio.utils, "_GLOBAL_CACHE_DIRECTORIES", [str(tmp_path / "caches")])
    return seqio.get_mixture_or_task("cached_task")


def test_seqios_offline_cache_takes_the_place_of_source_and_tokenisation(
    cached_task, vocabulary, monkeypatch
):
    from softprompt.tasks import features

    def source(*_, **__):
        raise AssertionError("the source was read")

    monkeypatch.setattr(type(cached_task.source), "get_dataset", source)
    monkeypatch.setattr(features.BackboneVocabulary, "_encode_tf", source)
    lengths = {"inputs": 16, "targets": 8}
    examples = data.from_task(cached_task, "train", lengths)
    expected = data.from_pairs([("from the cache", "yes")], vocabulary, lengths)
    np.testing.assert_array_equal(examples.inputs[0], expected.inputs[0])
    np.testing.assert_array_equal(examples.targets[0], expected.targets[0])
    with pytest.raises(ValueError, match="of cached_task has no split 'validation'"):
        data.from_task(cached_task, "validation", lengths)


def cut(path):
    path.write_bytes(path.read_bytes()[:20])


def with_info(**changes):
    """Damage to a cache: other entries in its `info.train.json`; None takes one out."""

    def change(path):
        found = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))

    return change


@pytest.mark.parametrize(
    "file, damage, message",
    [
        ("info.train.json", cut, "info.train.json', of an offline cache, cannot be read"),
        ("info.train.json", with_info(num_shards=None), "num_shards is None, expected a number"),
        ("info.train.json", with_info(num_shards=2), "lacks '.*train.tfrecord-00000-of-00002'"),
        ("info.train.json", with_info(seqio_version="abc"), "seqio_version is 'abc', expected"),
        ("info.train.json", with_info(features={}), "the feature 'inputs' is None, expected 'int3"),
        ("stats.train.json", os.remove, "failed: NotFoundError: .*stats.train.json"),
        ("train.tfrecord-00000-of-00001", os.remove, "lacks '.*train.tfrecord-00000-of-00001'"),
        ("train.tfrecord-00000-of-00001", cut, "the cache .* failed: DataLossError: "),
    ],
)
def test_a_damaged_cache_is_named(cached_task, file, damage, message):
    damage(pathlib.Path(cached_task.cache_dir) / file)
    with pytest.raises(ValueError, match=message):
        data.from_task(cached_task, "train", {"inputs": 16, "targets": 8})


def test_a_cache_of_another_vocabulary_is_refused(cached_task):
    from softprompt.tasks import catalogue

    catalogue.use_vocabulary("bytes")
    try:
        with pytest.raises(ValueError, match="tokenised by another vocabulary"):
            data.from_task(cached_task, "train", {"inputs": 16, "targets": 8})
    finally:
        catalogue.use_vocabulary(None)


@pytest.fixture
def own_task(vocabulary):
    """Adds a seqio task of one row, as a module of one's own would."""
    import seqio

    from softprompt.tasks import catalogue, features

    names = []

    def add(preprocessors, row, own=features.VOCABULARY, names_of=("inputs", "targets")):
        import tensorflow as tf

        names.append(f"own_task_{len(names)}")
        feature = seqio.Feature(vocabulary=own, add_eos=True)
        columns = {name: [value] for name, value in row.items()}
        return seqio.TaskRegistry.add(
            names[-1],
            source=seqio.FunctionDataSource(
                lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(columns),
                splits=["train"],
            ),
            preprocessors=preprocessors,
            output_features={name: feature for name in names_of},
            metric_fns=[],
        )

    catalogue.use_vocabulary(vocabulary.path)
    yield add
    for name in names:
        seqio.TaskRegistry.remove(name)


def test_a_task_without_an_offline_cache_is_read_from_its_source_and_told(
    own_task, monkeypatch, tmp_path, capsys
):
    import seqio

    monkeypatch.setattr(seqio.utils, "_GLOBAL_CACHE_DIRECTORIES", [str(tmp_path)])
    steps, row = [seqio.preprocessors.tokenize], {"inputs": "a", "targets": "b"}
    cases = {"none has it": [seqio.CacheDatasetPlaceholder()], "has no seqio.CacheDatasetPl": []}
    for why, more in cases.items():
        task = own_task([*steps, *more], row)
        assert len(data.from_task(task, "train", {"inputs": 4, "targets": 8})) == 1
        said = capsys.readouterr().out
        assert f"{task.name}: train is read from its source, not from {tmp_path}: " in said
        assert why in said


def test_preprocessors_of_ones_own_are_given_the_lengths(own_task, vocabulary):
    import seqio

    text = "the first words and then the last ones"
    steps = [
        seqio.preprocessors.tokenize,
        seqio.preprocessors.truncate_inputs_left,
        seqio.preprocessors.append_eos_after_trim,
    ]
    task = own_task(steps, {"inputs": text, "targets": "so"})
    examples = data.from_task(task, "train", {"inputs": 4, "targets": 8})
    assert examples.inputs[0].tolist() == [*vocabulary.encode(text)[-4:][:3], 1]
    with data.keeping_records():
        found = [data.from_task(task, "train", {"inputs": n, "targets": 8}) for n in (4, 6, 4)]
    assert [len(x.inputs[0]) for x in found] == [4, 6, 4]
    # What no preprocessor cuts is cut, and counted, here.
    whole = own_task(steps[:1], {"inputs": text, "targets": "so"})
    assert data.from_task(whole, "train", {"inputs": 4, "targets": 8}).cut["inputs"] == 1


def test_a_task_that_tokenises_otherwise_than_the_backbone_is_refused(own_task, vocabulary):
    import seqio

    lengths = {"inputs": 16, "targets": 8}
    texts = {"inputs": "a fine film", "targets": "so"}
    other = own_task([seqio.preprocessors.tokenize], texts, seqio.ByteVocabulary())
    for read in (data.from_task, lambda *given: data.first_examples(*given, 1)):
        with pytest.raises(ValueError, match="the inputs of task own_task_0 are tokenised by anot"):
            read(other, "train", lengths)
    with pytest.raises(ValueError, match="the inputs of task own_task_0 are tokenised by anot"):
        data.stream_batches("own_task_0", "train", lengths, 1, 0)
    same = seqio.SentencePieceVocabulary(vocabulary.path, extra_ids=100)
    found = data.from_task(own_task([seqio.preprocessors.tokenize], texts, same), "train", lengths)
    assert found.inputs[0].tolist() == [*vocabulary.encode("a fine film"), 1]
    ids = seqio.PassThroughVocabulary(vocabulary.size)
    brought = {"inputs": [5, vocabulary.size - 1], "targets": [7]}
    found = data.from_task(own_task([], brought, ids), "train", lengths)
    assert found.inputs[0].tolist() == [5, vocabulary.size - 1, 1]
    brought["inputs"][1] = vocabulary.size
    with pytest.raises(ValueError, match=f"hold the id {vocabulary.size}, expected less than"):
        data.from_task(own_task([], brought, ids), "train", lengths)
    with pytest.raises(ValueError, match="has the features 'inputs', expected a feature 'targets'"):
        data.from_task(own_task([], {"inputs": [5]}, ids, ["inputs"]), "train", lengths)


def test_a_task_of_targets_alone_is_streamed(own_task):
    import seqio

    texts = {"targets": "so"}
    own_task([seqio.preprocessors.tokenize], texts, names_of=["targets"])
    batches = data.stream_batches("own_task_0", "train", {"inputs": 4, "targets": 4}, 2, 0)
    assert next(batches(0))["encoder_ids"].tolist() == [[1, 0, 0, 0]] * 2


def test_an_unknown_task_suggests_near_ones():
    from softprompt.tasks import registry  # noqa: F401

    with pytest.raises(ValueError, match="did you mean .*super_glue_rte"):
        data.get_tasks("superglue_rte")


@pytest.mark.parametrize("name", records.EMBEDDED)
def test_embedded_data_is_balanced_large_enough_and_disjoint(name):
    folder = records.EMBEDDED_FOLDER / name
    rows = {
        split: list(records.read(folder / f"{split}.jsonl")) for split in ("train", "validation")
    }
    assert len(rows["train"]) >= 300 and len(rows["validation"]) >= 150
    for split in rows.values():
        assert len(set(np.bincount([r["label"] for r in split]))) == 1
    texts = {split: {r.get("premise", r.get("text")) for r in rows[split]} for split in rows}
    assert not texts["train"] & texts["validation"]


def test_span_corruption_hides_what_its_target_says():
    from softprompt.tasks import pretraining

    tokens = np.arange(10, 110, dtype=np.int32)
    seed = np.array([1, 2], np.int32)
    made = pretraining.corrupt_spans(tokens_of(tokens), seed, 0.15, 3.0, 8099)
    inputs, targets = made["inputs"].numpy().tolist(), made["targets"].numpy().tolist()
    assert len(inputs) == 85 + 5 and len(targets) == 15 + 5
    sentinels = [i for i in inputs if i > 8000]
    assert sentinels == [8099 - i for i in range(5)] == [t for t in targets if t > 8000]
    # Putting each span back where its sentinel stands gives the text.
    spans, current = {}, None
    for t in targets:
        if t > 8000:
            current = spans.setdefault(t, [])
        else:
            current.append(t)
    restored = [x for i in inputs for x in (spans[i] if i > 8000 else [i])]
    assert restored == tokens.tolist()


def tokens_of(values):
    import tensorflow as tf

    return tf.constant(values)


def test_pretraining_reads_a_corpus(corpus):
    import itertools

    from softprompt.tasks import pretraining

    pretraining.use_corpus(corpus)
    try:
        lengths = {"inputs": 64, "targets": 64}
        for name in ("pretrain_span_corruption", "pretrain_prefix_lm"):
            batches = data.stream_batches(name, "validation", lengths, 2, 0)
            first, second = itertools.islice(batches(0), 2)
            [again] = itertools.islice(batches(1), 1)
            np.testing.assert_array_equal(second["encoder_ids"], again["encoder_ids"])
            assert first["targets"].shape == (2, 64)
    finally:
        pretraining.use_corpus(None)


def test_bytes_are_hidden_behind_byt5_s_sentinels():
    import tensorflow as tf

    from softprompt.tasks import catalogue, features, pretraining

    spec = {"targets": tf.TensorSpec([None], tf.int32)}
    texts = tf.data.Dataset.from_generator(
        lambda: iter([{"targets": np.full(80, 100, np.int32)}]), output_signature=spec
    )
    catalogue.use_vocabulary("bytes")
    try:
        made = pretraining.span_corruption(texts, {"inputs": 32, "targets": 32}, features.FEATURES)
        example = next(made.as_numpy_iterator())
    finally:
        catalogue.use_vocabulary(None)
    assert example["targets"][0] == 258 == example["inputs"].max()


def test_a_text_with_a_byte_order_mark_and_blank_lines_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}\n')
    assert list(read_documents(path)) == ["a", "b"]


@pytest.mark.parametrize("value", ["null", "3", '["a"]', r'"\ud800"'])
def test_a_document_that_is_no_text_is_named(tmp_path, value):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a"}}\n{{"text": {value}}}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: expected a JSON object with a text"):
        list(read_documents(path))


def test_texts_that_cannot_be_read_are_named(tmp_path, rng):
    import gzip
    import lzma

    import zstandard

    words = rng.integers(0, 9000, 9000).tolist()
    whole = "".join(json.dumps({"text": str(w)}) + "\n" for w in words).encode()
    broken = {"latin.jsonl": b'{"text": "caf\xe9"}\n', "folder.jsonl": None}
    for ending, module in ((".gz", gzip), (".xz", lzma), (".zst", zstandard)):
        broken[f"torn.jsonl{ending}"] = module.compress(whole)[:-9]
        broken[f"plain.jsonl{ending}"] = whole
        two = tmp_path / f"two.jsonl{ending}"
        two.write_bytes(2 * module.compress(whole))
        assert list(read_documents(two)) == 2 * list(map(str, words))
    for name, content in broken.items():
        path = tmp_path / name
        path.mkdir() if content is None else path.write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read the text .*{name}': .") as caught:
            list(read_documents(path))
        assert len(str(caught.value).splitlines()) == 1


def test_text_shards_are_read_through_every_compression(tmp_path):
    import gzip
    import lzma

    import zstandard

    from softprompt.tasks import pretraining

    for ending, opener in {
        "": open,
        ".gz": gzip.open,
        ".xz": lzma.open,
        ".zst": zstandard.open,
    }.items():
        with opener(tmp_path / f"train-{ending[1:]}.jsonl{ending}", "wt", encoding="utf-8") as file:
            file.write(json.dumps({"text": f"a café {ending}"}) + "\n")
    pretraining.use_corpus(tmp_path)
    try:
        read = {x["text"].decode() for x in pretraining._documents("train").as_numpy_iterator()}
        assert read == {"a café ", "a café .gz", "a café .xz", "a café .zst"}
        with pytest.raises(ValueError, match="no shards validation"):
            pretraining._documents("validation")
    finally:
        pretraining.use_corpus(None)


def test_pretraining_reads_a_tfds_corpus(tmp_path):
    import seqio
    import tensorflow_datasets as tfds

    from softprompt.tasks import pretraining

    class TinyText(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path

        def _info(self):
            features = {"text": tfds.features.Text(), "url": tfds.features.Text()}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(3):
                yield i, {"text": f"text {i}", "url": "none"}

    TinyText(data_dir=tmp_path).download_and_prepare()
    seqio.set_tfds_data_dir_override(str(tmp_path))
    pretraining.use_corpus("tfds:tiny_text:1.0.0")
    try:
        texts = sorted(x["text"] for x in pretraining._documents("train").as_numpy_iterator())
        assert texts == [b"text 0", b"text 1", b"text 2"]
    finally:
        pretraining.use_corpus(None)
        seqio.set_tfds_data_dir_override(None)


def test_local_data_serves_the_benchmark_tasks(task_data, monkeypatch, vocabulary):
    from softprompt.tasks import registry  # noqa: F401

    monkeypatch.setenv("SOFTPROMPT_DATA_DIR", str(task_data))
    lengths = {"inputs": 128, "targets": 16}
    for name, split, count in (
        ("super_glue_rte", "validation", 277),
        ("super_glue_cb", "train", 250),
        ("super_glue_wsc", "train", 259),
        ("glue_sst2", "validation", 872),
    ):
        [(task, _)] = data.get_tasks(name)
        assert len(data.from_task(task, split, lengths)) == count


def test_a_local_row_of_another_kind_is_named(tmp_path, monkeypatch):
    from softprompt.tasks import registry  # noqa: F401

    row = {"paragraph": "p", "question": "q", "answer": "a", "label": 1, "idx": 3}
    (tmp_path / "super_glue" / "multirc").mkdir(parents=True)
    (tmp_path / "super_glue" / "multirc" / "train.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("SOFTPROMPT_DATA_DIR", str(tmp_path))
    [(task, _)] = data.get_tasks("super_glue_multirc")
    with pytest.raises(ValueError, match="train.jsonl:1: this is no row of super_glue_multirc"):
        data.from_task(task, "train", {"inputs": 16, "targets": 4})
    (tmp_path / "glue" / "sst2").mkdir(parents=True)
    (tmp_path / "glue" / "sst2" / "train.jsonl").write_text(
        '{"sentence": "a", "label": 1, "idx": "x"}\n'
    )
    [(task, _)] = data.get_tasks("glue_sst2")
    message = "the field 'idx' holds str, expected a whole number in every row"
    with pytest.raises(ValueError, match=message):
        data.from_task(task, "train", {"inputs": 16, "targets": 4})


def test_every_mrqa_set_reads_the_same_from_tfds_and_from_a_folder(tmp_path, monkeypatch):
    from softprompt.tasks import registry, sources  # noqa: F401

    ours = {"id": "q1", "context": "It is (blue).", "question": "What colour?",
            "answers": {"text": ["blue", "(blue)"], "answer_start": [7, 6]}}  # fmt: skip
    theirs = {"qid": "q1", "context": ours["context"], "question": ours["question"],
              "answers": ["blue", "(blue)"], "subset": "BioASQ"}  # fmt: skip
    asked = []

    def tfds_rows(name, split, task):
        asked.append((name, split))
        return iter([Row(theirs)])

    monkeypatch.setattr(sources, "tfds_rows", tfds_rows)
    monkeypatch.delenv("SOFTPROMPT_DATA_DIR", raising=False)
    lengths = {"inputs": 64, "targets": 16}
    tasks = [task for task, _ in data.get_tasks("mrqa_paper")]
    found = {task.name: data.from_task(task, "validation", lengths) for task in tasks}
    assert ("mrqa/bio_asq:1.0.0", "test") in asked and len(asked) == 6
    (tmp_path / "mrqa" / "bioasq").mkdir(parents=True)
    (tmp_path / "mrqa" / "bioasq" / "validation.jsonl").write_text(json.dumps(ours) + "\n")
    monkeypatch.setenv("SOFTPROMPT_DATA_DIR", str(tmp_path))
    [(task, _)] = data.get_tasks("mrqa_bioasq")
    local = data.from_task(task, "validation", lengths)
    np.testing.assert_array_equal(local.inputs[0], found["mrqa_bioasq"].inputs[0])
    for records_ in (local.records, found["mrqa_bioasq"].records):
        assert eval_task.plain(records_[0]["answers"]) == ["blue", " ( blue ) "]
        assert eval_task.plain(records_[0]["id"]) == "q1"
    monkeypatch.delenv("SOFTPROMPT_DATA_DIR")
    [(local_alone, _)] = data.get_tasks("mrqa_subjqa_books")
    with pytest.raises(ValueError, match="name a folder that has mrqa/subjqa_books/validation"):
        data.from_task(local_alone, "validation", lengths)


def test_the_local_transfer_sets_are_all_there(task_data, monkeypatch, vocabulary):
    from softprompt.tasks import registry  # noqa: F401

    monkeypatch.setenv("SOFTPROMPT_DATA_DIR", str(task_data))
    tasks = {t.name: t for name in ("mrqa_out_of_domain", "glue_paraphrase")
             for t, _ in data.get_tasks(name)}  # fmt: skip
    sets = sorted(p.name for p in (task_data / "mrqa").iterdir())
    assert sorted(n for n in tasks if n.startswith("mrqa")) == [f"mrqa_{name}" for name in sets]
    for name, count in (("mrqa_bioasq", 499), ("mrqa_subjqa_books", 155), ("glue_mrpc", 408)):
        assert len(data.from_task(tasks[name], "validation", {"inputs": 64, "targets": 8})) == count


@pytest.mark.parametrize(
    "columns",
    (
        {"n": np.arange(5), "s": ["a", "", "c", "d", "e"], "fixed": np.ones((5, 2), np.float32)},
        {"matrix": np.arange(20).reshape(5, 2, 2)},
    ),
)
def test_rows_read_in_batches_are_those_read_one_by_one(columns):
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(columns)
    if "s" in columns:  # Vectors of 0, 1, … entries, and words.
        dataset = dataset.map(
            lambda x: x | {"ids": tf.range(x["n"]), "words": tf.strings.bytes_split(x["s"])}
        )
    expected = list(dataset.as_numpy_iterator())
    found = list(data._rows(dataset, 2))
    assert len(found) == len(expected) == 5
    for row, other in zip(found, expected, strict=True):
        assert list(row) == list(other)
        for name, value in row.items():
            assert type(value) is type(other[name])
            assert getattr(value, "dtype", None) == getattr(other[name], "dtype", None)
            np.testing.assert_array_equal(value, other[name])


def test_a_template_and_labels_are_for_files_of_ones_own():
    of_user = settings.UserData(template="a {text}", labels=["a", "b"])
    message = "TEXT_TEMPLATE, LABELS: these say how to read files of your own, and none is given"
    with pytest.raises(ValueError, match=message):
        settings.load_tasks("embedded_sentiment", "softprompt.tasks.registry", of_user)
    found = settings.load_tasks("embedded_sentiment", None, settings.UserData())
    assert [task.name for task, _ in found] == ["embedded_sentiment"]
