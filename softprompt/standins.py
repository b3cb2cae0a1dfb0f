"""Stand-ins out of the embedded data for what the paper ran on data that is not at hand."""

import json
import pathlib
import statistics

from softprompt import checkpoint
from softprompt.tasks import records, user

NAMES = tuple(records.EMBEDDED)


def by_length(name: str, folder: pathlib.Path) -> tuple[str, str]:
    """Defines the shorter and the longer half of an embedded data set as tasks.

    Both splits are cut at the median length of the training texts; the files go to `folder`.
    Returns the tasks' names.
    """
    about = records.EMBEDDED[name]
    rows = {
        split: [
            dict(row) for row in records.read(records.EMBEDDED_FOLDER / name / f"{split}.jsonl")
        ]
        for split in ("train", "validation")
    }
    middle = statistics.median(len(row["text"]) for row in rows["train"])
    tasks = []
    for half, keep in (("short", lambda n: n <= middle), ("long", lambda n: n > middle)):
        files = {}
        for split, all_rows in rows.items():
            files[split] = folder / f"{name}_{half}" / f"{split}.jsonl"
            kept = [json.dumps(row) + "\n" for row in all_rows if keep(len(row["text"]))]
            checkpoint.write_atomically(files[split], "".join(kept).encode())
        task = f"embedded_{name}_{half}"
        user.define_task(
            task, files["train"], files["validation"], template=about.template, labels=about.labels
        )
        tasks.append(task)
    return tasks[0], tasks[1]
