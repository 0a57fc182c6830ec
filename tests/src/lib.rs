//! What end-to-end tests run on: a cluster of real processes of the `sida` binary on this machine, on ports
//! that the system picks, so that tests run side by side.
//!
//! In reading order: [`binary`] (where `sida` is), [`process`] (one running node), [`sandbox`] (a cluster).
//! The tests themselves are beside `src`: `import_direction.rs`, `fuzz/`, `end_to_end/`.

pub mod binary;
pub mod process;
pub mod sandbox;

pub use process::Process;
pub use sandbox::{Sandbox, SandboxConfig};
