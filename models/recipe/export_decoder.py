"""Step 3 for decoder-only models: turns a checkpoint of train_decoder.py into a model directory of the Qwen3-MoE family.

Routers are stored in float32, everything else in bfloat16; matrices as [out, in]; the tied embedding once.
"""

import argparse
import json
import shutil
from pathlib import Path

from decoder_model import NORM_EPSILON, ROTARY_THETA, DecoderConfig
from export import save_shards
from prepare_text import END_ID
from safetensors import safe_open
from train_decoder import LENGTH


def published_tensors(weights, config):
    """-> {published name: tensor}"""
    out = {"model.embed_tokens.weight": weights["embedding"], "model.norm.weight": weights["norm.weight"]}
    for index in range(config.layers):
        source, target = f"blocks.{index}", f"model.layers.{index}"
        out[f"{target}.input_layernorm.weight"] = weights[f"{source}.attention_norm.weight"]
        out[f"{target}.post_attention_layernorm.weight"] = weights[f"{source}.experts_norm.weight"]
        for matrix in "qkvo":
            out[f"{target}.self_attn.{matrix}_proj.weight"] = weights[f"{source}.attention.{matrix}"]
        for norm in ("q_norm", "k_norm"):
            out[f"{target}.self_attn.{norm}.weight"] = weights[f"{source}.attention.{norm}.weight"]
        out[f"{target}.mlp.gate.weight"] = weights[f"{source}.experts.router"]
        gates, ups = weights[f"{source}.experts.gate_up"].chunk(2, -1)
        matrices = {"gate_proj": gates, "up_proj": ups, "down_proj": weights[f"{source}.experts.down"]}
        for expert in range(config.experts):
            for name, stacked in matrices.items():
                out[f"{target}.mlp.experts.{expert}.{name}.weight"] = stacked[expert].t()
    return {name: tensor.contiguous() for name, tensor in out.items()}


def published_config(config):
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": config.vocabulary,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.d_head,
        "num_experts": config.experts,
        "num_experts_per_tok": config.top_k,
        "norm_topk_prob": True,
        "moe_intermediate_size": config.d_ff,
        "intermediate_size": config.d_ff,  # of blocks without experts, of which there are none
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": NORM_EPSILON,
        "rope_theta": ROTARY_THETA,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": True,
        "eos_token_id": END_ID,
        "pad_token_id": END_ID,
        "torch_dtype": "float32",  # compute in float32, whatever is stored
    }


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--checkpoint", type=Path, required=True)
    arguments.add_argument("--data", type=Path, required=True, help="what prepare_text.py wrote, for the tokenizer")
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--shard-bytes", type=int, default=15_500_000)
    options = arguments.parse_args()
    with safe_open(options.checkpoint, "pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}
    config = DecoderConfig(**json.loads(metadata["config"]))
    options.out.mkdir(parents=True, exist_ok=True)
    save_shards(published_tensors(weights, config), options.out, options.shard_bytes)
    # The likeliest token each time is what a model of this size repeats itself by; so tokens are drawn unless a request says otherwise.
    generation = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "eos_token_id": END_ID, "pad_token_id": END_ID}
    for name, contents in (("config.json", published_config(config)), ("generation_config.json", generation)):
        (options.out / name).write_text(json.dumps(contents, indent=2) + "\n")
    for file in (options.data / "tokenizer").iterdir():
        shutil.copy(file, options.out)
    print(f"{options.out}: {metadata['measured']}")


if __name__ == "__main__":
    main()
