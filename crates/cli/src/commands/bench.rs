//! `sida bench`: closed-loop load on a cluster: in this process, on expert-node processes of its own, or on a
//! running coordinator.
//!
//! In reading order: [`workload`] (what a request is), [`load`] (how they are sent), [`figures`] (what is
//! measured), [`subject`] (what it is measured on), [`processes`] (one kind of that), [`budget`] (how much of what is used
//! it may hold), [`report`] (how it is told).

mod budget;
mod figures;
mod load;
mod processes;
mod report;
mod subject;
mod workload;

use std::{
    io::{self, Write},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use clap::Args;
use futures::future::BoxFuture;
use serde_json::json;

use self::{
    budget::Budget,
    figures::{Sample, Samples},
    load::{Load, Until},
    report::Measured,
    subject::{Subject, SubjectArguments},
    workload::{Workload, WorkloadArguments},
};
use crate::{
    bad_configuration::BadConfiguration,
    loading_bar::{LoadingBar, Unit},
    runtime, time_span,
};

/// Measure throughput, latency and residency under closed-loop load
#[derive(Args)]
pub(crate) struct BenchArguments {
    #[command(flatten)]
    workload: WorkloadArguments,
    #[command(flatten)]
    subject: SubjectArguments,
    /// Clients, each with one call under way
    #[arg(long, value_name = "N", default_value_t = 1)]
    concurrency: usize,
    /// Requests of a call: sent together, answered when all of them are
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: usize,
    /// Stop after so many requests, per subject and round
    #[arg(long, value_name = "N", conflicts_with = "duration")]
    requests: Option<u64>,
    /// Stop after so much time, per subject and round [default: 5s]
    #[arg(long, value_name = "TIME", value_parser = time_span::parse)]
    duration: Option<Duration>,
    /// Requests before the measurement, per subject [default: 4 calls per client, or every text once]
    #[arg(long, value_name = "N")]
    warmup: Option<u64>,
    /// How often each subject is measured; several subjects take turns [default: 1, or 5 with several]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Print JSON with every sample
    #[arg(long)]
    json: bool,
}

/// The longest run: what its samples take stays well below what a model takes.
const BATCH_MAX: usize = 4096;
const ROUNDS_MAX: usize = 10_000;

/// Starts the subjects, measures them in turn and prints.
pub(crate) fn run(arguments: BenchArguments) -> anyhow::Result<ExitCode> {
    let load = load_of(&arguments)?;
    let workload = Arc::new(Workload::open(arguments.workload.clone())?);
    arguments.subject.model.start_threads()?;
    runtime::run(async {
        let subjects = subject::start(&arguments.subject, arguments.concurrency).await?;
        let rounds = arguments.rounds.unwrap_or(if subjects.len() > 1 { 5 } else { 1 });
        let measured = measure(&subjects, load, rounds, warmup_requests(&arguments, &workload), &workload).await?;
        for subject in subjects {
            subject.stop().await;
        }
        print(&arguments, rounds, &measured)?;
        let is_answered = measured.iter().all(|subject| subject.figures.requests > 0);
        Ok(if is_answered { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    })
}

fn load_of(arguments: &BenchArguments) -> Result<Load, BadConfiguration> {
    for (name, value, most) in [
        ("--concurrency", arguments.concurrency, BATCH_MAX),
        ("--batch", arguments.batch, BATCH_MAX),
        ("--rounds", arguments.rounds.unwrap_or(1), ROUNDS_MAX),
    ] {
        if !(1..=most).contains(&value) {
            return Err(BadConfiguration::new(format!("{name} is {value}, expected 1 to {most}")));
        }
    }
    if arguments.requests == Some(0) {
        return Err(BadConfiguration::new("--requests is 0, expected 1 or more".to_owned()));
    }
    if arguments.duration == Some(Duration::ZERO) {
        return Err(BadConfiguration::new("--duration is 0s, expected more".to_owned()));
    }
    let until = match (arguments.requests, arguments.duration) {
        (Some(requests), _) => Until::Requests(requests),
        (None, Some(duration)) => Until::Elapsed(duration),
        (None, None) => Until::Elapsed(Duration::from_secs(5)),
    };
    Ok(Load { concurrency: arguments.concurrency, batch: arguments.batch, until })
}

/// Enough to touch every text, so that the measurement starts in the steady state.
fn warmup_requests(arguments: &BenchArguments, workload: &Workload) -> u64 {
    let calls = 4 * (arguments.concurrency * arguments.batch) as u64;
    arguments.warmup.unwrap_or(calls.max(workload.texts().min(1024) as u64))
}

/// Warms every subject up, then measures them one after another, round by round: what the machine does
/// meanwhile hits all of them alike.
async fn measure(
    subjects: &[Subject],
    load: Load,
    rounds: usize,
    warmup: u64,
    workload: &Arc<Workload>,
) -> anyhow::Result<Vec<Measured>> {
    let bar = LoadingBar::new("warming up", Unit::Steps);
    let warming = Load { until: Until::Requests(warmup), ..load };
    let mut next = vec![0; subjects.len()];
    for (subject, next) in subjects.iter().zip(&mut next) {
        (_, *next) = load::run(warming, 0, request_of(subject, workload)).await;
        subject.clients[0].check_model()?;
    }
    let mut before = Vec::new();
    for subject in subjects {
        before.push(subject.node_state().await?);
    }
    let mut samples: Vec<Samples> = subjects.iter().map(|_| Samples::default()).collect();
    let mut rounds_per_s = vec![Vec::new(); subjects.len()];
    for round in 0..rounds {
        for (index, subject) in subjects.iter().enumerate() {
            bar.describe(format!("measuring {}", subject.label));
            bar.advance((round * subjects.len() + index) as u64, (rounds * subjects.len()) as u64);
            let (seen, after) = load::run(load, next[index], request_of(subject, workload)).await;
            next[index] = after;
            rounds_per_s[index].push(seen.figures().requests_per_s);
            samples[index].merge(seen);
        }
    }
    drop(bar);
    let mut measured = Vec::new();
    for (index, (subject, samples)) in subjects.iter().zip(samples).enumerate() {
        subject.clients[0].check_model()?;
        let state = subject.node_state().await?;
        let model = subject.clients[0].model().await?;
        measured.push(Measured {
            label: subject.label.clone(),
            figures: samples.figures(),
            rounds_per_s: std::mem::take(&mut rounds_per_s[index]),
            resident_bytes: state.resident_bytes,
            budget: Budget::of(workload.method(), &model, state.budget_bytes, state.slots),
            loads: state.loads.since(before[index].loads),
        });
    }
    Ok(measured)
}

/// An answer's measure, or its failure as code and message.
type Answering = BoxFuture<'static, Result<Sample, String>>;

/// What [`load::run`] calls: a client's request of a number.
fn request_of(subject: &Subject, workload: &Arc<Workload>) -> Arc<impl Fn(usize, u64) -> Answering + use<>> {
    let (clients, workload) = (subject.clients.clone(), workload.clone());
    Arc::new(move |client: usize, number| {
        let (client, workload) = (clients[client % clients.len()].clone(), workload.clone());
        let answer = async move { workload.ask(&client, number).await };
        Box::pin(async { answer.await.map_err(|status| format!("{:?}: {}", status.code(), status.message())) }) as _
    })
}

fn print(arguments: &BenchArguments, rounds: usize, measured: &[Measured]) -> io::Result<()> {
    let latency_of = match arguments.batch {
        1 => "a request".to_owned(),
        batch => format!("a batch of {batch}"),
    };
    if !arguments.json {
        write!(io::stdout(), "{}", report::as_table(measured, &latency_of))?;
        return Ok(());
    }
    let parameters = json!({
        "method": arguments.workload.method,
        "concurrency": arguments.concurrency,
        "batch": arguments.batch,
        "rounds": rounds,
        "latency_of": latency_of,
        "threads": arguments.subject.model.threads(),
    });
    writeln!(io::stdout(), "{}", report::as_json(parameters, measured))
}
