//! Reads the small files of a model (config, index, tokenizer) whole, up to a limit: a file's size is not
//! trusted, so neither a huge nor a growing one can take all memory.

use std::{io::Read, path::Path};

use serde::de::DeserializeOwned;

use crate::{ModelError, mistaken_file, regular_file};

/// Reads a file of at most `limit` bytes.
pub fn read(path: &Path, limit: u64) -> Result<Vec<u8>, ModelError> {
    let failed = |source| ModelError::Read { path: path.to_owned(), source };
    let file = regular_file::open(path)?;
    let bytes = file.metadata().map_err(failed)?.len();
    let mut content = Vec::new();
    file.take(limit + 1).read_to_end(&mut content).map_err(failed)?;
    if content.len() as u64 > limit {
        return Err(ModelError::FileTooLarge { path: path.to_owned(), bytes, limit });
    }
    Ok(content)
}

/// Reads a JSON file of at most `limit` bytes.
pub fn read_json<T: DeserializeOwned>(path: &Path, limit: u64) -> Result<T, ModelError> {
    parse_json(&read(path, limit)?, path)
}

/// Parses the content of a JSON file; `path` is for messages.
pub fn parse_json<T: DeserializeOwned>(content: &[u8], path: &Path) -> Result<T, ModelError> {
    serde_json::from_slice(content).map_err(|source| match mistaken_file::recognise(content) {
        Some(found) => ModelError::MistakenFile { path: path.to_owned(), expected: "JSON", found },
        None => ModelError::Json { path: path.to_owned(), source },
    })
}
