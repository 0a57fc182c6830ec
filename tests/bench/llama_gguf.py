"""Writes a GGUF file of OLMoE-1B-7B's shape with random weights in Q4_K_M, as llama.cpp's own quantizer chooses its formats:
what llama_bench.py gives to llama.cpp. Needs the package gguf.

    python tests/bench/llama_gguf.py OUT.gguf
"""

import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

LAYERS, WIDTH, EXPERT_WIDTH, EXPERTS, CHOSEN, VOCABULARY, HEADS = 16, 2048, 1024, 64, 8, 50304, 16
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


def write(out):
    generator = np.random.default_rng(0)
    file = gguf.GGUFWriter(out, "olmoe")
    file.add_context_length(4096)
    file.add_embedding_length(WIDTH)
    file.add_block_count(LAYERS)
    file.add_feed_forward_length(EXPERT_WIDTH)
    file.add_head_count(HEADS)
    file.add_head_count_kv(HEADS)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_freq_base(10000.0)
    file.add_expert_count(EXPERTS)
    file.add_expert_used_count(CHOSEN)
    file.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("olmo")
    # A character for each byte, as GPT-2 writes them, and fillers, so that a text has as many tokens as letters.
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [chr(256 + number) for number in range(256 - len(printed))]
    letters = [chr(byte) for byte in printed] + others
    file.add_token_list(letters + [f"t{token}" for token in range(VOCABULARY - len(letters))])
    file.add_token_types([1] * VOCABULARY)
    file.add_token_merges(["t 1"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(1)

    def matrix(name, format, *shape):
        file.add_tensor(f"{name}.weight", random_blocks(generator, format, *shape), raw_dtype=format)

    def norm(name):
        file.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))

    matrix("token_embd", Type.Q4_K, VOCABULARY, WIDTH)
    matrix("output", Type.Q6_K, VOCABULARY, WIDTH)
    norm("output_norm")
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        # The first and last eighth of the layers and every third between have more bits where they matter most.
        finer = layer < LAYERS // 8 or layer >= 7 * LAYERS // 8 or (layer - LAYERS // 8) % 3 == 2
        finer = Type.Q6_K if finer else Type.Q4_K
        for name in ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm"):
            norm(f"{block}.{name}")
        for name, format in {"attn_q": Type.Q4_K, "attn_k": Type.Q4_K, "attn_v": finer, "attn_output": Type.Q4_K}.items():
            matrix(f"{block}.{name}", format, WIDTH, WIDTH)
        file.add_tensor(f"{block}.ffn_gate_inp.weight", (generator.standard_normal((EXPERTS, WIDTH)) * 0.1).astype(np.float32))
        matrix(f"{block}.ffn_gate_exps", Type.Q4_K, EXPERTS, EXPERT_WIDTH, WIDTH)
        matrix(f"{block}.ffn_up_exps", Type.Q4_K, EXPERTS, EXPERT_WIDTH, WIDTH)
        matrix(f"{block}.ffn_down_exps", finer, EXPERTS, WIDTH, EXPERT_WIDTH)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()


if __name__ == "__main__":
    write(sys.argv[1])
