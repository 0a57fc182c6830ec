"""What telemetry costs: the same cluster of processes with and without it, given the same requests in turns of a random
order. Prints, of each kind, the median ratio of turns of one round, of throughput and of the CPU time of all nodes per
request, with the interval that holds the median at 95%. CPU time is disturbed less by what else the machine does.

    target/test-tools/bin/python tests/bench/telemetry_cost.py --sida target/release/sida --keep target/telemetry.jsonl

"On" is what the chart sets: metrics served and scraped, JSON logs, OTLP to a collector at the default
sampling. "All" records every request. "Off" has none, nor has "same": what they differ by is the measurement's own error, and
the others are compared with the mean of both. Processes differ by where their memory happens to lie, so every few rounds all clusters are started anew.
--keep adds this call's rounds to those of earlier calls and tells of all."""

import argparse
import concurrent.futures
import json
import math
import pathlib
import random
import statistics
import subprocess
import tempfile
import threading
import urllib.request

import grpc

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# The chart's PodMonitor does so.
SCRAPE_SECONDS = 15
WARMUP_REQUESTS = 100


class Collector:
    """Takes spans and throws them away."""

    def __init__(self):
        self.bytes = 0
        handler = grpc.unary_unary_rpc_method_handler(self.export)
        service = grpc.method_handlers_generic_handler("opentelemetry.proto.collector.trace.v1.TraceService", {"Export": handler})
        self.server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
        self.server.add_generic_rpc_handlers((service,))
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def export(self, request, _):
        self.bytes += len(request)
        return b""


class Cluster:
    """A coordinator and two expert-nodes with these flags."""

    def __init__(self, sida, directory, flags, first_port):
        members = [("expert-node", "e0"), ("expert-node", "e1"), ("coordinator", "c0")]
        static = directory / f"cluster-{first_port}.toml"
        static.write_text("replicas = 1\n" + "".join(f'[[{role}]]\nname = "{name}"\naddress = "127.0.0.1:{first_port + n}"\n' for n, (role, name) in enumerate(members)))
        self.processes = []
        for n, (role, name) in enumerate(members):
            own = [flag.replace("PORT", str(first_port + 10 + n)) for flag in flags]
            process = subprocess.Popen([sida, role, "--static", static, "--name", name, "--threads", "1", *own], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            assert process.stdout.readline().startswith("listening on")
            self.processes.append(process)
        self.endpoint = f"http://127.0.0.1:{first_port + 2}"
        self.metrics = [f"http://127.0.0.1:{first_port + 10 + n}/metrics" for n in range(3)] if "off" not in flags else []

    def cpu_seconds(self):
        # Of every thread, in nanoseconds; /proc/PID/stat tells hundredths of seconds.
        threads = (path for process in self.processes for path in pathlib.Path(f"/proc/{process.pid}/task").glob("*/schedstat"))
        return sum(int(path.read_text().split()[0]) for path in threads) / 1e9

    def scrape(self):
        for url in self.metrics:
            urllib.request.urlopen(url, timeout=10).read()


    def stop(self):
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait()


def turn(sida, cluster, requests):
    """Requests a second, and seconds of CPU a request."""
    before = cluster.cpu_seconds()
    output = subprocess.run(
        [sida, "bench", "--endpoint", cluster.endpoint, "--file", REPOSITORY / "tests/data/sentences.txt", "--max-tokens", "16", "--ignore-eos",
         "--concurrency", "4", "--warmup", "0", "--requests", str(requests), "--json"],
        check=True, capture_output=True, text=True).stdout
    found = json.loads(output)
    assert found["requests"] == requests, found
    return found["requests_per_s"], (cluster.cpu_seconds() - before) / requests


def generation(arguments, kinds, order):
    """Rounds with the same processes."""
    with tempfile.TemporaryDirectory() as directory:
        clusters = {kind: Cluster(arguments.sida, pathlib.Path(directory), flags, 21000 + 100 * n) for n, (kind, flags) in enumerate(kinds.items())}
        stop = threading.Event()

        def scraping():
            while not stop.wait(SCRAPE_SECONDS):
                for cluster in clusters.values():
                    cluster.scrape()

        scraper = threading.Thread(target=scraping)
        scraper.start()
        try:
            for cluster in clusters.values():
                turn(arguments.sida, cluster, WARMUP_REQUESTS)
            for _ in range(arguments.rounds):
                turns = {}
                for kind in order.sample(list(kinds), len(kinds)):
                    turns[kind] = turn(arguments.sida, clusters[kind], arguments.requests)
                yield turns
        finally:
            stop.set()
            scraper.join()
            for cluster in clusters.values():
                cluster.stop()


def median_within(values):
    """The median, and the order statistics that hold it with 95% (by the binomial's normal approximation)."""
    values, margin = sorted(values), 0.98 * math.sqrt(len(values))
    low, high = (max(0, math.floor(len(values) / 2 - margin)), min(len(values), math.ceil(len(values) / 2 + margin)) - 1)
    return f"{statistics.median(values):.4f} ({values[low]:.4f} to {values[high]:.4f})"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sida", default=REPOSITORY / "target/release/sida")
    parser.add_argument("--generations", type=int, default=3, help="how often all clusters are started")
    parser.add_argument("--rounds", type=int, default=10, help="of a generation")
    parser.add_argument("--requests", type=int, default=200, help="of a turn")
    parser.add_argument("--kinds", default="off,same,on", help="of off, same, on, all")
    parser.add_argument("--keep", type=pathlib.Path, help="file of rounds, one a line")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    arguments = parser.parse_args()
    collector = Collector()
    off = ["--metrics-listen", "off"]
    on = ["--metrics-listen", "127.0.0.1:PORT", "--log-format", "json", "--otlp-endpoint", f"http://127.0.0.1:{collector.port}"]
    kinds = {"off": off, "same": off, "on": on, "all": [*on, "--otlp-sampling", "1"]}
    kinds = {kind: kinds[kind] for kind in arguments.kinds.split(",")}
    order = random.Random(arguments.seed)
    rounds = []
    if arguments.keep and arguments.keep.exists():
        rounds = [json.loads(line) for line in arguments.keep.read_text().splitlines()]
    for _ in range(arguments.generations):
        for turns in generation(arguments, kinds, order):
            rounds.append(turns)
            if arguments.keep:
                with arguments.keep.open("a") as kept:
                    print(json.dumps(turns), file=kept)
    collector.server.stop(None).wait()
    print(f"{len(rounds)} rounds, seed {arguments.seed}, {collector.bytes} bytes of spans in the last call")
    for kind in kinds:
        told = [turns for turns in rounds if kind in turns]
        rate, cost = (statistics.median(turns[kind][n] for turns in told) for n in (0, 1))
        print(f"{kind}: {rate:.1f} requests/s, {1e3 * cost:.3f} ms of CPU a request")
        others = [other for other in ("off", "same") if other in kinds and other != kind]
        if kind != "off" and others:
            against = [median_within([turns[kind][n] / statistics.mean(turns[other][n] for other in others) for turns in told]) for n in (0, 1)]
            print(f"  against {' and '.join(others)}: throughput {against[0]}, CPU {against[1]}")


main()
