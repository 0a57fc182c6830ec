//! `sida convert`: a checkpoint of pytorch_model.bin files, of packed integers or FP8, or a GGUF file, becomes safetensors with a
//! manifest, and one of any kind a checkpoint with fewer bits.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;
use sida_model::{
    ModelError,
    convert::{self, ConvertError, Converted},
    fresh_directory,
};
use sida_telemetry::counted;

use crate::{
    arguments::block_formats::BlockFormatArguments,
    byte_size,
    loading_bar::{LoadingBar, Unit},
    shutdown,
};

/// Turn pytorch_model.bin (one file or shards), GPTQ, AWQ, FP8, compressed-tensors or a GGUF file into safetensors with a SHA-256
/// manifest, and weights into fewer bits
#[derive(Args)]
pub(crate) struct ConvertArguments {
    /// The checkpoint: a directory with config.json, pytorch_model.bin or its index and shards, tokenizer.json, and safetensors,
    /// too, if they are to have fewer bits or are GPTQ, AWQ, FP8 or compressed-tensors; or a GGUF file, the first one if it was split
    #[arg(value_name = "CHECKPOINT")]
    source: PathBuf,
    /// Where the new checkpoint goes; must not exist or be empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Leave a directory that is there already as it is, and succeed; wait for another process that is writing it
    #[arg(long)]
    if_missing: bool,
    #[command(flatten)]
    formats: BlockFormatArguments,
}

/// Converts, with a bar; prints what was written.
pub(crate) fn run(arguments: ConvertArguments) -> anyhow::Result<ExitCode> {
    shutdown::clean_up_on_signal()?;
    let written = if arguments.if_missing { if_missing(&arguments)? } else { Some(convert(&arguments)?) };
    let Some(written) = written else {
        writeln!(io::stdout(), "{} is there already", arguments.out.display())?;
        return Ok(ExitCode::SUCCESS);
    };
    writeln!(
        io::stdout(),
        "{}, {} in {}",
        counted(written.tensors, "tensor"),
        byte_size::shown(written.bytes),
        arguments.out.display()
    )?;
    for tied in &written.tied {
        writeln!(io::stdout(), "left out {tied}: the same weights as the embedding")?;
    }
    for (name, values) in &written.others {
        writeln!(io::stdout(), "left out {name}: {values}, which no weights are stored as")?;
    }
    for (prefix, tensors) in &written.dropped_prefixes {
        writeln!(io::stdout(), "took {prefix:?} off the names of {}", counted(*tensors, "tensor"))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn convert(arguments: &ConvertArguments) -> Result<Converted, ConvertError> {
    let bar = LoadingBar::new("converting", Unit::Bytes);
    convert::convert(&arguments.source, &arguments.out, arguments.formats.formats(), &mut |done, total| {
        bar.advance(done, total);
    })
}

/// What was written; `None` where it is there, by this or another process.
fn if_missing(arguments: &ConvertArguments) -> anyhow::Result<Option<Converted>> {
    while !is_there(&arguments.out) {
        match convert(arguments) {
            Ok(written) => return Ok(Some(written)),
            Err(ConvertError::Model(ModelError::BeingWritten { dir, partial })) => {
                eprintln!("sida: waiting for another process, which writes {} in {}", dir.display(), partial.display());
                fresh_directory::wait_for_other(&partial);
            }
            // Another may have been sooner, which is what it failed by, or makes no difference.
            Err(error) if !is_there(&arguments.out) => return Err(error.into()),
            Err(_) => {}
        }
    }
    Ok(None)
}

/// Whether a model is there: what is written comes to its place whole.
fn is_there(out: &Path) -> bool {
    out.join("config.json").is_file()
}
