"""Step 2 for decoder-only models: trains on the ids of prepare_text.py for a given time. See README.md.

Writes OUT/checkpoint.safetensors again and again (the weights as export_decoder.py stores them, with their config and what
was measured), and a line of figures every 100 steps.
"""

import argparse
import json
import lzma
import math
import os
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from decoder_model import Decoder, DecoderConfig
from safetensors.torch import save_file

BALANCE_WEIGHT, Z_WEIGHT = 0.01, 0.001
WARMUP_STEPS, WEIGHT_DECAY = 200, 0.1
LENGTH = 512
REPORT_STEPS, VALIDATION_STEPS = 100, 500
VALIDATION_ROWS = 256


def read_ids(path, device):
    ids = np.frombuffer(lzma.decompress(path.read_bytes()), dtype=np.uint16)
    return torch.from_numpy(ids.astype(np.int32)).to(device)


def windows(ids, starts):
    """-> (inputs, targets) of LENGTH tokens each from these places"""
    rows = ids[starts[:, None] + torch.arange(LENGTH + 1, device=ids.device)].long()
    return rows[:, :-1], rows[:, 1:]


def training_loss(model, inputs, targets):
    """-> what is made smaller, and figures: cross-entropy, balance (1 is even), share of choices dropped"""
    device = inputs.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        logits, did = model(inputs)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    mean = lambda figure: torch.stack([block[figure] for block in did]).mean()
    balance = mean("balance")
    loss = cross_entropy + len(did) * (BALANCE_WEIGHT * balance + Z_WEIGHT * mean("squares"))
    return loss, torch.stack([cross_entropy, balance, mean("dropped")]).detach()


@torch.inference_mode()
def validate(model, ids, rows=32):
    """-> perplexity of held-out text in windows, and the least even layer: entropy of its experts' load over the largest"""
    model.eval()
    starts = torch.linspace(0, len(ids) - LENGTH - 1, VALIDATION_ROWS, device=ids.device).long()
    total, loads = 0.0, None
    for part in starts.split(rows):
        inputs, targets = windows(ids, part)
        logits, did = model(inputs)
        total += float(F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"))
        load = torch.stack([block["load"] for block in did]).double()
        loads = load if loads is None else loads + load
    share = loads / loads.sum(-1, keepdim=True)
    evenness = -torch.special.xlogy(share, share).sum(-1) / math.log(share.shape[-1])
    model.train()
    return {"heldout_perplexity": round(math.exp(total / len(starts) / LENGTH), 3), "evenness": round(float(evenness.min()), 4)}


def optimizer_for(model):
    decays = [tensor for name, tensor in model.named_parameters() if "norm" not in name and "router" not in name]
    others = [tensor for name, tensor in model.named_parameters() if "norm" in name or "router" in name]
    groups = [{"params": decays, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def stored(model):
    """Everything but the routers in bf16, as it is published."""
    dtype = lambda name: torch.float32 if name.endswith("router") else torch.bfloat16
    return {name: tensor.detach().to(dtype(name)).cpu().contiguous() for name, tensor in model.state_dict().items()}


def save(model, directory, measured):
    metadata = {"config": json.dumps(asdict(model.config)), "measured": json.dumps(measured)}
    unfinished = directory / "unfinished"
    save_file(stored(model), unfinished, metadata=metadata)
    os.replace(unfinished, directory / "checkpoint.safetensors")


def train(model, ids, heldout, options, begun):
    """Until the time is over; the rate falls as a cosine of the time from the first step on."""
    device, optimizer = ids.device, optimizer_for(model)
    loss_of = training_loss if options.eager else torch.compile(training_loss, dynamic=False)
    step, steps_begun, reported, measured = 0, None, time.time(), {}
    end = begun + options.seconds
    while True:
        now = time.time()
        if step > 0 and now >= end:
            break
        passed = 0.0 if steps_begun is None else (now - steps_begun) / (end - steps_begun)
        rate = options.rate * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * passed))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(ids) - LENGTH, (options.rows,), device=device)
        loss, figures = loss_of(model, *windows(ids, starts))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == 1:
            figures.tolist()  # waits, so that making the graph is not counted as training
            steps_begun = reported = time.time()
        if step % REPORT_STEPS == 0:
            cross_entropy, balance, dropped = figures.tolist()
            if not math.isfinite(cross_entropy):
                raise SystemExit(f"the loss is {cross_entropy} at step {step}: try a lower --rate")
            speed = REPORT_STEPS * options.rows * LENGTH / (time.time() - reported)
            print(
                f"{time.time() - begun:.0f} s, step {step}, {step * options.rows * LENGTH / 1e6:.1f} M tokens: "
                f"loss {cross_entropy:.3f}, balance {balance:.3f}, dropped {dropped:.4f}, rate {rate:.5f}, {speed:.0f} tokens/s",
                flush=True,
            )
            if step % VALIDATION_STEPS == 0:
                measured = {"step": step} | validate(model, heldout)
                print(measured, flush=True)
                save(model, options.out, measured)
            reported = time.time()
    return step


def parse_options():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--data", type=Path, required=True, help="what prepare_text.py wrote")
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--seconds", type=float, required=True, help="how long all of it may take")
    arguments.add_argument("--rows", type=int, default=256, help=f"windows of {LENGTH} tokens in a step")
    arguments.add_argument("--rate", type=float, default=3e-3, help="of AdamW, at its highest")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--eager", action="store_true", help="without torch.compile, which needs a C compiler")
    for name, default in asdict(DecoderConfig()).items():
        arguments.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return arguments.parse_args()


def main():
    begun, options = time.time(), parse_options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    ids, heldout = read_ids(options.data / "train.xz", device), read_ids(options.data / "heldout.xz", device)
    model = Decoder(DecoderConfig(**{name: getattr(options, name) for name in asdict(DecoderConfig())})).to(device)
    count = sum(tensor.numel() for tensor in model.parameters())
    print(f"{count} parameters on {device}, {len(ids)} tokens to train on, {len(heldout)} held out", flush=True)
    step = train(model, ids, heldout, options, begun)
    model.load_state_dict(stored(model))  # What is published is what is measured.
    measured = {"step": step, "tokens": step * options.rows * LENGTH} | validate(model, heldout)
    print(measured, flush=True)
    save(model, options.out, measured)


if __name__ == "__main__":
    main()
