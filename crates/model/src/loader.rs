//! The backbone's weights in the host's memory: read out of a checkpoint, with progress, in the dtype they are stored
//! in. Bytes are copied, so the pages they were mapped from are given back.

use sida_kernels::position_bias::PositionBias;

use crate::{
    Backbone, Checkpoint, ModelError, Stack,
    backbone::{Load, Memory},
    linear::Linear,
    names,
};

/// The host's memory.
#[derive(Debug)]
pub struct Host;

impl Memory for Host {
    type Matrix = Linear;
    type Vector = Vec<f32>;
    type Bias = PositionBias;
}

impl Backbone<Host> {
    /// Copies the backbone's weights into memory. `on_progress` gets bytes done and bytes in all.
    pub fn load(checkpoint: &Checkpoint, on_progress: &mut dyn FnMut(u64, u64)) -> Result<Self, ModelError> {
        let mut total = 0;
        for name in checkpoint.names().filter(|name| !names::is_expert(name)) {
            total += checkpoint.describe(name)?.2 as u64;
        }
        let backbone = Self::load_with(&mut HostLoader { checkpoint, on_progress, done: 0, total })?;
        // Whatever was counted and not needed (copies of the embedding) is done, too.
        on_progress(total, total);
        Ok(backbone)
    }

    /// The embeddings of tokens: (ids.len(), d_model). Refuses ids outside the vocabulary.
    pub fn embed(&self, stack: Stack, ids: &[u32]) -> Result<Vec<f32>, ModelError> {
        self.check_ids(ids)?;
        let mut h = vec![0.0; ids.len() * self.spec.d_model];
        self.stack(stack).embedding.gather(ids, &mut h);
        Ok(h)
    }
}

/// Copies tensors of one checkpoint and counts the bytes of those that are no expert's.
struct HostLoader<'a> {
    checkpoint: &'a Checkpoint,
    on_progress: &'a mut dyn FnMut(u64, u64),
    done: u64,
    total: u64,
}

impl Load for HostLoader<'_> {
    type Memory = Host;
    type Error = ModelError;

    fn checkpoint(&self) -> &Checkpoint {
        self.checkpoint
    }

    /// What is stored alike becomes one part.
    fn matrix(&mut self, parts: &[(String, usize)], inputs: usize) -> Result<Linear, ModelError> {
        let tensors = parts.iter().map(|(name, outputs)| self.checkpoint.tensor_of_shape(name, &[*outputs, inputs]));
        let tensors = tensors.collect::<Result<Vec<_>, _>>()?;
        let mut linear = Linear::new(inputs);
        for alike in tensors.chunk_by(|a, b| a.dtype == b.dtype) {
            let bytes: Vec<&[u8]> = alike.iter().map(|tensor| tensor.bytes).collect();
            let outputs = alike.iter().map(|tensor| tensor.shape[0]).sum();
            linear.push(bytes.concat(), alike[0].dtype, outputs);
        }
        parts.iter().for_each(|(name, _)| self.loaded(name));
        Ok(linear)
    }

    fn router(&mut self, name: String, experts: usize, d_model: usize) -> Result<Linear, ModelError> {
        self.matrix(&[(name, experts)], d_model)
    }

    fn vector(&mut self, name: &str, width: usize) -> Result<Vec<f32>, ModelError> {
        let tensor = self.checkpoint.tensor_of_shape(name, &[width])?;
        let values = tensor.dtype.widen(tensor.bytes);
        self.loaded(name);
        Ok(values)
    }

    fn vectors(&mut self, parts: &[(String, usize)]) -> Result<Vec<f32>, ModelError> {
        let vectors = parts.iter().map(|(name, width)| self.vector(name, *width));
        Ok(vectors.collect::<Result<Vec<_>, _>>()?.concat())
    }

    fn bias(&mut self, bias: PositionBias) -> Result<PositionBias, ModelError> {
        Ok(bias)
    }
}

impl HostLoader<'_> {
    fn loaded(&mut self, name: &str) {
        self.done += self.checkpoint.describe(name).map_or(0, |(_, _, bytes)| bytes as u64);
        self.checkpoint.release(name);
        (self.on_progress)(self.done, self.total);
    }
}
