"""The chart, by the tools that its users have: helm renders and refuses, kubernetes-validate checks against Kubernetes'
schemas, promtool checks rules. Run by tests/run.sh, which installs them; SIDA_REWRITE=1 writes the snapshots anew."""

import copy
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

import yaml

HERE = pathlib.Path(__file__).parent
REPOSITORY = HERE.parents[1]
CHART = REPOSITORY / "helm/sida"
HELM = pathlib.Path(sys.executable).parent / "helm"
VALIDATE = pathlib.Path(sys.executable).parent / "kubernetes-validate"
CASES = yaml.safe_load((HERE / "cases.yaml").read_text())


def helm(*arguments):
    return subprocess.run([HELM, *arguments], capture_output=True, text=True)


def case_of(name):
    """(values, API versions) of a case."""
    case = CASES[name]
    return (case["values"], case.get("api", [])) if "values" in case else (case, [])


def rendered(values, api=()):
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(values, file)
        file.flush()
        versions = [argument for version in api for argument in ("--api-versions", version)]
        return helm("template", "sida", CHART, "--namespace", "moe", "--values", file.name, *versions)


@functools.cache
def parsed(name):
    output = rendered(*case_of(name))
    assert output.returncode == 0, output.stderr
    return [document for document in yaml.load_all(output.stdout, yaml.CSafeLoader) if document]


def objects(name):
    """Everything that a case renders; the caller may change it."""
    return copy.deepcopy(parsed(name))


def pods(name):
    """(owner, pod specification) of everything that runs."""
    for document in objects(name):
        if document["kind"] in ("Deployment", "StatefulSet"):
            yield document, document["spec"]["template"]["spec"]
        elif document["kind"] == "Pod":
            yield document, document["spec"]


def flags_of_commands():
    """{command: {flag: default}} of docs/flags.md, which a test of the commands writes."""
    flags, command = {}, None
    for line in (REPOSITORY / "docs/flags.md").read_text().splitlines():
        if line.startswith("## sida "):
            command = flags.setdefault(line.removeprefix("## sida "), {})
        elif found := re.match(r"\| `(--[a-z-]+)` \| ([^|]*) \|", line):
            command[found[1]] = found[2].strip()
    return flags


def dump_all(documents, **more):
    return yaml.dump_all(documents, Dumper=yaml.CSafeDumper, **more)


class Chart(unittest.TestCase):
    def test_lint(self):
        """Broken: helm would warn whoever installs it."""
        for name in CASES:
            with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
                yaml.safe_dump(case_of(name)[0], file)
                file.flush()
                output = helm("lint", "--strict", CHART, "--values", file.name)
                self.assertEqual(output.returncode, 0, output.stdout)

    def test_snapshots(self):
        """Broken: a template would render something else than what was reviewed."""
        for name in CASES:
            with self.subTest(name):
                # The dashboards and the script are files of their own.
                documents = [d for d in objects(name) if "-dashboard-" not in d["metadata"]["name"]]
                for document in documents:
                    if "fetch-weights.sh" in document.get("data", {}):
                        document["data"]["fetch-weights.sh"] = "as in files/"
                text = dump_all(documents, sort_keys=True, width=120)
                if name != "cpu":
                    text = self.differences_from_cpu(documents)
                file = HERE / "snapshots" / f"{name}.yaml"
                if "SIDA_REWRITE" in os.environ:
                    file.write_text(text)
                self.assertEqual(text, file.read_text(), name)

    def differences_from_cpu(self, documents):
        """Objects that are not as in the case `cpu`, and names of those that are missing: what a reviewer reads."""
        key = lambda d: (d["kind"], d["metadata"]["name"])
        base = {key(d): d for d in objects("cpu") if "-dashboard-" not in d["metadata"]["name"]}
        missing = sorted("/".join(k) for k in base.keys() - {key(d) for d in documents})
        changed = [d for d in documents if base.get(key(d)) != d]
        return dump_all([{"missing": missing}, *changed], sort_keys=True, width=120)

    def test_kubernetes_takes_it(self):
        """Broken: `helm install` would be refused by the API server, or a misspelt field would do nothing."""
        with tempfile.TemporaryDirectory() as directory:
            files, told = [], set()
            for name in CASES:
                # Other projects' kinds have schemas of their own.
                known = [d for d in objects(name) if not re.search(r"coreos|cert-manager|keda|gateway", d["apiVersion"])]
                # Most of a case is as in another one, and reading it takes long.
                new = {dump_all([d], explicit_start=True) for d in known} - told
                told |= new
                files.append(pathlib.Path(directory) / f"{name}.yaml")
                files[-1].write_text("".join(sorted(new)))
            self.assertGreater(len(told), len(CASES))
            output = subprocess.run([VALIDATE, "--strict", "--quiet", *files], capture_output=True, text=True)
            self.assertEqual((output.returncode, output.stdout, output.stderr), (0, "", ""))

    def test_validation_finds_what_is_wrong(self):
        """Broken: the test above could not fail."""
        wrong = [d for d in objects("cpu") if d["kind"] == "Deployment"][0]
        wrong["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(wrong, file)
            file.flush()
            output = subprocess.run([VALIDATE, "--strict", file.name], capture_output=True, text=True)
        self.assertNotEqual(output.returncode, 0)

    def test_values_are_refused(self):
        """Broken: a misspelt or impossible value would be ignored, and something else would run."""
        fetch = {"source": "fetch", "claimName": "c"}
        file = {"name": "config.json", "sha256": "0" * 64}
        for values, reason in [
            ({"coordinator": {"replica": 3}}, "replica"),
            ({"expertNode": {"gpus": "two"}}, "gpus"),
            ({"expertNode": {"expertMemory": "half"}}, "expertMemory"),
            ({"expertNode": {"expertMemory": "101%"}}, "expertMemory"),
            ({"expertNode": {"hostMemory": "0%"}}, "hostMemory"),
            ({"expertNode": {"pools": [{"name": "a", "expertMemory": "250%"}]}}, "expertMemory"),
            ({"coordinator": {"cacheMemory": "100.5%"}}, "cacheMemory"),
            ({"coordinator": {"clientQueueShare": "150%"}}, "clientQueueShare"),
            ({"coordinator": {"clientQueueShare": "0%"}}, "clientQueueShare"),
            ({"coordinator": {"clientQueueShare": "0.5"}}, "clientQueueShare"),
            ({"image": {"tag": "latest"}}, "image.tag"),
            ({"log": {"format": "xml"}}, "format"),
            ({"tracing": {"sampling": 2}}, "sampling"),
            ({"weights": {"source": "pvc"}}, "weights.claimName"),
            ({"weights": {"source": "image"}}, "weights.image.reference"),
            ({"weights": fetch}, "weights.fetch.files"),
            ({"weights": fetch | {"fetch": {"repository": "a/b", "files": [file]}}}, "revision"),
            ({"weights": fetch | {"fetch": {"repository": "a/b", "revision": "main", "files": [file]}}}, "revision"),
            ({"weights": fetch | {"fetch": {"from": "url", "files": [{"name": "config.json"}]}}}, "sha256"),
            ({"weights": fetch | {"fetch": {"from": "url", "files": [{"name": "../x"}]}}}, "name"),
            ({"etcd": {"bundled": {"replicas": 3}}}, "persistence"),
            ({"etcd": {"bundled": {"replicas": 2}}}, "replicas"),
            ({"etcd": {"endpoints": ["http://etcd:2379"]}}, "endpoints"),
            ({"tls": {"enabled": True}}, "tls"),
            ({"predictorNode": {"replicas": 0}}, "coordinator.predictor"),
            ({"coordinator": {"autoscaling": {"enabled": True}, "keda": {"enabled": True}}}, "not both"),
        ]:
            with self.subTest(values=values):
                output = rendered(values)
                self.assertNotEqual(output.returncode, 0, values)
                self.assertIn(reason, output.stderr)

    def test_schema_and_readme_are_those_of_the_values(self):
        """Broken: a documented value would not exist, or the schema would refuse one that does."""
        output = subprocess.run([sys.executable, REPOSITORY / "helm/generate.py", "--check"], capture_output=True, text=True)
        self.assertEqual(output.returncode, 0, output.stderr)

    def test_pods_have_no_rights(self):
        """Broken: a node that is broken into would be root, could write its image or ask Kubernetes for secrets."""
        for name in CASES:
            for owner, spec in pods(name):
                with self.subTest(name, owner=owner["metadata"]["name"]):
                    self.assertIs(spec["automountServiceAccountToken"], False)
                    self.assertIs(spec["enableServiceLinks"], False)
                    self.assertIs(spec["securityContext"]["runAsNonRoot"], True)
                    self.assertEqual(spec["securityContext"]["seccompProfile"], {"type": "RuntimeDefault"})
                    for container in spec["containers"] + spec.get("initContainers", []):
                        security = container["securityContext"]
                        self.assertIs(security["readOnlyRootFilesystem"], True)
                        self.assertIs(security["allowPrivilegeEscalation"], False)
                        self.assertEqual(security["capabilities"], {"drop": ["ALL"]})

    def test_images_are_pinned(self):
        """Broken: two pods of one release could run different programs."""
        for name in CASES:
            for _, spec in pods(name):
                for container in spec["containers"] + spec.get("initContainers", []):
                    self.assertRegex(container["image"], r"(:v?[0-9][\w.-]*|@sha256:[0-9a-f]{64})$")

    def test_a_slow_load_is_not_killed(self):
        """Broken: a model that loads for minutes would be started again and again. Liveness asks the process, never what
        it waits for, and begins once the start is over; readiness and liveness are different questions."""
        for name in CASES:
            for owner, spec in pods(name):
                if owner["metadata"]["labels"]["app.kubernetes.io/component"] in ("etcd", "test"):
                    continue
                node = spec["containers"][0]
                startup, live, ready = node["startupProbe"], node["livenessProbe"], node["readinessProbe"]
                self.assertGreaterEqual(startup["periodSeconds"] * startup["failureThreshold"], 1800)
                self.assertGreaterEqual(live["periodSeconds"] * live["failureThreshold"], 60)
                question = lambda probe: probe.get("grpc") or probe.get("httpGet")
                self.assertEqual(question(startup), question(live))
                self.assertNotEqual(question(live), question(ready))
                # The kubelet cannot speak TLS to gRPC.
                by_tls = any(argument.startswith("--tls-cert") for argument in node["args"])
                self.assertEqual("httpGet" in live, by_tls)

    def test_a_rollout_needs_no_spare_gpu(self):
        """Broken: a rollout would wait for a GPU that only the pod which it replaces could free."""
        for name in CASES:
            for owner, spec in pods(name):
                limits = spec["containers"][0].get("resources", {}).get("limits", {})
                if "nvidia.com/gpu" not in limits:
                    continue
                with self.subTest(name, owner=owner["metadata"]["name"]):
                    if owner["kind"] == "Deployment":
                        rolling = owner["spec"]["strategy"]["rollingUpdate"]
                        self.assertEqual(rolling, {"maxSurge": 0, "maxUnavailable": 1})
                    else:
                        self.assertEqual(owner["spec"]["updateStrategy"]["rollingUpdate"], {"maxUnavailable": 1})
        gpus = [s["containers"][0].get("resources", {}).get("limits", {}) for _, s in pods("gpu")]
        self.assertEqual(sum("nvidia.com/gpu" in limits for limits in gpus), 2)

    def test_termination_outlasts_the_drain(self):
        """Broken: a pod would be killed while it finishes its requests."""
        for name in CASES:
            for owner, spec in pods(name):
                for argument in spec["containers"][0].get("args", []):
                    if argument.startswith("--drain="):
                        drain = int(argument.removeprefix("--drain=").removesuffix("s"))
                        self.assertGreater(spec["terminationGracePeriodSeconds"], drain + 5)

    def test_no_probe_asks_for_etcd(self):
        """Broken: an etcd that is away for a moment would have everything started again. Whether a node reaches etcd is
        a metric and an alert; tests/end_to_end/etcd/away.rs holds that serving goes on."""
        for _, spec in pods("cpu"):
            for container in spec["containers"]:
                for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                    self.assertNotIn("2379", json.dumps(container.get(probe, {})))
                self.assertNotIn("exec", container.get("livenessProbe", {}))

    def test_operators_objects_are_gated(self):
        """Broken: the chart could not be installed where there is no Prometheus operator."""
        kinds = lambda name: {d["kind"] for d in objects(name)}
        self.assertFalse({"PodMonitor", "PrometheusRule"} & kinds("cpu"))
        self.assertLessEqual({"PodMonitor", "PrometheusRule"}, kinds("operators"))

    def test_rules(self):
        """Broken: Prometheus would refuse the alerts, or one would not fire when it should, or fire when it should not."""
        alerts = CHART / "alerts/sida.yaml"
        for command in (["check", "rules", alerts], ["test", "rules", HERE / "alerts_test.yaml"]):
            output = subprocess.run(["promtool", *command], capture_output=True, text=True)
            self.assertEqual(output.returncode, 0, output.stdout + output.stderr)
        tested = (HERE / "alerts_test.yaml").read_text()
        manual = (REPOSITORY / "docs/operations.md").read_text()
        headings = {re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in manual.splitlines() if line.startswith("#")}
        for rule in yaml.safe_load(alerts.read_text())["groups"][0]["rules"]:
            self.assertIn(f"alertname: {rule['alert']}\n", tested)
            file, _, anchor = rule["annotations"]["runbook_url"].partition("#")
            self.assertEqual(file, "docs/operations.md")
            self.assertIn(anchor, headings)
        rule = [d for d in objects("operators") if d["kind"] == "PrometheusRule"][0]
        self.assertEqual(rule["spec"]["groups"][0]["rules"][0]["annotations"]["runbook_url"], "https://example.org/sida/blob/main/docs/operations.md#sidanodedown")

    def test_flags_exist(self):
        """Broken: a pod or a compose service would end at once with exit code 64."""
        flags = flags_of_commands()
        for name in CASES:
            for owner, spec in pods(name):
                for container in spec["containers"] + spec.get("initContainers", []):
                    if "command" in container:
                        continue
                    command, *arguments = container["args"]
                    for argument in arguments:
                        if argument.startswith("--"):
                            self.assertIn(argument.split("=")[0], flags[command], f"{name}: {container['name']}")
        services = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())["services"]
        known = lambda command: {"SIDA_" + flag.lstrip("-").replace("-", "_").upper() for flag in flags[command]}
        ours = {name: service for name, service in services.items() if service["image"].startswith("sida:")}
        self.assertEqual(len(ours), 4)
        for service in ours.values():
            [command] = service["command"]
            self.assertLessEqual(set(service["environment"]), known(command))
        check = ours["coordinator-0"]["healthcheck"]["test"]
        self.assertLessEqual({argument for argument in check if argument.startswith("--")}, flags[check[2]].keys())

    def test_compose_mounts_what_is_there(self):
        """Broken: Grafana or Prometheus would come up empty."""
        for service in yaml.safe_load((REPOSITORY / "compose.yaml").read_text())["services"].values():
            for volume in service.get("volumes", []):
                self.assertTrue((REPOSITORY / volume.split(":")[0]).exists(), volume)
        config = subprocess.run(["promtool", "check", "config", "--syntax-only", REPOSITORY / "deploy/prometheus/prometheus.yaml"], capture_output=True, text=True)
        self.assertEqual(config.returncode, 0, config.stdout + config.stderr)


if __name__ == "__main__":
    unittest.main()
