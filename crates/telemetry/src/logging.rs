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

/// What holds where a filter does not say otherwise. The library that speaks HTTP/2 warns of frames, line by line: who sends a
/// million of them would fill the disk with lines. Connections that do so are ended and told of by `sida_rpc`.
const UNLESS_SAID: &str = "h2=error";

/// Sends every event that passes `filter` (as `info,sida_rpc=debug`) to standard error.
pub fn install(filter: &str, format: LogFormat) -> Result<(), LoggingError> {
    let registry = tracing_subscriber::registry().with(parsed(filter)?);
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal());
    match format {
        LogFormat::Text => registry.with(lines).try_init(),
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).try_init(),
    }
    .map_err(|_| LoggingError::AlreadySet)
}

fn parsed(filter: &str) -> Result<EnvFilter, LoggingError> {
    let invalid = |source| LoggingError::Filter { filter: filter.to_owned(), source };
    EnvFilter::try_new(format!("{UNLESS_SAID},{filter}")).map_err(invalid)
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

    #[test]
    fn frames_are_logged_where_that_is_asked_for() {
        // Would break: a peer fills the disk of a node with warnings of what it sends, or nobody can see them.
        let directives = |filter: &str| parsed(filter).unwrap().to_string();
        assert!(directives("info").contains("h2=error"));
        assert!(directives("").contains("h2=error"));
        let asked = directives("info,h2=debug");
        assert!(asked.contains("h2=debug") && !asked.contains("h2=error"), "{asked}");
    }
}
