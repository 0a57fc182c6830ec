//! The figures of a run on a GPU, as tables and as JSON.

use serde_json::{Value, json};
use sida_model::cuda::{Ceilings, CudaError, DeviceModel, GpuDescription, KernelTiming};

use super::{
    inputs::Inputs,
    settings::{GpuSettings, Method},
    turn::{Subject, Taken},
};
use crate::plain_table::PlainTable;

/// One subject's turn at one kind of batch.
#[derive(Clone, Debug)]
pub(super) struct Figure {
    subject: String,
    case: String,
    median_ms: f64,
    floor_ms: f64,
    batches: usize,
    demand_loads: f64,
    prefetch_loads: f64,
    load_ms: f64,
}

impl Figure {
    pub(super) fn new(subject: &Subject, input: &Inputs, taken: &Taken, floor: f64) -> Self {
        let case = input.case;
        let method = match case.method {
            Method::Encode => "encode".to_owned(),
            Method::Generate(tokens) => format!("generate {tokens}"),
        };
        let batches = taken.seconds.len();
        let each = |sum: f64| sum / batches as f64;
        Self {
            subject: subject.label(),
            case: format!("{method}, {} x {}", case.sequences, case.tokens),
            median_ms: median(&taken.seconds) * 1e3,
            floor_ms: floor * 1e3,
            batches,
            demand_loads: each(taken.demand_loads as f64),
            prefetch_loads: each(taken.prefetch_loads as f64),
            load_ms: each(taken.load.as_secs_f64() * 1e3),
        }
    }

    /// Of one turn.
    pub(super) fn line(&self) -> String {
        let Self { case, subject, median_ms, floor_ms, demand_loads, prefetch_loads, .. } = self;
        format!(
            "{case}, {subject}: {median_ms:.3} ms, floor {floor_ms:.3}, loads {demand_loads:.1} + {prefetch_loads:.1}"
        )
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// All of a run.
pub(crate) struct Report {
    head: Value,
    ceilings: Ceilings,
    pub(super) kernels: Vec<KernelTiming>,
    figures: Vec<Figure>,
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
            "hint_rate": settings.hint_rate,
            "rounds": settings.rounds,
            "graphs": settings.graphs,
            "copy_bytes_per_s": ceilings.copy_bytes_per_s,
            "upload_bytes_per_s": ceilings.upload_bytes_per_s,
            "expert_bytes": model.expert_bytes().0,
            "experts_bytes": model.expert_bytes().1,
            "backbone_bytes": backbone,
            "activation_bytes": scratch,
        });
        Self { head, ceilings, kernels: Vec::new(), figures: Vec::new(), device_bytes: 0 }
    }

    /// Notes how fast experts are uploaded, in bytes a second.
    pub(super) fn note_uploads(&mut self, rate: f64) {
        self.head["expert_upload_bytes_per_s"] = json!(rate);
        self.head["expert_uploads_of_pinned_rate"] = json!(rate / self.ceilings.upload_bytes_per_s);
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
        let figure = |f: &Figure| {
            json!({
                "subject": f.subject, "case": f.case, "median_ms": f.median_ms, "floor_ms": f.floor_ms,
                "batches": f.batches, "demand_loads": f.demand_loads, "prefetch_loads": f.prefetch_loads,
                "load_ms": f.load_ms,
            })
        };
        let kernels: Vec<Value> = self.kernels.iter().map(kernel).collect();
        let figures: Vec<Value> = self.figures.iter().map(figure).collect();
        json!({"run": self.head, "kernels": kernels, "figures": figures})
    }

    /// Medians over the rounds, with their range, each subject against all resident.
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
        let header = ["CASE", "SUBJECT", "ms", "RANGE", "x FLOOR", "OF ALL RESIDENT", "DEMAND", "PREFETCH", "WAIT ms"];
        let mut table = PlainTable::new(header);
        let mut told: Vec<(&str, &str)> = Vec::new();
        for figure in &self.figures {
            let name = (figure.case.as_str(), figure.subject.as_str());
            if told.contains(&name) {
                continue;
            }
            told.push(name);
            let rounds = self.rounds(name);
            let ms = median(&rounds);
            let base = median(&self.rounds((name.0, "all resident")));
            let least = rounds.iter().copied().fold(f64::INFINITY, f64::min);
            let most = rounds.iter().copied().fold(0.0, f64::max);
            table.row([
                figure.case.clone(),
                figure.subject.clone(),
                format!("{ms:.3}"),
                format!("{least:.3} to {most:.3}"),
                format!("{:.2}", ms / figure.floor_ms),
                format!("{:.0}%", 100.0 * base / ms),
                format!("{:.1}", figure.demand_loads),
                format!("{:.1}", figure.prefetch_loads),
                format!("{:.3}", figure.load_ms),
            ]);
        }
        table.draw()
    }

    fn rounds(&self, (case, subject): (&str, &str)) -> Vec<f64> {
        let own = self.figures.iter().filter(|f| f.case == case && f.subject == subject);
        own.map(|f| f.median_ms).collect()
    }
}
