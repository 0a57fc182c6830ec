"""Compares `sida bench` with transformers on this machine, in turns: A B A B for every case, so that both see the same weather.

    python tests/bench/compare.py --sida target/release/sida --model models/switch-tiny-64

transformers runs in a process of its own (transformers_bench.py) that keeps the model loaded and warm between its turns
and waits, idle, during the others. `sida bench` is started for each of its turns. Both get the same first sentences of
tests/data/sentences.txt, and a batch is all of them at once. The figure of a turn is the median latency of a batch; the
table shows the medians over the turns, and the ratio of each pair of turns, transformers over sida, as median and range.

Cases are named METHOD-BATCH: encode-1 encode-8 encode-32 generate-1 generate-8. generate makes exactly 32 tokens of each
text. Options after `--` go to `sida bench` as they are, such as `-- --expert-memory 25%`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CASES = ["encode-1", "encode-8", "encode-32", "generate-1", "generate-8"]


class Transformers:
    """transformers_bench.py as a server that measures on demand."""

    def __init__(self, options):
        command = [options.python, str(HERE / "transformers_bench.py"), "--model", str(options.model)]
        command += ["--threads", str(options.threads), "--dtype", options.dtype]
        if options.tokenizer:
            command += ["--tokenizer", str(options.tokenizer)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.description = json.loads(self.process.stdout.readline())
        self.seconds, self.tokens = options.seconds, options.tokens

    def measure(self, method, texts):
        request = {"method": method, "texts": texts, "tokens": self.tokens, "seconds": self.seconds}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())["median_ms"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Sida:
    """One `sida bench` process per turn, warmed up by itself before it measures."""

    def __init__(self, options):
        self.options = options

    def measure(self, method, texts):
        options = self.options
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
            file.write("\n".join(texts) + "\n")
            file.flush()
            command = [str(options.sida), "bench", "--model", str(options.model), "--method", method]
            command += ["--file", file.name, "--batch", str(len(texts)), "--duration", f"{options.seconds}s", "--json"]
            if method == "generate":
                command += ["--max-tokens", str(options.tokens), "--min-tokens", str(options.tokens), "--ignore-eos"]
            done = subprocess.run(command + options.sida_options, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        report = json.loads(done.stdout)
        if report["failures"]:
            raise SystemExit(f"{' '.join(command)}: {report['failures']}")
        if method == "generate":
            tokens = report["tokens_per_s"] / report["requests_per_s"]
            assert abs(tokens - options.tokens) < 0.01, f"{tokens} tokens a text"
        return report["latency_ms"]["p50"]


def compare(case, options, texts, theirs, ours):
    method, batch = case.split("-")
    texts = texts[: int(batch)]
    pairs = []
    for turn in range(options.turns):
        pairs.append((theirs.measure(method, texts), ours.measure(method, texts)))
        print(f"  {case} turn {turn + 1}: {pairs[-1][0]:.2f} ms, {pairs[-1][1]:.2f} ms", file=sys.stderr, flush=True)
    ratios = [their / our for their, our in pairs]
    return {
        "case": case,
        "transformers_ms": statistics.median(their for their, _ in pairs),
        "sida_ms": statistics.median(our for _, our in pairs),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "pairs": pairs,
    }


def print_table(results):
    print("| case | transformers, ms | sida, ms | ratio | range of the ratio |")
    print("|---|---|---|---|---|")
    for result in results:
        print(
            f"| {result['case']} | {result['transformers_ms']:.2f} | {result['sida_ms']:.2f} "
            f"| {result['ratio']:.1f} | {result['ratio_min']:.1f} to {result['ratio_max']:.1f} |"
        )


def parse_options():
    own, separator, sida_options = sys.argv[1:], "--", []
    if separator in own:
        position = own.index(separator)
        own, sida_options = own[:position], own[position + 1 :]
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--sida", type=Path, default=HERE.parent.parent / "target/release/sida")
    arguments.add_argument("--python", default=sys.executable, help="an interpreter that has torch and transformers")
    arguments.add_argument("--model", type=Path, required=True)
    arguments.add_argument("--tokenizer", type=Path, help="directory of tokenizer.json, where the model has none")
    arguments.add_argument("--file", type=Path, default=HERE.parent / "data/sentences.txt")
    arguments.add_argument("--cases", nargs="+", default=CASES)
    arguments.add_argument("--turns", type=int, default=5, help="pairs of measurements of each case")
    arguments.add_argument("--seconds", type=float, default=3, help="of each measurement")
    arguments.add_argument("--tokens", type=int, default=32)
    arguments.add_argument("--threads", type=int, default=2, help="of transformers")
    arguments.add_argument("--dtype", default="float32", help="of transformers")
    arguments.add_argument("--json", type=Path, help="write every pair of figures to this file, too")
    options = arguments.parse_args(own)
    options.sida_options = sida_options
    return options


def main():
    options = parse_options()
    texts = options.file.read_text(encoding="utf-8").splitlines()
    theirs, ours = Transformers(options), Sida(options)
    results = [compare(case, options, texts, theirs, ours) for case in options.cases]
    theirs.close()
    print(f"{options.model.name}, {theirs.description}, {options.turns} turns of {options.seconds:g} s")
    print_table(results)
    if options.json:
        options.json.write_text(json.dumps({"transformers": theirs.description, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
