"""Step 1 for decoder-only models: trains the tokenizer and turns books and articles into token ids. See README.md.

    OUT/tokenizer/       tokenizer.json, tokenizer_config.json, special_tokens_map.json
    OUT/train.xz         all ids to train on, 16 bits each, <|endoftext|> after every document
    OUT/heldout.xz       the same of books that training does not see
    OUT/heldout.txt      their text, a passage a line, its last words behind a tab: what `sida train-predictor` reads
    OUT/train.txt        some of the text that training does see, likewise
"""

import argparse
import json
import lzma
import random
from pathlib import Path

import numpy as np
from book_texts import articles, books, sentence_length
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
END_ID = 0
HELDOUT_CHARACTERS = 1_500_000
HELDOUT_ARTICLES = 150
PART_CHARACTERS = 20_000
PASSAGE_CHARACTERS = 700
PREDICTOR_CHARACTERS = 6_000_000
TARGET_WORDS = 6
# Ids of two bytes: what LZMA knows of positions, it knows of whole ids.
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 1, "pb": 1, "dict_size": 1 << 27}]
# What may not be joined in one piece: a word with the space before it, digits one by one, signs, line ends.
WORDS = r"'(?:s|t|re|ve|m|ll|d)\b| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*\n|\s+"


def simplest(documents, characters):
    """The documents with the shortest sentences, as many as are allowed together."""
    out = []
    for document in sorted(documents, key=lambda document: sentence_length(document[1])):
        characters -= len(document[1])
        if characters < 0:
            break
        out.append(document)
    return out


def split(documents, heldout_characters, draw):
    """-> documents to train on, documents held out. All of a book is on one side."""
    names = sorted({name for name, _ in documents})
    draw.shuffle(names)
    sizes = {name: 0 for name in names}
    for name, text in documents:
        sizes[name] += len(text)
    chosen, room = set(), heldout_characters
    for name in names:
        if sizes[name] <= room:
            chosen.add(name)
            room -= sizes[name]
    train = [text for name, text in documents if name not in chosen]
    return train, [text for name, text in documents if name in chosen]


def train_tokenizer(texts, vocabulary):
    """Byte-pair encoding over bytes, so that every text has ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise SystemExit(f"the texts yield {tokenizer.get_vocab_size()} pieces, --vocabulary asks for {vocabulary}")
    return tokenizer


def save_tokenizer(tokenizer, directory):
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    tokens = {"eos_token": END, "pad_token": END}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "clean_up_tokenization_spaces": False}
    for name, contents in (("special_tokens_map.json", tokens), ("tokenizer_config.json", kind | tokens)):
        (directory / name).write_text(json.dumps(contents, indent=1) + "\n")


def write_ids(path, tokenizer, texts):
    ids = [np.array(encoding.ids + [END_ID], dtype=np.uint16) for encoding in tokenizer.encode_batch_fast(texts)]
    joined = np.concatenate(ids)
    path.write_bytes(lzma.compress(joined.tobytes(), filters=XZ))
    print(f"{path.name}: {len(texts)} documents, {len(joined)} tokens, {path.stat().st_size} bytes", flush=True)


def passages(texts):
    """-> paragraphs joined to passages of some length, each one line: what a predictor trains on. The last words stand behind
    a tab as the answer, so that only what people wrote is learnt from, and the model need not write one first."""
    out = []
    for text in texts:
        lines = text.split("\n")
        while lines:
            passage = lines.pop(0)
            while lines and len(passage) < PASSAGE_CHARACTERS:
                passage += " " + lines.pop(0)
            words = passage[: 2 * PASSAGE_CHARACTERS].split()
            if len(words) > 2 * TARGET_WORDS:
                out.append(" ".join(words[:-TARGET_WORDS]) + "\t" + " ".join(words[-TARGET_WORDS:]))
    return out


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--books", type=Path, required=True, help="directory of .txt, .xml (TEI) and .xhtml files")
    arguments.add_argument("--articles", type=Path, required=True, help="text file, one document a line: TITLE -- TEXT")
    arguments.add_argument("--characters", type=int, default=150_000_000, help="of books, at most; the simplest are taken")
    arguments.add_argument("--tokenizer-characters", type=int, default=30_000_000, help="of text the tokenizer learns from")
    arguments.add_argument("--vocabulary", type=int, default=8192)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, required=True)
    options = arguments.parse_args()

    draw = random.Random(options.seed)
    train, heldout = split(simplest(books(options.books), options.characters), HELDOUT_CHARACTERS, draw)
    short = articles(options.articles)
    draw.shuffle(short)
    heldout += [text for _, text in short[:HELDOUT_ARTICLES]]
    train += [text for _, text in short[HELDOUT_ARTICLES:]]
    draw.shuffle(train)

    # Novels and stories have the same say in the tokenizer, and in the passages, by parts of one length.
    parts = [text[start : start + PART_CHARACTERS] for text in train for start in range(0, len(text), PART_CHARACTERS)]
    draw.shuffle(parts)
    tokenizer = train_tokenizer(parts[: options.tokenizer_characters // PART_CHARACTERS], options.vocabulary)
    save_tokenizer(tokenizer, options.out / "tokenizer")
    write_ids(options.out / "heldout.xz", tokenizer, heldout)
    write_ids(options.out / "train.xz", tokenizer, train)
    (options.out / "heldout.txt").write_text("\n".join(passages(heldout)) + "\n", encoding="utf-8")
    some = passages(parts[: PREDICTOR_CHARACTERS // PART_CHARACTERS])
    (options.out / "train.txt").write_text("\n".join(some) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
