//! The bytes that each token adds to a text: what decides by text which tokens may be next needs them, and a tokenizer
//! has them only by the way it decodes. Two ways are known, which nearly all models have: bytes written as characters
//! (GPT-2's), and pieces of text with a mark for a blank (SentencePiece's), some of whose tokens are bytes.

use std::{char, collections::HashMap};

use serde_json::Value;

use crate::Tokenizer;

/// What JSON is made of, to see whether tokens spell it. Without blanks that some tokenizers join.
const PROBE: &str = r#"{"a_b": [1, -2.5e+30], "C": {"d": true, "x y": null, "z/\\": false}}"#;

/// How a tokenizer's tokens are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// Each byte is a character.
    ByteLevel,
    /// Text in which this is a blank. A token such as `<0x0A>` is a byte where there is a `byte_fallback`.
    Pieces { blank: char, byte_fallback: bool },
}

impl Tokenizer {
    /// The bytes of each of `vocab_size` tokens, none of those that have no text of their own and of special ones.
    /// `None`: the tokenizer decodes in a way that is not known here, or cannot spell JSON.
    pub fn token_bytes(&self, vocab_size: usize) -> Option<Vec<Vec<u8>>> {
        let spelling = spelling(&serde_json::to_value(self.inner.get_decoder()?).ok()?)?;
        let added = self.inner.get_added_tokens_decoder();
        let byte_of = byte_of();
        let bytes = |id: u32| {
            if self.hidden.binary_search(&id).is_ok() {
                return Vec::new();
            }
            match (added.get(&id), self.inner.id_to_token(id)) {
                (Some(token), _) if token.special => Vec::new(),
                (Some(token), _) => token.content.clone().into_bytes(),
                (None, Some(token)) => spelled(&token, spelling, &byte_of),
                (None, None) => Vec::new(),
            }
        };
        let all: Vec<Vec<u8>> = (0..u32::try_from(vocab_size).ok()?).map(bytes).collect();
        let ids = self.encode_as_written(PROBE).ok()?;
        let probe: Vec<u8> = ids.iter().filter_map(|&id| all.get(id as usize)).flatten().copied().collect();
        // A blank may come before a text, which decoding takes away.
        (probe.strip_prefix(b" ").unwrap_or(&probe) == PROBE.as_bytes()).then_some(all)
    }
}

/// How a decoder makes bytes of tokens, as tokenizer.json describes it.
fn spelling(decoder: &Value) -> Option<Spelling> {
    let parts = match decoder["decoders"].as_array() {
        Some(parts) => parts.iter().collect(),
        None => vec![decoder],
    };
    let of_kind = |kind: &str| parts.iter().copied().find(|part| part["type"] == kind);
    if of_kind("ByteLevel").is_some() {
        return Some(Spelling::ByteLevel);
    }
    let replaced = || of_kind("Replace").filter(|part| part["content"] == " ")?["pattern"]["String"].as_str();
    let blank = of_kind("Metaspace").and_then(|part| part["replacement"].as_str()).or_else(replaced)?;
    let mut chars = blank.chars();
    match (chars.next(), chars.next()) {
        (Some(blank), None) => Some(Spelling::Pieces { blank, byte_fallback: of_kind("ByteFallback").is_some() }),
        _ => None,
    }
}

/// The bytes of a token of the vocabulary; none where it is no text.
fn spelled(token: &str, spelling: Spelling, byte_of: &HashMap<char, u8>) -> Vec<u8> {
    match spelling {
        Spelling::ByteLevel => {
            token.chars().map(|c| byte_of.get(&c).copied()).collect::<Option<_>>().unwrap_or_default()
        }
        Spelling::Pieces { blank, byte_fallback } => {
            let hex = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
            let byte =
                hex.filter(|hex| byte_fallback && hex.len() == 2).and_then(|hex| u8::from_str_radix(hex, 16).ok());
            byte.map_or_else(|| token.replace(blank, " ").into_bytes(), |byte| vec![byte])
        }
    }
}

/// The byte that each character stands for in GPT-2's vocabulary: those that print stand for themselves, the others for the
/// characters from 256 on.
fn byte_of() -> HashMap<char, u8> {
    let prints = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let (printed, others): (Vec<u8>, Vec<u8>) = (0..=u8::MAX).partition(prints);
    let themselves = printed.into_iter().map(|byte| (char::from(byte), byte));
    let moved = (256..).filter_map(char::from_u32).zip(others);
    themselves.chain(moved).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::ModelConfig;

    #[test]
    fn tokens_spell_what_they_decode_to() {
        // Would break: an answer is held to a schema by other texts than its tokens have.
        let models = ["models/switch-tiny-64", "tests/data/parity/causal-text"];
        for model in models.map(|model| Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(model)) {
            let config = ModelConfig::open(&model).expect("config");
            let tokenizer = Tokenizer::open(&model, &config).expect("tokenizer");
            let all = tokenizer.token_bytes(config.vocab_size).expect("known");
            assert_eq!(all.len(), config.vocab_size);
            let before = tokenizer.encode_as_written("a").expect("tokens");
            let alone = tokenizer.decode(&before).expect("text");
            let shown = (0..config.vocab_size as u32).filter(|&id| !all[id as usize].is_empty());
            let mut compared = 0;
            for id in shown.step_by(7) {
                let text = tokenizer.decode(&[&before[..], &[id]].concat()).expect("text");
                // Part of a character has no text of its own.
                if let Ok(bytes) = str::from_utf8(&all[id as usize]) {
                    assert_eq!(text.strip_prefix(&alone), Some(bytes), "token {id} of {}", model.display());
                    compared += 1;
                }
            }
            assert!(compared > 10, "{compared}");
            assert!(config.generation.eos_token_ids.iter().all(|&end| all[end as usize].is_empty()));
        }
    }

    #[test]
    fn ways_to_decode_are_told_apart() {
        // Would break: tokens of one kind are read as those of another, and every answer under a schema is noise.
        let pieces = |blank, byte_fallback| Some(Spelling::Pieces { blank, byte_fallback });
        let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
        for (decoder, expected) in [
            (json!({"type": "ByteLevel"}), Some(Spelling::ByteLevel)),
            (json!({"type": "Sequence", "decoders": [{"type": "ByteLevel"}]}), Some(Spelling::ByteLevel)),
            (json!({"type": "Metaspace", "replacement": "▁"}), pieces('▁', false)),
            (
                json!({"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]}),
                pieces('▁', true),
            ),
            (json!({"type": "WordPiece"}), None),
            (json!({"type": "Replace", "pattern": {"String": "ab"}, "content": " "}), None),
        ] {
            assert_eq!(spelling(&decoder), expected, "{decoder}");
        }
        let byte_of = byte_of();
        assert_eq!(byte_of.len(), 256);
        assert_eq!(spelled("Ġé", Spelling::ByteLevel, &byte_of), [b' ', 0xe9]);
        assert_eq!(spelled("Ċ", Spelling::ByteLevel, &byte_of), b"\n");
        let with_bytes = Spelling::Pieces { blank: '▁', byte_fallback: true };
        assert_eq!(spelled("<0x0A>", with_bytes, &byte_of), b"\n");
        assert_eq!(spelled("▁a▁", with_bytes, &byte_of), b" a ");
        assert_eq!(spelled("<0x0A>", Spelling::Pieces { blank: '▁', byte_fallback: false }, &byte_of), b"<0x0A>");
    }
}
