//! Who is alive and who holds what. A [`Cluster`] tells the members of a cluster and the placement of
//! experts on them; where it comes from (a static file, one process, etcd) is behind that type, so that
//! every node is `run(config, listener, cluster, shutdown)` whatever keeps the membership.
//!
//! In reading order: [`member`], [`experts`], [`cluster`], [`static_file`].

pub mod cluster;
pub mod experts;
pub mod member;
pub mod static_file;

pub use cluster::{Cluster, ClusterError, View};
pub use member::{Address, Member, Role};
pub use static_file::{StaticFile, StaticFileError};
