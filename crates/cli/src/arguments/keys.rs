//! Keys: the files of those whom a node lets in, and the key that a client shows.

use std::path::PathBuf;

use clap::Args;
use sida_rpc::{ClientConfig, Gate, KeyError, KeyFile, OwnKey};

use super::connection::ConnectionArguments;
use crate::{api_key::ApiKey, bad_configuration::BadConfiguration, text_file};

/// Who may use a coordinator.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ApiKeysArguments {
    /// File of the clients that are let in, NAME:KEY a line, behind it limits as requests-per-minute=60; read again when it
    /// changes [default: all clients]
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
    /// The key that the server knows this client by; other users of this machine see it on a command line, but not in
    /// the variable or in --api-key-file
    #[arg(long, value_name = "KEY", hide_env_values = true)]
    api_key: Option<ApiKey>,
    /// File with that key; goes before --api-key
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
}

impl CallerArguments {
    /// The key itself, for servers of any kind.
    pub(crate) fn api_key(&self) -> Result<Option<ApiKey>, BadConfiguration> {
        let Some(file) = &self.api_key_file else { return Ok(self.api_key.clone()) };
        let content = text_file::read(file)?;
        let key = content.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'));
        let key =
            key.ok_or_else(|| BadConfiguration::new(format!("--api-key-file: {} holds no key", file.display())))?;
        Ok(Some(key.to_owned().into()))
    }

    /// The client side of every connection to the coordinator.
    pub(crate) fn client(&self) -> ClientConfig {
        let file = self.api_key_file.clone().map(OwnKey::File);
        let key = file.or_else(|| self.api_key.clone().map(|ApiKey(key)| OwnKey::Text(key)));
        ClientConfig { key, ..self.connection.client() }
    }
}
