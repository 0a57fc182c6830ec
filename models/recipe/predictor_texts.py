"""Text for `sida train-predictor`: a line an example, `input<TAB>target`, as the model saw them in training.

    OUT/train.txt      to learn from
    OUT/held-out.txt   to measure with: validation splits, and documents that no model of ours was trained on

Nothing here reads or trains a model; the targets are what the data sets say.
"""

import argparse
import random
from pathlib import Path

from prepare_data import LABELS, READERS, split_corpus, squeezed

# Examples of each kind in train.txt, unless more are asked for, and in held-out.txt. Prompts of MultiRC are ten times as long as SST-2's.
COUNTS = {"sst2": (16000, 872), "mrpc": (4076, 500), "multirc": (2000, 250), "spans": (7000, 400), "plain": (1500, 100)}
DOCUMENT_WORDS_MAX = 90
DOCUMENT_WORDS_MIN = 12
NOISE, SPAN_WORDS = 0.15, 2


def task_line(task, example):
    text, label = example
    return f"{squeezed(text)}\t{LABELS[task][label]}"


def window(document, draw):
    """A run of a document's words."""
    words = document.split()
    length = min(len(words), draw.randint(DOCUMENT_WORDS_MIN, DOCUMENT_WORDS_MAX))
    start = draw.randint(0, len(words) - length)
    return words[start : start + length]


def spans_line(document, draw):
    """Span corruption by words: each hidden span becomes a sentinel, which names it in the target."""
    words = window(document, draw)
    spans = max(1, round(len(words) * NOISE / SPAN_WORDS))
    starts = sorted(draw.sample(range(0, len(words) - SPAN_WORDS, SPAN_WORDS + 1), spans))
    shown, hidden, at = [], [], 0
    for number, start in enumerate(starts):
        shown += words[at:start] + [f"<extra_id_{number}>"]
        hidden += [f"<extra_id_{number}>"] + words[start : start + SPAN_WORDS]
        at = start + SPAN_WORDS
    return f"{' '.join(shown + words[at:])}\t{' '.join(hidden)}"


def lines(kinds, documents, counts, draw):
    """`kinds` maps a task to its examples, `counts` a kind to how many there are to be."""
    out = []
    for task, examples in kinds.items():
        chosen = draw.sample(examples, min(counts[task], len(examples)))
        out += [task_line(task, example) for example in chosen]
    out += [spans_line(draw.choice(documents), draw) for _ in range(counts["spans"])]
    # Without a target the model answers by itself, as it will for its users.
    out += [" ".join(window(draw.choice(documents), draw)) for _ in range(counts["plain"])]
    draw.shuffle(out)
    return out


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for task in READERS:
        arguments.add_argument(f"--{task}", type=Path, required=True, help=f"directory of {task}'s train and test files")
    arguments.add_argument("--text", type=Path, required=True, help="pretraining text, one document a line")
    arguments.add_argument("--times", type=int, default=1, help="so many times as much to learn from, as far as there is")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, required=True)
    options = arguments.parse_args()

    splits = [(task, split) for task in READERS for split in ("train", "validation")]
    tasks = {(task, split): READERS[task](getattr(options, task), split) for task, split in splits}
    documents = [line for line in options.text.read_text(encoding="utf-8").split("\n") if line.strip()]
    sides = split_corpus(documents, tasks, seed=0)
    draw = random.Random(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    for column, (name, split) in enumerate((("train", "train"), ("held-out", "validation"))):
        long_enough = [text for text in sides[column] if len(text.split()) >= DOCUMENT_WORDS_MIN]
        examples = {task: tasks[task, split] for task in READERS}
        times = options.times if name == "train" else 1
        counts = {kind: numbers[column] * times for kind, numbers in COUNTS.items()}
        text = "\n".join(lines(examples, long_enough, counts, draw)) + "\n"
        (options.out / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}.txt: {text.count(chr(10))} lines, {len(text.split())} words")


if __name__ == "__main__":
    main()
