//! Which cluster a node belongs to, and which of its members it is.

use std::path::PathBuf;

use clap::Args;
use sida_cluster::{Cluster, Role, StaticFile, StaticFileError};
use sida_model::ModelConfig;
use sida_routing::NodeId;

use crate::bad_configuration::BadConfiguration;

/// A node's place in its cluster.
#[derive(Args, Clone, Debug)]
pub(crate) struct MembershipArguments {
    /// TOML file of the cluster's members: [[coordinator]], [[expert-node]] and [[predictor-node]] tables of
    /// name and address
    #[arg(long = "static", value_name = "FILE")]
    static_file: PathBuf,
    /// This node's name in that file
    #[arg(long, value_name = "NAME")]
    name: String,
    /// Listen here instead of on the address in the file; port 0 takes any that is free
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
}

/// This node.
pub(crate) struct Own {
    pub(crate) node: NodeId,
    /// Where to listen.
    pub(crate) address: String,
}

impl MembershipArguments {
    /// This node, which must have this role in the file.
    pub(crate) fn member(&self, role: Role) -> Result<Own, BadConfiguration> {
        let file = self.open()?;
        let member = file.member(&self.static_file.display().to_string(), &self.name).map_err(refused)?;
        if member.role != role {
            let (name, found) = (&self.name, member.role);
            let shown = self.static_file.display();
            return Err(BadConfiguration::new(format!("{shown}: {name} has role {found}, expected {role}")));
        }
        let address = self.listen.clone().unwrap_or_else(|| member.address.to_string());
        Ok(Own { node: member.node.clone(), address })
    }

    /// The cluster of the file, its experts placed.
    pub(crate) fn cluster(&self, config: &ModelConfig) -> Result<Cluster, BadConfiguration> {
        let cluster = self.open()?.cluster(config.moe_layer_count(), config.num_experts);
        cluster.map_err(|error| BadConfiguration::because(self.static_file.display().to_string(), error))
    }

    fn open(&self) -> Result<StaticFile, BadConfiguration> {
        StaticFile::open(&self.static_file).map_err(refused)
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
            static_file: static_file.clone(),
            name: name.into(),
            listen: listen.map(str::to_owned),
        };
        let listens = |listen| arguments("e0", listen).member(Role::ExpertNode).unwrap().address;
        assert_eq!(listens(None), "127.0.0.1:7001");
        assert_eq!(listens(Some("127.0.0.1:0")), "127.0.0.1:0");
        let error = arguments("e0", None).member(Role::Coordinator).err().unwrap().to_string();
        assert!(error.ends_with("e0 has role expert-node, expected coordinator"), "{error}");
        assert!(arguments("e1", None).member(Role::ExpertNode).is_err());
    }
}
