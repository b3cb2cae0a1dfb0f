"""A prompt's portrait, `softprompt analyse`: lines, JSON and a picture of what `analysis` finds."""

import io
import json
import os
import pathlib
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from softprompt import analysis, checkpoint
from softprompt.similarity import unit

# Characters of a title, or of a name beside a heat map, in a column of the picture.
TITLE_WIDTH = 34
# Tokens are written beside positions up to this length.
NAMED_POSITIONS = 40
# Prompts that get a row of their own in the picture; the similarities show all.
ROWS = 12


def run(
    paths: Sequence[str],
    backbone: str | None = None,
    output_dir: str | os.PathLike = "softprompt_analysis",
    vocabulary_file: str | None = None,
    neighbours: int = 5,
    metric: str = "cosine",
    labels: Sequence[str] | None = None,
    initial: str | None = None,
) -> list[str]:
    """`softprompt analyse`: writes `analysis.json` and `analysis.png`; returns lines to print."""
    found = analysis.read(paths, initial)
    words = analysis.words_for(found, backbone, vocabulary_file)
    facts = analysis.analyse(found, words, neighbours, metric, labels)
    folder = pathlib.Path(output_dir)
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    checkpoint.write_atomically(folder / "analysis.json", text.encode())
    checkpoint.write_atomically(folder / "analysis.png", draw(found, facts))
    return [*summary(facts), f"{folder / 'analysis.json'} and {folder / 'analysis.png'} written"]


def summary(facts: Mapping[str, Any]) -> list[str]:
    """What `analyse` found, as lines of text."""
    lines = []
    for prompt in facts["prompts"]:
        lines.append(f"{prompt['name']}: {prompt['shape'][0]} vectors of {prompt['shape'][1]}")
        if "drift" in prompt:
            l2, cosine = prompt["drift"]["l2"], prompt["drift"]["cosine"]
            lines.append(f"  drift from the initial prompt: L2 {l2:.2f}, cosine {cosine:.2f}")
        lines += _token_lines(prompt, facts)
    names = facts["similarity"]["names"]
    if facts["backbone"] is None:
        lines.append("--backbone=PATH shows the nearest tokens in that backbone")
    if len(names) > 1:
        width = max(map(len, names))
        for kind in ("mean_prompt", "best_match"):
            lines.append(f"similarity by {kind.replace('_', ' ')} cosine")
            for name, row in zip(names, facts["similarity"][kind], strict=True):
                lines.append(f"  {name:{width}}  " + "  ".join(f"{x:5.2f}" for x in row))
    return lines


def _token_lines(prompt: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    if facts["backbone"] is None:
        return []
    lines = [f"  nearest tokens by {facts['metric']} in {facts['backbone']}"]
    for entry in prompt["positions"]:
        near = "  ".join(f"{n['token']} {n[facts['metric']]:.2f}" for n in entry["neighbours"])
        lines.append(f"  {entry['position']:4d} ({entry['norm']:.2f})  {near}")
    if prompt["cosine_among_neighbours"] is not None:
        lines.append(
            f"  neighbours of one position: mean cosine {prompt['cosine_among_neighbours']:.2f}, "
            f"random tokens {prompt['cosine_of_random_tokens']:.2f}"
        )
    for group in prompt["groups"]:
        lines.append(f"  positions {', '.join(map(str, group))} share their nearest tokens")
    for cluster in prompt["token_clusters"][:10]:
        lines.append(f"  cluster: {' '.join(cluster['tokens'])}")
    for label in prompt.get("labels", ()):
        where = ", ".join(map(str, label["positions"])) or "none"
        line = f"  label {label['label']}: among the nearest of positions {where}"
        if "persists" in label:
            kept = "persists" if label["persists"] else "lost"
            line += f"; {kept} at {label['initialised_at']} (rank {label['rank_there']})"
        lines.append(line)
    return lines


# --- picture ------------------------------------------------------------------------------------


def draw(found: Sequence[analysis.Named], facts: Mapping[str, Any]) -> bytes:
    """A PNG: similarity between prompts, then a row for every prompt.

    A row holds the cosines between the prompt's positions, and by position the vectors' norms, the
    drift from the initial prompt and the cosine with the nearest token, as far as they are known.
    """
    from matplotlib.figure import Figure

    several = len(found) > 1
    rows = min(len(found), ROWS) + several
    # Without pyplot: a notebook keeps its own way to show figures.
    figure = Figure(figsize=(15, 4.4 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False)
    if several:
        titles = {
            "mean_prompt": "cosine of the mean vectors",
            "best_match": "mean cosine with the best-matching position",
            "mean_position": "mean cosine over all pairs of positions",
        }
        for i, (kind, title) in enumerate(titles.items()):
            _heatmap(figure, axes[0][i], facts["similarity"], kind, title, named=i == 0)
    for own, prompt, entry in zip(axes[several:], found, facts["prompts"], strict=False):
        _cosines(figure, own[0], prompt)
        _by_position(own[1], prompt, entry)
        _nearest(own[2], entry, facts["metric"])
    content = io.BytesIO()
    with warnings.catch_warnings():
        # A token in a script that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def _plain(text: str) -> str:
    """A text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def _titled(ax, title: str, **labels: Any) -> None:
    """Sets a title that is broken where its column ends, and labels of axes."""
    ax.set_title(textwrap.fill(title, TITLE_WIDTH), fontsize="medium")
    ax.set(**labels)


def _heatmap(figure, ax, facts: Mapping[str, Any], kind: str, title: str, named: bool) -> None:
    matrix, numbers = np.array(facts[kind]), [str(i) for i in range(len(facts["names"]))]
    short = [n if len(n) <= TITLE_WIDTH else f"…{n[1 - TITLE_WIDTH :]}" for n in facts["names"]]
    names = [f"{_plain(n)}  {i}" for n, i in zip(short, numbers, strict=True)]
    image = ax.imshow(matrix, vmin=min(0.0, matrix.min()), vmax=1.0, cmap="viridis")
    ax.set_xticks(range(len(names)), numbers)
    # The names stand beside the first of the three alone, which needs no more room then.
    ax.set_yticks(range(len(names)), names if named else numbers, fontsize="small")
    if len(names) <= 12:
        middle = (1 + min(0.0, matrix.min())) / 2
        for (i, j), value in np.ndenumerate(matrix):
            color = "black" if value > middle else "white"
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontsize="small")
    _titled(ax, title)
    figure.colorbar(image, ax=ax, shrink=0.8)


def _cosines(figure, ax, prompt: analysis.Named) -> None:
    rows = unit(prompt.array)
    image = ax.imshow(rows @ rows.T, vmin=-1, vmax=1, cmap="RdBu_r")
    _titled(ax, f"{_plain(prompt.name)}: cosines between positions", xlabel="position")
    ax.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=ax, shrink=0.8)


def _by_position(ax, prompt: analysis.Named, entry: Mapping[str, Any]) -> None:
    places = range(len(prompt.array))
    ax.plot(places, [p["norm"] for p in entry["positions"]], ".-", label="norm")
    if prompt.initial is not None:
        ax.plot(places, np.linalg.norm(prompt.initial, axis=1), ".--", label="norm at the start")
        ax.plot(places, [p["drift"]["l2"] for p in entry["positions"]], ".-", label="drift (L2)")
    _titled(ax, f"{_plain(prompt.name)}: vectors", xlabel="position", ylim=(0, None))
    ax.legend(fontsize="small")
    ax.grid(alpha=0.3)


def _nearest(ax, entry: Mapping[str, Any], metric: str) -> None:
    positions = entry["positions"]
    if "neighbours" not in positions[0]:
        ax.axis("off")
        ax.text(0.5, 0.5, "no backbone given: no nearest tokens", ha="center", va="center")
        return
    values = [p["neighbours"][0][metric] for p in positions]
    ax.barh(range(len(values)), values, color="tab:blue")
    ax.invert_yaxis()
    if len(values) <= NAMED_POSITIONS:
        names = [_plain(p["neighbours"][0]["token"]) for p in positions]
        ax.set_yticks(range(len(names)), names, fontsize="small")
    _titled(ax, f"{_plain(entry['name'])}: nearest token", xlabel=metric)
    ax.grid(alpha=0.3, axis="x")
