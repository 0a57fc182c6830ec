"""The dashboards: whole by themselves, of Grafana's own types, their queries such as Prometheus reads, and what somebody
needs who is called at night."""

import json
import re
import subprocess
import tempfile
import unittest

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as grafana
from grafana_foundation_sdk.models import heatmap, stat, statetimeline, table, timeseries

from test_chart import CHART, objects

DASHBOARDS = {file.stem: json.loads(file.read_text()) for file in sorted((CHART / "dashboards").glob("*.json"))}
# Panels without a model in the SDK have none here: the list of alerts.
OPTIONS = {"heatmap": heatmap.Options, "stat": stat.Options, "state-timeline": statetimeline.Options, "table": table.Options, "timeseries": timeseries.Options}
CUSTOM = {"state-timeline": statetimeline.FieldConfig, "timeseries": timeseries.FieldConfig}


def encoded(model):
    return json.loads(JSONEncoder(sort_keys=True).encode(model))


def panels(kind=None):
    """(dashboard, panel) of every panel that shows something."""
    for dashboard in DASHBOARDS.values():
        for panel in dashboard["panels"]:
            if panel["type"] != "row" and kind in (None, panel["type"]):
                yield dashboard, panel


def queries():
    """(where, expression) of every query, annotations among them."""
    for dashboard, panel in panels():
        for target in panel.get("targets", []):
            yield f"{dashboard['title']} / {panel['title']}", target["expr"]
    for dashboard in DASHBOARDS.values():
        for annotation in dashboard["annotations"]["list"]:
            yield f"{dashboard['title']} / {annotation['name']}", annotation["expr"]


class Dashboards(unittest.TestCase):
    def test_they_are_whole(self):
        """Broken: a panel would show raw numbers without saying what they are, or work with one data source only."""
        for dashboard in DASHBOARDS.values():
            variables = {v["name"]: v for v in dashboard["templating"]["list"]}
            self.assertEqual(variables["datasource"]["type"], "datasource")
            ids = [panel["id"] for panel in dashboard["panels"]]
            self.assertEqual(len(ids), len(set(ids)))
        for dashboard, panel in panels():
            with self.subTest(dashboard["title"], panel=panel["title"]):
                self.assertGreater(len(panel["description"]), 10)
                self.assertTrue(panel["title"])
                self.assertEqual(panel["datasource"]["uid"], "${datasource}")
                if panel["type"] == "alertlist":
                    self.assertEqual(panel["options"]["datasource"], "${datasource}")
                    continue
                self.assertTrue(panel["fieldConfig"]["defaults"]["unit"])
                for target in panel["targets"]:
                    self.assertEqual(target["datasource"]["uid"], "${datasource}")
                    # A lifetime average hides what happens now.
                    self.assertNotRegex(target["expr"], r"_sum\{[^}]*\}\s*/")
                    for metric in re.findall(r"\bsida_\w+_total\b|\bsida_\w+_(?:sum|count|bucket)\b", target["expr"]):
                        self.assertRegex(target["expr"], rf"rate\({metric}")

    def test_they_reach_the_cluster(self):
        """Broken: Grafana's sidecar would not find them, or find what is no dashboard."""
        maps = [d for d in objects("cpu") if "-dashboard-" in d["metadata"]["name"]]
        self.assertEqual(len(maps), len(DASHBOARDS))
        for found in maps:
            self.assertEqual(found["metadata"]["labels"]["grafana_dashboard"], "1")
            [text] = found["data"].values()
            # What is no dashboard's own is as in the file.
            own = DASHBOARDS[found["metadata"]["name"].rpartition("dashboard-")[2]]
            self.assertEqual(json.loads(text)["panels"], own["panels"])

    def test_of_grafanas_types(self):
        """Broken: Grafana would drop a field that it does not know, or refuse the dashboard."""
        def held(ours, theirs, where):
            if isinstance(ours, dict):
                self.assertIsInstance(theirs, dict, where)
                for key, value in ours.items():
                    # An absent value and null are the same to it.
                    if value is not None:
                        self.assertIn(key, theirs, where)
                        held(value, theirs[key], f"{where}.{key}")
            elif isinstance(ours, list):
                self.assertEqual(len(ours), len(theirs), where)
                for number, (a, b) in enumerate(zip(ours, theirs)):
                    held(a, b, f"{where}[{number}]")
            else:
                self.assertEqual(ours, theirs, where)

        # Fields of the data source's own, which the SDK keeps elsewhere or leaves out.
        foreign = {"expr", "step", "titleFormat", "textFormat", "tagKeys"}
        for name, dashboard in DASHBOARDS.items():
            ours = json.loads(json.dumps(dashboard))
            for annotation in ours["annotations"]["list"]:
                for key in foreign:
                    annotation.pop(key, None)
            for variable in ours["templating"]["list"]:
                variable.pop("definition", None)
            held(ours, encoded(grafana.Dashboard.from_json(json.loads(json.dumps(ours)))), name)
        for dashboard, panel in panels():
            where = f"{dashboard['title']} / {panel['title']}"
            if model := OPTIONS.get(panel["type"]):
                held(panel.get("options", {}), encoded(model.from_json(json.loads(json.dumps(panel.get("options", {}))))), where)
            if model := CUSTOM.get(panel["type"]):
                custom = panel["fieldConfig"]["defaults"].get("custom", {})
                held(custom, encoded(model.from_json(json.loads(json.dumps(custom)))), where)

    def test_the_types_find_what_is_wrong(self):
        """Broken: the test above could not fail."""
        options = json.loads(json.dumps(next(panels("timeseries"))[1]["options"]))
        options["tooltipp"] = {}
        self.assertNotIn("tooltipp", encoded(timeseries.Options.from_json(options)))

    def test_prometheus_reads_them(self):
        """Broken: a panel would show a syntax error."""
        filled = lambda text: text.replace("$__rate_interval", "1m").replace("$", "")
        rules = [{"record": f"query_{number}", "expr": filled(text)} for number, (_, text) in enumerate(queries())]
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
            file.flush()
            output = subprocess.run(["promtool", "check", "rules", file.name], capture_output=True, text=True)
        self.assertEqual(output.returncode, 0, output.stdout + output.stderr)

    def test_of_the_chosen_release_only(self):
        """Broken: a panel would add up what several releases do, or show GPUs and pods of others."""
        for where, text in queries():
            for selector in re.findall(r"\b(?:sida_\w+|up|ALERTS)\b(\{[^}]*\})?", text):
                self.assertIn('namespace=~"$namespace",job=~"$job"', selector, where)
            for selector in re.findall(r"\b(?:DCGM|kube|container)_\w+(\{[^}]*\})?", text):
                self.assertRegex(selector, r'namespace=~"\$namespace",(exported_)?pod=~"\$job-\.\*"', where)


class AtNight(unittest.TestCase):
    def test_colours_say_what_is_bad(self):
        """Broken: a number that calls for somebody would look like any other."""
        for dashboard, panel in panels("stat"):
            defaults = panel["fieldConfig"]["defaults"]
            with self.subTest(dashboard["title"], panel=panel["title"]):
                if defaults["color"]["mode"] == "thresholds":
                    colours = {step["color"] for step in defaults["thresholds"]["steps"]}
                    self.assertIn("green", colours)
                    self.assertTrue(colours & {"red", "yellow"})
                else:
                    self.assertEqual(defaults["color"], {"mode": "fixed", "fixedColor": "blue"})
        lines = [p["title"] for _, p in panels("timeseries") if "thresholdsStyle" in p["fieldConfig"]["defaults"]["custom"]]
        for title in ("Share of failed requests", "Waiting for experts", "Memory of pods", "Experts without a holder", "Certificate", "Temperature"):
            self.assertIn(title, lines)

    def test_alerts_come_first(self):
        """Broken: who is called would have to look for what fires."""
        overview = DASHBOARDS["overview"]["panels"]
        [alerts] = [panel for panel in overview if panel["type"] == "alertlist"]
        self.assertLess(alerts["gridPos"]["y"], 10)
        self.assertTrue(alerts["options"]["stateFilter"]["firing"])
        names = [rule["alert"] for rule in yaml.safe_load((CHART / "alerts/sida.yaml").read_text())["groups"][0]["rules"]]
        self.assertTrue(all(alerts["options"]["alertName"] in name for name in names))

    def test_what_changed_is_marked(self):
        """Broken: that everything began with a rollout or a new placement would not be seen."""
        for dashboard in DASHBOARDS.values():
            marks = {mark["name"]: mark["expr"] for mark in dashboard["annotations"]["list"] if mark["enable"]}
            self.assertEqual(set(marks), {"Nodes started", "Placements", "Alerts"}, dashboard["title"])
            self.assertIn("sida_build_info", marks["Nodes started"])
            self.assertIn("sida_placement_epoch", marks["Placements"])

    def test_pods_are_there(self):
        """Broken: pods that are killed for their memory would be seen nowhere."""
        text = " ".join(t["expr"] for d, p in panels() if d is DASHBOARDS["overview"] for t in p.get("targets", []))
        for metric in ("kube_pod_container_status_restarts_total", "container_memory_working_set_bytes", "kube_pod_container_resource_limits"):
            self.assertIn(metric, text)

    def test_methods_and_coordinators_are_apart(self):
        """Broken: a slow coordinator, or one method among others, would vanish in the sum of all."""
        overview = {p["title"]: " ".join(t["expr"] for t in p.get("targets", [])) for d, p in panels() if d is DASHBOARDS["overview"]}
        for title, text in overview.items():
            if "sida_request_duration_seconds" in text:
                self.assertIn("method", text, title)
        both = [title for title, text in overview.items() if re.search(r"by \([^)]*instance[^)]*method", text)]
        self.assertEqual(len(both), 3, both)

    def test_heat_is_a_heat_map(self):
        """Broken: which experts are hot would have to be read from a table of as many columns as there are experts."""
        [(_, heat)] = panels("heatmap")
        self.assertIn("sida_routed_rows_total", heat["targets"][0]["expr"])
        tables = [p["title"] for _, p in panels("table")]
        self.assertEqual(tables, ["Versions"])

    def test_panels_do_not_lie_over_each_other(self):
        """Broken: a panel would be hidden by another."""
        for dashboard in DASHBOARDS.values():
            taken = {}
            for panel in dashboard["panels"]:
                grid = panel["gridPos"]
                self.assertLessEqual(grid["x"] + grid["w"], 24)
                for x in range(grid["x"], grid["x"] + grid["w"]):
                    for y in range(grid["y"], grid["y"] + grid["h"]):
                        self.assertIsNone(taken.setdefault((x, y), None), f"{dashboard['title']}: {panel['title']} and {taken[x, y]}")
                        taken[x, y] = panel["title"]


if __name__ == "__main__":
    unittest.main()
