//! What the host is told while a pass runs: after each MoE layer, what its router chose, and whether the pass has stopped. By it
//! experts of that layer may leave while the pass goes on.

use cudarc::driver::{CudaEvent, PinnedHostSlice};

use super::{
    device::Gpu,
    error::{CudaError, failed},
    scratch::{CHOSEN_AT, Report, Scratch},
};

/// For each MoE layer of a pass, where the host reads that layer's part of the report.
#[derive(Debug)]
pub(super) struct Progress {
    layers: Vec<LayerReport>,
}

#[derive(Debug)]
struct LayerReport {
    report: PinnedHostSlice<u8>,
    done: CudaEvent,
}

impl Progress {
    /// Of passes through at most so many MoE layers.
    pub(super) fn new(gpu: &Gpu, scratch: &Scratch, layers: usize) -> Result<Self, CudaError> {
        let told =
            |_| Ok(LayerReport { report: gpu.pinned(Report::bytes(1, scratch.choices_max()))?, done: gpu.event()? });
        Ok(Self { layers: (0..layers).map(told).collect::<Result<_, CudaError>>()? })
    }

    /// Has the host told when the compute stream comes to here, which is after layer `layer` of a pass of so many choices.
    pub(super) fn tell(&self, gpu: &Gpu, scratch: &Scratch, layer: usize, choices: usize) -> Result<(), CudaError> {
        let LayerReport { report, done } = &self.layers[layer];
        let to = report.as_ptr().map_err(failed("cuEventSynchronize"))?.cast_mut();
        // SAFETY: the memory is as long, and is read after `done` only, before which nobody begins another pass.
        let to = unsafe { std::slice::from_raw_parts_mut(to, Report::bytes(1, choices)) };
        let (guard, chosen) = to.split_at_mut(CHOSEN_AT);
        // SAFETY: as above.
        unsafe { gpu.start_reading(scratch.report.first(4), &mut guard[..4]) }?;
        // SAFETY: as above.
        unsafe { gpu.start_reading(scratch.chosen(layer, choices).as_bytes(), chosen) }?;
        done.record(&gpu.compute).map_err(failed("cuEventRecord"))
    }

    /// Waits until a layer is done, of a pass of so many choices, or the pass stopped before its end.
    pub(super) fn wait(&self, layer: usize, choices: usize) -> Result<Report, CudaError> {
        let LayerReport { report, done } = &self.layers[layer];
        done.synchronize().map_err(failed("cuEventSynchronize"))?;
        let bytes = report.as_slice().map_err(failed("cuEventSynchronize"))?;
        Ok(Report::of(bytes[..Report::bytes(1, choices)].to_vec(), layer))
    }
}
