//! Which crate may use which, and which folder of the coordinator: the rules of ARCHITECTURE.md, one a line. Crates are
//! checked against every manifest of the workspace (normal, build and dev dependencies alike), folders against the
//! `crate::` paths in their sources. Needs no network and no build.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use cargo_metadata::MetadataCommand;

/// From top to bottom. A crate uses only crates of lines below its own; those of one line never use each other.
const LAYERS: [&[&str]; 6] = [
    &["sida-cli", "sida-examples"],
    &["sida-tests"],
    &["sida-coordinator", "sida-predictor-node", "sida-expert-node"],
    &["sida-cluster", "sida-predictor"],
    &["sida-proto", "sida-model", "sida-rpc"],
    &["sida-routing", "sida-kernels"],
];
/// Used by all of them but for the pure bottom; uses none.
const TELEMETRY: &str = "sida-telemetry";

/// What a crate may use from outside the workspace, when that is all it may use.
const NOTHING_ELSE: [(&str, &[&str]); 1] = [("sida-routing", &["serde", "thiserror", "proptest"])];

/// Outside crates that only these of ours use. A name also covers what begins with it and a `-`.
const ONLY_IN: [(&str, &[&str]); 16] = [
    ("candle", &["sida-kernels", "sida-model", "sida-predictor"]),
    ("cudarc", &["sida-model"]),
    ("safetensors", &["sida-model", "sida-predictor"]),
    ("tokenizers", &["sida-model"]),
    ("llguidance", &["sida-coordinator"]),
    ("etcd", &["sida-cluster"]),
    // The coordinator says what its HTTP routes answer; how their connections are served is `sida-rpc`'s.
    ("axum", &["sida-rpc", "sida-coordinator"]),
    // `sida-cli` asks servers that speak OpenAI's protocol, to measure them.
    ("hyper", &["sida-rpc", "sida-cli"]),
    ("tokio-rustls", &["sida-rpc"]),
    ("clap", &["sida-cli"]),
    ("clap_complete", &["sida-cli"]),
    ("strsim", &["sida-cli"]),
    ("indicatif", &["sida-cli"]),
    ("anyhow", &["sida-cli", "sida-examples", "sida-tests"]),
    ("metrics-exporter", &["sida-telemetry"]),
    // `sida-cli` reads what it sent, in its tests.
    ("opentelemetry", &["sida-telemetry", "sida-cli"]),
];

/// Outside crates that these of ours never use.
const NEVER_IN: [(&str, &[&str]); 3] = [
    ("tokio", &["sida-routing", "sida-kernels", "sida-model", "sida-predictor"]),
    ("tonic", &["sida-routing", "sida-kernels", "sida-model", "sida-predictor", "sida-cluster", "sida-telemetry"]),
    ("serde_json", &["sida-routing", "sida-kernels"]),
];

/// The coordinator's modules from top to bottom. One uses only those of lines below its own, and what is within itself;
/// `lib.rs` stands above all.
const COORDINATOR: [&str; 12] = [
    "doors",
    "start",
    "coordinator",
    "schedule",
    "forward",
    "predict",
    "dispatch",
    "dispatch::remote",
    "intake",
    "answer",
    "measures",
    "config",
];

/// {crate of ours: names of everything its manifest depends on}.
fn manifests() -> BTreeMap<String, Vec<String>> {
    let metadata = MetadataCommand::new()
        .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"))
        .no_deps()
        .exec()
        .expect("cargo metadata");
    let names = |package: cargo_metadata::Package| {
        (package.name.to_string(), package.dependencies.into_iter().map(|dependency| dependency.name).collect())
    };
    metadata.packages.into_iter().map(names).collect()
}

fn is_covered(name: &str, by: &str) -> bool {
    name.strip_prefix(by).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

fn layer(name: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&name))
}

/// A layer would know of one above it, and could no longer be read, tested or replaced without it.
#[test]
fn imports_point_down_only() {
    for (package, dependencies) in manifests() {
        let ours = dependencies.iter().filter(|name| name.starts_with("sida-"));
        for used in ours {
            if used == TELEMETRY {
                let is_pure = LAYERS[LAYERS.len() - 1].contains(&package.as_str());
                assert!(!is_pure, "{package} is pure and must not use {TELEMETRY}");
                continue;
            }
            assert_ne!(package, TELEMETRY, "{TELEMETRY} must not use {used}");
            let above = layer(&package).unwrap_or_else(|| panic!("{package} is in no layer: give it one"));
            let below = layer(used).unwrap_or_else(|| panic!("{used} is in no layer: give it one"));
            assert!(above < below, "{package} must not use {used}");
        }
    }
}

/// Tensors would leak out of the model, the network into decisions, or a second copy of a facility would grow.
#[test]
fn outside_crates_stay_where_they_belong() {
    for (package, dependencies) in manifests() {
        for used in dependencies.iter().filter(|name| !name.starts_with("sida-")) {
            for (name, allowed) in ONLY_IN {
                let is_refused = is_covered(used, name) && !allowed.contains(&package.as_str());
                assert!(!is_refused, "{package} must not use {used}: only {allowed:?} may");
            }
            for (name, refused) in NEVER_IN {
                let is_refused = is_covered(used, name) && refused.contains(&package.as_str());
                assert!(!is_refused, "{package} must not use {used}");
            }
            for (pure, allowed) in NOTHING_ELSE {
                let is_refused = package == pure && !allowed.contains(&used.as_str());
                assert!(!is_refused, "{package} must not use {used}: only {allowed:?}");
            }
        }
    }
}

/// The rules would name crates that do not exist, and so forbid nothing.
#[test]
fn rules_name_real_crates() {
    let manifests = manifests();
    let ours = LAYERS.concat().into_iter().chain([TELEMETRY]);
    let ruled = ONLY_IN.iter().chain(&NEVER_IN).chain(&NOTHING_ELSE).flat_map(|(_, ours)| ours.iter().copied());
    for name in ours.chain(ruled.filter(|name| name.starts_with("sida-"))) {
        assert!(manifests.contains_key(name), "{name} is not in the workspace");
    }
    for package in manifests.keys() {
        assert!(package == TELEMETRY || layer(package).is_some(), "{package} is in no layer: give it one");
    }
}

fn coordinator_src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../coordinator/src")
}

/// {module of the coordinator, as `dispatch::remote::lane`: its source}, `lib.rs` left out.
fn coordinator_modules() -> BTreeMap<String, String> {
    let (root, mut folders, mut modules) = (coordinator_src(), vec![coordinator_src()], BTreeMap::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of sources") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let within = path.strip_prefix(&root).expect("below the root").with_extension("");
            let names: Vec<&str> = within.iter().map(|name| name.to_str().expect("a name in UTF-8")).collect();
            let module = names.join("::").trim_end_matches("::mod").to_owned();
            if module != "lib" {
                modules.insert(module, fs::read_to_string(&path).expect("a source"));
            }
        }
    }
    modules
}

/// The line of [`COORDINATOR`] that a path belongs to: that of the longest module it begins with.
fn line(path: &str) -> usize {
    let is_within =
        |module: &str| path.strip_prefix(module).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"));
    let lines = COORDINATOR.iter().enumerate().filter(|(_, module)| is_within(module));
    let line = lines.max_by_key(|(_, module)| module.len());
    line.unwrap_or_else(|| panic!("{path} is in no folder of the coordinator: give it one")).0
}

/// Every path of a source that begins with `crate::`, without that; groups are unfolded, comments left out.
fn crate_paths(source: &str) -> Vec<String> {
    let code = source.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join(" ");
    let mut paths = Vec::new();
    for after in code.split("crate::").skip(1) {
        unfold(after, "", &mut paths);
    }
    paths
}

/// Reads one path, or a group of paths, that continues `prefix`; returns what follows it.
fn unfold<'a>(text: &'a str, prefix: &str, paths: &mut Vec<String>) -> &'a str {
    if let Some(group) = text.strip_prefix('{') {
        let mut rest = group.trim_start();
        while !rest.is_empty() && !rest.starts_with('}') {
            let after = unfold(rest, prefix, paths).trim_start_matches(|c| c != ',' && c != '}');
            rest = after.strip_prefix(',').unwrap_or(after).trim_start();
        }
        return rest.strip_prefix('}').unwrap_or(rest);
    }
    let (name, rest) = text.split_at(text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len()));
    let path = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}::{name}") };
    match rest.strip_prefix("::") {
        Some(more) => unfold(more, &path, paths),
        None => {
            paths.push(path);
            rest
        }
    }
}

/// Nothing but `lib.rs` would say in which order the coordinator is read, and its folders would grow together.
#[test]
fn folders_of_the_coordinator_point_down_only() {
    for (module, source) in coordinator_modules() {
        for used in crate_paths(&source) {
            let (above, below) = (line(&module), line(&used));
            assert!(above <= below, "{module} must not use {used}: {} is above", COORDINATOR[below]);
        }
        let relative = source.lines().find(|line| line.contains("super::") && line.trim() != "use super::*;");
        assert_eq!(relative, None, "{module} must name what it uses by `crate::`, which is what is checked");
    }
}

/// The folders would be checked against paths that nobody wrote, or against none.
#[test]
fn folders_are_real_and_paths_are_read() {
    let modules = coordinator_modules();
    for folder in COORDINATOR {
        assert!(modules.contains_key(folder), "{folder} is not in the coordinator");
    }
    let source =
        "use crate::{\n    a::{self, b::C},\n    d as e,\n};\n// crate::f\nlet x = crate::g::h(1); use crate::i::*;";
    assert_eq!(crate_paths(source), ["a::self", "a::b::C", "d", "g::h", "i::"]);
}
