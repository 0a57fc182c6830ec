"""Writes tests/data/parity/causal-*: small decoder-only models of every family with seeded random weights, and their
golden.json.

    pip install torch==2.15.0 transformers==5.17.0
    python tests/parity/make_causal_configs.py --out tests/data/parity

Together they vary every field of the configs that changes the mathematics, both layouts (a tensor for each matrix of an expert,
and all experts of a layer in one), and the dtypes of files. golden.json holds, for some prompts, the logits after every token, the
last hidden states, the experts that each layer chose, and greedy tokens. A weight seed is tried after another until no
choice comes near a tie.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import save_file

ROUTER_GAP_MIN = 4e-4
GREEDY_GAP_MIN = 4e-3
NEW_TOKENS = 12

YARN = dict(rope_type="yarn", rope_theta=5000.0, factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=8000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
COMMON = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, bos_token_id=1, eos_token_id=96, pad_token_id=0)

# layout: "experts" has a tensor for each matrix of an expert, as published; "stacked" one for all of a layer.
# edit: what is changed in config.json afterwards, None to remove a key.
CONFIGS = {
    "causal-qwen3": dict(
        family="Qwen3Moe", layout="experts", dtype="f32",
        config=dict(
            COMMON, num_attention_heads=4, num_key_value_heads=2, head_dim=10, intermediate_size=40,
            moe_intermediate_size=12, num_experts=6, num_experts_per_tok=3, norm_topk_prob=True,
            tie_word_embeddings=True, rms_norm_eps=1e-5, rope_parameters=dict(rope_type="default", rope_theta=300.0),
        ),
        edit=dict(rope_parameters=None, rope_theta=300.0, rope_scaling=None),
    ),
    "causal-qwen3-dense-yarn": dict(
        family="Qwen3Moe", layout="stacked", dtype="bf16",
        config=dict(
            COMMON, num_attention_heads=4, num_key_value_heads=4, head_dim=8, intermediate_size=24,
            moe_intermediate_size=16, num_experts=5, num_experts_per_tok=2, norm_topk_prob=False, attention_bias=True,
            decoder_sparse_step=2, rope_parameters=YARN, num_hidden_layers=4, mlp_only_layers=[3],
        ),
    ),
    "causal-qwen3-window": dict(
        family="Qwen3Moe", layout="experts", dtype="bf16",
        config=dict(
            COMMON, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=24,
            moe_intermediate_size=9, num_experts=4, num_experts_per_tok=4, norm_topk_prob=True, use_sliding_window=True,
            sliding_window=5, rope_parameters=dict(rope_type="linear", rope_theta=1000.0, factor=2.5),
        ),
    ),
    "causal-qwen2": dict(
        family="Qwen2Moe", layout="experts", dtype="f32",
        config=dict(
            COMMON, num_attention_heads=4, num_key_value_heads=2, intermediate_size=20, moe_intermediate_size=12,
            shared_expert_intermediate_size=28, num_experts=6, num_experts_per_tok=2, norm_topk_prob=False,
            mlp_only_layers=[0], rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
    ),
    "causal-qwen2-window": dict(
        family="Qwen2Moe", layout="stacked", dtype="f32",
        config=dict(
            COMMON, num_attention_heads=4, num_key_value_heads=4, intermediate_size=20, moe_intermediate_size=8,
            shared_expert_intermediate_size=16, num_experts=5, num_experts_per_tok=3, norm_topk_prob=True, qkv_bias=False,
            use_sliding_window=True, sliding_window=4, max_window_layers=2, rope_parameters=LLAMA3,
        ),
    ),
    "causal-olmoe": dict(
        family="Olmoe", layout="experts", dtype="f32",
        config=dict(
            COMMON, num_attention_heads=4, num_key_value_heads=2, intermediate_size=12, num_experts=7,
            num_experts_per_tok=3, norm_topk_prob=False, clip_qkv=0.4, attention_bias=True,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
    ),
    "causal-olmoe-plain": dict(
        family="Olmoe", layout="stacked", dtype="bf16",
        config=dict(
            COMMON, num_attention_heads=4, intermediate_size=10, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
            tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=500.0),
        ),
    ),
    "causal-mixtral": dict(
        family="Mixtral", layout="experts", dtype="f32",
        config=dict(
            COMMON, num_attention_heads=4, num_key_value_heads=2, intermediate_size=16, num_local_experts=4,
            num_experts_per_tok=2, rope_parameters=dict(rope_type="default", rope_theta=1e6),
        ),
    ),
    "causal-mixtral-window": dict(
        family="Mixtral", layout="experts", dtype="bf16",
        config=dict(
            COMMON, num_attention_heads=2, num_key_value_heads=2, head_dim=12, intermediate_size=16, num_local_experts=3,
            num_experts_per_tok=1, sliding_window=6, rope_parameters=dict(rope_type="default", rope_theta=1e4),
        ),
    ),
}
# One with a tokenizer, for texts: bytes and a few merges.
CONFIGS["causal-text"] = dict(
    family="Qwen3Moe", layout="experts", dtype="bf16", has_tokenizer=True,
    config=dict(
        COMMON | dict(vocab_size=320, eos_token_id=0, bos_token_id=None, pad_token_id=0), num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=24, moe_intermediate_size=12, num_experts=8,
        num_experts_per_tok=2, norm_topk_prob=True, rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    ),
)
LENGTHS = [1, 7, 23]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def model_of(plan, seed):
    torch.manual_seed(seed)
    family = plan["family"]
    config = getattr(transformers, f"{family}Config")(**plan["config"])
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than they are initialised, so that every part of the model matters.
            scale = 0.3 if parameter.dim() > 1 else 0.5
            value = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_((value + (1.0 if "norm" in name else 0.0)).to(DTYPES[plan["dtype"]]).float())
    model.tie_weights()
    return model


def tensors_of(model, plan):
    """The model's tensors under the names that a file of this layout has."""
    is_mixtral = plan["family"] == "Mixtral"
    gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if is_mixtral:
            name = name.replace(".mlp.", ".block_sparse_moe.")
        module, _, matrix = name.rpartition(".")
        if plan["layout"] == "experts" and matrix in ("gate_up_proj", "down_proj"):
            for expert, weights in enumerate(tensor):
                parts = {gate: weights.chunk(2)[0], up: weights.chunk(2)[1]} if matrix == "gate_up_proj" else {down: weights}
                tensors |= {f"{module}.{expert}.{part}.weight": value for part, value in parts.items()}
        else:
            tensors[name] = tensor
    return {name: tensor.to(DTYPES[plan["dtype"]]).contiguous().clone() for name, tensor in tensors.items()}


def tokenizer(vocab_size):
    """Byte-level, as those of the families are."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>", "<|im_start|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["the expert of the token is the one that the router of the layer chose"] * 4, trainer)
    return made


@torch.no_grad()
def golden(model, plan, seed):
    """What the model computes for some prompts, and the smallest gaps between a choice and the next."""
    top_k, cases = plan["config"]["num_experts_per_tok"], []
    router_gap, greedy_gap = 1.0, 1e9
    numbers = random.Random(seed)
    for length in LENGTHS:
        ids = [numbers.randrange(2, plan["config"]["vocab_size"] - 1) for _ in range(length)]
        found = model(torch.tensor([ids]), output_router_logits=True, output_hidden_states=True)
        experts = []
        for logits in found.router_logits:
            probabilities = logits.float().softmax(-1)
            best = probabilities.sort(-1, descending=True)
            gaps = best.values[:, :-1] - best.values[:, 1:]
            router_gap = min(router_gap, gaps[:, : top_k].min().item() if gaps.shape[1] else 1.0)
            experts.append(best.indices[:, :top_k].tolist())
        greedy, fed = [], list(ids)
        for _ in range(NEW_TOKENS):
            logits = model(torch.tensor([fed])).logits[0, -1]
            first, second = logits.topk(2).values.tolist()
            greedy_gap = min(greedy_gap, first - second)
            greedy.append(int(logits.argmax()))
            fed.append(greedy[-1])
        rounded = lambda tensor: [[float(f"{value:.7g}") for value in row] for row in tensor.tolist()]
        rows = sorted({0, length // 2, length - 1})
        cases.append({
            "ids": ids, "rows": rows, "logits": rounded(found.logits[0, rows]),
            "states": rounded(found.hidden_states[-1][0, rows]), "experts": experts, "greedy": greedy,
        })
    return cases, router_gap, greedy_gap


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    out = arguments.parse_args().out
    for name, plan in CONFIGS.items():
        for seed in range(1000):
            model = model_of(plan, seed)
            cases, router_gap, greedy_gap = golden(model, plan, seed)
            if router_gap > ROUTER_GAP_MIN and greedy_gap > GREEDY_GAP_MIN:
                break
        else:
            raise SystemExit(f"{name}: every seed has a near-tie")
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_file(tensors_of(model, plan), folder / "model.safetensors", metadata={"format": "pt"})
        config = model.config.to_dict() | {"architectures": [f"{plan['family']}ForCausalLM"]}
        for field, value in plan.get("edit", {}).items():
            config.pop(field, None)
            config |= {field: value} if value is not None else {}
        if plan.get("has_tokenizer"):
            tokenizer(plan["config"]["vocab_size"]).save(str(folder / "tokenizer.json"))
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (folder / "golden.json").write_text(json.dumps({"transformers": transformers.__version__, "cases": cases}) + "\n")
        print(name, "seed", seed, "gaps", router_gap, greedy_gap, sum(f.stat().st_size for f in folder.iterdir()))


if __name__ == "__main__":
    main()
