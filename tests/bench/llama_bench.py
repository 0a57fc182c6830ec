"""Compares `sida bench` with llama.cpp on this machine, in turns, both with all experts resident and one caller: the time of
a token after the first, and that of a prompt.

    sida synth --like olmoe-1b-7b --experts int4 --dense int4 --out olmoe
    python tests/bench/llama_gguf.py olmoe.gguf
    python tests/bench/llama_bench.py --sida target/release/sida --model olmoe --llama-bench llama-bench --gguf olmoe.gguf

Ours is the whole path: tokenizer, queue, expert-nodes in the process. llama-bench is llama.cpp's own: its loop, without
a tokenizer or sampling. The table shows the tokens a second of every turn, and the ratio of each pair, as median and range.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile

PROMPT = "the cat sat on a mat and "


def output_of(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def bench(options, prompts, tokens):
    """What `sida bench` tells of answers of so many tokens."""
    command = [options.sida, "bench", "--json", "--model", options.model, "--predictor", "off", "--no-prefix-cache", "--prompts", prompts]
    command += ["--ignore-eos", "--max-tokens", str(tokens), "--concurrency", "1", "--duration", options.duration, "--rounds", "1"]
    found = json.loads(output_of(command))
    return found[0] if isinstance(found, list) else found


def llama(options, prompt, tokens):
    """The tokens a second of llama-bench."""
    command = [options.llama_bench, "-m", options.gguf, "-t", str(options.threads), "-r", "1", "-o", "json", "-p", str(prompt), "-n", str(tokens)]
    return json.loads(output_of(command))[0]["avg_ts"]


def row(name, pairs):
    ratios = [ours / theirs for ours, theirs in pairs]
    shown = lambda values: ", ".join(f"{value:.1f}" for value in values)
    ours, theirs = zip(*pairs)
    print(f"| {name} | {shown(theirs)} | {shown(ours)} | **{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sida", default="target/release/sida")
    parser.add_argument("--model", required=True)
    parser.add_argument("--llama-bench", default="llama-bench")
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--duration", default="8s")
    parser.add_argument("--repeats", type=int, default=60, help="how often the prompt says what it says: fewer where letters are tokens")
    options = parser.parse_args()
    prompt = PROMPT * options.repeats
    asked = json.loads(output_of([options.sida, "ask", "--json", "--model", options.model, "--max-tokens", "1", prompt]))
    length = asked["prompt_tokens"]
    decoding, reading = [], []
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as prompts:
        prompts.write(prompt + "\n")
        prompts.flush()
        for _ in range(options.turns):
            theirs = llama(options, 0, 32)
            decoding.append((1000 / bench(options, prompts.name, 48)["tpot_ms"]["p50"], theirs))
            theirs = llama(options, length, 0)
            reading.append((1000 * length / bench(options, prompts.name, 1)["ttft_ms"]["p50"], theirs))
            print("decoding and reading, ours and theirs:", decoding[-1], reading[-1], file=sys.stderr, flush=True)
    print("| tokens a second | llama.cpp | sida | ratio |\n|---|---|---|---|")
    row("decoding, one sequence", decoding)
    row(f"a prompt of {length} tokens", reading)


if __name__ == "__main__":
    main()
