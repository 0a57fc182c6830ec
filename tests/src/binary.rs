//! Finds the `sida` binary, and builds it where it is missing or older than its source. Used by [`crate::process`] and by tests of
//! single commands.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// The root of the repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests have a folder of their own")
}

/// The binary of this source, in the profile that the tests were built in; or the one that `SIDA_BINARY` names.
///
/// Cargo builds no binary of another package for a test, so the first caller asks it to; when nothing changed that
/// takes a fraction of a second.
pub fn sida() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| match env::var_os("SIDA_BINARY") {
        Some(binary) => binary.into(),
        None => build(),
    })
}

/// A command of the binary. What the caller's environment says to `sida` is kept from it: a test states every flag.
pub fn command() -> Command {
    let mut command = Command::new(sida());
    for (name, _) in env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SIDA_")) {
        command.env_remove(name);
    }
    command
}

fn build() -> PathBuf {
    let test = env::current_exe().expect("the path of this test");
    // target/PROFILE/deps/this-test
    let profile = test.ancestors().nth(2).expect("a target directory");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(repository()).args(["build", "--quiet", "--package", "sida-cli", "--bin", "sida"]);
    // As tests/run.sh builds it.
    cargo.args(["--features", "etcd"]);
    if profile.ends_with("release") {
        cargo.arg("--release");
    }
    let status = cargo.status().expect("cargo can be run");
    assert!(status.success(), "sida does not build");
    profile.join("sida")
}
