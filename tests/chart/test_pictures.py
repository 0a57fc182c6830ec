"""The pictures of the dashboards (pictures.py): that they agree with themselves, over a Prometheus that answers by hand."""

import re
import unittest

import pictures

START, END = 1_000_000, 1_000_060


class Answers:
    """Series by query: {query: {labels: [values]}}, one value a second up to the window's end."""

    def __init__(self, series):
        self.given = series

    def ask(self, path, query, start, end, step):
        assert (path, start, end, step) == ("query_range", START, END, 1), (path, start, end, step)
        timed = lambda values: [[END - len(values) + 1 + n, str(v)] for n, v in enumerate(values)]
        return {"result": [{"metric": dict(labels), "values": timed(values)} for labels, values in self.given[query].items()]}


def panel(kind, expression, legend="", width=8, unit="short"):
    return {"type": kind, "title": kind, "gridPos": {"x": 0, "y": 0, "w": width, "h": 8}, "targets": [{"expr": expression, "legendFormat": legend}],
            "fieldConfig": {"defaults": {"unit": unit, "custom": {}}}}


def drawn(series, *panels):
    window = pictures.Window(Answers(series), lambda text: text, START, END)
    return [pictures.inside(one, window, one["gridPos"]["w"] * pictures.COLUMN - 16, 202) for one in panels]


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


class Pictures(unittest.TestCase):
    def test_a_number_is_the_end_of_its_curve(self):
        """Broken: a number would be of another time than the curve below it, and contradict it."""
        values = [1.21 + n for n in range(20)] + ["NaN"]
        [number, curve] = drawn({"rate": {(): values}}, panel("stat", "rate"), panel("timeseries", "rate"))
        self.assertEqual(re.findall(r"class=stat>([^<]*)<", number), ["20.2"])
        [path] = re.findall(r'polyline points="([^"]*)"', curve)
        # The highest point of a curve that rises is its last.
        self.assertEqual(min(float(point.split(",")[1]) for point in path.split()), float(path.split()[-1].split(",")[1]))

    def test_every_panel_has_the_same_time_axis(self):
        """Broken: nobody could tell when something was, and curves of two panels could not be compared."""
        series = {"long": {(): [3] * 61}, "late": {(): [3] * 11}, "heat": {(("expert", "0"),): [1] * 11}}
        svgs = drawn(series, panel("timeseries", "long"), panel("timeseries", "late"), panel("heatmap", "heat"))
        for svg in svgs:
            self.assertEqual([text for text in texts(svg) if text.endswith(" s")], ["0 s", "10 s", "20 s", "30 s", "40 s", "50 s", "60 s"])
        first = [float(re.search(r'polyline points="([\d.]+),', svg)[1]) for svg in svgs[:2]]
        self.assertEqual(first[0], pictures.LEFT)
        self.assertAlmostEqual(first[1], pictures.LEFT + (8 * pictures.COLUMN - 16 - pictures.LEFT - pictures.RIGHT) * 50 / 60, places=1)

    def test_names_are_whole(self):
        """Broken: two nodes would have one name in the legend."""
        names = [f"coordinator sida-coordinator-7f9c-{n} of a release with a long name" for n in range(2)]
        [svg] = drawn({"busy": {(("node", name),): [n + 1.0] * 61 for n, name in enumerate(names)}}, panel("timeseries", "busy", "{{node}}", width=4))
        self.assertEqual([text for text in texts(svg) if text.startswith("coordinator")], names)

    def test_what_has_no_room_is_counted(self):
        """Broken: curves would be there without a name, and nobody would know."""
        many = {(("code", f"code of number {n:02}"),): [float(n)] * 61 for n in range(40)}
        [svg] = drawn({"many": many}, panel("timeseries", "many", "{{code}}", width=6))
        legend = [text for text in texts(svg) if text.startswith("code")]
        self.assertEqual(legend[0], "code of number 39")
        self.assertEqual(len(re.findall("<polyline", svg)), 40)
        self.assertIn(f"and {40 - len(legend)} more", texts(svg))

    def test_names_have_the_colours_of_their_curves(self):
        """Broken: the legend of a stack would name its curves the wrong way round."""
        both = {(("phase", name),): [value] * 61 for name, value in (("load", 1.0), ("experts", 2.0))}
        stack = panel("timeseries", "phases", "{{phase}}")
        stack["fieldConfig"]["defaults"]["custom"] = {"stacking": {"mode": "normal"}}
        [svg] = drawn({"phases": both}, stack)
        height = lambda colour: float(re.search(rf'polyline points="[\d.]+,([\d.]+)[^>]*stroke="{colour}"', svg)[1])
        named = dict(reversed(pair) for pair in re.findall(r'<rect [^>]*fill="(#\w+)" /><text[^>]*>(\w+)<', svg))
        # The second lies on the first.
        self.assertLess(height(named["experts"]), height(named["load"]))

    def test_a_long_title_leaves_room(self):
        """Broken: a title of two lines would push the legend out of its panel."""
        window = pictures.Window(Answers({"load": {(): [1.0] * 61}}), lambda text: text, START, END)

        def height(title):
            text, _ = pictures.page({"title": "", "panels": [panel("timeseries", "load", width=6) | {"title": title}]}, window, "")
            return int(re.search(r"<svg width=\d+ height=(\d+)", text)[1])

        self.assertEqual(height("Time of a request by coordinator and method, 95%"), height("Load") - 14)

    def test_no_data(self):
        """Broken: a dashboard without data, such as in a cluster without load, would end in an error."""
        kinds = ("stat", "timeseries", "heatmap")
        found = drawn({"none": {}}, *(panel(kind, "none") for kind in kinds))
        self.assertIn("–", found[0])
        for text in found[1:]:
            self.assertIn("no data in this time", text)

    def test_axes_are_round(self):
        """Broken: an axis would say 4.55 and 9.1."""
        self.assertEqual(pictures.ticks(0, 13.6, "reqps", 4), [0, 5, 10])
        self.assertEqual(pictures.ticks(0, 1, "short", 4), [0, 0.5, 1])
        self.assertEqual(pictures.ticks(0, 6 * 2**20, "bytes", 4), [0, 2**21, 2**22, 3 * 2**21])
        self.assertEqual(pictures.ticks(-1, 1, "short", 4), [-1, -0.5, 0, 0.5, 1])


if __name__ == "__main__":
    unittest.main()
