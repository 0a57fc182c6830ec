//! What `ask` prints below its answer: what it took to give it, in a few lines and one picture.
//!
//! ```text
//!   41 of 384 experts woke up · 6.2 MiB of 12.8 MiB resident
//!   106 of 108 hash hits · 3 loads waited for
//!   predict 1.2 ms · load 0.4 ms · backbone 4.1 ms · experts 2.0 ms · total 8.0 ms
//! ```

use std::fmt::Write;

use sida_proto::v1::{Finish, NodeStatus, RoutingMode, Trace};

use crate::{
    byte_size,
    coordinator_client::ModelFacts,
    expert_picture::{self, LayerView, Style},
};

/// Everything the block tells about.
pub(crate) struct AnswerReport<'a> {
    pub(crate) model: &'a ModelFacts,
    pub(crate) finish: &'a Finish,
    /// The nodes just after the answer; those that told their residency are summed up.
    pub(crate) nodes: &'a [NodeStatus],
}

impl AnswerReport<'_> {
    /// The block, ending in a newline.
    pub(crate) fn draw(&self, style: Style) -> String {
        let nothing = Trace::default();
        let trace = self.finish.trace.as_ref().unwrap_or(&nothing);
        let mut block = String::new();
        for line in [self.experts_line(trace), hits_line(trace), times_line(trace)] {
            let _ = writeln!(block, "{}", style.paint("2", &line));
        }
        block.push('\n');
        block + &expert_picture::draw(&self.layers(trace), self.model.num_experts, style)
    }

    fn experts_line(&self, trace: &Trace) -> String {
        let touched: usize = trace.layers.iter().map(|layer| layer.experts.len()).sum();
        let all = self.model.moe_layers * self.model.num_experts;
        let (resident, budget) = self.resident_and_budget();
        format!(
            "{touched} of {all} experts woke up · {} of {} resident, budget {}",
            byte_size::shown(resident),
            byte_size::shown(self.model.experts_bytes),
            byte_size::shown(budget),
        )
    }

    /// Bytes over all nodes that answered.
    pub(crate) fn resident_and_budget(&self) -> (u64, u64) {
        let residencies = self.nodes.iter().filter_map(|node| node.residency.as_ref());
        residencies
            .fold((0, 0), |(resident, budget), node| (resident + node.resident_bytes, budget + node.budget_bytes))
    }

    /// One view per MoE layer of the model, also of layers that no row reached.
    fn layers(&self, trace: &Trace) -> Vec<LayerView> {
        let resident = self.nodes.iter().filter_map(|node| node.residency.as_ref()).flat_map(|node| &node.layers);
        let resident: Vec<_> = resident.collect();
        let encoder_layers = self.model.encoder_moe_layers;
        (0..self.model.moe_layers)
            .map(|index| {
                let encoder = index < encoder_layers;
                let woken = trace.layers.iter().filter(|used| used.layer as usize == index);
                let kept = resident.iter().filter(|held| held.layer as usize == index);
                LayerView {
                    encoder,
                    number: if encoder { index + 1 } else { index - encoder_layers + 1 },
                    woken: woken.flat_map(|used| used.experts.clone()).collect(),
                    resident: kept.flat_map(|held| held.experts.clone()).collect(),
                }
            })
            .collect()
    }
}

/// What is to be said of an answer in mode `guided` or `hash` that had no hash table.
pub(crate) fn routed_instead(trace: &Trace) -> Option<&'static str> {
    let needs_table = matches!(trace.mode(), RoutingMode::Guided | RoutingMode::Hash);
    (needs_table && trace.unpredicted).then_some("no hash table: the trained router chose experts, as in mode exact")
}

fn hits_line(trace: &Trace) -> String {
    let predicted = trace.hash_hits + trace.hash_misses;
    let hits = if let Some(instead) = routed_instead(trace) {
        instead.to_owned()
    } else if trace.unpredicted || predicted == 0 {
        "no hash table: experts were loaded as they were asked for".to_owned()
    } else {
        format!("hash hits {} of {predicted}, {} first choices", trace.hash_hits, trace.hash_top1_hits)
    };
    let rerouted = match trace.mode() {
        RoutingMode::Guided => format!(" · {} rerouted to planned experts", trace.rerouted),
        RoutingMode::Unspecified | RoutingMode::Exact | RoutingMode::Hash => String::new(),
    };
    let failovers = match trace.failovers {
        0 => String::new(),
        count => format!(" · {count} calls went to another node"),
    };
    format!("{hits}{rerouted} · {} loads waited for{failovers}", trace.demand_loads)
}

fn times_line(trace: &Trace) -> String {
    let Some(timings) = &trace.timings else { return "no timings".to_owned() };
    let parts = [
        ("predict", timings.predict_us),
        ("load", timings.load_us),
        ("backbone", timings.backbone_us),
        ("experts", timings.experts_us),
        ("total", timings.total_us),
    ];
    let parts: Vec<_> = parts.iter().map(|(name, us)| format!("{name} {:.1} ms", *us as f64 / 1e3)).collect();
    parts.join(" · ")
}

#[cfg(test)]
mod tests {
    use sida_proto::v1::{LayerUse, ResidencyResponse, ResidentExperts, Timings};

    use super::*;

    fn model() -> ModelFacts {
        ModelFacts { name: "m".into(), moe_layers: 2, encoder_moe_layers: 1, num_experts: 4, experts_bytes: 8 << 20 }
    }

    #[test]
    fn the_block() {
        // Broken: a person would read wrong numbers, or the decoder's experts in the encoder's line.
        let trace = Trace {
            hash_hits: 5,
            hash_misses: 1,
            hash_top1_hits: 4,
            demand_loads: 2,
            timings: Some(Timings { predict_us: 1500, total_us: 8000, ..Default::default() }),
            layers: vec![LayerUse { layer: 0, experts: vec![0, 2] }, LayerUse { layer: 1, experts: vec![3] }],
            ..Default::default()
        };
        let residency = ResidencyResponse {
            resident_bytes: 3 << 20,
            budget_bytes: 4 << 20,
            layers: vec![ResidentExperts { layer: 0, experts: vec![1] }],
            ..Default::default()
        };
        let nodes = [NodeStatus { residency: Some(residency), ..Default::default() }, NodeStatus::default()];
        let finish = Finish { trace: Some(trace), ..Default::default() };
        let block = AnswerReport { model: &model(), finish: &finish, nodes: &nodes }.draw(Style::Plain);
        let expected = "\
3 of 8 experts woke up · 3.0 MiB of 8.0 MiB resident, budget 4.0 MiB
hash hits 5 of 6, 4 first choices · 2 loads waited for
predict 1.5 ms · load 0.0 ms · backbone 0.0 ms · experts 0.0 ms · total 8.0 ms

encoder 1  █░█·   2
decoder 1  ···█   1
";
        assert_eq!(block, expected);
    }

    #[test]
    fn without_a_predictor() {
        // Broken: a request that ran without hints would show a hit rate.
        let finish = Finish { trace: Some(Trace { unpredicted: true, ..Default::default() }), ..Default::default() };
        let block = AnswerReport { model: &model(), finish: &finish, nodes: &[] }.draw(Style::Ascii);
        assert!(block.contains("no hash table: experts were loaded") && block.contains("no timings"), "{block}");
        for mode in [RoutingMode::Guided, RoutingMode::Hash] {
            let trace = Trace { mode: mode.into(), unpredicted: true, ..Default::default() };
            let finish = Finish { trace: Some(trace), ..Default::default() };
            let block = AnswerReport { model: &model(), finish: &finish, nodes: &[] }.draw(Style::Ascii);
            assert!(
                block.contains("the trained router chose experts"),
                "who asked for mode {mode:?} was answered otherwise: {block}"
            );
        }
    }

    #[test]
    fn of_a_guided_answer() {
        // Broken: a person would not see how far an answer may be from the model's own.
        let trace = Trace { mode: RoutingMode::Guided.into(), hash_hits: 5, rerouted: 2, ..Default::default() };
        let finish = Finish { trace: Some(trace), ..Default::default() };
        let block = AnswerReport { model: &model(), finish: &finish, nodes: &[] }.draw(Style::Ascii);
        assert!(block.contains(" · 2 rerouted to planned experts · 0 loads"), "{block}");
    }
}
