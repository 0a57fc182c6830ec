"""The decoder-only network that is trained: the mathematics of transformers' Qwen3MoeForCausalLM.

Written for training speed: every shape is known beforehand, so that torch.compile makes one graph of a step, and the experts of
a layer are stacked tensors with a fixed number of slots each. train_decoder.py trains it, export_decoder.py gives its weights
their Hugging Face names.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

ROTARY_THETA = 10_000.0
NORM_EPSILON = 1e-6


@dataclass
class DecoderConfig:
    vocabulary: int = 8192
    d_model: int = 256
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    d_head: int = 32
    experts: int = 32
    top_k: int = 4
    d_ff: int = 128  # of each expert
    dropout: float = 0.1
    train_capacity_factor: float = 1.5  # inference drops no token


def matrix(*shape, std):
    return nn.Parameter(torch.randn(*shape) * std)


class Move(torch.autograd.Function):
    """out[i] = rows[source[i]], or zeros where there is no such row. `target` is the way back: where each row went, if
    anywhere. With it the gradient is a move as well, and no sum of scattered rows."""

    @staticmethod
    def forward(context, rows, source, target):
        context.save_for_backward(target)
        return taken(rows, source)

    @staticmethod
    def backward(context, gradient):
        (target,) = context.saved_tensors
        return taken(gradient, target), None, None


def taken(rows, index):
    return rows[index.clamp(max=rows.shape[0] - 1)] * (index < rows.shape[0])[:, None]


def rotary(length, d_head, device):
    """-> cosines and sines of every position, (length, d_head), as transformers lays them out: two equal halves."""
    frequency = ROTARY_THETA ** (-torch.arange(0, d_head, 2, device=device).float() / d_head)
    angle = torch.arange(length, device=device).float()[:, None] * frequency
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def turned(x, cosine, sine):
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        inner, kv_inner = config.heads * config.d_head, config.kv_heads * config.d_head
        self.q = matrix(inner, config.d_model, std=0.02)
        self.k = matrix(kv_inner, config.d_model, std=0.02)
        self.v = matrix(kv_inner, config.d_model, std=0.02)
        self.o = matrix(config.d_model, inner, std=0.02 / math.sqrt(2 * config.layers))
        self.q_norm = nn.RMSNorm(config.d_head, eps=NORM_EPSILON)
        self.k_norm = nn.RMSNorm(config.d_head, eps=NORM_EPSILON)

    def forward(self, x, cosine, sine):
        batch, length, _ = x.shape
        heads = lambda weight: F.linear(x, weight).view(batch, length, -1, self.config.d_head)
        v = heads(self.v)
        q = turned(self.q_norm(heads(self.q)).transpose(1, 2), cosine, sine).to(v.dtype)
        k = turned(self.k_norm(heads(self.k)).transpose(1, 2), cosine, sine).to(v.dtype)
        shared = self.config.heads // self.config.kv_heads
        k, v = k.repeat_interleave(shared, 1), v.transpose(1, 2).repeat_interleave(shared, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(mixed.transpose(1, 2).flatten(2), self.o)


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        experts, d_model, d_ff = config.experts, config.d_model, config.d_ff
        self.router = matrix(experts, d_model, std=0.02)
        self.gate_up = matrix(experts, d_model, 2 * d_ff, std=0.02)
        self.down = matrix(experts, d_ff, d_model, std=0.02 / math.sqrt(2 * config.layers))

    def forward(self, x):
        """-> output, and what the router did: {balance loss, squared log-partition, share dropped, choices of each expert}"""
        rows, (experts, top_k) = x.flatten(0, 1), (self.config.experts, self.config.top_k)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(rows.float(), self.router)
            probability = torch.softmax(logits, -1)
            weight, expert = probability.topk(top_k, -1)
            weight = weight / weight.sum(-1, keepdim=True)
        choices = expert.numel()
        sorted_expert, order = torch.sort(expert.flatten(), stable=True)
        first = torch.searchsorted(sorted_expert, torch.arange(experts + 1, device=x.device))
        load = first.diff()
        if self.training:
            capacity = math.ceil(self.config.train_capacity_factor * choices / experts)
        else:
            capacity = int(load.max())
        place = torch.arange(choices, device=x.device) - first[sorted_expert]
        slot = torch.where(place < capacity, sorted_expert * capacity + place, experts * capacity)
        slot_of_choice = torch.empty_like(order).scatter(0, order, slot)
        choice_of_slot = torch.full((experts * capacity + 1,), choices, device=x.device).scatter(0, slot, order)[:-1]

        repeated = rows[:, None, :].expand(-1, top_k, -1).reshape(choices, -1)
        slots = Move.apply(repeated, choice_of_slot, slot_of_choice).view(experts, capacity, -1)
        gate, up = torch.bmm(slots, self.gate_up).chunk(2, -1)
        computed = torch.bmm(F.silu(gate) * up, self.down).flatten(0, 1)
        computed = Move.apply(computed, slot_of_choice, choice_of_slot).view(-1, top_k, x.shape[-1])
        output = (computed * weight[..., None].to(computed.dtype)).sum(1).view_as(x)
        did = {
            "balance": experts * (load.float() / choices * probability.mean(0)).sum(),
            "squares": torch.logsumexp(logits, -1).pow(2).mean(),
            "dropped": (place >= capacity).float().mean(),
            "load": load,
        }
        return output, did


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = nn.RMSNorm(config.d_model, eps=NORM_EPSILON)
        self.attention = Attention(config)
        self.experts_norm = nn.RMSNorm(config.d_model, eps=NORM_EPSILON)
        self.experts = Experts(config)

    def forward(self, x, cosine, sine):
        x = x + F.dropout(self.attention(self.attention_norm(x), cosine, sine), self.dropout, self.training)
        branch, did = self.experts(self.experts_norm(x))
        return x + F.dropout(branch, self.dropout, self.training), did


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = matrix(config.vocabulary, config.d_model, std=0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.d_model, eps=NORM_EPSILON)

    def forward(self, ids):
        """ids (batch, length) -> logits (batch, length, vocabulary), and what each block's router did"""
        cosine, sine = rotary(ids.shape[1], self.config.d_head, ids.device)
        x, did = F.embedding(ids, self.embedding), []
        for block in self.blocks:
            x, of_block = block(x, cosine, sine)
            did.append(of_block)
        return F.linear(self.norm(x), self.embedding), did
