//! The backbone's weights on the device: read from a checkpoint tensor by tensor, in the precision of the model, norms,
//! biases and routers in float32. Made once, by [`super::DeviceDense`].

use bytemuck::{Pod, cast_slice};
use half::bf16;
use sida_kernels::position_bias::PositionBias;

use super::{buffer::DeviceBuffer, device::Gpu, error::CudaError};
use crate::{
    Backbone, Checkpoint, ModelConfig, Precision, StoredDType,
    backbone::{Load, Memory},
    block_matrix,
    expert_slot::Layout,
    spec::{BlockSpec, FeedForwardSpec},
};

/// A warp chooses them, a lane each.
const TOP_K_MAX: usize = 32;

/// The memory of a GPU.
#[derive(Debug)]
pub(super) struct Device;

impl Memory for Device {
    type Matrix = Matrix;
    type Vector = Vector;
    type Bias = Vector;
}

/// W, row-major (outputs, inputs).
#[derive(Debug)]
pub(super) struct Matrix {
    values: MatrixValues,
    pub(super) layout: Layout,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

impl Matrix {
    pub(super) fn address(&self) -> u64 {
        match &self.values {
            MatrixValues::Model(bytes) => bytes.address(),
            MatrixValues::Float32(numbers) => numbers.address(),
        }
    }
}

/// The numbers of a matrix.
#[derive(Debug)]
enum MatrixValues {
    /// In the precision of the model, or in blocks.
    Model(DeviceBuffer<u8>),
    /// Of a router.
    Float32(DeviceBuffer<f32>),
}

/// The weight of a norm (d_model), or a position bias (heads, 2 * reach + 1).
#[derive(Debug)]
pub(super) struct Vector(DeviceBuffer<f32>);

impl Vector {
    pub(super) fn address(&self) -> u64 {
        self.0.address()
    }
}

/// Everything but the experts, its bytes on the device, and the formats of what lies in blocks.
pub(super) fn load(
    gpu: &Gpu,
    checkpoint: &Checkpoint,
    precision: Precision,
) -> Result<(Backbone<Device>, u64, Vec<StoredDType>), CudaError> {
    let mut loader = DeviceLoader { gpu, checkpoint, precision, bytes: 0, formats: Vec::new() };
    let backbone = Backbone::load_with(&mut loader)?;
    Ok((backbone, loader.bytes, loader.formats))
}

/// Copies tensors to the device.
struct DeviceLoader<'a> {
    gpu: &'a Gpu,
    checkpoint: &'a Checkpoint,
    precision: Precision,
    bytes: u64,
    formats: Vec<StoredDType>,
}

impl Load for DeviceLoader<'_> {
    type Memory = Device;
    type Error = CudaError;

    fn checkpoint(&self) -> &Checkpoint {
        self.checkpoint
    }

    fn matrix(&mut self, parts: &[(String, usize)], inputs: usize) -> Result<Matrix, CudaError> {
        let outputs: usize = parts.iter().map(|(_, outputs)| outputs).sum();
        let tensors = parts.iter().map(|(name, outputs)| self.checkpoint.tensor_of_shape(name, &[*outputs, inputs]));
        let tensors = tensors.collect::<Result<Vec<_>, _>>()?;
        let stored = tensors[0].dtype;
        // The one row of a shared expert's gate is no matrix of tiles.
        let is_one = tensors.iter().all(|tensor| tensor.dtype == stored) && outputs.is_multiple_of(block_matrix::ROWS);
        let layout = if is_one { Layout::of(stored, self.precision) } else { Layout::Plain };
        let mut bytes = Vec::new();
        match layout {
            Layout::Blocks(dtype) => {
                let blocks = tensors.iter().map(|tensor| tensor.bytes).collect::<Vec<_>>().concat();
                bytes.resize(block_matrix::bytes(dtype, outputs * inputs), 0);
                block_matrix::arrange(&blocks, dtype, inputs, &mut bytes);
                if !self.formats.contains(&dtype) {
                    self.formats.push(dtype);
                }
            }
            Layout::Plain | Layout::Packed => {
                bytes.reserve_exact(outputs * inputs * self.precision.size());
                tensors.iter().for_each(|tensor| convert(tensor.dtype, tensor.bytes, self.precision, &mut bytes));
            }
        }
        parts.iter().for_each(|(name, _)| self.checkpoint.release(name));
        let values = MatrixValues::Model(self.keep("the backbone", &bytes)?);
        Ok(Matrix { values, layout, outputs, inputs })
    }

    fn router(&mut self, name: String, experts: usize, d_model: usize) -> Result<Matrix, CudaError> {
        let router = self.checkpoint.tensor_of_shape(&name, &[experts, d_model])?;
        let values = MatrixValues::Float32(self.keep("routers", &router.dtype.widen(router.bytes))?);
        Ok(Matrix { values, layout: Layout::Plain, outputs: experts, inputs: d_model })
    }

    fn vector(&mut self, name: &str, width: usize) -> Result<Vector, CudaError> {
        let tensor = self.checkpoint.tensor_of_shape(name, &[width])?;
        Ok(Vector(self.keep("norms", &tensor.dtype.widen(tensor.bytes))?))
    }

    fn vectors(&mut self, parts: &[(String, usize)]) -> Result<Vector, CudaError> {
        let mut values = Vec::new();
        for (name, width) in parts {
            let tensor = self.checkpoint.tensor_of_shape(name, &[*width])?;
            tensor.dtype.widen_into(tensor.bytes, &mut values);
        }
        Ok(Vector(self.keep("biases", &values)?))
    }

    fn bias(&mut self, bias: PositionBias) -> Result<Vector, CudaError> {
        Ok(Vector(self.gpu.allocate_with("position biases", bias.by_distance())?))
    }
}

impl DeviceLoader<'_> {
    fn keep<T: Pod>(&mut self, what: &'static str, values: &[T]) -> Result<DeviceBuffer<T>, CudaError> {
        self.bytes += size_of_val(values) as u64;
        self.gpu.allocate_with(what, values)
    }
}

/// Appends values stored as `dtype` as a model of `precision` keeps them: bf16 is rounded to nearest, even.
pub(super) fn convert(dtype: StoredDType, bytes: &[u8], precision: Precision, to: &mut Vec<u8>) {
    match (dtype, precision) {
        (StoredDType::BF16, Precision::Bf16) | (StoredDType::F32, Precision::F32) => to.extend_from_slice(bytes),
        (_, Precision::F32) => to.extend_from_slice(cast_slice(&dtype.widen(bytes))),
        (_, Precision::Bf16) => {
            to.extend(dtype.widen(bytes).into_iter().flat_map(|value| bf16::from_f32(value).to_le_bytes()));
        }
    }
}

/// Refuses a model whose shapes the kernels do not take.
pub(super) fn check(config: &ModelConfig) -> Result<(), CudaError> {
    let multiple = |what, value: usize, of: usize, expected| match value.is_multiple_of(of) && value > 0 {
        true => Ok(()),
        false => Err(CudaError::Unsupported { what, found: value.to_string(), expected }),
    };
    multiple("d_model", config.d_model, 128, "a multiple of 128")?;
    multiple("d_ff", config.d_ff, 128, "a multiple of 128")?;
    multiple("vocab_size", config.vocab_size, 64, "a multiple of 64")?;
    multiple("num_experts", config.num_experts, 4, "a multiple of 4")?;
    let unsupported = |what, found: String, expected| Err(CudaError::Unsupported { what, found, expected });
    let spec = config.spec();
    for BlockSpec { attention, cross, feed_forward } in spec.encoder.blocks.iter().chain(&spec.decoder.blocks) {
        for attention in std::iter::once(attention).chain(cross) {
            multiple("heads * width of a head", attention.inner(), 128, "a multiple of 128")?;
            multiple("width of a head", attention.head_dim, 32, "a multiple of 32")?;
            if attention.has_output_bias {
                return unsupported("bias of attention's output", "one".to_owned(), "none");
            }
        }
        let width = match feed_forward {
            FeedForwardSpec::Dense { d_ff, .. } => Some(*d_ff),
            FeedForwardSpec::Moe { shared, .. } => shared.map(|shared| shared.d_ff),
        };
        if let Some(width) = width {
            multiple("width of a dense feed-forward", width, 128, "a multiple of 128")?;
        }
    }
    if config.d_kv > 128 {
        return unsupported("d_kv", config.d_kv.to_string(), "at most 128");
    }
    if config.num_experts > 1024 {
        return unsupported("num_experts", config.num_experts.to_string(), "at most 1024");
    }
    if config.top_k > TOP_K_MAX {
        return unsupported("experts of a token", config.top_k.to_string(), "at most 32");
    }
    if config.router_bias {
        return unsupported("bias of the router", "one".to_owned(), "none");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Weights would differ between the CPU's model and the device's.
    #[test]
    fn values_are_converted_once_and_rightly() {
        let values = [1.0_f32, -2.5, 3.0e-5, 65504.0];
        let half: Vec<u8> = values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect();
        let mut wide = Vec::new();
        convert(StoredDType::F16, &half, Precision::F32, &mut wide);
        assert_eq!(StoredDType::F32.widen(&wide), StoredDType::F16.widen(&half));
        let mut narrow = Vec::new();
        convert(StoredDType::F32, cast_slice(&values), Precision::Bf16, &mut narrow);
        let expected: Vec<f32> = values.iter().map(|&v| bf16::from_f32(v).to_f32()).collect();
        assert_eq!(StoredDType::BF16.widen(&narrow), expected);
    }
}
