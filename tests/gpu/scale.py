"""How serving grows with GPUs: a cluster of one expert-node per GPU against the one on a single GPU, in turns.

    python tests/gpu/scale.py --sida target/release/sida --like switch-base-256 --expert-nodes 1,2,4,8 --gpus 8

prints, for each method, batch and number of expert-nodes: requests a second and their ratio to the first cluster, what a
layer's call to a node took and what of that the node computed, and what every node held. The expert-nodes share the model
evenly, or each has --expert-memory of it. The coordinator is on the first GPU; with --coordinators each there is one on
every GPU, each gets its part of the batch, and a second ratio is to the first cluster with the same batch per GPU. With
fewer GPUs than expert-nodes these take turns on the GPUs there are.
Needs a build with the cargo feature cuda and no Python package; the model is random weights made by `sida synth` in
--directory. Ends with --kill by killing an expert-node under load, as serve.py does.
"""

import argparse
import concurrent.futures
import pathlib
import re
import statistics
import sys
import tempfile
import time
import urllib.request

import serve

METRIC = re.compile(
    r"^(sida_(?:dispatch|expert_compute)_duration_seconds_(?:sum|count)|sida_expert_resident_bytes)(?:\{[^}]*\})? (\S+)$", re.MULTILINE
)


class Cluster:
    """Coordinators and expert-nodes, with their metrics."""

    pool = concurrent.futures.ThreadPoolExecutor(64)

    def __init__(self, args, expert_nodes, directory, log):
        self.metrics = []
        nodes = [f"e{number}" for number in range(expert_nodes)]
        coordinators = [f"c{number}" for number in range(expert_nodes if args.coordinators == "each" else 1)]
        ports = {name: serve.free_port() for name in [*nodes, *coordinators]}
        entry = lambda role, name: f'[[{role}]]\nname = "{name}"\naddress = "127.0.0.1:{ports[name]}"\n'
        file = pathlib.Path(directory) / "cluster.toml"
        members = [entry("expert-node", name) for name in nodes] + [entry("coordinator", name) for name in coordinators]
        file.write_text("".join(members))
        # A little more than an even share: placement is not perfectly even.
        share = args.expert_memory or f"{min(100, 100 / expert_nodes + 5)}%"
        self.processes = []
        for number, name in enumerate(nodes):
            flags = ["--device", f"cuda:{number % args.gpus}", "--expert-memory", share, "--host-memory", args.host_memory or share]
            self.start(args, "expert-node", name, file, flags, log)
        for number, name in enumerate(coordinators):
            flags = ["--device", f"cuda:{number % args.gpus}", "--batch-tokens-max", "16384", *args.coordinator_flags.split()]
            self.start(args, "coordinator", name, file, flags, log)
        self.coordinators = self.processes[expert_nodes:]
        self.settle()

    def start(self, args, role, name, file, flags, log):
        self.metrics.append(serve.free_port())
        common = ["--static", str(file), "--model", args.model, "--log", "error", "--metrics-listen", f"127.0.0.1:{self.metrics[-1]}"]
        self.processes.append(serve.Process([args.sida, role, "--name", name, *flags, *common], log))

    def settle(self):
        """Waits until the nodes have loaded what is placed on them."""
        seen = []
        while len(seen) < 4 or len({str(resident) for resident in seen[-4:]}) > 1:
            seen.append(self.scrape()[1])
            time.sleep(1)

    def scrape(self):
        """Sums over the nodes, and each node's resident bytes."""
        sums, resident = {}, []
        for port in self.metrics:
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
            for name, value in METRIC.findall(text):
                if name.endswith("resident_bytes"):
                    resident.append(float(value))
                else:
                    sums[name] = sums.get(name, 0) + float(value)
        return sums, resident

    def measure(self, args, method, batch):
        own = max(1, batch // len(self.coordinators))
        flags = ["--method", method, "--ignore-eos", "--max-tokens", "32", "--batch", str(own), "--log", "error", "--file", args.file]
        load = lambda duration: [
            self.pool.submit(serve.bench, args.sida, coordinator.address, *flags, "--duration", duration)
            for coordinator in self.coordinators
        ]
        concurrent.futures.wait(load("500ms"))
        before, _ = self.scrape()
        reports = [report.result()[0] for report in load(args.duration)]
        after, resident = self.scrape()
        for report in reports:
            if report["failures"]:
                raise SystemExit(f"{method} {batch}: {report['failures']}")
        grown = {name: after[name] - before.get(name, 0) for name in after}
        mean = lambda name: 1e3 * grown[f"sida_{name}_duration_seconds_sum"] / max(1, grown[f"sida_{name}_duration_seconds_count"])
        return sum(report["requests_per_s"] for report in reports), mean("dispatch"), mean("expert_compute"), resident

    def end(self):
        for process in reversed(self.processes):
            process.end()


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sida", required=True)
    arguments.add_argument("--like", default="switch-base-256", help="a published shape")
    arguments.add_argument("--model", help="a model that is there already, instead of one that is made")
    arguments.add_argument("--directory", default="/dev/shm", help="where the model is made")
    arguments.add_argument("--file", default="tests/data/sentences.txt")
    arguments.add_argument("--gpus", type=int, default=1)
    arguments.add_argument("--expert-nodes", default="1,2", help="sizes of clusters, the first is what the others are held against")
    arguments.add_argument("--coordinators", choices=["one", "each"], default="one", help="one in all, or one on each GPU")
    arguments.add_argument("--coordinator-flags", default="", help="more flags of coordinators")
    arguments.add_argument("--expert-memory", help="of each expert-node [default: an even share and a little more]")
    arguments.add_argument("--host-memory", help="of each expert-node [default: as --expert-memory]")
    arguments.add_argument("--batches", default="8,32,128,256", help="requests at a time, over all coordinators")
    arguments.add_argument("--methods", default="encode,generate")
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--duration", default="2s")
    arguments.add_argument("--kill", action="store_true")
    args = arguments.parse_args()
    sizes = [int(size) for size in args.expert_nodes.split(",")]
    cases = [(method, int(batch)) for method in args.methods.split(",") for batch in args.batches.split(",")]
    with tempfile.TemporaryDirectory(dir=args.directory) as directory, open(f"{directory}/log", "w+") as log:
        if not args.model:
            args.model = f"{directory}/model"
            serve.subprocess.run([args.sida, "synth", "--like", args.like, "--out", args.model], check=True, stdout=serve.subprocess.DEVNULL)
        try:
            found = {}
            for _ in range(args.rounds):
                for size in sizes:
                    cluster = Cluster(args, size, directory, log)
                    for case in cases:
                        found.setdefault((case, size), []).append(cluster.measure(args, *case))
                    cluster.end()
            print_table(args, sizes, cases, found)
            if args.kill:
                cluster = Cluster(args, max(sizes), directory, log)
                report = serve.kill_under_load(args, [cluster.coordinators[0], cluster.processes[max(sizes) - 1]])
                serve.check(f"no request of {report['requests']} failed when a node was killed", report["failures"], {})
                cluster.end()
        except SystemExit:
            log.seek(0)
            print("".join(log.readlines()[-40:]), file=sys.stderr)
            raise


def print_table(args, sizes, cases, found):
    print(f"{args.like}, {args.gpus} GPUs, coordinators: {args.coordinators}, expert memory of a node: {args.expert_memory or 'its share'}, "
          f"{args.rounds} rounds; medians")
    header = f"{'':14} {'nodes':>5} {'requests/s':>10} {'ratio':>6}"
    each = args.coordinators == "each"
    print(f"{header} {'same batch per GPU' if each else '':>18} {'call ms':>8} {'of it computed':>14}  resident GiB")
    for method, batch in cases:
        for size in sizes:
            rounds = found[((method, batch), size)]
            rate, call, computed = (statistics.median(column) for column in list(zip(*rounds))[:3])
            ratio = lambda batch: ratio_of(rounds, found.get(((method, batch), sizes[0])))
            of_its_own = ratio(batch * sizes[0] // size) if each else ""
            resident = " ".join(f"{held / 2**30:.1f}" for held in rounds[-1][3])
            print(f"{method:9}{batch:>5} {size:>5} {rate:>10.1f} {ratio(batch):>6} {of_its_own:>18} {call:>8.3f} {computed:>14.3f}  {resident}")


def ratio_of(mine, theirs):
    """The median over the rounds of one's requests a second over another's, if that was measured."""
    return f"{statistics.median(a[0] / b[0] for a, b in zip(mine, theirs)):.2f}" if theirs else "-"


if __name__ == "__main__":
    main()
