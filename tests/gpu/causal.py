"""Decoder-only models served from a GPU, `sida up` asked by `sida bench` over gRPC, against a pass by hand in plain torch
(torch_causal.py) on the same weights and the same GPU, in turns.

    python tests/gpu/causal.py --sida target/release/sida --like olmoe-1b-7b
    python tests/gpu/causal.py --sida target/release/sida --like qwen3-30b-a3b --peer=

For each number of clients prints the median time per token after the first, over a prompt of so many tokens and 32 more, beside the
median of the peer's steps; and for each length of a prompt the time to the first token beside the peer's prompts. A budget is a
share of all experts. What is measured of ours is served: text comes by gRPC, is tokenized, and a token goes back as a message.
Needs a build with the cargo feature cuda, tokenizers, and for the peer what it needs.
"""

import argparse
import json
import pathlib
import random
import statistics
import subprocess
import sys

from tokenizers import Tokenizer

import serve

WORDS = ["a", "film", "that", "is", "good", "and", "long", "in", "the", "end", "of", "its", "time"]


class Peer:
    def __init__(self, args, log):
        command = [sys.executable, str(pathlib.Path(__file__).with_name("torch_causal.py")), "--serve", "--model", args.model]
        command += ["--device", args.device, *args.peer.split()]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        print(json.dumps({"peer": self.answer()}), flush=True)

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.process.args)} ended with exit code {self.process.wait()}")
        return json.loads(line)

    def measure(self, method, batch, tokens):
        print("measure", method, batch, tokens, file=self.process.stdin, flush=True)
        return self.answer()["ms"]

    def end(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


def prompts(directory, model, tokens):
    """A file of prompts of so many tokens each, no two alike."""
    path, chooser = pathlib.Path(directory) / f"prompts-{tokens}", random.Random(tokens)
    tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
    lines = []
    for _ in range(64):
        text = " ".join(chooser.choice(WORDS) for _ in range(tokens))
        lines.append(text[: tokenizer.encode(text).offsets[tokens - 1][1]])
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def main():
    numbers = lambda text: [int(number) for number in text.split(",")] if text else []
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sida", required=True)
    arguments.add_argument("--like", default="olmoe-1b-7b")
    arguments.add_argument("--blocks", help="so many blocks of that shape")
    arguments.add_argument("--model", help="a model that is there already, instead of one that is made")
    arguments.add_argument("--directory", default="/dev/shm", help="where the model is made")
    arguments.add_argument("--device", default="cuda:0")
    arguments.add_argument("--budget", default="100%")
    arguments.add_argument("--flags", default="", help="more flags of sida up")
    arguments.add_argument("--tokens", type=int, default=64, help="of the prompts that are answered")
    arguments.add_argument("--clients", default="1,8,32", type=numbers)
    arguments.add_argument("--prompts", default="512", type=numbers, help="tokens of the prompts whose first token is waited for")
    arguments.add_argument("--duration", default="2s")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--peer", metavar="FLAGS", help="measure torch_causal.py with these flags, too, in turns")
    args = arguments.parse_args()
    with serve.workplace(args.directory) as (directory, log):
        if not args.model:
            args.model = f"{directory}/model"
            blocks = ["--blocks", args.blocks] if args.blocks else []
            subprocess.run([args.sida, "synth", "--like", args.like, *blocks, "--out", args.model], check=True, capture_output=True)
        run(args, directory, log)


def run(args, directory, log):
    peer = None if args.peer is None else Peer(args, log)
    flags = ["--device", args.device, "--model", args.model, "--expert-memory", args.budget, "--metrics-listen", "off"]
    flags += ["--prompt-tokens-max", str(max(args.tokens, *args.prompts))]
    # Prompts repeat, and each is to be computed whole.
    server = serve.Process([args.sida, "up", *flags, "--no-prefix-cache", "--listen", "127.0.0.1:0", "--log", "error", *args.flags.split()], log)

    def ours(clients, tokens, new_tokens):
        flags = ["--method", "generate", "--ignore-eos", "--max-tokens", str(new_tokens), "--log", "error", "--duration", args.duration]
        flags += ["--concurrency", str(clients), "--file", prompts(directory, args.model, tokens)]
        report = serve.bench(args.sida, server.address, *flags)[0]
        if report["failures"]:
            raise SystemExit(f"{clients} clients, {tokens} tokens: {report['failures']}")
        return report

    def tell(line, rounds, peers):
        middle = lambda figures: round(statistics.median(figures), 3)
        line |= {"ms": middle(rounds), "range": [round(min(rounds), 3), round(max(rounds), 3)]}
        if peers:
            line |= {"peer_ms": middle(peers), "peer_over_ours": middle([b / a for a, b in zip(rounds, peers)])}
        print(json.dumps(line), flush=True)

    for clients in args.clients:
        rounds, peers, rates = [], [], []
        ours(clients, args.tokens, 33)
        for _ in range(args.rounds):
            report = ours(clients, args.tokens, 33)
            rounds.append(report["tpot_ms"]["p50"])
            rates.append(report["tokens_per_s"])
            peers += [peer.measure("step", clients, args.tokens + 16)] if peer else []
        tell({"step": clients, "tokens": args.tokens, "tokens_per_s": round(statistics.median(rates), 1)}, rounds, peers)
    for tokens in args.prompts:
        rounds, peers = [], []
        ours(1, tokens, 1)
        for _ in range(args.rounds):
            rounds.append(ours(1, tokens, 1)["ttft_ms"]["p50"])
            peers += [peer.measure("prompt", 1, tokens)] if peer else []
        tell({"prompt": tokens}, rounds, peers)
    server.end()
    if peer:
        peer.end()


if __name__ == "__main__":
    main()
