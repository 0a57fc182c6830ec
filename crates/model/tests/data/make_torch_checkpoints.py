"""Writes the PyTorch checkpoints that the tests of convert.rs read. Needs torch; run it here when the fixtures
must change: `python make_torch_checkpoints.py`. Value i of the n-th tensor (by name) is (7 i + n) mod 64 - 32,
exact in every dtype, so the test knows all values without reading another file."""

import json
import os

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
CONFIG = {
    "architectures": ["SwitchTransformersForConditionalGeneration"],
    "model_type": "switch_transformers",
    "vocab_size": 40, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2, "num_experts": 2, "expert_capacity": 4,
    "num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
    "encoder_sparse_step": 2, "decoder_sparse_step": 2, "router_bias": False, "router_dtype": "float32",
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu", "is_encoder_decoder": True, "tie_word_embeddings": True,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}


def shapes():
    d, ff, inner = CONFIG["d_model"], CONFIG["d_ff"], CONFIG["num_heads"] * CONFIG["d_kv"]
    out = {"shared.weight": (CONFIG["vocab_size"], d)}
    for stack in ("encoder", "decoder"):
        out[f"{stack}.final_layer_norm.weight"] = (d,)
        for block in range(2):
            attentions = ["SelfAttention"] + (["EncDecAttention"] if stack == "decoder" else [])
            for layer, attention in enumerate(attentions):
                prefix = f"{stack}.block.{block}.layer.{layer}"
                out[f"{prefix}.layer_norm.weight"] = (d,)
                for name in "qkv":
                    out[f"{prefix}.{attention}.{name}.weight"] = (inner, d)
                out[f"{prefix}.{attention}.o.weight"] = (d, inner)
            prefix = f"{stack}.block.{block}.layer.{len(attentions)}"
            out[f"{prefix}.layer_norm.weight"] = (d,)
            experts = [f"experts.expert_{e}." for e in range(2)] if block == 1 else [""]
            for expert in experts:
                out[f"{prefix}.mlp.{expert}wi.weight"] = (ff, d)
                out[f"{prefix}.mlp.{expert}wo.weight"] = (d, ff)
            if block == 1:
                out[f"{prefix}.mlp.router.classifier.weight"] = (2, d)
        out[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (8, CONFIG["num_heads"])
    return out


def state_dict():
    tensors = {}
    for n, (name, shape) in enumerate(sorted(shapes().items())):
        count = torch.Size(shape).numel()
        values = ((7 * torch.arange(count) + n) % 64 - 32).float().reshape(shape)
        dtype = torch.float32 if "router" in name else torch.float16 if "layer_norm" in name else torch.bfloat16
        tensors[name] = values.to(dtype)
    # What real checkpoints do, too: a parameter, a transposed view, and copies that share their storage.
    tensors["encoder.final_layer_norm.weight"] = torch.nn.Parameter(tensors["encoder.final_layer_norm.weight"])
    wi = "encoder.block.0.layer.1.mlp.wi.weight"
    tensors[wi] = tensors[wi].t().contiguous().t()
    for tied in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        tensors[tied] = tensors["shared.weight"]
    return tensors


def directory(name):
    path = os.path.join(HERE, name)
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "config.json"), "w") as file:
        json.dump(CONFIG, file, indent=1)
    return path


def main():
    tensors = state_dict()
    torch.save(tensors, os.path.join(directory("torch-single"), "pytorch_model.bin"))
    sharded = directory("torch-sharded")
    names, weight_map = sorted(tensors), {}
    half = len(names) // 2
    for number, part in enumerate((names[:half], names[half:])):
        shard = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, os.path.join(sharded, shard))
        weight_map.update({name: shard for name in part})
    with open(os.path.join(sharded, "pytorch_model.bin.index.json"), "w") as file:
        json.dump({"metadata": {"total_size": 0}, "weight_map": weight_map}, file, indent=1)


main()
