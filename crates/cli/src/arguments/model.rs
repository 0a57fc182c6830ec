//! Which model, and how much of the machine it may use.

use std::{num::NonZeroUsize, path::PathBuf, thread};

use anyhow::Context;
use clap::Args;
use rayon::ThreadPoolBuilder;

use crate::{bad_configuration::BadConfiguration, model_dir};

/// The model and its threads.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModelArguments {
    /// The model's directory [default: the switch-tiny-64 that comes with the source]
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Threads that compute; 0: one per core
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) threads: usize,
}

impl ModelArguments {
    /// The directory of the model.
    pub(crate) fn dir(&self) -> Result<PathBuf, BadConfiguration> {
        model_dir::find(self.model.as_deref())
    }

    /// Starts the pool that every computation of this process shares. Called once, before anything computes.
    pub(crate) fn start_threads(&self) -> anyhow::Result<()> {
        let pool = ThreadPoolBuilder::new().num_threads(self.threads()).thread_name(|index| format!("compute-{index}"));
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
