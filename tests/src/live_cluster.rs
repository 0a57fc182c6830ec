//! A cluster of processes that find each other in etcd: any node can be started, ended and started again, in any
//! order.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use sida_proto::v1::{StatusRequest, StatusResponse, cluster_client::ClusterClient};
use sida_rpc::{Channel, ClientConfig};
use tempfile::TempDir;
use tonic::Status;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::{Process, binary, ports::free_port};

/// The lease of every node, unless a test sets another: the shortest that etcd counts with some margin.
pub const LEASE_TTL: Duration = Duration::from_secs(2);
/// What a test waits for comes well before this, on a loaded machine, too.
const LIMIT: Duration = Duration::from_secs(40);

/// The nodes. They end when it is dropped.
pub struct LiveCluster {
    nodes: BTreeMap<String, Process>,
    /// Where each coordinator listens, so that it comes back to where its clients look for it.
    ports: BTreeMap<String, u16>,
    /// `--lease-ttl` of every node.
    lease_ttl: Duration,
    /// `--expert-memory` of every expert-node.
    expert_memory: String,
    /// More flags of every node.
    flags: Vec<String>,
    dir: TempDir,
}

impl LiveCluster {
    /// No node yet; all of them will look for the cluster at these endpoints of etcd.
    pub fn new(endpoints: &str) -> Self {
        let flags = ["--etcd", endpoints, "--relist-interval", "3s", "--moves-per-minute", "100000"]
            .map(str::to_owned)
            .to_vec();
        let dir = tempfile::tempdir().expect("a temporary directory");
        Self {
            nodes: BTreeMap::new(),
            ports: BTreeMap::new(),
            lease_ttl: LEASE_TTL,
            expert_memory: "100%".to_owned(),
            flags,
            dir,
        }
    }

    /// Gives every node that starts from now on these flags, too.
    pub fn add_flags(&mut self, flags: &[&str]) {
        self.flags.extend(flags.iter().map(|&flag| flag.to_owned()));
    }

    /// Gives every node that starts from now on another lease than [`LEASE_TTL`].
    pub fn set_lease_ttl(&mut self, lease_ttl: Duration) {
        self.lease_ttl = lease_ttl;
    }

    /// Gives every expert-node that starts from now on so much memory for experts; all of them otherwise.
    pub fn set_expert_memory(&mut self, expert_memory: &str) {
        expert_memory.clone_into(&mut self.expert_memory);
    }

    /// Where the nodes' logs are; a test may put files here.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Starts `coordinator-N`, `expert-node-N` or `predictor-node-N`, or starts it again.
    pub fn start(&mut self, name: &str) -> &Process {
        let role = name.rsplit_once('-').expect("ROLE-NUMBER").0;
        let port = match role {
            "coordinator" => *self.ports.entry(name.to_owned()).or_insert_with(free_port),
            _ => 0,
        };
        let model: PathBuf = binary::repository().join("models/switch-tiny-64");
        let mut arguments = vec![role.to_owned()];
        let common = [
            ("--name", name.to_owned()),
            ("--listen", format!("127.0.0.1:{port}")),
            ("--metrics-listen", "off".to_owned()),
            ("--model", model.display().to_string()),
            ("--lease-ttl", format!("{}ms", self.lease_ttl.as_millis())),
            ("--threads", "1".to_owned()),
            ("--log", "info".to_owned()),
        ];
        arguments.extend(common.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]));
        if role == "expert-node" {
            arguments.extend(["--expert-memory", &self.expert_memory].map(str::to_owned));
        }
        arguments.extend_from_slice(&self.flags);
        let process = Process::start(self.dir.path(), name, &arguments, None);
        self.nodes.insert(name.to_owned(), process);
        &self.nodes[name]
    }

    /// A node that runs.
    pub fn process(&self, name: &str) -> &Process {
        &self.nodes[name]
    }

    /// Takes a node out of the cluster's care, to end it as a test wants.
    pub fn take(&mut self, name: &str) -> Process {
        self.nodes.remove(name).unwrap_or_else(|| panic!("the cluster has no {name}"))
    }

    /// A connection to a node. It comes back with the node.
    pub async fn channel(&self, name: &str) -> Channel {
        sida_rpc::connect(self.process(name).address(), &ClientConfig::default()).await.expect("a connection")
    }

    /// The cluster as a coordinator sees it.
    pub async fn status(&self, coordinator: &str) -> Result<StatusResponse, Status> {
        let channel = self.channel(coordinator).await;
        Ok(ClusterClient::new(channel).status(StatusRequest {}).await?.into_inner())
    }

    /// Waits until a coordinator sees what the test wants; tells what it saw then.
    pub async fn wait(&self, coordinator: &str, what: &str, is_so: impl Fn(&StatusResponse) -> bool) -> StatusResponse {
        let started = Instant::now();
        loop {
            let status = self.status(coordinator).await;
            if let Ok(status) = &status
                && is_so(status)
            {
                return status.clone();
            }
            assert!(started.elapsed() < LIMIT, "{coordinator} does not see {what}: {status:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Whether a node says of itself that it serves.
    pub async fn is_serving(&self, name: &str) -> bool {
        let channel = self.channel(name).await;
        let request = HealthCheckRequest { service: String::new() };
        let answer = HealthClient::new(channel).check(request).await;
        answer.is_ok_and(|answer| answer.into_inner().status() == ServingStatus::Serving)
    }

    /// Waits until it does.
    pub async fn wait_until_serving(&self, name: &str) {
        let started = Instant::now();
        while !self.is_serving(name).await {
            assert!(started.elapsed() < LIMIT, "{name} does not serve: {}", self.process(name).log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// The names of the members of a role that are healthy.
pub fn healthy(status: &StatusResponse, role: &str) -> Vec<String> {
    let nodes = status.nodes.iter().filter(|node| node.role == role && node.healthy);
    nodes.map(|node| node.node.clone()).collect()
}

/// Whether every expert of the placement has its holders (a hot one may have more), on these expert-nodes and no
/// others, all loaded.
pub fn is_settled(status: &StatusResponse, expert_nodes: &[&str], experts: u64, replicas: u64) -> bool {
    let nodes: Vec<_> = status.nodes.iter().filter(|node| node.role == "expert-node").collect();
    let mut names: Vec<&str> = nodes.iter().map(|node| node.node.as_str()).collect();
    names.sort_unstable();
    let held: u64 = nodes.iter().map(|node| node.experts_held).sum();
    names == expert_nodes
        && held >= experts * replicas.min(expert_nodes.len() as u64)
        && nodes.iter().map(|node| node.experts_placed).sum::<u64>() == experts
        && nodes.iter().all(|node| node.ready_epoch >= status.placement_epoch)
}
