//! What the page shows: memory saved against set recall and by length of prompts, set recall against what is planned,
//! throughput against budget.
//! Drawn by `crate::chart`.

use crate::{
    chart::{Axis, Chart, Color, Mark, Scale, Series},
    commands::eval::{
        evaluation::Evaluation,
        memory::{FORESIGHT, MemoryRow, Planned},
    },
};

/// Of the lines of a chart, in turn.
const COLORS: [Color; 4] = [Color::Blue, Color::Orange, Color::Green, Color::Red];

/// All charts that have points.
pub(crate) fn of(evaluation: &Evaluation) -> Vec<Chart> {
    let memory = evaluation.modes.first().and_then(|mode| mode.figures.as_ref()).map(|figures| &figures.memory[..]);
    let memory = memory.unwrap_or_default();
    let by_layers = evaluation.experts_bytes.iter().flat_map(|&(layers, _)| {
        let rows: Vec<_> = memory.iter().filter(|row| row.layers == layers).copied().collect();
        let name = layers.as_str();
        let saved = Axis { name: "% of bytes saved", scale: Scale::Linear };
        let recall = Axis { name: "% set recall", scale: Scale::Linear };
        let planned = Axis { name: "bytes planned / bytes needed", scale: Scale::Linear };
        [
            Chart {
                title: format!("Memory saved against set recall, {name}"),
                x: recall,
                y: saved,
                series: by_batch(&rows, |row| (100.0 * row.set_recall, 100.0 * row.saved)),
            },
            Chart {
                title: format!("Set recall against what is planned, {name}"),
                x: planned,
                y: recall,
                series: by_batch(&rows, |row| (row.planned_over_needed, 100.0 * row.set_recall)),
            },
        ]
    });
    let charts: Vec<_> = by_layers.chain([by_length(evaluation), throughput(evaluation)]).collect();
    charts.into_iter().filter(|chart| chart.series.iter().any(|series| !series.points.is_empty())).collect()
}

/// For each size of batch a line of plans by chance, and dots for plans of so many experts of each token.
fn by_batch(rows: &[MemoryRow], point: impl Fn(&MemoryRow) -> (f64, f64)) -> Vec<Series> {
    let mut batches: Vec<usize> = rows.iter().map(|row| row.batch).collect();
    batches.dedup();
    let mut all = Vec::new();
    for (batch, &color) in batches.into_iter().zip(COLORS.iter().cycle()) {
        let of_batch = || rows.iter().filter(|row| row.batch == batch && row.plan != FORESIGHT);
        let (by_chance, by_depth): (Vec<&MemoryRow>, Vec<_>) =
            of_batch().partition(|row| matches!(row.plan, Planned::Chance(_)));
        let name = if batch == 1 { "one example".to_owned() } else { format!("batches of {batch}") };
        let points = |rows: Vec<&MemoryRow>| rows.into_iter().map(&point).collect();
        all.push(line(name.clone(), color, points(by_chance)));
        let name = format!("{name}, so many of each token");
        all.push(Series { name, mark: Mark::Dots, color, points: points(by_depth) });
    }
    all
}

/// What single examples would save if all that they need were foreseen, a line for each stack.
fn by_length(evaluation: &Evaluation) -> Chart {
    let figures = evaluation.modes.first().and_then(|mode| mode.figures.as_ref());
    let rows = figures.map(|figures| &figures.lengths[..]).unwrap_or_default();
    let series = evaluation.experts_bytes.iter().zip(COLORS.iter().cycle()).map(|(&(layers, _), &color)| {
        let foreseen = rows.iter().filter(|of| of.row.layers == layers && of.row.plan == FORESIGHT);
        line(layers.as_str().to_owned(), color, foreseen.map(|of| (of.tokens_mean, 100.0 * of.row.saved)).collect())
    });
    Chart {
        title: "Memory saved by length of prompts, one example at a time".to_owned(),
        x: Axis { name: "tokens", scale: Scale::Linear },
        y: Axis { name: "% of bytes saved", scale: Scale::Linear },
        series: series.collect(),
    }
}

fn throughput(evaluation: &Evaluation) -> Chart {
    let mut modes: Vec<&str> = evaluation.modes.iter().map(|mode| mode.mode).collect();
    modes.dedup();
    let series = modes.iter().zip(COLORS.iter().cycle()).map(|(&name, &color)| {
        let of_mode = evaluation.budgets.iter().flat_map(|budget| {
            let of_mode = budget.modes.iter().filter(|of| of.mode == name);
            of_mode.map(|of| (100.0 * budget.share, of.examples_per_s))
        });
        let mut points: Vec<_> = of_mode.collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        line(name.to_owned(), color, points)
    });
    Chart {
        title: "Throughput against memory for experts".to_owned(),
        x: Axis { name: "% of all experts' bytes", scale: Scale::Linear },
        y: Axis { name: "examples/s", scale: Scale::Linear },
        series: series.collect(),
    }
}

/// A line through points, of which there may be a single one.
fn line(name: String, color: Color, points: Vec<(f64, f64)>) -> Series {
    Series { name, mark: Mark::Joined, color, points }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::eval::evaluation::tests::evaluation;

    #[test]
    fn charts_show_the_tables() {
        // Would break: a page shows other figures than the tables, or a line joins points of different batches.
        let charts = of(&evaluation());
        let titles: Vec<_> = charts.iter().map(|chart| chart.title.as_str()).collect();
        assert_eq!(titles.len(), 8);
        assert_eq!(
            titles[..2],
            ["Memory saved against set recall, encoder", "Set recall against what is planned, encoder"]
        );
        let points = |chart: usize, name: &str| {
            let series = charts[chart].series.iter().find(|series| series.name == name);
            series.unwrap().points.clone()
        };
        assert_eq!(points(0, "one example, so many of each token"), [(50.0, 50.0), (50.0, 25.0)]);
        assert_eq!(points(1, "batches of 2, so many of each token"), [(0.5, 50.0), (1.0, 50.0)]);
        assert_eq!(points(6, "decoder"), [(1.0, 50.0)]);
        assert_eq!(points(7, "exact"), [(50.0, 4.0), (100.0, 4.0)]);
        assert_eq!(charts[7].series.iter().filter(|series| !series.points.is_empty()).count(), 2);
        assert!(charts.iter().all(|chart| chart.svg().is_ok()));
    }
}
