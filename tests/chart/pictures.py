"""Draws the dashboards: every panel's queries over a Prometheus, as plots on one page in the grid of the dashboard, and
the page as a PNG by chromium. Called by test_cluster.py with SIDA_PICTURES=1; the pictures are in docs/pictures.

It shows what the queries return, not how Grafana would paint it. All panels show the same time: a number is the last value of
what would be its curve, and every time axis goes from the window's start to its end."""

import html
import json
import math
import pathlib
import re
import subprocess
import tempfile

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
COLOURS = ["#3b7dd8", "#d9822b", "#3aa76d", "#c94f5d", "#8e63c7", "#2aa6b8", "#b8a12a", "#7a7a7a", "#e377c2", "#8c564b"]
COLUMN, ROW, GAP = 52, 30, 8
# Of a plot: what is left of it and right of it, a line of its legend, a letter, and the least that its curves get.
LEFT, RIGHT, LINE, LETTER, CURVES_MIN = 58, 14, 13, 6.2, 80
TITLE_LETTER = 7.5


class Window:
    """A time of a Prometheus, in which every query is asked at the same seconds."""

    def __init__(self, prometheus, filled, start, end):
        self.prometheus, self.filled, self.start, self.end = prometheus, filled, start, end

    def series(self, panel):
        """(labels, name, [(time, value)]) of all of a panel's queries, without what is no number."""
        found = []
        for target in panel["targets"]:
            for one in self.prometheus.ask("query_range", query=self.filled(target["expr"]), start=self.start, end=self.end, step=1)["result"]:
                points = [(t, float(v)) for t, v in one["values"] if not math.isnan(float(v))]
                found.append((one["metric"], named(target.get("legendFormat", ""), one["metric"]), points))
        return [one for one in found if one[2]]

    def table(self, panel):
        """The labels of the series at the end."""
        return [one["metric"] for one in self.prometheus.query(self.filled(panel["targets"][0]["expr"]), time=self.end)]


def shown(value, unit):
    """A value as a person reads it."""
    if value is None or math.isnan(value):
        return "–"
    if unit == "percentunit":
        return f"{100 * value:.1f}%"
    scale = [(1e9, " G"), (1e6, " M"), (1e3, " k")]
    if unit == "s":
        scale = [(86400, " d"), (1, " s"), (1e-3, " ms"), (1e-6, " µs")] if abs(value) >= 86400 else [(1, " s"), (1e-3, " ms"), (1e-6, " µs")]
    if unit in ("bytes", "Bps"):
        scale = [(2**30, " Gi"), (2**20, " Mi"), (2**10, " Ki")]
    for factor, suffix in scale:
        if abs(value) >= factor:
            return f"{value / factor:.3g}{suffix}{'B/s' if unit == 'Bps' else 'B' if unit == 'bytes' else ''}"
    return f"{value:.3g}"


def named(legend, labels):
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), legend) or ", ".join(f"{k}={v}" for k, v in labels.items()) or "value"


def ticks(low, high, unit, most):
    """Round values from `low` to `high`, at most so many apart from the first."""
    rough = (high - low) / most
    if unit in ("bytes", "Bps"):
        step = 2.0 ** math.ceil(math.log2(rough))
    else:
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def time_axis(window, left, width, y):
    """Where a time is, and the axis: seconds since the window's start."""
    seconds = window.end - window.start
    x = lambda t: left + (width - left - RIGHT) * (t - window.start) / seconds
    labels = "".join(f'<text x={x(window.start + t):.1f} y={y + 14} text-anchor=middle>{t:.0f} s</text>' for t in ticks(0, seconds, "s", 6))
    return x, f'<line x1={left} x2={width - RIGHT} y1={y} y2={y} class=axis />{labels}'


def legend_lines(names, width):
    """Which names stand in which line, whole: [[(x, name)]]."""
    lines, x = [[]], 0
    for name in names:
        needed = 13 + LETTER * len(name) + 12
        if lines[-1] and x + needed > width:
            lines, x = [*lines, []], 0
        lines[-1].append((x, name))
        x += needed
    return lines


def legend(names, width, height):
    """SVG with a whole name for every curve, as many as leave room for the curves, and the height of it."""
    most = max(1, int((height - CURVES_MIN) / LINE))
    for kept in range(len(names), 0, -1):
        more = [f"and {len(names) - kept} more"] if kept < len(names) else []
        lines = legend_lines([*names[:kept], *more], width)
        if len(lines) <= most:
            break
    parts, number = [], 0
    for line, entries in enumerate(lines):
        for x, name in entries:
            y = height - LINE * (len(lines) - line)
            if number < kept:
                parts.append(f'<rect x={x:.0f} y={y + 4} width=9 height=3 fill="{COLOURS[number % len(COLOURS)]}" />')
            # A name that is wider than the plot is squeezed.
            squeezed = f" textLength={width - x - 13:.0f} lengthAdjust=spacingAndGlyphs" if 13 + LETTER * len(name) > width - x else ""
            parts.append(f'<text x={x + 13:.0f} y={y + 9}{squeezed}>{html.escape(name)}</text>')
            number += 1
    return "".join(parts), LINE * len(lines)


def plot(window, series, unit, width, height, stacked):
    """Lines over time."""
    if not series:
        return "<p class=none>no data in this time</p>"
    # The largest first, so that what the legend has no room for is the smallest.
    series = sorted(((name, points) for _, name, points in series), key=lambda one: -max(v for _, v in one[1])) if len(series) > len(COLOURS) else [one[1:] for one in series]
    names = [name for name, _ in series]
    if stacked:
        below, raised = {}, []
        for name, points in series:
            points = [(t, v + below.get(t, 0)) for t, v in points]
            below.update(points)
            raised.append((name, points))
        series = raised
    values = [v for _, points in series for _, v in points]
    low, high = min(0, *values), max(values)
    high = high if high > low else low + 1
    legends, taken = legend(names, width, height - 16)
    bottom = height - taken - 16 - 6
    x, axis = time_axis(window, LEFT, width, bottom)
    y = lambda v: bottom - (bottom - 8) * (v - low) / (high - low)
    parts = [f'<line x1={LEFT} x2={width - RIGHT} y1={y(v):.1f} y2={y(v):.1f} class=grid /><text x={LEFT - 4} y={y(v) + 4:.1f} text-anchor=end>{shown(v, unit)}</text>' for v in ticks(low, high, unit, 4)]
    curves = list(enumerate(series))
    for number, (_, points) in reversed(curves) if stacked else curves:
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in points)
        if stacked:
            parts.append(f'<polygon points="{x(points[0][0]):.1f},{y(low):.1f} {path} {x(points[-1][0]):.1f},{y(low):.1f}" fill="{colour}" opacity=0.5 />')
        parts.append(f'<polyline points="{path}" fill=none stroke="{colour}" stroke-width=1.5 />')
    return f"<svg width={width} height={height}>{''.join(parts)}{axis}<g transform=\"translate(0,16)\">{legends}</g></svg>"


def heat(window, series, width, height):
    """Experts over time."""
    if not series:
        return "<p class=none>no data in this time</p>"
    series = sorted(series, key=lambda one: int(one[0]["expert"]))
    most = max(v for _, _, points in series for _, v in points) or 1
    left, bottom = 60, height - 20
    x, axis = time_axis(window, left, width, bottom)
    second, h = x(window.start + 1) - left, bottom / len(series)
    parts = []
    for line, (labels, _, points) in enumerate(series):
        if line % 8 == 0:
            parts.append(f'<text x=0 y={line * h + 9:.1f}>expert {labels["expert"]}</text>')
        for t, value in points:
            if t < window.end:
                share = (value / most) ** 0.5
                colour = f"hsl(30,{90 * share:.0f}%,{95 - 50 * share:.0f}%)"
                parts.append(f'<rect x={x(t):.1f} y={line * h:.1f} width={min(second, x(window.end) - x(t)):.1f} height={h:.1f} fill="{colour}" shape-rendering=crispEdges />')
    return f"<svg width={width} height={height}>{''.join(parts)}{axis}</svg>"


def inside(panel, window, width, height):
    if panel["type"] == "alertlist":
        alerts = [alert["labels"]["alertname"] for alert in window.prometheus.ask("alerts")["alerts"]]
        return f"<p class=none>{html.escape(', '.join(alerts) or 'none')}</p>"
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if panel["type"] == "table":
        rows = window.table(panel)
        keys = sorted({key for labels in rows for key in labels if key != "__name__"})
        body = "".join("<tr>" + "".join(f"<td>{html.escape(labels.get(key, ''))}</td>" for key in keys) + "</tr>" for labels in rows)
        return f"<table><tr>{''.join(f'<th>{key}</th>' for key in keys)}</tr>{body}</table>"
    series = window.series(panel)
    if panel["type"] == "stat":
        return f"<p class=stat>{shown(series[0][2][-1][1] if series else None, unit)}</p>"
    if panel["type"] == "heatmap":
        return heat(window, series, width, height)
    stacked = panel["fieldConfig"]["defaults"]["custom"].get("stacking", {}).get("mode") == "normal"
    return plot(window, series, unit, width, height, stacked)


STYLE = """body{margin:0;background:#f4f5f7;font:11px sans-serif;color:#222} h1{font-size:17px;margin:8px} small{font-size:11px;font-weight:normal;
margin-left:12px} .panel{position:absolute;background:#fff;border:1px solid #ddd;border-radius:3px;overflow:hidden;box-sizing:border-box} .panel
b{display:block;padding:5px 8px 3px} .row{position:absolute;font-weight:bold;font-size:13px} svg{margin-left:6px} svg text{font-size:10px;fill:#444}
.grid{stroke:#eee} .axis{stroke:#bbb} .stat{font-size:25px;margin:14px 10px;color:#2a6fc9} .none{margin:20px;color:#999} td,th{padding:1px 10px;text-align:left}"""


def page(dashboard, window, caption):
    """HTML, and its height."""
    parts, bottom = [], 0
    for panel in dashboard["panels"]:
        grid = panel["gridPos"]
        x, y, width, height = grid["x"] * COLUMN + GAP, grid["y"] * ROW + 40, grid["w"] * COLUMN - GAP, grid["h"] * ROW - GAP
        bottom = max(bottom, y + height)
        if panel["type"] == "row":
            parts.append(f'<div class=row style="left:{x}px;top:{y + 5}px">{html.escape(panel["title"])}</div>')
            continue
        title_lines = math.ceil(TITLE_LETTER * len(panel["title"]) / (width - 16))
        content = inside(panel, window, width - 16, height - 16 - 14 * title_lines)
        parts.append(f'<div class=panel style="left:{x}px;top:{y}px;width:{width}px;height:{height}px"><b>{html.escape(panel["title"])}</b>{content}</div>')
    head = f"<h1>{html.escape(dashboard['title'])}<small>{html.escape(caption)}</small></h1>"
    return f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>{head}{''.join(parts)}", bottom


def draw(window, caption, directory):
    """A PNG of each dashboard that has data."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in sorted((REPOSITORY / "helm/sida/dashboards").glob("*.json")):
        if file.stem == "gpu":
            continue
        text, bottom = page(json.loads(file.read_text()), window, caption)
        with tempfile.NamedTemporaryFile("w", suffix=".html") as written:
            written.write(text)
            written.flush()
            subprocess.run(
                ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={24 * COLUMN + 2 * GAP},{bottom + 10}",
                 f"--screenshot={directory / (file.stem + '.png')}", f"file://{written.name}"],
                check=True, capture_output=True, timeout=120)
