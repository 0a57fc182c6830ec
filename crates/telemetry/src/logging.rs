//! Log lines of this process, on standard error: for a person (`text`) or for a collector (`json`). Set up
//! once by the command line.

use std::{
    io::{self, IsTerminal},
    str::FromStr,
};

use thiserror::Error;
use tracing_subscriber::{EnvFilter, filter::ParseError, layer::SubscriberExt, util::SubscriberInitExt};

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// One line for a person.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Why logging cannot be set up.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum LoggingError {
    #[error("log filter {filter:?} is malformed: {source}")]
    Filter { filter: String, source: ParseError },
    #[error("log format {found:?} is unknown, expected text or json")]
    Format { found: String },
    #[error("this process logs already")]
    AlreadySet,
}

impl FromStr for LogFormat {
    type Err = LoggingError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            found => Err(LoggingError::Format { found: found.to_owned() }),
        }
    }
}

/// Sends every event that passes `filter` (as `info,sida_rpc=debug`) to standard error.
pub fn install(filter: &str, format: LogFormat) -> Result<(), LoggingError> {
    let filter =
        EnvFilter::try_new(filter).map_err(|source| LoggingError::Filter { filter: filter.to_owned(), source })?;
    let registry = tracing_subscriber::registry().with(filter);
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal());
    match format {
        LogFormat::Text => registry.with(lines).try_init(),
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).try_init(),
    }
    .map_err(|_| LoggingError::AlreadySet)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_settings_are_named() {
        // Broken: a typo in a flag would silence a node or end it without saying why.
        assert!(matches!("yaml".parse::<LogFormat>(), Err(LoggingError::Format { found }) if found == "yaml"));
        assert!(matches!(install("sida=loud", LogFormat::Text), Err(LoggingError::Filter { .. })));
    }
}
