"""Sweeps: one binary over points, lines, tasks and seeds, to a table and a plot.

A sweep is a gin file that names its points; gin/sweeps/ holds the paper's ablations. Every run is
the run that `softprompt train` (or `baseline`) gives with the point's own files and bindings, in a
folder of its own; finished ones are kept, an interrupted one goes on from its checkpoint.
"""

import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from softprompt import (
    checkpoint,
    config,
    content,
    data,
    launch,
    page,
    provenance,
    report,
    selection,
)
from softprompt import train as training
from softprompt.logbook import duration, say
from softprompt.report_many import folder_name
from softprompt.settings import are_texts, check_kinds, check_path
from softprompt.tasks import sources

BINARIES = ("train", "baseline")
# The macro that names a binary's output folder.
OUTPUT = {"train": "MODEL_DIR", "baseline": "EVAL_OUTPUT_DIR", "eval": "EVAL_OUTPUT_DIR"}
# Macros that say which runs there are and where they go: a finished run holds in a larger plan too.
PLAN = (
    *("SWEEP_DIR", "TITLE", "AXIS", "POINTS", "LINES", "TASKS", "SEEDS"),
    *("TRANSFER_DIR", "SOURCES", "TARGETS", "TARGET_SPLIT", "METHODS"),
    *set(OUTPUT.values()),
)
MEAN = "mean"
Settings = Mapping[str, Sequence[str]]


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
    points: Settings
    lines: Settings
    tasks: Settings
    seeds: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Run:
    """One combination, the gin files and bindings that make it, and its folder.

    What flags say goes over the settings `of_task`, not over the others.
    """

    line: str
    point: str
    task: str
    seed: int
    settings: Sequence[str]
    folder: pathlib.Path
    of_task: Sequence[str] = ()

    def __str__(self) -> str:
        names = [self.line, self.point, self.task, f"seed {self.seed}"]
        return ", ".join(name for name in names if name)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a finished run left: its figures, their mean, and how many seconds it took.

    Of a run that was stopped and went on they are those of its last part.
    """

    run: Run
    score: float
    figures: Mapping[str, float]
    seconds: float
    diverged: bool = False


def read(macros: Mapping[str, Any]) -> Spec:
    """The sweep that gin macros describe; what is missing or malformed is an error naming it."""
    needed = ("SWEEP_DIR", "TITLE", "AXIS", "POINTS", "LINES", "TASKS", "SEEDS")
    if missing := [name for name in needed if macros.get(name) is None]:
        raise ValueError(f"a sweep needs {', '.join(missing)}; include a sweeps/*.gin")
    points, lines, tasks = (settings_of(k, macros[k]) for k in ("POINTS", "LINES", "TASKS"))
    seeds = seeds_of(macros["SEEDS"])
    named = {k: v for k, v in macros.items() if isinstance(v, str | os.PathLike)}

    def filled(settings: Settings) -> Settings:
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


def settings_of(name: str, value: Any) -> Settings:
    """`value`, which must map names to lists of gin files and bindings; else an error.

    Names come back as text; each must have a folder of its own.
    """
    if not isinstance(value, Mapping) or not value or not all(map(are_texts, value.values())):
        raise ValueError(
            f"{name} is {value!r}, expected {{'a name': ['file.gin', 'NAME=value', …], …}}"
        )
    check_folders(name, map(str, value))
    return {str(own): settings for own, settings in value.items()}


def check_folders(what: str, names: Iterable[str]) -> None:
    """Raises where a name cannot be a folder's, or two of them have the same folder."""
    folders: dict[str, str] = {}
    for name in names:
        folder = folder_name(name)
        if folder in (".", ".."):
            raise ValueError(f"{what} has the name {name!r}, expected one that a folder can have")
        if folder in folders:
            raise ValueError(
                f"{what} has the names {folders[folder]!r} and {name!r}, which share the folder "
                f"{folder!r}: expected names that differ in more than punctuation"
            )
        folders[folder] = name


def seeds_of(value: Any) -> Sequence[int]:
    """`value`, which must be a list of integers; else an error."""
    good = isinstance(value, Sequence) and all(type(s) is int for s in value)
    if not good or not value or len(set(value)) < len(value):
        raise ValueError(f"SEEDS is {value!r}, expected different integers such as [0, 1, 2]")
    return value


def runs(spec: Spec) -> Iterator[Run]:
    """All runs, a whole seed before the next: an unfinished sweep already shows every point."""
    for seed in spec.seeds:
        for task, of_task in spec.tasks.items():
            for point, of_point in spec.points.items():
                for line, of_line in spec.lines.items():
                    names = [folder_name(n) for n in (line, point, task) if n]
                    folder = spec.folder.joinpath("runs", *names, str(seed))
                    settings = [*of_line, *of_point, f"MIXTURE_OR_TASK_NAME={task}", f"SEED={seed}"]
                    yield Run(line, point, task, seed, settings, folder, of_task)


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
    config.parse(files, _known(bindings), search_paths)
    spec = read(config.macros())
    planned = list(runs(spec))
    known = set()
    if strict:
        check_free(bindings, LINES=spec.lines, POINTS=spec.points)
    for run in planned:
        configure(run, files, bindings, search_paths)
        known |= set(config.macros())
        _check_task(run)
    check_known(bindings, known)
    outcomes, spent = [], []
    with data.keeping_records():
        for number, run in enumerate(planned, 1):
            binary = configure(run, files, bindings, search_paths)
            if found := finished(run):
                _check_figures(found)
                outcomes.append(found)
                continue
            left = ""
            if spent:
                left = f", about {duration(np.mean(spent) * (len(planned) - number + 1))} left"
            say(f"--- run {number}/{len(planned)}: {run}{left}")
            outcome = do(run, binary)
            training.clear_caches()
            if outcome is None:
                say(f"stopped during {run}; the same command goes on from here")
                return False
            _check_figures(outcome)
            outcomes.append(outcome)
            spent.append(outcome.seconds)
            write(spec, outcomes)
    table = write(spec, outcomes)
    say(f"{table}\n{len(outcomes)} runs in {spec.folder}: report.html, results.csv, plot.png")
    return True


def _check_task(run: Run) -> None:
    """Raises where the run in force has no such task, split or local data."""
    macros = config.macros()
    try:
        tasks = content.tasks(macros)
        if macros["BINARY"] == "train":
            check_split(tasks, "train")
        if held_out := [task for task in tasks if macros["EVAL_SPLIT"] in task.splits]:
            check_split(held_out, macros["EVAL_SPLIT"])
    except ValueError as error:
        raise ValueError(f"{run}: {error}") from None
    if not held_out:
        raise ValueError(
            f"{run} evaluates nothing (EVAL_SPLIT is {macros['EVAL_SPLIT']!r}): a sweep compares "
            f"figures"
        )


def check_split(tasks: Iterable[Any], split: str) -> None:
    """Raises where a task lacks the split, or its data that only a local folder can have."""
    for task in tasks:
        data.check_split(task, split)
        sources.check_local(task.name, split)


def _check_figures(outcome: Outcome) -> None:
    if not outcome.figures and not outcome.diverged:
        raise ValueError(f"{outcome.run} evaluated nothing (EVAL_SPLIT): a sweep compares figures")


def check_known(bindings: Sequence[tuple[str, str]], known: Collection[str]) -> None:
    """Raises where a binding names a macro that is not among those that the runs know."""
    if odd := [name for name, _ in bindings if "." not in name and name not in known]:
        raise ValueError(f"--gin.{odd[0]}: no run of this sweep knows the name {odd[0]!r}")


def check_free(bindings: Sequence[tuple[str, str]], **plan: Settings) -> None:
    """Raises where a binding names what SEEDS, or all settings of one of `plan`, set for each run.

    What only some of them set, such as the steps of one method, is free for the others.
    """
    takers = {"SEED": "SEEDS"}
    for who, settings in plan.items():
        names = [{s.split("=", 1)[0] for s in own if "=" in s} for own in settings.values()]
        takers |= dict.fromkeys(set.intersection(*names), who)
    for name, _ in bindings:
        if name in takers:
            raise ValueError(
                f"--gin.{name}: {takers[name]} sets {name} for every run; give --gin."
                f"{takers[name]} in its place"
            )


def configure(run: Run, files, bindings, search_paths) -> str:
    """Makes gin's configuration that of the run; returns the binary that it configures."""
    every = [*run.settings, *run.of_task]
    extra = [s for s in every if s.endswith(".gin") and "=" not in s]
    if bad := [s for s in every if s not in extra and "=" not in s]:
        raise ValueError(f"{run}: {bad[0]!r} is neither a .gin file nor NAME=value")
    own, of_task = (
        [(name, value) for name, equals, value in (s.partition("=") for s in part) if equals]
        for part in (run.settings, run.of_task)
    )
    # What the command line says holds for every run that knows the name: over the files and what
    # suits a task, but not over the points.
    given = {name for name, _ in bindings}
    own += [pair for pair in of_task if pair[0] not in given]
    files = [*files, *extra]
    config.parse(files, (), search_paths, complete=False)
    bindings = [*_known(bindings), *own]
    config.parse(files, bindings, search_paths, complete=False)
    binary = config.macros()["BINARY"]
    if binary not in BINARIES:
        raise ValueError(f"{run}: BINARY is {binary!r}, expected one of {', '.join(BINARIES)}")
    config.parse(files, [*bindings, (OUTPUT[binary], str(run.folder))], search_paths)
    return binary


def _known(bindings: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those whose names the configuration has."""
    return [(name, value) for name, value in bindings if "." in name or name in config.macros()]


def identity() -> str:
    """A digest of the configuration and of what it reads, less the plan and where it is written."""
    return _identity(content.of(config.macros()))


def _identity(read: Mapping[str, str | None]) -> str:
    lines = [*_lines(config.operative(), content.elsewhere(read)), json.dumps(read, sort_keys=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _lines(text: str, without: Collection[str] = ()) -> list[str]:
    """A configuration's lines, but for the plan's, those of where it is written, and `without`."""
    kept, keep = [], True
    for line in text.splitlines():
        if not line.startswith(" "):  # Else it goes on with the binding above it.
            keep = line.split(" = ")[0] not in {*PLAN, *without}
        if keep:
            kept.append(line)
    return kept


def _settings(text: str, without: Collection[str] = ()) -> dict[str, str]:
    """The bindings among a configuration's `_lines`, long ones joined."""
    joined = re.sub(r"(?: \\)?\n +", " ", "\n".join(_lines(text, without)))
    pairs = (line.partition(" = ") for line in joined.splitlines())
    return {name: value.strip() for name, equals, value in pairs if equals}


def finished(run: Run) -> Outcome | None:
    """What a run left that was done under the configuration in force; None where it was not."""
    path = run.folder / "result.json"
    if not path.exists():
        return None
    found = checkpoint.read_object(path)
    read = content.of(config.macros())
    if found.get("configuration") != _identity(read):
        before = run.folder / "config.gin"
        apart = content.elsewhere(read)
        was = _settings(before.read_text(encoding="utf-8"), apart) if before.is_file() else {}
        differ = checkpoint.differences(was, _settings(config.operative(), apart)) if was else []
        differ += [
            f"the content of {said}"
            for said in checkpoint.differences(found.get("content", {}), read)
        ]
        raise ValueError(
            f"{str(run.folder)!r} was made by another configuration than {run} has now "
            f"({'; '.join(differ[:4]) or 'its config.gin does not tell'}); give the same settings "
            f"and data to go on, use another output folder, or delete that one"
        )
    score = math.nan if found["score"] is None else found["score"]
    return Outcome(run, score, found["figures"], found["seconds"], found.get("diverged", False))


def do(run: Run, binary: str) -> Outcome | None:
    """Does one run; None if it was interrupted. A diverged one has no figures, and no score."""
    read = content.of(config.macros())
    ours = _identity(read)
    best_metric = config.macros().get("BEST_METRIC")
    began = time.monotonic()
    figures: Mapping[str, float]
    diverged = False
    try:
        with config.errors():
            found = config.configured(getattr(launch, binary))()
    except training.Diverged as error:
        say(f"{run}: {error}")
        report.attempt(run.folder)
        figures, diverged = {}, True
    except ValueError as error:
        raise ValueError(f"{run}: {error}") from None
    else:
        if binary == "train" and found.interrupted:
            return None
        figures = found.metrics if binary == "train" else found
    score = selection.choose_metric(figures, best_metric) if figures else None
    seconds = time.monotonic() - began
    record = {
        "score": score, "figures": figures, "seconds": seconds, "configuration": ours,
        "content": read, "diverged": diverged,
    }  # fmt: skip
    checkpoint.write_atomically(run.folder / "result.json", json.dumps(record, indent=2).encode())
    return Outcome(run, math.nan if score is None else score, figures, seconds, diverged)


# --- results ------------------------------------------------------------------------------------


def summary(spec: Spec, outcomes: Sequence[Outcome]) -> dict[tuple[str, str, str], list[float]]:
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


def write(spec: Spec, outcomes: Sequence[Outcome]) -> str:
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
