"""The vote of a population's prompts, a run of a plan: what configures it, whether it is done."""

import csv
import pathlib
from collections.abc import Sequence

from softprompt import checkpoint, config, members, planning, population, transfer


def vote_of(
    files: Sequence[str], bindings: Sequence[tuple[str, str]], folder: pathlib.Path, task: str
) -> tuple[planning.Run, list[pathlib.Path], bool]:
    """Makes gin's configuration that of evaluating together the prompts that a population left.

    These too, and whether all are there that did not diverge. `files`, the model's first, and
    `bindings` are those of the population in `folder`.
    """
    config.parse(files, [*bindings, ("MODEL_DIR", repr(str(folder)))])
    macros = config.macros()
    # Of this plan's members: the folder may hold those of another one.
    names = [members.name_of(member) for member in members.plan(macros)]
    prompts = [folder / "prompts" / name / "prompts" / "best.safetensors" for name in names]
    ranking = folder / "prompts" / "population.csv"
    rows = csv.DictReader(ranking.read_text().splitlines()) if ranking.exists() else ()
    diverged = {row["name"] for row in rows if row["status"] == population.DIVERGED}
    whole = all(path.exists() or path.parts[-3] in diverged for path in prompts)
    prompts = [path for path in prompts if path.exists()]
    settings = {name: macros[of] for name, of in transfer.CARRIED.items()}
    settings |= {
        "MIXTURE_OR_TASK_NAME": task,
        "PROMPT_FILES": [str(path) for path in prompts],
        "EVAL_OUTPUT_DIR": str(folder / "ensemble"),
    }
    config.parse(
        [files[0], "runs/prompt_ensemble.gin"],
        [(name, repr(v)) for name, v in settings.items()],
    )
    return planning.Run("", "ensemble", task, 0, [], folder / "ensemble"), prompts, whole


def is_voted(evaluation: planning.Run, prompts: Sequence[pathlib.Path], whole: bool) -> bool:
    """Whether all prompts were evaluated together, as configured, since they were last saved.

    What they were trained by only their own runs compare.
    """
    result = evaluation.folder / "result.json"
    if not whole or not result.exists():
        return False
    alike = checkpoint.read_object(result).get("configuration") == planning.identity()
    return alike and all(p.stat().st_mtime <= result.stat().st_mtime for p in prompts)
