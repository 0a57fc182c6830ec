"""Writes the golden.json of a Qwen3-MoE under models/: what transformers computes from the values that its files stand for, in
float32 on the CPU. crates/model/tests/causal_parity.rs reads it. Run it again only when the model or the prompts change:

    pip install torch==2.11.0 transformers==5.17.0
    python tests/parity/make_decoder_golden.py models/qwen3-tiny-32 --prompts tests/parity/decoder_cases.json \\
        --out models/qwen3-tiny-32/golden.json

Each case runs alone (batch 1, no padding). Its fields, beside text and ids:

    rows         the tokens of the prompt of which logits and states are told
    logit_ids    of each row, the tokens with the largest logits, best first
    logits       those logits
    states       of each row, what the head reads: behind the last norm
    experts      (layers, tokens, top_k), the likeliest first
    greedy       the tokens that follow if each time the likeliest is taken, and greedy_text
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Qwen3MoeForCausalLM

NEW_TOKENS = 24
TOP_LOGITS = 32
# Nearer to a tie, rounding may choose: another prompt is asked for.
ROUTER_GAP_MIN, GREEDY_GAP_MIN = 2e-5, 2e-3
BLOCK = 32


def values_of_q8_0(blocks):
    """(rows, bytes) of blocks: a float16 scale and 32 integers each -> (rows, columns) float32"""
    blocks = blocks.numpy().reshape(len(blocks), -1, 2 + BLOCK)
    scales = blocks[:, :, :2].copy().view(np.float16).astype(np.float32)
    values = blocks[:, :, 2:].copy().view(np.int8).astype(np.float32) * scales
    return torch.from_numpy(values.reshape(len(blocks), -1))


def stored_values(model_dir):
    """-> {name: tensor of the values that the model's files stand for, float32}"""
    tensors = {}
    for path in sorted(model_dir.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            formats = file.metadata() or {}
            for name in file.keys():
                tensor, kind = file.get_tensor(name), formats.get(f"blocks.{name}")
                if kind not in (None, "Q8_0"):
                    raise SystemExit(f"{path}: {name} is stored as {kind}, expected Q8_0 or plain values")
                tensors[name] = values_of_q8_0(tensor) if kind else tensor.float()
    return tensors


def opened(model_dir):
    """transformers' model of these values, by way of files that it can read."""
    config = json.loads((model_dir / "config.json").read_text())
    config.pop("quantization_config", None)
    with tempfile.TemporaryDirectory() as folder:
        save_file(stored_values(model_dir), Path(folder) / "model.safetensors", metadata={"format": "pt"})
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def rounded(rows):
    return [[float(f"{value:.7g}") for value in row] for row in rows.tolist()]


@torch.inference_mode()
def golden_case(model, tokenizer, text):
    """-> the case, its smallest gap between an expert and the next likely one, and between the two likeliest tokens"""
    ids = tokenizer.encode(text).ids
    found = model(torch.tensor([ids]), output_router_logits=True, output_hidden_states=True)
    experts, router_gap = [], 1.0
    for logits in found.router_logits:
        best = logits.softmax(-1).sort(-1, descending=True)
        top_k = model.config.num_experts_per_tok
        router_gap = min(router_gap, (best.values[:, :top_k] - best.values[:, 1 : top_k + 1]).min().item())
        experts.append(best.indices[:, :top_k].tolist())
    written = model.generate(
        torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    greedy = written.sequences[0, len(ids) :].tolist()
    best = torch.cat(written.logits).topk(2).values
    greedy_gap = (best[:, 0] - best[:, 1]).min().item()
    rows = sorted({0, len(ids) // 2, len(ids) - 1})
    top = found.logits[0, rows].topk(TOP_LOGITS)
    case = {
        "text": text, "ids": ids, "rows": rows, "logit_ids": top.indices.tolist(), "logits": rounded(top.values),
        "states": rounded(found.hidden_states[-1][0, rows]), "experts": experts, "greedy": greedy,
        "greedy_text": tokenizer.decode(greedy),
    }
    return case, router_gap, greedy_gap


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model_dir", type=Path)
    arguments.add_argument("--prompts", type=Path, required=True, help="JSON list of texts")
    arguments.add_argument("--out", type=Path, required=True)
    options = arguments.parse_args()
    torch.set_num_threads(2)
    model = opened(options.model_dir)
    tokenizer = Tokenizer.from_file(str(options.model_dir / "tokenizer.json"))
    prompts = json.loads(options.prompts.read_text(encoding="utf-8"))
    cases, near_ties = [], []
    for text in prompts:
        case, router_gap, greedy_gap = golden_case(model, tokenizer, text)
        cases.append(case)
        print(f"{text!r} -> {case['greedy_text']!r}, smallest gaps {router_gap:.1e} and {greedy_gap:.1e}", flush=True)
        if router_gap < ROUTER_GAP_MIN or greedy_gap < GREEDY_GAP_MIN:
            near_ties.append(text)
    if near_ties:
        raise SystemExit(f"near a tie, so that rounding could choose: {near_ties}")
    # One case a line, so that a new file makes a readable diff.
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    head = json.dumps({"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]})
    options.out.write_text(f'{head[:-1]}, "cases": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
