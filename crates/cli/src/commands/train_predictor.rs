//! `sida train-predictor`: records what the model's routers do with the user's text, trains a hash predictor on
//! it and tells how well it does on text it has not seen.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use clap::{Args, ValueEnum};
use serde_json::json;
use sida_model::{Checkpoint, ModelConfig, Stack};
use sida_predictor::{
    HitRate, Net,
    train::{self, RecordOptions, Recording, Text, Texts, TrainOptions},
};
use sida_telemetry::counted;

use crate::{
    arguments::{model::ModelArguments, predictor::default_file},
    bad_configuration::{BadConfiguration, unwritable},
    loading_bar::{LoadingBar, Unit},
    plain_table::PlainTable,
    text_file,
};

/// Train a hash predictor for a model on your text, and report its hit rates on held-out text
#[derive(Args)]
pub(crate) struct TrainPredictorArguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Texts, one per line; `input<TAB>target` where the answer is known
    #[arg(long, value_name = "FILE", required_unless_present = "calibrate")]
    file: Option<PathBuf>,
    /// Texts to measure with [default: every tenth of --file]
    #[arg(long, value_name = "FILE")]
    held_out: Option<PathBuf>,
    /// Train nothing: calibrate this predictor with the held-out texts, and measure it
    #[arg(long, value_name = "FILE", conflicts_with_all = ["net", "predicted", "epochs", "width", "token_width", "seed"])]
    calibrate: Option<PathBuf>,
    /// Which net
    #[arg(long, value_enum, default_value_t = NetKind::Transformer)]
    net: NetKind,
    /// Where the predictor goes [default: the file of --calibrate, or predictor.safetensors beside the model]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Experts predicted per token and layer [default: 3, or as many as the model's routers choose]
    #[arg(long, value_name = "K")]
    predicted: Option<usize>,
    /// Passes over the texts
    #[arg(long, value_name = "N", default_value_t = TrainOptions::default().epochs)]
    epochs: usize,
    /// Width of the net
    #[arg(long, value_name = "N", default_value_t = TrainOptions::default().width)]
    width: usize,
    /// Width of what the net knows of each token by itself: most of the predictor's file
    #[arg(long, value_name = "N", default_value_t = TrainOptions::default().token_width)]
    token_width: usize,
    /// The same seed trains the same predictor
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The nets that can be trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum NetKind {
    /// A transformer for the encoder; a recurrent net that reads the encoder's output for the decoder
    Transformer,
    /// As the paper's for the encoder, too: a recurrent net over the text
    Lstm,
    /// The most frequent experts of each token
    Table,
}

/// Every n-th text is held out where none are given apart.
const HELD_OUT_EVERY: usize = 10;
/// With fewer texts a person is warned: to learn from, and to measure with.
const LEARNT_MIN: usize = 200;
const HELD_OUT_MIN: usize = 20;

/// Records, trains, measures and prints.
pub(crate) fn run(arguments: TrainPredictorArguments) -> anyhow::Result<ExitCode> {
    arguments.model.start_threads()?;
    let start = Instant::now();
    let checkpoint = arguments.model.open()?;
    let texts = texts(&arguments)?;
    let options = TrainOptions {
        net: match arguments.net {
            NetKind::Transformer => Net::Transformer,
            NetKind::Lstm => Net::Lstm,
            NetKind::Table => Net::Table,
        },
        top_k: arguments.predicted.unwrap_or(TrainOptions::default().top_k.max(checkpoint.config().top_k)),
        epochs: arguments.epochs,
        width: arguments.width,
        token_width: arguments.token_width,
        seed: arguments.seed,
        ..TrainOptions::default()
    };
    let out = arguments.out.as_ref().or(arguments.calibrate.as_ref()).cloned();
    let out = out.unwrap_or_else(|| default_file(&checkpoint));
    // Before the model runs over the texts, which may take hours.
    options.check(checkpoint.config().num_experts)?;
    check_out(&out)?;
    for read in arguments.file.iter().chain(&arguments.held_out) {
        check_other(&out, read)?;
    }
    if let Some(warning) = too_few(arguments.calibrate.is_none().then_some(texts.train.len()), texts.held_out.len()) {
        tracing::warn!("{warning}");
    }
    let measured_with = record(&checkpoint, &texts.held_out, "recording held-out text")?;
    let hit_rates = match &arguments.calibrate {
        Some(file) => train::calibrate(file, &measured_with, &out)?,
        None => {
            let learnt_from = record(&checkpoint, &texts.train, "recording")?;
            train(&learnt_from, &measured_with, &options, &out)?
        }
    };
    if arguments.json {
        writeln!(io::stdout(), "{}", as_json(&hit_rates, &out))?;
        return Ok(ExitCode::SUCCESS);
    }
    writeln!(io::stdout(), "{}", as_table(&hit_rates, checkpoint.config()).draw())?;
    let done = what_was_done(arguments.calibrate.as_deref(), &texts);
    writeln!(io::stdout(), "{}: {done}, in {:.0} s", out.display(), start.elapsed().as_secs_f64())?;
    Ok(ExitCode::SUCCESS)
}

fn train(
    learnt_from: &Recording,
    measured_with: &Recording,
    options: &TrainOptions,
    out: &Path,
) -> anyhow::Result<Vec<HitRate>> {
    let bar = LoadingBar::new("training", Unit::Steps);
    let hit_rates = train::train(learnt_from, measured_with, options, out, &mut |progress| {
        let stack = match progress.stack {
            Stack::Encoder => "encoder",
            Stack::Decoder => "decoder",
        };
        bar.advance(progress.tokens_done, progress.tokens_total);
        bar.describe(format!("training {stack}, loss {:.3}", progress.loss));
    })?;
    Ok(hit_rates)
}

/// What a person is told at the end.
fn what_was_done(calibrated: Option<&Path>, texts: &Texts) -> String {
    let held_out = texts.held_out.len();
    match calibrated {
        Some(file) => {
            let texts = counted(held_out, "text");
            format!("{} calibrated and measured with {texts}, nothing was learnt", file.display())
        }
        None => {
            format!("learnt from {}, measured with {}", counted(texts.train.len(), "text"), counted(held_out, "other"))
        }
    }
}

/// Why a predictor of so few texts is of little use, or its hit rates are; `None` where there are enough. `learnt` is of one that
/// is trained.
fn too_few(learnt: Option<usize>, held_out: usize) -> Option<String> {
    let few = |found: usize, min: usize, what: &str, why: &str| {
        (found < min).then(|| format!("{} to {what}, expected {min} or more: {why}", counted(found, "text")))
    };
    let learnt = learnt
        .and_then(|learnt| few(learnt, LEARNT_MIN, "learn from", "the predictor will know little but these texts"));
    let measured = few(held_out, HELD_OUT_MIN, "measure with", "the hit rates say little of other texts");
    let told: Vec<_> = learnt.into_iter().chain(measured).collect();
    (!told.is_empty()).then(|| told.join("; "))
}

/// Refuses a place where no file can be written.
fn check_out(out: &Path) -> anyhow::Result<()> {
    if out.is_dir() {
        return Err(BadConfiguration::new(format!("--out {} is a directory, expected a file", out.display())).into());
    }
    let directory = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    tempfile::tempfile_in(directory).map(drop).map_err(|error| unwritable("--out", out, error))
}

/// Refuses to write over what is read. Of a file that is not there yet, nothing can be.
fn check_other(out: &Path, read: &Path) -> Result<(), BadConfiguration> {
    match (out.canonicalize(), read.canonicalize()) {
        (Ok(written), Ok(same)) if written == same => {
            let (out, read) = (out.display(), read.display());
            Err(BadConfiguration::new(format!("--out {out} would replace the texts of {read}, expected another file")))
        }
        _ => Ok(()),
    }
}

fn texts(arguments: &TrainPredictorArguments) -> Result<Texts, BadConfiguration> {
    let read = |file: &Option<PathBuf>| file.as_deref().map(text_file::read).transpose();
    let texts = match (read(&arguments.file)?, read(&arguments.held_out)?) {
        (lines, Some(held_out)) => Texts::of(&lines.unwrap_or_default(), &held_out),
        (Some(lines), None) => Texts::split(&lines, HELD_OUT_EVERY),
        (None, None) => {
            let message =
                "--calibrate wants texts to measure with: --held-out FILE, or --file FILE for every tenth of it";
            return Err(BadConfiguration::new(message.to_owned()));
        }
    };
    let learns = arguments.calibrate.is_none();
    if learns && texts.train.is_empty() || texts.held_out.is_empty() {
        let (train, held_out) = (texts.train.len(), texts.held_out.len());
        let train = counted(train, "text");
        let message = format!("{train} to learn from and {held_out} to measure with: both are needed");
        return Err(BadConfiguration::new(message));
    }
    Ok(texts)
}

fn record(checkpoint: &Checkpoint, texts: &[Text], label: &str) -> anyhow::Result<Recording> {
    let bar = LoadingBar::new(label, Unit::Steps);
    let options = RecordOptions::default();
    // All that a router chooses, so that it is known how often it chooses what is predicted.
    let options = RecordOptions { kept: options.kept.max(checkpoint.config().top_k), ..options };
    let recorded = Recording::of(checkpoint.dir(), texts, &options, &mut |done, total| {
        bar.advance(done, total);
    })?;
    Ok(recorded)
}

fn as_table(hit_rates: &[HitRate], config: &ModelConfig) -> PlainTable {
    let mut table = PlainTable::new(["layer", "held-out tokens", "top 1", "top 3", "chances wrong by"]);
    for rate in hit_rates {
        let (stack, block) = config.moe_block(rate.layer);
        let stack = match stack {
            Stack::Encoder => "encoder",
            Stack::Decoder => "decoder",
        };
        table.row([
            format!("{stack} block {block}"),
            rate.tokens.to_string(),
            format!("{:.1}%", 100.0 * rate.top1),
            format!("{:.1}%", 100.0 * rate.top3),
            rate.chance_error.map(|error| format!("{:.1}%", 100.0 * error)).unwrap_or_default(),
        ]);
    }
    table
}

fn as_json(hit_rates: &[HitRate], out: &Path) -> serde_json::Value {
    json!({"predictor": out.display().to_string(), "hit_rates": hit_rates})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_texts_are_told() {
        // Would break: somebody trains on two lines, believes hit rates of one, and serves by it; or is warned of a calibration,
        // which learns from nothing, that it learns from little.
        assert_eq!(too_few(Some(LEARNT_MIN), HELD_OUT_MIN), None);
        assert_eq!(too_few(None, HELD_OUT_MIN), None);
        let both = too_few(Some(1), 1).expect("a warning");
        assert!(both.contains("1 text to learn from") && both.contains("1 text to measure with"), "{both}");
        let measured = too_few(None, 3).expect("a warning");
        assert!(measured.starts_with("3 texts to measure with, expected 20 or more"), "{measured}");
    }

    #[test]
    fn what_was_done_is_told() {
        // Would break: who calibrates a predictor reads that it has learnt from no text.
        let texts = Texts::of("a\nb\n", "c\n");
        assert_eq!(what_was_done(None, &texts), "learnt from 2 texts, measured with 1 other");
        let calibrated = what_was_done(Some(Path::new("p.safetensors")), &texts);
        assert_eq!(calibrated, "p.safetensors calibrated and measured with 1 text, nothing was learnt");
    }

    #[test]
    fn texts_are_not_written_over() {
        // Would break: whoever mistypes --out loses the texts.
        let dir = tempfile::tempdir().expect("a directory");
        let texts = dir.path().join("texts.txt");
        std::fs::write(&texts, "a").expect("a file");
        assert!(check_other(&dir.path().join("./texts.txt"), &texts).is_err());
        assert!(check_other(&dir.path().join("predictor.safetensors"), &texts).is_ok());
    }
}
