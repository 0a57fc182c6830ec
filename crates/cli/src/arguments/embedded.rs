//! The shape of a cluster in one process.

use clap::Args;
use sida_expert_node::ExpertMemory;
use sida_model::DeviceName;

use super::{cache::CacheArguments, device::DeviceArguments, micro_batches::MicroBatchArguments};

/// How many expert-nodes there are, and how much memory they get together.
#[derive(Args, Clone, Debug)]
pub(crate) struct EmbeddedArguments {
    /// Expert-nodes within this process [default: 2; on a GPU 1, which shares it with the coordinator]
    #[arg(long, value_name = "N")]
    pub(crate) expert_nodes: Option<usize>,
    /// Memory for experts, over all expert-nodes: 2GiB (by 1024), 300MB (by 1000), or a share of all experts as 25%
    #[arg(long, value_name = "SIZE", default_value = "100%")]
    pub(crate) expert_memory: ExpertMemory,
    /// With a GPU: page-locked memory of the host for experts; the others come from disk when they are wanted
    #[arg(long, value_name = "SIZE", default_value = "100%")]
    pub(crate) host_memory: ExpertMemory,
    /// With a GPU whose memory for experts does not hold all: keep those in bf16 as they are instead of packed into three
    /// quarters of their bytes
    #[arg(long)]
    pub(crate) no_packing: bool,
    #[command(flatten)]
    pub(crate) device: DeviceArguments,
    #[command(flatten)]
    pub(crate) cache: CacheArguments,
    #[command(flatten)]
    pub(crate) micro_batches: MicroBatchArguments,
}

impl EmbeddedArguments {
    /// How many expert-nodes there are.
    pub(crate) fn nodes(&self) -> usize {
        let default = if self.device.device == DeviceName::Cpu { 2 } else { 1 };
        self.expert_nodes.unwrap_or(default)
    }
}
