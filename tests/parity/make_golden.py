"""Writes golden.json: what transformers computes for a Switch Transformer, in float32 on the CPU.

The Rust parity tests (crates/model/tests/parity.rs) read these files, so that they need no Python. Run it again only
when a model or the set of cases changes:

    pip install torch==2.15.0 transformers==5.17.0
    python tests/parity/make_golden.py MODEL_DIR --cases tests/parity/cases.json --out golden.json

Each case runs alone (batch 1, no padding, greedy). Fields of a case, beside the inputs:

    encoder            mean, std (n - 1), first and last 8 values of the final-normed encoder states (tokens, d_model)
    first_step_top5    [[token id, logit]] of the first decoding step
    first_step_logits  all logits (ids null), or the 64 largest, best first, with the sum and absolute sum over all
    greedy_ids         decoder start token, then the tokens chosen, up to and including </s>
    greedy_gaps        best logit minus the second best, one for each chosen token
    encoder_experts, encoder_probs, encoder_gaps
                       {router module: [one per token]}: the expert chosen, its probability, and the distance to the
                       second best probability; a reader counts a choice whose gap is tiny as a near-tie
    decoder_...        the same for the decoder, whose inputs are greedy_ids[:-1]
    forced             one decoder call over several tokens at once: inputs, routing, and the last position's logits
    encoder_dropped, forced.dropped
                       {router module: [positions]} beyond the expert capacity; only with --enforce-capacity, which needs
                       a transformers release that enforces it (see make_random_configs.py)
"""

import argparse
import json
import random
from pathlib import Path

import torch
import transformers
from transformers import SwitchTransformersForConditionalGeneration
from transformers.modeling_outputs import MoEModelOutput

FULL_LOGITS_VOCABULARY_MAX = 1024
TOP_LOGITS = 64
FORCED_TOKENS = 6


class RouterRecorder:
    """Collects router logits by hooks on the classifiers, whose output is the same in every transformers release."""

    def __init__(self, model):
        self.logits = {}
        for name, module in model.named_modules():
            if name.endswith(".router"):
                module.classifier.register_forward_hook(self._hook(name))

    def _hook(self, name):
        def record(_module, _inputs, output):
            self.logits.setdefault(name, []).append(output.detach().float().reshape(-1, output.shape[-1]))

        return record

    def take(self, stack, calls=slice(None)):
        """-> {router module: (tokens, experts) logits since the last take}, for "encoder" or "decoder"."""
        taken = {name: torch.cat(parts[calls]) for name, parts in self.logits.items() if name.startswith(stack)}
        self.logits = {name: parts for name, parts in self.logits.items() if not name.startswith(stack)}
        return taken


def rounded(values, digits=6):
    return [round(float(v), digits) for v in values]


def exact(values):
    """Nine significant digits: enough to give back every float32."""
    return [float(f"{float(v):.9g}") for v in values]


def routing(logits_by_router):
    """-> experts, probabilities and top-2 gaps, each {router module: [one per token]}."""
    experts, probabilities, gaps = {}, {}, {}
    for name, logits in logits_by_router.items():
        probability = torch.softmax(logits, dim=-1)
        best = probability.topk(min(2, probability.shape[-1]), dim=-1).values
        second = best[:, 1] if best.shape[-1] > 1 else torch.zeros_like(best[:, 0])
        experts[name] = probability.argmax(-1).tolist()
        probabilities[name] = rounded(best[:, 0])
        gaps[name] = rounded(best[:, 0] - second)
    return experts, probabilities, gaps


def dropped(experts, capacity):
    """-> {router module: positions beyond the capacity} of one sequence that went through the stack in one call."""
    positions = {}
    for name, choices in experts.items():
        count, over = {}, []
        for position, expert in enumerate(choices):
            count[expert] = count.get(expert, 0) + 1
            if count[expert] > capacity:
                over.append(position)
        positions[name] = over
    return positions


def logits_summary(logits):
    """logits (vocabulary,) -> all of them for a small vocabulary, else the largest and sums that cover the rest."""
    wide = logits.double()
    sums = {"sum": float(wide.sum()), "abs_sum": float(wide.abs().sum())}
    if logits.numel() <= FULL_LOGITS_VOCABULARY_MAX:
        return {"ids": None, "logits": exact(logits), **sums}
    top = logits.topk(TOP_LOGITS)
    return {"ids": top.indices.tolist(), "logits": exact(top.values), **sums}


@torch.inference_mode()
def golden_case(model, recorder, case, tokenizer, max_new_tokens, capacity):
    """Runs one case; capacity is the number of tokens per expert and sequence, or None where nothing is dropped."""
    input_ids = case.get("input_ids") or tokenizer.encode(case["text"]).ids
    ids = torch.tensor([input_ids])
    out = {key: case.get(key) for key in ("task", "text", "label")}
    out |= {"input_ids": input_ids, "max_new_tokens": max_new_tokens}

    states = model.encoder(input_ids=ids).last_hidden_state[0]  # (tokens, d_model)
    flat = states.flatten()
    out["encoder"] = {
        "mean": float(flat.mean()),
        "std": float(flat.std()),
        "first8": exact(flat[:8]),
        "last8": exact(flat[-8:]),
    }
    encoder_experts, encoder_probs, encoder_gaps = routing(recorder.take("encoder"))

    # transformers sizes the decoder's cache by the encoder's layers, so a longer decoder runs without one: each call then
    # takes all tokens again, and the last call's routing is that of the whole sequence.
    use_cache = model.config.num_decoder_layers <= model.config.num_layers
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    recorder.take("encoder")  # generate ran the encoder again
    step_logits = torch.cat(generated.logits)  # (steps, vocabulary)
    top = step_logits[0].topk(5)
    top2 = step_logits.topk(2).values
    greedy_ids = generated.sequences[0].tolist()
    out["first_step_top5"] = [[int(i), float(v)] for i, v in zip(top.indices, top.values)]
    out["first_step_logits"] = logits_summary(step_logits[0])
    out["greedy_ids"] = greedy_ids
    if tokenizer is not None:
        out["greedy_text"] = tokenizer.decode(greedy_ids, skip_special_tokens=False)
    out["greedy_gaps"] = rounded(top2[:, 0] - top2[:, 1])
    out |= {"encoder_experts": encoder_experts, "encoder_probs": encoder_probs, "encoder_gaps": encoder_gaps}
    decoder = routing(recorder.take("decoder", slice(None) if use_cache else slice(-1, None)))
    out |= dict(zip(("decoder_experts", "decoder_probs", "decoder_gaps"), decoder))

    draw = random.Random(len(input_ids))
    start = model.config.decoder_start_token_id
    forced_ids = [start] + [draw.randrange(3, model.config.vocab_size) for _ in range(FORCED_TOKENS - 1)]
    forced = model(
        encoder_outputs=MoEModelOutput(last_hidden_state=states[None]),
        attention_mask=torch.ones_like(ids),
        decoder_input_ids=torch.tensor([forced_ids]),
        use_cache=False,
    ).logits[0]
    forced_experts, _, forced_gaps = routing(recorder.take("decoder"))
    out["forced"] = {
        "decoder_input_ids": forced_ids,
        "last_logits": logits_summary(forced[-1]),
        "experts": forced_experts,
        "gaps": forced_gaps,
    }
    if capacity is not None:
        out["encoder_dropped"] = dropped(encoder_experts, capacity)
        out["forced"]["dropped"] = dropped(forced_experts, capacity)
    return out


def golden(model_dir, cases, max_new_tokens, enforce_capacity=False):
    """-> the contents of golden.json. Set enforce_capacity where the installed transformers enforces it."""
    torch.set_num_threads(2)
    model = SwitchTransformersForConditionalGeneration.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = None
    if (Path(model_dir) / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(Path(model_dir) / "tokenizer.json"))
    recorder = RouterRecorder(model)
    capacity = model.config.expert_capacity if enforce_capacity else None
    return {
        "note": "float32, CPU, batch 1, eager attention; fields are described in tests/parity/make_golden.py",
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "enforce_capacity": enforce_capacity,
        "cases": [golden_case(model, recorder, case, tokenizer, max_new_tokens, capacity) for case in cases],
    }


def smallest_gaps(contents):
    """-> (smallest router gap, smallest greedy gap): how near the golden file comes to a tie."""
    router = [
        gap
        for case in contents["cases"]
        for gaps in (case["encoder_gaps"], case["decoder_gaps"], case["forced"]["gaps"])
        for values in gaps.values()
        for gap in values
    ]
    greedy = [gap for case in contents["cases"] for gap in case["greedy_gaps"]]
    return min(router, default=1.0), min(greedy)


def write_json(path, contents):
    """One case a line, so that a regenerated file makes a readable diff."""
    cases = ",\n".join(json.dumps(case, ensure_ascii=False) for case in contents["cases"])
    head = {key: value for key, value in contents.items() if key != "cases"}
    body = json.dumps(head, ensure_ascii=False, indent=1)[:-2] + f',\n "cases": [\n{cases}\n]\n}}\n'
    assert json.loads(body) == contents
    Path(path).write_text(body, encoding="utf-8")


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("model_dir", type=Path)
    arguments.add_argument("--cases", type=Path, required=True, help="JSON list of {task, text or input_ids, label}")
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--max-new-tokens", type=int, default=40)
    arguments.add_argument("--enforce-capacity", action="store_true")
    options = arguments.parse_args()
    cases = json.loads(options.cases.read_text(encoding="utf-8"))
    contents = golden(options.model_dir, cases, options.max_new_tokens, options.enforce_capacity)
    write_json(options.out, contents)
    router, greedy = smallest_gaps(contents)
    print(f"{options.out}: {len(cases)} cases, smallest router gap {router:.2e}, smallest greedy gap {greedy:.2e}")


if __name__ == "__main__":
    main()
