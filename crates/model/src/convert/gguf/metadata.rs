//! What a GGUF file says of a model, by key; a value that is missing or of another kind is an error that names the key.

use std::{collections::BTreeMap, path::Path};

use super::header::Value;
use crate::convert::ConvertError;

/// The values of a file.
pub(super) struct Metadata<'a> {
    pub(super) path: &'a Path,
    pub(super) values: &'a BTreeMap<String, Value>,
}

/// The longest text that an error quotes.
const QUOTED_MAX: usize = 60;

impl<'a> Metadata<'a> {
    pub(super) fn refuse(&self, key: &str, found: String, expected: impl Into<String>) -> ConvertError {
        ConvertError::GgufKey { file: self.path.to_owned(), key: key.to_owned(), found, expected: expected.into() }
    }

    fn missing(&self, key: &str, expected: &str) -> ConvertError {
        self.refuse(key, "missing".to_owned(), expected)
    }

    /// What `read` makes of a value, if there is one.
    fn read<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConvertError> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        let told = || {
            let mut told = match value {
                Value::Integer(number) => number.to_string(),
                Value::Float(number) => number.to_string(),
                Value::Flag(flag) => flag.to_string(),
                Value::Text(text) => format!("{text:?}"),
                Value::Texts(list) => format!("a list of {} texts", list.len()),
                Value::Integers(list) => format!("a list of {} integers", list.len()),
                Value::Floats(list) => format!("a list of {} numbers", list.len()),
            };
            if let Some((cut, _)) = told.char_indices().nth(QUOTED_MAX) {
                told.truncate(cut);
            }
            told
        };
        read(value).map(Some).ok_or_else(|| self.refuse(key, told(), expected))
    }

    pub(super) fn text_if_any(&self, key: &str) -> Result<Option<&'a str>, ConvertError> {
        self.read(key, "a text", |value| if let Value::Text(text) = value { Some(&**text) } else { None })
    }

    pub(super) fn text(&self, key: &str) -> Result<&'a str, ConvertError> {
        self.text_if_any(key)?.ok_or_else(|| self.missing(key, "a text"))
    }

    pub(super) fn size_if_any(&self, key: &str) -> Result<Option<usize>, ConvertError> {
        self.read(key, "one whole number, not below 0", |value| match value {
            Value::Integer(number) => usize::try_from(*number).ok(),
            _ => None,
        })
    }

    pub(super) fn size(&self, key: &str) -> Result<usize, ConvertError> {
        self.size_if_any(key)?.ok_or_else(|| self.missing(key, "one whole number"))
    }

    pub(super) fn number_if_any(&self, key: &str) -> Result<Option<f64>, ConvertError> {
        self.read(key, "a number", |value| match value {
            Value::Float(number) if number.is_finite() => Some(*number),
            Value::Integer(number) => Some(*number as f64),
            _ => None,
        })
    }

    pub(super) fn number(&self, key: &str) -> Result<f64, ConvertError> {
        self.number_if_any(key)?.ok_or_else(|| self.missing(key, "a number"))
    }

    pub(super) fn flag_if_any(&self, key: &str) -> Result<Option<bool>, ConvertError> {
        self.read(key, "true or false", |value| if let Value::Flag(flag) = value { Some(*flag) } else { None })
    }

    pub(super) fn texts(&self, key: &str) -> Result<&'a [String], ConvertError> {
        let list = |value: &'a Value| if let Value::Texts(list) = value { Some(&**list) } else { None };
        self.read(key, "a list of texts", list)?.ok_or_else(|| self.missing(key, "a list of texts"))
    }

    pub(super) fn integers_if_any(&self, key: &str) -> Result<Option<&'a [i64]>, ConvertError> {
        let list = |value: &'a Value| if let Value::Integers(list) = value { Some(&**list) } else { None };
        self.read(key, "a list of whole numbers", list)
    }

    pub(super) fn floats(&self, key: &str) -> Result<&'a [f32], ConvertError> {
        let list = |value: &'a Value| if let Value::Floats(list) = value { Some(&**list) } else { None };
        self.read(key, "a list of numbers", list)?.ok_or_else(|| self.missing(key, "a list of numbers"))
    }
}
