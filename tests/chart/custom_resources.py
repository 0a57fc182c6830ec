"""Other projects' kinds that the chart renders (PodMonitor, PrometheusRule, ScaledObject, Certificate, routes), against types
that are made of their definitions. They come from npm, so this is run by hand or by `SIDA_CUSTOM_RESOURCES=1 bash
tests/run.sh`, and needs node. They find wrong types and missing fields, not unknown keys."""

import json
import subprocess
import sys

from test_chart import CASES, REPOSITORY, objects

PLACE = REPOSITORY / "target/kubernetes-models"
PACKAGES = ["@kubernetes-models/keda@0.4.2", "@kubernetes-models/cert-manager@4.4.4", "@kubernetes-models/prometheus-operator@6.0.0", "@kubernetes-models/gateway-api@0.5.1"]
# Group of a kind: the package that holds it.
GROUPS = {"keda.sh": "keda", "cert-manager.io": "cert-manager", "monitoring.coreos.com": "prometheus-operator", "gateway.networking.k8s.io": "gateway-api"}
SCRIPT = """
const fs = require("fs");
let failed = 0;
for (const { where, module, object } of JSON.parse(fs.readFileSync(0))) {
  try {
    new (require(module)[object.kind])(object).validate();
  } catch (error) {
    failed += 1;
    console.log(`${where}: ${error.message}`);
  }
}
process.exit(failed ? 1 : 0);
"""


def main():
    if not (PLACE / "node_modules").exists():
        subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", PLACE, *PACKAGES], check=True)
    found = []
    for case in CASES:
        for document in objects(case):
            group, _, version = document["apiVersion"].partition("/")
            if group in GROUPS:
                # The package has GRPCRoutes of an earlier version only, of the same shape.
                if document["kind"] == "GRPCRoute":
                    version, document["apiVersion"] = "v1alpha2", f"{group}/v1alpha2"
                module = PLACE / "node_modules/@kubernetes-models" / GROUPS[group] / group / version / f"{document['kind']}.js"
                found.append({"where": f"{case}: {document['kind']}", "module": str(module), "object": document})
    kinds = sorted({entry["object"]["kind"] for entry in found})
    assert kinds == ["Certificate", "GRPCRoute", "HTTPRoute", "PodMonitor", "PrometheusRule", "ScaledObject"], kinds
    wrong = json.loads(json.dumps(found))
    for entry in wrong:
        entry["object"]["spec"] = 7
    # What is wrong everywhere is found everywhere, or the check could not fail.
    output = subprocess.run(["node", "-e", SCRIPT], input=json.dumps(wrong), capture_output=True, text=True)
    assert len(output.stdout.splitlines()) >= len(found), output.stdout + output.stderr
    output = subprocess.run(["node", "-e", SCRIPT], input=json.dumps(found), capture_output=True, text=True)
    print(output.stdout + output.stderr, end="")
    print(f"{len(found)} objects of {', '.join(kinds)}: {'as their types' if output.returncode == 0 else 'wrong'}")
    return output.returncode


if __name__ == "__main__":
    sys.exit(main())
