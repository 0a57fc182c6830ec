//! The backbone's weights on the device: read from a checkpoint tensor by tensor, in the precision of the model, norms,
//! biases and routers in float32. Made once, by [`super::DeviceModel`].

use std::sync::Arc;

use half::bf16;
use sida_routing::LayerId;

use super::{
    device::{DeviceMemory, Gpu},
    error::CudaError,
};
use crate::{
    Checkpoint, ModelConfig, ModelError, Precision, Stack, StoredDType, encoder, names, position_bias::PositionBias,
};

/// W, row-major (outputs, inputs).
#[derive(Debug)]
pub(super) struct Matrix {
    memory: DeviceMemory,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

impl Matrix {
    pub(super) fn address(&self) -> u64 {
        self.memory.address()
    }
}

/// The weight of a norm (d_model), float32.
#[derive(Debug)]
pub(super) struct NormWeight(DeviceMemory);

impl NormWeight {
    pub(super) fn address(&self) -> u64 {
        self.0.address()
    }
}

/// Attention of a stack to itself.
#[derive(Debug)]
pub(super) struct SelfAttention {
    pub(super) norm: NormWeight,
    /// (3 * inner, d_model): q, k and v as one product.
    pub(super) qkv: Matrix,
    /// (d_model, inner)
    pub(super) output: Matrix,
}

/// Attention of the decoder to the encoder's output.
#[derive(Debug)]
pub(super) struct CrossAttention {
    pub(super) norm: NormWeight,
    /// (inner, d_model)
    pub(super) query: Matrix,
    /// (2 * inner, d_model): k and v as one product.
    pub(super) kv: Matrix,
    /// (d_model, inner)
    pub(super) output: Matrix,
}

/// What a block does after attention.
#[derive(Debug)]
pub(super) enum FeedForward {
    /// The same matrices for every row: (d_ff, d_model) and (d_model, d_ff).
    Dense { norm: NormWeight, wi: Matrix, wo: Matrix },
    /// Experts; the router is (experts, d_model) in float32.
    Moe { layer: LayerId, norm: NormWeight, router: Matrix },
}

/// One block. The encoder's have no cross-attention.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) attention: SelfAttention,
    pub(super) cross: Option<CrossAttention>,
    pub(super) feed_forward: FeedForward,
}

/// All blocks of a stack, and what is around them.
#[derive(Debug)]
pub(super) struct StackWeights {
    /// (vocab_size, d_model)
    pub(super) embedding: Arc<Matrix>,
    pub(super) blocks: Vec<Block>,
    pub(super) final_norm: NormWeight,
    bias: DeviceMemory,
}

impl StackWeights {
    /// (heads, 2 * reach + 1), float32: see [`PositionBias`].
    pub(super) fn bias_address(&self) -> u64 {
        self.bias.address()
    }
}

/// Everything but the experts.
#[derive(Debug)]
pub(super) struct DeviceBackbone {
    pub(super) encoder: StackWeights,
    pub(super) decoder: StackWeights,
    /// (vocab_size, d_model)
    pub(super) head: Arc<Matrix>,
    /// What hidden states are multiplied by before the head.
    pub(super) head_scale: f32,
    /// Bytes on the device.
    pub(super) bytes: u64,
}

impl DeviceBackbone {
    /// Copies the weights to the device.
    pub(super) fn load(gpu: &Gpu, checkpoint: &Checkpoint, precision: Precision) -> Result<Self, CudaError> {
        let config = checkpoint.config();
        let mut loader = Loader { gpu, checkpoint, precision, bytes: 0 };
        let [encoder_name, decoder_name] =
            [Stack::Encoder, Stack::Decoder].map(|stack| names::embedding(checkpoint, stack));
        let (vocab_size, d_model) = (config.vocab_size, config.d_model);
        let encoder_embedding = Arc::new(loader.matrix(&[&encoder_name], vocab_size, d_model)?);
        let decoder_embedding = match decoder_name == encoder_name {
            true => encoder_embedding.clone(),
            false => Arc::new(loader.matrix(&[&decoder_name], vocab_size, d_model)?),
        };
        let (head, head_scale) = match config.tie_word_embeddings {
            true => (decoder_embedding.clone(), (d_model as f64).powf(-0.5) as f32),
            false => (Arc::new(loader.matrix(&[names::LM_HEAD], vocab_size, d_model)?), 1.0),
        };
        let encoder = loader.stack(Stack::Encoder, encoder_embedding)?;
        let decoder = loader.stack(Stack::Decoder, decoder_embedding)?;
        let bytes = loader.bytes;
        Ok(Self { encoder, decoder, head, head_scale, bytes })
    }
}

struct Loader<'a> {
    gpu: &'a Gpu,
    checkpoint: &'a Checkpoint,
    precision: Precision,
    bytes: u64,
}

impl Loader<'_> {
    fn config(&self) -> &ModelConfig {
        self.checkpoint.config()
    }

    fn stack(&mut self, stack: Stack, embedding: Arc<Matrix>) -> Result<StackWeights, CudaError> {
        let layers = encoder::moe_ids(self.config(), stack);
        let blocks = layers.into_iter().enumerate().map(|(block, layer)| self.block(stack, block, layer));
        let blocks = blocks.collect::<Result<_, _>>()?;
        let bias = PositionBias::load(self.checkpoint, stack)?;
        let bias = self.gpu.allocate_with("position biases", plain_bytes(bias.by_distance()))?;
        Ok(StackWeights { embedding, blocks, final_norm: self.norm(&names::final_norm(stack))?, bias })
    }

    fn block(&mut self, stack: Stack, block: usize, layer: Option<LayerId>) -> Result<Block, CudaError> {
        let (d_model, inner) = (self.config().d_model, self.config().inner_dim());
        let name = |attention, projection| names::projection(stack, block, attention, projection);
        let own = names::Attention::SelfAttention;
        let qkv = ['q', 'k', 'v'].map(|projection| name(own, projection));
        let attention = SelfAttention {
            norm: self.norm(&names::attention_norm(stack, block, own))?,
            qkv: self.matrix(&qkv.each_ref().map(String::as_str), inner, d_model)?,
            output: self.matrix(&[&name(own, 'o')], d_model, inner)?,
        };
        let cross = match stack {
            Stack::Encoder => None,
            Stack::Decoder => {
                let cross = names::Attention::CrossAttention;
                Some(CrossAttention {
                    norm: self.norm(&names::attention_norm(stack, block, cross))?,
                    query: self.matrix(&[&name(cross, 'q')], inner, d_model)?,
                    kv: self.matrix(&[&name(cross, 'k'), &name(cross, 'v')], inner, d_model)?,
                    output: self.matrix(&[&name(cross, 'o')], d_model, inner)?,
                })
            }
        };
        Ok(Block { attention, cross, feed_forward: self.feed_forward(stack, block, layer)? })
    }

    fn feed_forward(&mut self, stack: Stack, block: usize, layer: Option<LayerId>) -> Result<FeedForward, CudaError> {
        let (d_model, d_ff, experts) = (self.config().d_model, self.config().d_ff, self.config().num_experts);
        let norm = self.norm(&names::feed_forward_norm(stack, block))?;
        Ok(match layer {
            None => FeedForward::Dense {
                norm,
                wi: self.matrix(&[&names::dense(stack, block, "wi")], d_ff, d_model)?,
                wo: self.matrix(&[&names::dense(stack, block, "wo")], d_model, d_ff)?,
            },
            Some(layer) => {
                let router = self.checkpoint.tensor_of_shape(&names::router(stack, block), &[experts, d_model])?;
                let values = router.dtype.widen(router.bytes);
                let memory = self.keep("routers", plain_bytes(&values))?;
                FeedForward::Moe { layer, norm, router: Matrix { memory, outputs: experts, inputs: d_model } }
            }
        })
    }

    /// Matrices [outputs, inputs] of one input, one below the other.
    fn matrix(&mut self, names: &[&str], outputs: usize, inputs: usize) -> Result<Matrix, CudaError> {
        let mut bytes = Vec::with_capacity(names.len() * outputs * inputs * self.precision.size());
        for name in names {
            let tensor = self.checkpoint.tensor_of_shape(name, &[outputs, inputs])?;
            convert(tensor.dtype, tensor.bytes, self.precision, &mut bytes);
            self.checkpoint.release(name);
        }
        let memory = self.keep("the backbone", &bytes)?;
        Ok(Matrix { memory, outputs: names.len() * outputs, inputs })
    }

    fn norm(&mut self, name: &str) -> Result<NormWeight, CudaError> {
        let tensor = self.checkpoint.tensor_of_shape(name, &[self.config().d_model])?;
        let values = tensor.dtype.widen(tensor.bytes);
        Ok(NormWeight(self.keep("norms", plain_bytes(&values))?))
    }

    fn keep(&mut self, what: &'static str, bytes: &[u8]) -> Result<DeviceMemory, CudaError> {
        self.bytes += bytes.len() as u64;
        self.gpu.allocate_with(what, bytes)
    }
}

/// The bytes of numbers.
pub(super) fn plain_bytes<V: Copy>(values: &[V]) -> &[u8] {
    // SAFETY: of numbers, and of structures of them without padding, every byte is initialised; bytes need no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The bytes of float32 numbers, to be written.
pub(super) fn plain_bytes_mut(values: &mut [f32]) -> &mut [u8] {
    // SAFETY: any bytes are such numbers; bytes need no alignment.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// Appends values stored as `dtype` as a model of `precision` keeps them: bf16 is rounded to nearest, even.
pub(super) fn convert(dtype: StoredDType, bytes: &[u8], precision: Precision, to: &mut Vec<u8>) {
    match (dtype, precision) {
        (StoredDType::BF16, Precision::Bf16) | (StoredDType::F32, Precision::F32) => to.extend_from_slice(bytes),
        (_, Precision::F32) => to.extend_from_slice(plain_bytes(&dtype.widen(bytes))),
        (_, Precision::Bf16) => {
            to.extend(dtype.widen(bytes).into_iter().flat_map(|value| bf16::from_f32(value).to_le_bytes()));
        }
    }
}

/// Refuses a model whose shapes the kernels do not take.
pub(super) fn check(config: &ModelConfig) -> Result<(), CudaError> {
    use crate::{ExpertKind, RouterKind, StackKind};
    let multiple = |what, value: usize, of: usize, expected| match value.is_multiple_of(of) && value > 0 {
        true => Ok(()),
        false => Err(CudaError::Unsupported { what, found: value.to_string(), expected }),
    };
    multiple("d_model", config.d_model, 128, "a multiple of 128")?;
    multiple("d_ff", config.d_ff, 128, "a multiple of 128")?;
    multiple("num_heads * d_kv", config.inner_dim(), 128, "a multiple of 128")?;
    multiple("d_kv", config.d_kv, 32, "a multiple of 32")?;
    multiple("vocab_size", config.vocab_size, 128, "a multiple of 128")?;
    multiple("num_experts", config.num_experts, 4, "a multiple of 4")?;
    let unsupported = |what, found: String, expected| Err(CudaError::Unsupported { what, found, expected });
    if config.d_kv > 128 {
        return unsupported("d_kv", config.d_kv.to_string(), "at most 128");
    }
    if config.num_experts > 1024 {
        return unsupported("num_experts", config.num_experts.to_string(), "at most 1024");
    }
    match (config.stack, config.expert_kind, config.router, config.router_bias) {
        (StackKind::EncoderDecoder, ExpertKind::Relu2, RouterKind::Top1, false) => Ok(()),
        found => unsupported("family", format!("{found:?}"), "an encoder and a decoder, ReLU experts, top-1 routers"),
    }
}

/// The error of a tensor that is missing is the model's.
impl From<candle_core::Error> for CudaError {
    fn from(error: candle_core::Error) -> Self {
        ModelError::from(error).into()
    }
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
        convert(StoredDType::F32, plain_bytes(&values), Precision::Bf16, &mut narrow);
        let expected: Vec<f32> = values.iter().map(|&v| bf16::from_f32(v).to_f32()).collect();
        assert_eq!(StoredDType::BF16.widen(&narrow), expected);
    }
}
