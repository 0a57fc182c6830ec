//! `sida ask`: one text, one answer, and what it took.

use std::{
    io::{self, Write},
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Args;
use futures::TryStreamExt;
use serde_json::{Value, json};
use sida_proto::v1::{Finish, FinishReason, RoutingMode};
use tonic::Status;

use crate::{
    answer_report::AnswerReport,
    arguments::{
        connection::ConnectionArguments, embedded::EmbeddedArguments, generation::GenerationArguments,
        model::ModelArguments, predictor::PredictorArguments, routing::RoutingArguments,
    },
    coordinator_client::{CoordinatorClient, ModelFacts},
    embedded::EmbeddedCluster,
    expert_picture::Style,
    runtime,
};

/// Answer one text; without --endpoint on a cluster of its own in this process
#[derive(Args)]
pub(crate) struct AskArguments {
    /// What to answer
    #[arg(value_name = "TEXT")]
    text: String,
    /// Ask this coordinator, as http://127.0.0.1:50051, instead of starting a cluster
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    #[command(flatten)]
    connection: ConnectionArguments,
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    predictor: PredictorArguments,
    #[command(flatten)]
    embedded: EmbeddedArguments,
    #[command(flatten)]
    routing: RoutingArguments,
    #[command(flatten)]
    generation: GenerationArguments,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Who answers, and how long it took to be ready.
struct Answerer {
    client: CoordinatorClient,
    /// Kept until the answer is there. None when somebody else's cluster answers.
    cluster: Option<EmbeddedCluster>,
    ready_after: Duration,
}

/// Starts or reaches a cluster, asks, prints the answer as it comes and then what it took.
pub(crate) fn run(arguments: AskArguments) -> anyhow::Result<ExitCode> {
    arguments.model.start_threads()?;
    runtime::run(async {
        let answerer = answerer(&arguments).await?;
        let model = answerer.client.model().await?;
        let (text, finish) = answer(&answerer.client, &arguments).await?;
        let nodes = answerer.client.status().await?.nodes;
        let report = AnswerReport { model: &model, finish: &finish, nodes: &nodes };
        if arguments.json {
            writeln!(io::stdout(), "{}", as_json(&text, &model, &finish, &report, answerer.ready_after))?;
        } else {
            write!(io::stdout(), "\n{}", report.draw(Style::of_stdout()))?;
        }
        if let Some(cluster) = answerer.cluster {
            cluster.stop().await;
        }
        Ok(ExitCode::SUCCESS)
    })
}

async fn answerer(arguments: &AskArguments) -> anyhow::Result<Answerer> {
    let start = Instant::now();
    if let Some(endpoint) = &arguments.endpoint {
        let client = CoordinatorClient::connect(endpoint, &arguments.connection).await?;
        return Ok(Answerer { client, cluster: None, ready_after: start.elapsed() });
    }
    let cluster =
        EmbeddedCluster::start(&arguments.model, &arguments.predictor, &arguments.embedded, None, |_| {}).await?;
    Ok(Answerer { client: cluster.client(), cluster: Some(cluster), ready_after: start.elapsed() })
}

/// The whole answer; printed token by token unless JSON is wanted.
async fn answer(client: &CoordinatorClient, arguments: &AskArguments) -> anyhow::Result<(String, Finish)> {
    let mut tokens = client.generate(arguments.generation.params(arguments.text.clone(), arguments.routing)).await?;
    let mut text = String::new();
    let mut finish = None;
    while let Some(token) = tokens.try_next().await? {
        if !arguments.json {
            write!(io::stdout(), "{}", token.text)?;
            io::stdout().flush()?;
        }
        text.push_str(&token.text);
        finish = token.finish;
    }
    if !arguments.json {
        writeln!(io::stdout())?;
    }
    let finish = finish.ok_or_else(|| Status::data_loss("the answer ended without its last message"))?;
    Ok((text, finish))
}

fn as_json(text: &str, model: &ModelFacts, finish: &Finish, report: &AnswerReport<'_>, ready_after: Duration) -> Value {
    let trace = finish.trace.clone().unwrap_or_default();
    let timings = trace.timings.unwrap_or_default();
    let (resident_bytes, budget_bytes) = report.resident_and_budget();
    let layers: Vec<_> =
        trace.layers.iter().map(|used| json!({"layer": used.layer, "experts": used.experts})).collect();
    json!({
        "text": text,
        "finish_reason": reason(finish.reason()),
        "prompt_tokens": finish.prompt_tokens,
        "generated_tokens": finish.generated_tokens,
        "model": model.name,
        "mode": mode(trace.mode()),
        "unpredicted": trace.unpredicted,
        "ready_ms": ready_after.as_secs_f64() * 1e3,
        "timings_us": {
            "queue": timings.queue_us,
            "predict": timings.predict_us,
            "load": timings.load_us,
            "backbone": timings.backbone_us,
            "experts": timings.experts_us,
            "total": timings.total_us,
        },
        "hash_hits": trace.hash_hits,
        "hash_top1_hits": trace.hash_top1_hits,
        "hash_misses": trace.hash_misses,
        "demand_loads": trace.demand_loads,
        "failovers": trace.failovers,
        "experts_touched": trace.layers.iter().map(|used| used.experts.len()).sum::<usize>(),
        "experts_total": model.moe_layers * model.num_experts,
        "resident_bytes": resident_bytes,
        "budget_bytes": budget_bytes,
        "experts_bytes": model.experts_bytes,
        "layers": layers,
    })
}

fn reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Unspecified => "unspecified",
        FinishReason::End => "end",
        FinishReason::Length => "length",
        FinishReason::Stop => "stop",
    }
}

fn mode(mode: RoutingMode) -> &'static str {
    match mode {
        RoutingMode::Unspecified | RoutingMode::Exact => "exact",
        RoutingMode::Guided => "guided",
        RoutingMode::Hash => "hash",
    }
}
