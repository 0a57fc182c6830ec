//! Finds the `sida` binary. Used by [`crate::process`] and by tests of single commands.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// The root of the repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests have a folder of their own")
}

/// The binary of this source, which Cargo builds for the tests of its package; or the one that `SIDA_BINARY` names.
pub fn sida() -> PathBuf {
    if let Some(binary) = env::var_os("SIDA_BINARY") {
        return binary.into();
    }
    let test = env::current_exe().expect("the path of this test");
    // target/PROFILE/deps/this-test
    test.ancestors().nth(2).expect("a target directory").join("sida")
}

/// A command of the binary. What the caller's environment says to `sida` is kept from it: a test states every flag.
pub fn command() -> Command {
    let mut command = Command::new(sida());
    for (name, _) in env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SIDA_")) {
        command.env_remove(name);
    }
    command
}
