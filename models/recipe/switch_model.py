"""The network that is trained: the mathematics of transformers' SwitchTransformersForConditionalGeneration.

Written for training speed: the experts of a layer are two stacked tensors and one batched product computes them all.
train.py trains it, export.py gives its weights their Hugging Face names.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

RELATIVE_BUCKETS, RELATIVE_DISTANCE_MAX = 32, 128
MASKED = -1e9


@dataclass
class SwitchConfig:
    vocabulary: int = 8192
    d_model: int = 128
    d_kv: int = 32
    heads: int = 4
    d_ff: int = 512
    layers: int = 6  # of each stack; blocks 1, 3, 5, ... are sparse
    experts: int = 8
    dropout: float = 0.1
    router_jitter: float = 0.01
    train_capacity_factor: float = 2.0  # inference drops no token


class Norm(nn.Module):
    """T5's RMS norm: no mean, no bias."""

    def __init__(self, d_model):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6))


def relative_buckets(length, bidirectional, device):
    """-> (length, length) bucket of every query and key position, as T5 places them."""
    position = torch.arange(length, device=device)
    offset = position[None, :] - position[:, None]  # key - query
    buckets, first = RELATIVE_BUCKETS, torch.zeros_like(offset)
    if bidirectional:
        buckets //= 2
        first = (offset > 0) * buckets
        offset = offset.abs()
    else:
        offset = (-offset).clamp(min=0)
    near = buckets // 2
    growth = torch.log(offset.clamp(min=1).float() / near) / math.log(RELATIVE_DISTANCE_MAX / near)
    far = (near + growth * (buckets - near)).long().clamp(max=buckets - 1)
    return first + torch.where(offset < near, offset, far)


class Attention(nn.Module):
    """Multi-head attention whose scores are not scaled (T5 puts the scale into the initial weights)."""

    def __init__(self, config):
        super().__init__()
        inner = config.heads * config.d_kv
        self.heads, self.d_kv, self.dropout = config.heads, config.d_kv, config.dropout
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)
        nn.init.normal_(self.q.weight, std=(config.d_model * config.d_kv) ** -0.5)
        nn.init.normal_(self.k.weight, std=config.d_model**-0.5)
        nn.init.normal_(self.v.weight, std=config.d_model**-0.5)
        nn.init.normal_(self.o.weight, std=inner**-0.5)

    def forward(self, x, memory, bias):
        split = lambda y: y.unflatten(-1, (self.heads, self.d_kv)).transpose(1, 2)  # (batch, heads, tokens, d_kv)
        q, k, v = split(self.q(x)), split(self.k(memory)), split(self.v(memory))
        weights = F.dropout(torch.softmax(q @ k.transpose(2, 3) + bias, dim=-1), self.dropout, self.training)
        return self.o((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))


class DenseFeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = config.dropout
        nn.init.normal_(self.wi.weight, std=config.d_model**-0.5)
        nn.init.normal_(self.wo.weight, std=config.d_ff**-0.5)

    def forward(self, x, _is_real):
        return self.wo(F.dropout(F.relu(self.wi(x)), self.dropout, self.training)), None


class SparseFeedForward(nn.Module):
    """Top-1 experts. wi (experts, d_model, d_ff) and wo (experts, d_ff, d_model): transposes of what nn.Linear holds."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        experts, d_model, d_ff = config.experts, config.d_model, config.d_ff
        self.router = nn.Parameter(torch.randn(experts, d_model) * (0.1 / d_model) ** 0.5)
        self.wi = nn.Parameter(torch.randn(experts, d_model, d_ff) * d_model**-0.5)
        self.wo = nn.Parameter(torch.randn(experts, d_ff, d_model) * d_ff**-0.5)

    def forward(self, x, is_real):
        """x (batch, tokens, d_model), is_real (batch, tokens) -> output like x, sums for the router's losses."""
        rows, real = x.flatten(0, 1), is_real.flatten()
        with torch.autocast(x.device.type, enabled=False):  # routing is decided in float32
            seen = rows.float()
            if self.training:
                jitter = self.config.router_jitter
                seen = seen * torch.empty_like(seen).uniform_(1 - jitter, 1 + jitter)
            logits = F.linear(seen, self.router)
            probabilities = torch.softmax(logits, -1)
        alpha, expert = probabilities.max(-1)
        output = self.experts(rows, expert, real) * alpha[:, None]
        return output.view_as(x), self.router_sums(logits, probabilities, expert, real)

    def experts(self, rows, expert, real):
        """Each row through its expert; padding, and in training what exceeds the capacity, comes out as zero."""
        count, experts = rows.shape[0], self.config.experts
        expert = torch.where(real, expert, experts)  # padding goes past the last expert
        sorted_expert, order = torch.sort(expert, stable=True)
        first = torch.searchsorted(sorted_expert, torch.arange(experts + 1, device=rows.device))
        place = torch.arange(count, device=rows.device) - first[sorted_expert]
        if self.training:
            capacity = math.ceil(self.config.train_capacity_factor * count / experts)
        else:
            capacity = max(1, int(first.diff().max()))
        kept = (sorted_expert < experts) & (place < capacity)
        slot = torch.where(kept, sorted_expert * capacity + place, experts * capacity)
        slots = rows.new_zeros(experts * capacity + 1, rows.shape[1]).index_copy(0, slot, rows[order])
        hidden = F.relu(torch.bmm(slots[:-1].view(experts, capacity, -1), self.wi))
        hidden = F.dropout(hidden, self.config.dropout, self.training)
        computed = torch.bmm(hidden, self.wo).flatten(0, 1)
        computed = torch.cat([computed, computed.new_zeros(1, computed.shape[1])])
        return computed[torch.empty_like(order).scatter_(0, order, slot)]

    def router_sums(self, logits, probabilities, expert, real):
        """-> tokens per expert (E,), probability per expert (E,), squared log-partition, tokens: over real tokens."""
        real = real.float()[:, None]
        tokens = (F.one_hot(expert, self.config.experts) * real).sum(0)
        squares = (torch.logsumexp(logits, -1).pow(2) * real[:, 0]).sum()
        return tokens, (probabilities * real).sum(0), squares, real.sum()


class Block(nn.Module):
    def __init__(self, config, is_decoder, is_sparse):
        super().__init__()
        self.dropout, self.is_decoder, self.is_sparse = config.dropout, is_decoder, is_sparse
        self.self_norm, self.self_attention = Norm(config.d_model), Attention(config)
        if is_decoder:
            self.cross_norm, self.cross_attention = Norm(config.d_model), Attention(config)
        self.feed_forward_norm = Norm(config.d_model)
        self.feed_forward = SparseFeedForward(config) if is_sparse else DenseFeedForward(config)

    def forward(self, x, bias, is_real, memory=None, memory_bias=None):
        add = lambda branch: x + F.dropout(branch, self.dropout, self.training)
        normed = self.self_norm(x)
        x = add(self.self_attention(normed, normed, bias))
        if self.is_decoder:
            x = add(self.cross_attention(self.cross_norm(x), memory, memory_bias))
        branch, sums = self.feed_forward(self.feed_forward_norm(x), is_real)
        return add(branch), sums


class Stack(nn.Module):
    def __init__(self, config, is_decoder):
        super().__init__()
        self.is_decoder, self.dropout = is_decoder, config.dropout
        self.blocks = nn.ModuleList(Block(config, is_decoder, index % 2 == 1) for index in range(config.layers))
        self.relative_bias = nn.Parameter(torch.randn(RELATIVE_BUCKETS, config.heads) * config.d_model**-0.5)
        self.norm = Norm(config.d_model)

    def forward(self, x, is_real, memory=None, memory_is_real=None):
        """x (batch, tokens, d_model) -> final-normed states, and one tuple of router sums for each sparse block."""
        length = x.shape[1]
        buckets = relative_buckets(length, not self.is_decoder, x.device)
        bias = self.relative_bias[buckets].permute(2, 0, 1)[None]  # (1, heads, queries, keys), for all blocks
        if self.is_decoder:
            later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            bias = bias.masked_fill(later, MASKED)
        else:
            bias = bias.masked_fill(~is_real[:, None, None, :], MASKED)
        memory_bias = None if memory is None else MASKED * (~memory_is_real)[:, None, None, :].float()
        x, sums = F.dropout(x, self.dropout, self.training), []
        for block in self.blocks:
            x, block_sums = block(x, bias, is_real, memory, memory_bias)
            sums += [block_sums] if block.is_sparse else []
        return F.dropout(self.norm(x), self.dropout, self.training), sums


class Switch(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.randn(config.vocabulary, config.d_model))
        self.encoder, self.decoder = Stack(config, False), Stack(config, True)

    def forward(self, inputs, targets):
        """inputs (batch, tokens) padded with 0, targets padded with -100 -> logits (batch, targets, vocabulary), router sums."""
        is_real, wanted = inputs != 0, targets != -100
        memory, encoder_sums = self.encoder(self.embedding[inputs], is_real)
        shifted = F.pad(targets.clamp(min=0), (1, -1))  # starts with <pad>, id 0
        states, decoder_sums = self.decoder(self.embedding[shifted], wanted, memory, is_real)
        # The head is the embedding, scaled as T5 scales a tied one.
        return F.linear(states * self.config.d_model**-0.5, self.embedding), encoder_sums + decoder_sums
