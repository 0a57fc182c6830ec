"""Step 2: pretrains on span corruption, then fine-tunes on the tasks and a share of span corruption. See README.md.

Writes a checkpoint with the weights, their config and the validation figures, which export.py turns into a model directory.
"""

import argparse
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from switch_model import Switch, SwitchConfig
from training_data import TrainingData

BALANCE_WEIGHT, Z_WEIGHT = 0.01, 0.001
PRETRAIN_RATE, FINETUNE_RATE = 0.02, 0.008
WARMUP = 0.04
PRETRAIN_ROWS = 160
FINETUNE_ROWS = {"sst2": 128, "mrpc": 24, "multirc": 32, "span": 64}


def batch_loss(model, batches):
    """Mean cross-entropy of the batches, and the router losses over all of them together. -> loss, cross-entropy"""
    cross_entropy, sums = 0.0, None
    for inputs, targets in batches:
        logits, batch_sums = model(inputs, targets)
        cross_entropy = cross_entropy + F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()) / len(batches)
        sums = batch_sums if sums is None else [add(a, b) for a, b in zip(sums, batch_sums)]
    loss = cross_entropy
    for tokens, probability, squares, count in sums:
        balance = model.config.experts * ((tokens / count).detach() * (probability / count)).sum()
        loss = loss + BALANCE_WEIGHT * balance + Z_WEIGHT * squares / count
    return loss, cross_entropy.detach()


def add(left, right):
    return tuple(a + b for a, b in zip(left, right))


def optimizer_for(model):
    """AdamW whose rate for each tensor follows the size of its initial values, as Adafactor's relative step does."""
    groups = []
    for name, tensor in model.named_parameters():
        size = 0.25 if "norm" in name else min(1.0, max(0.05, float(tensor.detach().pow(2).mean().sqrt())))
        decays = tensor.dim() >= 2 and not any(part in name for part in ("embedding", "relative_bias", "router"))
        groups.append({"params": [tensor], "size": size, "weight_decay": 0.01 if decays else 0.0})
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))


def rate_at(fraction, peak, floor):
    """Linear warm-up, then a cosine from peak to floor * peak."""
    if fraction < WARMUP:
        return peak * fraction / WARMUP
    cosine = 0.5 * (1 + math.cos(math.pi * (fraction - WARMUP) / (1 - WARMUP)))
    return peak * (floor + (1 - floor) * cosine)


def run_phase(name, model, optimizer, make_batches, steps, peak, floor):
    model.train()
    device, begun = model.embedding.device.type, time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at((step + 1) / steps, peak, floor) * group["size"]
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss, cross_entropy = batch_loss(model, make_batches())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(1, steps // 20) == 0:
            print(f"{name} {step + 1}/{steps}: {float(cross_entropy):.3f}, {time.time() - begun:.0f} s", flush=True)


@torch.inference_mode()
def heldout_perplexity(model, data, rows=100):
    batch = data.heldout_batch()
    if batch is None:
        return None
    model.eval()
    total = 0.0
    for inputs, targets in zip(batch[0].split(rows), batch[1].split(rows)):
        logits, _ = model(inputs, targets)
        total += float(F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"))
    return math.exp(total / batch[1].numel())


@torch.inference_mode()
def accuracy(model, data, task, rows=256):
    """Share of validation examples whose right label the decoder finds likelier than the other."""
    model.eval()
    inputs, labels = data.examples[task, "validation"]
    right = 0
    for part, wanted in zip(inputs.split(rows), labels.split(rows)):
        scores = []
        for target in data.label_targets(task):
            target = target.expand(len(part), -1)
            logits, _ = model(part, target)
            score = torch.log_softmax(logits.float(), -1).gather(2, target.clamp(min=0)[..., None])[..., 0]
            scores.append((score * (target != -100)).sum(1))
        right += int((torch.stack(scores, 1).argmax(1) == wanted).sum())
    return right / len(inputs)


@torch.no_grad()
def round_weights(model):
    """Everything but the routers to bf16, in place: what export.py stores is what is measured."""
    for name, tensor in model.named_parameters():
        if not name.endswith("router"):
            tensor.copy_(tensor.bfloat16())


def parse_options():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--data", type=Path, required=True, help="what prepare_data.py wrote")
    arguments.add_argument("--out", type=Path, required=True, help="checkpoint file")
    arguments.add_argument("--pretrain-steps", type=int, required=True)
    arguments.add_argument("--finetune-steps", type=int, required=True)
    arguments.add_argument("--rows", type=float, default=1.0, help="multiplies the rows of every batch")
    arguments.add_argument("--seed", type=int, default=1)
    for name, default in asdict(SwitchConfig()).items():
        if name != "vocabulary":
            arguments.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return arguments.parse_args()


def main():
    options = parse_options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    data = TrainingData(options.data, device)
    shape = {name: getattr(options, name) for name in asdict(SwitchConfig()) if name != "vocabulary"}
    model = Switch(SwitchConfig(vocabulary=data.vocabulary, **shape)).to(device)
    print(f"{sum(tensor.numel() for tensor in model.parameters())} parameters on {device}", flush=True)

    rows = {name: max(2, round(options.rows * count)) for name, count in FINETUNE_ROWS.items()}
    pretrain_rows = max(2, round(options.rows * PRETRAIN_ROWS))
    tasks = list(data.tasks)
    mixture = lambda: [data.task_batch(task, rows[task]) for task in tasks] + [data.span_batch(rows["span"])]
    pretraining = lambda: [data.span_batch(pretrain_rows)]
    run_phase("pretrain", model, optimizer_for(model), pretraining, options.pretrain_steps, PRETRAIN_RATE, 0.1)
    run_phase("finetune", model, optimizer_for(model), mixture, options.finetune_steps, FINETUNE_RATE, 0.0)

    round_weights(model)
    measured = {"heldout_perplexity": heldout_perplexity(model, data)}
    measured |= {f"{task}_accuracy": accuracy(model, data, task) for task in tasks}
    print(measured)
    torch.save({"config": asdict(model.config), "weights": model.state_dict(), "measured": measured}, options.out)


if __name__ == "__main__":
    main()
