//! What one turn came to, and what several rounds of it come to beside those with everything resident. Rounds are
//! interleaved, so each is held against its own round: what slows the machine for a while slows both.

use serde_json::{Value, json};

use super::{
    inputs::Inputs,
    settings::Method,
    turn::{Subject, Taken},
};

/// With fewer loads a batch than this, what they cost is less than how much batches differ.
const LOADS_MIN: f64 = 0.5;

/// One subject's turn at one kind of batch, in one round.
#[derive(Clone, Debug)]
pub(super) struct Figure {
    pub(super) round: usize,
    pub(super) subject: String,
    pub(super) case: String,
    /// Whether everything was resident.
    pub(super) is_base: bool,
    pub(super) median_ms: f64,
    /// Rare batches that wait long are in here only.
    pub(super) mean_ms: f64,
    pub(super) floor_ms: f64,
    pub(super) batches: usize,
    /// The mean of a batch, as are those that follow.
    pub(super) demand_loads: f64,
    pub(super) prefetch_loads: f64,
    pub(super) load_ms: f64,
}

impl Figure {
    pub(super) fn new(round: usize, subject: &Subject, input: &Inputs, taken: &Taken, floor: f64) -> Self {
        let case = input.case;
        let method = match case.method {
            Method::Encode => "encode".to_owned(),
            Method::Generate(tokens) => format!("generate {tokens}"),
        };
        let batches = taken.seconds.len();
        let each = |sum: f64| sum / batches as f64;
        Self {
            round,
            subject: subject.label(),
            case: format!("{method}, {} x {}", case.sequences, case.tokens),
            is_base: subject.is_all_resident(),
            median_ms: median(&taken.seconds) * 1e3,
            mean_ms: each(taken.seconds.iter().sum::<f64>() * 1e3),
            floor_ms: floor * 1e3,
            batches,
            demand_loads: each(taken.demand_loads as f64),
            prefetch_loads: each(taken.prefetch_loads as f64),
            load_ms: each(taken.load.as_secs_f64() * 1e3),
        }
    }

    /// For who waits for the end.
    pub(super) fn line(&self) -> String {
        let Self { case, subject, median_ms, floor_ms, demand_loads, prefetch_loads, .. } = self;
        format!(
            "{case}, {subject}: {median_ms:.3} ms, floor {floor_ms:.3}, loads {demand_loads:.1} + {prefetch_loads:.1}"
        )
    }

    /// Of the time that uploads take, the share that batches did not become longer by, 0 to 1: 1 - (T - T of all
    /// resident) / (loads * `load_ms` of one). By means, since loads are. Nothing where there are hardly any loads.
    pub(super) fn hidden(&self, base: &Self, load_ms: f64) -> Option<f64> {
        let loads = self.demand_loads + self.prefetch_loads;
        let longer = self.mean_ms - base.mean_ms;
        (loads >= LOADS_MIN).then(|| (1.0 - longer / (loads * load_ms)).clamp(0.0, 1.0))
    }

    /// As JSON, beside everything resident in the same round.
    pub(super) fn as_json(&self, base: Option<&Self>, load_ms: f64) -> Value {
        json!({
            "round": self.round, "subject": self.subject, "case": self.case,
            "median_ms": self.median_ms, "mean_ms": self.mean_ms, "floor_ms": self.floor_ms,
            "batches": self.batches, "demand_loads": self.demand_loads, "prefetch_loads": self.prefetch_loads,
            "load_ms": self.load_ms,
            "of_all_resident": base.map(|base| base.median_ms / self.median_ms),
            "of_all_resident_by_mean": base.map(|base| base.mean_ms / self.mean_ms),
            "uploads_hidden": base.and_then(|base| self.hidden(base, load_ms)),
        })
    }
}

/// The same figure of all rounds: its median, least and most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) least: f64,
    pub(super) most: f64,
}

impl Spread {
    /// Nothing of nothing.
    pub(super) fn of(rounds: impl IntoIterator<Item = f64>) -> Option<Self> {
        let rounds: Vec<f64> = rounds.into_iter().collect();
        let least = rounds.iter().copied().fold(f64::INFINITY, f64::min);
        let most = rounds.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        (!rounds.is_empty()).then(|| Self { median: median(&rounds), least, most })
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(mean_ms: f64, loads: f64) -> Figure {
        Figure {
            round: 0,
            subject: String::new(),
            case: String::new(),
            is_base: loads == 0.0,
            median_ms: mean_ms,
            mean_ms,
            floor_ms: 0.1,
            batches: 1,
            demand_loads: loads / 2.0,
            prefetch_loads: loads / 2.0,
            load_ms: 0.0,
        }
    }

    /// Uploads that batches wait for would count as hidden, or the other way round.
    #[test]
    fn hidden_is_what_batches_do_not_wait_for() {
        let base = figure(1.0, 0.0);
        let hidden = |mean_ms, loads| figure(mean_ms, loads).hidden(&base, 0.25);
        assert_eq!(hidden(1.0, 4.0), Some(1.0));
        assert_eq!(hidden(1.5, 4.0), Some(0.5));
        assert_eq!(hidden(3.0, 4.0), Some(0.0));
        assert_eq!(hidden(0.9, 4.0), Some(1.0));
        assert_eq!(hidden(1.5, 0.4), None);
    }

    /// A round that was slow for all would count against one of them.
    #[test]
    fn a_round_is_held_against_itself() {
        let rounds = [(1.0, 2.0), (10.0, 20.0), (1.0, 4.0)];
        let ratios = Spread::of(rounds.map(|(base, own)| base / own)).unwrap();
        assert_eq!(ratios, Spread { median: 0.5, least: 0.25, most: 0.5 });
        assert_eq!(Spread::of([]), None);
    }
}
