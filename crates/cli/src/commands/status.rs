//! `sida status`: the cluster as a coordinator sees it.

use std::{
    io::{self, IsTerminal, Write},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use clap::Args;
use serde_json::json;
use sida_proto::v1::StatusResponse;
use tonic::Status;

use crate::{
    arguments::keys::CallerArguments,
    coordinator_client::CoordinatorClient,
    expert_picture::Style,
    runtime, status_table, time_span,
    told::{FirstCall, told_status},
    watch_screen::WatchScreen,
};

/// Show a cluster's nodes, placement, residency and hit rate
#[derive(Args)]
pub(crate) struct StatusArguments {
    /// The coordinator to ask
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:50051")]
    endpoint: String,
    #[command(flatten)]
    caller: CallerArguments,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Ask again and again, also after no answer: on a screen of its own in a terminal (q ends), else one answer after the
    /// other until Ctrl-C
    #[arg(long)]
    watch: bool,
    /// Time between two questions of --watch
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = time_span::parse)]
    interval: Duration,
}

/// Asks once, or again and again.
pub(crate) fn run(arguments: StatusArguments) -> anyhow::Result<ExitCode> {
    runtime::run(async {
        if !arguments.watch {
            let client = CoordinatorClient::connect(&arguments.endpoint, &arguments.caller).await?;
            print(&client.status().await.context(FirstCall)?, &arguments)?;
            return Ok(ExitCode::SUCCESS);
        }
        // A coordinator that is not there yet, or not for a moment, is no reason to end.
        let client = CoordinatorClient::connect_lazy(&arguments.endpoint, &arguments.caller)?;
        let interval = arguments.interval.max(Duration::from_millis(50));
        if arguments.json || !io::stdout().is_terminal() {
            loop {
                match client.status().await {
                    Ok(status) => print(&status, &arguments)?,
                    Err(error) => print_failure(&error, &arguments)?,
                }
                tokio::time::sleep(interval).await;
            }
        }
        watch(&client, &arguments.endpoint, interval).await?;
        Ok(ExitCode::SUCCESS)
    })
}

/// Shows the state on a screen of its own until somebody types q or Ctrl-C. A coordinator that does not answer is
/// asked again: it may be restarting.
async fn watch(client: &CoordinatorClient, endpoint: &str, interval: Duration) -> anyhow::Result<()> {
    let style = Style::of_stdout();
    let mut screen = WatchScreen::open()?;
    let mut state = String::new();
    loop {
        let head = match client.status().await {
            Ok(status) => {
                state = status_table::draw_within(screen.columns(), &status, style);
                format!("{endpoint} every {interval:?} · q ends")
            }
            Err(error) => style.paint("31", &format!("{} · q ends", no_answer(endpoint, &error))),
        };
        screen = screen.show(&format!("{head}\n\n{state}"), interval).await?;
        if screen.is_over() {
            return Ok(());
        }
    }
}

fn print(status: &StatusResponse, arguments: &StatusArguments) -> io::Result<()> {
    if arguments.json {
        writeln!(io::stdout(), "{}", as_json(status))?;
        return Ok(());
    }
    write!(io::stdout(), "{}", status_table::draw(status, Style::of_stdout()))?;
    io::stdout().flush()
}

/// In the place of an answer.
fn print_failure(error: &Status, arguments: &StatusArguments) -> io::Result<()> {
    let told = no_answer(&arguments.endpoint, error);
    match arguments.json {
        true => writeln!(io::stdout(), "{}", json!({"error": told}))?,
        false => writeln!(io::stdout(), "{}", Style::of_stdout().paint("31", &told))?,
    }
    io::stdout().flush()
}

fn no_answer(endpoint: &str, error: &Status) -> String {
    format!("{endpoint} does not answer: {}", told_status(error))
}

/// The whole answer; a node without residency did not give it.
fn as_json(status: &StatusResponse) -> serde_json::Value {
    let nodes: Vec<_> = status
        .nodes
        .iter()
        .map(|node| {
            let residency = node.residency.as_ref().map(|held| {
                json!({
                    "resident_bytes": held.resident_bytes,
                    "budget_bytes": held.budget_bytes,
                    "slots": held.slots,
                    "demand_loads": held.demand_loads,
                    "prefetch_loads": held.prefetch_loads,
                    "evictions": held.evictions,
                    "rows": held.rows,
                    "experts": held.layers.iter().map(|layer| json!({
                        "layer": layer.layer,
                        "experts": layer.experts,
                    })).collect::<Vec<_>>(),
                })
            });
            json!({
                "node": node.node,
                "role": node.role,
                "address": node.address,
                "healthy": node.healthy,
                "problem": node.problem,
                "experts_placed": node.experts_placed,
                "experts_held": node.experts_held,
                "ready_epoch": node.ready_epoch,
                "weight": node.weight,
                "residency": residency,
            })
        })
        .collect();
    json!({
        "coordinator": status.coordinator,
        "model": status.model,
        "placement_epoch": status.placement_epoch,
        "requests_total": status.requests_total,
        "requests_queued": status.requests_queued,
        "requests_inflight": status.requests_inflight,
        "hash_hits": status.hash_hits,
        "hash_misses": status.hash_misses,
        "failovers": status.failovers,
        "membership": status.membership,
        "etcd_connected": status.etcd_connected,
        "leader": status.leader,
        "nodes": nodes,
    })
}
