"""Reports: all there, nothing from outside, every text shown as text, and never in a run's way."""

import html.parser
import json
import re
import shlex

import numpy as np
import pytest

from softprompt import checkpoint, page, planning, prompt, report, report_many, runs, sweep
from softprompt.__main__ import main

ATTACK = "<script>alert(1)</script>"
VOID = {"meta", "link", "br", "wbr", "img"}


class Document(html.parser.HTMLParser):
    """Elements, attributes and texts of a page; raises where elements are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path):
    """The folder of a run of ten steps whose best one is 5, with hostile texts in it."""
    folder = tmp_path / "run"
    write_lines(folder / "train.jsonl", [
        {"step": s, "loss": 2.0 - s / 10, "tokens_per_second": 100.0 + s, "mfu": 0.25}
        for s in (5, 10)
    ])  # fmt: skip
    write_lines(folder / "eval" / "metrics.jsonl", [
        {"step": 5, "accuracy": 50.0, "illegal": 1.0},
        {"step": 10, "accuracy": 25.0, "illegal": 1.0},
    ])  # fmt: skip
    rows = [
        ("fine", "good", "good", 0.0), ("sure", "bad", "good", -9.0), ("unsure", "bad", "good", -1),
        (f"x {ATTACK}", "bad", ATTACK, -2.0),
    ]  # fmt: skip
    write_lines(folder / "eval" / "predictions" / "mine-5.jsonl", [
        {"input": i, "target": t, "prediction": p, "scores": {"good": 0.0, "bad": s}}
        for i, t, p, s in rows
    ])  # fmt: skip
    write_lines(folder / "eval" / "predictions" / "mine-10.jsonl", [
        {"input": "of the last step", "target": "good", "prediction": "bad"}
    ])  # fmt: skip
    facts = {
        "task": "mine", "backbone": "tiny", "prompt_length": 2, "seed": 3, "loss": "labels",
        "labels": {"mine": ["good", "bad"]}, "versions": {"jax": "0.0"},
        "command": ["/bin/softprompt", "train", "--gin.TEXT_TEMPLATE=it's {text}"],
        "directory": "/a b", "variables": {"XLA_FLAGS": "--a --b"},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "config.gin").write_text(f"TITLE = '{ATTACK}'\n")
    about = {"step": 5, "class_labels": ["good", "bad"], "initialisation": "class_labels"}
    array = np.random.default_rng(0).normal(size=(2, 256)).astype(np.float32)
    prompt.save(folder / "prompts" / "initial.safetensors", array + 1, {**about, "step": 0})
    prompt.save(folder / "prompts" / "best.safetensors", array, about)
    return folder


def read(path):
    text = path.read_text(encoding="utf-8")
    return text, Document(text)


def test_the_page_of_a_run_says_what_matters(run):
    text, found = read(report.write(run))
    said = found.text
    for part in (
        "mine tiny · prompt of 2 vectors · seed 3",
        "accuracy 50 at step 5",
        "trained parameters 512",
        "4 examples, step 5: 1 equal the target text, 3 differ from it.",
        "Illegal outputs (none of the labels): 1, 1 different",
        "Drift from the initial prompt",
        "nats per example",
        "jax",
    ):
        assert part in said, part
    assert "of the last step" not in said, "predictions are those of the best step"
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    headings = [tag for tag, _ in found.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == "h1" and headings.count("h1") == 1
    links = {a["href"][1:] for tag, a in found.elements if tag == "a"}
    assert links == {a["id"] for tag, a in found.elements if tag == "section"}
    assert '<meta name="viewport" content="width=device-width' in text
    assert "prefers-color-scheme:dark" in text and found.elements[0][1]["lang"] == "en"


def test_wrong_predictions_come_first_and_the_surest_of_them_before_the_others(run):
    said = read(report.write(run))[1].text
    places = [said.index(f" {word} ") for word in ("sure", "unsure", "fine")]
    assert places == sorted(places)
    row = said[places[0] :].split()[:5]
    assert row == ["sure", "bad", "good", "100%", "0%"]


def test_the_confusion_matrix_counts_what_is_there(run):
    text = read(report.write(run))[0]
    matrix = re.search('<table class="matrix">.*?</table>', text, re.S)[0]
    assert re.findall(r">(\d+)</td>", matrix) == ["1", "0", "0", "2", "0", "1"]
    assert "illegal</th>" in matrix


def test_hostile_texts_are_shown_as_texts(run):
    (run / "eval/predictions/mine-5.jsonl").rename(
        run / "eval/predictions/a<img src=x onerror=alert(1)>-5.jsonl"
    )
    text, found = read(report.write(run))
    assert ATTACK in found.text and "onerror=alert(1)>" in found.text
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "img", "iframe", "object", "form"}
    assert not [a for _, attrs in found.elements for a in attrs if a.startswith("on")]


def test_attributes_are_escaped_too():
    made = page.tag("svg", aria_label='"><script>', data_x="a & b")
    assert made == '<svg aria-label="&quot;&gt;&lt;script&gt;" data-x="a &amp; b"></svg>'


def test_nothing_comes_from_outside(run):
    text, found = read(report.write(run))
    assert "default-src 'none'" in text
    for tag, attrs in found.elements:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attrs.get(name, "#").startswith(("#", "data:")), (tag, attrs)
    assert "url(" not in text and "@import" not in text


def test_the_reproduce_line_is_the_command(run):
    line = runs.command_line(json.loads((run / "run.json").read_text()), run)
    assert shlex.split(line.replace("\\\n", "")) == [
        "cd", "/a b", "XLA_FLAGS=--a --b", "softprompt", "train",
        "--gin.TEXT_TEMPLATE=it's {text}",
    ]  # fmt: skip
    facts = {"command": ["softprompt", "sweep", "--gin_file=s.gin", "--data_dir=d"]}
    assert shlex.split(runs.command_line(facts, "/f").replace("\\\n", "")) == [
        "softprompt", "train", "--gin_file=/f/config.gin", "--data_dir=d",
    ]  # fmt: skip
    apart = {"command": ["softprompt", "sweep", "--data_dir", "d", "--gin.SEED", "3"]}
    assert shlex.split(runs.command_line(apart, "/f").replace("\\\n", ""))[-1] == "--data_dir=d"
    for command, own, binary in (
        ("population", {}, "train"),
        ("reproduce", {"method": "probe", "split": "validation"}, "baseline"),
        ("transfer", {"split": "validation"}, "eval"),
    ):
        one = {"command": ["softprompt", command, "--gin_file=p.gin"], **own}
        words = shlex.split(runs.command_line(one, "/f").replace("\\\n", ""))
        assert words == ["softprompt", binary, "--gin_file=/f/config.gin"]
    assert runs.command_line(facts) == "softprompt sweep \\\n  --gin_file=s.gin \\\n  --data_dir=d"
    assert runs.command_line({}) is None


def test_neighbours_are_kept_with_the_prompt_they_are_of(run, embedded):
    report.attempt(run, embedded)
    said = read(run / "report.html")[1].text
    assert "nearest tokens by cosine" in said and "persists" not in said.split("Reproduce")[1]
    again = read(report.write(run))[1].text
    assert "nearest tokens by cosine" in again, "found before, for the same prompt"
    array = np.ones((2, 256), np.float32)
    prompt.save(run / "prompts" / "best.safetensors", array, {"step": 5})
    assert "need the backbone" in read(report.write(run))[1].text


def test_a_report_is_made_of_what_is_there(tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"step": 1, "loss": 0.5}])
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    said = read(report.write(tmp_path))[1].text
    assert "training loss 0.5 at step 1" in said and "This run left no command" in said
    with pytest.raises(
        ValueError, match="is no folder of a run, sweep, population or transfer: it holds none"
    ):
        report.write(tmp_path / "nothing")


def test_lines_end_where_json_lines_do(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"input": "a\u2028b\u0085c"}, {"input": "d"}]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    assert runs.json_lines(path) == rows
    path.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(ValueError, match="rows.jsonl', line 2: no JSON"):
        runs.json_lines(path)
    write_lines(tmp_path / "train.jsonl", [{"text": "a data set"}])
    with pytest.raises(ValueError, match="is no folder of a run, sweep"):
        report.write(tmp_path)


def test_an_evaluations_report_has_its_figures_and_predictions(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"task": "t-3", "method": "probe"}))
    (tmp_path / "t-3.json").write_text(json.dumps({"accuracy": 62.5}))
    row = {"input": "i", "target": "a", "prediction": "b"}
    write_lines(tmp_path / "predictions" / "t-3.jsonl", [row])
    said = read(report.write(tmp_path))[1].text
    assert "method probe" in said and "accuracy 62.5" in said and "1 differ from it" in said
    write_lines(tmp_path / "predictions" / "t-3.jsonl", [row, {"text": "another program's"}])
    with pytest.raises(ValueError, match="predictions of t-3 in .*, line 2: expected an object"):
        report.write(tmp_path)


def test_an_evaluation_beside_an_ensembles_has_its_own_figures(tmp_path):
    for task, facts in (("many", {"ensemble": {"accuracy": 55.0}}), ("one", {"accuracy": 52.5})):
        (tmp_path / f"{task}.json").write_text(json.dumps(facts))
        write_lines(tmp_path / "predictions" / f"{task}.jsonl", [{"prediction": "a"}])
    (tmp_path / "run.json").write_text(json.dumps({"task": "one", "split": "validation"}))
    found = runs.read(tmp_path)
    assert list(found.evaluations) == [{"accuracy": 52.5}] and not found.ensembles


def test_the_command_writes_a_report_again(run, capsys, monkeypatch):
    assert main(["report", str(run)]) == 0
    assert f"{run}/report.html written" in capsys.readouterr().out
    monkeypatch.chdir(run)
    assert main(["report", "."]) == 0
    assert f"{run}/report.html written" in capsys.readouterr().out
    assert main(["report", str(run / "eval" / "nothing")]) == 2
    assert "is no folder of a run, sweep" in capsys.readouterr().err


# --- runs end with one, whatever happens to it --------------------------------------------------


def test_a_run_ends_with_its_report_and_outlives_its_failure(tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    write_lines(rows, [{"text": w, "label": i % 2} for i, w in enumerate("a b c d".split())])
    folder = tmp_path / "run"
    flags = [
        "train", "--gin_file=models/t5_1_1_embedded.gin", "--gin_file=runs/prompt_classify.gin",
        "--gin_file=prompts/from_class_labels.gin", f"--train_file={rows}",
        f"--validation_file={rows}", "--labels=good,bad", f"--gin.MODEL_DIR={folder}",
        "--gin.PROMPT_LENGTH=3", "--gin.TRAIN_STEPS=2", "--gin.BATCH_SIZE=4",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 8}",
    ]  # fmt: skip
    assert main(flags) == 0
    assert f"report: {folder}/report.html" in capsys.readouterr().out
    said = read(folder / "report.html")[1].text
    for part in (
        "user_task",
        "good",
        "persists (position 0, rank",
        "Confusion matrix",
        "LEARNING_RATE",
    ):
        assert part in said, part
    drift = np.array(
        [p["drift"]["l2"] for p in json.loads(
            (folder / "analysis.json").read_text())["prompts"][0]["positions"]]
    )  # fmt: skip
    assert (drift > 0).all()

    (folder / "report.html").unlink()
    monkeypatch.setattr(report, "write", lambda *_: 1 / 0)
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert f"{folder}/report.html could not be written: division by zero" in said
    assert "report: " not in said and not (folder / "report.html").exists()


# --- sweeps -------------------------------------------------------------------------------------


@pytest.fixture
def swept(tmp_path):
    """A sweep of two points, two tasks and two seeds, one of its runs with a report."""
    spec = sweep.Spec(
        tmp_path, "Length & <score>", "length", {"1": [], "20 %": []}, {"": []},
        {"t": [], "u": []}, [0, 1],
    )  # fmt: skip
    done = [
        planning.Outcome(r, 10.0 * i, {"accuracy": 10.0 * i}, 1.5)
        for i, r in enumerate(sweep.runs(spec))
    ]
    done[-1] = planning.Outcome(done[-1].run, float("nan"), {}, 2.0)
    made = done[1].run.folder
    made.mkdir(parents=True)
    (made / "report.html").write_text("")
    return spec, done


def test_the_page_of_a_sweep_has_its_table_its_plot_and_its_runs(swept, capsys):
    spec, done = swept
    sweep.write(spec, done)
    assert capsys.readouterr().out == "", "no failure was reported"
    text, found = read(spec.folder / "report.html")
    said = found.text
    assert "Length & <score>" in said and "8 of 8 runs; points: 2, seeds: 2" in said
    assert "20.0 ± 28.3" in said and "±" in said and "diverged" in said
    links = [a["href"] for tag, a in found.elements if tag == "a" and a["href"][0] != "#"]
    assert links[0] == "runs/20_/t/0/report.html" and len(links) == 5
    assert all((spec.folder / link).is_file() for link in links)
    assert text.count("<svg") == 1 and not re.search(r"\bnan\b", text)
    assert not re.search("<score>", text)


def test_the_page_of_a_sweep_has_the_curves_and_the_configuration_of_its_runs(swept):
    spec, done = swept
    # The two seeds of one point and task.
    for outcome, losses in ((done[0], (4.0, 2.0)), (done[4], (5.0, 4.0))):
        outcome.run.folder.mkdir(parents=True, exist_ok=True)
        rows = [{"step": i, "loss": x} for i, x in enumerate(losses)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (outcome.run.folder / "train.jsonl").write_text(text)
        (outcome.run.folder / "config.gin").write_text("SEED = <1>")
    sweep.write(spec, done)
    _, found = read(spec.folder / "report.html")
    assert "Learning curves" in found.text and "SEED = <1>" in found.text
    labels = {a["aria-label"] for tag, a in found.elements if tag == "svg"}
    assert "Training loss: t. 1: 4.5 at the start, 3 at the end." in labels


def test_a_torn_table_is_refused_by_its_line(swept):
    spec, done = swept
    sweep.write(spec, done)
    path = spec.folder / "results.csv"
    path.write_text(path.read_text().rsplit(",", 1)[0])
    with pytest.raises(checkpoint.CorruptFile, match=r"results.csv', line 9: expected the header"):
        report.write(spec.folder)


@pytest.mark.parametrize(
    "name, cut, message",
    [
        ("results.csv", 0, "results.csv', line 1: the columns are none, expected line, point"),
        ("summary.csv", 0, "summary.csv', line 1: the columns are none, expected line, point"),
        ("results.csv", 1, "results.csv' holds no runs"),
        ("results.csv", -1, r"results.csv', line 9: seconds is '': could not convert"),
    ],
)
def test_a_table_of_a_sweep_that_was_cut_is_refused(swept, name, cut, message):
    spec, done = swept
    sweep.write(spec, done)
    lines = (spec.folder / name).read_text().splitlines(keepends=True)
    kept = lines[:cut] if cut >= 0 else [*lines[:cut], lines[cut].rsplit(",", 1)[0] + ","]
    (spec.folder / name).write_text("".join(kept))
    with pytest.raises(ValueError, match=message):
        report.write(spec.folder)


@pytest.mark.parametrize("cell", ["", '"{""accuracy"": 5', "5"])
def test_a_population_that_was_cut_is_refused_by_its_line(tmp_path, cell):
    table = tmp_path / "population.csv"
    table.write_text(f'rank,name,score,figures\n1,a,5.0,"{{""accuracy"": 5.0}}"\n2,b,4.0,{cell}')
    with pytest.raises(checkpoint.CorruptFile, match="population.csv', line 3: figures is '"):
        report.write(tmp_path)


# --- charts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0.93, 1.07, [0.9, 0.95, 1.0, 1.05, 1.1]),
        (5, 5, [4.4, 4.6, 4.8, 5.0, 5.2, 5.4, 5.6]),
        (-3, 3, [-4, -2, 0, 2, 4]),
    ],
)
def test_ticks_are_round_and_span_the_values(low, high, expected):
    found = page.ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 3 <= len(found) <= 9
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_a_chart_draws_every_value_and_says_it_in_words():
    made = page.chart(
        {"a": [(1, 2.0, 0.0), (2, float("nan"), 0.0), (3, 4.0, 1.0)]}, "Loss", "step", "nats"
    )
    found = Document(made)
    assert "nan" not in made
    [points] = [a["points"] for tag, a in found.elements if tag == "polyline"]
    assert len(points.split()) == 2
    [label] = [a["aria-label"] for tag, a in found.elements if tag == "svg"]
    assert label == "Loss. a: 2 at the start, 4 at the end."
    assert "a, 3: 4 ± 1" in found.text
    assert "nothing was recorded" in page.chart({"a": []}, "Loss", "step", "nats")


def test_a_chart_joins_numbers_and_writes_long_names_whole():
    line = {"a": [(0, 1.0, 0.0), (1, 2.0, 0.0)]}
    names = ["span corruption with a sentinel in front", "span corruption with nothing in front"]
    found = Document(page.chart(line, "Method", "method", "score", places=names))
    assert not [tag for tag, _ in found.elements if tag == "polyline"]
    words = " ".join(found.text.split())
    assert "sentinel in front" in words and "nothing in front" in words and "…" not in words
    joined = Document(page.chart(line, "Length", "length", "score", places=["1", "20"]))
    assert [tag for tag, _ in joined.elements if tag == "polyline"]


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def mixed(color, ground):
    """The darkest cell of a confusion matrix."""
    share = page.SHADE / 100
    pairs = [(int(color[i : i + 2], 16), int(ground[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in pairs)


@pytest.mark.parametrize("dark", [False, True])
def test_texts_and_lines_stand_out_from_their_ground(dark):
    part = page.CSS.split("prefers-color-scheme:dark")[dark]
    colors = dict(re.findall(r"--([\w]+):(#[0-9a-f]{3,6})", part.split("}")[0]))
    colors = {
        k: v if len(v) == 7 else "#" + "".join(2 * c for c in v[1:]) for k, v in colors.items()
    }

    def contrast(one, other):
        a, b = sorted((luminance(one), luminance(other)), reverse=True)
        return (a + 0.05) / (b + 0.05)

    lines = [f"c{i}" for i in range(page.SERIES)]
    for name in ("ink", "soft", "good", "bad", *lines):
        for ground in ("card", "back"):
            assert contrast(colors[name], colors[ground]) >= 4.5, (name, ground)
    for shade in ("c0", "c1"):
        assert contrast(colors["ink"], mixed(colors[shade], colors["card"])) >= 4.5, shade


def test_a_reports_name_is_the_one_that_sweeps_link_to():
    assert report.NAME == report_many.REPORT == "report.html"
