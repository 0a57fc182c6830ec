//! `sida eval`: what a model, its predictor and labelled data give in every routing mode, in figures that the paper
//! has, too. Everything is asked as users ask it, of a cluster in this process.
//!
//! In reading order. What is asked: [`template`], [`record`], [`data_file`], [`span_corruption`], [`task`]. How: [`modes`],
//! [`ask`]. What comes of it: [`answered`], [`moe_layers`], [`quality`], [`hit_rates`], [`memory`], [`lengths`],
//! [`evaluation`]. How it is told: [`report`], and as a page [`plots`], [`page`]. What residency makes of recorded routes, of which
//! no model is asked, is in [`recorded`].

mod answered;
mod ask;
mod data_file;
mod evaluation;
mod hit_rates;
mod lengths;
mod memory;
mod modes;
mod moe_layers;
mod page;
mod plots;
mod quality;
mod record;
mod recorded;
mod report;
mod span_corruption;
mod task;
mod template;

use std::{
    cell::Cell,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};
use sida_coordinator::{Coordinator, CoordinatorConfig, PredictorSource};
use sida_expert_node::ExpertMemory;
use tokio_util::sync::CancellationToken;

use self::{
    ask::{Asked, Question},
    evaluation::{BudgetRun, Evaluation, ModeRun, Served},
    modes::MODES,
    moe_layers::MoeLayers,
    recorded::RecordedArguments,
    task::{Example, Task, TaskArguments},
};
use crate::{
    arguments::{embedded::EmbeddedArguments, model::ModelArguments, predictor::PredictorArguments},
    bad_configuration::BadConfiguration,
    coordinator_client::CoordinatorClient,
    embedded::EmbeddedCluster,
    loading_bar::{LoadingBar, Unit},
    node_state::NodeState,
    report_file::ReportFile,
    runtime, shutdown,
};

/// Measure accuracy, fidelity, perplexity, hit rates, memory and throughput in every routing mode, on labelled data
#[derive(Args)]
pub(crate) struct EvalArguments {
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    predictor: PredictorArguments,
    #[command(flatten)]
    task: TaskArguments,
    #[command(flatten)]
    recorded: RecordedArguments,
    #[command(flatten)]
    embedded: EmbeddedArguments,
    /// Sizes of batches whose resident experts are told
    #[arg(long, value_name = "SIZES", value_delimiter = ',', default_value = "1,8,32")]
    batches: Vec<usize>,
    /// Measure throughput and waiting with these budgets, as 100%,25%; all else is told of the first [default:
    /// --expert-memory]
    #[arg(long, value_name = "SIZES", value_delimiter = ',')]
    budgets: Vec<ExpertMemory>,
    /// Examples that are asked at a time; answers do not depend on it
    #[arg(long, value_name = "N", default_value_t = 8)]
    concurrency: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Write a page with tables and plots, which needs no other file, too
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
}

/// More than this many sequences run in no batch.
const CONCURRENCY_MAX: usize = 256;
/// More budgets than this are a mistake.
const BUDGETS_MAX: usize = 16;
/// So many examples are asked before a mode is measured, so that it does not pay for what the one before left behind.
const WARMING_EXAMPLES: usize = 32;
/// 128 + SIGINT, as a shell reports it.
const EXIT_INTERRUPTED: u8 = 130;

/// Reads the data, asks, and prints.
pub(crate) fn run(arguments: EvalArguments) -> anyhow::Result<ExitCode> {
    if let Some(file) = &arguments.recorded.routes {
        recorded::run(&arguments.recorded, file, arguments.task.seed, arguments.json)?;
        return Ok(ExitCode::SUCCESS);
    }
    check(&arguments)?;
    let task = arguments.task.task()?;
    let examples = arguments.task.examples(&task)?;
    check_model(&arguments.model)?;
    // Before anything is measured, so that a wrong path is not found out after it.
    let report = arguments.report.as_deref().map(ReportFile::at).transpose()?;
    arguments.model.start_threads()?;
    runtime::run(async {
        let stop = shutdown::on_signal()?;
        let evaluating = Evaluating { arguments: &arguments, task: &task, examples: &examples, stop: &stop };
        let Some(found) = evaluating.run().await? else { return Ok(EXIT_INTERRUPTED.into()) };
        let evaluation = Evaluation::of(&examples, &found.layers, &arguments.batches, &found.runs);
        // First what cannot fail for want of room.
        print(&arguments, &evaluation, &found.parameters)?;
        if let Some(report) = report {
            report.write(&page::html(&evaluation, &found.parameters)?)?;
        }
        Ok(ExitCode::SUCCESS)
    })
}

fn check(arguments: &EvalArguments) -> Result<(), BadConfiguration> {
    let refused = |message: String| Err(BadConfiguration::new(message));
    let EvalArguments { concurrency, budgets, batches, .. } = arguments;
    if !(1..=CONCURRENCY_MAX).contains(concurrency) {
        return refused(format!("--concurrency is {concurrency}, expected 1 to {CONCURRENCY_MAX}"));
    }
    if budgets.len() > BUDGETS_MAX {
        return refused(format!("--budgets names {}, at most {BUDGETS_MAX}", budgets.len()));
    }
    match batches.iter().find(|&&batch| batch == 0) {
        Some(_) => refused("--batches names 0, expected 1 or more".to_owned()),
        None => Ok(()),
    }
}

/// Refuses a model of which there is nothing to tell, before any of it is loaded.
fn check_model(model: &ModelArguments) -> anyhow::Result<()> {
    let checkpoint = model.open()?;
    if checkpoint.config().moe_layer_count() > 0 {
        return Ok(());
    }
    let name = checkpoint.name();
    Err(BadConfiguration::new(format!("model {name} has no MoE layers, so that there are no experts to tell of"))
        .into())
}

fn print(arguments: &EvalArguments, evaluation: &Evaluation, parameters: &Value) -> anyhow::Result<()> {
    #[derive(Serialize)]
    struct Whole<'a> {
        parameters: &'a Value,
        #[serde(flatten)]
        evaluation: &'a Evaluation,
    }
    let mut output = io::stdout().lock();
    if arguments.json {
        let whole = Whole { parameters, evaluation };
        serde_json::to_writer(io::BufWriter::new(&mut output), &whole).map_err(io::Error::from)?;
        return Ok(writeln!(output)?);
    }
    Ok(write!(output, "{}", report::as_text(evaluation, parameters))?)
}

/// What is evaluated, until somebody wants it to end.
struct Evaluating<'a> {
    arguments: &'a EvalArguments,
    task: &'a Task,
    examples: &'a [Example],
    stop: &'a CancellationToken,
}

/// What was found of every budget, and of the model.
struct Found {
    layers: MoeLayers,
    parameters: Value,
    runs: Vec<BudgetRun>,
}

impl Evaluating<'_> {
    /// Asks everything of every budget's cluster; `None` if it was ended before.
    async fn run(&self) -> anyhow::Result<Option<Found>> {
        let budgets = match self.arguments.budgets.as_slice() {
            [] => vec![self.arguments.embedded.expert_memory],
            budgets => budgets.to_vec(),
        };
        let progress = Progress::new(budgets.len() * MODES.len() * self.examples.len());
        let mut found: Option<Found> = None;
        for budget in budgets {
            let shape = EmbeddedArguments { expert_memory: budget, ..self.arguments.embedded.clone() };
            let EvalArguments { model, predictor, .. } = self.arguments;
            let adapt = |config: &mut CoordinatorConfig| self.adapt(config);
            let cluster = EmbeddedCluster::start(model, predictor, &shape, None, adapt).await?;
            // Ended in any case, so that its threads have ended when the process does.
            let run = self.run_budget(&cluster, budget.to_string(), &progress, &mut found).await;
            cluster.stop().await;
            if run?.is_none() {
                return Ok(None);
            }
        }
        Ok(found)
    }

    /// Lets the coordinator take prompts as long as they may be, compute all of them in every mode (in one of them they could
    /// begin as others did), and tell of each what was predicted.
    fn adapt(&self, config: &mut CoordinatorConfig) {
        config.prefix_cache = false;
        config.evaluates = true;
        let limit = &mut config.request_limits.prompt_tokens_max;
        *limit = self.task.prompt_tokens_max.map_or(*limit, |tokens| tokens.max(*limit));
    }

    /// Asks everything of one cluster in every mode, and adds it to what was found; `None` if it was ended before.
    async fn run_budget(
        &self,
        cluster: &EmbeddedCluster,
        label: String,
        progress: &Progress,
        found: &mut Option<Found>,
    ) -> anyhow::Result<Option<()>> {
        let (coordinator, client) = (cluster.coordinator(), cluster.client());
        let layers = moe_layers(coordinator, &client).await?;
        let questions = ask::questions(coordinator, self.examples, self.task.prompt_tokens_max).await?;
        let mut modes = Vec::new();
        for mode in MODES {
            progress.describe(&label, mode.name);
            let asking = self.ask(coordinator, &client, &questions, mode, progress);
            let served = tokio::select! {
                served = asking => served?,
                () = self.stop.cancelled() => return Ok(None),
            };
            client.check_model()?;
            modes.push(ModeRun { mode: mode.name, served });
        }
        let budget_bytes = NodeState::of(&client.status().await?).budget_bytes;
        let parameters = self.parameters(coordinator, &questions);
        let found = found.get_or_insert(Found { layers, parameters, runs: Vec::new() });
        found.runs.push(BudgetRun { label, budget_bytes, modes });
        Ok(Some(()))
    }

    /// Asks everything in one mode, after some of it to warm up.
    async fn ask(
        &self,
        coordinator: &Coordinator,
        client: &CoordinatorClient,
        questions: &[Question<'_>],
        mode: &modes::Mode,
        progress: &Progress,
    ) -> anyhow::Result<Result<Served, String>> {
        let concurrency = self.arguments.concurrency;
        let warming = &questions[..questions.len().min(WARMING_EXAMPLES)];
        if let Asked::NotServed(why) = ask::all(coordinator, warming, mode, concurrency, || ()).await? {
            return Ok(Err(why));
        }
        let before = NodeState::of(&client.status().await?);
        let (answers, wall) = match ask::all(coordinator, questions, mode, concurrency, || progress.advance()).await? {
            Asked::Answers(answers, wall) => (answers, wall),
            Asked::NotServed(why) => return Ok(Err(why)),
        };
        // The trained router chooses where there is no hash table, so these would be the answers of `exact` once more.
        if mode.routing != MODES[0].routing && answers.iter().all(|answer| answer.unpredicted) {
            return Ok(Err("there is no hash table".to_owned()));
        }
        let after = NodeState::of(&client.status().await?);
        let (loads, resident_bytes) = (after.loads_since(&before), after.resident_bytes);
        Ok(Ok(Served { answers, wall, loads, resident_bytes }))
    }

    fn parameters(&self, coordinator: &Coordinator, questions: &[Question<'_>]) -> Value {
        let mut parameters = self.arguments.task.parameters(self.task);
        parameters["model"] = json!(coordinator.checkpoint().name());
        parameters["predictor"] = match &coordinator.config().predictor {
            PredictorSource::Local(predictor) => json!(format!("{}, top {}", predictor.net(), predictor.top_k())),
            PredictorSource::Nodes | PredictorSource::NodesForPrompts(_) | PredictorSource::Off => Value::Null,
        };
        parameters["cut_prompts"] = json!(questions.iter().filter(|question| question.cut_tokens > 0).count());
        parameters["concurrency"] = json!(self.arguments.concurrency);
        parameters["expert_nodes"] = json!(self.arguments.embedded.nodes());
        parameters["threads"] = json!(self.arguments.model.threads());
        parameters
    }
}

/// The MoE layers of a cluster's model, which has some.
async fn moe_layers(coordinator: &Coordinator, client: &CoordinatorClient) -> anyhow::Result<MoeLayers> {
    let config = coordinator.checkpoint().config();
    let experts = config.moe_layer_count() * config.num_experts;
    Ok(MoeLayers::of(config, client.model().await?.experts_bytes / experts as u64))
}

/// A bar on a terminal.
struct Progress {
    bar: LoadingBar,
    done: Cell<u64>,
    total: u64,
}

impl Progress {
    fn new(total: usize) -> Self {
        Self { bar: LoadingBar::new("evaluating", Unit::Steps), done: Cell::new(0), total: total as u64 }
    }

    fn describe(&self, budget: &str, mode: &str) {
        self.bar.describe(format!("evaluating {mode}, {budget} of the experts"));
    }

    fn advance(&self) {
        self.done.set(self.done.get() + 1);
        self.bar.advance(self.done.get(), self.total);
    }
}
