//! Text to token ids and back, by the model's own tokenizer.json. Used by the front door and the predictor's
//! training.

mod token_bytes;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use crate::{ModelConfig, ModelError, bounded_file, mistaken_file};

/// The longest tokenizer.json that is read; those of vocabularies of 256,000 have 34 MB.
const TOKENIZER_BYTES_MAX: u64 = 128 << 20;
/// The longest text that is tokenized: far beyond any prompt, little enough to take milliseconds.
pub const TEXT_BYTES_MAX: usize = 1 << 20;

/// A tokenizer that fits a model.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Padding, the tokens that end a text, and where a decoder reads texts all special ones, ascending. They have no text of
    /// their own.
    hidden: Vec<u32>,
    /// Whether an encoder reads texts. What a decoder reads goes on, and has no end.
    has_encoder: bool,
}

impl Tokenizer {
    /// Reads `tokenizer.json`. Refuses one that can make an id outside the model's vocabulary, or that does
    /// not end a text with the model's end token: it is another model's.
    pub fn open(dir: &Path, config: &ModelConfig) -> Result<Self, ModelError> {
        let path = dir.join("tokenizer.json");
        let refuse = |reason: String| ModelError::Tokenizer { path: path.clone(), reason };
        let json = bounded_file::read(&path, TOKENIZER_BYTES_MAX)?;
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(&json)).map_err(|reason| {
            match mistaken_file::recognise(&json) {
                Some(found) => ModelError::MistakenFile { path: path.clone(), expected: "a tokenizer's JSON", found },
                None => refuse(reason),
            }
        })?;
        // What a file says about them is for training; we neither cut silently nor pad.
        inner.with_truncation(None).map_err(|error| refuse(error.to_string()))?.with_padding(None);
        let largest = inner.get_vocab(true).into_iter().max_by_key(|&(_, id)| id);
        let (token, id) = largest.ok_or_else(|| refuse("its vocabulary is empty".to_owned()))?;
        if id as usize >= config.vocab_size {
            return Err(ModelError::Vocabulary { path, token, id, vocab_size: config.vocab_size });
        }
        // A token that ends an answer may be an ordinary one, whose text is part of it.
        let special = inner.get_added_tokens_decoder();
        let is_special = |id: &u32| special.get(id).is_some_and(|token| token.special);
        let ends = config.generation.eos_token_ids.iter().copied().filter(is_special);
        let mut hidden: Vec<u32> = ends.chain(config.eos_token_ids.iter().copied()).collect();
        hidden.push(config.pad_token_id);
        if !config.has_encoder() {
            hidden.extend(special.iter().filter(|(_, token)| token.special).map(|(&id, _)| id));
        }
        hidden.sort_unstable();
        let (tokenizer, ends) = (Self { inner, hidden, has_encoder: config.has_encoder() }, &config.eos_token_ids);
        match tokenizer.encode("a")?.last() {
            Some(id) if ends.contains(id) && !tokenizer.has_encoder => {
                Err(refuse(format!("ends a text with {id}, the model's end, which is to go on")))
            }
            Some(id) if ends.contains(id) || !tokenizer.has_encoder => Ok(tokenizer),
            last => Err(refuse(format!("ends a text with {last:?}, not with the model's end {ends:?}"))),
        }
    }

    /// The ids of a text, with what a text of the model begins and ends with: for an encoder, the end token.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        self.encoded(text, true)
    }

    /// The ids of a text that is written by the model: after what a decoder read without what a text begins with.
    pub fn encode_answer(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        self.encoded(text, self.has_encoder)
    }

    /// The ids of a text and nothing else: for one that says itself what it begins and ends with.
    pub fn encode_as_written(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        self.encoded(text, false)
    }

    fn encoded(&self, text: &str, is_whole: bool) -> Result<Vec<u32>, ModelError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(ModelError::TextTooLong { bytes: text.len(), limit: TEXT_BYTES_MAX });
        }
        let encoding =
            guarded(|| self.inner.encode_fast(text, is_whole)).map_err(|reason| ModelError::Tokenize { reason })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text that a token has behind others, of a special one its name; a part of a character is shown as one that is
    /// unknown.
    pub fn token_text(&self, id: u32) -> Result<String, ModelError> {
        if self.hidden.binary_search(&id).is_ok() {
            return Ok(self.inner.id_to_token(id).unwrap_or_default());
        }
        // At the beginning of a text its first blank would be lost.
        let before = self.encode_as_written("a")?;
        let (alone, both) = (self.decode(&before)?, self.decode(&[&before[..], &[id]].concat())?);
        Ok(both.strip_prefix(&alone).map_or(both.clone(), str::to_owned))
    }

    /// The text of ids. Drops padding, end tokens and ids that are nobody's; keeps sentinels such as
    /// `<extra_id_0>`, which are part of an answer.
    pub fn decode(&self, ids: &[u32]) -> Result<String, ModelError> {
        let is_shown = |id: &u32| self.hidden.binary_search(id).is_err();
        let kept: Vec<u32> = ids.iter().copied().filter(is_shown).collect();
        guarded(|| self.inner.decode(&kept, false)).map_err(|reason| ModelError::Tokenize { reason })
    }
}

/// Calls into the library, and takes a panic of its for an error: version 0.23.2 unwraps its way through
/// malformed files, both when it reads one and when it uses it.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("tokenizer.json is malformed: the tokenizers library panicked on it".to_owned()),
    }
}
