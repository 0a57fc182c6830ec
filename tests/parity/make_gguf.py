"""Writes tests/data/parity/gguf-*: small decoder-only models of every family with seeded random weights as GGUF files, and their
golden.json.

    pip install torch==2.15.0 transformers==5.17.0 gguf==0.19.0
    python tests/parity/make_gguf.py --out tests/data/parity [--only NAME]

Files are written by gguf, under the names that it has for a family, with the keys that llama.cpp's conversion writes. Together they
have every format of tensors that is read, formats that differ between matrices and between layers, a split file, and
tokenizers of each kind. golden.json holds what transformers computes with the values of those tensors, as make_causal_configs.py
has it, and the ids of some texts by the tokenizer that a file was made of.
"""

import argparse
import json
import shutil
from pathlib import Path

import gguf
import numpy
import tokenizers
import torch
import transformers
from make_causal_configs import GREEDY_GAP_MIN, ROUTER_GAP_MIN, YARN, golden, model_of
from transformers.convert_slow_tokenizer import generate_merges

VOCAB_SIZE = 384
COMMON = dict(vocab_size=VOCAB_SIZE, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TRAINING = ["the expert of the token is the one that the router of the layer chose, isn't it? 1234 and 56"] * 4
TEXTS = [
    "the expert", " the  router's\n\n choice", "It'S 12345 of 7, isn't it?", "e\u0301t\u00e9 \u4e2d\u6587 \U0001f600", "a<|im_end|>b <tool>c",
    "\t tabs\r\nand ends  ", "<s>not a mark</s>", "\u2581 x", "1.5e-3==x",
]
# formats: which tensors get which; the first that a name contains counts.
CONFIGS = {
    "gguf-qwen3": dict(
        family="Qwen3Moe", arch="qwen3moe", tokenizer="qwen2", dtype="f32",
        formats={"ffn_gate_inp": "F32", "norm": "F32", "exps": "Q4_0", "": "Q8_0"},
        config=dict(
            COMMON, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=64,
            moe_intermediate_size=32, num_experts=5, num_experts_per_tok=2, norm_topk_prob=True, rope_parameters=YARN,
            max_position_embeddings=64,
        ),
    ),
    "gguf-qwen2": dict(
        family="Qwen2Moe", arch="qwen2moe", tokenizer="qwen2", dtype="f32",
        formats={"ffn_gate_inp": "F32", "norm": "F32", "bias": "F32", "exps": "BF16", "": "F16"},
        config=dict(
            COMMON, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
            moe_intermediate_size=16, shared_expert_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
            norm_topk_prob=False, rope_parameters=dict(rope_type="default", rope_theta=5000.0), max_position_embeddings=64,
        ),
    ),
    "gguf-olmoe": dict(
        family="Olmoe", arch="olmoe", tokenizer="olmo", dtype="f32", parts=2,
        formats={
            "ffn_gate_inp": "F32", "norm": "F32", "0.ffn_down_exps": "Q5_0", "ffn_down_exps": "Q5_1", "attn_v": "Q4_1",
            "attn_output": "F16", "": "Q8_0",
        },
        config=dict(
            COMMON, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, num_experts=4,
            num_experts_per_tok=2, norm_topk_prob=False, tie_word_embeddings=True, clip_qkv=0.6,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0), max_position_embeddings=64,
        ),
    ),
    "gguf-mixtral": dict(
        family="Mixtral", arch="llama", tokenizer="llama", dtype="f32",
        formats={
            "ffn_gate_inp": "F32", "norm": "F32", "0.ffn_down_exps": "Q6_K", "attn_v": "Q6_K", "attn_k": "Q5_K", "attn_output": "Q8_0",
            "": "Q4_K",
        },
        config=dict(
            COMMON, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=256,
            num_local_experts=2, num_experts_per_tok=1, rope_parameters=dict(rope_type="default", rope_theta=1e6),
            max_position_embeddings=64,
        ),
    ),
}


def blocks_of(values, kind, generator):
    """The bytes of a tensor in a format. Of K-quants these are arbitrary blocks with scales of an ordinary size."""
    kind = gguf.GGMLQuantizationType[kind]
    units = {"Q4_K": 290, "Q5_K": 600}
    if kind.name not in (*units, "Q6_K"):
        return gguf.quants.quantize(values, kind), kind
    _, size = gguf.GGML_QUANT_SIZES[kind]
    count = values.size // 256
    blocks = generator.integers(0, 256, (count, size), dtype=numpy.uint8)
    unit = (values.std() * generator.uniform(0.5, 1.5, count)).astype(numpy.float32)
    put = lambda at, scale: blocks.__setitem__((slice(None), slice(at, at + 2)), scale.astype("<f2").view(numpy.uint8).reshape(-1, 2))
    if kind.name in units:
        put(0, unit / units[kind.name])
        put(2, unit / 290 * 7.5)
    else:
        put(208, unit / 1360)
    return blocks.reshape(*values.shape[:-1], -1), kind


def interleaved(values, heads):
    """Rows of queries or keys as llama.cpp's conversion of this family has them."""
    return values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)


def straight(values, heads):
    return values.reshape(heads, values.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)


def tensors_of(model, plan, seed):
    """The tensors of a file, by name: bytes and format. The model gets the values that they stand for."""
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == plan["arch"]), 2)
    config, generator, tensors = model.config, numpy.random.default_rng(seed), {}

    def stored(name, values):
        name = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        kind = next(kind for part, kind in plan["formats"].items() if part in name)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
        is_turned = plan["arch"] == "llama" and heads is not None
        values = values.squeeze(0) if "shexp" in name and values.shape[0] == 1 else values
        data, kind = blocks_of(interleaved(values, heads) if is_turned else values, kind, generator)
        tensors[name] = (data, kind)
        values = gguf.quants.dequantize(data, kind)
        return straight(values, heads) if is_turned else values

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            values = tensor.numpy()
            if name.endswith("experts.gate_up_proj"):
                base, half = name.removesuffix("gate_up_proj"), values.shape[1] // 2
                made = [stored(f"{base}{of}_proj.weight", part) for of, part in [("gate", values[:, :half]), ("up", values[:, half:])]]
                made = numpy.concatenate(made, 1)
            elif name.endswith("experts.down_proj"):
                made = stored(f"{name}.weight", values)
            else:
                made = stored(name, values)
            tensor.copy_(torch.from_numpy(made.reshape(values.shape).copy()))
    return tensors


def byte_tokenizer(kind):
    """As the families have them."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.normalizer = tokenizers.normalizers.NFC()
    pre = tokenizers.pre_tokenizers
    if kind == "qwen2":
        made.pre_tokenizer = pre.Sequence([
            pre.Split(tokenizers.Regex(WORDS), behavior="isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)
        ])
    else:
        made.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 4, special_tokens=special, initial_alphabet=sorted(pre.ByteLevel.alphabet()), show_progress=False
    )
    made.train_from_iterator(TRAINING, trainer)
    made.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    return made


def piece_tokenizer():
    """As transformers makes one of a sentencepiece model that knows the same pieces."""
    blank = "\u2581"
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.normalizer = tokenizers.normalizers.Replace(" ", blank)
    trained.train_from_iterator([blank + text for text in TRAINING], tokenizers.trainers.BpeTrainer(vocab_size=110, show_progress=False))
    vocabulary = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    pieces += [piece for piece in vocabulary if len(piece) > 1] + [piece for piece in vocabulary if len(piece) == 1]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) - 259)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    normal = {piece: score for piece, score in zip(pieces[259:], scores[259:])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocabulary, generate_merges({p: vocabulary[p] for p in normal}, normal), unk_token="<unk>", fuse_unk=True, byte_fallback=True
    ))
    norm = tokenizers.normalizers
    made.normalizer = norm.Sequence([norm.Prepend(blank), norm.Replace(" ", blank)])
    made.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in pieces[:3]])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made, pieces, scores


def add_tokens(writer, kind):
    """Says the tokens to a file. Returns the tokenizer that they are of."""
    types = gguf.TokenType
    if kind == "llama":
        made, pieces, scores = piece_tokenizer()
        kinds = [types.UNKNOWN, types.CONTROL, types.CONTROL] + [types.BYTE] * 256 + [types.NORMAL] * (len(pieces) - 259)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(pieces)
        writer.add_token_scores(scores)
        writer.add_token_types(kinds)
        writer.add_unk_token_id(0)
    else:
        made = byte_tokenizer(kind)
        texts = [made.id_to_token(i) for i in range(made.get_vocab_size())]
        kinds = [types.CONTROL] * 4 + [types.USER_DEFINED if text == "<tool>" else types.NORMAL for text in texts[4:]]
        # As conversions fill up what a matrix has more rows than there are tokens.
        texts += [f"[PAD{i}]" for i in range(len(texts), VOCAB_SIZE)]
        kinds += [types.UNUSED] * (VOCAB_SIZE - len(kinds))
        merges = json.loads(made.to_str())["model"]["merges"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(kind)
        writer.add_token_list(texts)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_add_bos_token(False)
        writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    return made


def write(folder, model, plan, seed):
    """Writes the file. Returns the tokenizer that is in it."""
    config = model.config
    tensors = tensors_of(model, plan, seed)
    parts = plan.get("parts", 1)
    writer = gguf.GGUFWriter(
        folder / "model.gguf", plan["arch"], split_max_tensors=-(-len(tensors) // parts) if parts > 1 else 0
    )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if plan["family"] in ("Qwen3Moe", "Qwen2Moe"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if plan["family"] == "Qwen2Moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if plan["family"] == "Olmoe":
        writer.add_clamp_kqv(config.clip_qkv)
    made = add_tokens(writer, plan["tokenizer"])
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--only", help="the name of one of them")
    parsed = arguments.parse_args()
    out, only = parsed.out, parsed.only
    for name, plan in CONFIGS.items():
        if only not in (None, name):
            continue
        folder = out / name
        for seed in range(1000):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            model = model_of(plan, seed)
            made = write(folder, model, plan, seed)
            cases, router_gap, greedy_gap = golden(model, plan, seed)
            if router_gap > ROUTER_GAP_MIN and greedy_gap > GREEDY_GAP_MIN:
                break
        else:
            raise SystemExit(f"{name}: every seed has a near-tie")
        texts = [{"text": text, "ids": made.encode(text).ids} for text in TEXTS]
        told = {"transformers": transformers.__version__, "cases": cases, "texts": texts}
        (folder / "golden.json").write_text(json.dumps(told) + "\n")
        print(name, "seed", seed, "gaps", router_gap, greedy_gap, sum(f.stat().st_size for f in folder.iterdir()))


if __name__ == "__main__":
    main()
