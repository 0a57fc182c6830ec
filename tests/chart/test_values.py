"""What values do: each test renders the chart as a user would and looks at what the API server would get. The snapshots
(test_chart.py) hold everything else that is rendered."""

import contextlib
import http.server
import json
import pathlib
import re
import shutil
import subprocess
import tempfile
import threading
import unittest

import yaml

from test_chart import CHART, HELM, rendered


def documents(text):
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document]


def template(values, *arguments, chart=CHART, release="sida", namespace="moe"):
    """The objects of a release, by (kind, name). `values` is a map, or the text of a values file."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(values if isinstance(values, str) else yaml.safe_dump(values))
        file.flush()
        output = subprocess.run([HELM, "template", release, chart, "--namespace", namespace, "--values", file.name, *arguments], capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    return {(d["kind"], d["metadata"]["name"]): d for d in documents(output.stdout)}


def pod(owner):
    return owner["spec"]["template"]["spec"] if "template" in owner["spec"] else owner["spec"]


def arguments_of(owner):
    return pod(owner)["containers"][0]["args"]


def flag(owner, name):
    return [argument.partition("=")[2] for argument in arguments_of(owner) if argument.startswith(f"--{name}=")]


OPERATORS = ("--api-versions", "monitoring.coreos.com/v1")
COORDINATOR = ("Deployment", "sida-coordinator")
PREDICTOR_NODE = ("Deployment", "sida-predictor-node")
EXPERT_NODE = ("StatefulSet", "sida-expert-node")
FILES = [{"name": "config.json", "sha256": "1" * 64}, {"name": "model.safetensors", "sha256": "2" * 64}]


def fetching(**fetch):
    return {"weights": {"source": "fetch", "claimName": "models", "fetch": {"from": "url", "endpoint": "https://example.org", "files": FILES} | fetch}}


class Templates(unittest.TestCase):
    def test_every_template_begins_with_the_values(self):
        """Broken: a template would read a value that a values file left empty, and fail with a nil pointer."""
        for file in CHART.glob("templates/**/*"):
            if file.suffix in (".yaml", ".txt"):
                self.assertTrue(file.read_text().startswith('{{- include "sida.init" . '), file.name)

    def test_any_key_may_be_empty(self):
        """Broken: a values file with a section whose keys are commented out would end in a nil pointer."""
        values = yaml.safe_load((CHART / "values.yaml").read_text())
        normal = template({})
        paths = []

        def walk(value, path):
            for key, below in value.items():
                paths.append((*path, key))
                if isinstance(below, dict):
                    walk(below, (*path, key))

        documented = json.loads((CHART / "files/defaults.json").read_text())
        walk(values, ())
        # Entries of free maps (`resources.limits`) are removed by an empty key, as Helm has it.
        inside = lambda path: any(".".join(path).startswith(f"{known}.") for known in documented)
        sections = [path for path in paths if not inside(path)]
        self.assertGreater(len(sections), 150)
        # All leaves at once, and each section by itself.
        leaves = {}
        for path in sections:
            at = leaves
            for key in path[:-1]:
                at = at.setdefault(key, {})
            at[path[-1]] = {} if any(other[:-1] == path for other in sections) else None
        self.assertEqual(template(leaves), normal)
        self.assertEqual(template({path[0]: None for path in sections if len(path) == 1}), normal)
        for path in sections:
            if len(path) == 2 and any(other[:-1] == path for other in sections):
                self.assertEqual(template({path[0]: {path[1]: None}}), normal, path)

    def test_large_numbers_stay_whole(self):
        """Broken: a node would end at once, since 1200000 of a values file is rendered as 1.2e+06."""
        values = {"movesPerMinute": 1200000, "coordinator": {"drainSeconds": 3000000, "extraArgs": [1200000]}, "probes": {"startupSeconds": 4000000}, "expertNode": {"pools": [{"name": "a", "replicas": 1200000}]}}
        found = template(values)
        text = yaml.safe_dump(list(found.values()))
        self.assertNotRegex(text, r"\de\+\d")
        self.assertEqual(flag(found[COORDINATOR], "moves-per-minute"), ["1200000"])
        self.assertEqual(arguments_of(found[COORDINATOR])[-1], "1200000")
        self.assertEqual(found["StatefulSet", "sida-expert-node-a"]["spec"]["replicas"], 1200000)

    def test_texts_that_look_like_numbers(self):
        """Broken: the API server would refuse labels, annotations, selectors and variables that a values file has as
        numbers or booleans."""
        number = {"a": 1, "b": True, "c": 1.5, "d": 1200000, "e": None}
        texts = {"a": "1", "b": "true", "c": "1.5", "d": "1200000"}
        role = {"podLabels": number, "podAnnotations": number, "nodeSelector": number, "extraEnv": [{"name": "NUMBER", "value": 1200000}]}
        values = {"commonLabels": number, "coordinator": role | {"service": {"annotations": number}}, "serviceAccount": {"annotations": number}}
        found = template(values)
        for document in found.values():
            self.assertLessEqual(texts.items(), document["metadata"]["labels"].items())
            self.assertNotIn("e", document["metadata"]["labels"])
        meta, spec = found[COORDINATOR]["spec"]["template"]["metadata"], pod(found[COORDINATOR])
        self.assertLessEqual(texts.items(), meta["annotations"].items())
        self.assertEqual(spec["nodeSelector"], texts)
        self.assertIn({"name": "NUMBER", "value": "1200000"}, spec["containers"][0]["env"])
        self.assertEqual(found["Service", "sida"]["metadata"]["annotations"], texts)

    def test_labels_of_the_user_choose_no_pods(self):
        """Broken: a common label with the name of one of ours would be there twice, or pods would not be found."""
        found = template({"commonLabels": {"app.kubernetes.io/name": "other", "app.kubernetes.io/version": 7}})
        labels = found[COORDINATOR]["spec"]["template"]["metadata"]["labels"]
        self.assertEqual((labels["app.kubernetes.io/name"], labels["app.kubernetes.io/version"]), ("sida", "7"))
        self.assertLessEqual(found[COORDINATOR]["spec"]["selector"]["matchLabels"].items(), labels.items())

    def test_global_values(self):
        """Broken: pull secrets and labels that hold for all charts of a release would not reach this one's."""
        found = template({"global": {"imagePullSecrets": [{"name": "all"}], "commonLabels": {"team": "a"}, "other": {"chart": 1}}, "imagePullSecrets": [{"name": "own"}, {"name": "all"}]})
        for kind_and_name in (COORDINATOR, PREDICTOR_NODE, EXPERT_NODE, ("StatefulSet", "sida-etcd"), ("Pod", "sida-test-request")):
            self.assertEqual(pod(found[kind_and_name])["imagePullSecrets"], [{"name": "all"}, {"name": "own"}])
            self.assertEqual(found[kind_and_name]["metadata"]["labels"]["team"], "a")


class Weights(unittest.TestCase):
    def model(self, values):
        found = template(values)
        [path] = {argument for owner in (COORDINATOR, EXPERT_NODE) for argument in flag(found[owner], "model")}
        return path

    def test_another_pin_is_another_place(self):
        """Broken: a changed `sha256`, revision or source would be ignored, since a directory of that name is there."""
        base = self.model(fetching())
        self.assertEqual(base, self.model(fetching(keep=3)))
        other = [{"name": "config.json", "sha256": "3" * 64}, FILES[1]]
        paths = [base, *(self.model(fetching(**more)) for more in ({"files": other}, {"revision": "2"}, {"endpoint": "https://example.com"}, {"convert": True}))]
        self.assertEqual(len(set(paths)), 5, paths)
        for path in paths:
            self.assertRegex(path, "^/models/model-[0-9a-f]{12}$")

    def test_the_init_container_fetches_what_the_node_reads(self):
        """Broken: a node would look for the model at another place than it was fetched to."""
        for values in (fetching(), fetching(convert=True)):
            found = template(values)
            fetch, *others = pod(found[EXPERT_NODE])["initContainers"]
            environment = {entry["name"]: entry.get("value") for entry in fetch["env"]}
            [model] = flag(found[EXPERT_NODE], "model")
            self.assertEqual(f"{environment['BASE']}-{environment['PIN']}", model)
            for container in others:
                self.assertIn(model, container["args"])

    def test_files_without_a_manifest(self):
        """Broken: plain files of the hub, each pinned by its SHA-256, would fail since no manifest comes with them."""
        found = template(fetching())
        [fetch] = pod(found[EXPERT_NODE])["initContainers"]
        self.assertIn({"name": "VERIFY", "value": "yes"}, fetch["env"])
        with_manifest = template(fetching(files=[{"name": "sida.manifest.json"}, *FILES]))
        self.assertEqual([c["name"] for c in pod(with_manifest[EXPERT_NODE])["initContainers"]], ["fetch-weights", "verify-weights"])

    def test_a_volume_that_is_only_read(self):
        """Broken: a ReadOnlyMany claim could not be mounted."""
        found = template({"weights": {"source": "pvc", "claimName": "models"}, "predictor": {"source": "pvc", "claimName": "predictors"}})
        claims = [v["persistentVolumeClaim"] for v in pod(found[PREDICTOR_NODE])["volumes"] if "persistentVolumeClaim" in v]
        self.assertEqual(claims, [{"claimName": "models", "readOnly": True}, {"claimName": "predictors", "readOnly": True}])

    def test_a_volume_of_the_chart(self):
        """Broken: nobody would make the volume that is fetched into, or it would go with the release."""
        values = fetching()
        values["weights"] |= {"claimName": "", "volume": {"create": True, "size": "30Gi"}}
        found = template(values)
        claim = found["PersistentVolumeClaim", "sida-weights"]
        self.assertEqual(claim["metadata"]["annotations"]["helm.sh/resource-policy"], "keep")
        self.assertEqual(claim["spec"], {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "30Gi"}}})
        [volume] = [v for v in pod(found[EXPERT_NODE])["volumes"] if v["name"] == "weights"]
        self.assertEqual(volume["persistentVolumeClaim"], {"claimName": "sida-weights"})

    def test_keys_of_s3(self):
        """Broken: S3 would be reached by keys that never end only."""
        keys = lambda found: {e["name"]: e for e in pod(found[EXPERT_NODE])["initContainers"][0]["env"] if e["name"].startswith("AWS")}
        found = keys(template(fetching(**{"from": "s3", "repository": "b/m", "existingSecret": "s3"})))
        self.assertIs(found["AWS_SESSION_TOKEN"]["valueFrom"]["secretKeyRef"]["optional"], True)
        self.assertIs(found["AWS_ACCESS_KEY_ID"]["valueFrom"]["secretKeyRef"]["optional"], False)
        by_role = template(fetching(**{"from": "s3", "repository": "b/m", "roleArn": "arn:aws:iam::0:role/m"}))
        file = keys(by_role)["AWS_WEB_IDENTITY_TOKEN_FILE"]["value"]
        mounts = {m["name"]: m["mountPath"] for m in pod(by_role[EXPERT_NODE])["initContainers"][0]["volumeMounts"]}
        self.assertTrue(file.startswith(mounts["web-identity"]))
        self.assertFalse(keys(template(fetching(**{"from": "s3", "repository": "b/m"}))))


class Predictors(unittest.TestCase):
    def test_no_predictor(self):
        """Broken: with a checkpoint that has no predictor a predictor-node would be started again and again, and an alert
        would tell for ever that nobody predicts."""
        for values in (fetching(), {"weights": {"source": "pvc", "claimName": "m"}, "predictor": {"source": "none"}}):
            found = template(values, *OPERATORS)
            self.assertNotIn(PREDICTOR_NODE, found)
            self.assertNotIn(("PodDisruptionBudget", "sida-predictor-node"), found)
            self.assertEqual(flag(found[COORDINATOR], "predictor"), ["off"])
            alerts = [rule["alert"] for rule in found["PrometheusRule", "sida"]["spec"]["groups"][0]["rules"]]
            self.assertNotIn("SidaPredictionsMissing", alerts)
            self.assertIn("SidaNodeDown", alerts)
        self.assertIn(PREDICTOR_NODE, template(fetching(files=[*FILES, {"name": "predictor.safetensors", "sha256": "3" * 64}])))

    def test_whether_a_volume_has_one_must_be_said(self):
        """Broken: the chart would guess, and be wrong in one of two cases without a word."""
        output = rendered({"weights": {"source": "pvc", "claimName": "models"}})
        self.assertIn("predictor.source", output.stderr)
        self.assertNotEqual(output.returncode, 0)

    def test_a_predictor_from_elsewhere(self):
        """Broken: a predictor that was trained here could not be used with a model that somebody else keeps."""
        base = {"weights": {"source": "pvc", "claimName": "m"}}
        fetch = {"url": "https://example.org/a/own.safetensors", "sha256": "4" * 64}
        for predictor, file in [
            ({"source": "pvc", "claimName": "p", "path": "own/predictor.safetensors"}, "/predictor/own/predictor.safetensors"),
            ({"source": "image", "image": {"reference": "predictors:1"}}, "/predictor/predictor.safetensors"),
            ({"source": "fetch", "fetch": fetch}, f"/predictor/fetched-{'4' * 12}/own.safetensors"),
        ]:
            found = template(base | {"predictor": predictor})
            self.assertEqual(flag(found[PREDICTOR_NODE], "predictor"), [file])
            mounts = lambda owner: [m["mountPath"] for m in pod(found[owner])["containers"][0]["volumeMounts"]]
            self.assertIn("/predictor", mounts(PREDICTOR_NODE))
            self.assertNotIn("/predictor", mounts(EXPERT_NODE))
            by_file = template(base | {"predictor": predictor, "coordinator": {"predictor": "file"}, "predictorNode": {"replicas": 0}})
            self.assertEqual(flag(by_file[COORDINATOR], "predictor"), [file])
        [init] = [c for c in pod(found[PREDICTOR_NODE])["initContainers"] if c["name"] == "fetch-predictor"]
        environment = {e["name"]: e.get("value") for e in init["env"]}
        self.assertEqual((environment["ENDPOINT"], environment["FILES"]), ("https://example.org/a", f"own.safetensors {'4' * 64}"))


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


class Arguments(unittest.TestCase):
    def test_extra_arguments_override(self):
        """Broken: a flag that the chart sets, too, would be there twice, and the node would end at once."""
        for extra in (["--log=debug", "--threads=4"], ["--log", "debug", "--threads", 4]):
            arguments = arguments_of(template({"coordinator": {"extraArgs": extra}})[COORDINATOR])
            self.assertEqual(arguments[-len(extra):], [str(argument) for argument in extra])
            names = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
            self.assertEqual(len(names), len(set(names)))
            self.assertIn("--log-format=json", arguments)


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


class Pools(unittest.TestCase):
    VALUES = {
        "expertNode": {
            "priorityClassName": "high",
            "tolerations": [{"key": "own", "operator": "Exists"}],
            "pools": [
                {"name": "h100", "expertMemory": "60GiB", "nodeSelector": {"gpu": "h100"}},
                {"name": "mig", "replicas": 4, "gpuResource": "nvidia.com/mig-3g.40gb", "autoscaling": {"enabled": True}},
                {"name": "cpu", "gpus": 0, "priorityClassName": "low"},
            ],
        }
    }

    def test_pools(self):
        """Broken: a cluster could not have two kinds of GPUs, or the pools would take each other's pods."""
        found = template(self.VALUES)
        h100, mig, cpu = (found["StatefulSet", f"sida-expert-node-{name}"] for name in ("h100", "mig", "cpu"))
        self.assertNotIn(EXPERT_NODE, found)
        limits = [pod(owner)["containers"][0]["resources"].get("limits") for owner in (h100, mig, cpu)]
        self.assertEqual(limits, [{"nvidia.com/gpu": 1}, {"nvidia.com/mig-3g.40gb": 1}, None])
        self.assertEqual([flag(owner, "device") for owner in (h100, mig, cpu)], [["cuda:0"], ["cuda:0"], []])
        self.assertEqual([flag(owner, "host-memory") for owner in (h100, mig, cpu)], [["25%"], ["25%"], []])
        self.assertEqual([pod(owner)["priorityClassName"] for owner in (h100, mig, cpu)], ["high", "high", "low"])
        selectors = [json.dumps(owner["spec"]["selector"]) for owner in (h100, mig, cpu)]
        self.assertEqual(len(set(selectors)), 3)
        for owner in (h100, mig, cpu):
            self.assertEqual(owner["spec"]["serviceName"], "sida-expert-node")
            self.assertLessEqual(found["Service", "sida-expert-node"]["spec"]["selector"].items(), owner["spec"]["template"]["metadata"]["labels"].items())
        hpa = found["HorizontalPodAutoscaler", "sida-expert-node-mig"]["spec"]
        self.assertEqual((hpa["minReplicas"], hpa["maxReplicas"]), (4, 8))
        self.assertNotIn(("HorizontalPodAutoscaler", "sida-expert-node-h100"), found)

    def test_tolerations_of_gpus(self):
        """Broken: a pod with a GPU could not go to the machines that have one, or one without would go there."""
        gpu = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        own = {"key": "own", "operator": "Exists"}
        found = template(self.VALUES | {"coordinator": {"gpus": 1}})
        self.assertEqual(pod(found[COORDINATOR])["tolerations"], [gpu])
        self.assertEqual(pod(found["StatefulSet", "sida-expert-node-mig"])["tolerations"], [own, gpu])
        self.assertEqual(pod(found["StatefulSet", "sida-expert-node-cpu"])["tolerations"], [own])
        self.assertNotIn("tolerations", pod(template({"gpu": {"enabled": False}})[EXPERT_NODE]))

    def test_pools_are_refused(self):
        """Broken: pools of one name, or names that no StatefulSet may have, would be refused by the API server."""
        for pools, reason in [
            ([{"name": "a"}, {"name": "a"}], "two are named a"),
            ([{"name": "a" * 60}], "52 characters"),
            ([{"replicas": 1}], "name"),
            ([{"name": "A"}], "name"),
            ([{"name": "a", "replica": 1}], "replica"),
            ([{"name": "a", "autoscaling": {"enabled": True}, "keda": {"enabled": True}}], "not both"),
        ]:
            output = rendered({"expertNode": {"pools": pools}})
            self.assertNotEqual(output.returncode, 0, pools)
            self.assertIn(reason, output.stderr)

    def test_where_etcd_and_the_test_run(self):
        """Broken: on a cluster whose machines are all tainted or chosen by labels, etcd and `helm test` would be Pending."""
        where = {"nodeSelector": {"a": "b"}, "tolerations": [{"key": "k", "operator": "Exists"}], "affinity": {"nodeAffinity": {}}, "priorityClassName": "p", "schedulerName": "s"}
        found = template({"etcd": {"bundled": where}, "test": where, "coordinator": where})
        for owner in (("StatefulSet", "sida-etcd"), ("Pod", "sida-test-request"), COORDINATOR):
            self.assertLessEqual(where.items(), pod(found[owner]).items())


class Networks(unittest.TestCase):
    def test_ipv6(self):
        """Broken: in a cluster without IPv4 nodes would listen where nobody can come, and tell addresses that cannot be
        told from a port."""
        found = template({"network": {"podIpFamily": "IPv6", "ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv6"]}})
        for owner in (COORDINATOR, PREDICTOR_NODE, EXPERT_NODE):
            self.assertEqual([flag(found[owner], name)[0] for name in ("listen", "advertise", "metrics-listen")], ["[::]:50051", "[$(POD_IP)]:50051", "[::]:9090"])
        self.assertNotIn("0.0.0.0", yaml.safe_dump(list(found.values())))
        services = [d["spec"] for (kind, _), d in found.items() if kind == "Service"]
        self.assertEqual({(s["ipFamilyPolicy"], *s["ipFamilies"]) for s in services}, {("SingleStack", "IPv6")})

    def test_endpoints_of_etcd(self):
        """Broken: an etcd that is reached by IPv6 could not be named, or a wrong name would be taken."""
        for endpoint, is_good in [("[fd00::1]:2379", True), ("10.0.0.1:2379", True), ("etcd.db:2379", True), ("fd00::1:2379", False), ("[fd00::1]", False), ("http://etcd:2379", False)]:
            self.assertEqual(rendered({"etcd": {"endpoints": [endpoint]}}).returncode == 0, is_good, endpoint)

    def test_extra_ports(self):
        """Broken: a mesh could not have its ports on pods and the Service."""
        port, service = {"name": "mesh", "containerPort": 15021}, {"name": "mesh", "port": 15021}
        found = template({"coordinator": {"extraPorts": [port], "service": {"extraPorts": [service]}}})
        self.assertIn(port, pod(found[COORDINATOR])["containers"][0]["ports"])
        self.assertIn(service, found["Service", "sida"]["spec"]["ports"])

    def test_ways_in(self):
        """Broken: callers from outside would need objects that everybody writes by hand."""
        values = {
            "coordinator": {"service": {"port": 8080}},
            "ingress": {"enabled": True, "className": "nginx", "hosts": ["a.example.org", "b.example.org"], "tls": [{"hosts": ["a.example.org"], "secretName": "a"}]},
            "gateway": {"parentRefs": [{"name": "public"}], "hostnames": ["a.example.org"], "grpcRoute": {"enabled": True}, "httpRoute": {"enabled": True, "timeouts": {"request": "600s"}}},
        }
        found = template(values)
        ingress = found["Ingress", "sida"]["spec"]
        self.assertEqual([rule["host"] for rule in ingress["rules"]], ["a.example.org", "b.example.org"])
        backend = ingress["rules"][0]["http"]["paths"][0]["backend"]["service"]
        ports = {p["name"]: p["port"] for p in found["Service", backend["name"]]["spec"]["ports"]}
        self.assertIn(backend["port"]["name"], ports)
        for kind in ("GRPCRoute", "HTTPRoute"):
            route = found[kind, "sida"]["spec"]
            self.assertEqual(route["rules"][0]["backendRefs"], [{"name": "sida", "port": 8080}])
            self.assertEqual(route["hostnames"], ["a.example.org"])
        self.assertEqual(found["HTTPRoute", "sida"]["spec"]["rules"][0]["timeouts"], {"request": "600s"})
        self.assertIn("gateway.parentRefs", rendered({"gateway": {"grpcRoute": {"enabled": True}}}).stderr)

    def test_who_speaks_tls_says_so(self):
        """Broken: a gateway would speak plain HTTP/2 to coordinators that want TLS."""
        protocol = lambda values: template(values)["Service", "sida"]["spec"]["ports"][0]["appProtocol"]
        self.assertEqual(protocol({}), "kubernetes.io/h2c")
        self.assertEqual(protocol({"tls": {"enabled": True, "existingSecret": "c"}}), "https")


class More(unittest.TestCase):
    def test_operators_kinds_offline(self):
        """Broken: who renders offline, as Argo CD does, would get no PodMonitor and no alerts."""
        kinds = {kind for kind, _ in template({"metrics": {"assumeOperator": True}})}
        self.assertLessEqual({"PodMonitor", "PrometheusRule"}, kinds)

    def test_links_of_alerts(self):
        """Broken: the link of a page at night would lead nowhere."""
        links = lambda values: [rule["annotations"].get("runbook_url") for rule in template(values, *OPERATORS)["PrometheusRule", "sida"]["spec"]["groups"][0]["rules"]]
        for link in links({"metrics": {"rules": {"runbookUrl": "https://example.org/operations.md"}}}):
            self.assertRegex(link, "^https://example.org/operations.md#sida[a-z]+$")
        self.assertEqual(set(links({})), {None})
        self.assertNotEqual(rendered({"metrics": {"rules": {"runbookUrl": "docs/operations.md"}}}).returncode, 0)

    def test_thresholds_of_alerts(self):
        """Broken: the values that say how many failures call somebody would do nothing."""
        values = {"metrics": {"rules": {"failedRequests": 50, "failedShare": 0.2}}}
        rules = {rule["alert"]: rule["expr"] for rule in template(values, *OPERATORS)["PrometheusRule", "sida"]["spec"]["groups"][0]["rules"]}
        self.assertRegex(rules["SidaRequestsUnavailable"], r"> 0\.2 and .*>= 50$")
        self.assertRegex(rules["SidaRequestsFailing"], r">= 50$")

    def test_extra_objects_and_containers(self):
        """Broken: what a site needs beside the chart would need a chart of its own."""
        values = {"extraObjects": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a-{{ .Release.Name }}"}}, "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: b}"], "expertNode": {"initContainers": [{"name": "own", "image": "a:1"}]}} | fetching()
        found = template(values)
        self.assertLessEqual({("ConfigMap", "a-sida"), ("ConfigMap", "b")}, set(found))
        self.assertEqual([c["name"] for c in pod(found[EXPERT_NODE])["initContainers"]], ["fetch-weights", "own"])

    def test_notes(self):
        """Broken: with mutual TLS the command that the notes give would be refused."""
        def notes(values):
            # Helm shows notes where there is an API server only.
            with tempfile.TemporaryDirectory() as directory:
                chart = pathlib.Path(directory) / "sida"
                shutil.copytree(CHART, chart)
                shown = '{{- define "shown" }}' + (CHART / "templates/NOTES.txt").read_text() + "{{ end }}"
                (chart / "templates/shown.yaml").write_text(shown + "{kind: Notes, metadata: {name: shown}, text: {{ include \"shown\" . | quote }}}")
                return template(values, chart=chart)["Notes", "shown"]["text"]

        certificate = {"enabled": True, "existingSecret": "c"}
        mutual, one_sided, plain = (notes(values) for values in ({"tls": certificate}, {"tls": certificate | {"mutual": False}}, {}))
        self.assertIn("--tls-cert tls.crt --tls-key tls.key", mutual)
        self.assertIn("get secret c", mutual)
        self.assertNotIn("--tls-cert", one_sided)
        self.assertIn("--tls-ca", one_sided)
        self.assertNotIn("tls", plain)
        self.assertIn("no predictor", notes(fetching()))
        self.assertIn("mig", notes(Pools.VALUES))


if __name__ == "__main__":
    unittest.main()
