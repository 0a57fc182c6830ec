//! What end-to-end tests run on: a cluster of real processes of the `sida` binary on this machine, on ports
//! that the system picks, so that tests run side by side.
//!
//! In reading order: [`binary`] (where `sida` is), [`process`] (one running node), [`fault_proxy`] (a bad network
//! before it) and [`namespace`] (a network of its own), [`sandbox`] (a cluster), [`load_client`] (what is asked of it),
//! [`etcd`] and [`live_cluster`] (a cluster whose nodes come and go), on [`ports`].
//! The tests themselves are beside `src`: `import_direction.rs`, `fuzz/`, `simulation/`, and `end_to_end/`, which belongs to
//! `sida-cli`, so that Cargo builds the binary for it.

pub mod binary;
pub mod etcd;
pub mod fault_proxy;
pub mod live_cluster;
pub mod load_client;
pub mod namespace;
pub mod ports;
pub mod process;
pub mod sandbox;

pub use etcd::Etcd;
pub use fault_proxy::FaultProxy;
pub use live_cluster::LiveCluster;
pub use load_client::Load;
pub use namespace::Namespace;
pub use process::Process;
pub use sandbox::{Sandbox, SandboxConfig};
