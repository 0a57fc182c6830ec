//! A cluster of processes: expert-nodes, predictor-nodes and a coordinator that know each other from a static file.
//!
//! The system picks every port. So the nodes that others call start first, each with a file in which addresses do not
//! matter yet (a node finds only its own name and role there); then the coordinator gets a file with the addresses that
//! they printed.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::PathBuf, time::Duration};

use sida_rpc::ClientConfig;
use tempfile::TempDir;
use tonic::transport::Channel;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::{Process, binary};

/// How long a cluster may take from its start until it serves.
const READY_LIMIT: Duration = Duration::from_secs(60);
const COORDINATOR: &str = "coordinator-0";

/// What a cluster consists of.
#[derive(Clone, Debug)]
pub struct SandboxConfig {
    /// A model's directory.
    pub model: PathBuf,
    /// How many expert-nodes.
    pub expert_nodes: usize,
    /// `--expert-memory` of each.
    pub expert_memory: String,
    /// How many predictor-nodes; with none the coordinator predicts by itself.
    pub predictor_nodes: usize,
    /// Holders per expert.
    pub replicas: usize,
    /// More flags of the coordinator.
    pub coordinator_flags: Vec<String>,
}

impl Default for SandboxConfig {
    /// Two expert-nodes with room for everything, on the model that ships.
    fn default() -> Self {
        Self {
            model: binary::repository().join("models/switch-tiny-64"),
            expert_nodes: 2,
            expert_memory: "100%".to_owned(),
            predictor_nodes: 0,
            replicas: 1,
            coordinator_flags: Vec::new(),
        }
    }
}

/// A running cluster. It ends when dropped.
pub struct Sandbox {
    /// Fields are dropped in this order: the coordinator first, the directory with the logs last.
    coordinator: Process,
    nodes: BTreeMap<String, Process>,
    channel: Channel,
    _dir: TempDir,
}

impl Sandbox {
    /// Starts the nodes and waits until the coordinator serves.
    pub async fn start(config: SandboxConfig) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut members: Vec<(&str, String, String)> = Vec::new();
        for (role, count) in [("expert-node", config.expert_nodes), ("predictor-node", config.predictor_nodes)] {
            members.extend((0..count).map(|n| (role, format!("{role}-{n}"), "127.0.0.1:1".to_owned())));
        }
        members.push(("coordinator", COORDINATOR.to_owned(), "127.0.0.1:1".to_owned()));
        let file = dir.path().join("cluster.toml");
        let start = |role: &str, name: &str, flags: &[String]| {
            let mut arguments = vec![role.to_owned()];
            let common = [
                ("--static", file.display().to_string()),
                ("--name", name.to_owned()),
                ("--listen", "127.0.0.1:0".to_owned()),
                ("--metrics-listen", "off".to_owned()),
                ("--model", config.model.display().to_string()),
                ("--log", "warn".to_owned()),
            ];
            arguments.extend(common.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]));
            arguments.extend_from_slice(flags);
            Process::start(dir.path(), name, &arguments)
        };
        fs::write(&file, static_file(&members, config.replicas)).expect("a static file");
        let mut nodes = BTreeMap::new();
        for (role, name, address) in members.iter_mut().filter(|(role, ..)| *role != "coordinator") {
            let memory = ["--expert-memory".to_owned(), config.expert_memory.clone()];
            let flags: &[String] = if *role == "expert-node" { &memory } else { &[] };
            let node = start(role, name, flags);
            *address = node.address().to_owned();
            nodes.insert(name.clone(), node);
        }
        fs::write(&file, static_file(&members, config.replicas)).expect("a static file");
        let mut flags = config.coordinator_flags.clone();
        if config.predictor_nodes > 0 {
            flags.extend(["--predictor".to_owned(), "nodes".to_owned()]);
        }
        let coordinator = start("coordinator", COORDINATOR, &flags);
        let channel = sida_rpc::connect(coordinator.address(), &ClientConfig::default()).await.expect("a connection");
        let sandbox = Self { coordinator, nodes, channel, _dir: dir };
        sandbox.wait_until_serving().await;
        sandbox
    }

    /// A connection to the coordinator.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// The coordinator's `host:port`.
    pub fn address(&self) -> &str {
        self.coordinator.address()
    }

    /// Takes a node out of the cluster's care, to end it as a test wants. `name` is `ROLE-NUMBER`.
    pub fn take(&mut self, name: &str) -> Process {
        self.nodes.remove(name).unwrap_or_else(|| panic!("the sandbox has no {name}"))
    }

    /// What a service of the coordinator says of itself; "" is the whole node.
    pub async fn health(&self, service: &str) -> Result<ServingStatus, tonic::Status> {
        let request = HealthCheckRequest { service: service.to_owned() };
        let answer = HealthClient::new(self.channel()).check(request).await?;
        Ok(answer.into_inner().status())
    }

    /// Ends the coordinator by SIGTERM, and tells how it ended.
    pub fn terminate(self) -> std::process::ExitStatus {
        self.coordinator.terminate()
    }

    async fn wait_until_serving(&self) {
        let serving = async {
            while self.health("").await.ok() != Some(ServingStatus::Serving) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let waited = tokio::time::timeout(READY_LIMIT, serving).await;
        assert!(waited.is_ok(), "the coordinator does not serve: {}", self.coordinator.log());
    }
}

fn static_file(members: &[(&str, String, String)], replicas: usize) -> String {
    let mut text = format!("replicas = {replicas}\n");
    for (role, name, address) in members {
        write!(text, "\n[[{role}]]\nname = \"{name}\"\naddress = \"{address}\"\n").expect("text grows");
    }
    text
}
