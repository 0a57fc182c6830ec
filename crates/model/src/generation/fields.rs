//! Fields of a JSON object, typed and within bounds. What is missing or null says nothing.

use std::{fmt::Display, path::Path};

use serde_json::{Map, Value};

use crate::ModelError;

/// The longest value that an error repeats.
const SHOWN_BYTES_MAX: usize = 100;

/// The fields of one file.
pub(crate) struct Fields<'a> {
    pub(crate) json: &'a Map<String, Value>,
    /// Where they were read, for errors.
    pub(crate) path: &'a Path,
    /// Tokens are below it.
    pub(crate) vocab_size: usize,
}

impl Fields<'_> {
    fn said(&self, field: &str) -> Option<&Value> {
        self.json.get(field).filter(|value| !value.is_null())
    }

    /// A token of the vocabulary.
    pub(crate) fn token(&self, field: &'static str) -> Result<Option<u32>, ModelError> {
        self.said(field).map(|value| self.token_of(field, value)).transpose()
    }

    /// A token or a list of them, ascending and each once. Empty where there is none.
    pub(crate) fn tokens(&self, field: &'static str) -> Result<Vec<u32>, ModelError> {
        let mut tokens = match self.said(field) {
            None => Vec::new(),
            Some(Value::Array(values)) => {
                values.iter().map(|value| self.token_of(field, value)).collect::<Result<_, _>>()?
            }
            Some(value) => vec![self.token_of(field, value)?],
        };
        tokens.sort_unstable();
        tokens.dedup();
        Ok(tokens)
    }

    /// A whole number from `min` to `max`.
    pub(crate) fn count(&self, field: &'static str, min: u64, max: u64) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.said(field) else { return Ok(None) };
        match value.as_u64().filter(|count| (min..=max).contains(count)).map(usize::try_from) {
            Some(Ok(count)) => Ok(Some(count)),
            _ => Err(self.refuse(field, shown(value), format!("{min} to {max}"))),
        }
    }

    /// A number from `min` to `max`.
    pub(crate) fn number(&self, field: &'static str, min: f64, max: f64) -> Result<Option<f32>, ModelError> {
        let Some(value) = self.said(field) else { return Ok(None) };
        match value.as_f64().filter(|number| (min..=max).contains(number)) {
            Some(number) => Ok(Some(number as f32)),
            None => Err(self.refuse(field, shown(value), format!("{min} to {max}"))),
        }
    }

    /// True or false.
    pub(crate) fn flag(&self, field: &'static str) -> Result<Option<bool>, ModelError> {
        let Some(value) = self.said(field) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.refuse(field, shown(value), "true or false"))
    }

    /// The error that a field is not as expected.
    pub(crate) fn refuse(&self, field: &'static str, found: impl Display, expected: impl Into<String>) -> ModelError {
        ModelError::Config { path: self.path.to_owned(), field, found: found.to_string(), expected: expected.into() }
    }

    fn token_of(&self, field: &'static str, value: &Value) -> Result<u32, ModelError> {
        let token = value.as_u64().filter(|&token| token < self.vocab_size as u64);
        let token = token.and_then(|token| u32::try_from(token).ok());
        token.ok_or_else(|| self.refuse(field, shown(value), format!("tokens from 0 to {}", self.vocab_size - 1)))
    }
}

/// A value as JSON, the beginning of a long one.
pub(super) fn shown(value: &Value) -> String {
    let mut text = value.to_string();
    if text.len() > SHOWN_BYTES_MAX {
        text.truncate(text.floor_char_boundary(SHOWN_BYTES_MAX));
        text += "...";
    }
    text
}
