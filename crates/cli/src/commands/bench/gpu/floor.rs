//! How fast a batch could be: the bytes of weights that it must read once, at the rate at which the device was seen to
//! move bytes. Arithmetic, activations and caches come on top and are less at the sizes measured here.

use sida_model::cuda::{Ceilings, DeviceModel};

use super::{inputs::Inputs, settings::Method, turn::Routed};

/// Seconds, the mean over the batches of an input.
pub(super) fn of(model: &DeviceModel, input: &Inputs, routed: &Routed, ceilings: Ceilings) -> f64 {
    let config = model.config();
    let expert_bytes = model.expert_bytes().0 as f64;
    let value = expert_bytes / (2 * config.d_model * config.d_ff) as f64;
    let square = (config.d_model * config.inner_dim()) as f64;
    let dense = 2.0 * (config.d_model * config.d_ff) as f64;
    let dense_blocks = |sparse: &[bool]| sparse.iter().filter(|&&sparse| !sparse).count() as f64;
    let encoder_layers = usize::from(config.moe_layers(sida_model::Stack::Encoder).end);
    let encoder = 4.0 * square * config.encoder_layers as f64 + dense * dense_blocks(&config.encoder_sparse);
    let mut bytes = encoder * value;
    let experts = |layers: std::ops::Range<usize>| -> f64 {
        let used =
            |batch: &Vec<Vec<u16>>| -> usize { layers.clone().map(|layer| batch.get(layer).map_or(0, Vec::len)).sum() };
        routed.iter().map(used).sum::<usize>() as f64 / routed.len() as f64 * expert_bytes
    };
    bytes += experts(0..encoder_layers);
    if let Method::Generate(new_tokens) = input.case.method {
        // A step reads the decoder and the head; of the experts at least one a layer, and all it ever used once.
        let head = (config.vocab_size * config.d_model) as f64;
        let step = 6.0 * square * config.decoder_layers as f64 + dense * dense_blocks(&config.decoder_sparse) + head;
        let cross = 2.0 * square * config.decoder_layers as f64;
        let layers = config.moe_layer_count() - encoder_layers;
        bytes += (step * value + layers as f64 * expert_bytes) * new_tokens as f64 + cross * value;
    }
    bytes / ceilings.copy_bytes_per_s
}
