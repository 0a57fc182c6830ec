//! `sida bench --gpu`: a model on a GPU by itself, without a cluster around it: everything resident, within budgets with
//! and without plans, each held against its floor. Weights may be random ones, made in memory.
//!
//! In reading order: [`settings`] (what is measured), [`inputs`] (on what), [`turn`] (one subject, one batch after the
//! other), [`floor`] (how fast it could be), [`figure`] (what came of a turn), [`report`](mod@report) (how it is told).

mod figure;
mod floor;
mod inputs;
mod report;
mod settings;
mod turn;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use sida_model::{
    Checkpoint,
    cuda::{Ceilings, CudaError, DeviceModel, DeviceOptions, Gpu},
    synth::{self, SynthError, SynthShape},
};
use tempfile::TempDir;
use thiserror::Error;

pub(crate) use self::settings::GpuSettings;
use self::{
    figure::Figure,
    inputs::Inputs,
    report::Report,
    turn::{Subject, Turn},
};

/// Names a model that is made for the run.
const SYNTH: &str = "synth:";
/// Where files are memory.
const MEMORY_FOLDER: &str = "/dev/shm";
/// Rows whose kernels are timed by themselves.
const KERNEL_ROWS: [usize; 9] = [1, 8, 16, 32, 64, 128, 256, 1024, 8192];

/// Why nothing could be measured.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub(crate) enum GpuBenchError {
    #[error(transparent)]
    Cuda(#[from] CudaError),
    #[error(transparent)]
    Synth(#[from] SynthError),
    #[error(transparent)]
    Model(#[from] sida_model::ModelError),
    #[error("cannot keep a model in {}: {source}", folder.display())]
    Folder { folder: PathBuf, source: std::io::Error },
}

/// Measures everything that the settings name. `note` gets a line whenever something is done.
pub(crate) fn run(settings: &GpuSettings, note: &mut dyn FnMut(&str)) -> Result<Report, GpuBenchError> {
    let gpu = Gpu::open(settings.ordinal)?;
    let description = gpu.description().clone();
    note(&format!("{}, {} multiprocessors", description.name, description.multiprocessors));
    let ceilings = gpu.ceilings()?;
    let made = Made::of(settings, note)?;
    let checkpoint = Checkpoint::open(&made.dir)?;
    let model = open(gpu, checkpoint, settings, note)?;
    let mut report = Report::new(settings, &description, ceilings, &model);
    let subjects = Subject::all(settings);
    let cases = settings.cases();
    let inputs: Vec<Inputs> = cases.iter().map(|case| Inputs::new(case, model.config().vocab_size)).collect();
    let model = measure(model, settings, &subjects, &inputs, ceilings, &mut report, note)?;
    report.finish(&model)?;
    Ok(report)
}

fn open(
    gpu: Gpu,
    checkpoint: Arc<Checkpoint>,
    settings: &GpuSettings,
    note: &mut dyn FnMut(&str),
) -> Result<DeviceModel, GpuBenchError> {
    let options = DeviceOptions {
        precision: settings.precision,
        expert_bytes: u64::MAX,
        host_bytes: settings.host_bytes,
        rows_max: settings.rows_max(),
        graphs: settings.graphs,
        packs: settings.packs,
    };
    let mut last = 0;
    let model = DeviceModel::open(gpu, checkpoint, options, &mut |done, total| {
        if done * 4 / total > last {
            last = done * 4 / total;
            note(&format!("{done} of {total} experts in page-locked memory"));
        }
    })?;
    Ok(model)
}

/// Every subject with every input, `rounds` times in turns.
fn measure(
    mut model: DeviceModel,
    settings: &GpuSettings,
    subjects: &[Subject],
    inputs: &[Inputs],
    ceilings: Ceilings,
    report: &mut Report,
    note: &mut dyn FnMut(&str),
) -> Result<DeviceModel, GpuBenchError> {
    if settings.kernels {
        report.kernels = model.kernel_timings(&KERNEL_ROWS)?;
    }
    // Where experts are read from disk, that is another figure than what uploads take.
    if settings.host_bytes == u64::MAX {
        report.note_uploads(model.upload_seconds()?);
    }
    // What each batch uses, for plans and floors: from a first pass with everything resident.
    let mut routed = Vec::with_capacity(inputs.len());
    for input in inputs {
        routed.push(turn::route(&mut model, input)?);
    }
    let all = model.expert_bytes().1;
    for round in 0..settings.rounds {
        for subject in subjects {
            let bytes = if subject.share >= 1.0 { all } else { (all as f64 * subject.share) as u64 };
            model = model.with_expert_bytes(bytes)?;
            for (input, routed) in inputs.iter().zip(&routed) {
                let turn = Turn { subject, input, routed, hint_rate: settings.hint_rate, seconds: settings.seconds };
                let taken = turn.take(&mut model)?;
                let floor = floor::of(&model, input, routed, ceilings);
                let figure = Figure::new(round, subject, input, &taken, floor);
                note(&format!("round {} of {}: {}", round + 1, settings.rounds, figure.line()));
                report.add(figure);
            }
        }
    }
    Ok(model)
}

/// A model's directory; one that was made for the run goes with it.
struct Made {
    dir: PathBuf,
    _temporary: Option<TempDir>,
}

impl Made {
    fn of(settings: &GpuSettings, note: &mut dyn FnMut(&str)) -> Result<Self, GpuBenchError> {
        let Some(shape) = settings.model.strip_prefix(SYNTH) else {
            return Ok(Self { dir: PathBuf::from(&settings.model), _temporary: None });
        };
        let shape = SynthShape::published(shape)?;
        let memory = Path::new(MEMORY_FOLDER);
        let folder = if fs::metadata(memory).is_ok() { memory.to_owned() } else { std::env::temp_dir() };
        let temporary =
            TempDir::new_in(&folder).map_err(|source| GpuBenchError::Folder { folder: folder.clone(), source })?;
        let dir = temporary.path().join("model");
        let skew = Some(settings.skew).filter(|&skew| skew > 0.0);
        synth::synth(&shape, &dir, 0, skew, &mut |_, _| ())?;
        note(&format!("random weights in {}", dir.display()));
        Ok(Self { dir, _temporary: Some(temporary) })
    }
}
