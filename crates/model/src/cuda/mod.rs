//! Models on NVIDIA GPUs: the whole forward on the device, experts in a slab within a budget, what is planned uploaded
//! while it computes. Used by coordinators and expert-nodes that are given a device.
//!
//! Nothing of CUDA is needed to build this. The driver and the kernel compiler are loaded when a [`Gpu`] is opened;
//! where they are missing that is an error like any other.
//!
//! Invariant: as on the CPU, a row's bits depend on nothing but the row and its sequence (see `kernels/numbers.cu`).
//!
//! In reading order: [`error`], [`device`] (context, streams, memory), `modules` (compiled at the start; the sources under
//! `kernels/`: numbers, rows, product and its ways, router, routing, attention and its ways), [`kernels`] in them and their
//! `arguments`, `weights`, `scratch`, `pass` (the operations of the forward), `ways` (which kernel multiplies), `recorded` (as
//! graphs), `progress` (layer by layer) and `grouped` (its experts), [`sequence`], [`dense`] (passes, with the experts of a slab on the same device or without), `host_tier` (in
//! `locked_memory`), `uploads` and [`slab`] (experts), [`window`] (what both share with other processes).

mod arguments;
mod buffer;
pub mod dense;
pub mod device;
pub mod error;
mod grouped;
mod host_tier;
pub mod kernels;
mod locked_memory;
mod modules;
mod pass;
mod progress;
mod recorded;
#[cfg(test)]
mod same_bits;
mod scratch;
pub mod sequence;
pub mod slab;
mod uploads;
mod ways;
mod weights;
pub mod window;

pub use dense::{DeviceDense, DevicePass, DeviceStates};
pub use device::{Gpu, GpuDescription};
pub use error::CudaError;
pub(crate) use grouped::Slots;
pub use sequence::DeviceSequence;
pub use slab::DeviceSlab;
pub use window::{Mapped, SharedRows};
