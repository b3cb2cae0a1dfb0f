"""Domain transfer: train on one task, evaluate on others as is (Lester et al. 2021, section 5).

Every method (prompt tuning, model tuning, …) trains on every source with every seed, each as a run
of `sweep`, and what it trained is evaluated on every target by `softprompt eval`. What is finished
is kept; an interrupted training goes on from its checkpoint.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from softprompt import checkpoint, config, data, planning, provenance, report, signals, sweep
from softprompt.logbook import say
from softprompt.report import NAME as REPORT
from softprompt.report_many import folder_name
from softprompt.settings import import_modules

# What an evaluation takes over from the training, by its own names.
CARRIED = {
    "BATCH_SIZE": "EVAL_BATCH_SIZE",
    **{
        name: name
        for name in (
            "INITIAL_CHECKPOINT_PATH", "VOCABULARY_FILE", "DTYPE", "TASK_FEATURE_LENGTHS",
            "MIXTURE_OR_TASK_MODULE", "EVAL_MODE", "WEIGHTS", "DATA_PARTITIONS", "MODEL_PARTITIONS",
        )
    },
}  # fmt: skip
EVAL_FILES = ("models/t5.gin", "runs/prompt_eval.gin")


@dataclasses.dataclass(frozen=True)
class Spec:
    """What runs/transfer.gin names.

    Attributes:
      folder: TRANSFER_DIR, where everything goes.
      sources, targets: seqio tasks or mixtures; every source is evaluated on every target.
      split: of the targets.
      methods: name -> settings, each a gin file or a binding `NAME=value`.
      seeds: of every training.
    """

    folder: pathlib.Path
    sources: Sequence[str]
    targets: Sequence[str]
    split: str
    methods: planning.Settings
    seeds: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of one evaluation: `method` trained on `source` with `seed`, judged on `target`."""

    method: str
    source: str
    target: str
    name: str
    seed: int
    value: float = dataclasses.field(compare=False)


def read(macros: Mapping[str, Any]) -> Spec:
    """The transfer that gin macros describe; what is missing or malformed is an error naming it."""
    needed = ("SOURCES", "TARGETS", "METHODS", "SEEDS", "TARGET_SPLIT")
    if missing := [name for name in needed if macros.get(name) is None]:
        raise ValueError(f"a transfer needs {', '.join(missing)}; include runs/transfer.gin")
    if not isinstance(macros.get("TRANSFER_DIR"), str):
        raise ValueError("a transfer needs TRANSFER_DIR; give --gin.TRANSFER_DIR=…")
    tasks = {}
    for name in ("SOURCES", "TARGETS"):
        value = [macros[name]] if isinstance(macros[name], str) else macros[name]
        good = isinstance(value, list | tuple) and all(isinstance(x, str) for x in value)
        if not good or not value or len(set(value)) < len(value):
            raise ValueError(
                f"{name} is {macros[name]!r}, expected different task names, such as ['squad']"
            )
        planning.check_folders(name, value)
        tasks[name] = value
    return Spec(
        pathlib.Path(macros["TRANSFER_DIR"]),
        tasks["SOURCES"],
        tasks["TARGETS"],
        macros["TARGET_SPLIT"],
        planning.settings_of("METHODS", macros["METHODS"]),
        planning.seeds_of(macros["SEEDS"]),
    )


def runs(spec: Spec) -> Iterator[planning.Run]:
    """The trainings, a whole seed before the next: an unfinished table already has every row."""
    for seed in spec.seeds:
        for source in spec.sources:
            for method, own in spec.methods.items():
                settings = [f"MIXTURE_OR_TASK_NAME={source}", *own, f"SEED={seed}", "BINARY=train"]
                folder = spec.folder.joinpath(
                    "runs", folder_name(method), folder_name(source), str(seed)
                )
                yield planning.Run(method, "", source, seed, settings, folder)


def transfer(
    files: Sequence[str],
    bindings: Sequence[tuple[str, str]] = (),
    search_paths: Sequence[str] = (),
) -> bool:
    """Runs what is not finished yet, and writes results after every training's evaluations.

    Writes `results.csv` (a row per figure and seed), `summary.csv` and `table.md` (mean and sample
    standard deviation over seeds) and `report.html` to TRANSFER_DIR. Returns False if SIGTERM
    stopped it.
    """
    config.parse(files, bindings, search_paths, complete=False)
    spec, modules = read(config.macros()), config.macros()["MIXTURE_OR_TASK_MODULE"]
    planning.check_free(bindings, METHODS=spec.methods)
    planned = list(runs(spec))
    planning.check_taken(planned, files, bindings, search_paths)
    for run in planned:  # A method's mistake is found before another one has trained.
        planning.configure(run, files, bindings, search_paths)
    check_tasks(spec, modules)
    figures: dict[Figure, None] = {}
    for trained, _ in planning.outcomes(planned, files, bindings, search_paths, "training"):
        if trained is None:
            return False
        macros = config.macros()
        # A training that diverged has nothing to evaluate: its cells stay empty.
        if not trained.diverged:
            for target in spec.targets:
                # A task that is a target twice, by itself and in a mixture, counts once.
                figures |= dict.fromkeys(evaluated(trained.run, target, spec.split, macros))
        write(spec, list(figures))
    say(write(spec, list(figures)))
    say(f"{len(planned)} trainings in {spec.folder}: results.csv, summary.csv, table.md, {REPORT}")
    return True


def check_tasks(spec: Spec, modules: str | Sequence[str] | None) -> None:
    """Raises, before anything trains, where a task is unknown, lacks a split or local data."""
    import_modules(modules)
    for names, split in ((spec.sources, "train"), (spec.targets, spec.split)):
        for name in names:
            planning.check_split((task for task, _ in data.get_tasks(name)), split)


def evaluation_of(
    run: planning.Run, target: str, split: str, macros: Mapping[str, Any]
) -> planning.Run:
    """Makes gin's configuration that of evaluating what a training left on a target.

    `macros` are those of the training.
    """
    prompt = run.folder / "prompts" / "best.safetensors"
    settings = {name: macros[of] for name, of in CARRIED.items()}
    settings |= {"MIXTURE_OR_TASK_NAME": target, "SPLIT": split}
    settings["PROMPT_FILE"] = str(prompt) if prompt.exists() else None
    backbone = run.folder / "backbone"
    if not prompt.exists() and not backbone.exists():
        raise ValueError(
            f"{run} is finished, but neither {str(prompt)!r} nor {str(backbone)!r} is there to "
            f"evaluate; delete {str(run.folder)!r} to train it again"
        )
    if backbone.exists():
        settings["INITIAL_CHECKPOINT_PATH"] = str(backbone)
        if prompt.exists():  # It names the backbone that both were trained from.
            settings["IGNORE_FINGERPRINT"] = True
    folder = run.folder / "transfer" / folder_name(target)
    settings["EVAL_OUTPUT_DIR"] = str(folder)
    config.parse(EVAL_FILES, [(name, repr(value)) for name, value in settings.items()])
    return dataclasses.replace(run, point=f"evaluated on {target}", folder=folder)


def evaluated(
    run: planning.Run, target: str, split: str, macros: Mapping[str, Any]
) -> list[Figure]:
    """Figures of what a training left on a target, from its folder or by evaluating it now."""
    evaluation = evaluation_of(run, target, split, macros)
    outcome = planning.finished(evaluation)
    if outcome is None:
        say(f"--- {evaluation}")
        outcome = planning.do(evaluation, "eval")
        signals.clear_caches()
    found = []
    for name, value in outcome.figures.items():
        task, slash, metric = name.rpartition("/")
        if metric != "illegal":
            found.append(
                Figure(run.line, run.task, task if slash else target, metric, run.seed, value)
            )
    return found


# --- results ------------------------------------------------------------------------------------


def write(spec: Spec, figures: Sequence[Figure]) -> str:
    """Writes the results' files; returns the table."""
    header = ("method", "source", "target", "figure", "seed", "value")
    rows = [(f.method, f.source, f.target, f.name, f.seed, f"{f.value:.2f}") for f in figures]
    checkpoint.write_atomically(spec.folder / "results.csv", sweep.as_csv(header, rows))
    header = ("source", "target", "figure", "method", "mean", "standard_deviation", "seeds")
    rows = [
        (*row, method, f"{np.mean(x):.2f}", sweep.deviation_cell(x), len(x))
        for row, of_methods in summary(figures).items()
        for method, x in of_methods.items()
    ]
    checkpoint.write_atomically(spec.folder / "summary.csv", sweep.as_csv(header, rows))
    text = table(list(spec.methods), summary(figures))
    checkpoint.write_atomically(spec.folder / "table.md", text.encode())
    title = f"Transfer from {', '.join(spec.sources)}"
    provenance.write_of_many(spec.folder / "transfer.json", {"title": title})
    report.attempt(spec.folder)
    return text


def summary(figures: Sequence[Figure]) -> dict[tuple[str, str, str], dict[str, list[float]]]:
    """Values over seeds by (source, target, figure), then by method."""
    found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for f in figures:
        row = found.setdefault((f.source, f.target, f.name), {})
        row.setdefault(f.method, []).append(f.value)
    return dict(sorted(found.items(), key=lambda item: _order(figures, item[0])))


def _order(figures: Sequence[Figure], row: tuple[str, str, str]) -> tuple[int, ...]:
    """Sources, targets and figures in the order in which they first came."""
    columns = zip(*[(f.source, f.target, f.name) for f in figures], strict=True)
    return tuple(column.index(x) for column, x in zip(columns, row, strict=True))


def table(
    methods: Sequence[str], found: Mapping[tuple[str, str, str], Mapping[str, Sequence[float]]]
) -> str:
    """A Markdown table as the paper's tables 1 and 2: a row per source, target and figure.

    Δ is the difference of a method's mean to that of the first one.
    """
    later = methods[1:]
    differences = ["Δ" if len(later) == 1 else f"Δ {method}" for method in later]
    header = ["source", "target", "figure", *methods, *differences]
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join(["---"] * len(header)) + " |"]
    for row, of_methods in found.items():
        cells = list(row)
        for method in methods:
            x = of_methods.get(method)
            cells.append("" if x is None else sweep.spread(x))
        for method in later:
            both = [of_methods.get(name) for name in (method, methods[0])]
            cells.append("" if None in both else f"{np.mean(both[0]) - np.mean(both[1]):+.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
