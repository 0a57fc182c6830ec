"""Times transformers' Switch Transformers on a GPU, a peer of what tests/gpu/served.py measures: the same shapes with random
weights in bf16, a batch at a time from ids on the host to states or tokens on the host, medians.

    python tests/bench/transformers_gpu.py --like switch-base-128 --batches 1,8,32 --input-tokens 28,256

`resident` has everything on the device; `offload` is accelerate's cpu_offload, which copies each module's weights to the
device when it runs. Needs torch, transformers and accelerate. Prints one JSON object; figures are milliseconds.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

BATCHES = 24


def config_of(name):
    size, experts = name.rsplit("-", 1)
    large = size == "switch-large"
    return SwitchTransformersConfig(
        vocab_size=32128,
        d_model=1024 if large else 768,
        d_kv=64,
        d_ff=4096 if large else 3072,
        num_heads=16 if large else 12,
        num_layers=24 if large else 12,
        num_decoder_layers=24 if large else 12,
        num_sparse_encoder_layers=12 if large else 6,
        num_sparse_decoder_layers=12 if large else 6,
        num_experts=int(experts),
        expert_capacity=1 << 16,  # nothing is dropped, as in ours
        router_dtype="float32",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


def inputs(sequences, tokens, vocab):
    state, batches = 1, []
    for _ in range(BATCHES):
        ids = []
        for _ in range(sequences * tokens):
            state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
            ids.append(1 + int((vocab - 2.0) ** ((state >> 33) / (1 << 31))))
        batches.append(torch.tensor(ids).view(sequences, tokens))
    return batches


def timed(work, batches, warm, most, seconds):
    times = []
    begun = time.perf_counter()
    for number in range(warm + most):
        if number >= warm + 3 and time.perf_counter() - begun > seconds:
            break
        start = time.perf_counter()
        work(batches[number % len(batches)])
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm:]) * 1e3, len(times) - warm


def measure(model, options, seconds):
    encoder = model.get_encoder()

    @torch.inference_mode()
    def encode(ids):
        mask = torch.ones_like(ids).cuda()
        encoder(input_ids=ids.cuda(), attention_mask=mask).last_hidden_state.cpu()

    @torch.inference_mode()
    def generate(ids):
        new = options.new_tokens
        mask = torch.ones_like(ids).cuda()
        model.generate(
            input_ids=ids.cuda(), attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False
        ).cpu()

    figures = {}
    for name, work in [("encode", encode), (f"generate {options.new_tokens}", generate)]:
        if name not in options.methods:
            continue
        for tokens in options.input_tokens:
            for sequences in options.batches:
                batches = inputs(sequences, tokens, model.config.vocab_size)
                most = 40 if name == "encode" else 8
                ms, count = timed(work, batches, 2 if name == "encode" else 1, most, seconds)
                figures[f"{name}, {sequences} x {tokens}"] = {"median_ms": round(ms, 3), "batches": count}
    return figures


def numbers(text):
    return [int(number) for number in text.split(",")]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--like", default="switch-base-128")
    parser.add_argument("--batches", type=numbers, default=[1, 8, 32])
    parser.add_argument("--input-tokens", type=numbers, default=[28, 256])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=2.0, help="per figure")
    parser.add_argument("--kinds", default="resident,offload")
    options = parser.parse_args()
    import accelerate
    import transformers

    report = {"versions": [torch.__version__, transformers.__version__, accelerate.__version__], "model": options.like}
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = SwitchTransformersForConditionalGeneration(config_of(options.like)).eval()
    report["device"] = torch.cuda.get_device_name()
    options.methods = ["encode", f"generate {options.new_tokens}"]
    if "resident" in options.kinds:
        report["resident"] = measure(model, options, options.seconds)
        report["resident_peak_bytes"] = torch.cuda.max_memory_allocated()
    if "offload" in options.kinds:
        model = model.cpu()
        torch.cuda.empty_cache()
        accelerate.cpu_offload(model, execution_device=torch.device("cuda:0"))
        options.batches, options.input_tokens, options.new_tokens = options.batches[:2], options.input_tokens[:1], 4
        options.methods = ["encode", f"generate {options.new_tokens}"]
        report["offload"] = measure(model, options, options.seconds)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
