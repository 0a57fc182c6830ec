"""compose.yaml by podman-compose, with etcd and Prometheus of Debian's packages (their images are made here) and the image
that in_podman.py has built. Grafana's cannot be made, and is left out as its profile leaves it out. Needs root."""

import json
import os
import subprocess
import sys
import time
import unittest
import urllib.parse
import urllib.request

import base_images
from engine import ENVIRONMENT, REPOSITORY, image_exists, told

COMPOSE = os.path.join(os.path.dirname(sys.executable), "podman-compose")
LIMIT = 120


def compose(*arguments):
    return subprocess.run([COMPOSE, "--file", REPOSITORY / "compose.yaml", *arguments], env=ENVIRONMENT, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


class Compose(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        assert image_exists("localhost/sida:0.1.0"), "tests/image/in_podman.py builds it"
        base_images.make("registry.k8s.io/etcd:3.5.21-0", "docker.io/prom/prometheus:v2.55.1")
        cls.addClassCleanup(compose, "down", "--timeout", "1")
        cls.up = compose("up", "--detach", "--no-build")

    def eventually(self, condition, told_by):
        limit = time.monotonic() + LIMIT
        while not condition():
            self.assertLess(time.monotonic(), limit, told_by())
            time.sleep(1)

    def test_it_answers(self):
        """Broken: the first thing that somebody tries on a laptop would not come up."""
        self.assertEqual(self.up.returncode, 0, self.up.stdout)
        ask = lambda: told("exec", "sida_coordinator-0_1", "/usr/bin/sida", "ask", "--endpoint", "http://127.0.0.1:50051", "sst2 sentence: a fine film .")
        self.eventually(lambda: ask()[0] == 0, lambda: ask()[1] + told("logs", "sida_coordinator-0_1")[1])
        self.assertIn("positive", ask()[1])
        health = lambda: told("healthcheck", "run", "sida_coordinator-0_1")[0]
        self.eventually(lambda: health() == 0, lambda: "the coordinator's health check fails")
        names = told("ps", "--format={{.Names}}")[1].split()
        self.assertNotIn("sida_grafana_1", names)

    def test_prometheus_sees_all(self):
        """Broken: the dashboards on a laptop would be empty, or no alert would be known."""
        def query(path, **parameters):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:9091/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=5) as answer:
                    return json.load(answer)["data"]
            except OSError:
                return {"result": [], "groups": []}
        up = lambda: {s["metric"]["instance"]: s["value"][1] for s in query("query", query='up{job="sida"}')["result"]}
        expected = {f"{name}:9090": "1" for name in ("coordinator-0", "expert-node-0", "expert-node-1", "predictor-node-0")}
        self.eventually(lambda: up() == expected, lambda: str(up()))
        self.assertTrue(query("rules")["groups"])


if __name__ == "__main__":
    unittest.main()
