"""`report.html`: what a run, or many together, came to, on one page that needs nothing else.

A report is made from the files that they leave, so `softprompt report FOLDER` makes it
again at any time. How a page looks is `page`'s concern; texts of models and data are escaped there.
"""

import io
import json
import math
import os
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from softprompt import analysis, checkpoint, hosts, page, report_many, runs
from softprompt.backbone import Backbone
from softprompt.logbook import say, size
from softprompt.page import Html, tag
from softprompt.runs import Predictions, Run

NAME = report_many.REPORT
# Predictions shown: the wrong ones at once, more of them and the right ones on a click.
AT_ONCE, WRONG, RIGHT = 15, 200, 40
# Characters shown of one text.
LONGEST = 1200
# Labels up to which a confusion matrix is drawn.
CLASSES = 30
# Figures by step that are rates, not scores.
RATES = ("loss", "tokens_per_second", "mfu")


def attempt(folder: str | os.PathLike, backbone: Backbone | None = None) -> pathlib.Path | None:
    """Writes the report of a run that is over and returns its path; if that fails, says why.

    What was computed is worth more than its report: nothing that goes wrong here ends a run. Of
    several processes, which all call this, the first one writes.
    """
    try:
        words = None
        if backbone is not None and backbone.vocabulary is not None:
            words = analysis.words_in(backbone)
        return write(folder, words) if hosts.first() else None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        say(f"{pathlib.Path(folder) / NAME} could not be written: {reason}")
        return None


def run(
    folder: str | os.PathLike, backbone: str | None = None, vocabulary_file: str | None = None
) -> pathlib.Path:
    """`softprompt report`: the report of a folder, its prompt's neighbours those in `backbone`."""
    words = None if backbone is None else analysis.words_of(backbone, vocabulary_file)
    return write(folder, words)


def write(folder: str | os.PathLike, words: analysis.Words | None = None) -> pathlib.Path:
    """Writes `report.html` (and for a run with curves `curves.png`) into a folder.

    Args:
      folder: of a run, or of many: a sweep, a transfer, a population.
      words: where the prompt's nearest tokens are looked for; None takes those found before, or
        the embedded backbone's for a prompt of its.

    Raises:
      ValueError: the folder is that of none of these.
    """
    folder = pathlib.Path(folder)
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    if (folder / "transfer.json").is_file():
        text = report_many.transfer_page(folder)
    elif (folder / "results.csv").is_file():
        text = report_many.sweep_page(folder)
    elif (folder / "population.csv").is_file():
        text = report_many.population_page(folder)
    else:
        found = runs.read(folder, words)
        if curves := [c for c in _curves(found) if any(c[1].values())]:
            checkpoint.write_atomically(folder / "curves.png", _png(curves))
        text = _run_page(found)
    checkpoint.write_atomically(folder / NAME, text.encode())
    return folder / NAME


# --- a run's page -------------------------------------------------------------------------------

Curve = tuple[str, dict[str, list[page.Point]], str]


def _curves(found: Run) -> list[Curve]:
    """Title, series and unit of every chart: the losses, then the scores."""
    rows = [row for row in found.evaluations if "step" in row]
    names = list(dict.fromkeys(key for row in rows for key in row if key != "step"))

    def points(source: Sequence[Mapping[str, float]], key: str) -> list[page.Point]:
        return [(row["step"], row[key], 0.0) for row in source if key in row]

    losses = {"training": points(found.train, "loss")}
    losses |= {f"evaluation {k}": points(rows, k) for k in names if k in RATES}
    unit = "nats per example" if found.facts.get("loss") == "labels" else "nats per token"
    scores = [k for k in names if k not in RATES and not k.endswith("illegal")]
    return [
        ("Loss", {k: v for k, v in losses.items() if v}, unit),
        ("Evaluation", {k: points(rows, k) for k in scores}, "score"),
    ]


def _png(curves: Sequence[Curve]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(curves), 3.8), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)
    for ax, (title, series, unit) in zip(axes[0], curves, strict=True):
        for name, line in series.items():
            ax.plot(
                [p[0] for p in line], [p[1] for p in line], ".-", label=name.replace("$", r"\$")
            )
        ax.set(title=title, xlabel="step", ylabel=unit)
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    return content.getvalue()


def _run_page(found: Run) -> str:
    facts = found.facts
    sections: dict[str, Html] = {}
    if found.train or any("step" in row for row in found.evaluations):
        mark = (
            None
            if found.weights.best_step is None
            else (float(found.weights.best_step), "chosen step")
        )
        charts = [
            page.chart(series, title, "step", unit, mark=mark if title == "Evaluation" else None)
            for title, series, unit in _curves(found)
            if any(series.values())
        ]
        sections["Learning curves"] = page.join(tag("div", *charts, class_="charts"), _rates(found))
    if found.evaluations:
        sections["Metrics"] = _metrics(found)
    if found.ensembles:
        sections["Ensemble"] = page.join(*(_votes(*one) for one in found.ensembles.items()))
    if found.predictions:
        sections["Predictions"] = page.join(*(_of_task(p, found) for p in found.predictions))
    if found.portrait:
        sections["Prompt"] = _prompt(found.portrait)
    sections["Reproduce"] = _reproduce(found)
    if found.config:
        sections["Configuration"] = page.details("operative gin", tag("pre", found.config))
    sections["Environment"] = _environment(facts)
    length = facts.get("prompt_length")
    what = [str(facts["backbone"])] if "backbone" in facts else []
    if found.ensembles:
        what.append(f"{len(facts.get('ensemble', ()))} prompts that vote")
    if length:
        what.append(f"prompt of {length} vectors")
    for name in ("method", "split", "initialisation", "seed"):
        if facts.get(name) is not None:
            what.append(f"{name} {facts[name]}")
    title = str(facts.get("task") or found.folder.name)
    foot = f"softprompt {facts.get('versions', {}).get('softprompt', '')} · {found.folder}"
    return page.document(title, " · ".join(what), _figures(found), sections, foot)


def _chosen(found: Run) -> Mapping[str, float]:
    """The figures of the best step, or the last ones."""
    best = [row for row in found.evaluations if row.get("step") == found.weights.best_step]
    return (best or found.evaluations or [{}])[-1]


def _figures(found: Run) -> Html:
    shown: dict[str, Any] = {}
    chosen = _chosen(found)
    step = chosen.get("step")
    names = [k for k in chosen if k != "step"]
    for name in names[:6]:
        note = "" if step is None else tag("small", f"at step {step:,}")
        shown[name] = page.join(f"{chosen[name]:,.4g}", note)
    if found.train:
        last = found.train[-1]
        note = tag("small", f"at step {last['step']:,}")
        shown["training loss"] = page.join(f"{last['loss']:.4g}", note)
    if found.weights.trained is not None:
        shown["trained parameters"] = f"{found.weights.trained:,}"
    if found.weights.stored is not None:
        shown["stored for the task"] = size(found.weights.stored)
    return page.facts(shown)


def _rates(found: Run) -> Html:
    if not any("tokens_per_second" in row for row in found.train):
        return Html("")
    # A population, which may have taken its turn at this run, knows no rates of one member.
    timed = [row for row in found.train if "tokens_per_second" in row]
    rows = [
        (row["step"], row["loss"], row["tokens_per_second"], f"{100 * row['mfu']:.0f}%")
        for row in timed
    ]
    speed = np.median([row["tokens_per_second"] for row in timed])
    header = ("step", "training loss", "tokens/s", "model FLOPs utilisation")
    listed = page.table(header, rows, "training loss and speed by step")
    title = f"training figures by step (median {speed:,.0f} tokens/s)"
    return page.details(title, listed)


def _metrics(found: Run) -> Html:
    steps = [row for row in found.evaluations if "step" in row]
    if not steps:
        rows = [(k, float(v)) for k, v in found.evaluations[-1].items()]
        return page.table(("metric", "value"), rows, "metrics")
    best, last = _chosen(found), steps[-1]
    names = [k for k in last if k != "step"]
    if not names:
        return tag("p", "This task has no metrics: what it predicted is in the run's eval folder.")
    header = ["metric", f"chosen step {best['step']:,}", f"last step {last['step']:,}"]
    rows = [[k, float(best.get(k, math.nan)), float(last[k])] for k in names]
    if best["step"] == last["step"]:
        header, rows = [*header[:1], f"step {last['step']:,} (chosen, last)"], [r[:2] for r in rows]
    listed = [(row["step"], *(float(row.get(k, math.nan)) for k in names)) for row in steps]
    every = page.table(("step", *names), listed, "metrics of every evaluation")
    return page.join(
        page.table(header, rows, "metrics"),
        page.details(f"every evaluation ({len(steps)})", every),
    )


def _votes(task: str, facts: Mapping[str, Any]) -> Html:
    """Each prompt, average, best and ensemble: the columns of the paper's table 3."""
    rows = [*zip(facts["names"], facts["prompts"], strict=True)]
    rows += [("average", facts["average"]), ("best", facts["prompts"][facts["best"]])]
    rows += [("ensemble, majority vote", facts["ensemble"])]
    if facts["mean_probability"] is not None:
        rows += [("ensemble, mean probability", facts["mean_probability"])]
    names = list(facts["average"])
    cells = [[name, *(float(figures[k]) for k in names)] for name, figures in rows]
    said = [f"{facts['agreement']:.1f}% of the prompts stand behind a vote on the average."]
    for of, share in (("unanimous", "right_if_unanimous"), ("divided", "right_if_divided")):
        if facts[share] is not None:
            part = facts["unanimous"] if of == "unanimous" else 100 - facts["unanimous"]
            said.append(f"{part:.1f}% of the votes are {of}; {facts[share]:.1f}% of those right.")
    if "examples_per_second" in facts:
        one, many = facts["examples_per_second"], facts["examples_per_second_separately"]
        said.append(f"{one:,.1f} examples/s together, {many:,.1f} in separate runs.")
    listed = page.table(("prompt", *names), cells, f"ensemble on {task}")
    return page.join(tag("h3", task), listed, tag("p", " ".join(said), class_="note"))


def _cut(text: Any) -> str:
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text):,} characters)"


def probabilities(row: Mapping[str, Any]) -> dict[str, float]:
    """Of each label: the mean over an ensemble, else the softmax of its log-likelihoods.

    Empty where labels were not ranked.
    """
    if "mean_probability" in row:
        return row["mean_probability"]
    scores = row.get("scores") or {}
    if not scores:
        return {}
    values = np.array(list(scores.values()), np.float64)
    shares = np.exp(values - values.max())
    return dict(zip(scores, (shares / shares.sum()).tolist(), strict=True))


def confidence(row: Mapping[str, Any]) -> float:
    """The share of an ensemble's prompts behind a vote, else the likeliest label's probability."""
    return row.get("agreement", max(probabilities(row).values(), default=0.0))


def _of_task(found: Predictions, of: Run) -> Html:
    rows = found.rows
    scored = bool(rows) and isinstance(rows[0], Mapping) and "prediction" not in rows[0]
    given = "target_score" if scored else "prediction"
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) or not {"input", "target", given} <= set(row):
            raise checkpoint.CorruptFile(
                f"predictions of {found.task} in {str(of.folder)!r}, line {number}: expected an "
                f"object with input, target and prediction"
            )
    step = "" if found.step is None else f", step {found.step:,}"
    parts: list[Any] = []
    if len(of.predictions) > 1 or found.task != of.facts.get("task"):
        parts.append(tag("h3", found.task))
    if scored:
        return page.join(*parts, _of_scores(rows, step))
    wrong = [r for r in rows if r["prediction"] != r["target"]]
    right = [r for r in rows if r["prediction"] == r["target"]]

    wrong.sort(key=confidence, reverse=True)
    right.sort(key=confidence)
    parts.append(
        tag(
            "p",
            f"{len(rows):,} examples{step}: {len(right):,} equal the target text, ",
            f"{len(wrong):,} differ from it.",
        )
    )
    if found.labels:
        parts.append(_illegal(rows, found.labels))
        if len(found.labels) <= CLASSES:
            parts.append(_confusion(rows, found.labels))
    ranked = any(r.get("scores") or "agreement" in r for r in rows)
    parts.append(tag("h3", "Wrong predictions", ", the surest first" if ranked else ""))
    shown, more = wrong[:AT_ONCE], wrong[AT_ONCE:]
    parts.append(
        _rows(shown, ranked, found.labels, "wrong predictions") if shown else tag("p", "None.")
    )
    for name, part, most in (
        ("more wrong predictions", more, WRONG),
        ("right predictions" + (", the least sure first" if ranked else ""), right, RIGHT),
    ):
        if part:
            count = f"{len(part):,}" if len(part) <= most else f"{most} of {len(part):,}"
            listed = _rows(part[:most], ranked, found.labels, name)
            parts.append(page.details(f"{name} ({count})", listed))
    return page.join(*parts)


def _of_scores(rows: Sequence[Mapping[str, Any]], step: str) -> Html:
    """Of a task whose metrics judge the targets' scores: the least likely targets."""
    rows = sorted(rows, key=lambda row: row["target_score"])
    cells = [[_cut(r["input"]), _cut(r["target"]), float(r["target_score"])] for r in rows[:WRONG]]
    header = ["input", "target", "log-likelihood, nats"]
    return page.join(
        tag("p", f"{len(rows):,} examples{step}: nothing was predicted, the targets were scored."),
        tag("h3", "The least likely targets"),
        page.table(header, cells, "least likely targets", "texts"),
    )


def _rows(rows, ranked: bool, labels: Sequence[str] | None, title: str) -> Html:
    header = ["input", "target", "prediction"]
    if ranked:
        header += ["confidence", "of the target"]
    listed = []
    for row in rows:
        mark = "good" if row["prediction"] == row["target"] else "bad"
        said = tag("span", _cut(row["prediction"]), class_=mark)
        if labels and row["prediction"] not in labels:
            said = page.join(said, tag("small", " illegal"))
        cells = [_cut(row["input"]), _cut(row["target"]), said]
        if ranked:
            shares = probabilities(row)
            told = "  ".join(f"{k} {v:.3f}" for k, v in shares.items())
            sure = f"{100 * confidence(row):.0f}%"
            cells.append(tag("span", sure, title=told))
            target = shares.get(row["target"])
            cells.append("–" if target is None else f"{100 * target:.0f}%")
        listed.append(cells)
    return page.table(header, listed, title, "texts")


def _illegal(rows, labels: Sequence[str]) -> Html:
    """How many outputs are none of the labels, and which ones."""
    illegal = Counter(_cut(r["prediction"]) for r in rows if r["prediction"] not in labels)
    if not illegal:
        return tag("p", "Illegal outputs (none of the labels): 0.")
    listed = page.table(("output", "times"), illegal.most_common(50), "illegal outputs")
    count, kinds = sum(illegal.values()), len(illegal)
    title = f"Illegal outputs (none of the labels): {count:,}, {kinds:,} different"
    return page.details(title, listed, open_=True)


def _confusion(rows, labels: Sequence[str]) -> Html:
    legal = set(labels)
    names = list(labels)
    if any(r["prediction"] not in legal for r in rows):
        names.append("illegal")
    counts = Counter(
        (r["target"], r["prediction"] if r["prediction"] in legal else "illegal") for r in rows
    )
    table = [[counts[target, name] for name in names] for target in labels]
    return page.join(tag("h3", "Confusion matrix"), page.matrix(names, table, labels))


# --- the prompt ---------------------------------------------------------------------------------


def _prompt(facts: Mapping[str, Any]) -> Html:
    [prompt, *_] = facts["prompts"]
    parts: list[Any] = []
    if (depth := prompt["metadata"].get("prompt_depth", 1)) > 1:
        told = f"A deep prompt of {depth} layers: shown are the rows of the input layer."
        parts.append(tag("p", told, class_="note"))
    if "drift" in prompt:
        l2, cosine = prompt["drift"]["l2"], prompt["drift"]["cosine"]
        parts.append(
            tag("p", f"Drift from the initial prompt, mean over positions: L2 {l2:.3g}, "
                     f"cosine {cosine:.2f}.")
        )  # fmt: skip
    if facts["backbone"] is None:
        parts.append(
            tag("p", "Nearest tokens need the backbone: softprompt report FOLDER --backbone=PATH.",
                class_="note")
        )  # fmt: skip
    if labels := prompt.get("labels"):
        parts += [tag("h3", "Class labels among the nearest tokens"), _labels(labels)]
    if clusters := prompt.get("token_clusters"):
        rows = [(" ".join(c["tokens"]), ", ".join(map(str, c["positions"]))) for c in clusters[:15]]
        listed = page.table(("tokens", "positions"), rows, "clusters of nearest tokens", "terms")
        title = f"clusters of nearest tokens ({len(clusters)})"
        parts.append(page.details(title, listed, open_=len(clusters) <= 8))
    parts += [tag("h3", "Positions"), _positions(prompt, facts["metric"])]
    return page.join(*parts)


def _labels(labels: Sequence[Mapping[str, Any]]) -> Html:
    started, rows = any("persists" in entry for entry in labels), []
    for entry in labels:
        row = [entry["label"]]
        if "persists" in entry:
            kept = "persists" if entry["persists"] else "lost"
            row.append(f"{kept} (position {entry['initialised_at']}, rank {entry['rank_there']:,})")
        elif started:
            row.append("–")
        row.append(", ".join(map(str, entry["positions"])) or "none")
        rows.append([*row, f"{entry['best_rank']:,} (position {entry['best_position']})"])
    header = ["label", *(["where it started"] if started else []), "near positions", "best rank"]
    return page.table(header, rows, "class labels among the nearest tokens")


def _positions(prompt: Mapping[str, Any], metric: str) -> Html:
    near, drifted = "neighbours" in prompt["positions"][0], "drift" in prompt
    header = ["position", *([f"nearest tokens by {metric}"] if near else []), "norm"]
    header += ["drift", "cosine with its start"] if drifted else []
    rows = []
    for entry in prompt["positions"]:
        row: list[Any] = [entry["position"]]
        if near:
            tokens = [
                tag("span", n["token"], tag("small", f"{n[metric]:.2f}"))
                for n in entry["neighbours"]
            ]
            row.append(tag("div", *tokens, class_="tokens"))
        row.append(float(entry["norm"]))
        if drifted:
            row += [float(entry["drift"]["l2"]), float(entry["drift"]["cosine"])]
        rows.append(row)
    return page.table(header, rows, "positions of the prompt and their nearest tokens")


# --- how it was made ----------------------------------------------------------------------------


def _reproduce(found: Run) -> Html:
    line = runs.command_line(found.facts, found.folder)
    if line is None:
        return tag("p", "This run left no command: it was made from Python.")
    note = "Again it predicts anew, and replaces what its output folder holds."
    if found.train:
        note = "Finished where its output folder is still there: give another one to do it again."
    return page.join(tag("pre", line, class_="wrap"), tag("p", note, class_="note"))


# Facts that stand elsewhere on the page, or say nothing to a reader.
ELSEWHERE = ("command", "labels", "class_labels", "metrics", "sha256", "format_version")


def _environment(facts: Mapping[str, Any]) -> Html:
    kept = {k: v for k, v in facts.items() if k not in ELSEWHERE}
    return page.values(kept, "environment of the run")
