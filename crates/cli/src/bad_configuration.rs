//! The one error that ends the process with exit code 64: what was asked for cannot work, and will not work
//! next time either. Made by every command that checks its flags; looked for by `main`.

use std::{error::Error, fmt, io, path::Path};

use sida_model::error::is_of_place;

/// A wrong flag, environment variable or configuration file.
#[derive(Debug)]
pub(crate) struct BadConfiguration {
    message: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl BadConfiguration {
    /// With a message that names what is wrong and what was expected.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), source: None }
    }

    /// With the error that shows it.
    pub(crate) fn because(message: impl Into<String>, source: impl Error + Send + Sync + 'static) -> Self {
        Self { message: message.into(), source: Some(Box::new(source)) }
    }
}

/// Why the file that `flag` names cannot be written: a wrong configuration if it is for its place, and not for a full disk.
pub(crate) fn unwritable(flag: &str, file: &Path, error: io::Error) -> anyhow::Error {
    let message = format!("cannot write {flag} {}", file.display());
    match is_of_place(&error) {
        true => BadConfiguration::because(message, error).into(),
        false => anyhow::Error::new(error).context(message),
    }
}

impl fmt::Display for BadConfiguration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for BadConfiguration {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn Error + 'static))
    }
}
