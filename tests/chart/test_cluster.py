"""The chart's manifests as a running cluster: executed by local_pods.py, scraped by a real Prometheus, asked by gRPC's own
client, rolled over under load. Needs root, etcd, Prometheus, and the binary that SIDA_BINARY names (by default the release
build). SIDA_PICTURES=1 also draws the dashboards into docs/pictures."""

import base64
import concurrent.futures
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.parse
import urllib.request

import grpc
import yaml

import local_pods
import pictures
from client import Load
from test_chart import CHART, rendered

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
BINARY = pathlib.Path(os.environ.get("SIDA_BINARY", REPOSITORY / "target/release/sida"))
TEXTS = [line for line in (REPOSITORY / "tests/data/sentences.txt").read_text().splitlines() if line.strip()][:24]
# What rates are taken over; Grafana would choose it by the panel's width.
RATE_SECONDS = 15
# How long there is load before queries are asked: rates need some scrapes, and pictures a while to show.
LOAD_SECONDS = 90 if "SIDA_PICTURES" in os.environ else 30

# Queries that rightly return nothing here, and why.
EMPTY = {
    "sida_tls_certificate_not_after_seconds": "TLS is off in this cluster; test_tls asks for it",
    "sida_tls_reloads_total": "TLS is off in this cluster",
    "sida_key_reloads_total": "this cluster lets in without keys",
    "sida_client_limited_total": "nobody has limits in this cluster",
    "sida_learn_trainings_total": "this cluster does not learn",
    "sida_learn_hit_rate": "this cluster does not learn",
    "DCGM_FI_": "no GPU, and so no dcgm-exporter, on this machine",
    "kube_pod_": "no Kubernetes, and so no kube-state-metrics",
    "container_memory_": "no kubelet, and so no cAdvisor",
}


def objects(values):
    output = rendered(values)
    assert output.returncode == 0, output.stderr
    return [document for document in yaml.safe_load_all(output.stdout) if document]


def of_kind(found, kind):
    return next(o for o in found if o["kind"] == kind)


KINDS = {"etcd": "StatefulSet", "coordinator": "Deployment", "predictor-node": "Deployment", "expert-node": "StatefulSet"}


def start_all(cluster):
    """Every pod at once, as Kubernetes would; nobody waits for anybody by hand. Returns the owner of each component."""
    owners = {component: cluster.owner(kind, component) for component, kind in KINDS.items()}
    for owner in owners.values():
        for name in cluster.names(owner):
            cluster.start(owner, name)
    return owners


class Prometheus:
    """A Prometheus that scrapes pods with the labels that the chart's PodMonitor gives."""

    def __init__(self, cluster):
        self.directory = tempfile.TemporaryDirectory(prefix="sida-prometheus-")
        place = pathlib.Path(self.directory.name)
        targets = place / "targets.json"
        self.targets, self.cluster = targets, cluster
        self.find()
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(CHART / "alerts/sida.yaml")],
            "scrape_configs": [{"job_name": "sida", "honor_labels": True, "file_sd_configs": [{"files": [str(targets)], "refresh_interval": "1s"}]}],
        }
        (place / "prometheus.yaml").write_text(yaml.safe_dump(config))
        port = 20000 + os.getpid() % 10000
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            ["prometheus", f"--config.file={place}/prometheus.yaml", f"--storage.tsdb.path={place}/data", f"--web.listen-address=127.0.0.1:{port}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def find(self):
        """Looks for pods, as service discovery does."""
        nodes = [pod for pod in self.cluster.pods.values() if pod.component not in ("etcd", "job")]
        label = lambda pod: {"namespace": self.cluster.namespace, "component": pod.component, "instance": pod.name}
        self.targets.write_text(json.dumps([{"targets": [f"{pod.address}:9090"], "labels": label(pod)} for pod in nodes]))

    def ask(self, path, **parameters):
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def query(self, expression, **when):
        return self.ask("query", query=expression, **when)["result"]

    def close(self):
        self.process.terminate()
        self.process.wait()
        self.directory.cleanup()


def panels():
    """(dashboard, panel, expression with its variables filled in) of every query."""
    for file in sorted((CHART / "dashboards").glob("*.json")):
        dashboard = json.loads(file.read_text())
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                yield dashboard, panel, target, filled(target["expr"])


def filled(expression):
    return re.sub(r"\$\w+", ".*", expression.replace("$__rate_interval", f"{RATE_SECONDS}s"))


def observed(expression):
    """What an alert compares: its expression without the comparison that decides, and without what only says which
    targets are meant."""
    expression = expression.split(" and ")[0]
    return re.match(r"(.*) (?:>=|>|<|==) \S+$", expression, re.S)[1]


class Running(unittest.TestCase):
    """One cluster for all of it, on CPUs with a quarter of the memory, so that experts come and go."""

    @classmethod
    def setUpClass(cls):
        cls.values = {"gpu": {"enabled": False}, "expertNode": {"expertMemory": "25%", "threads": 1}, "coordinator": {"threads": 1}, "predictorNode": {"threads": 1}}
        cls.objects = objects(cls.values)
        cls.cluster = local_pods.Cluster(cls.objects, BINARY)
        cls.addClassCleanup(cls.cluster.close)
        cls.owners = start_all(cls.cluster)
        for component in ("coordinator", "predictor-node", "expert-node"):
            for pod in cls.cluster.of(component):
                pod.wait_until_ready()
        cls.prometheus = Prometheus(cls.cluster)
        cls.addClassCleanup(cls.prometheus.close)

    def load(self, **more):
        return Load([pod.address for pod in self.cluster.of("coordinator")], TEXTS, **more)

    def test_1_helm_test(self):
        """Broken: `helm test` would fail on a cluster that works."""
        hook = of_kind(self.objects, "Pod")
        service = next(o for o in self.objects if o["kind"] == "Service" and "clusterIP" not in o["spec"])
        self.assertEqual(service["spec"]["selector"]["app.kubernetes.io/component"], "coordinator")
        spec = json.loads(json.dumps(hook["spec"]))
        # In place of the Service: one of the pods that it would choose.
        name, address = service["metadata"]["name"], self.cluster.of("coordinator")[0].address
        spec["containers"][0]["args"] = [argument.replace(f"//{name}:", f"//{address}:") for argument in spec["containers"][0]["args"]]
        code, log = self.cluster.run_to_end("test", spec)
        self.assertEqual(code, 0, log)
        self.assertIn("positive", log)

    def test_2_every_query_returns_data(self):
        """Broken: a panel would show "No data", or an alert could never fire, since what it asks for is not there."""
        started = time.time()
        with self.load(workers=4) as load:
            time.sleep(LOAD_SECONDS)
            found = {}
            for dashboard, panel, target, expression in panels():
                found[f"{dashboard['title']} / {panel['title']}: {expression}"] = self.prometheus.query(expression)
            alerts = yaml.safe_load((CHART / "alerts/sida.yaml").read_text())["groups"][0]["rules"]
            for rule in alerts:
                expression = observed(rule["expr"])
                found[f"{rule['alert']}: {expression}"] = self.prometheus.query(expression)
            ended = time.time()
        self.assertEqual(load.failures(), [])
        self.assertGreater(len(load.answers), 100)
        empty = [query for query, result in found.items() if not result]
        self.assertEqual([query for query in empty if not any(name in query for name in EMPTY)], [])
        for name in EMPTY:
            self.assertTrue(any(name in query for query in empty), f"{name} is not empty any more")
        # Something was measured, not only exported.
        for metric in ("sida_expert_loads_total", "sida_hash_predictions_total", "sida_time_to_first_token_seconds_count", "sida_predict_tokens_total", "sida_routed_rows_total"):
            self.assertGreater(float(self.prometheus.query(f"sum({metric})")[0]["value"][1]), 0, metric)
        firing = [alert["labels"]["alertname"] for alert in self.prometheus.ask("alerts")["alerts"] if alert["state"] == "firing"]
        self.assertEqual(firing, [])
        print(f"{len(found)} queries, {len(load.answers)} requests in {time.time() - started:.0f} s")
        if "SIDA_PICTURES" in os.environ:
            # Without the seconds in which clients start and rates still look back to before the load.
            window = pictures.Window(self.prometheus, filled, math.ceil(started) + 2 * RATE_SECONDS, math.floor(ended))
            caption = f"{window.end - window.start} seconds under steady load, the same in every panel; rates are over {RATE_SECONDS} seconds"
            pictures.draw(window, caption, REPOSITORY / "docs/pictures")

    def test_3_names_agree(self):
        """Broken: a dashboard, an alert or a document would name a metric that no node exports, or a node would export
        one that no document explains."""
        documented = dict(re.findall(r"^\| `(sida_\w+)` \| (\w+)", (REPOSITORY / "docs/metrics.md").read_text(), re.M))
        exported = {}
        for pod in self.cluster.pods.values():
            if pod.component in ("coordinator", "predictor-node", "expert-node"):
                with urllib.request.urlopen(f"http://{pod.address}:9090/metrics", timeout=10) as answer:
                    exported |= dict(re.findall(r"^# TYPE (\w+) (\w+)", answer.read().decode(), re.M))
        self.assertEqual({n: k for n, k in documented.items() if n not in EMPTY}, exported)
        base = lambda name: re.sub(r"_(bucket|sum|count)$", "", name) if name not in documented else name
        texts = {f"{d['title']} / {p['title']} / {t['refId']}": e for d, p, t, e in panels()}
        texts |= {"alerts": (CHART / "alerts/sida.yaml").read_text(), "tests of alerts": (REPOSITORY / "tests/chart/alerts_test.yaml").read_text()}
        texts |= {"chart": "".join(file.read_text() for file in (CHART / "templates").glob("*.yaml"))}
        texts |= {file.name: file.read_text() for file in [*(REPOSITORY / "docs").glob("*.md"), REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md"]}
        for where, text in texts.items():
            unknown = {name for name in re.findall(r"\bsida_[a-z]\w*", text) if base(name) not in documented}
            self.assertEqual({name for name in unknown if not re.match(r"sida_(rpc|tests|cli|kernels|model|cluster|routing|telemetry|proto|coordinator|expert_node|predictor_node)\b", name)}, set(), where)
        queried = " ".join(texts[where] for where in texts if " / " in where)
        unseen = {name for name in documented if name not in queried}
        self.assertEqual(unseen, set(), "metrics that no dashboard shows")

    def test_4_rolling_restart_under_load(self):
        """Broken: an upgrade would cost requests, or a pod would not end within its grace period."""
        with self.load(workers=1) as load:
            right = {text: load.ask(text) for text in TEXTS}
        ended = []
        # The Service's endpoints change meanwhile: the client knows all that there will be, and connects to those that are.
        known = [f"{self.cluster.network.subnet}{number}" for number in local_pods.COORDINATORS[:8]]
        with Load(known, TEXTS, workers=3) as load:
            time.sleep(2)
            for component in ("expert-node", "predictor-node", "coordinator"):
                ended += local_pods.roll(self.cluster, self.owners[component])
                self.prometheus.find()
            time.sleep(2)
        self.assertEqual(load.failures(), [])
        changed = [text for text, tokens, _ in load.answers if tokens != right[text]]
        self.assertEqual(changed, [])
        self.assertEqual({code for code, _ in ended}, {0})
        longest = max(latency for _, _, latency in load.answers)
        print(f"{len(load.answers)} requests over {len(ended)} restarts, 0 errors, longest {longest:.2f} s; ends took at most {max(t for _, t in ended):.1f} s")
        self.assertEqual([pod.restarts for pod in self.cluster.pods.values()], [0] * len(self.cluster.pods))

    def test_6_a_killed_node_is_in_the_logs(self):
        """Broken: what happened to a request could not be found in the logs of the nodes that it passed."""
        [victim] = [pod for pod in self.cluster.of("expert-node") if pod.name.endswith("-1")]
        trace = "4bf92f3577b34da6a3ce929d0e0e4736"

        def failed_calls():
            # Without the line that is being written.
            texts = [pod.log().rpartition("\n")[0] for pod in self.cluster.of("coordinator")]
            lines = [json.loads(line) for text in texts for line in text.splitlines() if line.startswith("{")]
            return [line for line in lines if line["message"] == "an expert call failed" and line.get("trace_id") == trace]

        with self.load(workers=4, traceparent=f"00-{trace}-00f067aa0ba902b7-00") as load:
            # A node that is killed between two calls fails none: it stands still until a request has met it.
            victim.process.send_signal(signal.SIGSTOP)
            limit = time.monotonic() + 60
            while not failed_calls():
                self.assertLess(time.monotonic(), limit, "no request met the node that stands still")
                time.sleep(0.2)
            victim.process.kill()
            victim.process.wait()
            time.sleep(3)
        self.assertEqual(load.failures(), [])
        victim.remove()
        self.cluster.start(self.owners["expert-node"], victim.name).wait_until_ready()
        self.assertEqual({line["node"] for line in failed_calls()}, {"sida-expert-node-1"})

    def test_5_etcd_away_restarts_nobody(self):
        """Broken: a blip of etcd would have every pod started again, or taken out of service."""
        [etcd] = self.cluster.of("etcd")
        owner = self.owners["etcd"]
        etcd.terminate()
        with self.load(workers=2) as load:
            time.sleep(8)
            self.assertTrue(all(pod.is_ready and not pod.restarts for pod in self.cluster.pods.values()))
        self.assertEqual(load.failures(), [])
        self.assertEqual(self.prometheus.query("max(sida_etcd_connected)")[0]["value"][1], "0")
        self.cluster.start(owner, "sida-etcd-0")
        limit = time.monotonic() + 60
        while self.prometheus.query("min(sida_etcd_connected)")[0]["value"][1] != "1":
            self.assertLess(time.monotonic(), limit, "nodes do not find etcd again")
            time.sleep(0.5)

    def test_7_another_etcd(self):
        """Broken: an upgrade to another shape of the bundled etcd would leave two halves of a cluster, or fail more than the
        few requests that come to a coordinator which ends and whose expert-nodes have all moved. All rollouts go at once,
        as those of an upgrade do."""
        with self.load(workers=1) as load:
            right = {text: load.ask(text) for text in TEXTS}
        found = objects(self.values | {"etcd": {"bundled": {"persistence": {"enabled": True}}}})
        owners = {component: next(o for o in found if o["kind"] == kind and o["metadata"]["labels"].get("app.kubernetes.io/component") == component) for component, kind in KINDS.items()}
        [old] = self.cluster.of("etcd")
        [name] = self.cluster.names(owners["etcd"])
        self.assertNotEqual(name, old.name)
        self.cluster.start(owners["etcd"], name)
        known = [f"{self.cluster.network.subnet}{number}" for number in local_pods.COORDINATORS[:12]]
        with Load(known, TEXTS, workers=3) as load, concurrent.futures.ThreadPoolExecutor() as rollouts:
            time.sleep(2)
            ends = [rollouts.submit(local_pods.roll, self.cluster, owners[component]) for component in ("expert-node", "predictor-node", "coordinator")]
            ended = [end for rollout in ends for end in rollout.result()]
            old.terminate()
            time.sleep(2)
        print(f"{len(load.answers)} requests while nodes moved to another etcd, {len(load.errors)} errors, longest {max(latency for _, _, latency in load.answers):.2f} s")
        self.assertLessEqual({code for _, code, _ in load.errors}, {grpc.StatusCode.UNAVAILABLE})
        self.assertLessEqual(len(load.errors), max(3, len(load.answers) // 50), load.failures())
        self.assertEqual([text for text, tokens, _ in load.answers if tokens != right[text]], [])
        self.assertEqual({code for code, _ in ended}, {0})
        with self.load(workers=1) as load:
            self.assertEqual({text: load.ask(text) for text in TEXTS}, right)
        for pod in self.cluster.of("coordinator"):
            with urllib.request.urlopen(f"http://{pod.address}:9090/metrics", timeout=10) as answer:
                self.assertRegex(answer.read().decode(), r'(?m)^sida_members\{role="expert-node"\} 2$')


class OverIpv6(unittest.TestCase):
    def test_no_ipv4(self):
        """Broken: in a cluster without IPv4 nodes and etcd would not find each other, or nobody could call them."""
        values = {"gpu": {"enabled": False}, "network": {"podIpFamily": "IPv6"}, "replicasPerExpert": 1}
        values |= {"coordinator": {"replicas": 1, "threads": 1}, "expertNode": {"replicas": 1, "threads": 1}, "predictorNode": {"threads": 1}}
        found = objects(values)
        cluster = local_pods.Cluster(found, BINARY, network=local_pods.Network(is_ipv6=True))
        self.addCleanup(cluster.close)
        start_all(cluster)
        for component in ("coordinator", "expert-node", "predictor-node"):
            [pod] = cluster.of(component)
            pod.wait_until_ready()
        [coordinator] = cluster.of("coordinator")
        spec = json.loads(json.dumps(of_kind(found, "Pod")["spec"]))
        spec["containers"][0]["args"] = [argument.replace("//sida:", f"//{coordinator.host}:") for argument in spec["containers"][0]["args"]]
        code, log = cluster.run_to_end("test", spec)
        self.assertEqual(code, 0, log)


class Secured(unittest.TestCase):
    def test_tls(self):
        """Broken: with TLS nodes would not find each other, the kubelet could not ask them, or nobody would know when the
        certificate ends."""
        values = {"gpu": {"enabled": False}, "tls": {"enabled": True, "existingSecret": "certificate"}, "coordinator": {"replicas": 1}, "expertNode": {"replicas": 1}, "replicasPerExpert": 1}
        found = objects(values)
        with tempfile.TemporaryDirectory() as directory:
            place = pathlib.Path(directory)
            openssl = lambda *arguments: subprocess.run(["openssl", *arguments], cwd=place, check=True, capture_output=True)
            openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=test", "-days", "30")
            openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "tls.key", "-out", "tls.csr", "-subj", "/CN=sida")
            (place / "names").write_text("subjectAltName=DNS:sida\n")
            openssl("x509", "-req", "-in", "tls.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "20", "-extfile", "names", "-out", "tls.crt")
            secret = {name: base64.b64encode((place / name).read_bytes()) for name in ("ca.crt", "tls.crt", "tls.key")}
            cluster = local_pods.Cluster(found, BINARY, secrets={"certificate": secret})
            self.addCleanup(cluster.close)
        start_all(cluster)
        [coordinator] = cluster.of("coordinator")
        coordinator.wait_until_ready()
        self.assertIn("httpGet", coordinator.container["readinessProbe"])
        spec = json.loads(json.dumps(of_kind(found, "Pod")["spec"]))
        spec["containers"][0]["args"] = [argument.replace("//sida:", f"//{coordinator.address}:") for argument in spec["containers"][0]["args"]]
        code, log = cluster.run_to_end("test", spec)
        self.assertEqual(code, 0, log)
        with urllib.request.urlopen(f"http://{coordinator.address}:9090/metrics", timeout=10) as answer:
            until = float(re.search(r"^sida_tls_certificate_not_after_seconds (\S+)", answer.read().decode(), re.M)[1])
        self.assertAlmostEqual((until - time.time()) / 86400, 20, delta=0.1)


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("networks of their own for the pods need root")
    unittest.main()
