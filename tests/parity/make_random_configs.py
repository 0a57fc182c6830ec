"""Writes tests/data/parity/random-*: small Switch Transformers with seeded random weights, and their golden.json.

Together they vary every field of the config that changes the mathematics, each stored dtype and each file layout. Run it
once under each of two transformers releases; a config is made only under the release it names:

    pip install torch==2.15.0 transformers==5.17.0
    python tests/parity/make_random_configs.py --out tests/data/parity
    pip install --no-deps --target DIR transformers==5.23.0
    PYTHONPATH=DIR python tests/parity/make_random_configs.py --out tests/data/parity

Two releases, because of expert capacity. 5.17.0 computes a capacity mask but flattens the batch before it counts, so
that every count is one and no token is ever dropped. 5.23.0 counts as 4.x did. Its rule, read in
SwitchTransformersTop1Router and SwitchTransformersSparseMLP and checked by random-capacity:

- Tokens are counted in order, for each expert, over the tokens of one sequence within one forward call. The first
  `expert_capacity` tokens that chose an expert keep it; every later one is dropped.
- A dropped token gets exactly zero from the layer, so only the residual is left. (Early 4.x releases gave it the router's
  probability times its normed hidden state instead.)
- Decoding with a cache sends one token a call, so it drops nothing. Several decoder tokens in one call (a forced target)
  are counted together, without those that are already in the cache.
- Padding stands on the right and is therefore counted after every real token: it never displaces one.

A weight seed is tried after another until no router choice and no greedy token comes near a tie, so that the readers can
ask for identical choices.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

import torch
import transformers
from make_golden import golden, smallest_gaps, write_json
from safetensors.torch import load_file, save_file
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

ROUTER_GAP_MIN = 4e-4
GREEDY_GAP_MIN = 4e-3
MAX_NEW_TOKENS = 16
MODEL_BYTES_MAX = 300_000

# layout: "classic" stores the embedding under all its names, as published google/switch-base-* checkpoints do;
# "saved" is what save_pretrained writes, untouched; "sharded" spreads the tensors over files with an index.
# dtype: of the stored tensors; "mixed" gives each kind of tensor another one.
# edit: what is changed in config.json afterwards, None to remove a key (so that its default or derivation is used).
CONFIGS = {
    "random-untied-classic": {
        "release": "5.17.0",
        "layout": "classic",
        "dtype": "f32",
        "lengths": [1, 13, 40],
        "config": dict(
            vocab_size=131, d_model=20, d_kv=6, num_heads=3, d_ff=37, num_layers=4, num_decoder_layers=3,
            num_sparse_encoder_layers=2, num_sparse_decoder_layers=1, num_experts=5, expert_capacity=64,
            relative_attention_num_buckets=8, relative_attention_max_distance=20, layer_norm_epsilon=1e-5,
            tie_word_embeddings=False, decoder_start_token_id=0,
        ),
        "edit": {
            "encoder_sparse_step": 2, "decoder_sparse_step": 2, "feed_forward_proj": "relu", "is_gated_act": False,
            "router_type": "tokens_masked", "torch_dtype": "float32", "dtype": None,
        },
    },
    # A capacity of 2 that this release does not enforce: the default must drop nothing.
    "random-saved": {
        "release": "5.17.0",
        "layout": "saved",
        "dtype": "f32",
        "lengths": [3, 17, 33],
        "config": dict(
            vocab_size=257, d_model=24, d_kv=5, num_heads=4, d_ff=19, num_layers=3, num_decoder_layers=6,
            num_sparse_encoder_layers=3, num_sparse_decoder_layers=2, num_experts=4, expert_capacity=2,
            relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-6,
            tie_word_embeddings=True, decoder_start_token_id=5,
        ),
    },
    "random-sharded-bf16": {
        "release": "5.17.0",
        "layout": "sharded",
        "dtype": "bf16",
        "lengths": [2, 24, 50],
        "config": dict(
            vocab_size=517, d_model=36, d_kv=8, num_heads=5, d_ff=13, num_layers=3, num_decoder_layers=2,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=32, expert_capacity=4096,
            relative_attention_num_buckets=16, relative_attention_max_distance=32, layer_norm_epsilon=1e-6,
            tie_word_embeddings=True, decoder_start_token_id=0,
        ),
    },
    "random-one-expert-f16": {
        "release": "5.17.0",
        "layout": "saved",
        "dtype": "f16",
        "lengths": [1, 9, 30],
        "config": dict(
            vocab_size=301, d_model=22, d_kv=16, num_heads=2, d_ff=41, num_layers=2, num_decoder_layers=2,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=2, num_experts=1, expert_capacity=1,
            relative_attention_num_buckets=6, relative_attention_max_distance=9, layer_norm_epsilon=1e-3,
            tie_word_embeddings=False, decoder_start_token_id=4,
        ),
    },
    # Sparse steps 4 and 3 over stacks they do not divide, other special tokens, and a sequence beyond the buckets' reach.
    "random-steps": {
        "release": "5.17.0",
        "layout": "saved",
        "dtype": "f32",
        "lengths": [5, 60, 150],
        "config": dict(
            vocab_size=97, d_model=16, d_kv=3, num_heads=7, d_ff=11, num_layers=9, num_decoder_layers=7,
            num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, num_experts=3, expert_capacity=64,
            relative_attention_num_buckets=12, relative_attention_max_distance=100, layer_norm_epsilon=1e-6,
            tie_word_embeddings=True, pad_token_id=2, eos_token_id=7, decoder_start_token_id=2,
        ),
        "edit": {"encoder_sparse_step": 4, "decoder_sparse_step": None},
    },
    # A step of 0 means no sparse block at all.
    "random-dense-encoder": {
        "release": "5.17.0",
        "layout": "classic",
        "dtype": "bf16",
        "lengths": [4, 21, 35],
        "config": dict(
            vocab_size=203, d_model=28, d_kv=7, num_heads=4, d_ff=33, num_layers=2, num_decoder_layers=4,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=4, num_experts=6, expert_capacity=64,
            relative_attention_num_buckets=32, relative_attention_max_distance=64, layer_norm_epsilon=1e-6,
            tie_word_embeddings=True, decoder_start_token_id=0,
        ),
        "edit": {"encoder_sparse_step": 0},
    },
    "random-router-bias": {
        "release": "5.17.0",
        "layout": "sharded",
        "dtype": "mixed",
        "lengths": [6, 18, 29],
        "config": dict(
            vocab_size=151, d_model=18, d_kv=9, num_heads=2, d_ff=27, num_layers=3, num_decoder_layers=3,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=9, expert_capacity=64,
            relative_attention_num_buckets=20, relative_attention_max_distance=40, layer_norm_epsilon=1e-4,
            tie_word_embeddings=False, router_bias=True, decoder_start_token_id=0,
        ),
    },
    "random-capacity": {
        "release": "5.23.0",
        "layout": "saved",
        "dtype": "f32",
        "enforce_capacity": True,
        "lengths": [2, 16, 40],
        "config": dict(
            vocab_size=157, d_model=20, d_kv=5, num_heads=4, d_ff=23, num_layers=4, num_decoder_layers=3,
            num_sparse_encoder_layers=2, num_sparse_decoder_layers=3, num_experts=4, expert_capacity=2,
            relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-6,
            tie_word_embeddings=True, decoder_start_token_id=0,
        ),
    },
}

# Checkpoints this project refuses by name, with what their config says. They need no weights.
REFUSED = {
    "refused-gated": {"is_gated_act": True, "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new"},
    "refused-gelu": {"dense_act_fn": "gelu"},
    "refused-router-bf16": {"router_dtype": "bfloat16"},
}

STORED = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def stored_dtype(name, dtype):
    """bf16 keeps its routers in float32, as trained checkpoints do; "mixed" mixes within one file."""
    if dtype == "mixed":
        kinds = [("router", "f32"), ("experts", "bf16"), ("Attention", "f16"), ("norm", "f32")]
        dtype = next((stored for part, stored in kinds if part in name), "bf16")
    if dtype == "bf16" and "router" in name:
        dtype = "f32"
    return STORED[dtype]


def randomize(model, seed):
    """Seeded weights, large enough that attention, routing and logits are far from uniform."""
    draw = torch.Generator().manual_seed(seed)
    config = model.config

    def scale(name):
        if "router" in name:
            return 0.6
        if "relative_attention_bias" in name:
            return 1.0
        if name.endswith(("q.weight", "k.weight")):
            return config.d_model**-0.5 * config.d_kv**-0.25
        if name.endswith("mlp.wo.weight") or ".wo.weight" in name:
            return 1.5 * config.d_ff**-0.5
        if "embed" in name or "shared" in name:
            return 0.4  # where larger, a tied head only repeats its input
        return config.d_model**-0.5

    tensors = {}
    for name, parameter in model.state_dict().items():
        noise = torch.randn(parameter.shape, generator=draw)
        tensors[name] = 1.0 + 0.3 * noise if "norm" in name else noise * scale(name)
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        tensors[name] = tensors["shared.weight"]  # 4.x always ties these three, also in untied checkpoints
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["shared.weight"]
    model.load_state_dict(tensors)


def shard(tensors, directory, count):
    """Deals the tensors out to `count` files in name order and writes the index."""
    weight_map, names = {}, sorted(tensors)
    for number in range(count):
        part = names[number::count]
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= {name: file for name in part}
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def write_checkpoint(spec, seed, directory):
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    # The edits that decide which blocks are sparse must hold while the model is built, too.
    steps = {key: value for key, value in spec.get("edit", {}).items() if value is not None and "sparse_step" in key}
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**spec["config"], **steps)).eval()
    randomize(model, seed)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink()
    file = directory / "model.safetensors"
    tensors = load_file(file)
    if spec["layout"] == "classic":
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            tensors[name] = tensors["shared.weight"].clone()
        if spec["config"]["tie_word_embeddings"]:
            tensors["lm_head.weight"] = tensors["shared.weight"].clone()
    tensors = {name: tensor.to(stored_dtype(name, spec["dtype"])) for name, tensor in tensors.items()}
    if spec["layout"] == "sharded":
        file.unlink()
        shard(tensors, directory, 3)
    elif spec["layout"] == "classic" or spec["dtype"] != "f32":
        save_file(tensors, file, metadata={"format": "pt"})
    edit_config(directory / "config.json", spec.get("edit", {}))


def edit_config(path, edit):
    config = json.loads(path.read_text()) | edit
    config = {key: value for key, value in sorted(config.items()) if not (key in edit and value is None)}
    path.write_text(json.dumps(config, indent=2) + "\n")


def random_cases(spec):
    """Random ids without the special ones, which a text would not hold."""
    config = spec["config"]
    special = {config.get("pad_token_id", 0), config.get("eos_token_id", 1), config["decoder_start_token_id"]}
    draw = random.Random(config["vocab_size"])
    allowed = [token for token in range(config["vocab_size"]) if token not in special]
    return [{"task": "random", "input_ids": draw.choices(allowed, k=length)} for length in spec["lengths"]]


def make(name, spec, out):
    directory = out / name
    for seed in range(200):
        write_checkpoint(spec, seed, directory)
        contents = golden(directory, random_cases(spec), MAX_NEW_TOKENS, spec.get("enforce_capacity", False))
        router, greedy = smallest_gaps(contents)
        distinct = len({token for case in contents["cases"] for token in case["greedy_ids"]})
        if router >= ROUTER_GAP_MIN and greedy >= GREEDY_GAP_MIN and distinct >= 8:
            break
    else:
        raise SystemExit(f"{name}: every seed comes near a tie")
    contents["note"] += f"; weight seed {seed}"
    write_json(directory / "golden.json", contents)
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    assert size < MODEL_BYTES_MAX, f"{name}: {size} bytes"
    print(f"{name}: seed {seed}, {size} bytes, gaps {router:.1e} {greedy:.1e}, {distinct} distinct tokens", flush=True)


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--only", help="make this one config")
    options = arguments.parse_args()
    transformers.logging.set_verbosity_error()
    for name, spec in CONFIGS.items():
        if spec["release"] == transformers.__version__ and options.only in (None, name):
            make(name, spec, options.out)
    for name, edit in REFUSED.items():
        if options.only in (None, name):
            (options.out / name).mkdir(parents=True, exist_ok=True)
            path = options.out / name / "config.json"
            path.write_text((options.out / "random-saved" / "config.json").read_text())
            edit_config(path, edit)


if __name__ == "__main__":
    main()
