//! Which cluster a node belongs to, and which of its members it is.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;
use sida_cluster::{Address, Cluster, Joining, Member, Role, StaticFile, StaticFileError};
use sida_model::ModelConfig;
use sida_routing::{Digest, Extent, NodeId};

use super::etcd::EtcdArguments;
use crate::bad_configuration::BadConfiguration;

/// Where a node of a cluster in etcd listens unless the flag says otherwise.
const LISTEN_DEFAULT: &str = "0.0.0.0:50051";

/// A node's place in its cluster.
#[derive(Args, Clone, Debug)]
pub(crate) struct MembershipArguments {
    /// TOML file of the cluster's members: [[coordinator]], [[expert-node]] and [[predictor-node]] tables of
    /// name and address; or --etcd
    #[arg(long = "static", value_name = "FILE")]
    static_file: Option<PathBuf>,
    /// This node's name, in that file or in etcd
    #[arg(long, value_name = "NAME")]
    name: String,
    /// Where to listen; port 0 takes any that is free [default: the address in the file; with --etcd 0.0.0.0:50051]
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    #[command(flatten)]
    etcd: EtcdArguments,
}

/// The member of the cluster that this process is.
pub(crate) struct OwnMember {
    pub(crate) node: NodeId,
    /// Where to listen.
    pub(crate) address: String,
    role: Role,
}

impl MembershipArguments {
    /// This node's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// This node, which must have this role where a file says who has which.
    pub(crate) fn member(&self, role: Role) -> Result<OwnMember, BadConfiguration> {
        let Some(static_file) = self.source()? else {
            let address = self.listen.clone().unwrap_or_else(|| LISTEN_DEFAULT.to_owned());
            return Ok(OwnMember { node: self.name.as_str().into(), address, role });
        };
        let (file, shown) = (StaticFile::open(static_file).map_err(refused)?, static_file.display());
        let member = file.member(&shown.to_string(), &self.name).map_err(refused)?;
        if member.role != role {
            let (name, found) = (&self.name, member.role);
            return Err(BadConfiguration::new(format!("{shown}: {name} has role {found}, expected {role}")));
        }
        let address = self.listen.clone().unwrap_or_else(|| member.address.to_string());
        Ok(OwnMember { node: member.node.clone(), address, role })
    }

    /// The cluster: that of the file, its experts placed; or that in etcd, with `own` as a member that is reached at
    /// `bound` unless --advertise says otherwise. Must be called in the runtime.
    pub(crate) fn cluster(
        &self,
        own: &OwnMember,
        bound: SocketAddr,
        model: (&ModelConfig, Digest),
        weight: f64,
    ) -> Result<Cluster, BadConfiguration> {
        let (config, digest) = model;
        let (moe_layers, num_experts) = (config.moe_layer_count(), config.num_experts);
        if let Some(static_file) = self.source()? {
            let cluster = StaticFile::open(static_file).map_err(refused)?.cluster(moe_layers, num_experts);
            return cluster.map_err(|error| BadConfiguration::because(static_file.display().to_string(), error));
        }
        let address = Address::Grpc(advertised(self.etcd.advertise.as_deref(), bound)?);
        let joining = Joining {
            member: Member { node: own.node.clone(), role: own.role, address, weight },
            model: digest,
            extent: Extent { moe_layers, num_experts, replicas: self.etcd.replicas },
        };
        Cluster::join(self.etcd.config(), joining).map_err(|error| BadConfiguration::because("--etcd", error))
    }

    /// The file, or none for etcd.
    fn source(&self) -> Result<Option<&PathBuf>, BadConfiguration> {
        match (&self.static_file, self.etcd.etcd.is_empty()) {
            (Some(_), false) => Err("--static and --etcd exclude each other: a cluster is in a file or in etcd"),
            (None, true) => Err("name the cluster: --static FILE for one that never changes, or --etcd HOST:PORT,..."),
            (Some(file), true) => Ok(Some(file)),
            (None, false) => Ok(None),
        }
        .map_err(BadConfiguration::new)
    }
}

/// The address that others are told.
fn advertised(flag: Option<&str>, bound: SocketAddr) -> Result<String, BadConfiguration> {
    match flag {
        Some(address) => Ok(match address.strip_suffix(":0") {
            Some(host) => format!("{host}:{}", bound.port()),
            None => address.to_owned(),
        }),
        None if bound.ip().is_unspecified() => Err(BadConfiguration::new(format!(
            "listening on {bound}, which is no address that others can reach: name one by --advertise HOST:{}",
            bound.port()
        ))),
        None => Ok(bound.to_string()),
    }
}

fn refused(error: StaticFileError) -> BadConfiguration {
    BadConfiguration::because("--static", error)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_node_finds_itself() {
        // Broken: a node would listen on another's address, or run in another's role.
        let dir = tempfile::tempdir().unwrap();
        let static_file = dir.path().join("cluster.toml");
        fs::write(&static_file, "[[expert-node]]\nname = 'e0'\naddress = '127.0.0.1:7001'\n").unwrap();
        let arguments = |name: &str, listen: Option<&str>| MembershipArguments {
            static_file: Some(static_file.clone()),
            name: name.into(),
            listen: listen.map(str::to_owned),
            etcd: EtcdArguments::default(),
        };
        let listens = |listen| arguments("e0", listen).member(Role::ExpertNode).unwrap().address;
        assert_eq!(listens(None), "127.0.0.1:7001");
        assert_eq!(listens(Some("127.0.0.1:0")), "127.0.0.1:0");
        let error = arguments("e0", None).member(Role::Coordinator).err().unwrap().to_string();
        assert!(error.ends_with("e0 has role expert-node, expected coordinator"), "{error}");
        assert!(arguments("e1", None).member(Role::ExpertNode).is_err());
    }

    #[test]
    fn a_cluster_is_in_a_file_or_in_etcd() {
        // Broken: a node would join another cluster than its operator believes.
        let arguments = |file: Option<&str>, etcd: &[&str]| MembershipArguments {
            static_file: file.map(PathBuf::from),
            name: "e0".into(),
            listen: None,
            etcd: EtcdArguments {
                etcd: etcd.iter().map(|&endpoint| endpoint.to_owned()).collect(),
                ..Default::default()
            },
        };
        let error = |arguments: MembershipArguments| arguments.member(Role::ExpertNode).err().unwrap().to_string();
        assert!(error(arguments(Some("c.toml"), &["h:1"])).contains("exclude each other"));
        assert!(error(arguments(None, &[])).starts_with("name the cluster: --static"));
        let own = arguments(None, &["h:1"]).member(Role::ExpertNode).unwrap();
        assert_eq!((own.node.as_str(), own.address.as_str()), ("e0", LISTEN_DEFAULT));
    }

    #[test]
    fn others_are_told_an_address_that_they_can_reach() {
        // Broken: every member would be listed as 0.0.0.0, and coordinators would call themselves.
        let any = "0.0.0.0:7001".parse().unwrap();
        assert_eq!(advertised(None, "10.0.0.3:7001".parse().unwrap()).unwrap(), "10.0.0.3:7001");
        assert_eq!(advertised(Some("node-3:0"), any).unwrap(), "node-3:7001");
        assert_eq!(advertised(Some("node-3:80"), any).unwrap(), "node-3:80");
        assert!(advertised(None, any).unwrap_err().to_string().contains("--advertise HOST:7001"));
    }
}
