"""Step 3: turns a checkpoint of train.py into a model directory with the names of google/switch-base-*.

Routers are stored in float32, everything else in bfloat16; matrices as [out, in]; tied embeddings once.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from switch_model import RELATIVE_BUCKETS, RELATIVE_DISTANCE_MAX, SwitchConfig


def published_names(config):
    """-> (published name, name in the network, expert or None) of every tensor. Of a stacked one it is that expert's part, transposed."""
    yield "shared.weight", "embedding", None
    for stack in ("encoder", "decoder"):
        yield f"{stack}.final_layer_norm.weight", f"{stack}.norm.weight", None
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield bias, f"{stack}.relative_bias", None
        for index in range(config.layers):
            source, target = f"{stack}.blocks.{index}", f"{stack}.block.{index}.layer"
            sublayers = [("self", "SelfAttention")] + ([("cross", "EncDecAttention")] if stack == "decoder" else [])
            for number, (kind, name) in enumerate(sublayers):
                yield f"{target}.{number}.layer_norm.weight", f"{source}.{kind}_norm.weight", None
                for matrix in "qkvo":
                    yield f"{target}.{number}.{name}.{matrix}.weight", f"{source}.{kind}_attention.{matrix}.weight", None
            target, feed_forward = f"{target}.{len(sublayers)}", f"{source}.feed_forward"
            yield f"{target}.layer_norm.weight", f"{source}.feed_forward_norm.weight", None
            if index % 2 == 0:
                for matrix in ("wi", "wo"):
                    yield f"{target}.mlp.{matrix}.weight", f"{feed_forward}.{matrix}.weight", None
                continue
            yield f"{target}.mlp.router.classifier.weight", f"{feed_forward}.router", None
            for expert in range(config.experts):
                for matrix in ("wi", "wo"):
                    yield f"{target}.mlp.experts.expert_{expert}.{matrix}.weight", f"{feed_forward}.{matrix}", expert


def published_tensors(weights, config):
    """-> {published name: tensor}"""
    stored = lambda name: torch.float32 if ".router." in name else torch.bfloat16
    part = lambda own, expert: weights[own] if expert is None else weights[own][expert].t()
    return {
        name: part(own, expert).detach().cpu().to(stored(name)).contiguous()
        for name, own, expert in published_names(config)
    }


def published_config(config):
    sparse = config.layers // 2
    return {
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "model_type": "switch_transformers",
        "vocab_size": config.vocabulary,
        "d_model": config.d_model,
        "d_kv": config.d_kv,
        "d_ff": config.d_ff,
        "num_layers": config.layers,
        "num_decoder_layers": config.layers,
        "num_heads": config.heads,
        "num_experts": config.experts,
        "num_sparse_encoder_layers": sparse,
        "num_sparse_decoder_layers": sparse,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "expert_capacity": 4096,  # more than any sequence: inference drops no token
        "router_bias": False,
        "router_dtype": "float32",
        "router_jitter_noise": config.router_jitter,
        "relative_attention_num_buckets": RELATIVE_BUCKETS,
        "relative_attention_max_distance": RELATIVE_DISTANCE_MAX,
        "dropout_rate": config.dropout,
        "layer_norm_epsilon": 1e-06,
        "dense_act_fn": "relu",
        "feed_forward_proj": "relu",
        "is_gated_act": False,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "torch_dtype": "float32",  # compute in float32, whatever is stored
    }


def save_shards(tensors, directory, bytes_max):
    """Fills files in name order up to bytes_max each, and writes the index that says which tensor is where."""
    shards, room = [], 0
    for name in sorted(tensors):
        size = tensors[name].numel() * tensors[name].element_size()
        if size > room:
            shards.append({})
            room = bytes_max
        shards[-1][name] = tensors[name]
        room -= size
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= {name: file for name in shard}
        total += sum(tensor.numel() * tensor.element_size() for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--checkpoint", type=Path, required=True)
    arguments.add_argument("--data", type=Path, required=True, help="what prepare_data.py wrote, for the tokenizer")
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--shard-bytes", type=int, default=15_500_000)
    options = arguments.parse_args()
    checkpoint = torch.load(options.checkpoint, map_location="cpu", weights_only=True)
    config = SwitchConfig(**checkpoint["config"])
    options.out.mkdir(parents=True, exist_ok=True)
    save_shards(published_tensors(checkpoint["weights"], config), options.out, options.shard_bytes)
    generation = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    for name, contents in (("config.json", published_config(config)), ("generation_config.json", generation)):
        (options.out / name).write_text(json.dumps(contents, indent=2) + "\n")
    for file in (options.data / "tokenizer").iterdir():
        shutil.copy(file, options.out)
    print(f"{options.out}: {checkpoint['measured']}")


if __name__ == "__main__":
    main()
