//! What is measured: clusters in this process (one per budget), one over expert-node processes, one that runs already, or any
//! server that speaks OpenAI's protocol. Started by `bench`.

use std::{path::PathBuf, sync::Arc};

use anyhow::Context;
use clap::Args;
use futures::future::try_join_all;
use sida_coordinator::CoordinatorConfig;
use sida_expert_node::ExpertMemory;

use super::{
    openai::OpenAi,
    processes::{self, ProcessCluster},
    replay::Replay,
    url::BaseUrl,
    workload::Method,
};
use crate::{
    arguments::{
        embedded::EmbeddedArguments, keys::CallerArguments, model::ModelArguments, predictor::PredictorArguments,
    },
    bad_configuration::BadConfiguration,
    coordinator_client::{CoordinatorClient, ModelFacts},
    embedded::EmbeddedCluster,
    node_state::NodeState,
};

/// What is measured.
#[derive(Args, Clone, Debug)]
pub(crate) struct SubjectArguments {
    /// Measure this coordinator, as http://127.0.0.1:50051, instead of a cluster in this process
    #[arg(long, value_name = "URL", conflicts_with_all = ["processes", "budgets"])]
    endpoint: Option<String>,
    /// Measure this server that speaks OpenAI's protocol, as http://127.0.0.1:8000/v1: its completions, with --method chat its
    /// chat completions, with --method encode its embeddings. The model is --model-name, or the first that it lists
    #[arg(long, value_name = "URL", conflicts_with_all = ["endpoint", "processes", "budgets"])]
    url: Option<String>,
    #[command(flatten)]
    caller: CallerArguments,
    #[command(flatten)]
    pub(crate) model: ModelArguments,
    #[command(flatten)]
    predictor: PredictorArguments,
    #[command(flatten)]
    pub(super) embedded: EmbeddedArguments,
    /// Start so many expert-node processes and reach them by gRPC over loopback; 0: all in this process. With
    /// --beside, next to the cluster in this process
    #[arg(long, value_name = "N", default_value_t = 0)]
    processes: usize,
    /// Measure the cluster in this process, too, in turns with the one of --processes
    #[arg(long)]
    beside: bool,
    /// With --processes on a GPU: measure them once more with rows that are sent, although nodes on this machine could
    /// read them in its memory
    #[arg(long, requires = "processes")]
    send_rows: bool,
    /// Measure clusters of these budgets in turns, as 100%,25%
    #[arg(long, value_name = "SIZES", value_delimiter = ',', conflicts_with = "processes")]
    budgets: Vec<ExpertMemory>,
    /// Have tokens go to the experts that were recorded in this file instead of those that the routers choose, to measure
    /// residency and speed as a real model wants its experts, whatever the weights are: CSV with the columns turn, phase, step,
    /// layer, slot and expert. Each sequence begins at another place of it
    #[arg(long, value_name = "FILE.csv", conflicts_with_all = ["endpoint", "url"])]
    routes: Option<PathBuf>,
}

/// A cluster or a server under measurement.
pub(crate) struct Subject {
    pub(crate) label: String,
    /// For each client to have its own; at least one, which may be shared.
    pub(crate) clients: Vec<Asked>,
    cluster: Running,
}

/// Whom requests are sent to.
#[derive(Clone)]
pub(crate) enum Asked {
    /// A coordinator, called or by gRPC.
    Cluster(CoordinatorClient),
    /// A server behind a URL.
    Url(Arc<OpenAi>),
}

/// What was started for it.
enum Running {
    Embedded(EmbeddedCluster),
    Processes(ProcessCluster),
    /// Somebody else's.
    Elsewhere,
}

/// More subjects than this in one process is a mistake.
const BUDGETS_MAX: usize = 16;

/// Connections to a coordinator elsewhere at most; more clients than that share them.
const CONNECTIONS_MAX: usize = 64;

impl SubjectArguments {
    /// Whether a cluster is measured.
    pub(crate) fn is_cluster(&self) -> bool {
        self.url.is_none()
    }

    /// Refuses what is served elsewhere only, and what cannot be reached.
    pub(crate) fn check(&self, method: Method) -> Result<(), BadConfiguration> {
        self.base_url()?;
        match method {
            Method::Chat if self.is_cluster() => Err(BadConfiguration::new("--method chat needs --url")),
            Method::Score if !self.is_cluster() => {
                Err(BadConfiguration::new("--method score is not for --url: OpenAI's protocol has no such request"))
            }
            _ => Ok(()),
        }
    }

    /// Reads the routes that are replayed, if some are.
    pub(crate) fn replay(&self) -> anyhow::Result<Option<Replay>> {
        let Some(file) = &self.routes else { return Ok(None) };
        Ok(Some(Replay::read(file, self.model.open()?.config())?))
    }

    /// Read here and not with the flags, whose errors repeat what they refuse: it may hold a password.
    fn base_url(&self) -> Result<Option<BaseUrl>, BadConfiguration> {
        let parsed = self.url.as_deref().map(str::parse).transpose();
        parsed.map_err(|problem: String| BadConfiguration::new(format!("--url: {problem}")))
    }
}

/// Starts what the flags describe. Each of so many clients has a connection of its own, as callers elsewhere have.
pub(crate) async fn start(
    arguments: &SubjectArguments,
    clients: usize,
    replay: Option<&Replay>,
) -> anyhow::Result<Vec<Subject>> {
    if let Some(base) = arguments.base_url()? {
        let model = arguments.model.model_name.as_deref();
        let server = OpenAi::open(&base, arguments.caller.api_key()?, arguments.caller.client().tls, model).await?;
        let (label, clients) = (base.to_string(), vec![Asked::Url(Arc::new(server))]);
        return Ok(vec![Subject { label, clients, cluster: Running::Elsewhere }]);
    }
    if let Some(endpoint) = &arguments.endpoint {
        let connections = clients.clamp(1, CONNECTIONS_MAX);
        let connect = (0..connections).map(|_| CoordinatorClient::connect(endpoint, &arguments.caller));
        let clients = try_join_all(connect).await?.into_iter().map(Asked::Cluster).collect();
        return Ok(vec![Subject { label: endpoint.clone(), clients, cluster: Running::Elsewhere }]);
    }
    if arguments.budgets.len() > BUDGETS_MAX {
        let found = arguments.budgets.len();
        return Err(BadConfiguration::new(format!("--budgets names {found}, at most {BUDGETS_MAX}")).into());
    }
    if arguments.processes > 0 {
        let mut subjects = Vec::new();
        if arguments.beside {
            subjects
                .push(embedded(arguments, arguments.embedded.expert_memory, "in process".to_owned(), replay).await?);
        }
        subjects.push(over_processes(arguments, true, replay).await?);
        if arguments.send_rows {
            subjects.push(over_processes(arguments, false, replay).await?);
        }
        return Ok(subjects);
    }
    let mut subjects = Vec::new();
    if arguments.budgets.is_empty() {
        let memory = arguments.embedded.expert_memory;
        subjects.push(embedded(arguments, memory, memory.to_string(), replay).await?);
    }
    for &budget in &arguments.budgets {
        let subject = embedded(arguments, budget, budget.to_string(), replay).await;
        subjects.push(subject.with_context(|| format!("with {budget} of --budgets as --expert-memory"))?);
    }
    Ok(subjects)
}

async fn embedded(
    arguments: &SubjectArguments,
    budget: ExpertMemory,
    label: String,
    replay: Option<&Replay>,
) -> anyhow::Result<Subject> {
    let shape = EmbeddedArguments { expert_memory: budget, ..arguments.embedded.clone() };
    let adapt = |config: &mut CoordinatorConfig| replay.iter().for_each(|replay| replay.apply(config));
    let cluster = EmbeddedCluster::start(&arguments.model, &arguments.predictor, &shape, None, adapt).await?;
    cluster.load_ahead();
    Ok(Subject { label, clients: vec![Asked::Cluster(cluster.client())], cluster: Running::Embedded(cluster) })
}

async fn over_processes(
    arguments: &SubjectArguments,
    share_rows: bool,
    replay: Option<&Replay>,
) -> anyhow::Result<Subject> {
    let shape = EmbeddedArguments { expert_nodes: Some(arguments.processes), ..arguments.embedded.clone() };
    let adapt = |config: &mut CoordinatorConfig| {
        config.share_rows = share_rows;
        replay.iter().for_each(|replay| replay.apply(config));
    };
    let cluster = processes::start(&arguments.model, &arguments.predictor, &shape, adapt).await?;
    let label = format!("{} processes{}", arguments.processes, if share_rows { "" } else { ", rows sent" });
    Ok(Subject { label, clients: vec![Asked::Cluster(cluster.client())], cluster: Running::Processes(cluster) })
}

impl Subject {
    fn coordinator(&self) -> Option<&CoordinatorClient> {
        match &self.clients[0] {
            Asked::Cluster(client) => Some(client),
            Asked::Url(_) => None,
        }
    }

    /// Refuses to go on with files of a model in this process that were found to be damaged.
    pub(crate) fn check_model(&self) -> anyhow::Result<()> {
        Ok(self.coordinator().map_or(Ok(()), CoordinatorClient::check_model)?)
    }

    /// The cluster's model; `None` of a server behind a URL.
    pub(crate) async fn model(&self) -> anyhow::Result<Option<ModelFacts>> {
        match self.coordinator() {
            Some(coordinator) => Ok(Some(coordinator.model().await?)),
            None => Ok(None),
        }
    }

    /// What its nodes hold and have loaded so far.
    pub(crate) async fn node_state(&self) -> anyhow::Result<NodeState> {
        match self.coordinator() {
            Some(coordinator) => Ok(NodeState::of(&coordinator.status().await?)),
            None => Ok(NodeState::default()),
        }
    }

    /// Ends what was started for it.
    pub(crate) async fn stop(self) {
        // The last way in, so that the coordinator leaves its expert-nodes before they end.
        drop(self.clients);
        match self.cluster {
            Running::Embedded(cluster) => cluster.stop().await,
            Running::Processes(cluster) => cluster.stop().await,
            Running::Elsewhere => {}
        }
    }
}
