"""Switch Transformers by hand in plain torch, as fast as torch's own operations get: what torch_peer.py measures.

Ids are texts x tokens, padded to the batch's longest. An encoding is one function, a generation an encoding and a function for
each token; they only start kernels and never wait for the device, so that they can be captured in CUDA graphs. What is
done for speed, and is not in transformers:

- Experts are two grouped products (`torch._grouped_mm`) over rows that are sorted by expert.
- q, k and v are one product; so are the keys and values of all layers' attention to the input.
- What adds to the hidden states is added by the product itself. Keys and values are kept in place.
- Rows may be packed: those of padding are left out of all but attention, which costs two copies a layer. Where they are
  kept, they go to the expert of the first row, so that no expert is read for them alone.
"""

import functools
import json
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import safe_open

# What this file does not compute is refused rather than computed wrongly.
EXPECTED = {"is_gated_act": False, "router_bias": False, "tie_word_embeddings": True}


class Checkpoint:
    """Tensors of a model folder by name, on the device."""

    def __init__(self, folder, device, dtype):
        self.device, self.dtype, self.files = device, dtype, {}
        for path in sorted(folder.glob("model*.safetensors")):
            file = safe_open(path, "pt", device=str(device))
            self.files |= dict.fromkeys(file.keys(), file)

    def one(self, name, dtype=None):
        return self.files[name].get_tensor(name).to(dtype or self.dtype)

    def stacked(self, names):
        """(names, ...): filled one by one, so that no tensor is there twice."""
        first = self.one(names[0])
        whole = torch.empty(len(names), *first.shape, device=self.device, dtype=self.dtype)
        for place, name in zip(whole, names):
            place.copy_(self.one(name))
        return whole


def route(h, norm, epsilon, router, replaced):
    """x of the rows, and the probability and the id of each one's expert; rows that are `replaced` get the first row's."""
    x = F.rms_norm(h, norm.shape, norm, epsilon)
    probability, expert = (x.float() @ router.t()).softmax(-1).max(-1)
    if replaced is not None:
        expert = torch.where(replaced, expert[:1], expert)
    return x, probability, expert


def grouped(x, weights, ends):
    """Rows times their expert's matrix: x (n, in) sorted by expert, weights (experts, out, in), ends of the experts' rows."""
    if x.is_cuda:
        return torch._grouped_mm(x, weights.transpose(1, 2), offs=ends)
    ends = [0, *ends.tolist()]
    return torch.cat([x[start:end] @ matrix.t() for start, end, matrix in zip(ends, ends[1:], weights)])


def attend(q, k, v, mask):
    """Attention of (texts, queries or keys, heads, d_kv) with an additive mask -> (texts * queries, inner)."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=1.0)
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


class Switch:
    def __init__(self, folder, device, dtype, compiled=False):
        config = json.loads((folder / "config.json").read_text())
        for field, expected in EXPECTED.items():
            if config.get(field, expected) != expected:
                raise SystemExit(f"{folder}: {field} is {config[field]}, expected {expected}")
        self.config, self.device, self.dtype = SimpleNamespace(**config), device, dtype
        self.route = torch.compile(route, dynamic=True) if compiled else route
        self.heads, self.d_kv, self.epsilon = config["num_heads"], config["d_kv"], config["layer_norm_epsilon"]
        self.expert_ids = torch.arange(config["num_experts"], device=device)
        tensors = Checkpoint(folder, device, dtype)
        self.embedding = tensors.one("shared.weight")
        self.encoder = self._stack(tensors, "encoder", config["num_layers"])
        self.decoder = self._stack(tensors, "decoder", config["num_decoder_layers"])
        # A tied head takes states that are scaled down.
        self.decoder.final_norm *= config["d_model"] ** -0.5
        cross = [f"decoder.block.{block}.layer.1.EncDecAttention.{part}.weight" for block in range(config["num_decoder_layers"]) for part in "kv"]
        self.cross = tensors.stacked(cross).flatten(0, 1)  # (layers * 2 * inner, d_model)

    def _stack(self, tensors, stack, layers):
        def attention(place, name, projections):
            return SimpleNamespace(
                norm=tensors.one(f"{place}.layer_norm.weight"),
                projection=torch.cat([tensors.one(f"{place}.{name}.{part}.weight") for part in projections]),
                output=tensors.one(f"{place}.{name}.o.weight"),
            )

        def block(number):
            place, last = f"{stack}.block.{number}.layer", 2 if stack == "decoder" else 1
            made = SimpleNamespace(attention=attention(f"{place}.0", "SelfAttention", "qkv"), router=None)
            if stack == "decoder":
                made.cross = attention(f"{place}.1", "EncDecAttention", "q")
            made.norm = tensors.one(f"{place}.{last}.layer_norm.weight")
            mlp, router = f"{place}.{last}.mlp", f"{place}.{last}.mlp.router.classifier.weight"
            if router in tensors.files:
                made.router = tensors.one(router, torch.float32)
                made.wi, made.wo = (
                    tensors.stacked([f"{mlp}.experts.expert_{expert}.{matrix}.weight" for expert in range(self.config.num_experts)])
                    for matrix in ("wi", "wo")
                )
            else:
                made.wi, made.wo = tensors.one(f"{mlp}.wi.weight"), tensors.one(f"{mlp}.wo.weight")
            return made

        return SimpleNamespace(
            blocks=[block(number) for number in range(layers)],
            final_norm=tensors.one(f"{stack}.final_layer_norm.weight"),
            bias=tensors.one(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        )

    @functools.cache
    def bias(self, stack, length):
        """(1, heads, queries, keys) by how far keys are from queries. Kept, since it depends on the length alone."""
        of, buckets = getattr(self, stack).bias, self.config.relative_attention_num_buckets
        positions = torch.arange(length)
        distance = positions[None, :] - positions[:, None]
        if stack == "encoder":
            buckets //= 2
            first, distance = buckets * (distance > 0), distance.abs()
        else:
            first, distance = torch.zeros_like(distance), -distance.clamp(max=0)
        exact = buckets // 2
        growth = (buckets - exact) / math.log(self.config.relative_attention_max_distance / exact)
        far = exact + (torch.log(distance.clamp(min=1).float() / exact) * growth).long()
        bucket = first + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))
        return F.embedding(bucket.to(self.device), of).permute(2, 0, 1)[None].contiguous()

    @functools.cache
    def row_numbers(self, rows):
        return torch.arange(1, rows + 1, device=self.device)

    def norm(self, h, weight):
        return F.rms_norm(h, weight.shape, weight, self.epsilon)

    def feed_forward(self, h, block, replaced):
        if block.router is None:
            h.addmm_((self.norm(h, block.norm) @ block.wi.t()).relu_(), block.wo.t())
            return
        x, probability, expert = self.route(h, block.norm, self.epsilon, block.router, replaced)
        is_one = len(x) == 1
        if not is_one:
            expert, order = expert.sort()
            x, probability = x[order], probability[order]
        ends = torch.searchsorted(expert, self.expert_ids, right=True, out_int32=True)
        y = grouped(grouped(x, block.wi, ends).relu_(), block.wo, ends).mul_(probability[:, None])
        h.add_(y) if is_one else h.index_add_(0, order, y)

    def encode(self, ids, packed=None):
        """ids (texts, tokens) -> states (texts * tokens, d_model), and which of them are of no padding (texts, tokens).
        `packed` is a number of rows that all but padding fits into."""
        texts, tokens = ids.shape
        is_token = ids != self.config.pad_token_id
        mask = self.bias("encoder", tokens).masked_fill(~is_token[:, None, None, :], -math.inf)
        ids, replaced = ids.flatten(), ~is_token.flatten()
        if packed:
            # The places of the rows, and the row of each place; the rows that are left over are as the last place.
            count, numbers = is_token.flatten().cumsum(0), self.row_numbers(packed)
            places, replaced = torch.searchsorted(count, numbers).clamp(max=len(ids) - 1), numbers > count[-1]
            ids, rows = ids[places], (count - 1).clamp(min=0)
        h = F.embedding(ids, self.embedding)
        for block in self.encoder.blocks:
            qkv = self.norm(h, block.attention.norm) @ block.attention.projection.t()
            qkv = qkv[rows] if packed else qkv
            q, k, v = qkv.view(texts, tokens, 3, self.heads, self.d_kv).unbind(2)
            a = attend(q, k, v, mask)
            h.addmm_(a[places] if packed else a, block.attention.output.t())
            self.feed_forward(h, block, replaced)
        states = self.norm(h, self.encoder.final_norm)
        return states[rows] if packed else states, is_token

    def pooled(self, ids, packed=None):
        """The mean state of each text (texts, d_model)."""
        states, is_token = self.encode(ids, packed)
        weights = is_token.float() / is_token.sum(1, keepdim=True)
        return torch.bmm(weights[:, None], states.float().view(*ids.shape, -1))[:, 0]


class Generation:
    """Greedy decoding of so many tokens of a batch, whatever they are: what is kept between its steps, in place."""

    def __init__(self, model, ids, new_tokens, packed=None):
        self.model, self.ids, self.new_tokens, self.packed = model, ids, new_tokens, packed
        (texts, tokens), layers, shape = ids.shape, len(model.decoder.blocks), (2, model.heads, model.d_kv)
        empty = functools.partial(torch.empty, device=model.device, dtype=model.dtype)
        # The position bias is read in pieces of eight.
        self.positions = -(-new_tokens // 8) * 8
        self.tokens = torch.full((new_tokens + 1, texts), model.config.decoder_start_token_id, device=model.device)
        self.cache = empty(layers, texts, new_tokens, *shape)
        self.cross = empty(texts * tokens, layers * math.prod(shape))
        self.keys = self.cross.view(texts, tokens, layers, *shape)
        self.mask = empty(texts, 1, 1, tokens)

    def parts(self):
        """What is started one after another: the input's pass, then a step for each token."""
        return [self.begin, *(functools.partial(self.step, number) for number in range(self.new_tokens))]

    def begin(self):
        states, is_token = self.model.encode(self.ids, self.packed)
        torch.mm(states, self.model.cross.t(), out=self.cross)
        self.mask.zero_().masked_fill_(~is_token[:, None, None, :], -math.inf)

    def step(self, number):
        torch.argmax(self.logits(number), -1, out=self.tokens[number + 1])

    def logits(self, number):
        """Scores of every token of the vocabulary after the tokens so far (texts, vocabulary)."""
        model, texts = self.model, len(self.ids)
        bias = model.bias("decoder", self.positions)[:, :, number : number + 1, : number + 1]
        cross_mask = self.mask.expand(-1, model.heads, -1, -1)
        h = F.embedding(self.tokens[number], model.embedding)
        for layer, block in enumerate(model.decoder.blocks):
            qkv = model.norm(h, block.attention.norm) @ block.attention.projection.t()
            qkv = qkv.view(texts, 3, model.heads, model.d_kv)
            self.cache[layer, :, number] = qkv[:, 1:]
            k, v = self.cache[layer, :, : number + 1].unbind(2)
            h.addmm_(attend(qkv[:, :1], k, v, bias), block.attention.output.t())
            q = (model.norm(h, block.cross.norm) @ block.cross.projection.t()).view(texts, 1, model.heads, model.d_kv)
            k, v = self.keys[:, :, layer].unbind(2)
            h.addmm_(attend(q, k, v, cross_mask), block.cross.output.t())
            model.feed_forward(h, block, None)
        return model.norm(h, model.decoder.final_norm) @ model.embedding.t()
