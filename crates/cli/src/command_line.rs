//! What can be said to `sida`: its commands, and where their flags come from. Read by `main`, which parses
//! and runs.
//!
//! Every flag also has an environment variable, `SIDA_` and its name in capitals, and a key in the TOML file
//! of `--config`; neither is written down per flag, so that none can be forgotten.

use std::{collections::BTreeSet, env, ffi::OsString, path::PathBuf, process::ExitCode};

use clap::{Arg, ArgAction, Args, CommandFactory, FromArgMatches, Parser, Subcommand, builder::BoolishValueParser};
use sida_telemetry::{
    logging::{self, LogFormat},
    otlp::{self, Exporting, OtlpConfig},
};

use crate::{
    bad_configuration::BadConfiguration,
    cluster_elsewhere, commands, environment, flag_errors, negative_values, otlp_flags,
    settings_file::{self, Completed},
};

/// Serves Mixture-of-Experts models from less memory: predicts which experts each token will need, and keeps
/// only those resident.
#[derive(Parser)]
#[command(name = "sida", version, arg_required_else_help = true, max_term_width = 100)]
pub(crate) struct CommandLine {
    #[command(flatten)]
    general: GeneralArguments,
    #[command(subcommand)]
    command: Command,
}

/// Flags that every command has.
#[derive(Args)]
struct GeneralArguments {
    /// TOML file of flags: `expert-memory = "25%"` for every command that has the flag, `[bench]` tables for one
    #[arg(long, value_name = "FILE", global = true, display_order = 1000, help_heading = "General")]
    config: Option<PathBuf>,
    /// Which events to log on standard error, as `info,sida_rpc=debug` [default: info for servers, else warn]
    #[arg(long, value_name = "FILTER", global = true, display_order = 1000, help_heading = "General")]
    log: Option<String>,
    /// How a log line looks: text or json
    #[arg(
        long,
        value_name = "FORMAT",
        global = true,
        default_value = "text",
        display_order = 1000,
        help_heading = "General"
    )]
    log_format: String,
    /// Send traces to this OpenTelemetry collector (OTLP over gRPC, without TLS), as http://collector:4317 [default: nowhere]
    #[arg(
        long,
        value_name = "URL",
        global = true,
        value_parser = otlp_flags::endpoint,
        display_order = 1000,
        help_heading = "General"
    )]
    otlp_endpoint: Option<String>,
    /// Share of requests that are traced where the caller did not decide, 0 to 1
    #[arg(
        long,
        value_name = "SHARE",
        global = true,
        default_value_t = 0.01,
        value_parser = otlp_flags::sampling,
        display_order = 1000,
        help_heading = "General"
    )]
    otlp_sampling: f64,
}

/// The commands, in the order of the design.
#[derive(Subcommand)]
enum Command {
    Ask(commands::ask::AskArguments),
    Up(commands::up::UpArguments),
    Coordinator(commands::coordinator::CoordinatorArguments),
    ExpertNode(commands::expert_node::ExpertNodeArguments),
    PredictorNode(commands::predictor_node::PredictorNodeArguments),
    Status(commands::status::StatusArguments),
    TrainPredictor(commands::train_predictor::TrainPredictorArguments),
    Eval(commands::eval::EvalArguments),
    Bench(commands::bench::BenchArguments),
    Inspect(commands::inspect::InspectArguments),
    Convert(commands::convert::ConvertArguments),
    Synth(commands::synth::SynthArguments),
    Verify(commands::verify::VerifyArguments),
    Doctor(commands::doctor::DoctorArguments),
    Completions(commands::completions::CompletionsArguments),
}

/// What clients log unless told otherwise. What failed on the way to an answer is told by the error that ends the command, if
/// another node did not make it good.
const CLIENT_LOG: &str = "warn,sida_coordinator::dispatch=error,sida_expert_node::prefetch=error";

/// Why there is no command line to run.
#[derive(Debug)]
pub(crate) enum ParseError {
    /// Flags do not parse; or help or the version was asked for.
    Clap(clap::Error),
    /// The file of `--config`, or flags that do not go together.
    Settings(BadConfiguration),
}

/// The command line of `arguments` (the program's name first), completed from the environment and the file
/// of `--config`.
pub(crate) fn parse(arguments: Vec<OsString>) -> Result<CommandLine, ParseError> {
    let (command, arguments) = (command(), negative_values::attached(arguments));
    let flag = |argument: &OsString| Some(argument.to_str()?.strip_prefix("--")?.split('=').next()?.to_owned());
    let typed: BTreeSet<String> = arguments.iter().filter_map(flag).collect();
    let file = settings_file::named(&arguments, env::var_os("SIDA_CONFIG"));
    let Completed { arguments, from_file } = match &file {
        Some(file) => settings_file::completed(&command, file.as_ref(), arguments).map_err(ParseError::Settings)?,
        None => Completed { arguments, from_file: BTreeSet::new() },
    };
    let origin = |flag: &str| match (from_file.contains(flag), &file) {
        (true, Some(file)) => Some(format!("configuration {}", file.to_string_lossy())),
        _ => Some(variable(flag)).filter(|variable| !typed.contains(flag) && env::var_os(variable).is_some()),
    };
    let matches = command.try_get_matches_from(arguments);
    let matches = matches.map_err(|error| ParseError::Clap(flag_errors::located(error, origin)))?;
    cluster_elsewhere::check(&matches, &from_file).map_err(ParseError::Settings)?;
    CommandLine::from_arg_matches(&matches).map_err(ParseError::Clap)
}

/// The commands with an environment variable for every flag.
pub(crate) fn command() -> clap::Command {
    let with_environment = |arg: Arg| match arg.get_long() {
        Some(long) => {
            let variable = variable(long);
            match arg.get_action() {
                // A switch is set by 1, true, yes and on, and left unset by their opposites.
                ArgAction::SetTrue => arg.env(variable).value_parser(BoolishValueParser::new()),
                _ => arg.env(variable),
            }
        }
        None => arg,
    };
    CommandLine::command().mut_args(with_environment).mut_subcommands(|sub| sub.mut_args(with_environment))
}

/// The environment variable of a flag.
fn variable(flag: &str) -> String {
    format!("SIDA_{}", flag.replace('-', "_").to_uppercase())
}

/// The environment variables of all flags of all commands.
fn variables() -> BTreeSet<String> {
    let command = command();
    let arguments = command.get_arguments().chain(command.get_subcommands().flat_map(|sub| sub.get_arguments()));
    arguments.filter_map(|arg| Some(arg.get_env()?.to_str()?.to_owned())).collect()
}

impl CommandLine {
    /// Does it.
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        self.set_up_logging()?;
        for warning in environment::unread(env::vars_os(), &variables()) {
            tracing::warn!("{warning}");
        }
        // Sends what is left when the command has ended.
        let _exporting = self.set_up_tracing()?;
        match self.command {
            Command::Ask(arguments) => commands::ask::run(arguments),
            Command::Up(arguments) => commands::up::run(arguments),
            Command::Coordinator(arguments) => commands::coordinator::run(arguments),
            Command::ExpertNode(arguments) => commands::expert_node::run(arguments),
            Command::PredictorNode(arguments) => commands::predictor_node::run(arguments),
            Command::Status(arguments) => commands::status::run(arguments),
            Command::TrainPredictor(arguments) => commands::train_predictor::run(arguments),
            Command::Eval(arguments) => commands::eval::run(arguments),
            Command::Bench(arguments) => commands::bench::run(arguments),
            Command::Inspect(arguments) => commands::inspect::run(arguments),
            Command::Convert(arguments) => commands::convert::run(arguments),
            Command::Synth(arguments) => commands::synth::run(arguments),
            Command::Verify(arguments) => commands::verify::run(arguments),
            Command::Doctor(arguments) => commands::doctor::run(arguments),
            Command::Completions(arguments) => commands::completions::run(arguments),
        }
    }

    fn set_up_tracing(&self) -> anyhow::Result<Option<Exporting>> {
        let Some(endpoint) = &self.general.otlp_endpoint else { return Ok(None) };
        let (service, instance) = self.identity();
        let config = OtlpConfig { endpoint: endpoint.clone(), sampling: self.general.otlp_sampling, service, instance };
        let started = otlp::start(&config);
        Ok(Some(started.map_err(|error| BadConfiguration::because("traces cannot be sent", error))?))
    }

    /// What this process is called in traces: its kind, and which of them.
    fn identity(&self) -> (String, String) {
        let (role, node) = match &self.command {
            Command::Coordinator(arguments) => ("coordinator", arguments.name()),
            Command::ExpertNode(arguments) => ("expert-node", arguments.name()),
            Command::PredictorNode(arguments) => ("predictor-node", arguments.name()),
            Command::Up(_) => ("up", "up"),
            _ => ("client", "client"),
        };
        (format!("sida-{role}"), node.to_owned())
    }

    fn set_up_logging(&self) -> anyhow::Result<()> {
        let is_server = matches!(
            self.command,
            Command::Up(_) | Command::Coordinator(_) | Command::ExpertNode(_) | Command::PredictorNode(_)
        );
        let filter = self.general.log.as_deref().unwrap_or(if is_server { "info" } else { CLIENT_LOG });
        let refused = |error| BadConfiguration::because("logging cannot be set up", error);
        let format: LogFormat = self.general.log_format.parse().map_err(refused)?;
        logging::install(filter, format).map_err(refused)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &[&str]) -> Result<CommandLine, clap::Error> {
        let matches = command().try_get_matches_from(line)?;
        CommandLine::from_arg_matches(&matches)
    }

    #[test]
    fn every_flag_has_an_environment_variable() {
        // Broken: a flag could not be set in a container without changing its command.
        let mut command = command();
        command.build();
        let commands: Vec<_> = command.get_subcommands().filter(|sub| sub.get_name() != "help").collect();
        assert_eq!(commands.len(), 15);
        for sub in commands {
            for arg in sub.get_arguments().filter(|arg| !["help", "version"].contains(&arg.get_id().as_str())) {
                let Some(long) = arg.get_long() else { continue };
                let variable = arg.get_env().unwrap_or_else(|| panic!("{} --{long}", sub.get_name()));
                let expected = format!("SIDA_{}", long.replace('-', "_").to_uppercase());
                assert_eq!(variable.to_str(), Some(expected.as_str()));
            }
        }
    }

    /// Every command with its flags, one per line.
    fn listing() -> String {
        let mut command = command();
        command.build();
        let mut listing = String::new();
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
            listing += &format!("{}\n", sub.get_name());
            for arg in sub.get_arguments().filter(|arg| arg.get_id() != "help") {
                let defaults: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
                let required = if arg.is_required_set() { " (required)" } else { "" };
                let default = if defaults.is_empty() { String::new() } else { format!(" = {}", defaults.join(",")) };
                let name = arg.get_long().map_or_else(|| arg.get_id().to_string(), |long| format!("--{long}"));
                listing += &format!("  {name}{default}{required}\n");
            }
        }
        listing
    }

    #[test]
    fn flags_are_those_of_the_listing() {
        // Broken: a flag would be renamed or lose its default without anybody noticing, and the scripts, charts
        // and TOML files that name it would fail. SIDA_REWRITE=1 writes the listing anew.
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/src/flags.txt");
        if env::var_os("SIDA_REWRITE").is_some() {
            std::fs::write(file, listing()).unwrap();
        }
        assert_eq!(listing(), std::fs::read_to_string(file).unwrap());
    }

    /// `docs/flags.md`.
    fn document() -> String {
        let mut command = command();
        command.build();
        let mut text = "# Flags\n\nEvery flag of every command. Each is also an environment variable, `SIDA_` and its name in capitals with \
             `_` for `-`, and\na key of the TOML file of `--config`. This page is written by `SIDA_REWRITE=1 cargo test -p sida-cli \
             --bins`.\n"
            .to_owned();
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
            let about = sub.get_about().map(ToString::to_string).unwrap_or_default();
            text +=
                &format!("\n## sida {}\n\n{about}.\n\n| flag | default | meaning |\n|---|---|---|\n", sub.get_name());
            for arg in sub.get_arguments().filter(|arg| arg.get_id() != "help") {
                let name =
                    arg.get_long().map_or_else(|| arg.get_id().to_string().to_uppercase(), |long| format!("--{long}"));
                let defaults: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
                let help = arg.get_help().map(ToString::to_string).unwrap_or_default().replace('|', "\\|");
                text += &format!("| `{name}` | {} | {help} |\n", defaults.join(","));
            }
        }
        text
    }

    #[test]
    fn the_document_lists_every_flag() {
        // Broken: an operator would look for flags that do not exist, or never learn of those that do.
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/flags.md");
        if env::var_os("SIDA_REWRITE").is_some() {
            std::fs::write(file, document()).unwrap();
        }
        assert_eq!(document(), std::fs::read_to_string(file).unwrap());
    }

    #[test]
    fn no_flag_is_defined_twice() {
        // Broken: two groups of flags would share a name, and one of them would get the other's value.
        for sub in command().get_subcommands() {
            let mut ids: Vec<_> = sub.get_arguments().map(|arg| arg.get_id().to_string()).collect();
            let arguments = ids.len();
            ids.sort();
            ids.dedup();
            assert_eq!(ids.len(), arguments, "{}", sub.get_name());
        }
    }

    #[test]
    fn every_flag_and_command_has_a_help_text() {
        // Broken: `--help` would list a flag without saying what it does.
        let mut command = command();
        command.build();
        for sub in command.get_subcommands() {
            assert!(sub.get_about().is_some(), "{}", sub.get_name());
            for arg in sub.get_arguments() {
                assert!(arg.get_help().is_some(), "{} {}", sub.get_name(), arg.get_id());
            }
        }
    }

    #[test]
    fn no_variable_collides_with_kubernetes() {
        // Broken: beside a service called `sida` every pod gets SIDA_PORT=tcp://…, which would be read as a flag.
        let injected = |variable: &str| {
            ["SIDA_PORT", "SIDA_SERVICE_HOST", "SIDA_SERVICE_PORT"].iter().any(|name| variable.starts_with(name))
        };
        let command = command();
        let flags = command.get_subcommands().flat_map(|sub| sub.get_arguments());
        let variables = flags.filter_map(|arg| arg.get_env()?.to_str());
        assert_eq!(variables.filter(|variable| injected(variable)).collect::<Vec<_>>(), Vec::<&str>::new());
    }

    #[test]
    fn a_switch_takes_the_words_for_yes_and_no() {
        // Broken: `SIDA_JSON=0` in a manifest would end the command, or mean yes.
        let command = command();
        let ask = command.find_subcommand("ask").unwrap().clone();
        for (word, expected) in [("1", true), ("yes", true), ("on", true), ("true", true), ("0", false), ("no", false)]
        {
            let ask = ask.clone().mut_arg("json", |arg| arg.default_value(word));
            let matches = ask.try_get_matches_from(["ask", "x"]).unwrap();
            assert_eq!(matches.get_flag("json"), expected, "{word}");
        }
    }

    #[test]
    fn commands_parse() {
        // Broken: the commands of the design would not exist under their names.
        for line in [
            "sida ask hello",
            "sida ask --mode hash --alpha predicted --stop . --stop ! hello",
            "sida up --expert-nodes 3 --expert-memory 25% --listen 127.0.0.1:0",
            "sida coordinator --static cluster.toml --name c0",
            "sida expert-node --static cluster.toml --name e0",
            "sida predictor-node --static cluster.toml --name p0",
            "sida coordinator --etcd etcd-0:2379,etcd-1:2379 --cluster prod --name c0 --replicas 3",
            "sida expert-node --etcd etcd-0:2379 --name e0 --listen 0.0.0.0:0 --advertise e0:0 --node-weight 2.5",
            "sida status --endpoint http://127.0.0.1:50051 --watch",
            "sida train-predictor --file corpus.txt --net table --out p.safetensors",
            "sida bench --method encode --file t.txt --batch 8 --budgets 100%,25%",
            "sida bench --device cuda:0 --model synth --budgets 100%,20% --batch 8",
            "sida inspect models/switch-tiny-64",
            "sida convert in --out out",
            "sida synth --like switch-base-8 --out dir",
            "sida verify dir",
            "sida doctor",
            "sida doctor --json",
            "sida completions bash",
        ] {
            if let Err(error) = parsed(&line.split(' ').collect::<Vec<_>>()) {
                panic!("{line}: {error}");
            }
        }
        for line in ["sida ask", "sida frobnicate", "sida ask --mode sideways hello", "sida expert-node"] {
            assert!(parsed(&line.split(' ').collect::<Vec<_>>()).is_err(), "{line}");
        }
    }
}
