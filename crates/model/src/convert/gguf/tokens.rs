//! The tokens of a GGUF file: which kind each is of, and which begin and end a text.

use serde_json::{Map, Value, json};

use super::metadata::Metadata;
use crate::convert::ConvertError;

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
/// Tokens at which llama.cpp ends an answer of a chat whatever a file calls its end: models that were trained on one may
/// write it.
const ENDS: [&str; 4] = ["<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>"];

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A piece of texts.
    Normal,
    /// What stands for what cannot be said.
    Unknown,
    /// Of the model's own, without a text.
    Control,
    /// A piece that is never cut or joined.
    UserDefined,
    /// Fills the vocabulary up.
    Unused,
    /// A byte of a character that has no token.
    Byte,
}

/// All tokens of a model.
pub(super) struct Tokens<'a> {
    pub(super) texts: &'a [String],
    kinds: Vec<Kind>,
    pub(super) bos: Option<usize>,
    /// Any of these ends an answer; the first is what the file calls the end.
    eos: Vec<usize>,
    pub(super) unknown: Option<usize>,
    pad: Option<usize>,
}

impl<'a> Tokens<'a> {
    pub(super) fn read(meta: &Metadata<'a>) -> Result<Self, ConvertError> {
        let texts = meta.texts(TOKENS)?;
        let kinds = match meta.integers_if_any(TYPES)? {
            None => vec![Kind::Normal; texts.len()],
            Some(types) if types.len() != texts.len() => {
                return Err(meta.refuse(
                    TYPES,
                    format!("a list of {}", types.len()),
                    format!("one for each of {} tokens", texts.len()),
                ));
            }
            Some(types) => types
                .iter()
                .map(|&number| match number {
                    1 => Ok(Kind::Normal),
                    2 => Ok(Kind::Unknown),
                    3 => Ok(Kind::Control),
                    4 => Ok(Kind::UserDefined),
                    5 => Ok(Kind::Unused),
                    6 => Ok(Kind::Byte),
                    other => Err(meta.refuse(TYPES, other.to_string(), "types from 1 to 6")),
                })
                .collect::<Result<_, _>>()?,
        };
        let token = |of: &str| {
            let key = format!("tokenizer.ggml.{of}_token_id");
            match meta.size_if_any(&key)? {
                Some(id) if id >= texts.len() => {
                    Err(meta.refuse(&key, id.to_string(), format!("one of {} tokens", texts.len())))
                }
                id => Ok(id),
            }
        };
        let eos = token("eos")?.ok_or_else(|| {
            meta.refuse("tokenizer.ggml.eos_token_id", "missing".to_owned(), "the token that ends a text")
        })?;
        let mut ends = vec![eos];
        ends.extend(token("eot")?);
        ends.extend(token("eom")?);
        let special = |id: &usize| kinds[*id] == Kind::Control && ENDS.contains(&&*texts[*id]);
        ends.extend((0..texts.len()).filter(special));
        let mut eos = Vec::new();
        ends.into_iter().for_each(|id| {
            if !eos.contains(&id) {
                eos.push(id)
            }
        });
        Ok(Self { texts, kinds, bos: token("bos")?, eos, unknown: token("unknown")?, pad: token("padding")? })
    }

    /// Every token with its kind, by id.
    pub(super) fn each(&self) -> impl Iterator<Item = (&'a str, Kind)> {
        self.texts.iter().map(String::as_str).zip(self.kinds.iter().copied())
    }

    /// What config.json says of them: one end, that of texts.
    pub(super) fn add_to(&self, config: &mut Map<String, Value>) {
        config.insert("bos_token_id".to_owned(), self.bos.into());
        config.insert("eos_token_id".to_owned(), self.eos[0].into());
        config.insert("pad_token_id".to_owned(), self.pad.into());
    }

    /// generation_config.json.
    pub(super) fn generation_config(&self) -> Value {
        let mut config = json!({"eos_token_id": self.eos});
        for (field, token) in [("bos_token_id", self.bos), ("pad_token_id", self.pad)] {
            if let Some(token) = token {
                config[field] = token.into();
            }
        }
        config
    }

    /// tokenizer_config.json: what templates of chats call by name.
    pub(super) fn tokenizer_config(&self) -> Value {
        let mut config = json!({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false});
        let named = [
            ("bos_token", self.bos),
            ("eos_token", Some(self.eos[0])),
            ("unk_token", self.unknown),
            ("pad_token", self.pad),
        ];
        for (field, token) in named {
            if let Some(token) = token {
                config[field] = self.texts[token].as_str().into();
            }
        }
        config
    }
}
