"""What values do, each as a user would set it: what the API server would get. The snapshots (test_chart.py) hold everything
else that is rendered."""

import json
import pathlib
import shutil
import tempfile
import unittest

import yaml

from releases import COORDINATOR, EXPERT_NODE, OPERATORS, PREDICTOR_NODE, arguments_of, fetching, flag, pod, template
from test_chart import CASES, CHART, flags_of_commands, pods, rendered

FLAGS = {command: flags for command, flags in flags_of_commands().items() if command in ("coordinator", "expert-node", "predictor-node")}


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


class Arguments(unittest.TestCase):
    def test_extra_arguments_override(self):
        """Broken: a flag that the chart sets, too, would be there twice, and the node would end at once."""
        for extra in (["--log=debug", "--threads=4"], ["--log", "debug", "--threads", 4]):
            arguments = arguments_of(template({"coordinator": {"extraArgs": extra}})[COORDINATOR])
            self.assertEqual(arguments[-len(extra):], [str(argument) for argument in extra])
            names = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
            self.assertEqual(len(names), len(set(names)))
            self.assertIn("--log-format=json", arguments)

    def test_extra_environment_overrides(self):
        """Broken: a variable that a values file sets for a flag would do nothing, since the chart's argument goes before it."""
        found = template({"coordinator": {"extraEnv": [{"name": "SIDA_QUEUE_MAX", "value": "9"}]}})
        self.assertEqual(flag(found[COORDINATOR], "queue-max"), [])
        self.assertEqual(flag(found[COORDINATOR], "queue-tokens-max"), ["2097152"])

    def test_every_flag_can_be_set(self):
        """Broken: an operator could not set a flag of a node without knowing that extraArgs takes it. Each is set in one of the
        cases that are rendered, by a value or by the chart itself, or it is in this list."""
        left_to_extra_args = {
            "--static": "members are in etcd",
            "--config": "its keys are flags, each of which has a value",
            "--send-rows": "pods do not see each other's memory, so they send rows anyway",
            "--tls-client-names": "of a coordinator: apiKeys and the network policy say who may call",
        }
        for role, flags in FLAGS.items():
            containers = [spec["containers"][0] for name in CASES for _, spec in pods(name)]
            rendered = {argument.split("=")[0] for c in containers if c.get("args", [None])[0] == role for argument in c["args"]}
            self.assertEqual(sorted(flags.keys() - rendered - left_to_extra_args.keys()), [], role)

    def test_defaults_are_those_of_the_flags(self):
        """Broken: the chart would change what a flag is that nobody set, and its page would be all that tells."""
        documented = json.loads((CHART / "files/defaults.json").read_text())
        compared = set()
        own = {"--expert-memory": "half of the experts, since two nodes are the least", "--host-memory": "it counts towards the memory of a pod", "--predictor": "the value says from where, the flag which", "--replicas": "the value counts pods"}
        for role, values in (("coordinator", "coordinator"), ("expert-node", "expertNode"), ("predictor-node", "predictorNode"), (None, None)):
            for name, default in FLAGS[role or "coordinator"].items():
                first, *others = name.lstrip("-").split("-")
                path = ".".join(filter(None, (values, first + "".join(word.capitalize() for word in others))))
                if path in documented and name not in own:
                    said = documented[path]
                    self.assertEqual(json.dumps(said) if isinstance(said, bool) else str(said), default, path)
                    compared.add(path)
        self.assertGreater(len(compared), 35)


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

    def test_http(self):
        """Broken: the port of OpenAI's clients would lead nowhere, or be open although it was not wanted."""
        parent = {"parentRefs": [{"name": "public"}]}
        pages = ["https://chat.example.org", "http://localhost:3000"]
        found = template({"coordinator": {"http": {"port": 80, "corsOrigins": pages}}, "gateway": parent | {"openaiRoute": {"enabled": True}}, "ingress": {"enabled": True, "port": "http"}})
        container = pod(found[COORDINATOR])["containers"][0]
        self.assertIn("--http-listen=0.0.0.0:8000", container["args"])
        self.assertIn("--http-cors-origins=" + ",".join(pages), container["args"])
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        service = {port["name"]: port for port in found["Service", "sida"]["spec"]["ports"]}
        self.assertEqual((ports["http"], service["http"]["port"], service["http"]["targetPort"]), (8000, 80, "http"))
        self.assertEqual(found["HTTPRoute", "sida-openai"]["spec"]["rules"][0]["backendRefs"], [{"name": "sida", "port": 80}])
        self.assertEqual(found["Ingress", "sida"]["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]["port"], {"name": "http"})
        allowed = found["NetworkPolicy", "sida-coordinator"]["spec"]["ingress"][0]["ports"]
        self.assertIn({"port": "http", "protocol": "TCP"}, allowed)
        without = {"coordinator": {"http": {"enabled": False}}}
        self.assertNotIn("http", str(pod(template(without)[COORDINATOR])["containers"][0]["ports"]))
        for values in ({"gateway": parent | {"openaiRoute": {"enabled": True}}}, {"ingress": {"enabled": True, "port": "http"}}):
            self.assertIn("coordinator.http.enabled", rendered(without | values).stderr)

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
