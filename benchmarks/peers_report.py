"""The tables of `peers.py`, in Markdown."""

import statistics

# Ours, the other, and the ratio to reach.
RATIOS = (
    (("ours", "train", "buckets"), ("t5x", "train", "512"), "4.5"),
    (("ours", "train", "packed"), ("t5x", "train", "512"), "4.5"),
    (("ours", "train", "buckets"), ("t5x", "train", "128"), "–"),
    (("ours", "train", "buckets"), ("peft", "train", "longest"), "1.5, WiC 1.2"),
    (("ours", "train", "packed"), ("peft", "train", "longest"), "1.5, WiC 1.2"),
    (("ours", "train", "buckets"), ("peft", "train", "512"), "–"),
    (("ours", "decode", "buckets"), ("t5x", "decode", "512"), "5"),
    (("ours", "decode", "buckets"), ("peft", "decode", "sorted"), "1.3"),
    (("ours", "rank", "buckets"), ("ours", "decode", "buckets"), "1"),
    (("bf16", "train", "buckets"), ("peft_bf16", "train", "longest"), "–"),
    (("bf16", "decode", "buckets"), ("peft_bf16", "decode", "sorted"), "–"),
    (("int8", "train", "buckets"), ("peft", "train", "longest"), "–"),
    (("int8", "decode", "buckets"), ("peft", "decode", "sorted"), "–"),
)
# Other goals on a GPU.
GPU_GOALS = {"1.5, WiC 1.2": "2", "1.3": "3"}


def filled(kept: dict) -> str:
    """Share of the positions that are no padding."""
    return f"{100 * kept['filled'] / kept['positions']:.0f}% full"


def _table(*header: str) -> list[str]:
    return ["", "| " + " | ".join(header) + " |", "| --- |" + " --- |" * (len(header) - 1)]


def report(found: dict, tasks: list[str]) -> list[str]:
    """Of a record: absent peers, medians of the rates and of the ratios within a repetition."""
    about, details = found["machine"], found["details"]
    gpu = f"{about['gpu']}; " if "gpu" in about else ""
    cpu = f"{about['cpu']}, {about['cores']} cores"
    load = f"load average {about['load_average']} at the start"
    lines = [f"{gpu}{cpu}, {load}, Python {about['python']}.", ""]
    lines += [f"{name}: {x}." for name, x in found["settings"].items() if name.startswith("pack")]
    lines += [f"{peer}: {why}." for peer, why in found["missing"].items()]
    results = {task: found["results"].get(task, {}) for task in tasks}
    lines += _table("examples/s", *tasks)
    for name in dict.fromkeys(name for of_task in results.values() for name in of_task):
        cells = []
        for task in tasks:
            kept = results[task].get(name, {"rates": []})
            if not kept["rates"]:
                cells.append("–")
                continue
            cell = f"{statistics.median(kept['rates']):.2f} ({filled(kept)}"
            if kept["shares"]:
                cell += f", {100 * statistics.median(kept['shares']):.0f}% of peak"
            cells.append(cell + ")")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += _table("ratio", "goal", *tasks)
    for one, other, goal in RATIOS:
        names = " ".join(one), " ".join(other)
        cells = []
        for task in tasks:
            rates = [results[task].get(name, {"rates": []})["rates"] for name in names]
            # Of the repetitions that both have: an interruption may lie between.
            ratios = [a / b for a, b in zip(*rates, strict=False)]
            cells.append(f"{statistics.median(ratios):.2f}" if ratios else "–")
        if set(cells) != {"–"}:
            goal = GPU_GOALS.get(goal, goal) if gpu else goal
            lines.append(f"| {names[0]} / {names[1]} | {goal} | " + " | ".join(cells) + " |")
    if not details:
        return lines
    lines += _table("RTE", "first step, s", "checkpoint, MB", "blocks, s", "peak memory, GB")
    for side, found in details.items():
        if "checkpoint_bytes" in found:
            lines.append(
                f"| {side} | {found['first_step']:.1f} | {found['checkpoint_bytes'] / 1e6:.2f} | "
                f"{found['checkpoint_seconds']:.3f} | {found['peak_memory'] / 1e9:.2f} |"
            )
        else:
            cells = ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in found.items())
            lines.append(f"| {side} | {cells} | | | |")
    return lines
