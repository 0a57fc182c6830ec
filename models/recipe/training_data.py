"""Batches for train.py from what prepare_data.py wrote: labelled tasks, and T5's span corruption of running text."""

import json

import numpy as np
import torch

EOS = 1
# 141 tokens of text with 7 spans of 21 tokens hidden give 128 input and 29 target tokens.
WINDOW, HIDDEN, SPANS = 141, 21, 7


class TrainingData:
    def __init__(self, directory, device):
        self.device = device
        self.arrays = np.load(directory / "data.npz")
        self.tasks = json.loads((directory / "tasks.json").read_text())
        self.stream = torch.from_numpy(self.arrays["corpus"].astype(np.int64)).to(device)
        tokenizer = json.loads((directory / "tokenizer/tokenizer.json").read_text())
        self.vocabulary = len(tokenizer["model"]["vocab"])
        self.examples = {}
        for task, described in self.tasks.items():
            for split in ("train", "validation"):
                inputs = padded(self.rows(f"{task}_{split}"), described["input_tokens_max"], 0)
                labels = torch.from_numpy(self.arrays[f"{task}_{split}_labels"])
                self.examples[task, split] = inputs.to(device), labels.to(device)

    def rows(self, name):
        ids, ends = self.arrays[name].astype(np.int64), self.arrays[f"{name}_ends"]
        return np.split(ids, ends[:-1])

    def label_targets(self, task):
        """-> (labels, tokens), padded with -100."""
        rows = self.tasks[task]["label_ids"]
        return padded(rows, max(map(len, rows)), -100).to(self.device)

    def task_batch(self, task, rows):
        inputs, labels = self.examples[task, "train"]
        chosen = torch.randint(len(inputs), (rows,), device=self.device)
        return inputs[chosen], self.label_targets(task)[labels[chosen]]

    def span_batch(self, rows):
        start = torch.randint(self.stream.numel() - WINDOW, (rows, 1), device=self.device)
        return corrupt(self.stream[start + torch.arange(WINDOW, device=self.device)], self.vocabulary)

    def heldout_batch(self):
        """One window of every held-out document that is long enough, hidden in the same places every time."""
        windows = [row[row != EOS][:WINDOW] for row in self.rows("heldout")]
        windows = [torch.from_numpy(window) for window in windows if len(window) == WINDOW]
        if not windows:
            return None
        with torch.random.fork_rng():
            torch.manual_seed(0)
            inputs, targets = corrupt(torch.stack(windows), self.vocabulary)
        return inputs.to(self.device), targets.to(self.device)


def padded(rows, width, filler):
    table = torch.full((len(rows), width), filler)
    for index, row in enumerate(rows):
        table[index, : len(row)] = torch.as_tensor(np.asarray(row))
    return table


def random_lengths(rows, total, parts, device):
    """-> (rows, parts) positive integers that add up to total in each row."""
    cuts = torch.rand(rows, total - 1, device=device).topk(parts - 1, dim=1).indices.sort(1).values + 1
    zero = torch.zeros(rows, 1, dtype=cuts.dtype, device=device)
    return torch.cat([zero, cuts, zero + total], 1).diff(dim=1)


def corrupt(text, vocabulary):
    """text (rows, WINDOW) -> inputs with a sentinel in place of each hidden span, and targets that name and fill them."""
    rows, device = text.shape[0], text.device
    shown = random_lengths(rows, WINDOW - HIDDEN, SPANS, device)
    hidden = random_lengths(rows, HIDDEN, SPANS, device)
    ends = torch.stack([shown, hidden], 2).flatten(1).cumsum(1)  # shown and hidden spans in turn
    place = torch.arange(WINDOW, device=device).expand(rows, WINDOW).contiguous()
    span = torch.searchsorted(ends, place, right=True)
    is_hidden = span % 2 == 1
    starts = is_hidden & (span != torch.cat([torch.full_like(span[:, :1], -1), span[:, :-1]], 1))
    sentinel = vocabulary - 1 - span // 2
    end = torch.full((rows, 1), EOS, device=device)

    # Sorting by position, with the unwanted positions pushed past the end, packs what is kept in order.
    order = torch.where(is_hidden & ~starts, place + WINDOW, place).argsort(1)[:, : WINDOW - HIDDEN + SPANS]
    inputs = torch.where(starts, sentinel, text).gather(1, order)
    candidates = torch.cat([sentinel, text], 1)  # each hidden token, and a sentinel just before the first of a span
    rank = torch.cat([2 * place, 2 * place + 1], 1)
    rank = torch.where(torch.cat([starts, is_hidden], 1), rank, rank + 4 * WINDOW)
    targets = candidates.gather(1, rank.argsort(1)[:, : HIDDEN + SPANS])
    return torch.cat([inputs, end], 1), torch.cat([targets, end], 1)
