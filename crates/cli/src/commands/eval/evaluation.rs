//! All figures of an evaluation, made of the answers of every mode under every budget. Told by
//! [`crate::commands::eval::report`], as JSON, and by [`crate::commands::eval::page`].

use std::time::Duration;

use serde::Serialize;

use crate::{
    commands::eval::{
        answered::Answered,
        hit_rates::{self, HitRate},
        lengths::{self, LengthRow},
        memory::{self, MemoryRow},
        moe_layers::{GroupName, MoeLayers},
        quality::Quality,
        task::Example,
    },
    node_state::NodeLoads,
};

/// What a cluster of some budget gave.
pub(crate) struct BudgetRun {
    /// As it was asked for.
    pub(crate) label: String,
    /// Memory for experts, over all expert-nodes.
    pub(crate) budget_bytes: u64,
    /// Of every mode, in their order.
    pub(crate) modes: Vec<ModeRun>,
}

/// What it gave in one mode.
pub(crate) struct ModeRun {
    pub(crate) mode: &'static str,
    /// Or why the mode is not served.
    pub(crate) served: Result<Served, String>,
}

/// Answers, and what they took.
pub(crate) struct Served {
    /// In the order of the examples.
    pub(crate) answers: Vec<Answered>,
    pub(crate) wall: Duration,
    /// What the expert-nodes loaded meanwhile.
    pub(crate) loads: NodeLoads,
    /// What they held at the end.
    pub(crate) resident_bytes: u64,
}

/// The figures.
#[derive(Serialize)]
pub(crate) struct Evaluation {
    pub(crate) examples: usize,
    /// Bytes of all experts by stack.
    pub(crate) experts_bytes: Vec<(GroupName, u64)>,
    /// By the answers of the first budget.
    pub(crate) modes: Vec<ModeFigures>,
    pub(crate) budgets: Vec<BudgetFigures>,
}

/// A mode, or why it is not served.
#[derive(Serialize)]
pub(crate) struct ModeFigures {
    pub(crate) mode: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) not_served: Option<String>,
    #[serde(flatten)]
    pub(crate) figures: Option<Figures>,
}

/// Of the answers of a mode.
#[derive(Serialize)]
pub(crate) struct Figures {
    #[serde(flatten)]
    pub(crate) quality: Quality,
    /// Answers of which a part had no hash table.
    pub(crate) unpredicted: usize,
    pub(crate) hit_rates: Vec<HitRate>,
    pub(crate) memory: Vec<MemoryRow>,
    pub(crate) lengths: Vec<LengthRow>,
}

/// A budget.
#[derive(Serialize)]
pub(crate) struct BudgetFigures {
    pub(crate) budget: String,
    pub(crate) budget_bytes: u64,
    /// Of all experts' bytes, the share that there is memory for; at most 1.
    pub(crate) share: f64,
    pub(crate) modes: Vec<BudgetMode>,
}

/// How a mode fared under a budget.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct BudgetMode {
    pub(crate) mode: &'static str,
    pub(crate) examples_per_s: f64,
    /// From acceptance to the answer, on average.
    pub(crate) latency_ms: f64,
    /// Of that, waiting for experts to be loaded, on average.
    pub(crate) waited_ms: f64,
    /// Experts that were loaded while a call waited, per example.
    pub(crate) demand_loads: f64,
    pub(crate) loads: NodeLoads,
    pub(crate) resident_bytes: u64,
    /// Examples whose likelihoods are others than under the first budget.
    pub(crate) changed: usize,
}

impl Evaluation {
    /// Of runs over the same examples, the first of which has the answers that are told. The first mode of each run has the
    /// model's own answers.
    pub(crate) fn of(examples: &[Example], layers: &MoeLayers, batches: &[usize], runs: &[BudgetRun]) -> Self {
        let exact = runs.first().and_then(|run| run.modes.first()?.served.as_ref().ok());
        let mode = |run: &ModeRun| {
            let figures = run.served.as_ref().ok().zip(exact).map(|(served, exact)| Figures {
                quality: Quality::of(examples, &served.answers, &exact.answers),
                unpredicted: served.answers.iter().filter(|answer| answer.unpredicted).count(),
                hit_rates: hit_rates::of(&served.answers, layers),
                memory: memory::of(&served.answers, layers, batches),
                lengths: lengths::of(&served.answers, layers),
            });
            ModeFigures { mode: run.mode, not_served: run.served.as_ref().err().cloned(), figures }
        };
        let all_bytes = layers.bytes(&(0..layers.blocks.len()));
        let budget = |run: &BudgetRun| BudgetFigures {
            budget: run.label.clone(),
            budget_bytes: run.budget_bytes,
            share: (run.budget_bytes as f64 / all_bytes as f64).min(1.0),
            modes: run.modes.iter().zip(&runs[0].modes).filter_map(|(run, first)| budget_mode(run, first)).collect(),
        };
        Self {
            examples: examples.len(),
            experts_bytes: layers.groups().into_iter().map(|group| (group.name, layers.bytes(&group.layers))).collect(),
            modes: runs.first().map(|run| run.modes.iter().map(mode).collect()).unwrap_or_default(),
            budgets: runs.iter().map(budget).collect(),
        }
    }
}

/// How a mode fared, beside the same mode under the first budget; `None` where it is not served.
fn budget_mode(run: &ModeRun, first: &ModeRun) -> Option<BudgetMode> {
    let (served, first) = (run.served.as_ref().ok()?, first.served.as_ref().ok()?);
    let count = served.answers.len() as f64;
    let mean_ms = |of: fn(&Answered) -> Duration| {
        served.answers.iter().map(|answer| of(answer).as_secs_f64() * 1e3).sum::<f64>() / count
    };
    let changed = served.answers.iter().zip(&first.answers).filter(|(own, first)| own.scores != first.scores);
    Some(BudgetMode {
        mode: run.mode,
        examples_per_s: count / served.wall.as_secs_f64(),
        latency_ms: mean_ms(|answer| answer.total),
        waited_ms: mean_ms(|answer| answer.load),
        demand_loads: served.loads.demanded as f64 / count,
        loads: served.loads,
        resident_bytes: served.resident_bytes,
        changed: changed.count(),
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;
    use sida_coordinator::HashCounts;

    use super::*;
    use crate::commands::eval::{
        answered::{Layer, tests::answered},
        moe_layers::tests::layers,
        record::Place,
        task::Wanted,
    };

    /// Two examples under two budgets; of the two modes beside `exact` one is served.
    pub(crate) fn evaluation() -> Evaluation {
        let example = |label| Example {
            place: Place { file: "data".into(), line: 1 },
            prompt: "x".into(),
            wanted: Wanted::Choice(vec!["a".into(), "b".into()], label),
        };
        let layer = Layer {
            counts: HashCounts { hits: 3, top1_hits: 1, top3_hits: 2, misses: 1 },
            used: vec![0, 1],
            named: vec![(0, 0), (2, 1)],
            ..Layer::default()
        };
        let answer = |scores: [f64; 2], load| Answered {
            load: Duration::from_millis(load),
            total: Duration::from_millis(10),
            layers: vec![layer.clone(), layer.clone()],
            ..answered(&scores)
        };
        let served = |answers: [Answered; 2], demanded| {
            let loads = NodeLoads { demanded, ..NodeLoads::default() };
            Ok(Served { answers: answers.to_vec(), wall: Duration::from_millis(500), loads, resident_bytes: 40 })
        };
        let run = |label: &str, budget_bytes, load, score| {
            let exact = served([answer([-1.0, -2.0], load), answer([-2.0, -1.0], 0)], 3);
            let other = served([answer([-2.0, -1.0], load), answer([-2.0, score], 0)], 0);
            let modes = [("exact", exact), ("guided", Err("not served by this version".to_owned())), ("hash", other)];
            let modes = modes.map(|(mode, served)| ModeRun { mode, served });
            BudgetRun { label: label.to_owned(), budget_bytes, modes: modes.into() }
        };
        let runs = [run("100%", 90, 0, -1.0), run("50%", 40, 4, -1.5)];
        Evaluation::of(&[example(0), example(0)], &layers(1, 1), &[1, 2], &runs)
    }

    #[test]
    fn figures_are_of_their_mode_and_budget() {
        // Would break: a mode is told with the figures of another, or what a smaller budget costs is not told.
        let found = serde_json::to_value(evaluation()).unwrap();
        let [exact, guided, hash] = &found["modes"].as_array().unwrap()[..] else { panic!("{found}") };
        assert_eq!(exact["choices"], json!({"examples": 2, "accuracy": 0.5, "unchanged": 1.0}));
        assert_eq!(hash["choices"], json!({"examples": 2, "accuracy": 0.0, "unchanged": 0.5}));
        assert_eq!(guided, &json!({"mode": "guided", "not_served": "not served by this version"}));
        assert_eq!(found["experts_bytes"], json!([["encoder", 40], ["decoder", 40], ["all", 80]]));
        let row = &exact["memory"][1];
        assert_eq!((&row["depth"], &row["saved"], &row["set_recall"]), (&json!(1), &json!(0.5), &json!(0.5)));
        let [all, half] = &found["budgets"].as_array().unwrap()[..] else { panic!("{found}") };
        assert_eq!((&all["share"], &half["share"]), (&json!(1.0), &json!(0.5)));
        let [exact, hash] = &half["modes"].as_array().unwrap()[..] else { panic!("{found}") };
        assert_eq!((&exact["mode"], &hash["mode"]), (&json!("exact"), &json!("hash")));
        assert_eq!((&exact["examples_per_s"], &exact["latency_ms"]), (&json!(4.0), &json!(10.0)));
        assert_eq!((&exact["waited_ms"], &exact["demand_loads"]), (&json!(2.0), &json!(1.5)));
        assert_eq!((&exact["changed"], &hash["changed"]), (&json!(0), &json!(1)));
    }
}
