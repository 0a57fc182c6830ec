//! `sida bench`: load on a cluster, in this process, on expert-node processes of its own or on a running coordinator, or on any
//! server that speaks OpenAI's protocol.
//!
//! In reading order. What is asked: [`prompts`], [`workload`]. When: [`arrivals`], [`plan`], [`load`]. Whom: [`subject`],
//! [`processes`], [`replay`], [`openai`] with [`url`], [`http_client`], [`url_tls`] and [`openai_answer`]. What comes of it: [`answer`],
//! [`timings`], [`slo`], [`samples`], [`figures`], [`budget`]. How it is told: [`live_line`], [`report`], and as a page
//! [`plots`], [`page`], with the charts of `crate::chart`.

mod answer;
mod arrivals;
mod budget;
mod figures;
mod http_client;
mod live_line;
mod load;
mod openai;
mod openai_answer;
#[cfg(test)]
mod openai_tests;
mod page;
mod plan;
mod plots;
mod processes;
mod prompts;
mod replay;
mod report;
mod samples;
mod slo;
mod subject;
mod timings;
mod url;
mod url_tls;
mod workload;

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
};

use clap::Args;
use futures::future::BoxFuture;
use serde_json::{Value, json};

use self::{
    answer::{Answer, Failure},
    budget::Budget,
    figures::Figures,
    live_line::LiveLine,
    load::Load,
    plan::{LoadArguments, Plan},
    report::{Cluster, Measured},
    samples::Samples,
    subject::{Subject, SubjectArguments},
    workload::{Workload, WorkloadArguments},
};
use crate::{bad_configuration::BadConfiguration, report_file::ReportFile, runtime};

/// Measure throughput, latency and residency under load
#[derive(Args)]
pub(crate) struct BenchArguments {
    #[command(flatten)]
    workload: WorkloadArguments,
    #[command(flatten)]
    subject: SubjectArguments,
    #[command(flatten)]
    load: LoadArguments,
    /// How often each subject is measured; several subjects take turns [default: 1, or 5 with several]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Print JSON with every sample
    #[arg(long)]
    json: bool,
    /// Write a page with plots, which needs no other file, too
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
}

const ROUNDS_MAX: usize = 10_000;

/// Starts the subjects, measures them in turn and prints.
pub(crate) fn run(arguments: BenchArguments) -> anyhow::Result<ExitCode> {
    check(&arguments)?;
    let workload = Arc::new(Workload::open(arguments.workload.clone())?);
    let plan = arguments.load.plan(arguments.subject.is_cluster().then(|| workload.texts()))?;
    // Before the measurement, so that a wrong path is not found out after it.
    let report = arguments.report.as_deref().map(ReportFile::at).transpose()?;
    let replay = arguments.subject.replay()?;
    arguments.subject.model.start_threads()?;
    runtime::run(async {
        let subjects = subject::start(&arguments.subject, plan.concurrency, replay.as_ref()).await?;
        let rounds = arguments.rounds.unwrap_or(if subjects.len() > 1 { 5 } else { 1 });
        let measured = measure(&subjects, &plan, rounds, &workload).await?;
        for subject in subjects {
            subject.stop().await;
        }
        let mut parameters = parameters(&arguments, &plan, rounds);
        if let Some(replay) = replay {
            parameters["routes"] = replay.as_json();
        }
        // First what cannot fail for want of room.
        print(&arguments, &parameters, &measured)?;
        if let Some(report) = report {
            report.write(&page::html(&parameters, &measured)?)?;
        }
        let is_answered = measured.iter().all(|subject| subject.figures.requests > 0);
        Ok(if is_answered { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    })
}

fn check(arguments: &BenchArguments) -> Result<(), BadConfiguration> {
    let rounds = arguments.rounds.unwrap_or(1);
    if !(1..=ROUNDS_MAX).contains(&rounds) {
        return Err(BadConfiguration::new(format!("--rounds is {rounds}, expected 1 to {ROUNDS_MAX}")));
    }
    let method = arguments.workload.method;
    if arguments.load.limits_tokens() && !method.generates() {
        return Err(BadConfiguration::new("--slo limits ttft or tpot, which only requests that generate tokens have"));
    }
    arguments.subject.check(method)
}

/// Warms every subject up, then measures them one after another, round by round: what the machine does
/// meanwhile hits all of them alike.
async fn measure(
    subjects: &[Subject],
    plan: &Plan,
    rounds: usize,
    workload: &Arc<Workload>,
) -> anyhow::Result<Vec<Measured>> {
    let line = LiveLine::new();
    let mut next = vec![0; subjects.len()];
    for (subject, next) in subjects.iter().zip(&mut next) {
        if let Some(warming) = &plan.warming {
            (_, *next) = send(warming, 0, subject, workload, &line, "warming up").await;
            subject.check_model()?;
        }
    }
    let mut before = Vec::new();
    for subject in subjects {
        before.push(subject.node_state().await?);
    }
    let mut samples = vec![Samples::new(plan.load.slo); subjects.len()];
    let mut rounds_per_s = vec![Vec::new(); subjects.len()];
    for round in 1..=rounds {
        for (index, subject) in subjects.iter().enumerate() {
            let doing = if rounds > 1 { format!("{} {round}/{rounds}", subject.label) } else { subject.label.clone() };
            let (seen, after) = send(&plan.load, next[index], subject, workload, &line, &doing).await;
            next[index] = after;
            rounds_per_s[index].push(figures::per_second(&seen, seen.requests));
            samples[index].merge(seen);
        }
    }
    drop(line);
    let mut measured = Vec::new();
    for (index, (subject, samples)) in subjects.iter().zip(samples).enumerate() {
        subject.check_model()?;
        let (state, model) = (subject.node_state().await?, subject.model().await?);
        let cluster = model.map(|model| Cluster {
            resident_bytes: state.resident_bytes,
            budget: Budget::of(workload.method(), &model, state.budget_bytes, state.slots),
            loads: state.loads_since(&before[index]),
        });
        let rounds_per_s = std::mem::take(&mut rounds_per_s[index]);
        let figures = Figures::of(&samples);
        measured.push(Measured { label: subject.label.clone(), figures, samples, rounds_per_s, cluster });
    }
    Ok(measured)
}

/// What became of a request.
type Answering = BoxFuture<'static, Result<Answer, Failure>>;

/// Runs a load on a subject.
async fn send(
    load: &Load,
    first: u64,
    subject: &Subject,
    workload: &Arc<Workload>,
    line: &LiveLine,
    doing: &str,
) -> (Samples, u64) {
    let (clients, workload) = (subject.clients.clone(), workload.clone());
    let timeout = load.timeout;
    let request = Arc::new(move |client: usize, number| -> Answering {
        let (client, workload) = (clients[client % clients.len()].clone(), workload.clone());
        Box::pin(async move { workload.ask(&client, number, timeout).await })
    });
    let tell = |samples: &Samples, under_way, elapsed| line.show(doing, samples, under_way, elapsed);
    load::run(load, first, request, tell).await
}

/// What was asked for, as `--json` tells it.
fn parameters(arguments: &BenchArguments, plan: &Plan, rounds: usize) -> Value {
    let mut parameters = plan.parameters.clone();
    parameters["method"] = json!(arguments.workload.method);
    parameters["rounds"] = json!(rounds);
    parameters["latency_of"] = json!(latency_of(arguments));
    parameters["threads"] = json!(arguments.subject.model.threads());
    parameters
}

fn latency_of(arguments: &BenchArguments) -> String {
    match arguments.load.batch {
        1 => "a request".to_owned(),
        batch => format!("a batch of {batch}"),
    }
}

fn print(arguments: &BenchArguments, parameters: &Value, measured: &[Measured]) -> anyhow::Result<()> {
    let mut output = io::stdout().lock();
    if arguments.json {
        serde_json::to_writer(io::BufWriter::new(&mut output), &report::as_json(parameters.clone(), measured))
            .map_err(io::Error::from)?;
        return Ok(writeln!(output)?);
    }
    Ok(write!(output, "{}", report::as_text(measured, parameters))?)
}
