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

/// `error` in words of what is expected where it says that a digit is invalid, which a minus is; and with what took the place of a
/// flag that is gone.
pub(crate) fn explained(error: clap::Error) -> clap::Error {
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
}
