//! Experts as the device takes them, in page-locked memory of the host: as many as the budget for it holds, the others
//! through a few places that are filled from disk when they are wanted.

use cudarc::driver::{CudaEvent, PinnedHostSlice};
use rayon::prelude::*;
use sida_routing::{ExpertId, ExpertKey, LayerId};

use super::{
    device::Gpu,
    error::{CudaError, failed},
    kernels::Precision,
    weights::convert,
};
use crate::{ExpertStore, ModelError, StoredDType};

/// Experts of one allocation, so that filling begins before all is taken.
const CHUNK_EXPERTS: usize = 64;
/// Places for experts that come from disk.
const STAGES: usize = 4;

/// Every expert of a model, in memory or one read away.
#[derive(Debug)]
pub(super) struct HostTier {
    store: ExpertStore,
    precision: Precision,
    chunks: Vec<PinnedHostSlice<u8>>,
    /// How many experts the chunks hold: the first ones, in order of layer and expert.
    pinned: usize,
    stages: Vec<Stage>,
    next_stage: usize,
}

#[derive(Debug)]
struct Stage {
    memory: PinnedHostSlice<u8>,
    /// The upload that reads it.
    read: CudaEvent,
}

/// Where an expert is, until the next one is asked for.
pub(super) struct Found<'t> {
    pub(super) bytes: &'t [u8],
    /// To be recorded after the upload, if the place will be used again.
    pub(super) read: Option<&'t CudaEvent>,
}

impl HostTier {
    /// Fills at most `bytes` of page-locked memory. `on_progress` gets experts done and experts in all.
    pub(super) fn open(
        gpu: &Gpu,
        store: ExpertStore,
        precision: Precision,
        bytes: u64,
        on_progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, CudaError> {
        let mut tier = Self { store, precision, chunks: Vec::new(), pinned: 0, stages: Vec::new(), next_stage: 0 };
        let (expert_bytes, experts) = (tier.expert_bytes(), tier.experts());
        let pinned = experts.min((bytes / expert_bytes as u64) as usize);
        while tier.pinned < pinned {
            let count = CHUNK_EXPERTS.min(pinned - tier.pinned);
            let mut chunk = gpu.pinned(count * expert_bytes)?;
            let slots = chunk.as_mut_slice().map_err(failed("cuEventSynchronize"))?;
            slots
                .par_chunks_exact_mut(expert_bytes)
                .enumerate()
                .try_for_each(|(at, slot)| tier.load(tier.key(tier.pinned + at), slot))?;
            tier.chunks.push(chunk);
            tier.pinned += count;
            on_progress(tier.pinned as u64, pinned as u64);
        }
        if pinned < experts {
            for _ in 0..STAGES {
                tier.stages.push(Stage { memory: gpu.pinned(expert_bytes)?, read: gpu.event()? });
            }
        }
        Ok(tier)
    }

    /// Bytes of one expert on the device.
    pub(super) fn expert_bytes(&self) -> usize {
        let shape = self.store.shape();
        shape.matrices() * shape.d_model * shape.d_ff * self.precision.size()
    }

    /// Experts of the whole model.
    pub(super) fn experts(&self) -> usize {
        self.store.config().moe_layer_count() * self.store.config().num_experts
    }

    /// Where the expert lies; reads it from disk if it is not in memory.
    pub(super) fn find(&mut self, key: ExpertKey) -> Result<Found<'_>, CudaError> {
        let expert_bytes = self.expert_bytes();
        let index = usize::from(key.layer.0) * self.store.config().num_experts + usize::from(key.expert.0);
        if index < self.pinned {
            let chunk = self.chunks[index / CHUNK_EXPERTS].as_slice().map_err(failed("cuEventSynchronize"))?;
            let bytes = &chunk[index % CHUNK_EXPERTS * expert_bytes..][..expert_bytes];
            return Ok(Found { bytes, read: None });
        }
        self.next_stage = (self.next_stage + 1) % self.stages.len();
        let mut stage = self.stages.swap_remove(self.next_stage);
        let filled = self.fill(key, &mut stage);
        self.stages.push(stage);
        let last = self.stages.len() - 1;
        self.stages.swap(self.next_stage, last);
        filled?;
        let stage = &self.stages[self.next_stage];
        let bytes = stage.memory.as_slice().map_err(failed("cuEventSynchronize"))?;
        Ok(Found { bytes, read: Some(&stage.read) })
    }

    fn fill(&self, key: ExpertKey, stage: &mut Stage) -> Result<(), CudaError> {
        stage.read.synchronize().map_err(failed("cuEventSynchronize"))?;
        let slot = stage.memory.as_mut_slice().map_err(failed("cuEventSynchronize"))?;
        Ok(self.load(key, slot)?)
    }

    fn load(&self, key: ExpertKey, slot: &mut [u8]) -> Result<(), ModelError> {
        let shape = self.store.shape();
        match (shape.dtype, self.precision) {
            (StoredDType::BF16, Precision::Bf16) | (StoredDType::F32, Precision::F32) => self.store.load(key, slot),
            _ => {
                let mut stored = vec![0; shape.bytes()];
                self.store.load(key, &mut stored)?;
                let mut converted = Vec::with_capacity(slot.len());
                convert(shape.dtype, &stored, self.precision, &mut converted);
                slot.copy_from_slice(&converted);
                Ok(())
            }
        }
    }

    fn key(&self, index: usize) -> ExpertKey {
        let num_experts = self.store.config().num_experts;
        ExpertKey { layer: LayerId((index / num_experts) as u16), expert: ExpertId((index % num_experts) as u16) }
    }
}
