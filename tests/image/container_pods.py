"""The chart's pods as containers of the images that they name: podman runs them with the pod's command, environment,
mounts, user and security, on a network with addresses of their own and names by DNS; probes, signals and rollouts are
those of local_pods.py. Network policies are carried out by nftables on the bridge that the containers are plugged into."""

import json
import os
import pathlib
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests/chart"))

import local_pods
from engine import ENVIRONMENT, podman, told


class Network:
    """A podman network; this machine has the first address."""

    def __init__(self):
        self.tag = f"c{os.getpid() % 10000}"
        self.subnet, self.name = f"10.{192 + os.getpid() % 60}.9.", f"sida-{self.tag}"
        podman("network", "create", "--subnet", f"{self.subnet}0/24", self.name)

    def close(self):
        told("network", "rm", "--force", self.name)


class ContainerPod(local_pods.Pod):
    """One pod with one container."""

    @property
    def container_name(self):
        return f"{self.cluster.network.tag}-{self.place.name}"

    def plug(self):
        """Containers are plugged in by podman."""

    def spawn(self, container):
        security, pod = container["securityContext"], self.spec["securityContext"]
        assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"], security
        network = f"{self.cluster.network.name}:ip={self.address}"
        for name in self.cluster.names_of(self):
            network += f",alias={name}"
        options = ["--rm", "--name", self.container_name, "--network", network, "--pull=never", "--read-only", "--read-only-tmpfs=false",
                   "--security-opt=no-new-privileges", "--user", f"{pod['runAsUser']}:{pod['runAsGroup']}"]
        options += [f"--cap-drop={capability}" for capability in security["capabilities"]["drop"]]
        environment = self.environment(container)
        for name, value in environment.items():
            options += ["--env", f"{name}={value}"]
        for mount in container.get("volumeMounts", []):
            options += ["--volume", f"{self.volume(mount['name'])}:{mount['mountPath']}:{'ro' if mount.get('readOnly') else 'rw'}"]
        if "command" in container:
            options += ["--entrypoint", json.dumps(container["command"])]
        arguments = [local_pods.filled_in(argument, environment) for argument in container.get("args", [])]
        with open(self.place / "log", "ab") as log:
            return subprocess.Popen(["podman", "run", *options, container["image"], *arguments], env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self):
        told("kill", self.container_name)
        self.process.wait()

    def unplug(self):
        told("rm", "--force", self.container_name)

    def process_number(self):
        """Of the container's first process, as this machine sees it."""
        return int(told("inspect", "--format={{.State.Pid}}", self.container_name)[1])

    def connects(self, address, port):
        """Whether a connection from within the pod is answered."""
        script = f"import socket; socket.create_connection(({address!r}, {port}), 2)"
        return subprocess.run(["nsenter", f"--net=/proc/{self.process_number()}/ns/net", "python3", "-c", script], capture_output=True).returncode == 0


def chooses(selector, pod):
    labels = pod.owner["spec"]["template"]["metadata"]["labels"]
    return selector["matchLabels"].items() <= labels.items()


def enforced(policies, pods):
    """Rules of nftables for the network policies of the chart, for connections between containers. What comes from this
    machine, as a kubelet's probes, is not forwarded and stays free."""
    new = "tcp flags & (syn | ack) == syn"
    # Those before it go in the same step.
    lines = ["table bridge sida", "delete table bridge sida", "table bridge sida {", " chain forward {", "  type filter hook forward priority 0; policy accept;"]
    for pod in pods:
        chosen = [policy for policy in policies if chooses(policy["spec"]["podSelector"], pod)]
        numbers = {port["name"]: port["containerPort"] for port in pod.container["ports"]}
        for rule in (rule for policy in chosen for rule in policy["spec"]["ingress"]):
            sources = [other.address for peer in rule.get("from", []) for other in pods if chooses(peer["podSelector"], other)]
            source = f"ip saddr {{ {', '.join(sources)} }}" if sources else ""
            if "from" in rule and not sources:
                continue
            for port in rule.get("ports", [None]):
                wanted = f"tcp dport {numbers.get(port['port'], port['port'])}" if port else ""
                lines.append(f"  ip daddr {pod.address} {source} {wanted} {new} accept")
        if chosen:
            lines.append(f"  ip daddr {pod.address} {new} drop")
    return "\n".join([*lines, " }", "}", ""])


def enforce(policies, pods):
    subprocess.run(["nft", "-f", "-"], input=enforced(policies, pods), text=True, check=True)


def lift():
    subprocess.run(["nft", "delete", "table", "bridge", "sida"], capture_output=True)
