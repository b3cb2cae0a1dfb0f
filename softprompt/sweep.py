"""Sweeps: one binary over points, lines, tasks and seeds, to a table and a plot.

A sweep is a gin file that names its points; gin/sweeps/ holds the paper's ablations. What a run of
it is, and when one is finished: `planning`.
"""

import csv
import dataclasses
import io
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from softprompt import checkpoint, config, content, data, launch, page, planning, provenance, report
from softprompt.logbook import say
from softprompt.report_many import folder_name
from softprompt.settings import check_kinds, check_path

MEAN = "mean"


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a sweep's gin file names.

    Attributes:
      folder: SWEEP_DIR, where everything goes.
      title, axis: of the plot, and of its x axis.
      points, lines, tasks: name -> settings, each a gin file or a binding `NAME=value`; the product
        of all is run. A task's name is that of the seqio task.
      seeds: of every combination.
    """

    folder: pathlib.Path
    title: str
    axis: str
    points: planning.Settings
    lines: planning.Settings
    tasks: planning.Settings
    seeds: Sequence[int]


def read(macros: Mapping[str, Any]) -> Spec:
    """The sweep that gin macros describe; what is missing or malformed is an error naming it."""
    needed = ("SWEEP_DIR", "TITLE", "AXIS", "POINTS", "LINES", "TASKS", "SEEDS")
    if missing := [name for name in needed if macros.get(name) is None]:
        raise ValueError(f"a sweep needs {', '.join(missing)}; include a sweeps/*.gin")
    points, lines, tasks = (
        planning.settings_of(k, macros[k]) for k in ("POINTS", "LINES", "TASKS")
    )
    seeds = planning.seeds_of(macros["SEEDS"])
    named = {k: v for k, v in macros.items() if isinstance(v, str | os.PathLike)}

    def filled(settings: planning.Settings) -> planning.Settings:
        # `{FAMILY}/pretrain` takes the value of the macro FAMILY.
        def fill(setting: str) -> str:
            return re.sub(r"\{([A-Z_]+)\}", lambda m: str(named.get(m[1], m[0])), setting)

        return {name: [fill(s) for s in found] for name, found in settings.items()}

    check_path("SWEEP_DIR", macros["SWEEP_DIR"])
    check_kinds(**{k: (macros[k], isinstance(macros[k], str), "a text") for k in ("TITLE", "AXIS")})
    return Spec(
        pathlib.Path(macros["SWEEP_DIR"]),
        macros["TITLE"],
        macros["AXIS"],
        filled(points),
        filled(lines),
        filled(tasks),
        seeds,
    )


def runs(spec: Spec) -> Iterator[planning.Run]:
    """All runs, a whole seed before the next: an unfinished sweep already shows every point."""
    for seed in spec.seeds:
        for task, of_task in spec.tasks.items():
            for point, of_point in spec.points.items():
                for line, of_line in spec.lines.items():
                    names = [folder_name(n) for n in (line, point, task) if n]
                    folder = spec.folder.joinpath("runs", *names, str(seed))
                    settings = [*of_line, *of_point, f"MIXTURE_OR_TASK_NAME={task}", f"SEED={seed}"]
                    yield planning.Run(line, point, task, seed, settings, folder, of_task)


def sweep(
    files: Sequence[str],
    bindings: Sequence[tuple[str, str]] = (),
    search_paths: Sequence[str] = (),
    strict: bool = False,
) -> bool:
    """Runs what is not finished yet, and writes results after every run.

    Writes `results.csv` (a row per run), `summary.csv` and `table.md` (mean and sample standard
    deviation over seeds), `plot.png` and `report.html` to SWEEP_DIR. Returns False if SIGTERM
    stopped it. If `strict`, a binding that POINTS, LINES or SEEDS take from every run is an error.
    """
    config.parse(files, (), search_paths, complete=False)
    config.parse(files, planning.known(bindings), search_paths)
    spec = read(config.macros())
    planned = list(runs(spec))
    names = set()
    if strict:
        planning.check_free(bindings, LINES=spec.lines, POINTS=spec.points)
    planning.check_taken(planned, files, bindings, search_paths)
    for run in planned:
        planning.configure(run, files, bindings, search_paths)
        names |= set(config.macros())
        _check_task(run)
    planning.check_known(bindings, names)
    outcomes: list[planning.Outcome] = []
    with data.keeping_records():
        for outcome, new in planning.outcomes(planned, files, bindings, search_paths, "run"):
            if outcome is None:
                return False
            _check_figures(outcome)
            outcomes.append(outcome)
            if new:
                write(spec, outcomes)
    table = write(spec, outcomes)
    say(f"{table}\n{len(outcomes)} runs in {spec.folder}: report.html, results.csv, plot.png")
    return True


def _check_task(run: planning.Run) -> None:
    """Raises where the run in force has no such task, split or local data."""
    macros = config.macros()
    with planning.naming(run):
        tasks = content.tasks(macros)
        method = config.arguments(launch.baseline)["method"] if macros["BINARY"] != "train" else ""
        if method != "none":
            planning.check_split(tasks, "train")
        if held_out := [task for task in tasks if macros["EVAL_SPLIT"] in task.splits]:
            planning.check_split(held_out, macros["EVAL_SPLIT"])
    if not held_out:
        raise ValueError(
            f"{run} evaluates nothing (EVAL_SPLIT is {macros['EVAL_SPLIT']!r}): a sweep compares "
            f"figures"
        )


def _check_figures(outcome: planning.Outcome) -> None:
    if not outcome.figures and not outcome.diverged:
        raise ValueError(f"{outcome.run} evaluated nothing (EVAL_SPLIT): a sweep compares figures")


def summary(
    spec: Spec, outcomes: Sequence[planning.Outcome]
) -> dict[tuple[str, str, str], list[float]]:
    """Scores over seeds by (line, point, task); the task 'mean' is the mean over all tasks.

    A seed counts for the mean once all of its tasks are there.
    """
    scores = {(o.run.line, o.run.point, o.run.task, o.run.seed): o.score for o in outcomes}
    found: dict[tuple[str, str, str], list[float]] = {}
    for line in spec.lines:
        for point in spec.points:
            means = []
            for seed in spec.seeds:
                of_seed = [scores.get((line, point, task, seed)) for task in spec.tasks]
                for task, score in zip(spec.tasks, of_seed, strict=True):
                    if score is not None:
                        found.setdefault((line, point, task), []).append(score)
                if None not in of_seed:
                    means.append(float(np.mean(of_seed)))
            if means and len(spec.tasks) > 1:
                found[line, point, MEAN] = means
    return found


def deviation(scores: Sequence[float]) -> float:
    """Sample standard deviation (0 for a single score)."""
    return float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0


def deviation_cell(scores: Sequence[float]) -> str:
    """The deviation as a table's cell: empty for a single score, which has none."""
    return f"{deviation(scores):.2f}" if len(scores) > 1 else ""


def spread(scores: Sequence[float], digits: int = 1) -> str:
    """Mean ± sample standard deviation; the mean alone of a single score, which has no other."""
    mean = f"{np.mean(scores):.{digits}f}"
    if mean == "nan":
        return "diverged"
    return f"{mean} ± {deviation(scores):.{digits}f}" if len(scores) > 1 else mean


def as_csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    """A table as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


def write(spec: Spec, outcomes: Sequence[planning.Outcome]) -> str:
    """Writes the results' files; returns the table."""
    rows = [
        (
            o.run.line, o.run.point, o.run.task, o.run.seed, f"{o.score:.2f}",
            json.dumps(dict(o.figures)), f"{o.seconds:.0f}",
        )
        for o in outcomes
    ]  # fmt: skip
    header = ("line", "point", "task", "seed", "score", "figures", "seconds")
    checkpoint.write_atomically(spec.folder / "results.csv", as_csv(header, rows))
    found = summary(spec, outcomes)
    rows = [(*key, f"{np.mean(s):.2f}", deviation_cell(s), len(s)) for key, s in found.items()]
    header = ("line", "point", "task", "mean", "standard_deviation", "seeds")
    checkpoint.write_atomically(spec.folder / "summary.csv", as_csv(header, rows))
    text = table(spec, found)
    checkpoint.write_atomically(spec.folder / "table.md", text.encode())
    plot(spec, found, spec.folder / "plot.png")
    about = {"title": spec.title, "axis": spec.axis, "planned": sum(1 for _ in runs(spec))}
    provenance.write_of_many(spec.folder / "sweep.json", about)
    report.attempt(spec.folder)
    return text


def _columns(spec: Spec) -> list[str]:
    return [*spec.tasks, *([MEAN] if len(spec.tasks) > 1 else [])]


def table(spec: Spec, found: Mapping[tuple[str, str, str], Sequence[float]]) -> str:
    """A Markdown table: a row per line and point, a column per task."""
    columns = _columns(spec)
    named = any(spec.lines)
    lines = [
        "| " + " | ".join([*([""] if named else []), spec.axis, *columns]) + " |",
        "| " + " | ".join(["---"] * (len(columns) + 1 + named)) + " |",
    ]
    for line in spec.lines:
        for point in spec.points:
            cells = []
            for task in columns:
                scores = found.get((line, point, task))
                cells.append("" if scores is None else spread(scores))
            lines.append("| " + " | ".join([*([line] if named else []), point, *cells]) + " |")
    return "\n".join(lines) + "\n"


def plot(
    spec: Spec, found: Mapping[tuple[str, str, str], Sequence[float]], path: pathlib.Path
) -> None:
    """Score over the sweep's axis with the deviation over seeds, as the paper's figures 1 and 3.

    Several lines are drawn by their mean over tasks, a single one by its tasks and their mean.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    last = _columns(spec)[-1]
    if len(spec.lines) > 1:
        curves = [(line, line, last) for line in spec.lines]
    else:
        [line] = spec.lines
        curves = [(task, line, task) for task in _columns(spec)]
    numeric = len(spec.points) > 1 and page.are_numbers(list(spec.points))
    places = [float(point) for point in spec.points] if numeric else list(range(len(spec.points)))
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for label, line, task in curves:
        kept = [
            (x, found[line, point, task])
            for x, point in zip(places, spec.points, strict=True)
            if (line, point, task) in found
        ]
        if not kept:
            continue
        axes.errorbar(
            [x for x, _ in kept],
            [np.mean(s) for _, s in kept],
            [deviation(s) for _, s in kept],
            label=label,
            marker="o",
            capsize=3,
            linewidth=2.5 if task == MEAN else 1.5,
            linestyle="-" if numeric else "none",
            color="black" if task == MEAN and len(curves) > 1 and line == curves[0][1] else None,
        )
    if numeric:
        # 0 (no prompt, no adaptation) has a place on it too.
        nearest = min((abs(x) for x in places if x), default=1.0)
        axes.set_xscale("symlog", linthresh=max(nearest, 1e-9))
    axes.set_xticks(places, list(spec.points), rotation=0 if numeric else 20)
    axes.minorticks_off()
    axes.set(xlabel=spec.axis, ylabel="score", title=spec.title)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    plt.close(figure)
    checkpoint.write_atomically(path, image.getvalue())
