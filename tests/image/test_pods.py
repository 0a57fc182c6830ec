"""The chart's pods as containers of the image: what a process of this machine cannot show, which is that the image, its
user, its read-only root, the mounts and the network fit together, and what the network policies let through. Needs root, and
the image that in_podman.py has built."""

import pathlib
import sys
import unittest

import base_images
from container_pods import ContainerPod, Network, enforce, lift
from engine import REPOSITORY, image_exists

sys.path.insert(0, str(REPOSITORY / "tests/chart"))
import local_pods
import test_cluster
from releases import template

VALUES = {
    "gpu": {"enabled": False}, "replicasPerExpert": 1,
    "coordinator": {"threads": 1, "replicas": 1}, "predictorNode": {"threads": 1}, "expertNode": {"threads": 1, "expertMemory": "25%"},
    "networkPolicy": {"callersFrom": [{"podSelector": {"matchLabels": {"app.kubernetes.io/component": "predictor-node"}}}]},
}


class Pods(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        assert image_exists("localhost/sida:0.1.0"), "tests/image/in_podman.py builds it"
        base_images.make("registry.k8s.io/etcd:3.5.21-0")
        cls.objects = list(template(VALUES).values())
        cls.cluster = local_pods.Cluster(cls.objects, None, kind_of_pod=ContainerPod, network=Network())
        cls.addClassCleanup(cls.cluster.close)
        cls.addClassCleanup(lift)
        cls.owners = test_cluster.start_all(cls.cluster)
        for component in ("coordinator", "predictor-node", "expert-node"):
            for pod in cls.cluster.of(component):
                pod.wait_until_ready()

    def ask(self):
        """What `helm test` says."""
        spec = next(o for o in self.objects if o["kind"] == "Pod")["spec"]
        [coordinator] = self.cluster.of("coordinator")
        spec["containers"][0]["args"] = [f"--endpoint=http://{coordinator.host}:50051" if argument.startswith("--endpoint=") else argument for argument in spec["containers"][0]["args"]]
        code, log = self.cluster.run_to_end("test", spec)
        self.assertEqual(code, 0, log)
        self.assertIn("positive", log)

    def test_1_a_request(self):
        """Broken: the pods of a release would not find each other, or not answer."""
        self.ask()

    def test_2_confined(self):
        """Broken: a node that is broken into could do more to its machine than compute."""
        for pod in self.cluster.pods.values():
            process = pathlib.Path(f"/proc/{pod.process_number()}")
            status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line)
            with self.subTest(pod.name):
                self.assertEqual(status["Uid"].split(), ["65532"] * 4)
                self.assertEqual(int(status["CapEff"], 16), 0)
                self.assertEqual(int(status["CapBnd"], 16), 0)
                self.assertEqual(status["NoNewPrivs"], "1")
                # The default profile of seccomp.
                self.assertEqual(status["Seccomp"], "2")
                root = [line.split() for line in (process / "mounts").read_text().splitlines() if line.split()[1] == "/"]
                self.assertIn("ro", root[-1][3].split(","))

    def test_3_network_policies(self):
        """Broken: a network policy would keep nodes from each other, or let somebody in who has no business there."""
        [coordinator], [predictor], [etcd] = (self.cluster.of(component) for component in ("coordinator", "predictor-node", "etcd"))
        experts = self.cluster.of("expert-node")
        ways = {
            "coordinator to expert-node": (coordinator, experts[0], 50051, True),
            "coordinator to predictor-node": (coordinator, predictor, 50051, True),
            "coordinator to etcd": (coordinator, etcd, 2379, True),
            "expert-node to etcd": (experts[0], etcd, 2379, True),
            "expert-node to another": (experts[0], experts[1], 50051, False),
            "predictor-node to expert-node": (predictor, experts[0], 50051, False),
            "expert-node to predictor-node": (experts[1], predictor, 50051, False),
            "a caller to the coordinator": (predictor, coordinator, 50051, True),
            "metrics of the coordinator": (experts[0], coordinator, 9090, True),
        }
        reached = lambda: {way: source.connects(target.address, port) for way, (source, target, port, _) in ways.items()}
        lift()
        self.assertEqual(set(reached().values()), {True}, "without policies everybody reaches everybody")
        enforce([o for o in self.objects if o["kind"] == "NetworkPolicy"], list(self.cluster.pods.values()))
        self.addCleanup(lift)
        self.assertEqual(reached(), {way: allowed for way, (*_, allowed) in ways.items()})

    def test_4_new_connections_under_policies(self):
        """Broken: under its network policies a cluster would stop to work when a pod is replaced."""
        policies = [o for o in self.objects if o["kind"] == "NetworkPolicy"]
        self.addCleanup(lift)
        for component in ("expert-node", "predictor-node", "coordinator"):
            owner = self.owners[component]
            for old in self.cluster.of(component):
                code, took = old.terminate()
                self.assertEqual(code, 0, old.log())
                self.assertLess(took, 40)
                new = self.cluster.start(owner, old.name)
                enforce(policies, list(self.cluster.pods.values()))
                new.wait_until_ready()
        # The pod that asks came after the policies were written.
        lift()
        self.ask()
        self.assertEqual([pod.restarts for pod in self.cluster.pods.values()], [0] * len(self.cluster.pods))


if __name__ == "__main__":
    unittest.main()
