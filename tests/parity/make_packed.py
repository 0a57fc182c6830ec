"""Writes tests/data/parity/packed-*: small decoder-only models with seeded random weights as GPTQ, AWQ, compressed-tensors and FP8
checkpoints, and their golden.json.

    pip install torch==2.11.0 transformers==5.17.0
    python tests/parity/make_packed.py --out tests/data/parity [--only NAME]

Matrices are rounded here and packed by the definitions of the formats. golden.json holds what transformers computes with the values
that the integers or numbers stand for (scale * integer, in float32), as make_causal_configs.py has it.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
import transformers
from make_causal_configs import GREEDY_GAP_MIN, ROUTER_GAP_MIN, golden, model_of, tensors_of
from safetensors.torch import save_file

COMMON = dict(
    vocab_size=97, num_hidden_layers=2, bos_token_id=1, eos_token_id=96, pad_token_id=0, num_attention_heads=2, num_key_value_heads=1,
    head_dim=32, num_experts_per_tok=2, norm_topk_prob=True, max_position_embeddings=64,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0),
)
SMALL = dict(vocab_size=40, num_hidden_layers=1, eos_token_id=39)


def weights(bits, group, strategy):
    of = dict(num_bits=bits, type="int", symmetric=True, strategy=strategy, group_size=group, dynamic=False, actorder=None)
    return dict(targets=["Linear"], weights=of, input_activations=None, output_activations=None)


# packed: which matrices become integers: bits and values of a row that share a scale (None: all); the first that a name contains counts.
CONFIGS = {
    "packed-gptq": dict(
        family="Qwen3Moe", layout="experts", dtype="f32", plain=torch.float16, scales=torch.float16,
        packed={"mlp.gate.": None, "_proj": (4, 64)},
        config=dict(
            COMMON, hidden_size=128, intermediate_size=64, moe_intermediate_size=64, num_experts=3, tie_word_embeddings=True
        ),
        quantization=dict(
            quant_method="gptq", checkpoint_format="gptq", bits=4, group_size=64, sym=True, desc_act=False, lm_head=False,
        ),
    ),
    "packed-awq": dict(
        family="Qwen3Moe", layout="experts", dtype="f32", plain=torch.float16, scales=torch.float16,
        packed={"mlp.gate.": None, "_proj": (4, 32)},
        config=dict(
            COMMON | SMALL, hidden_size=64, head_dim=32, intermediate_size=32, moe_intermediate_size=32, num_experts=3,
            tie_word_embeddings=True,
        ),
        quantization=dict(
            quant_method="awq", version="gemm", bits=4, group_size=32, zero_point=True, modules_to_not_convert=["mlp.gate"]
        ),
    ),
    # Of the squares that share a scale the last ones of a matrix are smaller, and none is as wide as it may be.
    "packed-fp8": dict(
        family="Qwen3Moe", layout="experts", dtype="f32", plain=torch.bfloat16, scales=torch.float32,
        packed={"mlp.gate.": None, "_proj": (48, 128)},
        config=dict(
            COMMON | SMALL, hidden_size=64, head_dim=32, intermediate_size=64, moe_intermediate_size=64, num_experts=2,
            tie_word_embeddings=True,
        ),
        quantization=dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[48, 128]),
    ),
    "packed-compressed": dict(
        family="Qwen3Moe", layout="experts", dtype="f32", plain=torch.bfloat16, scales=torch.bfloat16,
        packed={"self_attn": None, "mlp.gate.": None, "down_proj": (8, None), "_proj": (4, 32)},
        config=dict(
            COMMON, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_experts=4, tie_word_embeddings=False
        ),
        quantization=dict(
            quant_method="compressed-tensors", format="pack-quantized", ignore=["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
            config_groups=dict(group_0=weights(4, 32, "group"), group_1=weights(8, None, "channel")), kv_cache_scheme=None,
        ),
    ),
}


def rounded(matrix, bits, group, dtype):
    """Integers, and the scales of the groups of each row."""
    groups = matrix.reshape(matrix.shape[0], -1, group or matrix.shape[1])
    limit = 2 ** (bits - 1)
    scales = (groups.abs().amax(-1, keepdim=True) / (limit - 0.5)).to(dtype)
    integers = (groups / scales.float()).round().clamp(-limit, limit - 1).to(torch.int64)
    return integers, scales


def words(columns, bits):
    """Values that are not below 0, along the last dimension, so many in a word of 32 bits, the first one lowest."""
    columns = columns.reshape(*columns.shape[:-1], -1, 32 // bits)
    word = (columns << (torch.arange(32 // bits) * bits)).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def gptq(integers, scales, bits):
    zero, (rows, groups, width) = 2 ** (bits - 1), integers.shape
    return {
        "qweight": words((integers + zero).reshape(rows, -1), bits).T,
        "scales": scales.squeeze(-1).T,
        "qzeros": words(torch.full((groups, rows), zero - 1), bits),
        "g_idx": (torch.arange(groups * width) // width).to(torch.int32),
    }


def compressed(integers, scales, bits):
    integers = (integers + 2 ** (bits - 1)).reshape(integers.shape[0], -1)
    return {
        "weight_packed": words(integers, bits), "weight_scale": scales.squeeze(-1), "weight_shape": torch.tensor(integers.shape),
    }


def symmetric(pack):
    """Tensors and values of a matrix by a layout of integers."""
    def of(matrix, form, dtype):
        integers, scales = rounded(matrix, *form, dtype)
        return pack(integers, scales, form[0]), integers * scales.float()
    return of


def awq(matrix, form, dtype):
    """Integers with zeros of their own; words hold neighbours of a row of the turned matrix, interleaved."""
    bits, group = form
    groups = matrix.reshape(matrix.shape[0], -1, group)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scales = ((high - low) / 15).to(dtype)
    zeros = (-low / scales.float()).round().clamp(0, 15).to(torch.int64)
    integers = ((groups / scales.float()).round() + zeros).clamp(0, 15).to(torch.int64)
    interleaved = lambda columns: words(columns.reshape(columns.shape[0], -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), bits)
    tensors = {
        "qweight": interleaved(integers.flatten(1).T), "qzeros": interleaved(zeros.squeeze(-1).T), "scales": scales.squeeze(-1).T
    }
    return tensors, (integers - zeros) * scales.float()


def fp8(matrix, form, dtype):
    """Numbers of 8 bits, and a scale for each square of so many rows and columns."""
    rows, columns = form
    numbers, values, scales = torch.empty_like(matrix, dtype=torch.float8_e4m3fn), torch.empty_like(matrix), []
    for row in range(0, matrix.shape[0], rows):
        scales.append([])
        for column in range(0, matrix.shape[1], columns):
            at = (slice(row, row + rows), slice(column, column + columns))
            scale = (matrix[at].abs().amax() / 448).to(dtype)
            numbers[at] = (matrix[at] / scale).to(torch.float8_e4m3fn)
            values[at] = numbers[at].float() * scale.float()
            scales[-1].append(scale)
    return {"weight": numbers, "weight_scale_inv": torch.tensor(scales, dtype=dtype)}, values


PACKS = {"gptq": symmetric(gptq), "compressed-tensors": symmetric(compressed), "awq": awq, "fp8": fp8}


def packed(model, plan):
    """The tensors of a checkpoint. The model gets the values that they stand for."""
    pack = PACKS[plan["quantization"]["quant_method"]]
    tensors, values = {}, {}
    for name, tensor in tensors_of(model, plan).items():
        form = next((form for part, form in plan["packed"].items() if part in name and name.endswith("weight")), None)
        if form is None:
            tensors[name] = tensor.to(plan["plain"])
            values[name] = tensors[name].float()
        else:
            parts, made = pack(tensor, form, plan["scales"])
            values[name] = made.reshape(tensor.shape)
            tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module, _, matrix = name.rpartition(".")
            of = lambda part: torch.stack([values[f"{module}.{i}.{part}.weight"] for i in range(parameter.shape[0])])
            if matrix == "gate_up_proj":
                parameter.copy_(torch.cat([of("gate_proj"), of("up_proj")], 1))
            elif matrix == "down_proj":
                parameter.copy_(of("down_proj"))
            else:
                parameter.copy_(values[name])
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--only", help="the name of one of them")
    parsed = arguments.parse_args()
    out, only = parsed.out, parsed.only
    for name, plan in CONFIGS.items():
        if only not in (None, name):
            continue
        for seed in range(1000):
            model = model_of(plan, seed)
            tensors = packed(model, plan)
            cases, router_gap, greedy_gap = golden(model, plan, seed)
            if router_gap > ROUTER_GAP_MIN and greedy_gap > GREEDY_GAP_MIN:
                break
        else:
            raise SystemExit(f"{name}: every seed has a near-tie")
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = model.config.to_dict() | {
            "architectures": [f"{plan['family']}ForCausalLM"], "quantization_config": plan["quantization"]
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (folder / "golden.json").write_text(json.dumps({"transformers": transformers.__version__, "cases": cases}) + "\n")
        print(name, "seed", seed, "gaps", router_gap, greedy_gap, sum(f.stat().st_size for f in folder.iterdir()))


if __name__ == "__main__":
    main()
