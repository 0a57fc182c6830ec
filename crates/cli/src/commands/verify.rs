//! `sida verify`: whether a model is what it was when its manifest was written.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::Args;
use sida_model::manifest::{self, Manifest};
use sida_telemetry::counted;

use crate::{
    loading_bar::{LoadingBar, Unit},
    model_dir,
};

/// Check every file and tensor of a model against its SHA-256 manifest
#[derive(Args)]
pub(crate) struct VerifyArguments {
    /// The model's directory [default: the switch-tiny-64 that comes with the source]
    #[arg(value_name = "MODEL", env = "SIDA_MODEL")]
    model: Option<PathBuf>,
    /// Write the manifest of what is there now instead of checking
    #[arg(long)]
    write_manifest: bool,
}

/// Checks or writes; a model without a manifest is a failure that says how to get one.
pub(crate) fn run(arguments: VerifyArguments) -> anyhow::Result<ExitCode> {
    let dir = model_dir::find(arguments.model.as_deref())?;
    let shown = dir.display();
    let bar = LoadingBar::new("hashing", Unit::Bytes);
    let mut on_progress = |done, total| bar.advance(done, total);
    if arguments.write_manifest {
        let manifest = Manifest::of_directory(&dir, &mut on_progress)?;
        manifest.write()?;
        drop(bar);
        let (files, tensors) = (counted(manifest.files(), "file"), counted(manifest.tensors(), "tensor"));
        writeln!(io::stdout(), "wrote {shown}/{}: {files}, {tensors}", manifest::FILE_NAME)?;
        return Ok(ExitCode::SUCCESS);
    }
    let Some(manifest) = Manifest::read(&dir)? else {
        writeln!(io::stdout(), "{shown} has no {}: nothing to check against", manifest::FILE_NAME)?;
        writeln!(io::stdout(), "`sida verify {shown} --write-manifest` writes one of what is there now")?;
        return Ok(ExitCode::FAILURE);
    };
    manifest.verify_directory(&mut on_progress)?;
    drop(bar);
    writeln!(io::stdout(), "{shown}: {} files and {} tensors are as listed", manifest.files(), manifest.tensors())?;
    Ok(ExitCode::SUCCESS)
}
