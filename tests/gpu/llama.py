"""A GGUF file on a GPU: what `sida convert` makes of it, served by `sida up` and asked by `sida bench` over gRPC, against
llama.cpp with the same file on the same GPU, in turns.

    python tests/bench/llama_gguf.py qwen3.gguf --like qwen3-30b-a3b
    python tests/gpu/llama.py --sida target/release/sida --gguf qwen3.gguf --llama llama.cpp/build/bin

Everything is resident on both sides. For each number of clients prints the tokens a second that they decode together behind a
prompt of 64 tokens, and for each length of a prompt the tokens of it that are read a second. Ours is the whole path: text comes by gRPC,
is tokenized, and a token goes back as a message. llama.cpp's is what llama-batched-bench and llama-bench measure, its loop
without a tokenizer or sampling. Needs builds of both with CUDA, and tokenizers.
"""

import argparse
import json
import pathlib
import statistics
import subprocess

import causal
import serve

TOKENS = 64
NEW_TOKENS = 32


class Llama:
    def __init__(self, args, log):
        self.args, self.log = args, log

    def lines(self, program, *flags):
        command = [str(pathlib.Path(self.args.llama) / program), "-m", self.args.gguf, "-ngl", "99", "-fa", "1", *flags]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}")
        return done.stdout

    def decoding(self, clients):
        """Tokens a second for each number of clients: the better of two, since the first of a size makes ready for it."""
        shape = ["-npp", str(TOKENS), "-ntg", str(NEW_TOKENS), "-npl", ",".join(str(number) for number in clients for _ in range(2))]
        room = 4 * (TOKENS + NEW_TOKENS) * max(clients)
        out = self.lines("llama-batched-bench", "-c", str(room), *shape, "--output-format", "jsonl")
        found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        return {number: max(line["speed_tg"] for line in found if line["pl"] == number) for number in clients}

    def reading(self, prompts):
        """Tokens a second for each length of a prompt."""
        out = self.lines("llama-bench", "-n", "0", "-r", "3", "-o", "json", "-ub", "2048", "-b", "2048", "-p", ",".join(map(str, prompts)))
        return {line["n_prompt"]: line["avg_ts"] for line in json.loads(out)}


def main():
    numbers = lambda text: [int(number) for number in text.split(",")] if text else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sida", required=True)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--model", help="what was made of the file already")
    parser.add_argument("--llama", help="where llama.cpp's programs are; without it only ours is measured")
    parser.add_argument("--directory", default="/dev/shm", help="where the model is made")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--clients", default="1,8,32", type=numbers)
    parser.add_argument("--prompts", default="512,2048", type=numbers)
    parser.add_argument("--duration", default="2s")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with serve.workplace(args.directory) as (directory, log):
        if not args.model:
            args.model = f"{directory}/model"
            subprocess.run([args.sida, "convert", args.gguf, "--out", args.model], check=True, stdout=log, stderr=log)
        run(args, directory, log)


def run(args, directory, log):
    flags = ["--device", args.device, "--model", args.model, "--expert-memory", "100%", "--metrics-listen", "off"]
    flags += ["--prompt-tokens-max", str(max(TOKENS, *args.prompts)), "--no-prefix-cache", "--log", "error"]
    server = serve.Process([args.sida, "up", *flags, "--listen", "127.0.0.1:0"], log)

    files = {tokens: causal.prompts(directory, args.model, tokens) for tokens in {TOKENS, *args.prompts}}

    def ours(clients, tokens, new_tokens):
        flags = ["--method", "generate", "--ignore-eos", "--max-tokens", str(new_tokens), "--log", "error", "--duration", args.duration]
        flags += ["--concurrency", str(clients), "--file", files[tokens]]
        report = serve.bench(args.sida, server.address, *flags)[0]
        if report["failures"]:
            raise SystemExit(f"{clients} clients, {tokens} tokens: {report['failures']}")
        return report

    llama, found = Llama(args, log), {}
    for clients in args.clients:
        ours(clients, TOKENS, NEW_TOKENS + 1)
    for _ in range(args.rounds):
        decoding, reading = (llama.decoding(args.clients), llama.reading(args.prompts)) if args.llama else ({}, {})
        for clients in args.clients:
            own = 1000 * clients / ours(clients, TOKENS, NEW_TOKENS + 1)["tpot_ms"]["p50"]
            found.setdefault(f"decoding, {clients} clients", []).append((own, decoding.get(clients)))
        for tokens in args.prompts:
            own = 1000 * tokens / ours(1, tokens, 1)["ttft_ms"]["p50"]
            found.setdefault(f"a prompt of {tokens} tokens", []).append((own, reading.get(tokens)))
    server.end()
    print("| tokens a second | sida | llama.cpp | ratio |\n|---|---|---|---|")
    for what, pairs in found.items():
        own, theirs = zip(*pairs)
        line = f"| {what} | {', '.join(f'{value:.0f}' for value in own)} |"
        if args.llama:
            ratios = [a / b for a, b in pairs]
            line += f" {', '.join(f'{value:.0f}' for value in theirs)} |"
            line += f" **{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) |"
        print(line, flush=True)


if __name__ == "__main__":
    main()
