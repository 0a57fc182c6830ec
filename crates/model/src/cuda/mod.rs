//! Models on NVIDIA GPUs: the whole forward on the device, experts in a slab within a budget, what is planned uploaded
//! while it computes. Used by the coordinator where it is given a device, and by `sida bench --gpu`.
//!
//! Nothing of CUDA is needed to build this. The driver and the kernel compiler are loaded when a [`Gpu`] is opened;
//! where they are missing that is an error like any other.
//!
//! Invariant: as on the CPU, a row's bits depend on nothing but the row and its sequence (see `kernels/numbers.cu`).
//!
//! In reading order: [`error`], [`device`] (context, streams, memory), [`kernels`] (compiled at the start; the sources
//! under `kernels/`: numbers, rows, product and its ways, routing, attention and its ways) and their `arguments`, `weights`,
//! `scratch`, `pass` (the operations of the forward), `recorded` (as graphs), `progress` (layer by layer) and `grouped` (its experts), `host_tier` (in
//! `locked_memory`), `uploads` and `experts` (who is on the device), [`model`],
//! [`sequence`], [`dense`] (the forward without experts), [`slab`] (experts without the forward), [`window`] (what both share
//! with other processes), [`timing`].

mod arguments;
pub mod dense;
pub mod device;
pub mod error;
mod experts;
mod grouped;
mod host_tier;
pub mod kernels;
mod locked_memory;
pub mod model;
mod pass;
mod progress;
mod recorded;
mod scratch;
pub mod sequence;
pub mod slab;
pub mod timing;
mod uploads;
mod weights;
pub mod window;

pub use dense::{DeviceDense, DevicePass, DeviceStates};
pub use device::{Gpu, GpuDescription};
pub use error::CudaError;
pub use model::{DeviceModel, DeviceOptions, Passed, distinct};
pub use sequence::DeviceSequence;
pub use slab::DeviceSlab;
pub use timing::{Ceilings, KernelTiming};
pub use window::{Mapped, SharedRows};
