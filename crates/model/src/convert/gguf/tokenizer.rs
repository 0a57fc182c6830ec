//! The tokenizer of a GGUF file as tokenizer.json. A file holds tokens and which of them are joined; how a text is cut before that
//! it tells by a name alone (`tokenizer.ggml.pre`), which stands for what the model's own tokenizer.json says. The names of
//! the families that are served are known here.

use std::collections::{HashMap, HashSet};

use serde_json::{Value, json};

use super::{
    metadata::Metadata,
    tokens::{Kind, Tokens},
};
use crate::convert::ConvertError;

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
const ADD_BLANK: &str = "tokenizer.ggml.add_space_prefix";
/// What sentencepiece writes for a blank.
const BLANK: &str = "\u{2581}";

/// How a text is cut into words before its bytes are joined to tokens.
struct Cut {
    /// Names of `tokenizer.ggml.pre`.
    names: &'static [&'static str],
    /// A word; none: as GPT-2 has it.
    word: Option<&'static str>,
    /// Whether characters are composed first (Unicode's NFC).
    composes: bool,
    /// Whether a word that is a token is one, whatever would be joined.
    takes_words: bool,
    /// Whether a text begins with a token of its own where the file does not say.
    adds_bos: bool,
}

const CUTS: [Cut; 4] = [
    Cut {
        names: &["qwen2", "deepseek-r1-qwen"],
        word: Some(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        composes: true,
        takes_words: false,
        adds_bos: false,
    },
    Cut { names: &["olmo"], word: None, composes: true, takes_words: false, adds_bos: false },
    Cut { names: &["gpt-2"], word: None, composes: false, takes_words: false, adds_bos: false },
    Cut {
        names: &["llama-bpe", "llama3", "llama-v3"],
        word: Some(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        composes: false,
        takes_words: true,
        adds_bos: true,
    },
];

/// tokenizer.json.
pub(super) fn tokenizer(meta: &Metadata<'_>, tokens: &Tokens<'_>) -> Result<Value, ConvertError> {
    if meta.flag_if_any(ADD_EOS)? == Some(true) {
        return Err(meta.refuse(ADD_EOS, "true".to_owned(), "false: a text that is to go on has no end"));
    }
    match meta.text(MODEL)? {
        "gpt2" => of_bytes(meta, tokens),
        "llama" => of_pieces(meta, tokens),
        other => Err(meta.refuse(MODEL, format!("{other:?}"), "gpt2 or llama")),
    }
}

/// Joins bytes, each written as a character, by a list of what is joined first.
fn of_bytes(meta: &Metadata<'_>, tokens: &Tokens<'_>) -> Result<Value, ConvertError> {
    let pre = meta.text(PRE)?;
    let cut = CUTS.iter().find(|cut| cut.names.contains(&pre)).ok_or_else(|| {
        let known: Vec<&str> = CUTS.iter().flat_map(|cut| cut.names).copied().collect();
        meta.refuse(PRE, format!("{pre:?}"), format!("one of {}", known.join(", ")))
    })?;
    let known: HashSet<&str> = tokens.texts.iter().map(|text| &**text).collect();
    let mut merges = Vec::new();
    for merge in meta.texts(MERGES)? {
        // The first of the pair may begin with a blank, but is none.
        let at = merge.char_indices().skip(1).find(|&(_, character)| character == ' ').map(|(at, _)| at);
        let at = at.ok_or_else(|| meta.refuse(MERGES, format!("{merge:?}"), "two tokens and a blank between them"))?;
        let pair = [&merge[..at], &merge[at + 1..]];
        if !(pair.iter().all(|part| known.contains(part)) && known.contains(&*pair.concat())) {
            return Err(meta.refuse(
                MERGES,
                format!("{merge:?}"),
                "two tokens that are one together, all of the vocabulary",
            ));
        }
        merges.push(pair);
    }
    let bytes = |uses_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": uses_regex});
    let pre_tokenizer = match cut.word {
        None => bytes(true),
        Some(word) => json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": word}, "behavior": "Isolated", "invert": false},
            bytes(false),
        ]}),
    };
    let adds_bos = meta.flag_if_any(ADD_BOS)?.unwrap_or(cut.adds_bos);
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added(tokens),
        "normalizer": if cut.composes { json!({"type": "NFC"}) } else { Value::Null },
        "pre_tokenizer": pre_tokenizer,
        "post_processor": beginning(meta, tokens, adds_bos)?,
        "decoder": bytes(true),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": cut.takes_words,
            "vocab": vocabulary(meta, tokens)?,
            "merges": merges,
        },
    }))
}

/// Joins characters of a text whose blanks are written out, the likeliest pieces first, as sentencepiece does; a character that
/// is no piece is told by its bytes.
fn of_pieces(meta: &Metadata<'_>, tokens: &Tokens<'_>) -> Result<Value, ConvertError> {
    let scores = meta.floats(SCORES)?;
    if scores.len() != tokens.texts.len() {
        let expected = format!("one for each of {} tokens", tokens.texts.len());
        return Err(meta.refuse(SCORES, format!("a list of {}", scores.len()), expected));
    }
    let unknown = tokens.unknown.map(|id| tokens.texts[id].as_str());
    let blank = json!({"type": "Replace", "pattern": {"String": " "}, "content": BLANK});
    let adds_blank = meta.flag_if_any(ADD_BLANK)?.unwrap_or(true);
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": BLANK}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    let normalizer = if adds_blank {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": BLANK}, blank]})
    } else {
        blank
    };
    let adds_bos = meta.flag_if_any(ADD_BOS)?.unwrap_or(true);
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added(tokens),
        "normalizer": normalizer,
        "pre_tokenizer": null,
        "post_processor": beginning(meta, tokens, adds_bos)?,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": tokens.each().any(|(_, kind)| kind == Kind::Byte),
            "ignore_merges": false,
            "vocab": vocabulary(meta, tokens)?,
            "merges": joined(tokens, scores),
        },
    }))
}

/// All pairs of pieces that make up a third, the likeliest of those first; of equals those whose first piece is longer.
fn joined<'a>(tokens: &Tokens<'a>, scores: &[f32]) -> Vec<[&'a str; 2]> {
    let pieces = || tokens.each().zip(scores).filter(|((_, kind), _)| *kind == Kind::Normal);
    let ids: HashMap<&str, usize> = pieces().enumerate().map(|(id, ((text, _), _))| (text, id)).collect();
    let mut pairs = Vec::new();
    for ((text, _), &score) in pieces() {
        let mut own: Vec<_> = (text.char_indices().skip(1))
            .map(|(at, _)| text.split_at(at))
            .filter_map(|(first, second)| Some(((*ids.get(first)?, *ids.get(second)?), score, [first, second])))
            .collect();
        own.sort_by_key(|(ids, ..)| *ids);
        pairs.extend(own.into_iter().map(|(_, score, pair)| (score, pair)));
    }
    let length = |text: &str| text.chars().count();
    pairs.sort_by(|(a, first), (b, second)| {
        let lengths = |pair: &[&str; 2]| (length(pair[0]), length(pair[1]));
        b.total_cmp(a).then_with(|| lengths(second).cmp(&lengths(first)))
    });
    pairs.into_iter().map(|(_, pair)| pair).collect()
}

/// Tokens that texts can have, by their ids.
fn vocabulary(meta: &Metadata<'_>, tokens: &Tokens<'_>) -> Result<Value, ConvertError> {
    let mut vocabulary = serde_json::Map::new();
    for (id, (text, kind)) in tokens.each().enumerate() {
        if kind != Kind::Unused && vocabulary.insert(text.to_owned(), id.into()).is_some() {
            return Err(meta.refuse("tokenizer.ggml.tokens", format!("{text:?} twice"), "tokens that differ"));
        }
    }
    Ok(vocabulary.into())
}

/// Tokens that are found in a text before it is cut. Those of the model's own have no text.
fn added(tokens: &Tokens<'_>) -> Vec<Value> {
    let added = tokens.each().enumerate().filter_map(|(id, (text, kind))| {
        let is_special = matches!(kind, Kind::Control | Kind::Unknown);
        let token = json!({
            "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": is_special,
        });
        (is_special || kind == Kind::UserDefined).then_some(token)
    });
    added.collect()
}

/// What puts the token before a text that it begins with.
fn beginning(meta: &Metadata<'_>, tokens: &Tokens<'_>, adds_bos: bool) -> Result<Value, ConvertError> {
    if !adds_bos {
        return Ok(Value::Null);
    }
    let id = tokens.bos.ok_or_else(|| {
        meta.refuse("tokenizer.ggml.bos_token_id", "missing".to_owned(), "the token that begins a text")
    })?;
    let text = tokens.texts[id].as_str();
    let begun = |sequence: &str, kind: u32| {
        [json!({"SpecialToken": {"id": text, "type_id": kind}}), json!({"Sequence": {"id": sequence, "type_id": kind}})]
    };
    let pair = [begun("A", 0), begun("B", 1)].concat();
    Ok(json!({
        "type": "TemplateProcessing",
        "single": begun("A", 0),
        "pair": pair,
        "special_tokens": {text: {"id": text, "ids": [id], "tokens": [text]}},
    }))
}
