//! The names of a state dictionary's tensors against those that a model is loaded by. What wraps a model for training
//! puts its own name before all of them; that is taken off. Then every tensor that the model needs must be there: a
//! directory that cannot be loaded is not written. Called by [`super`].

use std::collections::BTreeMap;

use sida_routing::{ExpertId, ExpertKey, LayerId};

use super::ConvertError;
use crate::{ModelConfig, ModelError, Stack, names, names::Attention, shards::TensorSpec};

/// What wrappers put before a name: DistributedDataParallel, `torch.compile`, and modules that hold the model as a field.
/// No tensor of a model begins with one of them.
const PREFIXES: [&str; 4] = ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "model."];

/// The stored name of each tensor by the one it is loaded by, and how often each prefix was taken off.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Renamed {
    pub(super) stored: BTreeMap<String, String>,
    pub(super) dropped: BTreeMap<String, usize>,
}

/// Takes prefixes off. Refuses two tensors that would get one name.
pub(super) fn renamed<'a>(stored: impl Iterator<Item = &'a String>) -> Result<Renamed, ConvertError> {
    let mut renamed = Renamed::default();
    for name in stored {
        let plain = without_prefixes(name);
        if plain.len() < name.len() {
            *renamed.dropped.entry(name[..name.len() - plain.len()].to_owned()).or_default() += 1;
        }
        if let Some(first) = renamed.stored.insert(plain.to_owned(), name.clone()) {
            return Err(ConvertError::TwoOfOneName { plain: plain.to_owned(), first, second: name.clone() });
        }
    }
    Ok(renamed)
}

fn without_prefixes(mut name: &str) -> &str {
    while let Some(rest) = PREFIXES.iter().find_map(|&prefix| name.strip_prefix(prefix)) {
        name = rest;
    }
    name
}

/// Refuses a set of tensors that a model of this config could not be loaded from: the error names the first that is
/// missing or of another shape. `others` are tensors that are there, but hold no weights, with what they hold.
pub(super) fn check(
    config: &ModelConfig,
    specs: &[TensorSpec],
    others: &BTreeMap<String, &'static str>,
    dir: &std::path::Path,
) -> Result<(), ModelError> {
    let found: BTreeMap<&str, &[usize]> = specs.iter().map(|spec| (spec.name.as_str(), &*spec.shape)).collect();
    let missing = |tensor: String| match others.get(&tensor) {
        Some(&found) => {
            let (expected, found) = ("float32, bfloat16 or float16".to_owned(), found.to_owned());
            ModelError::TensorDType { tensor, expected, found }
        }
        None => ModelError::TensorMissing { dir: dir.to_owned(), tensor },
    };
    for (tensor, shape) in required(config) {
        match found.get(tensor.as_str()) {
            Some(&found) if found == shape => {}
            Some(&found) => return Err(ModelError::TensorShape { tensor, expected: shape, found: found.to_vec() }),
            None => return Err(missing(tensor)),
        }
    }
    // Which copies of the embedding a file holds varies; one is enough.
    let has_embedding = names::tied().iter().any(|name| found.contains_key(&**name));
    if has_embedding { Ok(()) } else { Err(missing(names::SHARED.to_owned())) }
}

/// What every model of this config has but its embeddings, each with its shape.
fn required(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (d_model, inner, mut moe_layer) = (config.d_model, config.inner_dim(), 0);
    let mut all = Vec::new();
    for stack in [Stack::Encoder, Stack::Decoder] {
        let attentions = match stack {
            Stack::Encoder => &[Attention::SelfAttention][..],
            Stack::Decoder => &[Attention::SelfAttention, Attention::CrossAttention],
        };
        all.push((names::final_norm(stack), vec![d_model]));
        if !config.sparse(stack).is_empty() {
            all.push((names::position_bias(stack), vec![config.relative_attention_num_buckets, config.num_heads]));
        }
        for (block, &is_sparse) in config.sparse(stack).iter().enumerate() {
            for &attention in attentions {
                all.push((names::attention_norm(stack, block, attention), vec![d_model]));
                for (projection, shape) in [('q', [inner, d_model]), ('k', [inner, d_model]), ('v', [inner, d_model])] {
                    all.push((names::projection(stack, block, attention, projection), shape.to_vec()));
                }
                all.push((names::projection(stack, block, attention, 'o'), vec![d_model, inner]));
            }
            all.push((names::feed_forward_norm(stack, block), vec![d_model]));
            if is_sparse {
                all.push((names::router(stack, block), vec![config.num_experts, d_model]));
                all.extend(config.router_bias.then(|| (names::router_bias(stack, block), vec![config.num_experts])));
                for expert in 0..config.num_experts as u16 {
                    let key = ExpertKey { layer: LayerId(moe_layer), expert: ExpertId(expert) };
                    all.extend(names::expert(config, key).into_iter().map(|(name, shape)| (name, shape.to_vec())));
                }
                moe_layer += 1;
            } else {
                all.push((names::dense(stack, block, "wi"), vec![config.d_ff, d_model]));
                all.push((names::dense(stack, block, "wo"), vec![d_model, config.d_ff]));
            }
        }
    }
    if !config.tie_word_embeddings {
        all.push((names::LM_HEAD.to_owned(), vec![config.vocab_size, d_model]));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_of_wrappers_are_taken_off() {
        // Broken: a model saved by a training run would be converted into one that cannot be loaded.
        for (stored, expected) in [
            ("shared.weight", "shared.weight"),
            ("module.shared.weight", "shared.weight"),
            ("module._orig_mod.model.lm_head.weight", "lm_head.weight"),
            ("modules.shared.weight", "modules.shared.weight"),
            ("encoder.module.weight", "encoder.module.weight"),
        ] {
            assert_eq!(without_prefixes(stored), expected);
        }
        let stored = ["module.a".to_owned(), "module.b".to_owned(), "c".to_owned()];
        let renamed = renamed(stored.iter()).unwrap();
        assert_eq!(renamed.dropped, BTreeMap::from([("module.".to_owned(), 2)]));
        assert_eq!(renamed.stored["b"], "module.b");
    }

    #[test]
    fn two_tensors_never_become_one() {
        // Broken: which of two copies of a weight is kept would be a matter of order.
        let stored = ["a".to_owned(), "module.a".to_owned()];
        let error = renamed(stored.iter()).unwrap_err().to_string();
        assert!(error.contains("module.a"), "{error}");
    }

    #[test]
    fn a_real_model_has_what_is_required() {
        // Broken: a checkpoint that can be loaded would be refused.
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/switch-tiny-64");
        let checkpoint = crate::Checkpoint::open(&dir).unwrap();
        for (name, shape) in required(checkpoint.config()) {
            checkpoint.check_shape(&name, &shape).unwrap();
        }
    }
}
