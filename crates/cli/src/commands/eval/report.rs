//! The figures as tables that a person reads.

use serde_json::Value;
use sida_telemetry::counted;

use crate::{
    byte_size,
    commands::eval::{
        evaluation::{BudgetMode, Evaluation, Figures},
        hit_rates::HitRate,
        lengths::LengthRow,
        memory::{FORESIGHT, MemoryRow, Planned},
    },
    plain_table::PlainTable,
};

/// A title, what is said about it, and rows under a header.
pub(crate) struct ReportTable {
    pub(crate) title: &'static str,
    pub(crate) header: Vec<&'static str>,
    pub(crate) rows: Vec<Vec<String>>,
}

/// All of them, as text.
pub(crate) fn as_text(evaluation: &Evaluation, parameters: &Value) -> String {
    let mut text = format!("{}\n", summary(evaluation, parameters));
    for ReportTable { title, header, rows } in tables(evaluation) {
        let mut table = PlainTable::new(header);
        rows.into_iter().for_each(|row| table.row(row));
        text += &format!("\n{title}\n\n{}", table.draw());
    }
    text
}

/// What was evaluated.
pub(crate) fn summary(evaluation: &Evaluation, parameters: &Value) -> String {
    let named = |key: &str| parameters[key].as_str().unwrap_or("none").to_owned();
    let bytes = evaluation.experts_bytes.iter();
    let bytes = bytes.map(|&(name, bytes)| format!("{} {}", name.as_str(), byte_size::shown(bytes)));
    let cut = match parameters["cut_prompts"].as_u64() {
        None | Some(0) => String::new(),
        Some(cut) => format!(", {cut} of them cut to {} tokens", parameters["prompt_tokens_max"]),
    };
    format!(
        "{}{cut}; model {}, predictor {}; experts: {}",
        counted(evaluation.examples, "example"),
        named("model"),
        named("predictor"),
        bytes.collect::<Vec<_>>().join(", ")
    )
}

/// All tables that have rows.
pub(crate) fn tables(evaluation: &Evaluation) -> Vec<ReportTable> {
    let all =
        [answers(evaluation), hit_rates(evaluation), memory(evaluation), lengths(evaluation), budgets(evaluation)];
    all.into_iter().filter(|table| !table.rows.is_empty()).collect()
}

fn answers(evaluation: &Evaluation) -> ReportTable {
    let rows = evaluation.modes.iter().map(|mode| match (&mode.figures, &mode.not_served) {
        (Some(Figures { quality, unpredicted, .. }), _) => {
            let of_choices = |share: fn(&_) -> f64| quality.choices.as_ref().map(share).map(percent);
            let cells = [
                of_choices(|choices| choices.accuracy),
                of_choices(|choices| choices.unchanged),
                quality.target.map(|target| format!("{:.2}", target.perplexity)),
                (*unpredicted > 0).then(|| format!("{unpredicted} answers had no hash table")),
            ];
            let cells = cells.into_iter().map(Option::unwrap_or_default);
            [mode.mode.to_owned()].into_iter().chain(cells).collect()
        }
        (None, why) => {
            let why = why.as_deref().unwrap_or_default();
            vec![mode.mode.to_owned(), String::new(), String::new(), String::new(), format!("not served: {why}")]
        }
    });
    let header = vec!["mode", "accuracy", "unchanged", "perplexity", ""];
    ReportTable { title: "Answers", header, rows: rows.collect() }
}

/// What the router says of the hash table while it chooses.
fn hit_rates(evaluation: &Evaluation) -> ReportTable {
    let rows = exact(evaluation).into_iter().flat_map(|figures| &figures.hit_rates).map(|rate| {
        let HitRate { stack, block, choices, top1, top3, .. } = rate;
        let block = block.map_or_else(String::new, |block| format!(" block {block}"));
        vec![format!("{}{block}", stack.as_str()), choices.to_string(), percent(*top1), percent(*top3)]
    });
    let header = vec!["layers", "choices", "top 1", "top 3"];
    ReportTable { title: "How often the hash table named what the router chose", header, rows: rows.collect() }
}

/// Of the batches that the router routes.
fn memory(evaluation: &Evaluation) -> ReportTable {
    let rows = exact(evaluation).into_iter().flat_map(|figures| &figures.memory).map(|row| {
        let MemoryRow { layers, batch, plan, resident_bytes, resident_bytes_peak, set_recall, .. } = *row;
        let plan = match plan {
            Planned::Depth(0) => "what is needed".to_owned(),
            Planned::Depth(depth) => format!("top {depth}"),
            Planned::Chance(chance) => format!("from {:.0}%", 100.0 * chance),
        };
        let is_told = row.plan != FORESIGHT;
        let [recall, over] = [percent(set_recall), format!("{:.2}", row.planned_over_needed)]
            .map(|cell| if is_told { cell } else { String::new() });
        vec![
            layers.as_str().to_owned(),
            batch.to_string(),
            plan,
            byte_size::shown(resident_bytes.round() as u64),
            byte_size::shown(resident_bytes_peak),
            percent(row.saved),
            percent(row.saved_peak),
            recall,
            over,
        ]
    });
    let header =
        vec!["layers", "batch", "plan", "resident", "peak", "saved", "at peak", "set recall", "planned/needed"];
    ReportTable { title: "Resident experts, by size of batch and plan", header, rows: rows.collect() }
}

/// Of single examples, as far as they need experts and as the shallowest plan would have them resident.
fn lengths(evaluation: &Evaluation) -> ReportTable {
    let all = || exact(evaluation).into_iter().flat_map(|figures| &figures.lengths);
    let rows = all().filter(|of| of.row.plan == FORESIGHT).map(|needed| {
        let is_planned = |of: &&LengthRow| {
            (of.row.layers, of.tokens_max, of.row.plan) == (needed.row.layers, needed.tokens_max, Planned::Depth(1))
        };
        let planned = all().find(is_planned).map(|of| of.row);
        vec![
            needed.row.layers.as_str().to_owned(),
            needed.tokens_max.to_string(),
            needed.row.batches.to_string(),
            byte_size::shown(needed.row.needed_bytes.round() as u64),
            percent(needed.row.saved),
            planned.map(|planned| percent(planned.saved)).unwrap_or_default(),
            planned.map(|planned| percent(planned.set_recall)).unwrap_or_default(),
        ]
    });
    let mut rows: Vec<_> = rows.collect();
    // By stack first, as in the other tables; those of a stack stay by length.
    rows.sort_by_key(|row| evaluation.experts_bytes.iter().position(|(name, _)| name.as_str() == row[0]));
    let header = vec!["layers", "tokens up to", "examples", "needed", "saved", "saved by top 1", "set recall of top 1"];
    ReportTable { title: "Resident experts of single examples, by length of the prompt", header, rows }
}

fn budgets(evaluation: &Evaluation) -> ReportTable {
    let rows = evaluation.budgets.iter().flat_map(|budget| {
        budget.modes.iter().map(move |of| {
            let BudgetMode { mode, examples_per_s, latency_ms, waited_ms, demand_loads, changed, .. } = of;
            vec![
                budget.budget.clone(),
                (*mode).to_owned(),
                format!("{examples_per_s:.1}"),
                format!("{latency_ms:.2}"),
                format!("{waited_ms:.3}"),
                format!("{demand_loads:.2}"),
                byte_size::shown(of.resident_bytes),
                changed.to_string(),
            ]
        })
    });
    let header = vec!["budget", "mode", "examples/s", "ms", "waited ms", "demand loads", "resident", "changed"];
    ReportTable { title: "Throughput and waiting, by memory for experts", header, rows: rows.collect() }
}

/// Figures of the answers in which the router chooses.
fn exact(evaluation: &Evaluation) -> Option<&Figures> {
    evaluation.modes.first()?.figures.as_ref()
}

fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::commands::eval::evaluation::tests::evaluation;

    #[test]
    fn every_figure_is_in_a_table() {
        // Would break: a figure is printed under another's name, or a mode that is not served is left out without a word.
        let parameters = json!({"model": "m", "predictor": "lstm, top 2", "prompt_tokens_max": 80, "cut_prompts": 1});
        let text = as_text(&evaluation(), &parameters);
        let expected = "\
2 examples, 1 of them cut to 80 tokens; model m, predictor lstm, top 2; experts: encoder 40 B, decoder 40 B, all 80 B

Answers

mode    accuracy  unchanged  perplexity
exact   50.0%     100.0%
guided                                   not served: not served by this version
hash    0.0%      50.0%

How often the hash table named what the router chose

layers           choices  top 1  top 3
encoder block 1  8        25.0%  50.0%
encoder          8        25.0%  50.0%
decoder block 1  8        25.0%  50.0%
decoder          8        25.0%  50.0%
all              16       25.0%  50.0%
";
        assert!(text.starts_with(expected), "{text}");
        let found: Vec<_> = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        for told in [
            "encoder 1 what is needed 20 B 20 B 50.0% 50.0%",
            "encoder 1 top 2 30 B 30 B 25.0% 25.0% 50.0% 1.00",
            "all 2 top 1 40 B 40 B 50.0% 50.0% 50.0% 0.50",
            "decoder 1 2 20 B 50.0% 50.0% 50.0%",
            "100% exact 4.0 10.00 0.000 1.50 40 B 0",
            "50% hash 4.0 10.00 2.000 0.00 40 B 1",
        ] {
            assert!(found.iter().any(|line| line == told), "{told}: {text}");
        }
    }
}
