"""Draws the dashboards: every panel's queries over a Prometheus, as plots on one page in the grid of the dashboard, and
the page as a PNG by chromium. Called by test_cluster.py with SIDA_PICTURES=1; the pictures are in docs/pictures.

It shows what the queries return, not how Grafana would paint it."""

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


def plot(series, unit, width, height, stacked):
    """Lines over time. `series`: (name, [(time, value)])."""
    series = [(name, [(t, v) for t, v in points if not math.isnan(v)]) for name, points in series][:10]
    if stacked:
        below = {}
        raised = []
        for name, points in series:
            points = [(t, v + below.get(t, 0)) for t, v in points]
            below.update(points)
            raised.append((name, points))
        series = raised[::-1]
    points = [point for _, found in series for point in found]
    if not points:
        return "<p class=none>no data in this time</p>"
    first, last = min(t for t, _ in points), max(t for t, _ in points)
    low, high = min(0, *(v for _, v in points)), max(v for _, v in points) or 1
    legend = 13 * math.ceil(len(series) / 2)
    left, bottom = 58, height - 14 - legend
    x = lambda t: left + (width - left - 6) * (t - first) / max(last - first, 1)
    y = lambda v: bottom - (bottom - 4) * (v - low) / (high - low or 1)
    parts = []
    for step in range(4):
        value = low + (high - low) * step / 3
        parts.append(f'<line x1={left} x2={width} y1={y(value):.1f} y2={y(value):.1f} class=grid /><text x={left - 4} y={y(value) + 4:.1f} text-anchor=end>{shown(value, unit)}</text>')
    for number, (name, found) in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in found)
        if stacked and found:
            parts.append(f'<polygon points="{x(found[0][0]):.1f},{y(low):.1f} {path} {x(found[-1][0]):.1f},{y(low):.1f}" fill="{colour}" opacity=0.5 />')
        parts.append(f'<polyline points="{path}" fill=none stroke="{colour}" stroke-width=1.5 />')
        column, line = number % 2, number // 2
        at = left - 50 + column * (width / 2 - 4)
        parts.append(f'<rect x={at:.0f} y={bottom + 10 + 13 * line} width=9 height=3 fill="{colour}" /><text x={at + 13:.0f} y={bottom + 15 + 13 * line}>{html.escape(name[:int(width / 14)])}</text>')
    return f"<svg width={width} height={height}>{''.join(parts)}</svg>"


def heat(series, width, height):
    """Experts over time."""
    series = sorted(series, key=lambda s: int(s["metric"]["expert"]))
    times = sorted({t for s in series for t, _ in s["values"]})
    most = max(float(v) for s in series for _, v in s["values"]) or 1
    w, h = (width - 60) / len(times), (height - 10) / len(series)
    parts = []
    for line, s in enumerate(series):
        if line % 8 == 0:
            parts.append(f'<text x=0 y={line * h + 9:.1f}>expert {s["metric"]["expert"]}</text>')
        for t, value in s["values"]:
            share = (float(value) / most) ** 0.5
            colour = f"hsl(30,{90 * share:.0f}%,{95 - 50 * share:.0f}%)"
            parts.append(f'<rect x={60 + times.index(t) * w:.1f} y={line * h:.1f} width={w:.1f} height={h:.1f} fill="{colour}" />')
    return f"<svg width={width} height={height}>{''.join(parts)}</svg>"


def inside(panel, prometheus, filled, start, end, width, height):
    if panel["type"] == "alertlist":
        alerts = [alert["labels"]["alertname"] for alert in prometheus.ask("alerts")["alerts"]]
        return f"<p class=none>{html.escape(', '.join(alerts) or 'none')}</p>"
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if panel["type"] == "heatmap":
        return heat(prometheus.ask("query_range", query=filled(panel["targets"][0]["expr"]), start=start, end=end, step=1)["result"], width, height)
    if panel["type"] in ("timeseries", "state-timeline"):
        series = []
        for target in panel["targets"]:
            found = prometheus.ask("query_range", query=filled(target["expr"]), start=start, end=end, step=1)["result"]
            series += [(named(target["legendFormat"], s["metric"]), [(t, float(v)) for t, v in s["values"]]) for s in found]
        stacked = panel["fieldConfig"]["defaults"]["custom"].get("stacking", {}).get("mode") == "normal"
        return plot(series, unit, width, height, stacked)
    result = prometheus.query(filled(panel["targets"][0]["expr"]), time=end)
    if panel["type"] == "stat":
        return f"<p class=stat>{shown(float(result[0]['value'][1]) if result else None, unit)}</p>"
    keys = [key for key in result[0]["metric"] if key != "__name__"]
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(s['metric'].get(key, ''))}</td>" for key in keys) + "</tr>" for s in result)
    return f"<table><tr>{''.join(f'<th>{key}</th>' for key in keys)}</tr>{rows}</table>"


STYLE = """body{margin:0;background:#f4f5f7;font:11px sans-serif;color:#222} h1{font-size:17px;margin:8px} .panel{position:absolute;
background:#fff;border:1px solid #ddd;border-radius:3px;overflow:hidden;box-sizing:border-box} .panel b{display:block;padding:5px 8px 3px}
.row{position:absolute;font-weight:bold;font-size:13px} svg{margin-left:6px} svg text{font-size:10px;fill:#444} .grid{stroke:#eee} .stat{font-size:25px;
margin:14px 10px;color:#2a6fc9} .none{margin:20px;color:#999} td,th{padding:1px 10px;text-align:left}"""


def draw(prometheus, filled, start, end, directory):
    """A PNG of each dashboard that has data."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in sorted((REPOSITORY / "helm/sida/dashboards").glob("*.json")):
        if file.stem == "gpu":
            continue
        dashboard = json.loads(file.read_text())
        parts, bottom = [], 0
        for panel in dashboard["panels"]:
            grid = panel["gridPos"]
            x, y, width, height = grid["x"] * COLUMN + GAP, grid["y"] * ROW + 40, grid["w"] * COLUMN - GAP, grid["h"] * ROW - GAP
            bottom = max(bottom, y + height)
            if panel["type"] == "row":
                parts.append(f'<div class=row style="left:{x}px;top:{y + 5}px">{html.escape(panel["title"])}</div>')
                continue
            content = inside(panel, prometheus, filled, start, end, width - 16, height - 30)
            parts.append(f'<div class=panel style="left:{x}px;top:{y}px;width:{width}px;height:{height}px"><b>{html.escape(panel["title"])}</b>{content}</div>')
        page = f"<!doctype html><meta charset=utf-8><style>{STYLE}</style><h1>{html.escape(dashboard['title'])}</h1>{''.join(parts)}"
        with tempfile.NamedTemporaryFile("w", suffix=".html") as written:
            written.write(page)
            written.flush()
            subprocess.run(
                ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={24 * COLUMN + 2 * GAP},{bottom + 10}",
                 f"--screenshot={directory / (file.stem + '.png')}", f"file://{written.name}"],
                check=True, capture_output=True, timeout=120)
