"""Self-contained HTML pages: text escaped by construction, tables, charts as inline SVG.

A page holds no script and loads nothing: its content security policy forbids both. Colours follow
the reader's light or dark setting, and so do the charts.
"""

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any


class Html(str):
    """A text that is HTML already; every other text is escaped before it enters a page."""


def safe(value: Any) -> Html:
    """A value as HTML: escaped, unless it is `Html`."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(*parts: Any) -> Html:
    """Parts one after another, each escaped unless it is `Html`."""
    return Html("".join(safe(part) for part in parts))


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """An element; `class_` and `aria_label` are written class and aria-label. None is left out.

    >>> tag("p", "a < b", class_="note")
    '<p class="note">a &lt; b</p>'
    """
    written = "".join(
        f' {key.strip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def table(
    header: Sequence[Any], rows: Sequence[Sequence[Any]], label: str, class_: str | None = None
) -> Html:
    """A table that scrolls sideways within itself; a row's first cell names the row.

    `label` is read to those who cannot see it. Numbers are set right.
    """

    def cell(value: Any, first: bool) -> Html:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and isinstance(value, float):
            value = "–" if math.isnan(value) else f"{value:,.4g}"
        elif number:
            value = f"{value:,}"
        kind = "number" if number else None
        return (
            tag("th", value, scope="row", class_=kind) if first else tag("td", value, class_=kind)
        )

    # The heading of a column of numbers stands over them.
    first = list(rows[0]) if rows else []
    kinds = ["number" if isinstance(v, int | float) else None for v in first]
    kinds += [None] * (len(header) - len(kinds))
    names = zip(header, kinds, strict=True)
    head = tag("tr", *(tag("th", name, scope="col", class_=kind) for name, kind in names))
    body = [tag("tr", *(cell(value, not i) for i, value in enumerate(row))) for row in rows]
    whole = tag("table", tag("thead", head), tag("tbody", *body), class_=class_)
    return tag("div", whole, class_="scroll", role="region", aria_label=label, tabindex=0)


def values(named: Mapping[str, Any], label: str) -> Html:
    """A table of named values; mappings within are unfolded, lists joined, None is left out."""
    rows = []
    for name, value in named.items():
        name = name.replace("_", " ")
        if isinstance(value, Mapping):
            rows += [(f"{name}: {k}", str(v)) for k, v in value.items()]
        elif value is not None:
            listed = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            rows.append((name, listed))
    return table(("what", "value"), rows, label, "terms")


def section(title: str, *children: Any) -> Html:
    """A titled part of a page, which its list of contents can point to."""
    return tag("section", tag("h2", title), *children, id=anchor(title))


def anchor(title: str) -> str:
    """The id of the section with a title."""
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def details(title: Any, *children: Any, open_: bool = False) -> Html:
    """A part that unfolds on a click."""
    return tag("details", tag("summary", title), *children, open="" if open_ else None)


def facts(pairs: Mapping[str, Any]) -> Html:
    """The few figures that matter most, large."""
    return tag(
        "dl", *(tag("div", tag("dt", k), tag("dd", v)) for k, v in pairs.items()), class_="facts"
    )


# Per cent of colour in a cell of a confusion matrix that holds its whole row.
SHADE = 45


def matrix(names: Sequence[str], counts: Sequence[Sequence[int]], rows: Sequence[str]) -> Html:
    """A confusion matrix: a row per target, a column per prediction, shaded by the row's share."""
    head = tag(
        "tr", tag("td", "target ↓ prediction →"), *(tag("th", n, scope="col") for n in names)
    )
    body = []
    for name, row in zip(rows, counts, strict=True):
        total = max(sum(row), 1)
        cells = [
            tag(
                "td",
                f"{n:,}",
                style=f"--share:{round(SHADE * n / total)}%",
                class_="hit" if name == names[j] else "miss",
            )
            for j, n in enumerate(row)
        ]
        body.append(tag("tr", tag("th", name, scope="row"), *cells))
    whole = tag("table", tag("thead", head), tag("tbody", *body), class_="matrix")
    return tag(
        "div", whole, class_="scroll", role="region", aria_label="confusion matrix", tabindex=0
    )


# --- charts -------------------------------------------------------------------------------------

Point = tuple[float, float, float]
WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 40
LINE = 14
SERIES = 8


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that span `low` to `high`."""
    if not high > low:
        # A single value stands in the middle, with a tenth of itself around it.
        around = abs(low) / 10 or 1.0
        low, high = low - around, high + around
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def chart(
    series: Mapping[str, Sequence[Point]],
    title: str,
    x_label: str,
    y_label: str,
    places: Sequence[str] | None = None,
    mark: tuple[float, str] | None = None,
) -> Html:
    """Lines over x as a figure with its legend.

    Args:
      series: name to points (x, y, deviation); a deviation of 0 draws no bar.
      places: names of x = 0, 1, …, where x is no number. Only numbers among them are joined by
        lines.
      mark: an x to draw a line at, and what it is.
    """
    points = [p for line in series.values() for p in line if math.isfinite(p[1])]
    if not points:
        return tag("p", f"{title}: nothing was recorded.", class_="note")
    y_ticks = ticks(min(p[1] - p[2] for p in points), max(p[1] + p[2] for p in points), 4)
    if places is None:
        x_ticks = ticks(min(0.0, *(p[0] for p in points)), max(p[0] for p in points))
        x_names = [_short(x) for x in x_ticks]
    else:
        x_ticks, x_names = [float(i) for i in range(len(places))], list(places)
    pad = 0.0 if places is None else 0.5
    x_low, x_high = min(x_ticks) - pad, max(x_ticks) + pad
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def x_at(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    drawn = [_grid(list(map(y_at, y_ticks)), list(map(_short, y_ticks)))]
    axis, height = _x_axis(list(map(x_at, x_ticks)), x_names, x_label)
    drawn.append(axis)
    if mark is not None:
        at = f"{x_at(mark[0]):.1f}"
        line = tag("line", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM, class_="mark")
        drawn.append(tag("g", tag("title", mark[1]), line))
    for number, (name, line) in enumerate(series.items()):
        drawn.append(_line(name, number % SERIES, line, x_at, y_at, places))
    known = {name: [y for _, y, _ in line if math.isfinite(y)] for name, line in series.items()}
    said = f"{title}. " + " ".join(
        f"{name}: {_short(values[0])} at the start, {_short(values[-1])} at the end."
        for name, values in known.items()
        if values
    )
    picture = tag(
        "svg", *drawn, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=said,
        preserveAspectRatio="xMidYMid meet",
    )  # fmt: skip
    legend = [
        tag("li", tag("span", class_=f"swatch s{i % SERIES}", aria_hidden="true"), name)
        for i, name in enumerate(series)
    ]
    if mark is not None:
        legend.append(tag("li", tag("span", class_="swatch dashed", aria_hidden="true"), mark[1]))
    shown = tag("ul", *legend, class_="legend") if len(legend) > 1 else ""
    return tag("figure", tag("figcaption", title, tag("small", y_label)), picture, shown)


def _grid(heights: Sequence[float], names: Sequence[str]) -> Html:
    drawn = []
    for y, name in zip(heights, names, strict=True):
        drawn.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}"))
        drawn.append(tag("text", name, x=LEFT - 7, y=f"{y + 4:.1f}", text_anchor="end"))
    return tag("g", *drawn, class_="grid")


def _x_axis(widths: Sequence[float], names: Sequence[str], label: str) -> tuple[Html, int]:
    """The names under their places and the label under them; the height of the whole chart."""
    room = (WIDTH - LEFT - RIGHT) / max(len(names), 1)
    every = math.ceil((max(map(len, names), default=1) * 7 + 8) / room)
    written = [[name] for name in names]
    if every > 1 and len(names) <= 8:
        # Few and long: on several lines. Many names that would run into each other are left out.
        limit = max(int(room / 7) - 1, 3)
        written = [textwrap.wrap(name, limit) for name in names]
        every = 1
    drawn = []
    for x, lines in list(zip(widths, written, strict=True))[::every]:
        for i, line in enumerate(lines):
            y = HEIGHT - BOTTOM + 17 + LINE * i
            drawn.append(tag("text", line, x=f"{x:.1f}", y=y, text_anchor="middle"))
    height = HEIGHT + LINE * (max(map(len, written), default=1) - 1)
    middle = (LEFT + WIDTH - RIGHT) / 2
    drawn.append(tag("text", label, x=middle, y=height - 4, text_anchor="middle", class_="label"))
    return tag("g", *drawn, class_="axis"), height


def are_numbers(names: Sequence[str]) -> bool:
    """Whether every name on an axis is a number, so that the places between them mean something."""
    try:
        list(map(float, names))
    except ValueError:
        return False
    return True


def _line(name: str, number: int, line: Sequence[Point], x_at, y_at, places) -> Html:
    kept = [p for p in line if math.isfinite(p[1])]
    path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y, _ in kept)
    joined = places is None or are_numbers(places)
    drawn = [tag("polyline", points=path)] if joined else []
    for x, y, spread in kept:
        at, where = f"{x_at(x):.1f}", places[int(x)] if places else _short(x)
        if spread:
            low, high = f"{y_at(y - spread):.1f}", f"{y_at(y + spread):.1f}"
            drawn.append(tag("line", x1=at, x2=at, y1=low, y2=high))
        told = f"{name}, {where}: {_short(y)}" + (f" ± {_short(spread)}" if spread else "")
        if len(kept) <= 60 or spread:
            dot = tag("circle", tag("title", told), cx=at, cy=f"{y_at(y):.1f}", r=3)
            drawn.append(dot)
    return tag("g", *drawn, class_=f"line s{number}")


def _short(value: float) -> str:
    """A number of a chart: `1.5`, `20k`."""
    value = 0.0 if abs(value) < 1e-12 else value
    if abs(value) >= 10_000:
        return f"{value / 1000:,.4g}k"
    return f"{value:.4g}"


# --- the page -----------------------------------------------------------------------------------

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
LIGHT = ("#0b62c4", "#b83a08", "#14733a", "#7e22ce", "#b91c1c", "#0b6b83", "#8a5606", "#475569")
DARK = ("#6cb2ff", "#fb923c", "#4ade80", "#c9a0ff", "#fb8585", "#3fd0e6", "#f5cf3c", "#a3b1c6")
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 4", "12 4", "1 4", "6 2 1 2")


def _palette(colors: Sequence[str]) -> str:
    return "".join(f"--c{i}:{color};" for i, color in enumerate(colors))


_SERIES_CSS = "".join(
    f".s{i}{{--own:var(--c{i})}}.line.s{i} polyline{{stroke-dasharray:{dash}}}"
    for i, dash in enumerate(DASHES)
)

CSS = f"""
:root{{color-scheme:light dark;--back:#f6f7f9;--card:#fff;--ink:#1a2230;--soft:#515c6d;
--edge:#d9dee6;--good:#14733a;--bad:#b3261e;--code:#eef1f5;{_palette(LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{--back:#10151d;--card:#18202b;--ink:#e6eaf0;
--soft:#a7b2c2;--edge:#303b4a;--good:#5fd68b;--bad:#ff8f86;--code:#0d1219;{_palette(DARK)}}}}}
{_SERIES_CSS}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--back);color:var(--ink);overflow-wrap:anywhere;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}}
main,header{{max-width:66rem;margin:0 auto;padding:0 1rem}}
header{{padding-top:1.6rem}}
h1{{font-size:1.65rem;line-height:1.2;margin:0 0 .3rem}}
h2{{font-size:1.2rem;margin:0 0 .8rem}}h3{{font-size:1rem;margin:1.4rem 0 .5rem}}
header p,.note{{color:var(--soft);margin:.2rem 0 .8rem}}
nav ul{{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding:0;margin:.4rem 0 1rem}}
a{{color:var(--c0)}}a:focus-visible,.scroll:focus-visible,summary:focus-visible{{
outline:2px solid var(--c0);outline-offset:2px}}
section{{background:var(--card);border:1px solid var(--edge);border-radius:.6rem;
padding:1.1rem 1.2rem;margin:0 0 1rem}}
.facts{{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.7rem;
margin:0 0 1rem}}
.facts div{{background:var(--card);border:1px solid var(--edge);border-radius:.6rem;
padding:.6rem .9rem}}
dt{{color:var(--soft);font-size:.85rem}}dd{{margin:0;font-size:1.3rem;font-weight:600;line-height:1.3}}
dd small{{font-size:.85rem;font-weight:400;color:var(--soft);display:block}}
.charts{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr));gap:1rem}}
figure{{margin:0;min-width:0;max-width:38rem}}figcaption{{font-weight:600}}
figcaption small{{font-weight:400;color:var(--soft);margin-left:.5rem}}
svg{{width:100%;height:auto;display:block}}svg text{{fill:var(--soft);font-size:12px}}
.grid line{{stroke:var(--edge)}}.mark{{stroke:var(--soft);stroke-dasharray:3 3}}
.line polyline{{fill:none;stroke:var(--own);stroke-width:2;stroke-linejoin:round}}
.line line{{stroke:var(--own);stroke-width:1.5}}.line circle{{fill:var(--own)}}
.legend{{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem 1rem;padding:0;margin:.3rem 0 0;
font-size:.88rem}}
.swatch{{display:inline-block;width:1.1rem;height:.3rem;border-radius:2px;background:var(--own);
margin-right:.4rem;vertical-align:middle}}
.swatch.dashed{{background:none;height:0;border-top:2px dashed var(--soft)}}
.scroll{{overflow-x:auto;margin:.3rem 0 .8rem}}
table{{border-collapse:collapse;font-size:.92rem;min-width:min(100%,20rem)}}
th,td{{text-align:left;padding:.32rem .7rem;border-bottom:1px solid var(--edge);vertical-align:top;
overflow-wrap:break-word}}
td{{white-space:nowrap}}.texts td,.terms td,.tokens{{white-space:normal}}
thead th{{color:var(--soft);font-weight:600;white-space:nowrap}}tbody th{{font-weight:500}}
.number{{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}}
.texts{{width:100%}}.texts tbody th{{min-width:15rem;font-weight:400;white-space:pre-wrap}}
.texts td:nth-child(2),.texts td:nth-child(3){{min-width:5rem;white-space:pre-wrap}}
.matrix td{{text-align:right;font-variant-numeric:tabular-nums}}
.matrix thead td{{font-size:.8rem;color:var(--soft);white-space:nowrap}}
.matrix .hit{{background:color-mix(in srgb,var(--c0) var(--share),transparent)}}
.matrix .miss{{background:color-mix(in srgb,var(--c1) var(--share),transparent)}}
.good{{color:var(--good)}}.bad{{color:var(--bad)}}
.tokens{{min-width:17rem}}
.tokens span{{display:inline-block;background:var(--code);border-radius:.3rem;padding:0 .4rem;
margin:.08rem .25rem .08rem 0;white-space:nowrap}}
.tokens small{{color:var(--soft);margin-left:.3rem}}
.terms td{{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.85rem}}
pre{{background:var(--code);border:1px solid var(--edge);border-radius:.4rem;padding:.7rem .9rem;
margin:.3rem 0 .8rem;font:.85rem/1.45 ui-monospace,Menlo,Consolas,monospace;overflow-x:auto}}
pre.wrap{{white-space:pre-wrap}}
summary{{cursor:pointer;font-weight:600;padding:.25rem 0}}
footer{{color:var(--soft);font-size:.85rem;max-width:66rem;margin:0 auto;padding:0 1rem 1.5rem}}
@media (max-width:34rem){{section{{padding:.9rem .8rem}}main,header{{padding-left:.6rem;
padding-right:.6rem}}th,td{{padding:.3rem .5rem}}.facts{{grid-template-columns:1fr 1fr}}
h1{{font-size:1.35rem}}dd{{font-size:1.1rem}}.texts tbody th{{min-width:12rem}}
.tokens{{min-width:15rem}}}}
@media print{{body{{background:none}}section{{break-inside:avoid}}}}
"""


def document(title: str, subtitle: Any, top: Any, sections: Mapping[str, Html], foot: str) -> str:
    """A whole page: title, what stands above all sections, a list of contents, the sections."""
    contents = [tag("li", tag("a", name, href=f"#{anchor(name)}")) for name in sections]
    head = tag(
        "header",
        # A long name of words_with_underscores may break between its words.
        tag("h1", Html(safe(title).replace("_", "_<wbr>"))),
        tag("p", subtitle),
        tag("nav", tag("ul", *contents), aria_label="contents"),
    )
    body = tag("main", top, *(section(name, part) for name, part in sections.items()))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{safe(title)}</title><style>{CSS}</style></head>"
        f"<body>{head}{body}{tag('footer', foot)}</body></html>\n"
    )
