"""Serving from GPUs, by real processes: the same answers as the processor's, from one process and from a cluster, and none
lost when an expert-node is killed under load.

    python tests/gpu/serve.py --sida target/release/sida --model models/switch-tiny-64 [--gpus 1] [--expert-nodes 2]

Needs NVIDIA GPUs, a build with the cargo feature cuda, and no Python package. Expert-nodes take the GPUs in turn, the
coordinator is on the first. Ends with exit code 1 and says what was wrong.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

TEXTS = [
    "sst2 sentence: a gorgeous , witty , seductive movie .",
    "sst2 sentence: the plot is a mess and nobody seems to care .",
    "sst2 sentence: it never quite decides what it wants to be .",
    "sst2 sentence: one of the best films of the year .",
    "sst2 sentence: a long , loud and empty evening .",
]


@contextlib.contextmanager
def workplace(where=None):
    """A directory for a while, and the log of what runs in it, whose end is shown if that ends with a message."""
    with tempfile.TemporaryDirectory(dir=where) as directory, open(f"{directory}/log", "w+") as log:
        try:
            yield directory, log
        except SystemExit:
            log.seek(0)
            print("".join(log.readlines()[-40:]), file=sys.stderr)
            raise


class Process:
    """A node, from its start to its end."""

    def __init__(self, arguments, log):
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=log, text=True)
        said = []
        # A coordinator says, too, where it speaks HTTP.
        while not said or not said[-1].startswith("listening on "):
            line = self.process.stdout.readline()
            if not line:
                raise SystemExit(f"{' '.join(arguments)} said {said!r}; see {log.name}")
            said.append(line.strip())
        self.address = said[-1].removeprefix("listening on ")

    def end(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            if self.process.wait(timeout=60):
                raise SystemExit(f"{' '.join(self.process.args)} ended with exit code {self.process.returncode}")


def ask(sida, endpoint, text, *flags):
    """The answer's text and its trace."""
    command = [sida, "ask", "--json", "--endpoint", f"http://{endpoint}", *flags, text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise SystemExit(f"{text!r} was not answered: {done.stderr.strip()}")
    return json.loads(done.stdout)


def bench(sida, endpoint, *flags):
    """What `sida bench` measures at a coordinator."""
    command = [sida, "bench", "--json", "--endpoint", f"http://{endpoint}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise SystemExit(f"bench failed: {done.stderr.strip()}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def answers(sida, endpoint, *flags):
    return [ask(sida, endpoint, text, *flags)["text"] for text in TEXTS]


def started_cluster(args, directory, log, precision):
    """A coordinator and expert-nodes as processes. Returns them, the coordinator first."""
    nodes = [f"e{number}" for number in range(args.expert_nodes)]
    ports = {name: free_port() for name in ["c0", *nodes]}
    entry = lambda kind, name: f'[[{kind}]]\nname = "{name}"\naddress = "127.0.0.1:{ports[name]}"\n'
    file = pathlib.Path(directory) / f"cluster-{precision}.toml"
    file.write_text("replicas = 2\n" + entry("coordinator", "c0") + "".join(entry("expert-node", name) for name in nodes))
    common = ["--static", str(file), "--model", args.model, "--precision", precision, "--metrics-listen", "off"]
    memory = ["--expert-memory", args.expert_memory]
    started = [
        Process([args.sida, "expert-node", "--name", name, "--device", f"cuda:{number % args.gpus}", *memory, *common], log)
        for number, name in enumerate(nodes)
    ]
    return [Process([args.sida, "coordinator", "--name", "c0", "--device", "cuda:0", *common], log), *started]


def windows(log):
    """How often coordinators have said so far that rows for a node need not travel."""
    return pathlib.Path(log.name).read_text().count("rows for an expert-node stay on the device")


def free_port(given=set()):
    """Below the range that the system gives to outgoing connections, which would take one of those in between."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as listener:
            if port not in given and listener.connect_ex(("127.0.0.1", port)) != 0:
                given.add(port)
                return port


def kill_under_load(args, processes):
    """Kills the last expert-node in the middle of a load; returns what the load saw."""
    coordinator, victim = processes[0], processes[-1]
    found = {}
    load = lambda: found.update(report=bench(args.sida, coordinator.address, "--concurrency", "8", "--duration", "6s")[0])
    thread = threading.Thread(target=load)
    thread.start()
    time.sleep(3)
    os.kill(victim.process.pid, signal.SIGKILL)
    thread.join()
    return found["report"]


def check(what, found, expected):
    if found != expected:
        raise SystemExit(f"{what}: found {found!r}, expected {expected!r}")
    print(f"ok  {what}", flush=True)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sida", required=True)
    arguments.add_argument("--model", default="models/switch-tiny-64")
    arguments.add_argument("--gpus", type=int, default=1)
    arguments.add_argument("--expert-nodes", type=int, default=2)
    arguments.add_argument("--expert-memory", default="30%")
    args = arguments.parse_args()
    with workplace() as (directory, log):
        run(args, directory, log)


def run(args, directory, log):
    up = [args.sida, "up", "--listen", "127.0.0.1:0", "--metrics-listen", "off", "--model", args.model]
    processor = Process(up, log)
    expected = answers(args.sida, processor.address)
    modes = {mode: answers(args.sida, processor.address, "--mode", mode) for mode in ["guided", "hash"]}
    processor.end()
    whole = Process([*up, "--device", "cuda:0", "--precision", "f32", "--expert-memory", args.expert_memory], log)
    check("one process on a GPU answers as the processor does", answers(args.sida, whole.address), expected)
    for mode, answered in modes.items():
        check(f"and in mode {mode}", answers(args.sida, whole.address, "--mode", mode), answered)
    whole.end()
    for precision in ["f32", "bf16"]:
        processes = started_cluster(args, directory, log, precision)
        before = answers(args.sida, processes[0].address)
        check("rows stay on the GPUs", windows(log), args.expert_nodes * (1 if precision == "f32" else 2))
        if precision == "f32":
            check(f"{args.expert_nodes} expert-nodes on {args.gpus} GPUs answer as the processor does", before, expected)
        report = kill_under_load(args, processes)
        print(f"    {report['requests']} requests, {report['requests_per_s']:.0f}/s, p99 {report['latency_ms']['p99']:.1f} ms, "
              f"longest {report['latency_ms']['max']:.0f} ms, failures {report['failures']}")
        check(f"no request failed when a node was killed ({precision})", report["failures"], {})
        check(f"and no answer changed ({precision})", answers(args.sida, processes[0].address), before)
        for process in processes:
            process.end()


if __name__ == "__main__":
    main()
