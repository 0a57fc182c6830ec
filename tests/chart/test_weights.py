"""How the model and its predictor come to the pods: which place, which init containers, which keys. What the init
container does is in test_fetch.py."""

import unittest

from releases import COORDINATOR, EXPERT_NODE, FILES, OPERATORS, PREDICTOR_NODE, fetching, flag, pod, template
from test_chart import rendered


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


if __name__ == "__main__":
    unittest.main()
