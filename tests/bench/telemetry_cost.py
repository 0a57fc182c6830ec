"""What telemetry costs: the same cluster of processes with and without it, measured in turns, A B A B. Prints the median
throughput of each, the median of the ratios of neighbouring turns, and the CPU time of all nodes per request, which what
else the machine does disturbs less.

    target/chart-tools/bin/python tests/bench/telemetry_cost.py --sida target/release/sida

"On" is what the chart sets: metrics served and scraped, JSON logs, OTLP to a collector at the default
sampling. "Off" has none. "All" records every request."""

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import statistics
import subprocess
import tempfile
import threading
import urllib.request

import grpc

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# The chart's PodMonitor does so.
SCRAPE_SECONDS = 15
TICKS = os.sysconf("SC_CLK_TCK")


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
        stats = [pathlib.Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split() for process in self.processes]
        return sum(int(fields[11]) + int(fields[12]) for fields in stats) / TICKS

    def scrape(self):
        for url in self.metrics:
            urllib.request.urlopen(url, timeout=10).read()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sida", default=REPOSITORY / "target/release/sida")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--kinds", default="off,on,all")
    arguments = parser.parse_args()
    collector = Collector()
    on = ["--metrics-listen", "127.0.0.1:PORT", "--log-format", "json", "--otlp-endpoint", f"http://127.0.0.1:{collector.port}"]
    kinds = {"off": ["--metrics-listen", "off"], "on": on, "all": [*on, "--otlp-sampling", "1"]}
    kinds = {kind: kinds[kind] for kind in arguments.kinds.split(",")}
    with tempfile.TemporaryDirectory() as directory:
        clusters = {kind: Cluster(arguments.sida, pathlib.Path(directory), flags, 21000 + 100 * n) for n, (kind, flags) in enumerate(kinds.items())}
        rates, costs = {kind: [] for kind in kinds}, {kind: [] for kind in kinds}

        def measure(kind, seconds):
            cluster = clusters[kind]
            before = cluster.cpu_seconds()
            output = subprocess.run(
                [arguments.sida, "bench", "--endpoint", cluster.endpoint, "--file", REPOSITORY / "tests/data/sentences.txt", "--max-tokens", "16", "--ignore-eos",
                 "--concurrency", "4", "--warmup", "8", "--duration", f"{seconds}s", "--json"],
                check=True, capture_output=True, text=True).stdout
            found = json.loads(output)
            return found["requests_per_s"], (cluster.cpu_seconds() - before) / (found["requests"] + 8)

        stop = threading.Event()

        def scraping():
            while not stop.wait(SCRAPE_SECONDS):
                for cluster in clusters.values():
                    cluster.scrape()

        threading.Thread(target=scraping, daemon=True).start()
        try:
            for kind in kinds:
                measure(kind, 2)
            for _ in range(arguments.rounds):
                for kind in kinds:
                    rate, cost = measure(kind, arguments.seconds)
                    rates[kind].append(rate)
                    costs[kind].append(cost)
        finally:
            stop.set()
            for cluster in clusters.values():
                for process in cluster.processes:
                    process.terminate()
    collector.server.stop(None).wait()
    for kind in kinds:
        ratios = [with_it / without for with_it, without in zip(rates[kind], rates["off"])]
        cpu = [with_it / without for with_it, without in zip(costs[kind], costs["off"])]
        print(f"{kind}: {statistics.median(rates[kind]):.1f} requests/s, {1e3 * statistics.median(costs[kind]):.2f} ms of CPU a request; "
              f"against off: throughput {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), CPU {statistics.median(cpu):.3f} ({min(cpu):.3f} to {max(cpu):.3f})")
    print(f"{collector.bytes} bytes of spans")


main()
