//! The way of experts from the host into slots of the device. Copies go one after the other on streams of their own, one for
//! what is wanted now and one for what is ahead of its use.

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream};
use parking_lot::Mutex;

use super::{
    buffer::DeviceBuffer,
    device::Gpu,
    error::{CudaError, failed},
    host_tier::Found,
};
use crate::Urgency;

/// What is uploaded in slices comes in so many bytes, two at a time on their way, so that what is wanted now never waits
/// for more.
const SLICE_BYTES: usize = 2 << 20;

/// The streams that bring experts into slots.
#[derive(Debug)]
pub(super) struct Uploads {
    /// For each slot the end of the last upload into it.
    done: Vec<CudaEvent>,
    demand: Path,
    prefetch: Path,
    /// The slots, one after another. Last, so that what is on its way there ends before.
    slots: DeviceBuffer<u8>,
    expert_bytes: usize,
}

#[derive(Debug)]
struct Path {
    copies: Arc<CudaStream>,
    /// Held while an upload is begun: the two slices that are on their way.
    slices: Mutex<[CudaEvent; 2]>,
}

impl Uploads {
    /// Into slots of so many bytes.
    pub(super) fn new(gpu: &Gpu, slots: DeviceBuffer<u8>, expert_bytes: usize) -> Result<Self, CudaError> {
        let done = (0..slots.len() / expert_bytes).map(|_| gpu.event()).collect::<Result<_, CudaError>>()?;
        let (demand, prefetch) = (Path::new(gpu)?, Path::new(gpu)?);
        // Memory is taken in the order of the compute stream.
        gpu.finish()?;
        Ok(Self { done, demand, prefetch, slots, expert_bytes })
    }

    /// Starts an upload, after those into the same slot before it. In slices it returns when the last two are on their way.
    ///
    /// # Safety
    /// Until it is done nobody else touches the slot, and `expert`'s bytes stay as they are until they were copied; where it
    /// has a mark for that, until that mark.
    pub(super) unsafe fn begin(
        &self,
        gpu: &Gpu,
        expert: &Found<'_>,
        slot: usize,
        urgency: Urgency,
        in_slices: bool,
    ) -> Result<(), CudaError> {
        let Path { copies, slices } = match urgency {
            Urgency::Demand => &self.demand,
            Urgency::Ahead => &self.prefetch,
        };
        let slices = slices.lock();
        let done = &self.done[slot];
        copies.wait(done).map_err(failed("cuStreamWaitEvent"))?;
        let to = self.slots.slice(slot * self.expert_bytes..(slot + 1) * self.expert_bytes);
        if in_slices {
            for (at, slice) in expert.bytes.chunks(SLICE_BYTES).enumerate() {
                let before = &slices[at % 2];
                before.synchronize().map_err(failed("cuEventSynchronize"))?;
                // SAFETY: by the caller's promise.
                unsafe { gpu.upload(copies, slice, to.slice(at * SLICE_BYTES..to.len())) }?;
                record(before, copies)?;
            }
        } else {
            // SAFETY: by the caller's promise.
            unsafe { gpu.upload(copies, expert.bytes, to) }?;
        }
        if let Some(read) = expert.read {
            record(read, copies)?;
        }
        record(done, copies)
    }

    /// Waits until the upload into a slot is done.
    pub(super) fn wait_done(&self, slot: usize) -> Result<(), CudaError> {
        self.done[slot].synchronize().map_err(failed("cuEventSynchronize"))
    }
}

impl Path {
    fn new(gpu: &Gpu) -> Result<Self, CudaError> {
        Ok(Self { copies: gpu.stream()?, slices: Mutex::new([gpu.event()?, gpu.event()?]) })
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        // What is on its way must not outlive what it is read from. An error says that nothing is: the device is lost.
        let _ = self.copies.synchronize();
    }
}

fn record(event: &CudaEvent, stream: &CudaStream) -> Result<(), CudaError> {
    event.record(stream).map_err(failed("cuEventRecord"))
}
