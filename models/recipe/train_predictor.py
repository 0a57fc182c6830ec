"""Trains a predictor of a Switch Transformer on a GPU, longer than a processor would: goes on from a file that
`sida train-predictor` wrote, whatever the widths of its nets, and writes one of the same layout.

What a net computes is what crates/predictor computes, and what it learns is what `sida train-predictor` teaches: the router's
choice and its probabilities. `sida train-predictor --calibrate` measures and calibrates the result.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from export import published_names
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from switch_model import SparseFeedForward, Switch, SwitchConfig
from tokenizers import Tokenizer

BATCH_TOKENS = 8192
RATE, WARM_UP, DECAY = 2e-3, 0.03, 0.01
WINDOW = 32  # how far the decoder's net attends to itself
INPUT_TOKENS_MAX = 256


def open_model(directory, device):
    """The network with the weights of a published directory."""
    said = json.loads((directory / "config.json").read_text())
    config = SwitchConfig(said["vocab_size"], said["d_model"], said["d_kv"], said["num_heads"], said["d_ff"],
                          said["num_layers"], said["num_experts"])
    stored = {}
    for file in directory.glob("model*.safetensors"):
        stored |= load_file(file)
    model = Switch(config)
    weights = model.state_dict()
    for name, own, expert in published_names(config):
        if expert is None:
            weights[own].copy_(stored[name])
        else:
            weights[own][expert].copy_(stored[name].t())
    return model.to(device).eval().requires_grad_(False)


def read_lines(path, tokenizer):
    """-> [(ids of the input, ids of the decoder's tokens or None)]"""
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]
    encode = lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    inputs = [ids[: INPUT_TOKENS_MAX - 1] + [1] if len(ids) > INPUT_TOKENS_MAX else ids for ids in encode([line[0] for line in lines])]
    targets = encode([line[1] if len(line) > 1 else "" for line in lines])
    return [(ids, [0] + target[:-1] if len(line) > 1 else None) for line, ids, target in zip(lines, inputs, targets)]


def batches(sequences):
    """Sequences of about one length side by side, in so many tokens."""
    out, widest = [[]], 0
    for index in sorted(range(len(sequences)), key=lambda index: len(sequences[index][0])):
        widest = max(widest, len(sequences[index][0]))
        if (len(out[-1]) + 1) * widest > BATCH_TOKENS:
            out.append([])
        out[-1].append(sequences[index])
    return out


def padded(rows, filler, device):
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows], device=device)


@torch.no_grad()
def routed(model, batch, device):
    """What the routers say of a batch's tokens: of each stack ids, which are real, logits (real, layers, experts); and the states."""
    seen = []
    sparse = [module for module in model.modules() if isinstance(module, SparseFeedForward)]
    hooks = [module.register_forward_pre_hook(lambda module, args: seen.append(F.linear(args[0].float(), module.router))) for module in sparse]
    ids = padded([row for row, _ in batch], 0, device)
    real = padded([[True] * len(row) for row, _ in batch], False, device)
    states, _ = model.encoder(model.embedding[ids], real)
    encoder = (ids, real, torch.stack(seen, 2)[real].half())
    seen.clear()
    decoder = None
    if batch[0][1] is not None:
        decoded = padded([row for _, row in batch], 0, device)
        wanted = padded([[True] * len(row) for _, row in batch], False, device)
        model.decoder(model.embedding[decoded], wanted, states, real)
        decoder = (decoded, wanted, torch.stack(seen, 2)[wanted].half())
    for hook in hooks:
        hook.remove()
    return encoder, decoder, states.half()


class Net(nn.Module):
    """The tensors of a stack in a predictor's file, as they are stored: matrices are [out, in], heads side by side."""

    def __init__(self, stored, stack):
        super().__init__()
        self.stack = stack
        for name, tensor in stored.items():
            if name.startswith(f"{stack}."):
                self.register_parameter(name.replace(".", "/"), nn.Parameter(tensor.float()))

    def part(self, name):
        return self.get_parameter(f"{self.stack}.{name}".replace(".", "/"))

    def has(self, name):
        return f"{self.stack}.{name}".replace(".", "/") in self._parameters

    def stored(self):
        out = {name.replace("/", "."): tensor.detach() for name, tensor in self.named_parameters()}
        out[f"{self.stack}.tokens"] = out[f"{self.stack}.tokens"].relu()
        return {name: tensor.cpu().half().contiguous() for name, tensor in out.items()}

    def tokens(self, ids):
        return F.embedding(ids, self.part("tokens")).relu()

    def heads(self, x, name):
        """x (batch, rows, inputs) -> (batch, heads, rows, width of a head)"""
        return torch.einsum("brw,hkw->bhrk", x, self.part(name))

    def logits(self, x):
        return F.linear(x, self.part("head"), self.part("head_bias"))


def normed(x, weight):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class EncoderNet(Net):
    def forward(self, ids, real, _states, _states_real):
        x, length = F.linear(self.tokens(ids), self.part("input")), ids.shape[1]
        place = torch.arange(length, device=ids.device)
        offset = place[None, :] - place[:, None]
        unseen = torch.zeros_like(real, dtype=x.dtype).masked_fill(~real, -1e9)[:, None, None]
        block = 0
        while self.has(f"block.{block}.query"):
            part = lambda name: self.part(f"block.{block}.{name}")
            read = normed(x, part("attention_norm"))
            query, keys, values = (self.heads(read, f"block.{block}.{name}") for name in ("query", "keys", "values"))
            furthest = part("distances").shape[1] // 2
            bias = part("distances")[:, (offset + furthest).clamp(0, 2 * furthest)][None] + unseen
            found = F.scaled_dot_product_attention(query, keys, values, bias)
            x = x + F.linear(found.transpose(1, 2).flatten(2), part("output"))
            x = x + F.linear(F.linear(normed(x, part("linear_norm")), part("up")).relu(), part("down"))
            block += 1
        return self.logits(normed(x, self.part("norm")))


class DecoderNet(Net):
    def forward(self, ids, _real, states, states_real):
        x = self.tokens(ids)
        outputs, layer = x, 0
        while self.has(f"lstm.{layer}.forward.input"):
            part = lambda name: self.part(f"lstm.{layer}.forward.{name}")
            hidden, bias = part("hidden"), part("bias")
            first = outputs.new_zeros(1, ids.shape[0], hidden.shape[1])
            weights = [part("input"), hidden, bias, torch.zeros_like(bias)]
            outputs = torch.lstm(outputs, (first, first), weights, True, 1, 0.0, self.training, False, True)[0]
            layer += 1
        attended = window_attention(outputs) + F.linear(x, self.part("residual"))
        if self.has("input.query"):
            query = self.heads(outputs + attended, "input.query")
            keys, values = self.heads(states, "input.keys"), self.heads(states, "input.values")
            found = F.scaled_dot_product_attention(query, keys, values, states_real[:, None, None])
            attended = attended + F.linear(found.transpose(1, 2).flatten(2), self.part("input.output"))
        return self.logits(attended)


def window_attention(outputs):
    """Of each step the mean of the last steps, itself among them, weighted by the sparsemax of their scaled products."""
    place = torch.arange(outputs.shape[1], device=outputs.device)
    distance = place[:, None] - place[None, :]
    scores = outputs @ outputs.transpose(1, 2) * outputs.shape[2] ** -0.5
    scores = scores.masked_fill((distance < 0) | (distance >= WINDOW), -1e9)
    ordered = scores.sort(-1, descending=True).values
    surplus = ordered.cumsum(-1) - 1
    count = torch.arange(1, outputs.shape[1] + 1, device=outputs.device)
    support = (ordered * count > surplus).sum(-1, keepdim=True)
    return (scores - surplus.gather(-1, support - 1) / support).clamp(min=0) @ outputs


def sample(net, batch):
    """The net's logits of a batch's real tokens, and the router's: (real, layers, experts)."""
    encoder, decoder, states = batch
    ids, real, wanted = encoder if net.stack == "encoder" else decoder
    return net(ids, real, states.float(), encoder[1])[real].view_as(wanted), wanted.float()


def train(net, data, epochs, name):
    data = [batch for batch in data if net.stack == "encoder" or batch[1] is not None]
    if not data:
        return
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY, betas=(0.9, 0.98))
    steps, step, begun = epochs * len(data), 0, time.time()
    for epoch in range(epochs):
        losses = []
        for index in torch.randperm(len(data)).tolist():
            rise, fall = min(1.0, (step + 1) / (WARM_UP * steps)), 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = RATE * rise * (0.01 + 0.99 * fall)
            logits, wanted = sample(net, data[index])
            log_q = F.log_softmax(logits, -1)
            chosen = log_q.gather(-1, wanted.argmax(-1, keepdim=True)).mean()
            loss = -chosen - (wanted.softmax(-1) * log_q).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
            step += 1
        print(f"{name}: epoch {epoch + 1} of {epochs}, loss {torch.stack(losses).mean():.4f}, {time.time() - begun:.0f} s", flush=True)


@torch.no_grad()
def report(net, data):
    right, tokens = 0.0, 0
    for batch in data:
        if net.stack == "decoder" and batch[1] is None:
            continue
        logits, wanted = sample(net, batch)
        hits = logits.topk(3, -1).indices == wanted.argmax(-1, keepdim=True)
        right += torch.stack([hits[..., 0].sum(0), hits.any(-1).sum(0)])
        tokens += len(wanted)
    if tokens:
        first, three = (100 * right / tokens).tolist()
        print(f"{net.stack}: first {[round(x, 1) for x in first]}, among three {[round(x, 1) for x in three]}, of {tokens} tokens")


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    arguments.add_argument("--model", type=Path, required=True)
    arguments.add_argument("--predictor", type=Path, required=True, help="what it goes on from")
    arguments.add_argument("--file", type=Path, required=True, help="texts, as of predictor_texts.py")
    arguments.add_argument("--held-out", type=Path, required=True)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--encoder-epochs", type=int, default=20)
    arguments.add_argument("--decoder-epochs", type=int, default=20)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = open_model(options.model, device), Tokenizer.from_file(str(options.model / "tokenizer.json"))
    begun, data = time.time(), {}
    for name, path in (("train", options.file), ("held out", options.held_out)):
        lines = read_lines(path, tokenizer)
        with_target = [line for line in lines if line[1] is not None]
        without = [line for line in lines if line[1] is None]
        data[name] = [routed(model, batch, device) for half in (with_target, without) if half for batch in batches(half)]
        print(f"{name}: {len(lines)} lines, {sum(int(batch[0][1].sum()) for batch in data[name])} tokens, {time.time() - begun:.0f} s", flush=True)
    stored = load_file(options.predictor)
    with safe_open(options.predictor, "pt") as file:
        metadata = file.metadata()
    out = dict(stored)
    for kind, stack, epochs in ((EncoderNet, "encoder", options.encoder_epochs), (DecoderNet, "decoder", options.decoder_epochs)):
        net = kind(stored, stack).to(device)
        train(net.train(), data["train"], epochs, stack)
        report(net.eval(), data["held out"])
        out |= net.stored()
        save_file(out, options.out, metadata)


if __name__ == "__main__":
    main()
