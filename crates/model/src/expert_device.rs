//! What an expert-node asks of a device other than the processor: slots for experts, and their arithmetic. Known to every
//! build; a GPU's is opened by [`open`] where the cargo feature `cuda` is.

use std::sync::Arc;

use sida_routing::{ExpertKey, Grouping, LayerId};
use thiserror::Error;

use crate::{
    DeviceName, DeviceSlots, ExpertShape, ExpertSlot, ExpertStore, ExpertWindow, ModelError, ResultsWindow,
    WindowHandle,
};

/// Rows for the expert in a slot.
#[derive(Debug)]
pub struct SlotRows<'a> {
    /// Which slot.
    pub slot: usize,
    /// (rows, d_model)
    pub x: &'a [f32],
    /// (rows, d_model): the expert's output, before the router's factor.
    pub out: &'a mut [f32],
}

/// Whether somebody waits for an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// A call does.
    Demand,
    /// Nobody yet: it gives way to what is demanded.
    Ahead,
}

/// Slots of one expert each, and what computes with them. Which expert is in which slot, and who may touch it, is the
/// caller's to decide: a slot that is loaded is not computed with meanwhile.
pub trait ExpertDevice: Send + Sync {
    /// How an expert lies in a slot.
    fn shape(&self) -> &ExpertShape;
    /// Starts bringing an expert into a slot. Nobody may compute with it before [`ExpertDevice::finish_load`].
    fn begin_load(&self, key: ExpertKey, slot: usize, urgency: Urgency) -> Result<(), ModelError>;
    /// Waits for it.
    fn finish_load(&self, slot: usize) -> Result<(), ModelError>;
    /// Keeps an expert near the device, if there is room, so that its next load does not wait for a disk.
    fn keep_near(&self, _key: ExpertKey) -> Result<(), ModelError> {
        Ok(())
    }
    /// Computes rows with a layer's experts in slots.
    fn compute(&self, layer: LayerId, groups: &mut [SlotRows<'_>]) -> Result<(), ModelError>;
    /// Whether [`ExpertDevice::start_beside`] takes rows from there.
    fn is_beside(&self, _rows: &RowsOnDevice<'_>) -> bool {
        false
    }
    /// Starts computing such rows of a layer, which are grouped. `done` is called, or dropped, when the device is through with the
    /// slots.
    fn start_beside(
        &self,
        _rows: &RowsOnDevice<'_>,
        _layer: LayerId,
        _groups: &[SlotRun],
        _done: Box<dyn FnOnce() + Send>,
    ) -> Result<(), ModelError> {
        Err(DeviceError::Refused("these rows are on another device".to_owned()).into())
    }
    /// Its slots, for passes on the device where `rows` are. `None`: that is another device.
    fn slots_beside(self: Arc<Self>, _rows: &RowsOnDevice<'_>) -> Option<DeviceSlots> {
        None
    }
    /// Maps the rows of a coordinator in another process, and takes memory for their results.
    fn open_window(self: Arc<Self>, _rows: &WindowHandle) -> Result<Arc<dyn ExpertWindow>, ModelError> {
        Err(DeviceError::Refused("this device's memory cannot be shared".to_owned()).into())
    }
}

/// A run of grouped rows for the expert in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRun {
    /// Which slot.
    pub slot: usize,
    /// The first of the rows, counted over all groups.
    pub first: usize,
    /// How many.
    pub rows: usize,
}

/// The rows of an MoE layer where a pass left them on a device: see [`crate::Backend::rows`].
pub struct RowsOnDevice<'w> {
    #[cfg(feature = "cuda")]
    pub(crate) dense: &'w mut crate::cuda::DeviceDense,
    /// No build without devices makes one.
    #[cfg(not(feature = "cuda"))]
    never: (std::convert::Infallible, std::marker::PhantomData<&'w ()>),
}

#[cfg(feature = "cuda")]
impl RowsOnDevice<'_> {
    /// Tells the device how the rows are grouped: the token at each place, and the factor of its expert. To be called before
    /// anything is computed of a layer.
    pub fn group(&mut self, grouping: &Grouping) -> Result<(), ModelError> {
        Ok(self.dense.group(grouping)?)
    }

    /// Waits until rows and grouping can be read by others.
    pub fn settle(&mut self) -> Result<(), ModelError> {
        Ok(self.dense.settle()?)
    }

    /// Starts taking over the results of these places.
    pub fn take(&mut self, from: &ResultsWindow, places: &[u32]) -> Result<(), ModelError> {
        Ok(self.dense.take(Some(&from.mapped), places)?)
    }

    /// Forgets what was computed of these places.
    pub fn forget(&mut self, places: &[u32]) -> Result<(), ModelError> {
        Ok(self.dense.take(None, places)?)
    }

    /// The rows, (tokens, d_model), for experts that cannot read them where they are.
    pub fn fetch(&mut self) -> Result<Vec<f32>, ModelError> {
        Ok(self.dense.fetch()?)
    }

    /// Adds the results of experts that have no part in the device, (places, d_model), to those of the others: each place is 0
    /// on one side.
    pub fn put(&mut self, results: &[f32]) -> Result<(), ModelError> {
        Ok(self.dense.put(results)?)
    }

    /// h += the sum of what experts made of a row's places, each times its factor.
    pub fn add_computed(&mut self) -> Result<(), ModelError> {
        Ok(self.dense.add_computed()?)
    }
}

#[cfg(not(feature = "cuda"))]
#[allow(missing_docs)] // As above, and never called.
impl RowsOnDevice<'_> {
    pub fn group(&mut self, _: &Grouping) -> Result<(), ModelError> {
        match self.never.0 {}
    }

    pub fn settle(&mut self) -> Result<(), ModelError> {
        match self.never.0 {}
    }

    pub fn take(&mut self, _: &ResultsWindow, _: &[u32]) -> Result<(), ModelError> {
        match self.never.0 {}
    }

    pub fn forget(&mut self, _: &[u32]) -> Result<(), ModelError> {
        match self.never.0 {}
    }

    pub fn fetch(&mut self) -> Result<Vec<f32>, ModelError> {
        match self.never.0 {}
    }

    pub fn put(&mut self, _: &[f32]) -> Result<(), ModelError> {
        match self.never.0 {}
    }

    pub fn add_computed(&mut self) -> Result<(), ModelError> {
        match self.never.0 {}
    }
}

/// What is wrong with a device.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum DeviceError {
    /// The machine or this build has none that will do.
    #[error("{0}")]
    Missing(String),
    /// It cannot hold or run what it is asked to.
    #[error("{0}")]
    Refused(String),
    /// A call of it failed; the next may not.
    #[error("the device failed: {0}")]
    Failed(String),
    /// Nothing on it can be trusted any more.
    #[error("the device is lost: {0}")]
    Lost(String),
}

/// How a node's experts are put on a device.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertDeviceOptions {
    /// Which device.
    pub device: DeviceName,
    /// How they lie there.
    pub slot: ExpertSlot,
    /// Page-locked memory of the host that experts are kept in once they were read from disk.
    pub host_bytes: u64,
}

/// Opens a device for the experts of `store`, in `slots` slots.
#[cfg(not(feature = "cuda"))]
pub fn open(
    options: ExpertDeviceOptions,
    _store: ExpertStore,
    _slots: usize,
) -> Result<Arc<dyn ExpertDevice>, ModelError> {
    Err(DeviceError::not_built(options.device).into())
}

/// Opens a device for the experts of `store`, in `slots` slots.
#[cfg(feature = "cuda")]
pub fn open(
    options: ExpertDeviceOptions,
    store: ExpertStore,
    slots: usize,
) -> Result<Arc<dyn ExpertDevice>, ModelError> {
    use crate::cuda::{DeviceSlab, Gpu};

    let DeviceName::Cuda(ordinal) = options.device else {
        return Err(DeviceError::Refused(format!("{} is not a GPU", options.device)).into());
    };
    let gpu = Gpu::open(ordinal)?;
    Ok(Arc::new(DeviceSlab::open(gpu, store, options.slot, slots, options.host_bytes)?))
}

impl DeviceError {
    /// Of a build that cannot use it.
    pub fn not_built(device: DeviceName) -> Self {
        Self::Missing(format!("{device} needs a build with the cargo feature cuda"))
    }
}
