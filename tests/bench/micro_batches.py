"""Micro-batches against whole batches: `--micro-batches never`, `always` and `auto` in turns.

By default coordinators on one core and their expert-node on another; with --in-process everything in one process on all
cores, a batch of so many texts at a time.

    sida synth --like switch-base-8 --out base-8
    python tests/bench/micro_batches.py --sida target/release/sida --model base-8 --duration 5s
    python tests/bench/micro_batches.py --sida target/release/sida --in-process

Prints, for each case, requests per second and their ratios to `never`: median (range of the rounds). Then how busy the first
two cores were, clients included.
"""

import argparse
import json
import pathlib
import signal
import statistics
import subprocess
import tempfile
import time

MODES = ["never", "always", "auto"]
FIRST_PORT = 21051
TEXTS = pathlib.Path(__file__).parent.parent / "data" / "sentences.txt"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sida", default="target/release/sida")
    parser.add_argument("--model", help="a directory; the model that ships if not given")
    parser.add_argument("--cases", default="encode-8,encode-32,generate-8", help="method-clients, ...")
    parser.add_argument("--in-process", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--duration", default="2s")
    return parser.parse_args()


def busy_and_all():
    """Of each core: the time that it worked so far, and all time."""
    lines = [line.split() for line in open("/proc/stat") if line.startswith("cpu") and line[3] != " "]
    times = [[int(value) for value in line[1:9]] for line in lines]
    return [(sum(of_core) - of_core[3] - of_core[4], sum(of_core)) for of_core in times]


class Cluster:
    def __init__(self, options, directory):
        self.options = options
        self.processes = []
        members = [("coordinator", mode, FIRST_PORT + at) for at, mode in enumerate(MODES)]
        members.append(("expert-node", "experts", FIRST_PORT + len(MODES)))
        text = "".join(f'[[{role}]]\nname = "{name}"\naddress = "127.0.0.1:{port}"\n' for role, name, port in members)
        self.file = pathlib.Path(directory) / "cluster.toml"
        self.file.write_text("replicas = 1\n" + text)
        self.log = open(pathlib.Path(directory) / "log", "w")

    def start(self, core, role, name, *flags):
        model = ["--model", self.options.model] if self.options.model else []
        command = ["taskset", "-c", str(core), self.options.sida, role, "--name", name, "--static", self.file]
        command += ["--threads", "1", "--metrics-listen", "off", *flags, *model]
        self.processes.append(subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT))

    def __enter__(self):
        if self.options.in_process:
            return self
        self.start(1, "expert-node", "experts")
        for mode in MODES:
            self.start(0, "coordinator", mode, "--micro-batches", mode)
        time.sleep(5)
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.wait(timeout=60)

    def requests_per_second(self, mode, method, clients):
        command = [self.options.sida, "bench", "--method", method, "--json", "--duration", self.options.duration]
        command += ["--file", TEXTS, "--max-tokens", "32", "--ignore-eos"]
        if self.options.in_process:
            command += ["--batch", clients, "--texts", clients, "--concurrency", "1", "--micro-batches", mode]
            command += ["--model", self.options.model] if self.options.model else []
        else:
            port = FIRST_PORT + MODES.index(mode)
            command += ["--concurrency", clients, "--endpoint", f"http://127.0.0.1:{port}"]
        report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert not report["failures"], report["failures"]
        return report["requests_per_s"]


def spread(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main():
    options = arguments()
    with tempfile.TemporaryDirectory() as directory, Cluster(options, directory) as cluster:
        for case in options.cases.split(","):
            method, clients = case.split("-")
            # `auto` finds out first.
            cluster.requests_per_second("auto", method, clients)
            rates = {mode: [] for mode in MODES}
            busy = {mode: [] for mode in MODES}
            for _ in range(options.rounds):
                for mode in MODES:
                    before = busy_and_all()
                    rates[mode].append(cluster.requests_per_second(mode, method, clients))
                    cores = list(zip(before, busy_and_all()))[:2]
                    busy[mode].append([(after[0] - at[0]) / (after[1] - at[1]) for at, after in cores])
            print(case)
            for mode in MODES:
                ratios = [rate / whole for rate, whole in zip(rates[mode], rates["never"])]
                cores = [f"{statistics.median(of_core):.0%}" for of_core in zip(*busy[mode])]
                rate = statistics.median(rates[mode])
                print(f"  {mode:7} {rate:8.1f} requests/s, {spread(ratios)} of never, cores busy {', '.join(cores)}")


if __name__ == "__main__":
    main()
