"""Writes a GGUF file of a published shape with random weights in Q4_K_M, as llama.cpp's own quantizer chooses its formats: what
llama_bench.py and tests/gpu/llama.py give to llama.cpp. Needs the package gguf.

    python tests/bench/llama_gguf.py OUT.gguf [--like qwen3-30b-a3b] [--blocks N]
"""

import argparse
from types import SimpleNamespace as Shape

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

# Layers; widths of the model, of an expert and of a head; heads of queries, of keys and values; experts, of a token; words; what
# texts are cut by, and the base of rotary positions.
SHAPES = {
    "olmoe-1b-7b": Shape(
        name="olmoe", layers=16, width=2048, expert_width=1024, head=128, heads=16, kv_heads=16, experts=64, chosen=8,
        vocabulary=50304, pre="olmo", rope=10000.0,
    ),
    "qwen3-30b-a3b": Shape(
        name="qwen3moe", layers=48, width=2048, expert_width=768, head=128, heads=32, kv_heads=4, experts=128, chosen=8,
        vocabulary=151936, pre="qwen2", rope=1e6,
    ),
}
# Of a block of 256 values: its bytes, and where its binary16 scales are, with what they are.
BLOCKS = {Type.Q4_K: (144, {0: 0.02 / 256, 2: 0.02 / 32}), Type.Q6_K: (210, {208: 0.02 / 2048})}
AT_ONCE = 1 << 20


def random_blocks(generator, format, *shape):
    """A tensor whose integers are random, and whose values are about as large as a model's."""
    size, scales = BLOCKS[format]
    blocks = np.empty((int(np.prod(shape, dtype=np.int64)) // 256, size), np.uint8)
    for start in range(0, len(blocks), AT_ONCE):
        part = blocks[start : start + AT_ONCE]
        part[:] = generator.integers(0, 256, part.shape, dtype=np.uint8)
        for at, scale in scales.items():
            part[:, at : at + 2] = np.full(len(part), scale, np.float16).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*shape[:-1], shape[-1] // 256 * size)


def write(out, shape):
    generator = np.random.default_rng(0)
    file = gguf.GGUFWriter(out, shape.name)
    file.add_context_length(4096)
    file.add_embedding_length(shape.width)
    file.add_block_count(shape.layers)
    file.add_feed_forward_length(shape.expert_width)
    file.add_head_count(shape.heads)
    file.add_head_count_kv(shape.kv_heads)
    if shape.name == "qwen3moe":
        file.add_expert_feed_forward_length(shape.expert_width)
        file.add_key_length(shape.head)
        file.add_value_length(shape.head)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_freq_base(shape.rope)
    file.add_expert_count(shape.experts)
    file.add_expert_used_count(shape.chosen)
    file.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(shape.pre)
    # A character for each byte, as GPT-2 writes them, and fillers, so that a text has as many tokens as letters.
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [chr(256 + number) for number in range(256 - len(printed))]
    letters = [chr(byte) for byte in printed] + others
    file.add_token_list(letters + [f"t{token}" for token in range(shape.vocabulary - len(letters))])
    file.add_token_types([1] * shape.vocabulary)
    file.add_token_merges(["t 1"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(1)

    def matrix(name, format, *dimensions):
        file.add_tensor(f"{name}.weight", random_blocks(generator, format, *dimensions), raw_dtype=format)

    def norm(name, width):
        file.add_tensor(f"{name}.weight", np.ones(width, np.float32))

    width, expert_width, experts = shape.width, shape.expert_width, shape.experts
    queries, keys = shape.heads * shape.head, shape.kv_heads * shape.head
    # Those of OLMoE are of all heads together.
    normed = (queries, keys) if shape.name == "olmoe" else (shape.head, shape.head)
    matrix("token_embd", Type.Q4_K, shape.vocabulary, width)
    matrix("output", Type.Q6_K, shape.vocabulary, width)
    norm("output_norm", width)
    for layer in range(shape.layers):
        block, eighth = f"blk.{layer}", shape.layers // 8
        # The first and last eighth of the layers and every third between have more bits where they matter most.
        finer = layer < eighth or layer >= 7 * shape.layers // 8 or (layer - eighth) % 3 == 2
        finer = Type.Q6_K if finer else Type.Q4_K
        norm(f"{block}.attn_norm", width)
        norm(f"{block}.ffn_norm", width)
        norm(f"{block}.attn_q_norm", normed[0])
        norm(f"{block}.attn_k_norm", normed[1])
        matrix(f"{block}.attn_q", Type.Q4_K, queries, width)
        matrix(f"{block}.attn_k", Type.Q4_K, keys, width)
        matrix(f"{block}.attn_v", finer, keys, width)
        matrix(f"{block}.attn_output", Type.Q4_K, width, queries)
        router = (generator.standard_normal((experts, width)) * 0.1).astype(np.float32)
        file.add_tensor(f"{block}.ffn_gate_inp.weight", router)
        matrix(f"{block}.ffn_gate_exps", Type.Q4_K, experts, expert_width, width)
        matrix(f"{block}.ffn_up_exps", Type.Q4_K, experts, expert_width, width)
        matrix(f"{block}.ffn_down_exps", finer, experts, width, expert_width)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--like", default="olmoe-1b-7b", choices=SHAPES)
    parser.add_argument("--blocks", type=int, help="so many blocks of that shape")
    options = parser.parse_args()
    shape = SHAPES[options.like]
    shape.layers = options.blocks or shape.layers
    write(options.out, shape)
