"""`softprompt reproduce`: a table or figure of Lester et al. 2021 on the backbone and data at hand.

The runs of a plan (`experiments`) are those of `sweep`, `transfer`, `members` and `voting`, so a
stopped command goes on where it was. What they leave is set beside the figures that the paper
prints (`published`).
"""

from collections.abc import Callable, Iterator
from typing import Any

from softprompt import (
    checkpoint,
    compare,
    config,
    members,
    needs,
    planning,
    portrait,
    sweep,
    transfer,
)
from softprompt.experiments import (
    COUNTS,
    ENSEMBLE,
    PORTRAIT,
    SWEEP,
    TRANSFER,
    Bindings,
    Options,
    Plan,
    plan,
)
from softprompt.logbook import say, size


def describe(planned: Plan) -> Iterator[str]:
    """What would run, what could not, and, unless all is there, what it needs: it is measured."""
    yield f"{planned.name}: {planned.experiment.title}. The paper: {planned.experiment.paper}."
    yield from (f"reduced: {text}" for text in planned.reduced)
    yield from (f"run: {text}" for text in planned.runs)
    yield from (f"cannot be run: {text}" for text in planned.missing)
    there = [path for path in planned.done if path.exists()]
    for path in there:  # Refused now, as by the run.
        checkpoint.read_object(path)
    left = len(planned.done) - len(there)
    if planned.done:
        yield f"{len(planned.done)} results, {left} still to be made, in {planned.folder}"
    for group in planned.groups if left else ():
        cost = needs.of(group)
        together = f" with {group.together} at once" if group.together > 1 else ""
        alone = ", as if one after another" if group.together > 1 else ""
        yield (
            f"needs: {group.runs} x {group.name}, {size(cost.peak)} per device at the peak"
            f"{together}, about {cost.hours:.2g} hours of training in all{alone} "
            f"({cost.seconds_per_step:.3g} s a step by {needs.STEPS} measured ones, "
            f"{cost.train_steps} steps; evaluation and compilation come to it)"
        )


def run(name: str, options: Options, plan_only: bool = False) -> bool:
    """Says the plan, runs it, and writes `reproduce.md` and `.csv` beside the paper's figures.

    Returns False if SIGTERM stopped it; the same command goes on.
    """
    planned = plan(name, options)
    for line in describe(planned):
        say(line)
    if plan_only:
        return True
    doing: dict[str, Callable[[Plan], bool]] = {
        SWEEP: lambda p: sweep.sweep(p.files, p.bindings),
        PORTRAIT: lambda p: sweep.sweep(p.files, p.bindings),
        TRANSFER: lambda p: transfer.transfer(p.files, p.bindings),
        ENSEMBLE: _run_ensembles,
        COUNTS: lambda p: True,
    }
    kind = planned.experiment.kind
    if not doing[kind](planned):
        return False
    measured = {
        SWEEP: lambda: compare.of_summary(planned.folder, ("line", "point", "task")),
        PORTRAIT: lambda: compare.of_summary(planned.folder, ("line", "point", "task")),
        TRANSFER: lambda: compare.of_summary(
            planned.folder, ("source", "target", "figure", "method")
        ),
        ENSEMBLE: lambda: compare.of_ensembles(planned.folder, list(planned.tasks)),
        COUNTS: compare.counts,
    }[kind]()
    more: list[str] = []
    if kind == PORTRAIT:
        runs = [str(path.parent) for path in planned.done]
        more = portrait.run(
            runs, options.backbones[0], planned.folder / "analysis", options.vocabulary_file
        )
    if kind == COUNTS:
        more = compare.methods()
    form = "reduced" if options.small and kind != COUNTS else "the paper's settings"
    if options.bindings and form != "reduced":
        form += " but for what was given"
    about: dict[str, Any] = {
        "title": f"{planned.experiment.title} ({name})",
        "backbone": ", ".join(options.backbones) if kind != COUNTS else "T5 1.1, shapes alone",
        "form": form,
        "reduced": planned.reduced,
        "given": [f"{name}={value}" for name, value in options.bindings],
        "missing": planned.missing,
    }
    say(compare.write(name, planned.folder, about, measured, more))
    return True


def _run_ensembles(planned: Plan) -> bool:
    """Trains each task's population, then lets its prompts vote."""
    model = planned.files[0]
    for task, own in planned.tasks.items():
        say(f"--- {task}")
        if not members.run(planned.files, [*planned.bindings, *own]):
            say(f"stopped during {task}; the same command goes on from here")
            return False
        _vote(model, task, planned, own)
    return True


def _vote(model: str, task: str, planned: Plan, own: Bindings) -> None:
    """Evaluates the prompts of a task together, unless that was done since they were last saved.

    A vote of other prompts, or by other settings, is replaced.
    """
    folder = planned.folder / task
    config.parse(planned.files, [*planned.bindings, *own, ("MODEL_DIR", repr(str(folder)))])
    macros = config.macros()
    # Of this plan's members: the folder may hold those of another one.
    names = [members.name_of(member) for member in members.plan(macros)]
    prompts = [folder / "prompts" / name / "prompts" / "best.safetensors" for name in names]
    prompts = [path for path in prompts if path.exists()]  # One that diverged left none.
    settings = {name: macros[of] for name, of in transfer.CARRIED.items()}
    settings |= {
        "MIXTURE_OR_TASK_NAME": task,
        "PROMPT_FILES": [str(path) for path in prompts],
        "EVAL_OUTPUT_DIR": str(folder / "ensemble"),
    }
    config.parse(
        [model, "runs/prompt_ensemble.gin"], [(name, repr(v)) for name, v in settings.items()]
    )
    evaluation = planning.Run("", "ensemble", task, 0, [], folder / "ensemble")
    result = evaluation.folder / "result.json"
    found = checkpoint.read_object(result) if result.exists() else {}
    alike = found.get("configuration") == planning.identity()
    if not alike or any(p.stat().st_mtime > result.stat().st_mtime for p in prompts):
        result.unlink(missing_ok=True)
        planning.do(evaluation, "eval")
