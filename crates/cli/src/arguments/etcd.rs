//! How etcd is reached, where it keeps the membership.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use sida_cluster::{EtcdConfig, EtcdTls, EtcdUser};

use crate::time_span;

/// A cluster in etcd.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct EtcdArguments {
    /// etcd's members, host:port each, with commas between them
    #[arg(long, value_name = "ENDPOINTS", value_delimiter = ',')]
    pub(crate) etcd: Vec<String>,
    /// The cluster's name; everything is kept under /sida/NAME/
    #[arg(long, value_name = "NAME", default_value = "default")]
    pub(super) cluster: String,
    /// PEM file of the authorities trusted for etcd; with it, or --etcd-cert, etcd is reached by TLS
    #[arg(long, value_name = "FILE")]
    pub(super) etcd_ca: Option<PathBuf>,
    /// PEM file of this node's certificate for etcd
    #[arg(long, value_name = "FILE", requires = "etcd_key")]
    pub(super) etcd_cert: Option<PathBuf>,
    /// PEM file of its private key
    #[arg(long, value_name = "FILE", requires = "etcd_cert")]
    pub(super) etcd_key: Option<PathBuf>,
    /// The user of etcd
    #[arg(long, value_name = "NAME", requires = "etcd_password_file")]
    pub(super) etcd_user: Option<String>,
    /// File with that user's password
    #[arg(long, value_name = "FILE", requires = "etcd_user")]
    pub(super) etcd_password_file: Option<PathBuf>,
    /// How long a node that is gone without a word stays a member
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = time_span::parse)]
    pub(super) lease_ttl: Duration,
    /// How often everything is listed anew, whatever etcd has told in between
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = time_span::parse)]
    pub(super) relist_interval: Duration,
    /// Copies of experts that may move in a minute when a node joins or the load changes; lost ones are restored at
    /// once
    #[arg(long, value_name = "N", default_value_t = 600)]
    pub(super) moves_per_minute: u32,
    /// Expert-nodes that hold each expert; those of hot ones are more
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) replicas: usize,
    /// The address that others reach this node by; port 0 stands for the one it listens on [default: where it
    /// listens]
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) advertise: Option<String>,
}

impl EtcdArguments {
    /// What the flags say.
    pub(crate) fn config(&self) -> EtcdConfig {
        let identity = self.etcd_cert.clone().zip(self.etcd_key.clone());
        let by_tls = self.etcd_ca.is_some() || identity.is_some();
        let user = self.etcd_user.clone().zip(self.etcd_password_file.clone());
        EtcdConfig {
            lease_ttl: self.lease_ttl,
            relist_interval: self.relist_interval.max(Duration::from_millis(100)),
            moves_per_minute: self.moves_per_minute,
            tls: by_tls.then(|| EtcdTls { authorities: self.etcd_ca.clone(), identity }),
            user: user.map(|(name, password_file)| EtcdUser { name, password_file }),
            ..EtcdConfig::new(self.etcd.clone(), self.cluster.clone())
        }
    }
}
