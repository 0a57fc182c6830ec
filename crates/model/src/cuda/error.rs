//! What can go wrong between this process and a GPU. A caller can tell what the machine lacks (a driver, a compiler, a
//! device) from what a model or a budget does not fit, and both from a device that failed while it ran.

use cudarc::driver::{DriverError, sys::CUresult};
use thiserror::Error;

use crate::{DeviceError, ModelError};

/// Why something cannot be done on a GPU.
#[derive(Debug, Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum CudaError {
    #[error("no NVIDIA driver: libcuda cannot be loaded")]
    NoDriver,
    #[error("the driver speaks CUDA {major}.{minor}, expected {expected} or later")]
    OldDriver { major: i32, minor: i32, expected: &'static str },
    #[error("no CUDA compiler: libnvrtc cannot be loaded; name its folder by LD_LIBRARY_PATH")]
    NoCompiler,
    #[error("there is no device {ordinal}: the driver has {found}")]
    NoDevice { ordinal: usize, found: usize },
    #[error("{device} has compute capability {major}.{minor}, expected {expected} or later")]
    OldDevice { device: String, major: i32, minor: i32, expected: &'static str },
    #[error("kernels do not compile for {target}: {log}")]
    Compile { target: String, log: String },
    #[error("the device has no {bytes} bytes left for {what}")]
    OutOfMemory { what: &'static str, bytes: usize },
    #[error("the host gives no {bytes} bytes: {source}")]
    Host { bytes: usize, source: std::io::Error },
    #[error("{call} failed: {source}")]
    Driver { call: &'static str, source: DriverError },
    #[error("models with {what} = {found} do not run on a GPU yet, expected {expected}")]
    Unsupported { what: &'static str, found: String, expected: &'static str },
    #[error("a budget of {bytes} bytes holds {slots} experts, one MoE layer needs {needed}")]
    BudgetTooSmall { bytes: u64, slots: usize, needed: usize },
    #[error("a batch of {rows} rows is larger than the {limit} that this model was opened for")]
    TooManyRows { rows: usize, limit: usize },
    #[error("memory cannot be shared: {reason}")]
    Window { reason: String },
    #[error("a plan is refused: {reason}")]
    Plan { reason: String },
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl CudaError {
    /// Whether the machine, not the model or the request, is why: what a command line reports as a bad configuration.
    pub fn is_missing_device(&self) -> bool {
        matches!(
            self,
            Self::NoDriver | Self::OldDriver { .. } | Self::NoCompiler | Self::NoDevice { .. } | Self::OldDevice { .. }
        )
    }

    /// Whether the device is of no use any more: nothing that was on it can be trusted, and every later call fails.
    pub fn is_device_lost(&self) -> bool {
        let Self::Driver { source, .. } = self else { return false };
        !matches!(source.0, CUresult::CUDA_ERROR_OUT_OF_MEMORY | CUresult::CUDA_ERROR_INVALID_VALUE)
    }
}

/// Names the call that failed.
pub(super) fn failed(call: &'static str) -> impl Fn(DriverError) -> CudaError {
    move |source| CudaError::Driver { call, source }
}

impl From<CudaError> for DeviceError {
    fn from(error: CudaError) -> Self {
        let reason = error.to_string();
        match error {
            error if error.is_missing_device() => Self::Missing(reason),
            CudaError::OutOfMemory { .. } => Self::Failed(reason),
            error if error.is_device_lost() => Self::Lost(reason),
            CudaError::Driver { .. } => Self::Failed(reason),
            _ => Self::Refused(reason),
        }
    }
}

impl From<CudaError> for ModelError {
    fn from(error: CudaError) -> Self {
        match error {
            CudaError::Model(error) => error,
            error => Self::Device(error.into()),
        }
    }
}
