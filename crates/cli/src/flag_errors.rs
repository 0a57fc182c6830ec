//! What is wrong with a flag, where that takes more words than clap has: numbers, and flags that are gone, be they on the command
//! line, in the environment or in the file of `--config`. Called by `command_line`, `environment` and `settings_file`.

use std::{error::Error as _, num::ParseIntError};

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Flags that are gone, and what took their place.
const GONE: [(&str, &str); 6] = [
    (
        "preload-depth",
        "--plan-chance took its place: what is loaded ahead follows from how likely a batch uses each expert",
    ),
    ("gpu", "--device took its place, as --device cuda:0"),
    ("synth", "`sida synth` writes such a model, and --model takes it"),
    ("skew", "`sida synth --skew` writes such a model"),
    ("batches", "--batch took its place, a run for each"),
    ("new-tokens", "--max-tokens took its place"),
];

/// What took the place of a flag, by its name without dashes; `None` where there never was one, or nothing did.
pub(crate) fn successor(flag: &str) -> Option<&'static str> {
    GONE.iter().find(|(gone, _)| *gone == flag).map(|(_, told)| *told)
}

/// What a switch takes in the environment and in the file of `--config`.
pub(crate) const SWITCH_VALUES: &str = "1, true, yes or on, or 0, false, no or off";

/// `error` as it is [`explained`], and where the value comes from that it speaks of, if `origin` says that of the flag's name
/// without dashes.
pub(crate) fn located(error: clap::Error, origin: impl Fn(&str) -> Option<String>) -> clap::Error {
    let origin = match (error.get(ContextKind::InvalidArg), error.get(ContextKind::InvalidValue)) {
        (Some(ContextValue::String(flag)), Some(_)) => {
            flag.trim_start_matches('-').split([' ', '=']).next().and_then(origin)
        }
        _ => None,
    };
    let error = explained(error);
    let Some(origin) = origin else { return error };
    let text = error.to_string().replace("value was not a boolean", &format!("expected {SWITCH_VALUES}"));
    clap::Error::raw(error.kind(), format!("{origin}: {}", text.strip_prefix("error: ").unwrap_or(&text)))
}

/// `error` in words of what is expected where it says that a digit is invalid, which a minus is; and with what took the place of a
/// flag that is gone.
fn explained(error: clap::Error) -> clap::Error {
    let flag = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(flag)) => flag,
        _ => return error,
    };
    let is_of_number = error.source().is_some_and(|source| source.is::<ParseIntError>());
    let message = match (error.get(ContextKind::InvalidValue), successor(flag.trim_start_matches('-'))) {
        (Some(value), _) if is_of_number => {
            format!("invalid value '{value}' for '{flag}': expected a whole number that is not negative")
        }
        (_, Some(successor)) if error.kind() == ErrorKind::UnknownArgument => format!("'{flag}' is gone: {successor}"),
        _ => return error,
    };
    clap::Error::raw(error.kind(), format!("{message}\n\nFor more information, try '--help'.\n"))
}

#[cfg(test)]
mod tests {
    use crate::command_line::{ParseError, parse};

    /// Whoever upgrades would read that a flag of theirs is unexpected, and have to look for what it was called before.
    #[test]
    fn flags_that_are_gone_name_their_successors() {
        let told = |line: &str| match parse(line.split(' ').map(Into::into).collect()) {
            Err(ParseError::Clap(error)) => error.to_string(),
            _ => panic!("{line} is not refused"),
        };
        for (line, expected) in [
            ("sida up --preload-depth 2", "'--preload-depth' is gone: --plan-chance took its place"),
            ("sida up --preload-depth=2", "'--preload-depth' is gone: --plan-chance"),
            ("sida bench --gpu", "'--gpu' is gone: --device"),
            ("sida up --preload 2", "unexpected argument '--preload' found"),
        ] {
            assert!(told(line).contains(expected), "{}", told(line));
        }
    }

    /// Whoever has a wrong value in a file would look for it on the command line.
    #[test]
    fn values_of_a_file_are_told_as_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("sida.toml");
        let parsed = |text: &str| {
            std::fs::write(&file, text).unwrap();
            parse(["sida", "up", "--config", file.to_str().unwrap()].map(Into::into).to_vec())
        };
        for (text, expected) in [
            ("expert-memory = true", "invalid value 'true' for '--expert-memory <SIZE>'"),
            ("threads = -1", "invalid value '-1' for '--threads <N>': expected a whole number"),
            ("no-prefix-cache = 'maybe'", "key `no-prefix-cache` holds \"maybe\", expected 1, true, yes or on"),
        ] {
            let told = match parsed(text) {
                Err(ParseError::Clap(error)) => error.to_string(),
                Err(ParseError::Settings(error)) => error.to_string(),
                Ok(_) => panic!("{text} is not refused"),
            };
            assert!(told.contains(&format!("configuration {}: ", file.display())) && told.contains(expected), "{told}");
        }
        assert!(parsed("no-prefix-cache = 'yes'").is_ok() && parsed("no-prefix-cache = 0").is_ok());
    }
}
