"""Rendered releases, as the tests of values look at them."""

import subprocess
import tempfile

import yaml

from test_chart import CHART, HELM

OPERATORS = ("--api-versions", "monitoring.coreos.com/v1")
COORDINATOR = ("Deployment", "sida-coordinator")
PREDICTOR_NODE = ("Deployment", "sida-predictor-node")
EXPERT_NODE = ("StatefulSet", "sida-expert-node")
FILES = [{"name": "config.json", "sha256": "1" * 64}, {"name": "model.safetensors", "sha256": "2" * 64}]


def template(values, *arguments, chart=CHART, release="sida", namespace="moe"):
    """The objects of a release, by (kind, name)."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(values, file)
        file.flush()
        output = subprocess.run([HELM, "template", release, chart, "--namespace", namespace, "--values", file.name, *arguments], capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    return {(d["kind"], d["metadata"]["name"]): d for d in yaml.load_all(output.stdout, yaml.CSafeLoader) if d}


def pod(owner):
    """The pod's specification of a Deployment, a StatefulSet or a Pod."""
    return owner["spec"]["template"]["spec"] if "template" in owner["spec"] else owner["spec"]


def arguments_of(owner):
    return pod(owner)["containers"][0]["args"]


def flag(owner, name):
    """What a flag is set to, once for every time that it is."""
    return [argument.partition("=")[2] for argument in arguments_of(owner) if argument.startswith(f"--{name}=")]


def fetching(**fetch):
    """Values of a model that is fetched."""
    return {"weights": {"source": "fetch", "claimName": "models", "fetch": {"from": "url", "endpoint": "https://example.org", "files": FILES} | fetch}}
