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

impl DeviceArguments {
    /// What was chosen. Refused where a processor would have to compute in bf16, which it does not.
    pub(crate) fn chosen(&self) -> Result<(DeviceName, Option<Precision>), BadConfiguration> {
        match (self.device, self.precision) {
            (DeviceName::Cpu, Some(Precision::Bf16)) => Err(BadConfiguration::new(
                "--precision is bf16, which GPUs compute in, and --device is cpu: expected f32, no --precision, or a GPU",
            )),
            chosen => Ok(chosen),
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A flag would be taken that does nothing.
    #[test]
    fn processors_do_not_compute_in_bf16() {
        let chosen = |device, precision| DeviceArguments { device, precision }.chosen();
        assert!(
            chosen(DeviceName::Cpu, Some(Precision::Bf16)).unwrap_err().to_string().contains("--precision is bf16")
        );
        for (device, precision) in [
            (DeviceName::Cpu, None),
            (DeviceName::Cpu, Some(Precision::F32)),
            (DeviceName::Cuda(0), Some(Precision::Bf16)),
        ] {
            assert_eq!(chosen(device, precision).unwrap(), (device, precision));
        }
    }
}
