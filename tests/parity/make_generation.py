"""Writes generation.golden.json: what transformers' generate() answers by generation configs of all kinds, and what the
model computes from files that hold other copies of its embedding. Float32 on the CPU, as make_golden.py.

    pip install torch==2.11.0 transformers==5.17.0
    python tests/parity/make_generation.py tests/data/parity/random-steps --out tests/data/parity/generation.golden.json

Each case of "generation" has the content of a generation_config.json, an input, the arguments of generate(), and the
tokens after the start token. Each case of "copies" says by how much the embedding is multiplied under each of its names
in the file, and has states and logits of the decoder's first step.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import SwitchTransformersForConditionalGeneration

INPUT = [5, 17, 9, 30, 3, 7]
NAMES = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")


def load(folder):
    model = SwitchTransformersForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def copied(source, folder):
    """-> a folder with the model's config and weights."""
    folder = Path(folder) / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(source) / name, folder / name)
    return folder


def configs(first, second):
    """Generation configs, with generate()'s arguments, around two tokens of the plain answer."""
    ends = {"eos_token_id": [first, second]}
    yield {}, {"max_new_tokens": 8}
    yield {"eos_token_id": [60, second]}, {"max_new_tokens": 8}
    yield {"eos_token_id": second}, {"max_new_tokens": 8}
    yield {"decoder_start_token_id": 11}, {"max_new_tokens": 8}
    yield {"bos_token_id": 11}, {"max_new_tokens": 8}
    yield {"bos_token_id": 11, "decoder_start_token_id": 12}, {"max_new_tokens": 8}
    yield {"suppress_tokens": [first, second]}, {"max_new_tokens": 8}
    yield {"begin_suppress_tokens": [first, second]}, {"max_new_tokens": 8}
    yield {"forced_bos_token_id": 40}, {"max_new_tokens": 8}
    yield {"forced_bos_token_id": 40, "begin_suppress_tokens": [second, 40]}, {"max_new_tokens": 8}
    yield {"forced_eos_token_id": 50}, {"max_new_tokens": 5}
    yield {"forced_eos_token_id": [50, 7]}, {"max_new_tokens": 5}
    yield {"forced_bos_token_id": 40, "forced_eos_token_id": 50}, {"max_new_tokens": 1}
    yield {"forced_eos_token_id": 50, "min_new_tokens": 5}, {"max_new_tokens": 5}
    yield ends | {"min_new_tokens": 3}, {"max_new_tokens": 8}
    yield ends | {"min_length": 3}, {"max_new_tokens": 8}
    yield ends | {"min_length": 6, "min_new_tokens": 2}, {"max_new_tokens": 8}
    yield {"repetition_penalty": 1.6}, {"max_new_tokens": 8}
    yield {"repetition_penalty": 0.5}, {"max_new_tokens": 8}
    yield ends | {"repetition_penalty": 2.0, "min_new_tokens": 6, "suppress_tokens": [9]}, {"max_new_tokens": 8}
    yield {"max_new_tokens": 6}, {}
    yield {"max_length": 6}, {}
    yield {"max_length": 6, "max_new_tokens": 3}, {}


def generation_case(source, config, arguments):
    end = json.loads((Path(source) / "config.json").read_text())["eos_token_id"]
    start = json.loads((Path(source) / "config.json").read_text())["decoder_start_token_id"]
    with tempfile.TemporaryDirectory() as folder:
        folder = copied(source, folder)
        # generate() takes nothing of config.json where there is this file; here that is what fills its gaps.
        starts = {} if "bos_token_id" in config else {"decoder_start_token_id": start}
        whole = {"eos_token_id": end, "pad_token_id": 2} | starts | config
        (folder / "generation_config.json").write_text(json.dumps(whole))
        answer = load(folder).generate(torch.tensor([INPUT]), **arguments)[0].tolist()
    return {"config": config, "arguments": arguments, "ids": answer[1:]}


def copies_case(source, copies):
    with tempfile.TemporaryDirectory() as folder:
        folder = copied(source, folder)
        tensors = load_file(folder / "model.safetensors")
        embedding = tensors.pop("shared.weight")
        tensors |= {f"{name}.weight": embedding * by for name, by in copies.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        model = load(folder)
        output = model(input_ids=torch.tensor([INPUT]), decoder_input_ids=torch.tensor([[2]]), use_cache=False)
    exact = lambda values: [float(f"{float(value):.9g}") for value in values]
    states = output.encoder_last_hidden_state[0].reshape(-1)
    return {"copies": copies, "states": exact(states), "logits": exact(output.logits[0, 0])}


def a_case_a_line(content):
    """-> JSON with lists of cases spread over lines."""

    def shown(value):
        is_cases = isinstance(value, list) and isinstance(value[0], dict)
        return "[\n " + ",\n ".join(map(json.dumps, value)) + "\n]" if is_cases else json.dumps(value)

    fields = (f"{json.dumps(name)}: {shown(value)}" for name, value in content.items())
    return "{\n" + ",\n".join(fields) + "\n}"


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    plain = generation_case(arguments.model, {}, {"max_new_tokens": 8})["ids"]
    first = plain[0]
    second = next(token for token in plain if token != first)
    generation = [generation_case(arguments.model, *case) for case in configs(first, second)]
    copies = [{name: 1.0} for name in NAMES]
    copies += [{name: 1.0 for name in NAMES}]
    copies += [{"shared": 1.0, name: -2.0} for name in NAMES[1:]]
    copies += [{"shared": 1.0, "encoder.embed_tokens": 0.5, "decoder.embed_tokens": -1.0, "lm_head": 2.0}]
    content = {
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "input": INPUT,
        "generation": generation,
        "copies": [copies_case(arguments.model, case) for case in copies],
    }
    Path(arguments.out).write_text(a_case_a_line(content) + "\n")


if __name__ == "__main__":
    main()
