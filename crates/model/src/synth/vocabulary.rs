//! A tokenizer for a checkpoint that never saw a text: every English text becomes tokens with varied ids,
//! any other text becomes bytes, and every id is within the vocabulary.

use serde_json::{Value, json};

use super::{
    SynthError,
    random::{StreamSeed, shuffled},
};

const SPECIAL: [&str; 3] = ["<pad>", "</s>", "<unk>"];
const EXTRA_IDS: usize = 100;
/// Smaller vocabularies spend no ids on sentinels.
const VOCAB_WITH_EXTRA_IDS_MIN: usize = 1000;
/// The special tokens and every printable ASCII character.
const VOCAB_MIN: usize = 98;
/// A larger one is beyond what pieces of four letters fill.
const VOCAB_MAX: usize = 400_000;
/// All pieces are equally likely, so that a word becomes as few of them as possible.
const PIECE_SCORE: f64 = -10.0;

/// `tokenizer.json` of exactly `vocab_size` tokens: `<pad>`, `</s>`, `<unk>`, printable ASCII, the 256
/// bytes, runs of one to four letters with and without a space before them, and, at the end as T5 has them,
/// `<extra_id_99>` to `<extra_id_0>`. Every text ends with `</s>` if `has_end`.
pub(super) fn tokenizer(vocab_size: usize, has_end: bool) -> Result<Value, SynthError> {
    if !(VOCAB_MIN..=VOCAB_MAX).contains(&vocab_size) {
        return Err(SynthError::Vocabulary { found: vocab_size, min: VOCAB_MIN, max: VOCAB_MAX });
    }
    let extra_ids = if vocab_size < VOCAB_WITH_EXTRA_IDS_MIN { 0 } else { EXTRA_IDS };
    let mut vocab: Vec<(String, f64)> = SPECIAL.map(|token| (token.to_owned(), 0.0)).to_vec();
    let pieces = pieces().take(vocab_size - extra_ids - SPECIAL.len());
    vocab.extend(pieces.map(|piece| (piece, PIECE_SCORE)));
    vocab.extend((0..extra_ids).rev().map(|n| (format!("<extra_id_{n}>"), 0.0)));
    let is_special = |id: usize| id < SPECIAL.len() || id >= vocab_size - extra_ids;
    let added: Vec<Value> = (vocab.iter().enumerate())
        .filter(|&(id, _)| is_special(id))
        .map(|(id, (content, _))| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let byte_fallback = vocab.iter().any(|(piece, _)| piece == "<0xFF>");
    let metaspace = json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true});
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
        "post_processor": if has_end { end() } else { Value::Null },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, metaspace]},
        "model": {"type": "Unigram", "unk_id": 2, "byte_fallback": byte_fallback, "vocab": vocab},
    }))
}

/// Puts `</s>` behind every text.
fn end() -> Value {
    json!({
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}},
        ],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    })
}

/// Distinct pieces, the most needed first.
fn pieces() -> impl Iterator<Item = String> {
    let characters = (b'!'..=b'~').map(|byte| char::from(byte).to_string()).chain(["\u{2581}".to_owned()]);
    let bytes = (0..=255u8).map(|byte| format!("<0x{byte:02X}>"));
    let short = words(1).map(spaced).chain(words(2)).chain(words(2).map(spaced));
    // A vocabulary that ends among these holds some of every letter.
    let long = shuffled(StreamSeed::new(0, "pieces"), words(3).chain(words(3).map(spaced)).collect());
    characters.chain(bytes).chain(short).chain(long).chain(words(4))
}

/// A piece that starts a word.
fn spaced(piece: String) -> String {
    format!("\u{2581}{piece}")
}

/// All runs of so many lower-case letters.
fn words(letters: u32) -> impl Iterator<Item = String> {
    (0..26usize.pow(letters))
        .map(move |n| (0..letters).rev().map(|place| char::from(b'a' + (n / 26usize.pow(place) % 26) as u8)).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use tokenizers::Tokenizer;

    use super::*;

    fn open(vocab_size: usize) -> Tokenizer {
        tokenizer(vocab_size, true).unwrap().to_string().parse().unwrap()
    }

    /// A text would become tokens that the model does not have, or the same token over and over.
    #[test]
    fn texts_become_varied_ids_of_the_vocabulary() {
        let text = "A gorgeous , witty , seductive movie: the Year 2024 in caf\u{e9}s, \u{4e2d}\u{6587}!";
        for vocab_size in [98, 512, 1000, 8192, 32128, 60_000] {
            let tokenizer = open(vocab_size);
            assert_eq!(tokenizer.get_vocab_size(true), vocab_size);
            let ids = tokenizer.encode(text, true).unwrap().get_ids().to_vec();
            assert!(ids.iter().all(|&id| (id as usize) < vocab_size));
            assert_eq!(ids.last(), Some(&1));
            let distinct: HashSet<_> = ids.iter().collect();
            assert!(distinct.len() * 3 > ids.len(), "{vocab_size}: {ids:?}");
            if vocab_size > 400 {
                assert!(!ids.contains(&2), "{vocab_size}: {ids:?}");
                assert_eq!(tokenizer.decode(&ids[..ids.len() - 1], false).unwrap(), text);
            }
        }
    }

    /// Two tokens would share a text, and one of them could never be produced.
    #[test]
    fn pieces_are_distinct() {
        let all: Vec<String> = pieces().take(60_000).collect();
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
    }
}
