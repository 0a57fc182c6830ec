//! With `--endpoint` somebody else's cluster answers. What the command line says of a cluster of one's own would do nothing beside
//! it, so it is refused. The environment and a file of settings speak to all commands, and to that cluster when it is started.

use std::collections::BTreeSet;

use clap::{ArgMatches, Args, Command, parser::ValueSource};

use crate::{
    arguments::{embedded::EmbeddedArguments, model::ModelArguments, predictor::PredictorArguments},
    bad_configuration::BadConfiguration,
};

/// Refuses flags that would be ignored, of the subcommand that was parsed, but for those that come from a file of settings.
pub(crate) fn check(matches: &ArgMatches, from_file: &BTreeSet<String>) -> Result<(), BadConfiguration> {
    let Some((name, matches)) = matches.subcommand() else { return Ok(()) };
    let of_own = ModelArguments::augment_args(Command::new("of a cluster of one's own"));
    let of_own = EmbeddedArguments::augment_args(PredictorArguments::augment_args(of_own));
    let is_given = |id: &str| matches.try_contains_id(id).is_ok_and(|is| is);
    let is_typed = |id: &str| is_given(id) && matches.value_source(id) == Some(ValueSource::CommandLine);
    let typed = of_own.get_arguments().filter(|arg| is_typed(arg.get_id().as_str())).filter_map(|arg| arg.get_long());
    let flag = typed.into_iter().find(|flag| !from_file.contains(*flag));
    match flag.filter(|_| is_given("endpoint")) {
        None => Ok(()),
        Some(flag) => Err(BadConfiguration::new(format!(
            "--{flag} is of a cluster that {name} starts, and cannot be used with --endpoint, which names another"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command_line;

    #[test]
    fn flags_that_would_do_nothing_are_refused() {
        // Broken: whoever asks a cluster for another model than it has is answered by the one that it has, without a word.
        let checked = |line: &[&str]| {
            let matches = command_line::command().try_get_matches_from(line).expect("a command line");
            check(&matches, &BTreeSet::new()).map_err(|error| error.to_string())
        };
        let elsewhere = ["--endpoint", "http://127.0.0.1:50051"];
        for own in [["--model", "m"], ["--model-name", "m"], ["--expert-memory", "25%"], ["--predictor", "off"]] {
            for command in [&["sida", "ask", "text"][..], &["sida", "bench"]] {
                assert!(checked(&[command, &own].concat()).is_ok());
                let line = [command, &own, &elsewhere].concat();
                let refused = checked(&line).expect_err(&line.join(" "));
                assert!(refused.starts_with(own[0]), "{refused}");
            }
        }
        assert!(checked(&[&["sida", "ask", "text", "--json"][..], &elsewhere].concat()).is_ok());
        assert!(checked(&[&["sida", "status"][..], &elsewhere].concat()).is_ok());
    }
}
