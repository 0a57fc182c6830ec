"""Releases beside each other, as a dependency, and over time: what must be told apart, and what an upgrade may not take
away."""

import contextlib
import http.server
import json
import pathlib
import re
import shutil
import tempfile
import threading
import unittest

import yaml

from releases import COORDINATOR, EXPERT_NODE, OPERATORS, flag, template
from test_chart import CHART


class Releases(unittest.TestCase):
    """Several in one namespace, of one name in two namespaces, twice in one release."""

    def pair(self, *arguments):
        values = {"etcd": {"endpoints": ["etcd:2379"]}, "coordinator": {"keda": {"enabled": True}}, "expertNode": {"keda": {"enabled": True}}}
        return [template(values, *OPERATORS, *arguments, release=release, namespace=namespace) for release, namespace in (("sida", "a"), ("sida", "b"), ("sida-two", "a"))]

    def of(self, found, kind):
        return [document for (found_kind, _), document in found.items() if found_kind == kind]

    def test_clusters_in_one_etcd(self):
        """Broken: two releases would be one cluster, since their nodes meet under one name in etcd."""
        clusters = [flag(self.of(found, "Deployment")[0], "cluster")[0] for found in self.pair()]
        self.assertEqual(clusters, ["a.sida", "b.sida", "a.sida-two"])
        for found in self.pair():
            owners = self.of(found, "Deployment") + [o for o in self.of(found, "StatefulSet")]
            self.assertEqual(len({flag(owner, "cluster")[0] for owner in owners}), 1)

    def test_series(self):
        """Broken: alerts, scaling and dashboards of one release would count the other's nodes."""
        for found, name, namespace in zip(self.pair(), ("sida", "sida", "sida-two"), ("a", "b", "a")):
            chosen = f'namespace="{namespace}",job="{name}"'
            [monitor] = self.of(found, "PodMonitor")
            self.assertNotIn("jobLabel", monitor["spec"])
            self.assertIn({"targetLabel": "job", "replacement": name}, monitor["spec"]["podMetricsEndpoints"][0]["relabelings"])
            queries = [rule["expr"] for rule in self.of(found, "PrometheusRule")[0]["spec"]["groups"][0]["rules"]]
            queries += [o["spec"]["triggers"][0]["metadata"]["query"] for o in self.of(found, "ScaledObject")]
            self.assertEqual(len(self.of(found, "ScaledObject")), 2)
            for query in queries:
                metrics = len(re.findall(r"\b(?:sida_\w+|up)\b", query.replace(chosen, "")))
                self.assertEqual(query.count(chosen), metrics, query)

    def test_what_grafana_and_prometheus_tell_apart(self):
        """Broken: rules and dashboards of one release would replace those of another."""
        seen = {"uid": [], "title": [], "file": [], "group": []}
        for found in self.pair():
            seen["group"] += [group["name"] for group in self.of(found, "PrometheusRule")[0]["spec"]["groups"]]
            for document in self.of(found, "ConfigMap"):
                for file, text in document["data"].items():
                    dashboard = json.loads(text)
                    seen["file"].append(file)
                    seen["uid"].append(dashboard["uid"])
                    seen["title"].append(dashboard["title"])
                    self.assertLessEqual(len(dashboard["uid"]), 40)
                    # The list of dashboards holds those of this release.
                    release = file.removesuffix(".json").rpartition(".")[0].replace(".", "/", 1)
                    self.assertIn(release, dashboard["links"][0]["tags"])
                    variables = {v["name"]: v for v in dashboard["templating"]["list"]}
                    self.assertEqual([variables["namespace"]["current"]["value"][0], variables["job"]["current"]["value"][0]], release.split("/"))
        for kind, values in seen.items():
            self.assertEqual(len(values), len(set(values)), kind)

    def test_another_release_may_call_nodes(self):
        """Broken: network policies would shut out a release that shares the cluster."""
        peer = {"podSelector": {"matchLabels": {"app.kubernetes.io/instance": "other"}}}
        found = template({"networkPolicy": {"nodesFrom": [peer], "extraIngress": [{"ports": [{"port": 15090}]}]}})
        for component in ("expert-node", "predictor-node", "etcd"):
            self.assertIn(peer, found["NetworkPolicy", f"sida-{component}"]["spec"]["ingress"][0]["from"])
        for component in ("coordinator", "expert-node", "predictor-node", "etcd"):
            self.assertIn({"ports": [{"port": 15090}]}, found["NetworkPolicy", f"sida-{component}"]["spec"]["ingress"])

    def test_as_a_dependency(self):
        """Broken: a chart that has this one as a dependency could not switch it on and off, nor have it twice."""
        with tempfile.TemporaryDirectory() as directory:
            parent = pathlib.Path(directory) / "parent"
            shutil.copytree(CHART, parent / "charts/sida")
            dependencies = [{"name": "sida", "version": "0.1.0", "condition": "sida.enabled"}, {"name": "sida", "version": "0.1.0", "alias": "second", "condition": "second.enabled", "tags": ["more"]}]
            (parent / "Chart.yaml").write_text(yaml.safe_dump({"apiVersion": "v2", "name": "parent", "version": "1.0.0", "dependencies": dependencies}))
            values = {"global": {"own": 1}, "tags": {"more": True}, "sida": {"enabled": True, "log": None}, "second": {"enabled": True, "gpu": {"enabled": False}}}
            found = template(values, *OPERATORS, chart=parent, release="prod")
            clusters = {name: flag(d, "cluster")[0] for (kind, name), d in found.items() if kind == "Deployment"}
            self.assertEqual(clusters["prod-sida-coordinator"], "moe.prod-sida")
            self.assertEqual(clusters["prod-second-coordinator"], "moe.prod-second")
            self.assertEqual({d["spec"]["podMetricsEndpoints"][0]["relabelings"][0]["replacement"] for (kind, _), d in found.items() if kind == "PodMonitor"}, {"prod-sida", "prod-second"})
            self.assertEqual(template({"sida": {"enabled": False}, "second": {"enabled": False}}, chart=parent), {})


class Scaling(unittest.TestCase):
    @contextlib.contextmanager
    def api_server(self, objects):
        """What helm asks an API server for when it renders: versions, kinds, and the objects that are there."""
        answers = {
            "/version": {"major": "1", "minor": "36", "gitVersion": "v1.36.0"},
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": []},
            "/apis": {"kind": "APIGroupList", "groups": [{"name": "apps", "versions": [{"groupVersion": "apps/v1", "version": "v1"}]}]},
            "/apis/apps/v1": {"kind": "APIResourceList", "groupVersion": "apps/v1", "resources": [{"name": "deployments", "kind": "Deployment", "namespaced": True, "verbs": ["get"]}, {"name": "statefulsets", "kind": "StatefulSet", "namespaced": True, "verbs": ["get"]}]},
            **{f"/apis/apps/v1/namespaces/moe/{kind}s/{name}": {"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": name}, "spec": {"replicas": n}} for (kind, name), n in objects.items()},
        }
        answers = {path.lower(): answer for path, answer in answers.items()}

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                found = answers.get(self.path.split("?")[0].lower())
                body = json.dumps(found or {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}).encode()
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()

    def test_an_autoscaler_takes_nothing_away(self):
        """Broken: enabling an autoscaler, or an upgrade under one, would drop the pods from what runs to one."""
        values = {"coordinator": {"replicas": 5, "autoscaling": {"enabled": True}}, "expertNode": {"replicas": 3, "keda": {"enabled": True}}}
        with self.api_server({("Deployment", "sida-coordinator"): 7, ("StatefulSet", "sida-expert-node"): 4}) as url:
            found = template(values, "--dry-run=server", "--kube-apiserver", url)
        self.assertEqual(found[COORDINATOR]["spec"]["replicas"], 7)
        self.assertEqual(found[EXPERT_NODE]["spec"]["replicas"], 4)
        # It may not go below what was asked for without it.
        self.assertEqual(found["HorizontalPodAutoscaler", "sida-coordinator"]["spec"]["minReplicas"], 5)
        self.assertEqual(found["ScaledObject", "sida-expert-node"]["spec"]["minReplicaCount"], 3)
        # A manifest that is applied again and again must not undo what the autoscaler did.
        self.assertNotIn("replicas", template(values)[COORDINATOR]["spec"])

    def test_another_shape_of_etcd_is_another_etcd(self):
        """Broken: the API server would refuse an upgrade from one member to three, or to a volume or another volume, since
        a StatefulSet's volumes cannot be changed."""
        volume = lambda n, **more: {"etcd": {"bundled": {"replicas": n, "persistence": {"enabled": True} | more}}}
        shapes = [{}, volume(1), volume(3), volume(5), volume(3, size="2Gi"), volume(3, storageClass="fast")]
        names = []
        for shape in shapes:
            found = template(shape)
            [(name, owner)] = [(name, d) for (kind, name), d in found.items() if kind == "StatefulSet" and "-etcd" in name]
            names.append(name)
            self.assertIn(("Service", owner["spec"]["serviceName"]), found)
            endpoints = flag(found[COORDINATOR], "etcd")[0].split(",")
            self.assertEqual(endpoints, [f"{name}-{n}.sida-etcd.moe.svc:2379" for n in range(owner["spec"]["replicas"])])
            self.assertLessEqual(len(name) - len("sida"), 52 - 40)
        self.assertEqual(len(set(names)), len(shapes))
        same = template({"etcd": {"bundled": {"resources": {"limits": {"memory": "1Gi"}}}}})
        self.assertIn(("StatefulSet", names[0]), same)


if __name__ == "__main__":
    unittest.main()
