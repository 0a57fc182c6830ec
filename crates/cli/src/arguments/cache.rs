//! How much memory the keys and values of running sequences may take.

use anyhow::Context;
use clap::Args;
use sida_coordinator::CoordinatorConfig;
use sida_expert_node::ExpertMemory;
use sida_model::DeviceName;

use crate::machine_memory;

/// The memory of a coordinator's sequences.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct CacheArguments {
    /// Memory for keys and values of all sequences that run at the same time, of the GPU where one computes: 2GiB, 300MB,
    /// or a share of all its memory as 25%. Requests that find none wait
    #[arg(long, value_name = "SIZE", default_value = "2GiB")]
    cache_memory: ExpertMemory,
    /// Computes every prompt from its first token. Otherwise, of a model without an encoder, what is left of that memory
    /// keeps the keys and values of ended sequences, for prompts of the same client that begin as they did
    #[arg(long)]
    no_prefix_cache: bool,
}

impl CacheArguments {
    /// Puts it into the settings of a coordinator whose device is chosen.
    pub(crate) fn apply(self, config: &mut CoordinatorConfig) -> anyhow::Result<()> {
        config.prefix_cache = !self.no_prefix_cache;
        config.limits.cache_bytes_max = match self.cache_memory {
            ExpertMemory::Bytes(bytes) => bytes,
            share @ ExpertMemory::Share(_) => share.bytes(device_bytes(config.device)?),
        };
        Ok(())
    }
}

/// All memory of what computes.
fn device_bytes(device: DeviceName) -> anyhow::Result<u64> {
    match device {
        DeviceName::Cpu => machine_memory::limit().context("a share of memory needs /proc/meminfo; give bytes"),
        #[cfg(feature = "cuda")]
        DeviceName::Cuda(ordinal) => {
            let gpu = sida_model::cuda::Gpu::open(ordinal).map_err(|error| super::device::refused(error.into()))?;
            Ok(gpu.description().bytes)
        }
        #[cfg(not(feature = "cuda"))]
        DeviceName::Cuda(_) => Err(super::device::refused(sida_model::DeviceError::not_built(device))),
    }
}
