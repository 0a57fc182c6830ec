"""Measures transformers on a Switch Transformer, one request a line, so that a driver can interleave it with `sida bench`.

    pip install torch==2.15.0 transformers==5.17.0
    echo '{"method": "encode", "texts": ["a fine film ."], "seconds": 2}' |
        python tests/bench/transformers_bench.py --model models/switch-tiny-64

Loads the model once and prints a line that says what runs; then answers each JSON line of standard input with one of
standard output:

    method    "encode": one encoder forward of all texts; "generate": greedy decoding of exactly `tokens` tokens of each
    texts     one padded batch with its attention mask, as a user would send it
    tokens    new tokens per text, neither fewer nor more (32)
    seconds   measure for at least so long, and at least 3 times, after the warm-up (2)
    warmup    calls before that are not counted (2)

    -> method, batch, samples_ms (every call), median_ms

Tokenizing happens once, outside what is timed: the time is that of the model alone, which favours transformers.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from transformers import SwitchTransformersForConditionalGeneration

SAMPLES_MIN = 3


def padded_batch(tokenizer, texts, pad_token_id):
    """-> input ids and attention mask, both (texts, longest)."""
    rows = [tokenizer.encode(text).ids for text in texts]
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_token_id)
    mask = torch.zeros_like(ids)
    for position, row in enumerate(rows):
        ids[position, : len(row)] = torch.tensor(row)
        mask[position, : len(row)] = 1
    return ids, mask


def measured_call(model, tokenizer, request):
    """-> a function that does once what the request measures."""
    ids, mask = padded_batch(tokenizer, request["texts"], model.config.pad_token_id)
    if request["method"] == "encode":
        return lambda: model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    if request["method"] == "generate":
        tokens = request.get("tokens", 32)
        bounds = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "num_beams": 1}

        def generate():
            generated = model.generate(ids, attention_mask=mask, **bounds)
            assert generated.shape[1] == tokens + 1, generated.shape
            return generated

        return generate
    raise ValueError(f"method {request['method']!r} is neither encode nor generate")


@torch.inference_mode()
def measure(model, tokenizer, request):
    call = measured_call(model, tokenizer, request)
    for _ in range(request.get("warmup", 2)):
        call()
    samples_ms, begun = [], time.perf_counter()
    while len(samples_ms) < SAMPLES_MIN or time.perf_counter() - begun < request.get("seconds", 2):
        started = time.perf_counter()
        call()
        samples_ms.append((time.perf_counter() - started) * 1e3)
    return {
        "method": request["method"],
        "batch": len(request["texts"]),
        "samples_ms": [round(sample, 4) for sample in samples_ms],
        "median_ms": round(statistics.median(samples_ms), 4),
    }


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", type=Path, required=True)
    arguments.add_argument("--tokenizer", type=Path, help="directory of tokenizer.json, where the model has none")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    model = SwitchTransformersForConditionalGeneration.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype)
    ).eval()
    tokenizer = Tokenizer.from_file(str((options.tokenizer or options.model) / "tokenizer.json"))
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    attention = model.config._attn_implementation
    print(json.dumps(versions | {"dtype": options.dtype, "threads": options.threads, "attention": attention}), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(model, tokenizer, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
