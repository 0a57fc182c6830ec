//! Reads the backbone's tensors out of a checkpoint, with progress. Bytes are copied as stored, so the pages
//! they were mapped from are given back.

use crate::{Checkpoint, ModelError, StoredDType, linear::Linear, names, norm::Norm};

/// Copies tensors of one checkpoint and counts their bytes.
pub(crate) struct Loader<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    on_progress: &'a mut dyn FnMut(u64, u64),
    done: u64,
    total: u64,
}

impl<'a> Loader<'a> {
    /// `on_progress` gets the bytes done and the bytes of all tensors that are no expert's.
    pub(crate) fn new(
        checkpoint: &'a Checkpoint,
        on_progress: &'a mut dyn FnMut(u64, u64),
    ) -> Result<Self, ModelError> {
        let mut total = 0;
        for name in checkpoint.names().filter(|name| !names::is_expert(name)) {
            total += checkpoint.describe(name)?.2 as u64;
        }
        Ok(Self { checkpoint, on_progress, done: 0, total })
    }

    /// A matrix [outputs, inputs].
    pub(crate) fn linear(&mut self, name: &str, outputs: usize, inputs: usize) -> Result<Linear, ModelError> {
        self.fused(&[name.to_owned()], outputs, inputs)
    }

    /// Matrices [outputs, inputs] of one input, one below the other: their products are one product.
    /// Where their dtypes differ all become float32.
    pub(crate) fn fused(&mut self, names: &[String], outputs: usize, inputs: usize) -> Result<Linear, ModelError> {
        let tensors = names
            .iter()
            .map(|name| self.checkpoint.tensor_of_shape(name, &[outputs, inputs]))
            .collect::<Result<Vec<_>, _>>()?;
        let one = tensors[0].dtype;
        let dtype = if tensors.iter().all(|tensor| tensor.dtype == one) { one } else { StoredDType::F32 };
        let mut bytes = Vec::with_capacity(tensors.len() * outputs * inputs * dtype.size());
        for tensor in &tensors {
            tensor.append_to(dtype, &mut bytes);
        }
        names.iter().for_each(|name| self.loaded(name));
        Ok(Linear::new(bytes, dtype, tensors.len() * outputs, inputs))
    }

    /// A vector, widened.
    pub(crate) fn vector(&mut self, name: &str, width: usize) -> Result<Vec<f32>, ModelError> {
        let tensor = self.checkpoint.tensor_of_shape(name, &[width])?;
        let values = tensor.dtype.widen(tensor.bytes);
        self.loaded(name);
        Ok(values)
    }

    /// A norm of hidden states.
    pub(crate) fn norm(&mut self, name: &str) -> Result<Norm, ModelError> {
        let config = self.checkpoint.config();
        Ok(Norm::new(self.vector(name, config.d_model)?, config.layer_norm_epsilon as f32))
    }

    /// Whatever was counted and not needed (copies of the embedding) is done, too.
    pub(crate) fn finish(self) {
        (self.on_progress)(self.total, self.total);
    }

    fn loaded(&mut self, name: &str) {
        self.done += self.checkpoint.describe(name).map_or(0, |(_, _, bytes)| bytes as u64);
        self.checkpoint.release(name);
        (self.on_progress)(self.done, self.total);
    }
}
