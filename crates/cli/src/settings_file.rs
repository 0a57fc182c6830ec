//! Flags from a TOML file: `expert-memory = "25%"` at the top speaks to every command that has the flag,
//! `[bench] requests = 100` to one command. A flag on the command line or in the environment goes before the
//! file, the file before what is built in. Called once, by `command_line::parse`.
//!
//! What the file says is added to the command line, so that what holds of flags holds of keys: one that needs another is refused
//! without it, and one that is required may stand in the file.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs,
    path::Path,
};

use clap::{Arg, ArgAction, ArgMatches, Command, parser::ValueSource};
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

/// A command line that a file has added to.
pub(crate) struct Completed {
    /// The program's name first.
    pub(crate) arguments: Vec<OsString>,
    /// The flags that come from the file.
    pub(crate) from_file: BTreeSet<String>,
}

/// `arguments`, with what the file says and neither they nor the environment do.
pub(crate) fn completed(
    command: &Command,
    file: &Path,
    arguments: Vec<OsString>,
) -> Result<Completed, BadConfiguration> {
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
    complete(command, &settings, arguments)
        .map_err(|problem| BadConfiguration::new(format!("configuration {shown}: {problem}")))
}

/// What [`completed`] does with the parsed file; the error names the key.
fn complete(command: &Command, settings: &Table, mut arguments: Vec<OsString>) -> Result<Completed, String> {
    let said = Said::of(command, settings)?;
    // What is wrong with the command line itself is told when all of it is parsed.
    let typed = command.clone().ignore_errors(true).try_get_matches_from(&arguments);
    let mut from_file = BTreeSet::new();
    if let Some((name, matches)) = typed.as_ref().ok().and_then(ArgMatches::subcommand)
        && let Some(own) = command.find_subcommand(name)
    {
        let flags = || command.get_arguments().chain(own.get_arguments());
        let is_given = |arg: &Arg| {
            let id = arg.get_id().as_str();
            matches.try_contains_id(id).is_ok()
                && matches!(matches.value_source(id), Some(ValueSource::CommandLine | ValueSource::EnvVariable))
        };
        // A flag that is given goes before a key that cannot stand beside it.
        let excludes =
            |one: &Arg, other: &Arg| own.get_arg_conflicts_with(one).iter().any(|arg| arg.get_id() == other.get_id());
        let given: Vec<&Arg> = flags().filter(|arg| is_given(arg)).collect();
        let is_free =
            |arg: &Arg| !is_given(arg) && !given.iter().any(|given| excludes(given, arg) || excludes(arg, given));
        let end = arguments.iter().position(|argument| argument == "--").unwrap_or(arguments.len());
        let added = flags().filter(|arg| is_free(arg));
        let added = added
            .filter_map(|arg| Some((arg, said.of_flag(name, arg.get_long()?)?)))
            .map(|(arg, values)| {
                from_file.extend(arg.get_long().map(str::to_owned));
                as_typed(arg, values)
            })
            .collect::<Result<Vec<_>, String>>()?;
        arguments.splice(end..end, added.into_iter().flatten());
    }
    Ok(Completed { arguments, from_file })
}

/// A flag with each of these values. The error says why a switch cannot have one.
fn as_typed(arg: &Arg, values: &[String]) -> Result<Vec<OsString>, String> {
    let long = arg.get_long().unwrap_or_default();
    let is_switch = matches!(arg.get_action(), ArgAction::SetTrue);
    let typed = |value: &String| match (is_switch, value.to_lowercase().as_str()) {
        (false, _) => Ok(Some(format!("--{long}={value}").into())),
        (true, "1" | "true" | "yes" | "on") => Ok(Some(format!("--{long}").into())),
        (true, "0" | "false" | "no" | "off") => Ok(None),
        (true, _) => Err(format!("key `{long}` holds {value:?}, expected {}", flag_errors::SWITCH_VALUES)),
    };
    values.iter().filter_map(|value| typed(value).transpose()).collect()
}

/// What a file says, as texts.
struct Said {
    /// To every command that has the flag.
    all: BTreeMap<String, Vec<String>>,
    /// To one command.
    one: BTreeMap<String, BTreeMap<String, Vec<String>>>,
}

impl Said {
    /// Refuses what speaks to nobody.
    fn of(command: &Command, settings: &Table) -> Result<Self, String> {
        let (mut all, mut one) = (BTreeMap::new(), BTreeMap::<_, BTreeMap<_, _>>::new());
        let has = |command: &Command, key: &str| {
            // --config itself cannot come from the file it names.
            key != "config" && command.get_arguments().any(|arg| arg.get_long() == Some(key))
        };
        for (key, value) in settings {
            let Some(table) = value.as_table() else {
                if !has(command, key) && !command.get_subcommands().any(|sub| has(sub, key)) {
                    return Err(unknown(key, ""));
                }
                all.insert(key.clone(), texts(key, value)?);
                continue;
            };
            let Some(own) = command.find_subcommand(key) else { return Err(format!("[{key}] is not a command")) };
            for (name, value) in table {
                if !has(own, name) && !has(command, name) {
                    return Err(unknown(name, &format!(" in [{key}]")));
                }
                let values = texts(name, value).map_err(|problem| format!("[{key}] {problem}"))?;
                one.entry(key.clone()).or_default().insert(name.clone(), values);
            }
        }
        Ok(Self { all, one })
    }

    /// What it says of a flag of a command: its own table goes before what speaks to all.
    fn of_flag(&self, command: &str, flag: &str) -> Option<&[String]> {
        let own = self.one.get(command).and_then(|own| own.get(flag));
        own.or_else(|| self.all.get(flag)).map(Vec::as_slice)
    }
}

/// A key's value, or several.
fn texts(key: &str, value: &Value) -> Result<Vec<String>, String> {
    let one = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Integer(number) => Ok(number.to_string()),
        Value::Float(number) => Ok(number.to_string()),
        Value::Boolean(flag) => Ok(flag.to_string()),
        other => Err(format!("key `{key}` holds a {}, expected a text, number or boolean", other.type_str())),
    };
    match value {
        Value::Array(values) => values.iter().map(one).collect(),
        value => Ok(vec![one(value)?]),
    }
}

fn unknown(key: &str, place: &str) -> String {
    let gone = flag_errors::successor(key).map(|successor| format!(": its flag is gone; {successor}"));
    format!("unknown key `{key}`{place}{}", gone.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command() -> Command {
        let memory = Arg::new("expert_memory").long("expert-memory").default_value("100%");
        let stop = Arg::new("stop").long("stop").action(ArgAction::Append);
        let json = Arg::new("json").long("json").action(ArgAction::SetTrue);
        let model = Arg::new("model").long("model").required(true);
        let cert = Arg::new("cert").long("tls-cert").requires("key");
        let key = Arg::new("key").long("tls-key").requires("cert");
        let plain = Arg::new("plain").long("plain").action(ArgAction::SetTrue).conflicts_with("cert");
        let text = Arg::new("text").num_args(0..);
        Command::new("sida")
            .arg(Arg::new("log").long("log").global(true))
            .subcommand(Command::new("ask").args([memory.clone(), stop, json, model, text]))
            .subcommand(Command::new("up").args([memory, cert, key, plain]))
    }

    fn parsed(settings: &str, line: &[&str]) -> Result<clap::ArgMatches, String> {
        let line = line.iter().map(OsString::from).collect();
        let Completed { arguments, .. } = complete(&command(), &settings.parse().unwrap(), line)?;
        let matches = command().try_get_matches_from(arguments).map_err(|error| error.to_string())?;
        Ok(matches.subcommand().unwrap().1.clone())
    }

    #[test]
    fn what_holds_of_flags_holds_of_keys() {
        // Broken: a node whose file names a certificate and no key serves everybody in plain text, without a word; or what a
        // person types is refused for what stands in a file.
        for half in ["tls-cert = 'c'", "[up]\ntls-key = 'k'"] {
            assert!(parsed(half, &["sida", "up"]).unwrap_err().contains("required arguments were not provided"));
        }
        let both = "tls-cert = 'c'\ntls-key = 'k'";
        assert_eq!(parsed(both, &["sida", "up"]).unwrap().get_one::<String>("key").unwrap(), "k");
        let typed = parsed("tls-cert = 'c'", &["sida", "up", "--tls-key", "k"]).unwrap();
        assert_eq!(typed.get_one::<String>("cert").unwrap(), "c");
        let plain = parsed("plain = true", &["sida", "up", "--tls-cert", "c", "--tls-key", "k"]).unwrap();
        assert!(!plain.get_flag("plain"));
        assert!(parsed("plain = true\ntls-cert = 'c'\ntls-key = 'k'", &["sida", "up"]).is_err());
        assert!(parsed("expert-memory = ['1', '2']", &["sida", "up"]).unwrap_err().contains("multiple times"));
    }

    #[test]
    fn words_behind_the_flags_stay_words() {
        // Broken: a text that is asked for becomes a value, or a key a text.
        let ask = parsed("model = 'm'\nlog = 'info'\njson = false", &["sida", "ask", "a", "--", "--b"]).unwrap();
        assert_eq!(ask.get_many::<String>("text").unwrap().collect::<Vec<_>>(), ["a", "--b"]);
        assert_eq!((ask.get_one::<String>("model").unwrap(), ask.get_flag("json")), (&"m".to_owned(), false));
        assert_eq!(ask.get_one::<String>("log").unwrap(), "info");
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
        let problem = |file: &str| parsed(file, &["sida", "up"]).unwrap_err();
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
