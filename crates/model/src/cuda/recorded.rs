//! Operations that are started again and again in the same shape: from the second time on as a recorded graph, which the
//! host starts at once. A step of a small batch is some twenty operations from one MoE layer to the next, of 3
//! microseconds each, and starting them one by one takes longer than they do.

use std::{collections::HashMap, hash::Hash};

use cudarc::driver::{CudaGraph, sys};

use super::{
    device::Gpu,
    error::{CudaError, failed},
};

/// Graphs at most; then all are forgotten.
const GRAPHS_MAX: usize = 512;

/// What was started before, by its shape.
pub(super) struct Recordings<K> {
    seen: HashMap<K, Recorded>,
}

enum Recorded {
    Once,
    Graph(CudaGraph),
}

// SAFETY: a graph belongs to no thread; it must not be used by two at a time (CUDA Programming Guide, "Graph object thread
// safety"), and is reached by `&mut` only.
unsafe impl Send for Recorded {}

impl<K: Eq + Hash> Recordings<K> {
    /// Nothing yet.
    pub(super) fn new() -> Self {
        Self { seen: HashMap::new() }
    }

    /// Forgets everything: what was recorded names memory that is no more.
    pub(super) fn clear(&mut self) {
        self.seen.clear();
    }

    /// Starts operations of a shape. `start` is called the first two times; it must do the same whenever the shape is the
    /// same, on the compute stream and nowhere else.
    pub(super) fn start(
        &mut self,
        gpu: &Gpu,
        shape: K,
        start: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        match self.seen.get(&shape) {
            Some(Recorded::Graph(graph)) => return graph.launch().map_err(failed("cuGraphLaunch")),
            Some(Recorded::Once) => {
                let graph = record(gpu, start)?;
                graph.launch().map_err(failed("cuGraphLaunch"))?;
                self.seen.insert(shape, Recorded::Graph(graph));
            }
            None => {
                if self.seen.len() >= GRAPHS_MAX {
                    self.clear();
                }
                self.seen.insert(shape, Recorded::Once);
                start()?;
            }
        }
        Ok(())
    }
}

fn record(gpu: &Gpu, start: impl FnOnce() -> Result<(), CudaError>) -> Result<CudaGraph, CudaError> {
    let stream = &gpu.compute;
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    stream.begin_capture(mode).map_err(failed("cuStreamBeginCapture"))?;
    let started = start();
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).map_err(failed("cuStreamEndCapture"));
    started?;
    Ok(graph?.expect("a recording has operations"))
}

impl<K> std::fmt::Debug for Recordings<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recordings").field("shapes", &self.seen.len()).finish()
    }
}
