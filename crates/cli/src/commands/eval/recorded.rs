//! What residency and plans are worth under the locality of a real model: `--routes`. Recorded routes go through the machine that
//! decides in expert-nodes which experts stay and which come (`sida_routing::residency_replay`); no model is computed.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::Args;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use sida_routing::{
    recorded_routes::Phase,
    residency_replay::{self, Lookahead, ReplayConfig, Replayed},
};

use crate::{
    bad_configuration::BadConfiguration,
    plain_table::PlainTable,
    routes_file::{self, RoutesFile},
    share,
};

/// More shares than this are a mistake.
const SHARES_MAX: usize = 16;

/// Which routes, and how they are replayed.
#[derive(Args, Clone, Debug)]
pub(crate) struct RecordedArguments {
    /// In place of --data: how often experts are there in time, and how many are moved, when recorded routes are decoded in little
    /// memory, with and without plans. CSV with the columns turn, phase, step, layer, slot and expert
    #[arg(long, value_name = "FILE.csv", conflicts_with_all = ["data", "report", "budgets"])]
    pub(super) routes: Option<PathBuf>,
    /// With --routes: room for these shares of all experts, as 10%,20%
    #[arg(long, value_name = "SHARES", value_delimiter = ',', value_parser = share::parse, default_value = "20%")]
    share: Vec<f64>,
    /// With --routes: the share of experts that plans guess right; the others are drawn, by --seed
    #[arg(long, value_name = "SHARE", value_parser = share::parse, default_value = "88.6%")]
    guessed: f64,
    /// With --routes: so many loads ahead at most while a layer computes
    #[arg(long, value_name = "N", default_value_t = 1)]
    loads_ahead: usize,
}

/// What was found of one way to decide, with one share.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Row {
    share: f64,
    slots: usize,
    decided: &'static str,
    hit_share: f64,
    loads_per_token: f64,
    loads_ahead_per_token: f64,
}

#[derive(Serialize)]
struct Found {
    file: String,
    layers: usize,
    experts: usize,
    experts_per_token: usize,
    prompt_tokens: usize,
    generated_tokens: usize,
    guessed: f64,
    seed: u64,
    loads_ahead: usize,
    rows: Vec<Row>,
}

/// Replays the routes of a file and prints what came of it.
pub(crate) fn run(arguments: &RecordedArguments, file: &Path, seed: u64, json: bool) -> anyhow::Result<()> {
    if arguments.share.len() > SHARES_MAX {
        let found = arguments.share.len();
        return Err(BadConfiguration::new(format!("--share names {found}, at most {SHARES_MAX}")).into());
    }
    let found = found(arguments, file, &routes_file::read(file, None)?, seed)?;
    let mut output = io::stdout().lock();
    if json {
        serde_json::to_writer(&mut output, &found).map_err(io::Error::from)?;
        return Ok(writeln!(output)?);
    }
    Ok(write!(output, "{}", as_text(&found))?)
}

fn found(arguments: &RecordedArguments, file: &Path, read: &RoutesFile, seed: u64) -> Result<Found, BadConfiguration> {
    let (routes, experts) = (&read.routes, read.routes.num_experts());
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let guesses = residency_replay::guesses(routes, experts, arguments.guessed, || random.random());
    let mut rows = Vec::new();
    for &share in &arguments.share {
        let slots = (share * (routes.layers() * experts) as f64) as usize;
        if slots < read.top_k {
            let message = format!(
                "--share {}% is room for {slots} of {} experts, a token needs {} at a layer",
                100.0 * share,
                routes.layers() * experts,
                read.top_k
            );
            return Err(BadConfiguration::new(message));
        }
        let of = |lookahead| {
            let loads_ahead_max = arguments.loads_ahead;
            let config = ReplayConfig { num_experts: experts, slots, lookahead, loads_ahead_max };
            residency_replay::replay(routes, &guesses, config)
        };
        let found: [(&str, Replayed); 5] = [
            ("least recently used leaves", residency_replay::least_recently_used(routes, slots)),
            ("no plans", of(Lookahead::None)),
            ("plans of the next layer", of(Lookahead::Layer)),
            ("plans of the token", of(Lookahead::Step)),
            ("Belady: knows all that comes", residency_replay::belady(routes, slots)),
        ];
        rows.extend(found.map(|(decided, replayed)| Row {
            share,
            slots,
            decided,
            hit_share: replayed.hit_share(),
            loads_per_token: replayed.loads_per_token(),
            loads_ahead_per_token: replayed.loads_ahead as f64 / replayed.tokens.max(1) as f64,
        }));
    }
    Ok(Found {
        file: file.display().to_string(),
        layers: routes.layers(),
        experts,
        experts_per_token: read.top_k,
        prompt_tokens: routes.tokens(Phase::Prompt),
        generated_tokens: routes.tokens(Phase::Decoding),
        guessed: arguments.guessed,
        seed,
        loads_ahead: arguments.loads_ahead,
        rows,
    })
}

fn as_text(found: &Found) -> String {
    let mut table = PlainTable::new(["room for", "decided by", "hits", "experts moved per token", "of them ahead"]);
    for row in &found.rows {
        table.row([
            format!("{:.0}%: {}", 100.0 * row.share, row.slots),
            row.decided.to_owned(),
            format!("{:.1}%", 100.0 * row.hit_share),
            format!("{:.1}", row.loads_per_token),
            format!("{:.1}", row.loads_ahead_per_token),
        ]);
    }
    format!(
        "{}: {} layers of {} experts (as far as they are named), {} experts a token, {} tokens of prompts and {} generated ones\n{}\
         a hit is an expert that is resident when its layer begins, wherever it came from; figures are of the generated tokens\n\
         plans guess {:.1}% of the experts right (--seed {}), and at most {} are loaded ahead while a layer computes\n",
        found.file,
        found.layers,
        found.experts,
        found.experts_per_token,
        found.prompt_tokens,
        found.generated_tokens,
        table.draw(),
        100.0 * found.guessed,
        found.seed,
        found.loads_ahead,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(share: f64) -> RecordedArguments {
        RecordedArguments { routes: None, share: vec![share], guessed: 0.9, loads_ahead: 1 }
    }

    fn file() -> RoutesFile {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("routes.csv");
        std::fs::write(&path, routes_file::tests::FILE).unwrap();
        routes_file::read(&path, None).unwrap()
    }

    #[test]
    fn every_way_to_decide_is_told() {
        // Would break: a figure is told of another rule, or nobody learns what counts as a hit and how good the guesses were.
        let found = found(&arguments(0.5), Path::new("a.csv"), &file(), 3).unwrap();
        assert_eq!((found.layers, found.experts, found.rows.len()), (2, 4, 5));
        let text = as_text(&found);
        for told in [
            "a.csv: 2 layers of 4 experts",
            "50%: 4",
            "no plans",
            "Belady",
            "90.0% of the experts right (--seed 3)",
            "a hit is",
        ] {
            assert!(text.contains(told), "{told}: {text}");
        }
        // All of room for everything: each expert comes once.
        let all = super::found(&arguments(1.0), Path::new("a.csv"), &file(), 3).unwrap();
        assert!(all.rows.iter().all(|row| row.slots == 8 && row.hit_share >= 0.5), "{:?}", all.rows);
    }

    #[test]
    fn room_for_less_than_a_token_is_refused() {
        // Would break: a share of nothing is a division by zero, or figures that mean nothing.
        let Err(error) = found(&arguments(0.1), Path::new("a.csv"), &file(), 0) else { panic!("it is replayed") };
        assert!(error.to_string().contains("--share 10% is room for 0 of 8 experts"), "{error}");
    }
}
