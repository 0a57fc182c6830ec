//! The flags of `sida bench --gpu`, known to every build; one without GPUs says so.

use std::process::ExitCode;

use clap::Args;
use sida_model::DeviceName;

use super::BenchArguments;
use crate::bad_configuration::BadConfiguration;

/// What is measured on a GPU.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))] // Read by builds that can.
#[derive(Args, Clone, Debug)]
pub(crate) struct GpuArguments {
    /// Measure the model by itself on this GPU, as cuda:0, without a cluster: everything resident, and --budgets with
    /// and without plans
    #[arg(long, value_name = "DEVICE", conflicts_with_all = ["endpoint", "processes"])]
    pub(super) gpu: Option<DeviceName>,
    /// With --gpu: random weights of this published shape, made in memory, instead of --model
    #[arg(long, value_name = "SHAPE", requires = "gpu", conflicts_with = "model")]
    synth: Option<String>,
    /// With --synth: how unevenly tokens choose the experts of each layer, as 1 / rank^S (Zipf's law), up to 4; 0: evenly
    #[arg(long, value_name = "S", default_value_t = 0.0)]
    skew: f64,
    /// With --gpu: sequences of a batch
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', default_value = "1,8,32")]
    batches: Vec<usize>,
    /// With --gpu: tokens of a sequence
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', default_value = "28,256")]
    input_tokens: Vec<usize>,
    /// With --gpu: tokens generated; 0: only encode
    #[arg(long, value_name = "N", default_value_t = 32)]
    new_tokens: usize,
    /// With --gpu: how many batches ahead of the one that begins have their plans queued, as a server's queue has
    #[arg(long, value_name = "N", default_value_t = 8)]
    lookahead: usize,
    /// With --gpu: measure --budgets without residency, too: every expert is loaded when it is chosen and leaves with its
    /// batch
    #[arg(long)]
    nothing_kept: bool,
    /// With --gpu: share of right entries in the plans
    #[arg(long, value_name = "SHARE", default_value_t = 1.0)]
    hint_rate: f64,
    /// With --gpu: start every kernel by itself instead of replaying passes
    #[arg(long)]
    no_graphs: bool,
    /// With --gpu: time the kernels by themselves, too
    #[arg(long)]
    kernels: bool,
}

/// More rows in a batch than this is a mistake.
#[cfg(feature = "cuda")]
const ROWS_MAX: usize = 1 << 15;

/// Plans queued ahead at most: more than the batches that are measured in turns.
#[cfg(feature = "cuda")]
const LOOKAHEAD_MAX: usize = 32;

/// Measures and prints.
#[cfg(not(feature = "cuda"))]
pub(super) fn run(_device: DeviceName, _arguments: &BenchArguments) -> anyhow::Result<ExitCode> {
    Err(BadConfiguration::new("--gpu needs a build with the cargo feature cuda").into())
}

/// Measures and prints.
#[cfg(feature = "cuda")]
pub(super) fn run(device: DeviceName, arguments: &BenchArguments) -> anyhow::Result<ExitCode> {
    use std::io::{self, Write};

    use super::gpu::{self, GpuBenchError};
    use crate::loading_bar::{LoadingBar, Unit};

    let settings = settings(device, arguments)?;
    arguments.subject.model.start_threads()?;
    let bar = LoadingBar::new("measuring", Unit::Steps);
    let report = gpu::run(&settings, &mut |line| bar.describe(line.to_owned()));
    drop(bar);
    let report = report.map_err(|error| match error {
        GpuBenchError::Cuda(error) if error.is_missing_device() => {
            anyhow::Error::from(BadConfiguration::because("--gpu", error))
        }
        GpuBenchError::Synth(error) => BadConfiguration::because("--synth", error).into(),
        error => error.into(),
    })?;
    match arguments.json {
        true => writeln!(io::stdout(), "{}", report.as_json())?,
        false => write!(io::stdout(), "{}", report.as_table())?,
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(feature = "cuda")]
fn settings(device: DeviceName, arguments: &BenchArguments) -> anyhow::Result<super::gpu::GpuSettings> {
    use sida_expert_node::ExpertMemory;
    use sida_model::Precision;

    let (own, embedded) = (&arguments.gpu, &arguments.subject.embedded);
    let refused = |message: String| BadConfiguration::new(message);
    let DeviceName::Cuda(ordinal) = device else {
        return Err(refused(format!("--gpu is {device}, expected cuda:N")).into());
    };
    let sizes = |name: &str, sizes: &[usize]| match sizes.iter().all(|size| (1..=4096).contains(size)) {
        true if !sizes.is_empty() => Ok(()),
        _ => Err(refused(format!("{name} is {sizes:?}, expected numbers from 1 to 4096"))),
    };
    sizes("--batches", &own.batches)?;
    sizes("--input-tokens", &own.input_tokens)?;
    if !(0.0..=1.0).contains(&own.hint_rate) || own.new_tokens > 4096 {
        let message = format!("--hint-rate is {} and --new-tokens {}", own.hint_rate, own.new_tokens);
        return Err(refused(message + ", expected 0 to 1 and at most 4096").into());
    }
    if own.lookahead > LOOKAHEAD_MAX {
        return Err(refused(format!("--lookahead is {}, expected at most {LOOKAHEAD_MAX}", own.lookahead)).into());
    }
    let share = |memory: &ExpertMemory| match memory {
        ExpertMemory::Share(share) => Ok(*share),
        ExpertMemory::Bytes(_) => {
            Err(refused(format!("--budgets has {memory}, with --gpu expected shares such as 25%")))
        }
    };
    let model = match &own.synth {
        Some(shape) => format!("synth:{shape}"),
        None => arguments.subject.model.dir()?.display().to_string(),
    };
    let settings = super::gpu::GpuSettings {
        ordinal,
        model,
        skew: own.skew,
        precision: embedded.device.precision.unwrap_or(Precision::Bf16),
        budgets: arguments.subject.budgets().iter().map(share).collect::<Result<_, _>>()?,
        host_bytes: match embedded.host_memory {
            ExpertMemory::Bytes(bytes) => bytes,
            ExpertMemory::Share(1.0) => u64::MAX,
            other => return Err(refused(format!("--host-memory is {other}, expected bytes or 100%")).into()),
        },
        batches: own.batches.clone(),
        input_tokens: own.input_tokens.clone(),
        new_tokens: own.new_tokens,
        lookahead: own.lookahead,
        nothing_kept: own.nothing_kept,
        hint_rate: own.hint_rate,
        rounds: arguments.rounds.unwrap_or(3),
        seconds: arguments.duration.map_or(0.5, |duration| duration.as_secs_f64()),
        graphs: !own.no_graphs,
        packs: !embedded.no_packing,
        kernels: own.kernels,
    };
    if settings.rows_max() > ROWS_MAX {
        let found = settings.rows_max();
        return Err(refused(format!("the largest batch has {found} rows, expected at most {ROWS_MAX}")).into());
    }
    Ok(settings)
}
