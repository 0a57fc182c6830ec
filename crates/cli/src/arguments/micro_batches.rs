//! Whether a coordinator cuts its batches.

use clap::{Args, ValueEnum};
use sida_coordinator::MicroBatching;

/// How batches go through the model.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct MicroBatchArguments {
    /// Batches go as micro-batches: side by side on threads, or in turns where their rows leave the process
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = When::Auto)]
    micro_batches: When,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum When {
    /// Where that was measured to be faster, by the size of the batch
    Auto,
    Always,
    Never,
}

impl MicroBatchArguments {
    /// As a coordinator's settings say it.
    pub(crate) fn wanted(self) -> MicroBatching {
        match self.micro_batches {
            When::Auto => MicroBatching::AsMeasured,
            When::Always => MicroBatching::Always,
            When::Never => MicroBatching::Never,
        }
    }
}
