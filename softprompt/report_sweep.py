"""The report of a sweep: its table, its plot, and links to the reports of its runs."""

import csv
import json
import math
import pathlib
import re
import urllib.parse
from typing import Any

from softprompt import page
from softprompt.logbook import size
from softprompt.page import Html, tag
from softprompt.runs import command_line, json_object, read_weights

REPORT = "report.html"
FILES = ("table.md", "results.csv", "summary.csv", "plot.png")


def _csv(path: pathlib.Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def sweep_page(folder: pathlib.Path) -> str:
    facts = json_object(folder / "sweep.json")
    results, means = _csv(folder / "results.csv"), _csv(folder / "summary.csv")
    columns = list(dict.fromkeys(row["task"] for row in means))
    points = list(dict.fromkeys(row["point"] for row in means))
    lines = list(dict.fromkeys(row["line"] for row in means))
    cells = {(r["line"], r["point"], r["task"]): r for r in means}
    axis = facts.get("axis") or "point"
    sections = {
        "Scores": _sweep_table(cells, lines, points, columns, axis),
        "Plot": _sweep_plot(cells, lines, points, columns, axis, facts.get("title") or "Score"),
        "Runs": _sweep_runs(folder, results),
    }
    files = [n for n in FILES if (folder / n).is_file()]
    links = [tag("li", tag("a", name, href=name)) for name in files]
    sections["Runs"] = page.join(
        sections["Runs"], tag("p", "Also in this folder:"), tag("ul", *links)
    )
    if line := command_line(facts):
        sections["Reproduce"] = tag("pre", line, class_="wrap")
    shown = {k: facts[k] for k in ("versions", "commit", "platform", "devices") if facts.get(k)}
    if shown:
        sections["Environment"] = page.values(shown, "environment of the sweep")
    seeds = len({row["seed"] for row in results})
    planned = f" of {facts['planned']:,}" if facts.get("planned") else ""
    told = f"{len(results):,}{planned} runs; points: {len(points)}, seeds: {seeds}"
    title = facts.get("title") or folder.name
    return page.document(title, told, "", sections, str(folder))


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
                    mean, spread = float(cell["mean"]), float(cell["standard_deviation"])
                    text = "diverged" if math.isnan(mean) else f"{mean:.1f}"
                    if not math.isnan(mean) and int(cell["seeds"]) > 1:
                        text += f"\u00a0±\u00a0{spread:.1f}"
                    if mean == best.get(task) and len(cells) > len(columns):
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
            (float(i), float(r["mean"]), float(r["standard_deviation"])) for i, r in found if r
        ]
    drawn = page.chart(series, title, axis, "score", places=points)
    return tag("div", drawn, class_="charts")


def _sweep_runs(folder: pathlib.Path, results) -> Html:
    named, rows = any(row["line"] for row in results), []
    for row in results:
        names = [re.sub(r"[^\w.+-]+", "_", row[k]) for k in ("line", "point", "task") if row[k]]
        place = pathlib.PurePosixPath("runs", *names, row["seed"])
        title: Any = row["point"]
        if (folder / place / REPORT).is_file():
            title = tag("a", title, href=urllib.parse.quote(str(place / REPORT)))
        weights, figures = read_weights(folder / place), json.loads(row["figures"])
        told = "  ".join(f"{k} {v:,.4g}" for k, v in figures.items()) or "diverged"
        rows.append(
            (title, *([row["line"]] if named else []), row["task"], row["seed"],
             float(row["score"]), told, float(row["seconds"]), weights.trained or "–",
             size(weights.stored) if weights.stored else "–")
        )  # fmt: skip
    header = ["point", *(["line"] if named else []), "task", "seed", "score", "figures", "seconds"]
    header += ["trained parameters", "stored"]
    return page.table(header, rows, "runs")
