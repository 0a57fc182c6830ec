//! Experts as the device takes them, in page-locked memory of the host: as many as the budget for it holds, the others
//! through a few places that are filled from disk when they are wanted.

use cudarc::driver::{CudaEvent, PinnedHostSlice};
use sida_routing::ExpertKey;

use super::{
    device::Gpu,
    error::{CudaError, failed},
    locked_memory::LockedMemory,
};
use crate::{ExpertSlot, ExpertStore};

/// Experts of one allocation, so that filling begins before all is taken.
const CHUNK_EXPERTS: usize = 16;
/// Places for experts that come from disk.
const STAGES: usize = 4;

/// Every expert of a model, in memory or one read away.
#[derive(Debug)]
pub(super) struct HostTier {
    store: ExpertStore,
    slot: ExpertSlot,
    chunks: Vec<LockedMemory>,
    /// For each expert, in order of layer and expert, its place in the chunks.
    places: Vec<Option<usize>>,
    /// Places that are taken, and that there may be.
    taken: usize,
    places_max: usize,
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
    /// Takes at most `bytes` of page-locked memory, as experts are found for the first time.
    pub(super) fn open(gpu: &Gpu, store: ExpertStore, slot: ExpertSlot, bytes: u64) -> Result<Self, CudaError> {
        let (chunks, stages) = (Vec::new(), Vec::new());
        let (places, taken, places_max, next_stage) = (Vec::new(), 0, 0, 0);
        let mut tier = Self { store, slot, chunks, places, taken, places_max, stages, next_stage };
        let (expert_bytes, experts) = (tier.expert_bytes(), tier.experts());
        tier.places = vec![None; experts];
        tier.places_max = experts.min((bytes / expert_bytes as u64) as usize);
        for _ in 0..STAGES {
            tier.stages.push(Stage { memory: gpu.pinned(expert_bytes)?, read: gpu.event()? });
        }
        Ok(tier)
    }

    fn new_chunk(&self, gpu: &Gpu) -> Result<LockedMemory, CudaError> {
        LockedMemory::take(gpu, CHUNK_EXPERTS.min(self.places_max - self.taken) * self.expert_bytes())
    }

    /// Bytes of one expert.
    pub(super) fn expert_bytes(&self) -> usize {
        self.slot.bytes()
    }

    /// Experts of the whole model.
    pub(super) fn experts(&self) -> usize {
        self.store.config().moe_layer_count() * self.store.config().num_experts
    }

    /// Where the expert lies; reads it from disk if it is not in memory.
    pub(super) fn find(&mut self, gpu: &Gpu, key: ExpertKey) -> Result<Found<'_>, CudaError> {
        self.keep_near(gpu, key)?;
        let (expert_bytes, own_bytes, index) = (self.expert_bytes(), self.slot.bytes_of(key.layer), self.index(key));
        if let Some(place) = self.places[index] {
            let chunk = &self.chunks[place / CHUNK_EXPERTS];
            return Ok(Found { bytes: &chunk[place % CHUNK_EXPERTS * expert_bytes..][..own_bytes], read: None });
        }
        self.next_stage = (self.next_stage + 1) % self.stages.len();
        let Stage { memory, read } = &mut self.stages[self.next_stage];
        read.synchronize().map_err(failed("cuEventSynchronize"))?;
        let bytes = memory.as_mut_slice().map_err(failed("cuEventSynchronize"))?;
        self.slot.read(&self.store, key, bytes)?;
        Ok(Found { bytes: &bytes[..own_bytes], read: Some(read) })
    }

    /// Reads an expert into memory, if it is not there and there is room.
    pub(super) fn keep_near(&mut self, gpu: &Gpu, key: ExpertKey) -> Result<(), CudaError> {
        let index = self.index(key);
        match self.places[index].is_none() && self.taken < self.places_max {
            true => self.keep(gpu, key, index),
            false => Ok(()),
        }
    }

    /// Reads an expert into the next place.
    fn keep(&mut self, gpu: &Gpu, key: ExpertKey, index: usize) -> Result<(), CudaError> {
        let at = self.taken % CHUNK_EXPERTS;
        if self.taken / CHUNK_EXPERTS == self.chunks.len() {
            let Ok(chunk) = self.new_chunk(gpu) else {
                // The host has no more to lock: what is there stays, the others come from disk.
                self.places_max = self.taken;
                return Ok(());
            };
            self.chunks.push(chunk);
        }
        let expert_bytes = self.expert_bytes();
        let place = &mut self.chunks[self.taken / CHUNK_EXPERTS][at * expert_bytes..][..expert_bytes];
        self.slot.read(&self.store, key, place)?;
        self.places[index] = Some(self.taken);
        self.taken += 1;
        Ok(())
    }

    fn index(&self, key: ExpertKey) -> usize {
        usize::from(key.layer.0) * self.store.config().num_experts + usize::from(key.expert.0)
    }
}
