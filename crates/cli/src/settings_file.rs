//! Flags from a TOML file: `expert-memory = "25%"` at the top speaks to every command that has the flag,
//! `[bench] requests = 100` to one command. A flag on the command line or in the environment goes before the
//! file, the file before what is built in. Called once, by `command_line::parse`.

use std::{collections::HashSet, ffi::OsString, fs, path::Path};

use clap::{Arg, ArgAction, Command};
use toml::{Table, Value};

use crate::{bad_configuration::BadConfiguration, flag_errors};

/// A file of flags is small; a larger one is a mistake.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The file named by `--config FILE`, `--config=FILE` or `SIDA_CONFIG`. It has to be known before the command
/// line is parsed, because it changes what parsing yields.
pub(crate) fn named(arguments: &[OsString], environment: Option<OsString>) -> Option<OsString> {
    let mut arguments = arguments.iter().skip(1).take_while(|argument| *argument != "--");
    while let Some(argument) = arguments.next() {
        if argument == "--config" {
            return arguments.next().cloned();
        }
        if let Some(file) = argument.to_str().and_then(|text| text.strip_prefix("--config=")) {
            return Some(file.into());
        }
    }
    environment
}

/// `command` with the file's values as defaults.
pub(crate) fn apply(command: Command, file: &Path) -> Result<Command, BadConfiguration> {
    let shown = file.display();
    let unreadable = |error| BadConfiguration::because(format!("cannot read configuration {shown}"), error);
    let bytes = fs::metadata(file).map_err(unreadable)?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(BadConfiguration::new(format!(
            "configuration {shown} has {bytes} bytes, at most {FILE_BYTES_MAX} are read"
        )));
    }
    let text = fs::read_to_string(file).map_err(unreadable)?;
    let settings: Table =
        text.parse().map_err(|error| BadConfiguration::because(format!("configuration {shown} is not TOML"), error))?;
    apply_settings(command, &settings)
        .map_err(|problem| BadConfiguration::new(format!("configuration {shown}: {problem}")))
}

/// What [`apply`] does with the parsed file; the error names the key.
fn apply_settings(mut command: Command, settings: &Table) -> Result<Command, String> {
    let commands: HashSet<String> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    // Tables second, so that what a command's own table says wins.
    for (key, value) in settings.iter().filter(|(_, value)| !value.is_table()) {
        command = apply_to_all(command, key, value)?;
    }
    for (key, table) in settings.iter().filter_map(|(key, value)| Some((key, value.as_table()?))) {
        if !commands.contains(key) {
            return Err(format!("[{key}] is not a command"));
        }
        command = apply_to_one(command, key, table)?;
    }
    Ok(command)
}

/// A key at the top: for `sida` itself and for every command that has the flag.
fn apply_to_all(command: Command, key: &str, value: &Value) -> Result<Command, String> {
    let default = Default::of(key, value)?;
    let mut known = false;
    let command = command.mut_args(|arg| default.set(arg, &mut known));
    let command = command.mut_subcommands(|sub| sub.mut_args(|arg| default.set(arg, &mut known)));
    if known { Ok(command) } else { Err(unknown(key, "")) }
}

fn apply_to_one(mut command: Command, name: &str, table: &Table) -> Result<Command, String> {
    for (key, value) in table {
        let default = Default::of(key, value).map_err(|problem| format!("[{name}] {problem}"))?;
        let mut known = false;
        command = command.mut_subcommand(name, |sub| sub.mut_args(|arg| default.set(arg, &mut known)));
        if !known {
            return Err(unknown(key, &format!(" in [{name}]")));
        }
    }
    Ok(command)
}

fn unknown(key: &str, place: &str) -> String {
    let gone = flag_errors::successor(key).map(|successor| format!(": its flag is gone; {successor}"));
    format!("unknown key `{key}`{place}{}", gone.unwrap_or_default())
}

/// A key's value as clap wants it.
struct Default<'a> {
    key: &'a str,
    values: Vec<String>,
}

impl<'a> Default<'a> {
    fn of(key: &'a str, value: &Value) -> Result<Self, String> {
        let one = |value: &Value| match value {
            Value::String(text) => Ok(text.clone()),
            Value::Integer(number) => Ok(number.to_string()),
            Value::Float(number) => Ok(number.to_string()),
            Value::Boolean(flag) => Ok(flag.to_string()),
            other => Err(format!("key `{key}` holds a {}, expected a text, number or boolean", other.type_str())),
        };
        let values = match value {
            Value::Array(values) => values.iter().map(one).collect::<Result<_, _>>()?,
            value => vec![one(value)?],
        };
        Ok(Self { key, values })
    }

    /// `arg` with this default if it is the flag of this key.
    fn set(&self, arg: Arg, known: &mut bool) -> Arg {
        // --config itself cannot come from the file it names.
        let is_key = arg.get_long() == Some(self.key) && self.key != "config";
        if !is_key {
            return arg;
        }
        *known = true;
        let several = matches!(arg.get_action(), ArgAction::Append);
        let values = if several { self.values.clone() } else { self.values.iter().take(1).cloned().collect() };
        arg.required(false).default_values(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command() -> Command {
        let memory = Arg::new("expert_memory").long("expert-memory").default_value("100%");
        let stop = Arg::new("stop").long("stop").action(ArgAction::Append);
        let json = Arg::new("json").long("json").action(ArgAction::SetTrue);
        let model = Arg::new("model").long("model").required(true);
        Command::new("sida")
            .arg(Arg::new("log").long("log"))
            .subcommand(Command::new("ask").args([memory.clone(), stop, json, model]))
            .subcommand(Command::new("up").arg(memory))
    }

    fn parsed(settings: &str, line: &[&str]) -> Result<clap::ArgMatches, String> {
        let command = apply_settings(command(), &settings.parse().unwrap())?;
        Ok(command.try_get_matches_from(line).unwrap().subcommand().unwrap().1.clone())
    }

    #[test]
    fn file_goes_before_built_in_and_after_the_command_line() {
        // Broken: a node would start with other settings than its file says, or its flags would be ignored.
        let file = "model = 'm'\nexpert-memory = '25%'\nstop = ['a', 'b']\n[ask]\njson = true\n";
        let ask = parsed(file, &["sida", "ask"]).unwrap();
        assert_eq!(ask.get_one::<String>("expert_memory").unwrap(), "25%");
        assert_eq!(ask.get_one::<String>("model").unwrap(), "m");
        assert_eq!(ask.get_many::<String>("stop").unwrap().collect::<Vec<_>>(), ["a", "b"]);
        assert!(ask.get_flag("json"));
        let ask = parsed(file, &["sida", "ask", "--expert-memory", "50%"]).unwrap();
        assert_eq!(ask.get_one::<String>("expert_memory").unwrap(), "50%");
        assert_eq!(parsed(file, &["sida", "up"]).unwrap().get_one::<String>("expert_memory").unwrap(), "25%");
    }

    #[test]
    fn a_commands_table_goes_before_the_top() {
        // Broken: a file could not say one thing for `up` and another for the rest.
        let file = "expert-memory = '25%'\n[up]\nexpert-memory = '50%'\n";
        assert_eq!(parsed(file, &["sida", "up"]).unwrap().get_one::<String>("expert_memory").unwrap(), "50%");
    }

    #[test]
    fn unknown_keys_are_named() {
        // Broken: a misspelt key would be ignored, and a node would run with a budget nobody asked for.
        let problem = |file: &str| apply_settings(command(), &file.parse().unwrap()).unwrap_err();
        assert_eq!(problem("expert-memroy = '1GiB'"), "unknown key `expert-memroy`");
        assert_eq!(problem("[ask]\nfoo = 1"), "unknown key `foo` in [ask]");
        assert!(problem("[up]\npreload-depth = 2").contains("in [up]: its flag is gone; --plan-chance"));
        assert_eq!(problem("[serve]\nfoo = 1"), "[serve] is not a command");
        assert_eq!(problem("log = 1979-05-27"), "key `log` holds a datetime, expected a text, number or boolean");
    }

    #[test]
    fn the_file_is_found_before_parsing() {
        // Broken: --config would be accepted and do nothing.
        let line = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        assert_eq!(named(&line(&["sida", "up", "--config", "a.toml"]), None), Some("a.toml".into()));
        assert_eq!(named(&line(&["sida", "--config=a.toml", "up"]), Some("b.toml".into())), Some("a.toml".into()));
        assert_eq!(named(&line(&["sida", "ask", "--", "--config"]), Some("b.toml".into())), Some("b.toml".into()));
        assert_eq!(named(&line(&["sida", "up"]), None), None);
    }
}
