//! What kind of model a predictor is for, as far as its file says: told beside what the model at hand has where the two are not the
//! same, since of two digests nobody sees what is different.

use std::fmt;

use safetensors::tensor::Metadata;

use crate::PredictorShape;

/// What can be told of a model without its files. `None`: it is not known, or there is no such thing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MadeFor {
    moe_layers: usize,
    /// Of each MoE layer.
    num_experts: Option<usize>,
    vocab_size: Option<usize>,
    encoder_width: Option<usize>,
}

impl MadeFor {
    /// What the shapes of a predictor's tensors tell, which need not fit each other: nothing of the file is checked yet.
    /// `moe_layers` is what its hit rates speak of.
    pub(crate) fn of_file(header: &Metadata, moe_layers: usize) -> Self {
        let extent = |tensor: &str, at: usize| header.info(tensor).and_then(|info| info.shape.get(at)).copied();
        let either = |part: &str| ["encoder", "decoder"].map(|stack| extent(&format!("{stack}.{part}"), 0));
        // Each stack's has a row for every expert of every layer.
        let heads: Option<usize> = either("head").into_iter().flatten().reduce(usize::saturating_add);
        Self {
            moe_layers,
            num_experts: heads.and_then(|rows| rows.checked_div(moe_layers)),
            vocab_size: either("tokens").into_iter().flatten().next(),
            encoder_width: extent("decoder.input.keys", 2),
        }
    }
}

impl From<&PredictorShape> for MadeFor {
    fn from(shape: &PredictorShape) -> Self {
        Self {
            moe_layers: shape.encoder_layers.len() + shape.decoder_layers.len(),
            num_experts: Some(shape.num_experts),
            vocab_size: Some(shape.vocab_size),
            encoder_width: shape.encoder_width,
        }
    }
}

impl fmt::Display for MadeFor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            Some(format!("{} MoE layers", self.moe_layers)),
            self.num_experts.map(|experts| format!("{experts} experts in each")),
            self.vocab_size.map(|tokens| format!("{tokens} tokens")),
            self.encoder_width.map(|width| format!("an encoder of width {width}")),
        ];
        f.write_str(&parts.into_iter().flatten().collect::<Vec<_>>().join(", "))
    }
}
