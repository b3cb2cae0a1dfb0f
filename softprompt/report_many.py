"""The reports of a sweep, a transfer, a population: tables, plots, links to runs' own reports."""

import collections
import json
import math
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from softprompt import checkpoint, page
from softprompt.logbook import size
from softprompt.page import Html, tag
from softprompt.runs import command_line, json_lines, json_object, read_weights

REPORT = "report.html"
FILES = ("table.md", "summary.md", "population.csv", "results.csv", "summary.csv", "plot.png")
# Where a run lies, the chart that its curve is drawn in, and the curve's name.
Place = tuple[pathlib.Path, str, str]


def _csv(path: pathlib.Path, **columns: Callable[[str], Any]) -> list[dict[str, str]]:
    """The rows of a table, none where there is no file: see `checkpoint.read_table`."""
    return checkpoint.read_table(path, columns) if path.is_file() else []


def _figures(cell: str) -> dict[str, float]:
    """Figures by name, as a table holds them."""
    found = json.loads(cell)
    if not isinstance(found, dict):
        raise ValueError("expected a JSON object")
    return found


def _deviation(cell: str) -> float:
    """A deviation as a table holds it: of a single score there is none."""
    return float(cell or 0)


def sweep_page(folder: pathlib.Path) -> str:
    facts = json_object(folder / "sweep.json")
    results = _csv(
        folder / "results.csv",
        line=str, point=str, task=str, seed=str, score=float, figures=_figures, seconds=float,
    )  # fmt: skip
    means = _csv(
        folder / "summary.csv", line=str, point=str, task=str, mean=float,
        standard_deviation=_deviation,
    )  # fmt: skip
    for name, rows in (("results.csv", results), ("summary.csv", means)):
        if not rows:
            raise ValueError(f"{str(folder / name)!r} holds no runs")
    columns = list(dict.fromkeys(row["task"] for row in means))
    points = list(dict.fromkeys(row["point"] for row in means))
    lines = list(dict.fromkeys(row["line"] for row in means))
    cells = {(r["line"], r["point"], r["task"]): r for r in means}
    axis = facts.get("axis") or "point"
    sections: dict[str, Html] = {
        "Scores": _sweep_table(cells, lines, points, columns, axis),
        "Plot": _sweep_plot(cells, lines, points, columns, axis, facts.get("title") or "Score"),
    }
    places = [
        (
            folder / _sweep_place(row),
            row["task"],
            " ".join(filter(None, (row["line"], row["point"]))),
        )
        for row in results
    ]
    sections |= _curves(places)
    sections["Runs"] = _sweep_runs(folder, results)
    seeds = len({row["seed"] for row in results})
    planned = f" of {facts['planned']:,}" if facts.get("planned") else ""
    told = f"{len(results):,}{planned} runs; points: {len(points)}, seeds: {seeds}"
    return _page(folder, facts.get("title") or folder.name, told, sections, facts, places)


def _page(
    folder: pathlib.Path,
    title: str,
    told: str,
    sections: dict[str, Html],
    facts: dict[str, Any],
    places: Sequence[Place],
) -> str:
    """A page of these sections, with links to the folder's tables, and how it was made."""
    links = [tag("li", tag("a", name, href=name)) for name in FILES if (folder / name).is_file()]
    last = list(sections)[-1]
    sections[last] = page.join(sections[last], tag("p", "Also in this folder:"), tag("ul", *links))
    configured = [at for at, _, _ in places if (at / "config.gin").is_file()]
    if configured:
        text = (configured[-1] / "config.gin").read_text(encoding="utf-8")
        name = configured[-1].relative_to(folder)
        sections["Configuration"] = page.details(f"operative gin of {name}", tag("pre", text))
    if line := command_line(facts):
        sections["Reproduce"] = tag("pre", line, class_="wrap")
    shown = {k: facts[k] for k in ("versions", "commit", "platform", "devices") if facts.get(k)}
    if shown:
        sections["Environment"] = page.values(shown, "environment")
    return page.document(title, told, "", sections, str(folder))


def _curves(places: Sequence[Place]) -> dict[str, Html]:
    """Training losses, the mean ± deviation of runs of one name; empty where nothing trained."""
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for folder, chart, name in places:
        curves = found.setdefault(chart, {})
        if name not in curves and len(curves) == page.SERIES:
            continue
        for row in json_lines(folder / "train.jsonl"):
            if "loss" in row:
                curve = curves.setdefault(name, collections.defaultdict(list))
                curve[row["step"]].append(row["loss"])
    charts = []
    for chart, curves in ((chart, curves) for chart, curves in found.items() if curves):
        series = {
            name: [
                (step, float(np.mean(x)), float(np.std(x, ddof=1)) if len(x) > 1 else 0.0)
                for step, x in sorted(curve.items())
            ]
            for name, curve in curves.items()
        }
        charts.append(page.chart(series, f"Training loss: {chart}", "step", "nats"))
    return {"Learning curves": tag("div", *charts, class_="charts")} if charts else {}


def _linked(folder: pathlib.Path, place: pathlib.PurePosixPath, text: str) -> Any:
    """The text, as a link to the report of the run in a place of the folder if it has one."""
    if not (folder / place / REPORT).is_file():
        return text
    return tag("a", text, href=urllib.parse.quote(str(place / REPORT)))


def _sweep_table(cells, lines, points, columns, axis: str) -> Html:
    best: dict[str, float] = {}
    for (_, _, task), cell in cells.items():
        if not math.isnan(mean := float(cell["mean"])):
            best[task] = max(mean, best.get(task, mean))
    named, rows = any(lines), []
    for line in lines:
        for point in points:
            row: list[Any] = [point, *([line] if named else [])]
            for task in columns:
                cell = cells.get((line, point, task))
                text = "–"
                if cell is not None:
                    text = _spread(cell)
                    if float(cell["mean"]) == best.get(task) and len(cells) > len(columns):
                        text = tag("strong", text)
                row.append(text)
            rows.append(row)
    header = [axis, *(["line"] if named else []), *columns]
    note = "Mean ± sample standard deviation over seeds; the best of each column is bold."
    return page.join(tag("p", note, class_="note"), page.table(header, rows, "scores"))


def _sweep_plot(cells, lines, points, columns, axis: str, title: str) -> Html:
    several = len(lines) > 1
    curves = [(line, columns[-1], line) for line in lines] if several else None
    curves = curves or [(lines[0], task, task) for task in columns] if lines else []
    series: dict[str, list[page.Point]] = {}
    for line, task, name in curves:
        found = [(i, cells.get((line, point, task))) for i, point in enumerate(points)]
        series[name] = [
            (float(i), float(r["mean"]), _deviation(r["standard_deviation"])) for i, r in found if r
        ]
    drawn = page.chart(series, title, axis, "score", places=points)
    return tag("div", drawn, class_="charts")


def _sweep_place(row: dict[str, str]) -> pathlib.PurePosixPath:
    names = [folder_name(row[k]) for k in ("line", "point", "task") if row[k]]
    return pathlib.PurePosixPath("runs", *names, row["seed"])


def _sweep_runs(folder: pathlib.Path, results) -> Html:
    named, rows = any(row["line"] for row in results), []
    for row in results:
        place = _sweep_place(row)
        title = _linked(folder, place, row["point"])
        weights = read_weights(folder / place, json_object(folder / place / "run.json"))
        figures = _figures(row["figures"])
        told = "  ".join(f"{k} {v:,.4g}" for k, v in figures.items()) or "diverged"
        rows.append(
            (title, *([row["line"]] if named else []), row["task"], row["seed"],
             float(row["score"]), told, float(row["seconds"]),
             "–" if weights.trained is None else weights.trained,
             "–" if weights.stored is None else size(weights.stored))
        )  # fmt: skip
    header = ["point", *(["line"] if named else []), "task", "seed", "score", "figures", "seconds"]
    header += ["trained parameters", "stored"]
    return page.table(header, rows, "runs")


# --- transfer -----------------------------------------------------------------------------------


def transfer_page(folder: pathlib.Path) -> str:
    """What was trained on sources and judged on targets, method beside method."""
    facts = json_object(folder / "transfer.json")
    results = _csv(folder / "results.csv", method=str, source=str, seed=str)
    means = _csv(
        folder / "summary.csv", source=str, target=str, figure=str, method=str, mean=float,
        standard_deviation=_deviation,
    )  # fmt: skip
    methods = list(dict.fromkeys(row["method"] for row in means))
    cells = {(r["source"], r["target"], r["figure"], r["method"]): r for r in means}
    rows = []
    for key in dict.fromkeys((r["source"], r["target"], r["figure"]) for r in means):
        own = [cells.get((*key, method)) for method in methods]
        values = [math.nan if cell is None else float(cell["mean"]) for cell in own]
        row = [*key, *("–" if cell is None else _spread(cell) for cell in own)]
        apart = [value - values[0] for value in values[1:]]
        rows.append([*row, *("–" if math.isnan(x) else f"{x:+.1f}" for x in apart)])
    later = methods[1:]
    header = ["source", "target", "figure", *methods, *(f"Δ {name}" for name in later)]
    note = (
        "Trained on the source, judged on the target without further training. Mean ± sample "
        "standard deviation over seeds"
        + (f"; Δ is the difference to {methods[0]}." if later else ".")
    )
    runs = {
        run: pathlib.PurePosixPath("runs", *map(folder_name, run))
        for run in ((r["method"], r["source"], r["seed"]) for r in results)
    }
    listed = [(_linked(folder, at, run[0]), *run[1:]) for run, at in runs.items()]
    places = [
        (folder / at, f"{source}, {method}", f"seed {seed}")
        for (method, source, seed), at in runs.items()
    ]
    sections: dict[str, Html] = {
        "Transfer": page.join(tag("p", note, class_="note"), page.table(header, rows, "scores")),
        **_curves(places),
        "Runs": page.table(("method", "source", "seed"), listed, "trainings"),
    }
    told = f"{len(listed):,} trainings; methods: {', '.join(methods)}"
    return _page(folder, facts.get("title") or folder.name, told, sections, facts, places)


def folder_name(text: str) -> str:
    """The name of a run's folder for a method, point or task, which may hold any character."""
    return re.sub(r"[^\w.+-]+", "_", text)


def _spread(cell: dict[str, str]) -> str:
    mean, spread = float(cell["mean"]), cell["standard_deviation"]
    if math.isnan(mean):
        return "diverged"
    return f"{mean:.1f}\u00a0±\u00a0{float(spread):.1f}" if spread else f"{mean:.1f}"


# --- populations --------------------------------------------------------------------------------


def population_page(folder: pathlib.Path) -> str:
    """The ranking of a population's prompts, and the curves of the best of every task."""
    facts = json_object(folder / "population.json")
    members = _csv(folder / "population.csv", rank=int, name=str, score=float, figures=_figures)
    if not members:
        raise ValueError(f"{str(folder / 'population.csv')!r} holds no prompts")
    unlike = [k for k in members[0] if k not in ("rank", "name", "score", "figures")]
    unlike = [k for k in unlike if len({member[k] for member in members}) > 1]
    rows = []
    for member in members:
        figures = _figures(member["figures"])
        told = "  ".join(f"{k} {v:,.4g}" for k, v in figures.items()) or "–"
        name = _linked(folder, pathlib.PurePosixPath(member["name"]), member["name"])
        score = float(member["score"])
        shown = "–" if math.isnan(score) else f"{score:.2f}"
        rows.append([name, int(member["rank"]), shown, *(member[k] for k in unlike), told])
    ranking = page.table(["prompt", "rank", "score", *unlike, "figures"], rows, "ranking")
    sections: dict[str, Html] = {}
    if facts.get("summary"):
        note = "Mean ± sample standard deviation over seeds of equal settings."
        listed = page.table(facts["header"], facts["summary"], "scores of settings")
        sections["Settings"] = page.join(tag("p", note, class_="note"), listed)
    sections["Ranking"] = ranking
    # In the order of their ranks: where a chart has no room for all, it shows the best.
    places = [
        (folder / member["name"], member.get("mixture_or_task_name", ""), member["name"])
        for member in members
    ]
    sections |= _curves(places)
    told = f"{len(members):,} prompts over one backbone"
    return _page(folder, f"Population {folder.name}", told, sections, facts, places)
