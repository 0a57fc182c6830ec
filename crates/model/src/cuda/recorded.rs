//! Operations that are started again and again in the same shape: after some times as a recorded graph, which the host
//! starts at once. A step of a small batch is some twenty operations from one MoE layer to the next, of 3
//! microseconds each, and starting them one by one takes longer than they do.

use std::{collections::HashMap, hash::Hash};

use cudarc::driver::{CudaGraph, sys};

use super::{
    device::Gpu,
    error::{CudaError, failed},
};

/// Shapes and graphs at most; then all are forgotten.
const SHAPES_MAX: usize = 4096;
const GRAPHS_MAX: usize = 512;

/// What was started before, by its shape.
pub(super) struct Recordings<K> {
    seen: HashMap<K, Recorded>,
    graphs: usize,
    /// A shape is recorded once it has been started so often.
    starts_before: u32,
}

enum Recorded {
    /// Not yet; how often it was started.
    Started(u32),
    Graph(CudaGraph),
}

// SAFETY: a graph belongs to no thread; it must not be used by two at a time (CUDA Programming Guide, "Graph object thread
// safety"), and is reached by `&mut` only.
unsafe impl Send for Recorded {}

impl<K: Eq + Hash> Recordings<K> {
    /// Nothing yet. A shape is recorded once it has been started `starts_before` times: recording takes a millisecond or
    /// more, which pays where a shape comes back often.
    pub(super) fn new(starts_before: u32) -> Self {
        Self { seen: HashMap::new(), graphs: 0, starts_before }
    }

    /// Forgets everything: what was recorded names memory that is no more.
    pub(super) fn clear(&mut self) {
        self.seen.clear();
        self.graphs = 0;
    }

    /// Starts operations of a shape. `start` is called until the shape is recorded; it must do the same whenever the shape is
    /// the same, on the compute stream and nowhere else.
    pub(super) fn start(
        &mut self,
        gpu: &Gpu,
        shape: K,
        start: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        if self.seen.len() >= SHAPES_MAX || self.graphs >= GRAPHS_MAX {
            self.clear();
        }
        match self.seen.entry(shape).or_insert(Recorded::Started(0)) {
            Recorded::Graph(graph) => graph.launch().map_err(failed("cuGraphLaunch")),
            Recorded::Started(times) if *times < self.starts_before => {
                *times += 1;
                start()
            }
            recorded => {
                let graph = record(gpu, start)?;
                graph.launch().map_err(failed("cuGraphLaunch"))?;
                *recorded = Recorded::Graph(graph);
                self.graphs += 1;
                Ok(())
            }
        }
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
