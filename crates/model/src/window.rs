//! Rows that stay in the memory of GPUs when coordinator and expert-nodes are processes of one machine. A coordinator
//! offers the memory that its rows are in ([`RowsWindow`]); a node reads them there and leaves what its experts make of
//! them in memory of its own ([`ExpertWindow`]), which the coordinator reads in turn ([`ResultsWindow`]). Known to every
//! build; only one with the cargo feature `cuda` makes any.
//!
//! Invariant: everyone writes memory of their own only. So whoever is late, or dies, spoils nothing of anybody else's, and
//! memory that is read stays what it was although its owner is gone (the driver keeps it while it is mapped).

use std::sync::Arc;

use sida_routing::LayerId;

use crate::{DeviceError, ModelError, Precision, SlotRun};

/// Bytes of a CUDA IPC handle.
pub const HANDLE_BYTES: usize = 64;

/// Names memory to another process of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WindowHandle {
    /// The machine's boot: the handle means nothing elsewhere.
    pub machine: String,
    /// A CUDA IPC handle.
    pub memory: [u8; HANDLE_BYTES],
    /// Rows that it has room for.
    pub rows: usize,
    /// What a row's values are in.
    pub precision: Precision,
}

/// A node's view of a coordinator's rows, and its own memory for their results.
pub trait ExpertWindow: Send + Sync {
    /// How many places both have.
    fn rows(&self) -> usize;
    /// Where the results are, for the coordinator.
    fn results(&self) -> &WindowHandle;
    /// Computes the rows at these places with a layer's experts in slots; `first` of a run is its first place. The results are
    /// there when it returns.
    fn compute(&self, layer: LayerId, runs: &[SlotRun]) -> Result<(), ModelError>;
}

/// The memory that a coordinator's rows are in.
#[derive(Clone, Debug)]
pub struct RowsWindow {
    #[cfg(feature = "cuda")]
    pub(crate) shared: Arc<crate::cuda::SharedRows>,
    /// No build without devices makes one.
    #[cfg(not(feature = "cuda"))]
    never: Arc<std::convert::Infallible>,
}

/// A coordinator's view of a node's results.
pub struct ResultsWindow {
    #[cfg(feature = "cuda")]
    pub(crate) mapped: crate::cuda::Mapped,
    #[cfg(not(feature = "cuda"))]
    _never: std::convert::Infallible,
}

impl RowsWindow {
    /// What a node is offered.
    pub fn handle(&self) -> &WindowHandle {
        #[cfg(feature = "cuda")]
        return self.shared.handle();
        #[cfg(not(feature = "cuda"))]
        match *self.never {}
    }

    /// Opens what a node answered with.
    pub fn open_results(&self, _results: &WindowHandle) -> Result<ResultsWindow, DeviceError> {
        #[cfg(feature = "cuda")]
        return Ok(ResultsWindow { mapped: self.shared.open_results(_results)? });
        #[cfg(not(feature = "cuda"))]
        match *self.never {}
    }
}
