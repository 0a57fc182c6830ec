"""Makes `values.schema.json`, `README.md` and `files/defaults.json` of the chart from its `values.yaml` and the comments in
it, so that none can say anything else than the values do. `--check` writes nothing and fails where a file is not what it would write; run by
the chart's tests.

A value is documented by `# -- text` above it (further comment lines go on), and its schema is what follows from the
value itself, changed by `# @schema {...}`. A map whose own keys are documented takes no others. Every value may be left
empty: templates cannot read `values.yaml`, so they take the default from `files/defaults.json`.
"""

import json
import pathlib
import re
import sys

import yaml

CHART = pathlib.Path(__file__).parent / "sida"
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
KEY = re.compile(r"^( *)([A-Za-z][A-Za-z0-9]*):")


def documented(text):
    """{path: (documentation, schema)} of every documented value, in order."""
    found, stack, doc, schema = {}, [], [], {}
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("# @schema "):
            schema = json.loads(stripped[len("# @schema "):])
        elif stripped.startswith("# -- "):
            doc = [stripped[len("# -- "):]]
        elif stripped.startswith("# ") and doc:
            doc.append(stripped[2:])
        elif match := KEY.match(line):
            depth = len(match[1]) // 2
            stack = stack[:depth] + [match[2]]
            if doc:
                found[tuple(stack)] = (" ".join(doc), schema)
            doc, schema = [], {}
        elif not stripped:
            doc, schema = [], {}
    return found


def schema_of(value, path, docs):
    """The JSON schema of a value."""
    schema = {"type": [TYPES[type(value)], "null"]}
    if path in docs:
        schema["description"], own = docs[path]
        schema.update(own)
    if "enum" in schema:
        schema["enum"] = [*schema["enum"], None]
    below = any(known[:len(path)] == path and known != path for known in docs)
    if isinstance(value, dict) and below:
        schema["properties"] = {key: schema_of(below, path + (key,), docs) for key, below in value.items()}
        # Other charts of a release keep values of their own among the global ones.
        schema["additionalProperties"] = path == ("global",)
    return schema


def pool_of(role):
    """The schema of one of `pools`: a name, and whatever its role has."""
    shared = {key: schema for key, schema in role["properties"].items() if key != "pools"}
    name = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"}
    return {"type": "object", "required": ["name"], "properties": {"name": name, **shared}, "additionalProperties": False}


def leaves(value, path, docs):
    """Every documented value, with its default."""
    if path in docs:
        yield path, value, docs[path][0]
    elif isinstance(value, dict):
        for key, below in value.items():
            yield from leaves(below, path + (key,), docs)
    else:
        sys.exit(f"{'.'.join(path)} has no comment")


def readme(values, docs):
    """The chart's page."""
    lines = [
        "# Helm chart for SiDA",
        "",
        "Coordinators, predictor-nodes and expert-nodes, an etcd if none is at hand, dashboards, alerts and traces.",
        "How to install, watch, upgrade and mend it is in [operations](../../docs/operations.md).",
        "",
        "```sh",
        "helm install sida helm/sida                          # on GPUs",
        "helm install sida helm/sida --set gpu.enabled=false  # on CPUs, as kind or a laptop",
        "helm test sida --logs",
        "```",
        "",
        "This page is made of the comments in [values.yaml](values.yaml) by `helm/generate.py`.",
        "",
        "| value | default | meaning |",
        "|---|---|---|",
    ]
    for path, default, text in leaves(values, (), docs):
        shown = json.dumps(default).replace("|", "\\|")
        lines.append(f"| `{'.'.join(path)}` | `{shown}` | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def main():
    text = (CHART / "values.yaml").read_text()
    values, docs = yaml.safe_load(text), documented(text)
    schema = {"$schema": "https://json-schema.org/draft-07/schema#", **schema_of(values, (), docs)}
    role = schema["properties"]["expertNode"]
    role["properties"]["pools"]["items"] = pool_of(role)
    # What a chart that has this one as a dependency may decide by; Helm has read it when templates are rendered.
    schema["properties"] |= {"enabled": {"type": "boolean"}, "tags": {"type": "object"}}
    defaults = {".".join(path): default for path, default, _ in leaves(values, (), docs)}
    written = {
        "values.schema.json": json.dumps(schema, indent=2) + "\n",
        "README.md": readme(values, docs),
        "files/defaults.json": json.dumps(defaults, indent=0) + "\n",
    }
    for name, content in written.items():
        file = CHART / name
        if "--check" not in sys.argv:
            file.write_text(content)
        elif not file.exists() or file.read_text() != content:
            sys.exit(f"{file} is not what values.yaml says: run helm/generate.py")


main()
