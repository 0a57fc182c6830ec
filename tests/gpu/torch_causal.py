"""The strong peer of our GPU figures for decoder-only models: a pass by hand in plain torch, whose steps are a CUDA graph, with
grouped products for the experts, on the weights that ours is measured on.

    python tests/gpu/torch_causal.py --model DIR --serve
    python tests/gpu/torch_causal.py --model DIR --check

Loads a checkpoint of Qwen3-MoE or OLMoE as `sida synth` writes it, prints what it is, and answers each line of standard input:
`measure step BATCH TOKENS` by the median milliseconds of a step of so many sequences of so many tokens, `measure prompt BATCH
TOKENS` by those of their prompts. `--check` compares the logits of a prompt, at once and step by step, with those of transformers
for the same files. `--compile` has torch.compile make fewer kernels of a block.

Needs torch 2.9 or later and safetensors, a GPU of compute capability 9, and for `--check` transformers.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from safetensors import safe_open

ROOM = 64  # Caches are a multiple of so many tokens long.


def norm(x, weight, epsilon):
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype) * weight


def turned(x, cosines, sines):
    low, high = x.chunk(2, -1)
    return x * cosines + torch.cat([-high, low], -1) * sines


def experts(x, gate_up, down, weights, chosen):
    """The weighted sum of each row's experts, by two grouped products over rows in the order of their experts."""
    top_k = chosen.shape[1]
    order = chosen.flatten().argsort()
    counts = torch.zeros(len(down), dtype=torch.int32, device=x.device)
    ends = counts.scatter_add_(0, chosen.flatten(), torch.ones_like(order, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
    gate, up = torch._grouped_mm(x[order // top_k], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    results = torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    each = torch.empty_like(results).index_copy_(0, order, results).view(-1, top_k, x.shape[1])
    return (each * weights[..., None].to(x.dtype)).sum(1)


def block(x, layer, keys, values, turns, position, mask, config):
    """One block over x (sequences, tokens, d): `position` is where in their caches the tokens go."""
    batch, tokens, _ = x.shape
    heads, kv_heads, width, epsilon = config["heads"], config["kv_heads"], config["width"], config["epsilon"]
    y = norm(x, layer["norm"], epsilon)
    q, k, v = (y @ layer["qkv"].T).split([heads * width, kv_heads * width, kv_heads * width], -1)
    if config["norms_rows"]:
        q, k = norm(q, layer["q_norm"], epsilon), norm(k, layer["k_norm"], epsilon)
    q, k, v = (part.view(batch, tokens, -1, width) for part in (q, k, v))
    if not config["norms_rows"]:
        q, k = norm(q, layer["q_norm"], epsilon), norm(k, layer["k_norm"], epsilon)
    q, k = turned(q, *turns), turned(k, *turns)
    keys.index_copy_(1, position, k)
    values.index_copy_(1, position, v)
    attended = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask, enable_gqa=heads != kv_heads)
    x = x + attended.transpose(1, 2).reshape(batch, tokens, -1) @ layer["output"].T
    y = norm(x, layer["experts_norm"], epsilon)
    rows = y.view(batch * tokens, -1)
    weights, chosen = F.softmax(rows @ layer["router"].T, -1, dtype=torch.float32).topk(config["top_k"], -1)
    if config["normalised"]:
        weights = weights / weights.sum(-1, keepdim=True)
    return x + experts(rows, layer["gate_up"], layer["down"], weights, chosen).view_as(x)


class Model:
    def __init__(self, directory, device, compiled):
        self.device = device
        config = json.loads((directory / "config.json").read_text())
        heads = config["num_attention_heads"]
        self.config = {
            "heads": heads, "kv_heads": config["num_key_value_heads"], "epsilon": config["rms_norm_eps"],
            "width": config.get("head_dim") or config["hidden_size"] // heads, "top_k": config["num_experts_per_tok"],
            "normalised": config["norm_topk_prob"], "norms_rows": config["model_type"] == "olmoe",
        }
        tensors = {}
        for file in sorted(directory.glob("*.safetensors")):
            with safe_open(file, "pt", device=device) as opened:
                # What is joined below is not kept twice.
                for name in opened.keys():
                    tensors[name] = opened.get_tensor(name)
        take = lambda name: tensors.pop(name)
        self.embedding, self.last_norm, self.head = take("model.embed_tokens.weight"), take("model.norm.weight"), take("lm_head.weight")
        self.layers = []
        for number in range(config["num_hidden_layers"]):
            of = lambda name, number=number: take(f"model.layers.{number}.{name}.weight")
            layer = {"norm": of("input_layernorm"), "q_norm": of("self_attn.q_norm"), "k_norm": of("self_attn.k_norm")}
            layer |= {"qkv": torch.cat([of(f"self_attn.{part}_proj") for part in "qkv"]), "output": of("self_attn.o_proj")}
            layer |= {"experts_norm": of("post_attention_layernorm"), "router": of("mlp.gate")}
            expert = lambda part: [of(f"mlp.experts.{expert}.{part}_proj") for expert in range(config["num_experts"])]
            layer["gate_up"] = torch.stack([torch.cat(pair) for pair in zip(expert("gate"), expert("up"))])
            layer["down"] = torch.stack(expert("down"))
            self.layers.append(layer)
        frequencies = config["rope_theta"] ** (-torch.arange(0, self.config["width"], 2, device=device).double() / self.config["width"])
        self.frequencies = frequencies.float()
        self.block = torch.compile(block) if compiled else block

    def caches(self, batch, tokens):
        shape = (len(self.layers), 2, batch, tokens, self.config["kv_heads"], self.config["width"])
        return torch.zeros(shape, device=self.device, dtype=torch.bfloat16)

    def run(self, ids, caches, position, room):
        """The states after tokens (sequences, tokens) at these positions, of caches with so much room."""
        angles = (position[:, None].float() * self.frequencies).repeat(1, 2)[None, :, None]
        turns = angles.cos().bfloat16(), angles.sin().bfloat16()
        mask = torch.arange(room, device=self.device) <= position[:, None]
        x = F.embedding(ids, self.embedding)
        for layer, (keys, values) in zip(self.layers, caches):
            x = self.block(x, layer, keys[:, :room], values[:, :room], turns, position, mask, self.config)
        return x

    def logits(self, x):
        return norm(x, self.last_norm, self.config["epsilon"]) @ self.head.T


def captured(function):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


class Peer:
    def __init__(self, options):
        self.model, self.seconds = Model(options.model, options.device, options.compile), options.seconds
        self.shapes = {}

    def shape(self, method, batch, tokens):
        """What computes one such batch, from ids on the host to tokens on the host."""
        model, device = self.model, self.model.device
        room = -(-(tokens + 1) // ROOM) * ROOM
        count = 1 if method == "step" else tokens
        caches = model.caches(batch, room)
        ids = torch.randint(2, len(model.embedding), (batch, count), device=device)
        host = torch.randint(2, len(model.embedding), (batch, count)).pin_memory()
        position = torch.arange(count, device=device) + (tokens if method == "step" else 0)
        out = torch.empty(batch, dtype=torch.int64, device=device)
        run = lambda: out.copy_(model.logits(model.run(ids, caches, position, room)[:, -1]).argmax(-1))
        graph = captured(run)

        def once():
            ids.copy_(host, non_blocking=True)
            graph.replay()
            return out.cpu()

        return once

    @torch.inference_mode()
    def measure(self, method, batch, tokens):
        key = (method, batch, tokens)
        if key not in self.shapes:
            self.shapes[key] = self.shape(*key)
        once, times, begun = self.shapes[key], [], time.perf_counter()
        once()
        while len(times) < 5 or time.perf_counter() - begun < self.seconds:
            started = time.perf_counter()
            once()
            times.append(1e3 * (time.perf_counter() - started))
        return statistics.median(times)


@torch.inference_mode()
def check(model, directory):
    from transformers import AutoModelForCausalLM

    ids = torch.randint(2, len(model.embedding), (2, 40), device=model.device)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to(model.device)(ids).logits.float()
    caches = model.caches(2, ROOM)
    at_once = model.logits(model.run(ids, caches, torch.arange(40, device=model.device), ROOM)).float()
    steps = [model.run(ids[:, at : at + 1], caches, torch.tensor([at], device=model.device), ROOM) for at in range(40)]
    stepped = model.logits(torch.cat(steps, 1)).float()
    for name, found in (("at once", at_once), ("step by step", stepped)):
        # In bf16 a near-tie of a router goes the other way now and then.
        off = ((found - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median().item()
        print(f"{name}: the median token's logits are off by {off:.2g}")
        if off > 0.05:
            raise SystemExit("this is not what transformers computes")


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=pathlib.Path, required=True)
    arguments.add_argument("--device", default="cuda:0")
    arguments.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    arguments.add_argument("--compile", action="store_true")
    arguments.add_argument("--serve", action="store_true")
    arguments.add_argument("--check", action="store_true")
    options = arguments.parse_args()
    peer = Peer(options)
    if options.check:
        check(peer.model, options.model)
    if options.serve:
        print(json.dumps({"torch": torch.__version__, "device": torch.cuda.get_device_name(), "compile": options.compile}), flush=True)
        for request in sys.stdin:
            match request.split():
                case ["measure", "step" | "prompt" as method, batch, tokens]:
                    print(json.dumps({"ms": peer.measure(method, int(batch), int(tokens))}), flush=True)
                case _:
                    raise SystemExit(f"asked {request!r}, expected measure step|prompt BATCH TOKENS")


if __name__ == "__main__":
    main()
