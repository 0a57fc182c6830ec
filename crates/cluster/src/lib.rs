//! Who is alive and who holds what. A [`Cluster`] tells the members of a cluster and the placement of
//! experts on them; where it comes from (a static file, one process, etcd) is behind that type, so that
//! every node is `run(config, listener, cluster, shutdown)` whatever keeps the membership.
//!
//! In reading order: [`member`], [`experts`], `view` (what readers see), [`membership`] (how that stands),
//! `published` (between readers and whoever keeps the membership), [`cluster`] (the handle), [`static_file`],
//! [`member_record`] and [`etcd`].

pub mod cluster;
// Without the feature nobody publishes more than once; what that takes is compiled all the same.
#[cfg_attr(not(feature = "etcd"), allow(dead_code))]
pub mod etcd;
pub mod experts;
pub mod member;
pub mod member_record;
#[cfg_attr(not(feature = "etcd"), allow(dead_code))]
pub mod membership;
#[cfg_attr(not(feature = "etcd"), allow(dead_code))]
mod published;
pub mod static_file;
#[cfg_attr(not(feature = "etcd"), allow(dead_code))]
mod view;

pub use cluster::{Cluster, ClusterError, View};
pub use etcd::{EtcdConfig, EtcdError, EtcdTls, EtcdUser, Joining};
pub use member::{Address, Member, Role};
pub use member_record::MemberRecord;
pub use membership::{Membership, Source};
pub use static_file::{StaticFile, StaticFileError};
