//! A cluster of processes: expert-nodes, predictor-nodes and coordinators that know each other from a static file.
//! Nodes can be killed, paused, started again on their ports, and cut off by proxies before them.
//!
//! The system picks every port. So the nodes that others call start first, each with a file in which addresses do not
//! matter yet (a node finds only its own name and role there); then the coordinators get a file with the addresses
//! that they printed, or those of the proxies.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::PathBuf, process::ExitStatus, time::Duration};

use sida_rpc::{Channel, ClientConfig};
use tempfile::TempDir;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::{FaultProxy, Namespace, Process, binary};

/// How long a cluster may take from its start until it serves.
const READY_LIMIT: Duration = Duration::from_secs(60);
const COORDINATOR: &str = "coordinator-0";

/// What a cluster consists of.
#[derive(Clone, Debug)]
pub struct SandboxConfig {
    /// A model's directory.
    pub model: PathBuf,
    /// How many coordinators.
    pub coordinators: usize,
    /// How many expert-nodes.
    pub expert_nodes: usize,
    /// `--expert-memory` of each.
    pub expert_memory: String,
    /// How many predictor-nodes; with none the coordinator predicts by itself.
    pub predictor_nodes: usize,
    /// The model of the predictor-nodes, where it is another.
    pub predictor_model: Option<PathBuf>,
    /// Holders per expert.
    pub replicas: usize,
    /// Coordinators reach expert-nodes and predictor-nodes through proxies.
    pub proxies: bool,
    /// More flags of the coordinators.
    pub coordinator_flags: Vec<String>,
    /// More flags of the expert-nodes and predictor-nodes.
    pub node_flags: Vec<String>,
    /// More flags of the predictor-nodes.
    pub predictor_flags: Vec<String>,
    /// More flags of every node.
    pub flags: Vec<String>,
    /// `--log` of every node.
    pub log: &'static str,
    /// How coordinators are asked.
    pub client: ClientConfig,
}

impl Default for SandboxConfig {
    /// Two expert-nodes with room for everything, on the model that ships.
    fn default() -> Self {
        Self {
            model: binary::repository().join("models/switch-tiny-64"),
            coordinators: 1,
            expert_nodes: 2,
            expert_memory: "100%".to_owned(),
            predictor_nodes: 0,
            predictor_model: None,
            replicas: 1,
            proxies: false,
            coordinator_flags: Vec::new(),
            node_flags: Vec::new(),
            predictor_flags: Vec::new(),
            flags: Vec::new(),
            log: "warn",
            client: ClientConfig::default(),
        }
    }
}

/// A running cluster. It ends when dropped.
pub struct Sandbox {
    /// Fields are dropped in this order: the coordinators first, the directory with the logs last.
    coordinators: BTreeMap<String, Process>,
    nodes: BTreeMap<String, Process>,
    proxies: BTreeMap<String, FaultProxy>,
    namespaces: BTreeMap<String, Namespace>,
    /// Where nodes that run, or have run, listen.
    addresses: BTreeMap<String, String>,
    channels: BTreeMap<String, Channel>,
    config: SandboxConfig,
    dir: TempDir,
}

/// A member as it stands in the static file.
struct Member {
    role: &'static str,
    name: String,
    address: String,
}

impl Sandbox {
    /// Starts the nodes and waits until the coordinators serve.
    pub async fn start(config: SandboxConfig) -> Self {
        Self::start_within(config, BTreeMap::new()).await
    }

    /// The same, with some of the nodes in networks of their own.
    pub async fn start_within(config: SandboxConfig, namespaces: BTreeMap<String, Namespace>) -> Self {
        let mut members = Vec::new();
        let roles = [
            ("expert-node", config.expert_nodes),
            ("predictor-node", config.predictor_nodes),
            ("coordinator", config.coordinators),
        ];
        for (role, count) in roles {
            let member = |n| Member { role, name: format!("{role}-{n}"), address: "127.0.0.1:1".to_owned() };
            members.extend((0..count).map(member));
        }
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut sandbox = Self {
            coordinators: BTreeMap::new(),
            nodes: BTreeMap::new(),
            proxies: BTreeMap::new(),
            namespaces,
            addresses: BTreeMap::new(),
            channels: BTreeMap::new(),
            config,
            dir,
        };
        sandbox.write_static_file(&members);
        for member in members.iter_mut().filter(|member| member.role != "coordinator") {
            let host = sandbox.namespaces.get(&member.name).map_or("127.0.0.1", Namespace::address).to_owned();
            let node = sandbox.spawn(&member.name, &format!("{host}:0"));
            member.address = node.address().to_owned();
            sandbox.addresses.insert(member.name.clone(), member.address.clone());
            sandbox.nodes.insert(member.name.clone(), node);
            if sandbox.config.proxies {
                let target = member.address.parse().expect("an address");
                let proxy = FaultProxy::start(target).await.expect("a proxy");
                member.address = proxy.address().to_string();
                sandbox.proxies.insert(member.name.clone(), proxy);
            }
        }
        sandbox.write_static_file(&members);
        for member in members.iter().filter(|member| member.role == "coordinator") {
            let coordinator = sandbox.spawn(&member.name, "127.0.0.1:0");
            let channel = sida_rpc::connect(coordinator.address(), &sandbox.config.client).await;
            sandbox.channels.insert(member.name.clone(), channel.expect("a connection"));
            sandbox.coordinators.insert(member.name.clone(), coordinator);
            sandbox.wait_until_serving(&member.name).await;
        }
        sandbox
    }

    /// A connection to the first coordinator.
    pub fn channel(&self) -> Channel {
        self.channels[COORDINATOR].clone()
    }

    /// A connection to each coordinator.
    pub fn channels(&self) -> Vec<Channel> {
        self.channels.values().cloned().collect()
    }

    /// The first coordinator's `host:port`.
    pub fn address(&self) -> &str {
        self.coordinators[COORDINATOR].address()
    }

    /// The proxy before a node. `name` is `ROLE-NUMBER`, here and below.
    pub fn proxy(&self, name: &str) -> &FaultProxy {
        self.proxies.get(name).unwrap_or_else(|| panic!("the sandbox has no proxy before {name}"))
    }

    /// The network that a node is in.
    pub fn namespace(&self, name: &str) -> &Namespace {
        self.namespaces.get(name).unwrap_or_else(|| panic!("{name} has no network of its own"))
    }

    /// A node that runs, of any role.
    pub fn process(&self, name: &str) -> &Process {
        let node = self.nodes.get(name).or_else(|| self.coordinators.get(name));
        node.unwrap_or_else(|| panic!("the sandbox has no {name}"))
    }

    /// All that run.
    pub fn processes(&self) -> impl Iterator<Item = (&str, &Process)> {
        self.nodes.iter().chain(&self.coordinators).map(|(name, process)| (name.as_str(), process))
    }

    /// Takes a node out of the cluster's care, to end it as a test wants.
    pub fn take(&mut self, name: &str) -> Process {
        let node = self.nodes.remove(name).or_else(|| self.coordinators.remove(name));
        node.unwrap_or_else(|| panic!("the sandbox has no {name}"))
    }

    /// Starts a node again that was taken, on its old port.
    pub fn restart(&mut self, name: &str) {
        let node = self.spawn(name, &self.addresses[name]);
        self.nodes.insert(name.to_owned(), node);
    }

    /// What a service of the first coordinator says of itself; "" is the whole node.
    pub async fn health(&self, service: &str) -> Result<ServingStatus, tonic::Status> {
        self.health_of(COORDINATOR, service).await
    }

    /// Ends the first coordinator by SIGTERM, and tells how it ended.
    pub fn terminate(mut self) -> ExitStatus {
        self.take(COORDINATOR).terminate()
    }

    async fn health_of(&self, coordinator: &str, service: &str) -> Result<ServingStatus, tonic::Status> {
        let request = HealthCheckRequest { service: service.to_owned() };
        let answer = HealthClient::new(self.channels[coordinator].clone()).check(request).await?;
        Ok(answer.into_inner().status())
    }

    async fn wait_until_serving(&self, coordinator: &str) {
        let serving = async {
            while self.health_of(coordinator, "").await.ok() != Some(ServingStatus::Serving) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let waited = tokio::time::timeout(READY_LIMIT, serving).await;
        assert!(waited.is_ok(), "{coordinator} does not serve: {}", self.coordinators[coordinator].log());
    }

    /// Starts a node; blocks until it says where it listens.
    fn spawn(&self, name: &str, listen: &str) -> Process {
        let (role, _) = name.rsplit_once('-').expect("ROLE-NUMBER");
        let config = &self.config;
        let model = match (&config.predictor_model, role) {
            (Some(model), "predictor-node") => model,
            _ => &config.model,
        };
        let mut arguments = vec![role.to_owned()];
        let flags = [
            ("--static", self.static_file().display().to_string()),
            ("--name", name.to_owned()),
            ("--listen", listen.to_owned()),
            ("--metrics-listen", "off".to_owned()),
            ("--model", model.display().to_string()),
            ("--log", config.log.to_owned()),
        ];
        arguments.extend(flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]));
        arguments.extend_from_slice(&config.flags);
        if role != "coordinator" {
            arguments.extend_from_slice(&config.node_flags);
        }
        match role {
            "expert-node" => arguments.extend(["--expert-memory".to_owned(), config.expert_memory.clone()]),
            "predictor-node" => arguments.extend_from_slice(&config.predictor_flags),
            "coordinator" => {
                arguments.extend_from_slice(&config.coordinator_flags);
                if config.predictor_nodes > 0 {
                    arguments.extend(["--predictor".to_owned(), "nodes".to_owned()]);
                }
            }
            _ => {}
        }
        Process::start(self.dir.path(), name, &arguments, self.namespaces.get(name))
    }

    fn static_file(&self) -> PathBuf {
        self.dir.path().join("cluster.toml")
    }

    fn write_static_file(&self, members: &[Member]) {
        let mut text = format!("replicas = {}\n", self.config.replicas);
        for Member { role, name, address } in members {
            write!(text, "\n[[{role}]]\nname = \"{name}\"\naddress = \"{address}\"\n").expect("text grows");
        }
        fs::write(self.static_file(), text).expect("a static file");
    }
}
