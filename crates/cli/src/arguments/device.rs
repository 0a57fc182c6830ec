//! What computes, and in what precision.

use clap::Args;
use sida_model::{DeviceError, DeviceName, ModelError, Precision};

use crate::bad_configuration::BadConfiguration;

/// The device of one node.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct DeviceArguments {
    /// What computes: cpu, or a GPU as cuda:0
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceName::Cpu)]
    pub(crate) device: DeviceName,
    /// What a GPU computes in, bf16 or f32 [default: as the model is stored]. CPUs compute in f32
    #[arg(long, value_name = "TYPE")]
    pub(crate) precision: Option<Precision>,
}

/// A device that is not there, or that a model does not fit, is the caller's mistake.
pub(crate) fn refused(error: DeviceError) -> anyhow::Error {
    match error {
        DeviceError::Missing(_) | DeviceError::Refused(_) => BadConfiguration::because("--device", error).into(),
        error => error.into(),
    }
}

/// As [`refused`], of a model.
pub(crate) fn model_refused(error: ModelError) -> anyhow::Error {
    match error {
        ModelError::Device(error) => refused(error),
        error => error.into(),
    }
}
