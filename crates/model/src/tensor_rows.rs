//! The way from tensors to the CPU kernels and back, without a copy: a contiguous float32 tensor is seen as
//! the slice of its rows, and a vector of rows becomes a tensor. The one place where a device is asked for.

use candle_core::{CpuStorage, Device, Result, Storage, Tensor, bail};

/// Calls `work` with the values of a contiguous float32 CPU tensor, row-major.
pub fn rows<T>(tensor: &Tensor, work: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((from, to)) = layout.contiguous_offsets() else {
        bail!("expected a contiguous tensor, found strides {:?} for {:?}", layout.stride(), layout.shape())
    };
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => Ok(work(&values[from..to])),
        _ => bail!("expected a float32 tensor on the CPU, found {:?} on {:?}", tensor.dtype(), tensor.device()),
    }
}

/// A (n, width) tensor of `values`.
pub fn from_rows(values: Vec<f32>, width: usize) -> Result<Tensor> {
    let n = values.len() / width;
    Tensor::from_vec(values, (n, width), &Device::Cpu)
}
