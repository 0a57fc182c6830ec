"""Podman as the tests use it: Debian's, as root, with runc, which runs where its default crun refuses the cgroups, and with
limits that a container itself may set. No image is pulled: base_images.py makes them."""

import os
import pathlib
import shlex
import subprocess
import tempfile

SETTINGS = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=30000:30000"]
[engine]
runtime = "runc"
"""
_settings = tempfile.NamedTemporaryFile("w", prefix="sida-containers-", suffix=".conf")
_settings.write(SETTINGS)
_settings.flush()
ENVIRONMENT = os.environ | {"CONTAINERS_CONF": _settings.name}
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def podman(*arguments, **more):
    """Runs it to its end, which must be a good one."""
    command = ["podman", *map(str, arguments)]
    print("+", shlex.join(command)[:300], flush=True)
    return subprocess.run(command, env=ENVIRONMENT, check=True, **more)


def told(*arguments, **more):
    """The exit code and all that was written."""
    output = subprocess.run(["podman", *map(str, arguments)], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)
    return output.returncode, output.stdout


def image_exists(name):
    return told("image", "exists", name)[0] == 0
