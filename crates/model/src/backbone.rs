//! Everything of a model but its experts: embedding, both stacks cut at their MoE layers, and the head.
//! Loaded once per process and shared; computing takes `&self`.

use std::sync::Arc;

use candle_core::Tensor;

use crate::{
    Checkpoint, ModelConfig, ModelError, Stack,
    decoder::Decoder,
    encoder::Encoder,
    linear::Linear,
    loader::Loader,
    names,
    tensor_rows::{from_rows, rows},
};

/// The dense part of a model.
#[derive(Debug)]
pub struct Backbone {
    config: ModelConfig,
    /// (vocab_size, d_model); the decoder's is the encoder's in most models.
    encoder_embedding: Arc<Linear>,
    decoder_embedding: Arc<Linear>,
    encoder: Encoder,
    decoder: Decoder,
    head: Head,
}

/// Hidden states to logits.
#[derive(Debug)]
struct Head {
    /// (vocab_size, d_model)
    weight: Arc<Linear>,
    /// What h is multiplied by: `d_model^-0.5` where the head is the embedding, which was not made for this.
    scale: f32,
}

impl Backbone {
    /// Copies the backbone's weights into memory, in the dtype they are stored in. `on_progress` gets bytes done
    /// and bytes in all.
    pub fn load(checkpoint: &Checkpoint, on_progress: &mut dyn FnMut(u64, u64)) -> Result<Self, ModelError> {
        let config = checkpoint.config().clone();
        let (vocab_size, d_model) = (config.vocab_size, config.d_model);
        let mut loader = Loader::new(checkpoint, on_progress)?;
        let [encoder_name, decoder_name] =
            [Stack::Encoder, Stack::Decoder].map(|stack| names::embedding(checkpoint, stack));
        let encoder_embedding = Arc::new(loader.linear(&encoder_name, vocab_size, d_model)?);
        let decoder_embedding = match decoder_name == encoder_name {
            true => encoder_embedding.clone(),
            false => Arc::new(loader.linear(&decoder_name, vocab_size, d_model)?),
        };
        let head = match config.tie_word_embeddings {
            true => Head { weight: decoder_embedding.clone(), scale: (d_model as f64).powf(-0.5) as f32 },
            false => Head { weight: Arc::new(loader.linear(names::LM_HEAD, vocab_size, d_model)?), scale: 1.0 },
        };
        let encoder = Encoder::load(&mut loader)?;
        let decoder = Decoder::load(&mut loader)?;
        loader.finish();
        Ok(Self { config, encoder_embedding, decoder_embedding, encoder, decoder, head })
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The embeddings of tokens: (ids.len(), d_model). Refuses ids outside the vocabulary.
    pub fn embed(&self, stack: Stack, ids: &[u32]) -> Result<Tensor, ModelError> {
        let embedding = match stack {
            Stack::Encoder => &self.encoder_embedding,
            Stack::Decoder => &self.decoder_embedding,
        };
        let matrix = embedding.matrix();
        let row_bytes = matrix.cols * matrix.dtype.size();
        let mut h = Vec::with_capacity(ids.len() * matrix.cols);
        for &id in ids {
            let row = (id as usize).checked_mul(row_bytes).and_then(|start| matrix.bytes.get(start..start + row_bytes));
            let row = row.ok_or(ModelError::TokenId { id, vocab_size: matrix.rows })?;
            matrix.dtype.widen_into(row, &mut h);
        }
        Ok(from_rows(h, matrix.cols)?)
    }

    /// The encoder.
    pub fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Scores of every token of the vocabulary: what [`Decoder::finish`] gave (n, d_model) -> (n, vocab_size).
    pub fn logits(&self, h: &Tensor) -> Result<Tensor, ModelError> {
        Ok(from_rows(rows(h, |h| self.logits_of(h))?, self.config.vocab_size)?)
    }

    /// As [`Backbone::logits`], of plain rows.
    pub fn logits_of(&self, h: &[f32]) -> Vec<f32> {
        let Head { weight, scale } = &self.head;
        if *scale == 1.0 {
            return weight.product(h);
        }
        weight.product(&h.iter().map(|h| h * scale).collect::<Vec<f32>>())
    }

    /// Bytes of weights it holds.
    pub fn bytes(&self) -> u64 {
        let mut linears = vec![&self.encoder_embedding, &self.decoder_embedding, &self.head.weight];
        linears.dedup_by(|a, b| Arc::ptr_eq(a, b));
        let dense: usize = linears.iter().map(|linear| linear.bytes()).sum();
        (dense + self.encoder.bytes() + self.decoder.bytes()) as u64
    }
}
