"""How serving grows with GPUs: a cluster of one expert-node per GPU, the coordinator on the first of them, against the one on a
single GPU, in turns.

    python tests/gpu/scale.py --sida target/release/sida --like switch-base-256 --expert-nodes 1,2,4,8 --gpus 8

prints, for each method, batch and number of expert-nodes: requests a second and their ratio to the first cluster, what a
layer's call to a node took and what of that the node computed, and what every node held. With fewer GPUs than expert-nodes
these take turns on the GPUs there are, each with its own part of the memory. Needs a build with the cargo feature cuda and
no Python package; the model is random weights made by `sida synth` in --directory. Ends with --kill by killing an
expert-node under load, as serve.py does.
"""

import argparse
import pathlib
import re
import statistics
import sys
import tempfile
import urllib.request

import serve

METRIC = re.compile(
    r"^(sida_(?:dispatch|expert_compute)_duration_seconds_(?:sum|count)|sida_expert_resident_bytes)(?:\{[^}]*\})? (\S+)$", re.MULTILINE
)


class Cluster:
    """A coordinator and expert-nodes, with their metrics."""

    def __init__(self, args, expert_nodes, directory, log):
        self.metrics = []
        names = ["c0", *(f"e{number}" for number in range(expert_nodes))]
        ports = {name: serve.free_port() for name in names}
        entry = lambda name: f'[[{"coordinator" if name == "c0" else "expert-node"}]]\nname = "{name}"\naddress = "127.0.0.1:{ports[name]}"\n'
        file = pathlib.Path(directory) / "cluster.toml"
        file.write_text("".join(entry(name) for name in names))
        # A little more than an even share: placement is not perfectly even.
        share = min(100, 100 / expert_nodes + 5)
        self.processes = []
        for number, name in enumerate(names[1:]):
            flags = ["--device", f"cuda:{number % args.gpus}", "--expert-memory", f"{share}%", "--host-memory", f"{share}%"]
            self.start(args, "expert-node", name, file, flags, log)
        self.start(args, "coordinator", "c0", file, ["--device", "cuda:0", "--batch-tokens-max", "16384"], log)
        self.endpoint = self.processes[-1].address

    def start(self, args, role, name, file, flags, log):
        self.metrics.append(serve.free_port())
        common = ["--static", str(file), "--model", args.model, "--log", "error", "--metrics-listen", f"127.0.0.1:{self.metrics[-1]}"]
        self.processes.append(serve.Process([args.sida, role, "--name", name, *flags, *common], log))

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
        flags = ["--method", method, "--ignore-eos", "--max-tokens", "32", "--batch", str(batch), "--log", "error", "--file", args.file]
        serve.bench(args.sida, self.endpoint, *flags, "--duration", "500ms")
        before, _ = self.scrape()
        report = serve.bench(args.sida, self.endpoint, *flags, "--duration", args.duration)[0]
        after, resident = self.scrape()
        if report["failures"]:
            raise SystemExit(f"{method} {batch}: {report['failures']}")
        grown = {name: after[name] - before.get(name, 0) for name in after}
        mean = lambda name: 1e3 * grown[f"sida_{name}_duration_seconds_sum"] / max(1, grown[f"sida_{name}_duration_seconds_count"])
        return report["requests_per_s"], mean("dispatch"), mean("expert_compute"), resident

    def end(self):
        for process in reversed(self.processes):
            process.end()


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sida", required=True)
    arguments.add_argument("--like", default="switch-base-256", help="a published shape")
    arguments.add_argument("--directory", default="/dev/shm", help="where the model is made")
    arguments.add_argument("--file", default="tests/data/sentences.txt")
    arguments.add_argument("--gpus", type=int, default=1)
    arguments.add_argument("--expert-nodes", default="1,2", help="sizes of clusters, the first is what the others are held against")
    arguments.add_argument("--batches", default="8,32,128,256")
    arguments.add_argument("--methods", default="encode,generate")
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--duration", default="2s")
    arguments.add_argument("--kill", action="store_true")
    args = arguments.parse_args()
    sizes = [int(size) for size in args.expert_nodes.split(",")]
    cases = [(method, int(batch)) for method in args.methods.split(",") for batch in args.batches.split(",")]
    with tempfile.TemporaryDirectory(dir=args.directory) as directory, open(f"{directory}/log", "w+") as log:
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
                report = serve.kill_under_load(args, [cluster.processes[-1], *cluster.processes[:-1]])
                serve.check(f"no request of {report['requests']} failed when a node was killed", report["failures"], {})
                cluster.end()
        except SystemExit:
            log.seek(0)
            print("".join(log.readlines()[-40:]), file=sys.stderr)
            raise


def print_table(args, sizes, cases, found):
    print(f"{args.like}, {args.gpus} GPUs, {args.rounds} rounds; medians")
    print(f"{'':14} {'nodes':>5} {'requests/s':>10} {'ratio':>6} {'call ms':>8} {'of it computed':>14}  resident GiB")
    for case in cases:
        for size in sizes:
            rounds = found[(case, size)]
            rate, call, computed = (statistics.median(column) for column in list(zip(*rounds))[:3])
            ratios = [mine[0] / theirs[0] for mine, theirs in zip(rounds, found[(case, sizes[0])])]
            resident = " ".join(f"{held / 2**30:.1f}" for held in rounds[-1][3])
            print(f"{case[0]:9}{case[1]:>5} {size:>5} {rate:>10.1f} {statistics.median(ratios):>6.2f} {call:>8.3f} {computed:>14.3f}  {resident}")


if __name__ == "__main__":
    main()
