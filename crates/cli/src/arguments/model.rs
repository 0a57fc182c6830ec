//! Which model, and how much of the machine it may use.

use std::{num::NonZeroUsize, path::PathBuf, sync::Arc, thread};

use anyhow::Context;
use clap::Args;
use rayon::ThreadPoolBuilder;
use sida_model::Checkpoint;
use sida_rpc::stand_back::{self, stand_back};

use crate::{bad_configuration::BadConfiguration, model_dir};

/// The longest name of a model: it is a label of metrics.
const NAME_BYTES_MAX: usize = 128;

/// More threads than this is a mistake: each takes memory, and none a core of its own.
const THREADS_MAX: usize = 1024;

/// The model and its threads.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModelArguments {
    /// The model's directory [default: the switch-tiny-64 that comes with the source]
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// What the model is called in answers, metrics and logs [default: its directory's name; org/name in a hub's cache]
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub(crate) model_name: Option<String>,
    /// Threads that compute; 0: one per core
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) threads: usize,
}

impl ModelArguments {
    /// Opens the model, under the name that was chosen.
    pub(crate) fn open(&self) -> anyhow::Result<Arc<Checkpoint>> {
        Ok(Checkpoint::open_as(&self.dir()?, self.model_name.as_deref())?)
    }

    /// The directory of the model.
    pub(crate) fn dir(&self) -> Result<PathBuf, BadConfiguration> {
        model_dir::find(self.model.as_deref())
    }

    /// Starts the pool that every computation of this process shares. Called once, before anything computes.
    pub(crate) fn start_threads(&self) -> anyhow::Result<()> {
        if self.threads > THREADS_MAX {
            let found = self.threads;
            return Err(BadConfiguration::new(format!("--threads is {found}, expected 0 to {THREADS_MAX}")).into());
        }
        let pool = ThreadPoolBuilder::new().num_threads(self.threads()).thread_name(|index| format!("compute-{index}"));
        let pool = pool.start_handler(|_| stand_back(stand_back::COMPUTES));
        pool.build_global().context("cannot start the compute threads")
    }

    /// How many threads compute.
    pub(crate) fn threads(&self) -> usize {
        match self.threads {
            0 => thread::available_parallelism().map_or(1, NonZeroUsize::get),
            threads => threads,
        }
    }
}

fn name(text: &str) -> Result<String, String> {
    let is_fine = !text.trim().is_empty() && text.len() <= NAME_BYTES_MAX && !text.chars().any(char::is_control);
    let expected = format!("expected 1 to {NAME_BYTES_MAX} bytes without control characters");
    if is_fine { Ok(text.to_owned()) } else { Err(expected) }
}
