//! Expert-nodes as processes of their own, reached by gRPC over loopback, with the coordinator in this one:
//! what `bench --processes` measures against the cluster in one process.

use std::{env, io, process::Stdio, time::Duration};

use anyhow::{Context, bail};
use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};
use sida_cluster::{Address, Cluster, Member, Role};
use sida_coordinator::{Coordinator, CoordinatorConfig};
use sida_routing::NodeId;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    time,
};

use crate::{
    arguments::{embedded::EmbeddedArguments, model::ModelArguments, predictor::PredictorArguments},
    commands::coordinator,
    coordinator_client::CoordinatorClient,
    embedded,
};

/// How long a node may take to say where it listens.
const START_PATIENCE: Duration = Duration::from_secs(30);

/// The running cluster. Dropping it kills the processes.
pub(crate) struct ProcessCluster {
    coordinator: Coordinator,
    nodes: Vec<Child>,
    /// Holds the cluster file.
    _dir: TempDir,
}

impl ProcessCluster {
    /// The way in.
    pub(crate) fn client(&self) -> CoordinatorClient {
        CoordinatorClient::InProcess(self.coordinator.clone())
    }

    /// Ends the coordinator, then the processes.
    pub(crate) async fn stop(self) {
        let Self { coordinator, mut nodes, .. } = self;
        coordinator.stop().await;
        drop(coordinator);
        for node in &mut nodes {
            if let Err(error) = node.kill().await {
                tracing::warn!("an expert-node process did not end: {error}");
            }
        }
    }
}

/// Starts one process per expert-node and the coordinator, whose settings `adapt` may change first.
pub(crate) async fn start(
    model: &ModelArguments,
    predictor: &PredictorArguments,
    shape: &EmbeddedArguments,
    adapt: impl FnOnce(&mut CoordinatorConfig),
) -> anyhow::Result<ProcessCluster> {
    let checkpoint = model.open()?;
    let shares = embedded::shares(&checkpoint, shape.nodes())?;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("cluster.toml");
    // The nodes listen on ports of their own choice; they call nobody, so what the file says of them is their
    // names.
    let entry = |node: &NodeId| format!("[[expert-node]]\nname = \"{node}\"\naddress = \"127.0.0.1:1\"\n");
    std::fs::write(&file, shares.iter().map(|(node, _)| entry(node)).collect::<String>())?;
    let (device, precision) = shape.device.chosen()?;
    let (mut members, mut nodes) = (Vec::new(), Vec::new());
    for (node, share) in shares {
        let mut command = Command::new(env::current_exe()?);
        command
            .arg("expert-node")
            .args(["--name", node.as_str(), "--listen", "127.0.0.1:0", "--metrics-listen", "off", "--log", "warn"])
            .args(["--expert-memory", &shape.expert_memory.part(share).to_string()])
            .args(["--host-memory", &shape.host_memory.part(share).to_string()])
            .args(["--device", &device.to_string()])
            .args(shape.no_packing.then_some("--no-packing"))
            .args(precision.map(|precision| format!("--precision={precision}")))
            .args(["--threads", &model.threads().to_string()])
            .arg("--static")
            .arg(&file)
            .arg("--model")
            .arg(checkpoint.dir());
        end_with_us(&mut command);
        let mut child = command.stdout(Stdio::piped()).stdin(Stdio::null()).kill_on_drop(true).spawn()?;
        let address = address_of(&mut child).await.with_context(|| format!("{node} did not start"))?;
        members.push(Member { node, role: Role::ExpertNode, address: Address::Grpc(address), weight: 1.0 });
        nodes.push(child);
    }
    let config = checkpoint.config();
    let cluster = Cluster::fixed(members, config.moe_layer_count(), config.num_experts, 1)?;
    let predictor = predictor.source(&checkpoint, &cluster)?;
    let mut config = CoordinatorConfig::new("coordinator-0".into(), checkpoint, predictor);
    (config.device, config.precision) = (device, precision);
    shape.cache.apply(&mut config)?;
    config.micro_batching = shape.micro_batches.wanted();
    adapt(&mut config);
    let coordinator = Coordinator::start(config, cluster).await.map_err(coordinator::refused)?;
    Ok(ProcessCluster { coordinator, nodes, _dir: dir })
}

/// Has a process end when this one does, however that ends: nobody else would end it. The kernel looks at the thread that starts it,
/// which is the one that measures, and lasts as long as the process.
fn end_with_us(command: &mut Command) {
    let us = getpid();
    let end_with_parent = move || {
        set_parent_process_death_signal(Some(Signal::TERM))?;
        // It may have ended just before.
        if getppid() == Some(us) { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
    };
    // SAFETY: what runs between fork and exec is two system calls, and takes no memory.
    unsafe { command.pre_exec(end_with_parent) };
}

/// The address that a node announces on its standard output.
async fn address_of(node: &mut Child) -> anyhow::Result<String> {
    let output = node.stdout.take().context("its output is not piped")?;
    let mut lines = BufReader::new(output).lines();
    let announced =
        time::timeout(START_PATIENCE, lines.next_line()).await.context("it does not say where it listens")?;
    let line = announced?.context("it ended")?;
    match line.strip_prefix("listening on ") {
        Some(address) => Ok(address.to_owned()),
        None => bail!("it said {line:?}"),
    }
}
