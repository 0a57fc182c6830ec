"""Runs what the chart renders as local processes, as far as a kubelet and the controllers do: every pod in a network of
its own with an address of its own, the container's command, arguments and environment with its variables filled in,
ports, volumes, user and read-only root; init containers first; startup, readiness and liveness probes; SIGTERM, the
grace period and SIGKILL; rollouts as Deployments and StatefulSets do them. Needs root.

What it is not: a scheduler, an image, resource limits, network policies, an API server.
"""

import base64
import itertools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

NUMBERS = itertools.count(2)
# Coordinators have addresses of their own, so that a client can be told all that there will be, as a Service would.
COORDINATORS = range(200, 250)
COORDINATOR_NUMBERS = iter(COORDINATORS)
# What the pods of a Deployment's rollouts are called by.
GENERATIONS = itertools.count(0x8a1d)
# A laptop with other things to do is slower than any cluster.
START_LIMIT = 120


def ip(*arguments):
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True)


class Network:
    """A switch that pods are plugged into, of IPv4 or of IPv6 and nothing else; this machine has the first address."""

    def __init__(self, is_ipv6=False):
        self.tag = f"{os.getpid() % 10000}"
        self.bridge, self.is_ipv6 = f"sidab{self.tag}", is_ipv6
        self.subnet = f"fd07:{os.getpid() % 10000}::" if is_ipv6 else f"10.{192 + os.getpid() % 60}.7."
        self.bits = 64 if is_ipv6 else 24
        ip("link", "add", self.bridge, "type", "bridge")
        self.give(1, "dev", self.bridge)
        ip("link", "set", self.bridge, "up")

    def give(self, number, *device, within=()):
        """Gives an address to a device."""
        # Nobody else has it: IPv6 need not ask first.
        at_once = ["nodad"] if self.is_ipv6 else []
        ip(*within, "addr", "add", f"{self.subnet}{number}/{self.bits}", *device, *at_once)

    def close(self):
        ip("link", "del", self.bridge)


class Cluster:
    """The pods of one release: processes of this machine, or whatever `kind_of_pod` makes on its network."""

    def __init__(self, objects, binary, namespace="moe", secrets=None, volumes=None, kind_of_pod=None, network=None):
        self.objects, self.binary, self.namespace = objects, binary, namespace
        self.secrets, self.volumes = secrets or {}, volumes or {}
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="sida-pods-"))
        os.chmod(self.directory, 0o755)
        self.network, self.kind_of_pod = network or Network(), kind_of_pod or Pod
        self.pods = {}
        self.hosts = self.directory / "hosts"
        self.write_hosts()

    def close(self):
        for pod in list(self.pods.values()):
            pod.remove()
        self.network.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def owner(self, kind, component):
        """The object of a kind that makes the pods of a component."""
        of = lambda o: o["metadata"]["labels"].get("app.kubernetes.io/component")
        return next(o for o in self.objects if o["kind"] == kind and of(o) == component)

    def start(self, owner, name):
        """Makes a pod of a Deployment or StatefulSet."""
        pod = self.kind_of_pod(self, name, owner["metadata"]["labels"]["app.kubernetes.io/component"], owner["spec"]["template"]["spec"], owner)
        self.pods[name] = pod
        self.write_hosts()
        pod.start()
        return pod

    def names(self, owner):
        """The names that its pods get at first."""
        suffix = "" if owner["kind"] == "StatefulSet" else "7f9c-"
        return [f"{owner['metadata']['name']}-{suffix}{number}" for number in range(owner["spec"]["replicas"])]

    def of(self, component):
        return [pod for pod in list(self.pods.values()) if pod.component == component]

    def write_hosts(self):
        """What the cluster's DNS would say: pods of StatefulSets have names."""
        lines = ["127.0.0.1 localhost"]
        for pod in list(self.pods.values()):
            lines += [f"{pod.address} {' '.join(self.names_of(pod))}"] if self.names_of(pod) else []
        self.hosts.write_text("\n".join(lines) + "\n")

    def names_of(self, pod):
        """What it is called by the cluster's DNS."""
        if pod.owner["kind"] != "StatefulSet":
            return []
        return [f"{pod.name}.{pod.owner['spec']['serviceName']}.{self.namespace}.svc", pod.name]

    def run_to_end(self, name, spec):
        """A pod that ends by itself, as a test hook; returns its exit code and output."""
        pod = self.kind_of_pod(self, name, "job", spec, {"kind": "Pod"})
        self.pods[name] = pod
        try:
            pod.start()
            return pod.process.wait(START_LIMIT), pod.log()
        finally:
            pod.remove()


def filled_in(text, environment):
    """An argument with its `$(NAME)`."""
    return re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], text)


class Pod:
    """One pod with one container."""

    def __init__(self, cluster, name, component, spec, owner):
        self.cluster, self.name, self.component, self.spec, self.owner = cluster, name, component, spec, owner
        self.container = spec["containers"][0]
        number = next(COORDINATOR_NUMBERS if component == "coordinator" else NUMBERS)
        self.number, self.address = number, f"{cluster.network.subnet}{number}"
        # As it stands before a port.
        self.host = f"[{self.address}]" if ":" in self.address else self.address
        self.netns = f"sidap{cluster.network.tag}x{number}"
        self.outside, self.inside = f"so{cluster.network.tag}x{number}", f"si{cluster.network.tag}x{number}"
        self.place = cluster.directory / f"{name}-{number}"
        self.process, self.restarts, self.is_started, self.is_ready = None, 0, False, False
        self.ending = threading.Event()

    def start(self):
        self.plug()
        self.place.mkdir()
        for container in self.spec.get("initContainers", []):
            code = self.spawn(container).wait(START_LIMIT)
            assert code == 0, f"{self.name} {container['name']} ends with {code}: {self.log()}"
        self.process = self.spawn(self.container)
        # Whoever waits for it asks whether it is ready; a kubelet of its own keeps asking.
        if "startupProbe" in self.container or "readinessProbe" in self.container:
            threading.Thread(target=self.probe_always, daemon=True).start()

    def plug(self):
        """Gives it a network of its own."""
        ip("netns", "add", self.netns)
        ip("link", "add", self.outside, "type", "veth", "peer", "name", self.inside)
        ip("link", "set", self.inside, "netns", self.netns)
        ip("link", "set", self.outside, "master", self.cluster.network.bridge, "up")
        self.cluster.network.give(self.number, "dev", self.inside, within=["-n", self.netns])
        ip("-n", self.netns, "link", "set", self.inside, "up")
        ip("-n", self.netns, "link", "set", "lo", "up")

    def unplug(self):
        subprocess.run(["ip", "netns", "del", self.netns], capture_output=True)
        subprocess.run(["ip", "link", "del", self.outside], capture_output=True)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def environment(self, container):
        known = {"metadata.name": self.name, "status.podIP": self.address}
        found = {}
        for entry in container.get("env", []):
            field = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            found[entry["name"]] = known[field] if field else entry["value"]
        return found

    def volume(self, name):
        """The directory of a volume on this machine."""
        volume = next(v for v in self.spec["volumes"] if v["name"] == name) if self.spec.get("volumes") else {"emptyDir": {}}
        if "secret" in volume:
            target = self.place / name
            target.mkdir(exist_ok=True)
            for key, value in self.cluster.secrets[volume["secret"]["secretName"]].items():
                (target / key).write_bytes(base64.b64decode(value))
            return target
        if "persistentVolumeClaim" in volume:
            return self.cluster.volumes[volume["persistentVolumeClaim"]["claimName"]]
        target = self.place / name
        target.mkdir(exist_ok=True)
        os.chmod(target, 0o777)
        return target

    def spawn(self, container):
        """The container's process: in the pod's network, on a root that it cannot write to, as the pod's user."""
        environment = self.environment(container)
        is_ours = container["image"].startswith("sida:")
        command = container.get("command") or (["/usr/bin/sida"] if is_ours else [])
        root = self.place / f"root-{container['name']}"
        root.mkdir()
        script = [
            "set -e", "mount --make-rprivate /", f"mount -t tmpfs -o mode=755 tmpfs {root}", f"cd {root}",
            "mkdir -p usr etc proc dev tmp", "cp -a /bin /sbin /lib /lib64 .", "mount --bind /usr usr", "mount --rbind /dev dev",
            "mount -t proc proc proc", f"touch etc/hosts && mount --bind {self.cluster.hosts} etc/hosts", "mount -o remount,bind,ro usr",
        ]
        if is_ours:
            # What the image holds; its binary is this build's.
            script += [
                "mount -t tmpfs tmpfs usr/share", "mkdir -p usr/share/sida/models/switch-tiny-64", "touch usr/share/sida/sida",
                f"mount --bind {REPOSITORY}/models/switch-tiny-64 usr/share/sida/models/switch-tiny-64",
                f"mount --bind {self.cluster.binary} usr/share/sida/sida", "mount -o remount,ro usr/share",
            ]
            command = ["/usr/share/sida/sida", *command[1:]]
        for mount in container.get("volumeMounts", []):
            path = mount["mountPath"].lstrip("/")
            script += [f"[ -d {path} ] || mkdir -p {path}", f"mount --bind {self.volume(mount['name'])} {path}"]
            if mount.get("readOnly"):
                script += [f"mount -o remount,bind,ro {path}"]
        script += [f"mount -o remount,ro {root}"]
        security = self.spec["securityContext"]
        user = f"--reuid={security['runAsUser']} --regid={security['runAsGroup']} --clear-groups --no-new-privs --bounding-set=-all"
        script += [f'exec chroot . setpriv {user} -- "$@"']
        arguments = [filled_in(argument, environment) for argument in command + container.get("args", [])]
        with open(self.place / "log", "ab") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.netns, "unshare", "--mount", "sh", "-c", "\n".join(script), "sh", *arguments],
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def log(self):
        return (self.place / "log").read_text(errors="replace")

    def answers(self, probe):
        """Whether a probe passes now."""
        limit = probe.get("timeoutSeconds", 1)
        try:
            if "grpc" in probe:
                with grpc.insecure_channel(f"{self.host}:{probe['grpc']['port']}") as channel:
                    request = health_pb2.HealthCheckRequest(service=probe["grpc"].get("service", ""))
                    answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=limit)
                    return answer.status == health_pb2.HealthCheckResponse.SERVING
            port = (probe.get("httpGet") or probe["tcpSocket"])["port"]
            number = next((p["containerPort"] for p in self.container["ports"] if p["name"] == port), port)
            if "httpGet" in probe:
                with urllib.request.urlopen(f"http://{self.host}:{number}{probe['httpGet']['path']}", timeout=limit) as answer:
                    return answer.status == 200
            raise ValueError(f"a probe of an unknown kind: {probe}")
        except (grpc.RpcError, urllib.error.URLError, OSError):
            return False

    def probe_always(self):
        """A kubelet: startup, then readiness and liveness, each with its period and failures."""
        startup, ready, live = (self.container.get(kind) for kind in ("startupProbe", "readinessProbe", "livenessProbe"))
        live = live if live and "tcpSocket" not in live else None
        failures, next_live = 0, 0
        while not self.ending.wait(0.2 if not self.is_ready else 2):
            if startup and not self.is_started:
                self.is_started = self.answers(startup)
                continue
            self.is_started = True
            self.is_ready = self.answers(ready)
            if live and time.monotonic() >= next_live:
                next_live = time.monotonic() + live["periodSeconds"]
                failures = 0 if self.answers(live) else failures + 1
                if failures >= live["failureThreshold"]:
                    self.restarts += 1
                    return

    def wait_until_ready(self):
        started = time.monotonic()
        while not self.is_ready:
            assert self.process.poll() is None, f"{self.name} ended: {self.log()}"
            assert time.monotonic() - started < START_LIMIT, f"{self.name} is not ready: {self.log()}"
            time.sleep(0.1)

    def terminate(self):
        """SIGTERM, and SIGKILL after the grace period; returns the exit code and the seconds that it took."""
        self.ending.set()
        self.is_ready = False
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(self.spec.get("terminationGracePeriodSeconds", 30))
        except subprocess.TimeoutExpired:
            self.kill()
            code = self.process.returncode
        took = time.monotonic() - started
        self.remove()
        return code, took

    def remove(self):
        self.ending.set()
        if self.process and self.process.poll() is None:
            self.kill()
        self.cluster.pods.pop(self.name, None)
        self.unplug()
        self.cluster.write_hosts()


REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def roll(cluster, owner):
    """A rollout of a Deployment (a new pod first where maxSurge says so) or a StatefulSet (the last first, one at a
    time). Returns (exit code, seconds) of every pod that ended."""
    ended = []
    if owner["kind"] == "StatefulSet":
        for name in reversed(cluster.names(owner)):
            ended.append(cluster.pods[name].terminate())
            cluster.start(owner, name).wait_until_ready()
        return ended
    surge = owner["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
    component = owner["metadata"]["labels"]["app.kubernetes.io/component"]
    generation = f"{next(GENERATIONS):04x}"
    for number, old in enumerate(cluster.of(component)):
        new = f"{owner['metadata']['name']}-{generation}-{number}"
        if surge:
            cluster.start(owner, new).wait_until_ready()
            ended.append(old.terminate())
        else:
            ended.append(old.terminate())
            cluster.start(owner, new).wait_until_ready()
    return ended
