//! Keys: the files of those whom a node lets in, and the key that a client shows.

use std::path::PathBuf;

use clap::Args;
use sida_rpc::{ClientConfig, Gate, KeyError, KeyFile, OwnKey};

use super::connection::ConnectionArguments;
use crate::bad_configuration::BadConfiguration;

/// Who may use a coordinator.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ApiKeysArguments {
    /// File of the clients that are let in, NAME:KEY a line; read again when it changes [default: all clients]
    #[arg(long, value_name = "FILE")]
    api_keys: Option<PathBuf>,
}

impl ApiKeysArguments {
    /// What lets in whoever the file names.
    pub(crate) fn gate(&self) -> Result<Gate, BadConfiguration> {
        gate("--api-keys", self.api_keys.clone().map(KeyFile::Clients))
    }
}

/// What nodes of one cluster know each other by.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ClusterKeyArguments {
    /// File with the key of the cluster: coordinators send it, and expert-nodes and predictor-nodes let in nobody without it.
    /// Of several lines the first is sent and any is let in, so that it can be renewed [default: none is sent or wanted]
    #[arg(long, value_name = "FILE")]
    cluster_key: Option<PathBuf>,
}

impl ClusterKeyArguments {
    /// What lets in members only.
    pub(crate) fn gate(&self) -> Result<Gate, BadConfiguration> {
        gate("--cluster-key", self.cluster_key.clone().map(KeyFile::Cluster))
    }

    /// Has calls to other nodes carry the key, which has to be there.
    pub(crate) fn apply(&self, client: &mut ClientConfig) -> Result<(), BadConfiguration> {
        self.gate()?;
        client.key = self.cluster_key.clone().map(OwnKey::File);
        Ok(())
    }
}

fn gate(flag: &str, file: Option<KeyFile>) -> Result<Gate, BadConfiguration> {
    let refused = |error: KeyError| BadConfiguration::because(flag, error);
    file.map_or_else(|| Ok(Gate::default()), |file| Gate::open(file).map_err(refused))
}

/// How a coordinator elsewhere is reached, and the key that it wants.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct CallerArguments {
    #[command(flatten)]
    connection: ConnectionArguments,
    /// The key that the coordinator knows this client by; other users of this machine see it on a command line, but not in
    /// the variable or in --api-key-file
    #[arg(long, value_name = "KEY", hide_env_values = true)]
    api_key: Option<Secret>,
    /// File with that key; goes before --api-key
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
}

/// A key, which is not shown with the flags around it.
#[derive(Clone)]
struct Secret(String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("..")
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl CallerArguments {
    /// The client side of every connection to the coordinator.
    pub(crate) fn client(&self) -> ClientConfig {
        let file = self.api_key_file.clone().map(OwnKey::File);
        let key = file.or_else(|| self.api_key.clone().map(|Secret(key)| OwnKey::Text(key)));
        ClientConfig { key, ..self.connection.client() }
    }
}
