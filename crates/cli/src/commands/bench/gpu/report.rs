//! The figures of a run on a GPU, as tables and as JSON.

use serde_json::{Value, json};
use sida_model::cuda::{Ceilings, CudaError, DeviceModel, GpuDescription, KernelTiming};

use super::{
    figure::{Figure, Spread},
    settings::GpuSettings,
};
use crate::plain_table::PlainTable;

/// All of a run.
pub(crate) struct Report {
    head: Value,
    ceilings: Ceilings,
    pub(super) kernels: Vec<KernelTiming>,
    figures: Vec<Figure>,
    /// What an upload of one expert takes.
    load_ms: f64,
    device_bytes: u64,
}

impl Report {
    pub(super) fn new(settings: &GpuSettings, gpu: &GpuDescription, ceilings: Ceilings, model: &DeviceModel) -> Self {
        let (backbone, _, scratch) = model.bytes();
        let head = json!({
            "device": gpu.name,
            "model": settings.model,
            "skew": settings.skew,
            "precision": format!("{:?}", settings.precision),
            "lookahead": settings.lookahead,
            "hint_rate": settings.hint_rate,
            "rounds": settings.rounds,
            "graphs": settings.graphs,
            "slot_bytes": model.slot_bytes(),
            "copy_bytes_per_s": ceilings.copy_bytes_per_s,
            "upload_bytes_per_s": ceilings.upload_bytes_per_s,
            "expert_bytes": model.expert_bytes().0,
            "experts_bytes": model.expert_bytes().1,
            "backbone_bytes": backbone,
            "activation_bytes": scratch,
        });
        let mut report =
            Self { head, ceilings, kernels: Vec::new(), figures: Vec::new(), load_ms: 0.0, device_bytes: 0 };
        report.set_load_ms(model.slot_bytes() as f64 / ceilings.upload_bytes_per_s);
        report
    }

    fn set_load_ms(&mut self, seconds: f64) {
        self.load_ms = seconds * 1e3;
        self.head["expert_upload_ms"] = json!(self.load_ms);
    }

    /// Notes what an upload takes among others, in seconds.
    pub(super) fn note_uploads(&mut self, seconds: f64) {
        let rate = self.head["slot_bytes"].as_f64().unwrap_or(0.0) / seconds;
        self.head["expert_uploads_of_pinned_rate"] = json!(rate / self.ceilings.upload_bytes_per_s);
        self.set_load_ms(seconds);
    }

    pub(super) fn add(&mut self, figure: Figure) {
        self.figures.push(figure);
    }

    /// Notes what the process takes of the device with the last subject.
    pub(super) fn finish(&mut self, model: &DeviceModel) -> Result<(), CudaError> {
        let (free, _) = model.gpu().memory()?;
        let before = model.gpu().description().bytes_free;
        self.device_bytes = before.saturating_sub(free);
        let (_, experts, _) = model.bytes();
        self.head["device_bytes_with_last_budget"] = json!(self.device_bytes);
        self.head["last_budget_bytes"] = json!(experts);
        Ok(())
    }

    /// Everything, every turn by itself.
    pub(crate) fn as_json(&self) -> Value {
        let kernel = |k: &KernelTiming| json!({"what": k.what, "rows": k.rows, "seconds": k.seconds, "bytes": k.bytes, "operations": k.operations});
        let figure = |f: &Figure| f.as_json(self.base_of(f), self.load_ms);
        let kernels: Vec<Value> = self.kernels.iter().map(kernel).collect();
        let figures: Vec<Value> = self.figures.iter().map(figure).collect();
        json!({"run": self.head, "kernels": kernels, "figures": figures})
    }

    /// Medians over the rounds, with their range, each round against its own with all resident.
    pub(crate) fn as_table(&self) -> String {
        let mut text = format!("{}\n", self.head);
        if !self.kernels.is_empty() {
            let mut table = PlainTable::new(["KERNEL", "ROWS", "us", "GB/s", "OF COPY", "TFLOP/s"]);
            for k in &self.kernels {
                let rate = k.bytes / k.seconds;
                table.row([
                    k.what.clone(),
                    k.rows.to_string(),
                    format!("{:.1}", k.seconds * 1e6),
                    format!("{:.0}", rate / 1e9),
                    format!("{:.0}%", 100.0 * rate / self.ceilings.copy_bytes_per_s),
                    format!("{:.1}", k.operations / k.seconds / 1e12),
                ]);
            }
            text += &table.draw();
        }
        text + &self.figures_table()
    }

    fn figures_table(&self) -> String {
        let header = ["CASE", "SUBJECT", "ms", "RANGE", "MEAN ms", "x FLOOR", "OF ALL RESIDENT", "RANGE"];
        let header = header.into_iter().chain(["BY MEAN", "DEMAND", "PREFETCH", "WAIT ms", "UPLOADS HIDDEN"]);
        let mut table = PlainTable::new(header);
        let mut told: Vec<(&str, &str)> = Vec::new();
        for figure in &self.figures {
            let name = (figure.case.as_str(), figure.subject.as_str());
            if !told.contains(&name) {
                told.push(name);
                table.row(self.row(name));
            }
        }
        table.draw()
    }

    /// One subject at one kind of batch.
    fn row(&self, (case, subject): (&str, &str)) -> Vec<String> {
        let rounds: Vec<&Figure> = self.figures.iter().filter(|f| f.case == case && f.subject == subject).collect();
        let spread = |of: &dyn Fn(&Figure) -> Option<f64>| Spread::of(rounds.iter().filter_map(|figure| of(figure)));
        let median = |of: &dyn Fn(&Figure) -> f64, decimals: usize| {
            spread(&|figure| Some(of(figure))).map_or("-".to_owned(), |of| format!("{:.decimals$}", of.median))
        };
        let share = |of: &dyn Fn(&Figure, &Figure) -> Option<f64>| spread(&|figure| of(figure, self.base_of(figure)?));
        let percent = |share: f64| format!("{:.0}%", 100.0 * share);
        let or_none = |share: Option<Spread>| share.map_or("-".to_owned(), |share| percent(share.median));
        let times = spread(&|figure| Some(figure.median_ms));
        let ratio = share(&|own, base| Some(base.median_ms / own.median_ms));
        vec![
            case.to_owned(),
            subject.to_owned(),
            median(&|figure| figure.median_ms, 3),
            times.map_or("-".to_owned(), |times| format!("{:.3} to {:.3}", times.least, times.most)),
            median(&|figure| figure.mean_ms, 3),
            median(&|figure| figure.median_ms / figure.floor_ms, 2),
            or_none(ratio),
            ratio.map_or("-".to_owned(), |ratio| format!("{} to {}", percent(ratio.least), percent(ratio.most))),
            or_none(share(&|own, base| Some(base.mean_ms / own.mean_ms))),
            median(&|figure| figure.demand_loads, 1),
            median(&|figure| figure.prefetch_loads, 1),
            median(&|figure| figure.load_ms, 3),
            or_none(share(&|own, base| own.hidden(base, self.load_ms))),
        ]
    }

    /// Everything resident, in the same round.
    fn base_of(&self, figure: &Figure) -> Option<&Figure> {
        self.figures.iter().find(|base| base.is_base && base.case == figure.case && base.round == figure.round)
    }
}
