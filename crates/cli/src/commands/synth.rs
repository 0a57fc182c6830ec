//! `sida synth`: a checkpoint of a published shape with random weights, for load and speed tests.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::Args;
use sida_model::{
    ModelError,
    synth::{self, SynthError, SynthShape},
};

use crate::{
    arguments::block_formats::BlockFormatArguments,
    bad_configuration::BadConfiguration,
    byte_size,
    loading_bar::{LoadingBar, Unit},
    shutdown,
};

/// Write a checkpoint of a published shape with seeded random weights, for load and speed tests
#[derive(Args)]
pub(crate) struct SynthArguments {
    /// The shape: switch-base-8, -16, -32, -64, -128, -256, switch-large-128, olmoe-1b-7b, qwen3-30b-a3b, mixtral-8x7b or
    /// qwen2-57b-a14b
    #[arg(long, value_name = "SHAPE")]
    like: String,
    /// Where it goes; must not exist or be empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// So many blocks of a decoder-only shape, and not all of them
    #[arg(long, value_name = "N")]
    blocks: Option<usize>,
    /// The same seed gives the same weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// How unevenly tokens choose the experts of each layer of a Switch Transformer: as 1 / rank^S (Zipf's law), up to 4; 0:
    /// evenly
    #[arg(long, value_name = "S", default_value_t = 0.0)]
    skew: f64,
    #[command(flatten)]
    formats: BlockFormatArguments,
}

/// Writes, with a bar.
pub(crate) fn run(arguments: SynthArguments) -> anyhow::Result<ExitCode> {
    let mut shape = SynthShape::published(&arguments.like).map_err(refused)?;
    if let Some(blocks) = arguments.blocks {
        shape = shape.with_blocks(blocks).map_err(refused)?;
    }
    shutdown::clean_up_on_signal()?;
    let bar = LoadingBar::new("writing", Unit::Bytes);
    let skew = Some(arguments.skew).filter(|&skew| skew != 0.0);
    let formats = arguments.formats.formats();
    let bytes = synth::synth(&shape, &arguments.out, arguments.seed, skew, formats, &mut |done, total| {
        bar.advance(done, total);
    })
    .map_err(refused)?;
    drop(bar);
    writeln!(io::stdout(), "{} of random weights in {}", byte_size::shown(bytes), arguments.out.display())?;
    Ok(ExitCode::SUCCESS)
}

/// A shape or a skew that cannot be is the caller's mistake; a disk that is full is not.
fn refused(error: SynthError) -> anyhow::Error {
    match error {
        SynthError::Shape { .. }
        | SynthError::Skew { .. }
        | SynthError::NoSkew
        | SynthError::NoBlocks
        | SynthError::Blocks { .. }
        | SynthError::Model(ModelError::Config { .. }) => {
            BadConfiguration::because("no such checkpoint can be written", error).into()
        }
        // As every other command tells it.
        SynthError::Model(error) => error.into(),
        error => error.into(),
    }
}
