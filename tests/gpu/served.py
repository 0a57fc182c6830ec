"""What is served from a GPU against the forward alone, measured inside the same engine: coordinator and experts in one process,
asked by gRPC.

    python tests/gpu/served.py --sida target/release/sida --like switch-base-128 --skew 1.5 --budgets 100%,20%

For each budget, method and number of clients prints: requests a second and the latency's median, the forward's median for
batches of as many requests that are sent together, and the share of the forward's pace that is served (clients divided by the
forward, against requests a second). A budget is asked for as a share of all experts, and told as a share of those that the method uses,
which for encode are the encoder's, with its bytes. Several builds (--sida a,b) take turns, round by round; one that does not tell what its
forward took has none. Needs a build with the cargo feature cuda and no Python package.

With --peer a pass by hand in plain torch (torch_peer.py, what follows the word are flags of it) takes its turn in every round, on
the same model, texts and GPU. Both load once and wait, idle, while the other is measured. Its milliseconds stand beside the
forward's, and so does their ratio within each round, above 1 where ours is faster: `--peer=` or `--peer=--compile`.
"""

import argparse
import json
import pathlib
import re
import statistics
import subprocess
import sys
import time
import urllib.request

import serve

RESIDENT = re.compile(r"^sida_expert_resident_bytes(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


class Server:
    """`sida up` on a GPU, once it has loaded what it holds."""

    def __init__(self, sida, args, budget, log):
        metrics = serve.free_port()
        flags = ["--device", args.device, "--model", args.model, "--expert-memory", budget, "--log", "error"]
        flags += ["--listen", "127.0.0.1:0", "--metrics-listen", f"127.0.0.1:{metrics}"]
        flags += ["--predictor", args.predictor] if args.predictor else []
        self.process = serve.Process([sida, "up", *flags], log)
        seen = []
        while len(seen) < 4 or len(set(seen[-4:])) > 1:
            text = urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=10).read().decode()
            seen.append(sum(map(float, RESIDENT.findall(text))))
            time.sleep(0.5)
        self.resident_bytes = seen[-1]
        self.sida = sida

    def bench(self, args, method, concurrency, batch):
        flags = ["--method", method, "--ignore-eos", "--max-tokens", str(args.new_tokens), "--file", args.file, "--log", "error"]
        flags += ["--concurrency", str(concurrency), "--batch", str(batch), "--duration", args.duration]
        return serve.bench(self.sida, self.process.address, *flags)[0]


class Peer:
    """torch_peer.py, once it has loaded."""

    def __init__(self, args, log):
        command = [sys.executable, str(pathlib.Path(__file__).with_name("torch_peer.py")), "--serve", "--model", args.model]
        command += ["--file", args.file, "--device", args.device, "--new-tokens", str(args.new_tokens), *args.peer.split()]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        print(json.dumps({"peer": self.answer()}), flush=True)

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.process.args)} ended with exit code {self.process.wait()}")
        return json.loads(line)

    def measure(self, method, batch):
        """The median of a batch's milliseconds."""
        print("measure", method, batch, file=self.process.stdin, flush=True)
        return self.answer()["ms"]

    def end(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


def measure(server, args, method, clients):
    """Requests a second, the median latency and the median forward, in milliseconds, what was loaded while a call waited, and
    the budget."""
    together = server.bench(args, method, 1, clients)
    apart = together if clients == 1 else server.bench(args, method, clients, 1)
    for report in (together, apart):
        if report["failures"]:
            raise SystemExit(f"{method}, {clients} clients: {report['failures']}")
    forward = together.get("forward_ms", {}).get("p50")
    return apart["requests_per_s"], apart["latency_ms"]["p50"], forward, apart["loads"]["demanded"], apart.get("budget")


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sida", required=True, type=lambda text: text.split(","))
    arguments.add_argument("--like", default="switch-base-128", help="a published shape")
    arguments.add_argument("--skew", default="1.5")
    arguments.add_argument("--model", help="a model that is there already, instead of one that is made")
    arguments.add_argument("--directory", default="/dev/shm", help="where the model is made")
    arguments.add_argument("--file", default="tests/data/sentences.txt")
    arguments.add_argument("--device", default="cuda:0")
    arguments.add_argument("--predictor")
    arguments.add_argument("--budgets", default="100%", type=lambda text: text.split(","))
    arguments.add_argument("--methods", default="encode,generate", type=lambda text: text.split(","))
    arguments.add_argument("--clients", default="1,8,32", type=lambda text: [int(number) for number in text.split(",")])
    arguments.add_argument("--new-tokens", type=int, default=32)
    arguments.add_argument("--duration", default="1s")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--peer", metavar="FLAGS", help="measure torch_peer.py with these flags, too, in turns")
    args = arguments.parse_args()
    with serve.workplace(args.directory) as (directory, log):
        if not args.model:
            args.model = f"{directory}/model"
            command = [args.sida[0], "synth", "--like", args.like, "--skew", args.skew, "--out", args.model]
            subprocess.run(command, check=True, capture_output=True)
        run(args, log)


def run(args, log):
    peer = None if args.peer is None else Peer(args, log)
    for budget in args.budgets:
        servers = [Server(sida, args, budget, log) for sida in args.sida]
        for method in args.methods:
            for clients in args.clients:
                rounds, peers = [], []
                for _ in range(args.rounds):
                    rounds.append([measure(server, args, method, clients) for server in servers])
                    peers += [peer.measure(method, clients)] if peer else []
                for number, server in enumerate(servers):
                    tell(budget, method, clients, server, [figures[number] for figures in rounds], peers)
        for server in servers:
            server.process.end()
    if peer:
        peer.end()


def tell(budget, method, clients, server, rounds, peers):
    rates, latencies, forwards, loads, budgets = zip(*rounds)
    rate, latency = statistics.median(rates), statistics.median(latencies)
    line = {"sida": server.sida, "budget": budget, "resident_gb": round(server.resident_bytes / 1e9, 2), "method": method, "clients": clients}
    line |= {"requests_per_s": round(rate, 1), "range": [round(min(rates), 1), round(max(rates), 1)], "p50_ms": round(latency, 3)}
    if budgets[0]:
        line |= {"budget_gb": round(budgets[0]["bytes"] / 1e9, 2), "of_used_experts": round(budgets[0]["share"], 3)}
    line |= {"demanded": statistics.median(loads)}
    if all(forwards):
        forward = statistics.median(forwards)
        line |= {"forward_ms": round(forward, 3), "of_forward": round(rate * forward / 1e3 / clients, 3)}
    if peers:
        line |= {"peer_ms": round(statistics.median(peers), 3)}
    if peers and all(forwards):
        ratios = [peer / forward for peer, forward in zip(peers, forwards)]
        line |= {"peer_over_forward": round(statistics.median(ratios), 2), "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)]}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
