//! What the host is told while a pass runs: after each MoE layer, the report as it is then. By it experts of that layer may leave
//! while the pass goes on.

use cudarc::driver::{CudaEvent, PinnedHostSlice};

use super::{
    device::Gpu,
    error::{CudaError, failed},
    scratch::{Report, Scratch},
};

/// For each MoE layer of a pass, where the host reads the report as it is behind that layer.
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
        let told = |layer| {
            let report = gpu.pinned(Report::bytes(layer + 1, scratch.rows_max))?;
            Ok(LayerReport { report, done: gpu.event()? })
        };
        Ok(Self { layers: (0..layers).map(told).collect::<Result<_, CudaError>>()? })
    }

    /// Has the host told when the compute stream comes to here, which is after layer `layer` of a pass of `rows` rows.
    pub(super) fn tell(&self, gpu: &Gpu, scratch: &Scratch, layer: usize, rows: usize) -> Result<(), CudaError> {
        let LayerReport { report, done } = &self.layers[layer];
        let to = report.as_ptr().map_err(failed("cuEventSynchronize"))?.cast_mut();
        // SAFETY: the memory is as long, and is read after `done` only, before which nobody begins another pass.
        unsafe {
            gpu.start_reading(scratch.report.all(), std::slice::from_raw_parts_mut(to, Report::bytes(layer + 1, rows)))
        }?;
        done.record(&gpu.compute).map_err(failed("cuEventRecord"))
    }

    /// Waits until a layer is done, of a pass of `rows` rows, or the pass stopped before its end.
    pub(super) fn wait(&self, layer: usize, rows: usize) -> Result<Report, CudaError> {
        let LayerReport { report, done } = &self.layers[layer];
        done.synchronize().map_err(failed("cuEventSynchronize"))?;
        let bytes = report.as_slice().map_err(failed("cuEventSynchronize"))?;
        Ok(Report::of(bytes[..Report::bytes(layer + 1, rows)].to_vec()))
    }
}
