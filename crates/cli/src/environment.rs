//! Variables of the environment whose names begin with `SIDA_`: an empty one is an unset one, and one that no command
//! reads is told, with the name that may have been meant. Called by `main` and by `command_line`.

use std::{collections::BTreeSet, env, ffi::OsString};

use crate::flag_errors;

const PREFIX: &str = "SIDA_";

/// What the project's scripts and tests read and the command line does not: no misspelling.
const OF_TESTS: [&str; 16] = [
    "SIDA_BINARY",
    "SIDA_CONTAINERS",
    "SIDA_CUDA_DEVICE",
    "SIDA_CUSTOM_RESOURCES",
    "SIDA_FUZZ_SECONDS",
    "SIDA_IMAGE_BINARY",
    "SIDA_IMAGE_CACHE",
    "SIDA_IMAGE_TEST",
    "SIDA_LONG_TESTS",
    "SIDA_MODELS_DIR",
    "SIDA_PICTURES",
    "SIDA_REVISION",
    "SIDA_REWRITE",
    "SIDA_SIMULATION_SEED",
    "SIDA_SIMULATION_SEEDS",
    "SIDA_SOAK_SECONDS",
];

/// How alike two names must be for one to be proposed instead of the other, from 0 to 1.
const LIKENESS_MIN: f64 = 0.8;

/// Removes empty variables of ours, which is what `SIDA_X=` in a script or a manifest means.
///
/// # Safety
/// No other thread may read or write the environment meanwhile.
pub(crate) unsafe fn remove_empty() {
    for variable in empty(env::vars_os()) {
        // SAFETY: the caller's promise.
        unsafe { env::remove_var(variable) };
    }
}

fn empty(variables: impl Iterator<Item = (OsString, OsString)>) -> Vec<OsString> {
    let is_ours = |name: &OsString| name.to_str().is_some_and(|name| name.starts_with(PREFIX));
    variables.filter(|(name, value)| is_ours(name) && value.is_empty()).map(|(name, _)| name).collect()
}

/// A sentence for each variable that begins as ours do and that nobody reads. `known` are the variables of all flags.
pub(crate) fn unread(variables: impl Iterator<Item = (OsString, OsString)>, known: &BTreeSet<String>) -> Vec<String> {
    let ours = variables.filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
    let ours = ours.filter(|(name, _)| name.starts_with(PREFIX));
    let unread = ours.filter(|(name, value)| {
        !known.contains(name) && !OF_TESTS.contains(&&**name) && !is_of_kubernetes(name, &value.to_string_lossy())
    });
    unread.map(|(name, _)| told(&name, known)).collect()
}

fn told(name: &str, known: &BTreeSet<String>) -> String {
    if let Some(successor) = flag_errors::successor(&name[PREFIX.len()..].to_lowercase().replace('_', "-")) {
        return format!("the environment's {name} is not read: its flag is gone; {successor}");
    }
    let likeness =
        |other: &&String| strsim::normalized_damerau_levenshtein(&name[PREFIX.len()..], &other[PREFIX.len()..]);
    let nearest = known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    match nearest.filter(|nearest| likeness(nearest) >= LIKENESS_MIN) {
        Some(nearest) => format!("the environment's {name} is no flag of any command; is {nearest} meant?"),
        None => format!("the environment's {name} is no flag of any command and is not read"),
    }
}

/// Whether Kubernetes makes such a variable in every pod beside a service whose name begins with `sida`:
/// `SIDA_SERVICE_HOST`, `SIDA_COORDINATOR_SERVICE_PORT_GRPC`, `SIDA_PORT_50051_TCP_ADDR` and their like; `SIDA_PORT` only with
/// the URL that it puts there, since a person would write a number.
fn is_of_kubernetes(name: &str, value: &str) -> bool {
    let is_port = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let words: Vec<&str> = name.split('_').collect();
    let is_host_or_port = words.windows(2).any(|words| words == ["SERVICE", "HOST"] || words == ["SERVICE", "PORT"]);
    let is_one_port = words
        .windows(3)
        .any(|words| words[0] == "PORT" && is_port(words[1]) && ["TCP", "UDP", "SCTP"].contains(&words[2]));
    let is_url = ["tcp://", "udp://", "sctp://"].iter().any(|scheme| value.starts_with(scheme));
    is_host_or_port || is_one_port || (is_url && words.last() == Some(&"PORT"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warnings(names: &[&str]) -> Vec<String> {
        let known = ["SIDA_EXPERT_MEMORY", "SIDA_MODEL", "SIDA_MODEL_NAME", "SIDA_JSON"].map(str::to_owned);
        unread(names.iter().map(|name| (name.into(), "tcp://10.0.0.1:50051".into())), &known.into())
    }

    #[test]
    fn what_nobody_reads_is_told_with_what_may_be_meant() {
        // Broken: a node would run with a budget nobody asked for, because of one letter.
        let [warning] = &warnings(&["SIDA_EXPERT_MEMROY"])[..] else { panic!("one warning") };
        assert!(warning.contains("SIDA_EXPERT_MEMROY") && warning.contains("SIDA_EXPERT_MEMORY meant"), "{warning}");
        let [warning] = &warnings(&["SIDA_FROBNICATE"])[..] else { panic!("one warning") };
        assert!(warning.contains("SIDA_FROBNICATE") && !warning.contains("meant"), "{warning}");
        let [warning] = &warnings(&["SIDA_PRELOAD_DEPTH"])[..] else { panic!("one warning") };
        assert!(warning.contains("SIDA_PRELOAD_DEPTH is not read: its flag is gone; --plan-chance"), "{warning}");
    }

    #[test]
    fn what_others_set_is_not_told() {
        // Broken: every pod would begin its log with warnings about what Kubernetes put there.
        let fine = [
            "SIDA_MODEL",
            "SIDA_REWRITE",
            "PATH",
            "SIDAR_X",
            "SIDA_PORT",
            "SIDA_SERVICE_HOST",
            "SIDA_SERVICE_PORT",
            "SIDA_SERVICE_PORT_GRPC",
            "SIDA_PORT_50051_TCP",
            "SIDA_PORT_50051_TCP_PROTO",
            "SIDA_COORDINATOR_PORT_9090_UDP_ADDR",
            "SIDA_EXPERT_NODE_SERVICE_HOST",
        ];
        assert_eq!(warnings(&fine), Vec::<String>::new());
    }

    #[test]
    fn a_port_that_a_person_set_is_told() {
        // Broken: a server would listen on its default port, although SIDA_PORT names another.
        let variables = [("SIDA_PORT", "50052"), ("SIDA_UP_PORT", "tcp://10.0.0.1:50051"), ("SIDA_UP_PORT", "0")];
        let variables = variables.map(|(name, value)| (name.into(), value.into()));
        let warnings = unread(variables.into_iter(), &BTreeSet::new());
        assert!(warnings.len() == 2 && warnings[0].contains("SIDA_PORT") && warnings[1].contains("SIDA_UP_PORT"));
    }

    #[test]
    fn only_ours_are_removed_and_only_if_they_are_empty() {
        // Broken: `SIDA_SEED=` would be refused as no number, or somebody else's variable be taken away.
        let variables = [("SIDA_SEED", ""), ("SIDA_MODEL", "m"), ("HOME", "")];
        let variables = variables.map(|(name, value)| (OsString::from(name), OsString::from(value)));
        assert_eq!(empty(variables.into_iter()), ["SIDA_SEED"]);
    }
}
