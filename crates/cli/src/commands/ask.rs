//! `sida ask`: one text, one answer, and what it took. Into a pipe goes the answer alone.

use std::{
    io::{self, IsTerminal, Read, Write},
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Args;
use futures::TryStreamExt;
use serde_json::{Map, Value, json};
use sida_coordinator::{Coordinator, Prompt};
use sida_model::{ChatMessage, ChatTemplate, tokenizer::TEXT_BYTES_MAX};
use sida_proto::v1::{Finish, FinishReason, Logprobs, RoutingMode};
use tonic::Status;

use crate::{
    answer_report::{AnswerReport, routed_instead},
    arguments::{
        embedded::EmbeddedArguments, generation::GenerationArguments, keys::CallerArguments, model::ModelArguments,
        predictor::PredictorArguments, routing::RoutingArguments,
    },
    bad_configuration::BadConfiguration,
    coordinator_client::{CoordinatorClient, ModelFacts},
    embedded::EmbeddedCluster,
    expert_picture::Style,
    runtime,
};

/// The text that says that the text is on standard input.
const STANDARD_INPUT: &str = "-";

/// Answer one text; without --endpoint on a cluster of its own in this process
#[derive(Args)]
pub(crate) struct AskArguments {
    /// What to answer; - reads it from standard input, without its last line break
    #[arg(value_name = "TEXT")]
    text: String,
    /// Ask this coordinator, as http://127.0.0.1:50051, instead of starting a cluster
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    #[command(flatten)]
    caller: CallerArguments,
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
    /// With --json: tell of each token how likely it was, and which N were the most likely, 0 to 20
    #[arg(long, value_name = "N", requires = "json")]
    logprobs: Option<usize>,
    /// Without --endpoint: say the text as a user, in the form of the model's chat template
    #[arg(long, conflicts_with = "endpoint")]
    chat: bool,
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
    // Before a cluster is started for it.
    let text = text(&arguments.text, io::stdin())?;
    arguments.model.start_threads()?;
    runtime::run(async {
        let answerer = answerer(&arguments).await?;
        let model = answerer.client.model().await?;
        let prompt = match &answerer.cluster {
            Some(cluster) if arguments.chat => chat_prompt(cluster.coordinator(), text).await?,
            _ => text.into(),
        };
        let answer = answer(&answerer.client, prompt, &arguments).await?;
        // Whoever reads a pipe wants the answer.
        if arguments.json || io::stdout().is_terminal() {
            let nodes = answerer.client.status().await?.nodes;
            let report = AnswerReport { model: &model, finish: &answer.finish, nodes: &nodes };
            if arguments.json {
                writeln!(io::stdout(), "{}", as_json(&answer, &model, &report, answerer.ready_after))?;
            } else {
                write!(io::stdout(), "\n{}", report.draw(Style::of_stdout()))?;
            }
        } else if let Some(instead) = answer.finish.trace.as_ref().and_then(routed_instead) {
            tracing::warn!("{instead}");
        }
        if let Some(cluster) = answerer.cluster {
            cluster.stop().await;
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// What is asked: `argument`, or where that says so what `input` holds, without its last end of line.
fn text(argument: &str, input: impl Read) -> Result<String, BadConfiguration> {
    if argument != STANDARD_INPUT {
        return Ok(argument.to_owned());
    }
    let mut text = String::new();
    let unreadable = |error| BadConfiguration::because("cannot read the text from standard input", error);
    input.take(TEXT_BYTES_MAX as u64 + 1).read_to_string(&mut text).map_err(unreadable)?;
    if text.len() > TEXT_BYTES_MAX {
        return Err(BadConfiguration::new(format!(
            "standard input has more than the {TEXT_BYTES_MAX} bytes of a text"
        )));
    }
    let line = text.strip_suffix('\n').unwrap_or(&text);
    Ok(line.strip_suffix('\r').unwrap_or(line).to_owned())
}

async fn answerer(arguments: &AskArguments) -> anyhow::Result<Answerer> {
    let start = Instant::now();
    if let Some(endpoint) = &arguments.endpoint {
        let client = CoordinatorClient::connect(endpoint, &arguments.caller).await?;
        return Ok(Answerer { client, cluster: None, ready_after: start.elapsed() });
    }
    let cluster =
        EmbeddedCluster::start(&arguments.model, &arguments.predictor, &arguments.embedded, None, |_| {}).await?;
    Ok(Answerer { client: cluster.client(), cluster: Some(cluster), ready_after: start.elapsed() })
}

/// What a user says who says `text`, as the model's chat template writes it.
async fn chat_prompt(coordinator: &Coordinator, text: String) -> anyhow::Result<Prompt> {
    let dir = coordinator.checkpoint().dir();
    let template = ChatTemplate::open(dir)?.ok_or_else(|| {
        let dir = dir.display();
        BadConfiguration::new(format!(
            "{dir} has no chat template, neither as chat_template.jinja nor in tokenizer_config.json: ask without --chat"
        ))
    })?;
    let message = ChatMessage { role: "user".to_owned(), content: Some(text), ..Default::default() };
    let written = template.render(&[message], true, &[], &Map::new())?;
    // The template has written what a text begins with.
    let tokens = coordinator.tokenize(&written, false).await?;
    Ok(Prompt::Tokens(tokens))
}

/// The whole answer.
struct Answer {
    text: String,
    token_ids: Vec<u32>,
    /// One for each token, if they were asked for.
    logprobs: Vec<Logprobs>,
    finish: Finish,
}

/// Asks for `prompt` to be answered; the answer is printed token by token unless JSON is wanted.
async fn answer(client: &CoordinatorClient, prompt: Prompt, arguments: &AskArguments) -> anyhow::Result<Answer> {
    let mut params = arguments.generation.params(prompt, arguments.routing);
    params.logprobs = arguments.logprobs;
    let refused = |error: Status| client.check_model().map_or_else(anyhow::Error::new, |()| error.into());
    let mut tokens = client.generate(params).await.map_err(refused)?;
    let (mut text, mut token_ids, mut logprobs, mut finish) = (String::new(), Vec::new(), Vec::new(), None);
    while let Some(token) = tokens.try_next().await.map_err(refused)? {
        if !arguments.json {
            write!(io::stdout(), "{}", token.text)?;
            io::stdout().flush()?;
        }
        text.push_str(&token.text);
        token_ids.push(token.token_id);
        logprobs.extend(token.logprobs);
        finish = token.finish;
    }
    if !arguments.json {
        writeln!(io::stdout())?;
    }
    let finish = finish.ok_or_else(|| Status::data_loss("the answer ended without its last message"))?;
    Ok(Answer { text, token_ids, logprobs, finish })
}

fn as_json(answer: &Answer, model: &ModelFacts, report: &AnswerReport<'_>, ready_after: Duration) -> Value {
    let Answer { text, token_ids, logprobs, finish } = answer;
    let trace = finish.trace.clone().unwrap_or_default();
    let timings = trace.timings.unwrap_or_default();
    let (resident_bytes, budget_bytes) = report.resident_and_budget();
    let layers: Vec<_> =
        trace.layers.iter().map(|used| json!({"layer": used.layer, "experts": used.experts})).collect();
    let mut answer = json!({
        "text": text,
        "token_ids": token_ids,
        "finish_reason": reason(finish.reason()),
        "prompt_tokens": finish.prompt_tokens,
        "cached_tokens": trace.cached_tokens,
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
        "rerouted": trace.rerouted,
        "demand_loads": trace.demand_loads,
        "failovers": trace.failovers,
        "experts_touched": trace.layers.iter().map(|used| used.experts.len()).sum::<usize>(),
        "experts_total": model.moe_layers * model.num_experts,
        "resident_bytes": resident_bytes,
        "budget_bytes": budget_bytes,
        "experts_bytes": model.experts_bytes,
        "layers": layers,
    });
    if !logprobs.is_empty() {
        answer["logprobs"] = logprobs.iter().map(logprobs_json).collect();
    }
    answer
}

/// How likely a token was, and what else was.
fn logprobs_json(logprobs: &Logprobs) -> Value {
    let top = logprobs.top.iter().map(|likely| json!({"token_id": likely.token_id, "logprob": likely.logprob}));
    json!({"logprob": logprobs.logprob, "top": top.collect::<Vec<_>>()})
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dash_reads_standard_input() {
        // Broken: a text in a file or a pipe would have to fit a command line, or a whole disk be read into memory.
        assert_eq!(text("a text", &b"not read"[..]).unwrap(), "a text");
        assert_eq!(text("-", &b"one\ntwo\r\n"[..]).unwrap(), "one\ntwo");
        assert!(text("-", &b"\xff"[..]).unwrap_err().to_string().contains("standard input"));
        assert!(text("-", io::repeat(b'a')).unwrap_err().to_string().contains("more than"));
    }
}
