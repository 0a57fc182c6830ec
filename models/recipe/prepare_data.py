"""Step 1: trains the tokenizer and turns text into token ids. Reads the data sets' own files; see README.md for them.

    OUT/tokenizer/   tokenizer.json, tokenizer_config.json, special_tokens_map.json
    OUT/data.npz     ragged arrays of ids, each as NAME (all ids) and NAME_ends (where each row ends):
                     corpus, heldout, and TASK_SPLIT for every task with its labels in TASK_SPLIT_labels
    OUT/tasks.json   label texts and ids of every task, and how many tokens of an input are kept
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SENTINELS = 100  # <extra_id_0> has the highest id, as in T5
BASE_TOKENS = ["<pad>", "</s>", "<unk>"]
EOS = 1
HELDOUT_DOCUMENTS = 400
HELDOUT_CHARACTERS_MIN = 400
INPUT_TOKENS_MAX = {"sst2": 80, "mrpc": 128, "multirc": 256}
LABELS = {
    "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"],
    "multirc": ["False", "True"],
}


def read_sst2(directory, split):
    """GLUE's TSV: sentence, label. -> [(input text, label index)]"""
    rows = (directory / f"{split}.tsv").read_text(encoding="utf-8").split("\n")[1:]
    fields = [row.split("\t") for row in rows if "\t" in row]
    return [(f"sst2 sentence: {sentence.strip()}", int(label)) for sentence, label in fields]


def read_mrpc(directory, split):
    """The corpus's TSV: label, two ids, two sentences. Its test set serves for validation."""
    file = directory / ("train.tsv" if split == "train" else "test.tsv")
    fields = [row.rstrip("\r").split("\t") for row in file.read_text(encoding="utf-8-sig").split("\n")[1:]]
    return [
        (f"mrpc sentence1: {row[3].strip()} sentence2: {row[4].strip()}", int(row[0])) for row in fields if len(row) == 5
    ]


def read_multirc(directory, split):
    """SuperGLUE's JSON lines: one example per answer of every question of a passage."""
    examples = []
    for line in (directory / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        passage = json.loads(line)["passage"]
        for question in passage["questions"]:
            for answer in question["answers"]:
                text = f"multirc question: {question['question'].strip()} answer: {answer['text'].strip()}"
                examples.append((f"{text} paragraph: {passage['text'].strip()}", int(answer["label"])))
    return examples


READERS = {"sst2": read_sst2, "mrpc": read_mrpc, "multirc": read_multirc}


def evaluation_passages(tasks):
    """Every text of a validation split that a document could repeat: whole sentences, and heads of MultiRC passages."""
    sentences, heads = set(), set()
    for text, _ in tasks["sst2", "validation"]:
        sentences.add(squeezed(text.removeprefix("sst2 sentence:")))
    for text, _ in tasks["mrpc", "validation"]:
        sentences.update(map(squeezed, text.removeprefix("mrpc sentence1:").split(" sentence2:")))
    for text, _ in tasks["multirc", "validation"]:
        heads.add(squeezed(text.split(" paragraph:", 1)[1])[:50])
    return sentences, heads


def squeezed(text):
    return " ".join(text.split())


def split_corpus(documents, tasks, seed):
    """-> documents to train on, held-out documents. Documents that begin alike stay on one side."""
    sentences, heads = evaluation_passages(tasks)
    documents = [text for text in documents if squeezed(text) not in sentences and squeezed(text)[:50] not in heads]
    draw = random.Random(seed)
    families = sorted({text[:25] for text in documents if len(text) >= HELDOUT_CHARACTERS_MIN})
    draw.shuffle(families)
    chosen = set(families[: min(HELDOUT_DOCUMENTS, len(families) // 10)])
    heldout, train = {}, []
    for text in documents:
        if len(text) >= HELDOUT_CHARACTERS_MIN and text[:25] in chosen:
            heldout.setdefault(text[:25], text)
        else:
            train.append(text)
    draw.shuffle(train)
    return train, list(heldout.values())


def train_tokenizer(texts, vocabulary):
    """A unigram model over whitespace-split words, with T5's special tokens and sentinels."""
    split_words = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always", split=True)]
    )
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = split_words
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary - SENTINELS,
        special_tokens=BASE_TOKENS,
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["▁"],
        max_piece_length=16,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]["vocab"]
    pieces = [tuple(piece) for piece in learned if piece[0] not in BASE_TOKENS]
    pieces = pieces[: vocabulary - SENTINELS - len(BASE_TOKENS)]
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(SENTINELS))]
    entries = [(token, 0.0) for token in BASE_TOKENS] + pieces + [(token, 0.0) for token in sentinels]
    if len(entries) != vocabulary:
        raise SystemExit(f"the texts yield {len(entries)} pieces, --vocabulary asks for {vocabulary}")
    tokenizer = Tokenizer(models.Unigram(entries, unk_id=BASE_TOKENS.index("<unk>"), byte_fallback=False))
    tokenizer.pre_tokenizer = split_words
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in BASE_TOKENS + sentinels])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", EOS)]
    )
    return tokenizer


def save_tokenizer(tokenizer, directory):
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    tokens = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokens["additional_special_tokens"] = [f"<extra_id_{number}>" for number in range(SENTINELS)]
    kind = {"tokenizer_class": "T5Tokenizer", "extra_ids": SENTINELS, "model_max_length": 512}
    write = lambda name, contents: (directory / name).write_text(json.dumps(contents, indent=1) + "\n")
    write("special_tokens_map.json", tokens)
    write("tokenizer_config.json", kind | tokens | {"clean_up_tokenization_spaces": False})


def ragged(name, rows):
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    return {name: np.concatenate([np.asarray(row, dtype=np.uint16) for row in rows]), f"{name}_ends": ends}


def cut(ids, length):
    """The first tokens, always ending with </s>."""
    return ids if len(ids) <= length else ids[: length - 1] + [EOS]


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for task in READERS:
        arguments.add_argument(f"--{task}", type=Path, required=True, help=f"directory of {task}'s train and test files")
    arguments.add_argument("--text", type=Path, required=True, help="pretraining text, one document a line")
    arguments.add_argument("--vocabulary", type=int, default=8192)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, required=True)
    options = arguments.parse_args()

    splits = [(task, split) for task in READERS for split in ("train", "validation")]
    tasks = {(task, split): READERS[task](getattr(options, task), split) for task, split in splits}
    documents = [line for line in options.text.read_text(encoding="utf-8").split("\n") if line.strip()]
    train, heldout = split_corpus(documents, tasks, options.seed)
    # MultiRC repeats each passage for every answer; a tenth of it is enough for the tokenizer.
    samples = [f"{text} {LABELS[task][label]}" for task in READERS
               for text, label in tasks[task, "train"][:: 10 if task == "multirc" else 1]]
    tokenizer = train_tokenizer(train + samples, options.vocabulary)
    save_tokenizer(tokenizer, options.out / "tokenizer")

    encode = lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    arrays = ragged("corpus", encode(train)) | ragged("heldout", encode(heldout))
    for task, split in splits:
        inputs, labels = zip(*tasks[task, split])
        arrays |= ragged(f"{task}_{split}", [cut(ids, INPUT_TOKENS_MAX[task]) for ids in encode(list(inputs))])
        arrays[f"{task}_{split}_labels"] = np.array(labels, dtype=np.int64)
    np.savez_compressed(options.out / "data.npz", **arrays)
    described = {task: {"labels": LABELS[task], "label_ids": encode(LABELS[task]), "input_tokens_max": limit}
                 for task, limit in INPUT_TOKENS_MAX.items()}
    (options.out / "tasks.json").write_text(json.dumps(described, indent=1) + "\n")
    print(f"{len(train)} documents, {len(arrays['corpus'])} tokens; {len(heldout)} documents held out")


if __name__ == "__main__":
    main()
