//! Which crate may use which: the rules of ARCHITECTURE.md, one a line, checked against every manifest of the
//! workspace (normal, build and dev dependencies alike). Needs no network and no build.

use std::collections::BTreeMap;

use cargo_metadata::MetadataCommand;

/// From top to bottom. A crate uses only crates of lines below its own; those of one line never use each other.
const LAYERS: [&[&str]; 6] = [
    &["sida-cli"],
    &["sida-tests"],
    &["sida-coordinator", "sida-predictor-node", "sida-expert-node"],
    &["sida-cluster", "sida-predictor"],
    &["sida-proto", "sida-model", "sida-rpc"],
    &["sida-routing"],
];
/// Used by all of them but for the pure bottom; uses none.
const TELEMETRY: &str = "sida-telemetry";

/// What a crate may use from outside the workspace, when that is all it may use.
const NOTHING_ELSE: [(&str, &[&str]); 1] = [("sida-routing", &["serde", "thiserror", "proptest"])];

/// Outside crates that only these of ours use. A name also covers what begins with it and a `-`.
const ONLY_IN: [(&str, &[&str]); 10] = [
    ("candle", &["sida-model", "sida-predictor"]),
    ("cudarc", &["sida-model"]),
    ("safetensors", &["sida-model", "sida-predictor"]),
    ("tokenizers", &["sida-model"]),
    ("etcd", &["sida-cluster"]),
    ("clap", &["sida-cli"]),
    ("indicatif", &["sida-cli"]),
    ("anyhow", &["sida-cli", "sida-tests"]),
    ("metrics-exporter", &["sida-telemetry"]),
    // `sida-cli` reads what it sent, in its tests.
    ("opentelemetry", &["sida-telemetry", "sida-cli"]),
];

/// Outside crates that these of ours never use.
const NEVER_IN: [(&str, &[&str]); 3] = [
    ("tokio", &["sida-routing", "sida-model", "sida-predictor"]),
    ("tonic", &["sida-routing", "sida-model", "sida-predictor", "sida-cluster", "sida-telemetry"]),
    ("serde_json", &["sida-routing"]),
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
                assert_ne!(package, "sida-routing", "{package} is pure and must not use {TELEMETRY}");
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
