//! The names of a state dictionary's tensors against those that a model is loaded by. What wraps a model for training
//! puts its own name before all of them; that is taken off. Then every tensor that the model needs must be there: a
//! directory that cannot be loaded is not written. Called by [`super`].

use std::collections::BTreeMap;

use sida_routing::{ExpertId, ExpertKey};

use super::ConvertError;
use crate::{
    ModelConfig, ModelError, Stack,
    names::{self, Attention, ExpertPart, TensorNames, position_bias},
    shards::TensorSpec,
    spec::{BlockSpec, FeedForwardSpec, QkNorm, SharedSpec, StackSpec},
};

/// What wrappers put before a name: DistributedDataParallel, `torch.compile`, and modules that hold the model as a field.
/// No tensor of a model begins with one of them, but for those of decoder-only models with the last.
const PREFIXES: [&str; 4] = ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "model."];

/// The stored name of each tensor by the one it is loaded by, and how often each prefix was taken off.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Renamed {
    pub(super) stored: BTreeMap<String, String>,
    pub(super) dropped: BTreeMap<String, usize>,
}

/// Takes prefixes off. Refuses two tensors that would get one name.
pub(super) fn renamed<'a>(
    stored: impl Iterator<Item = &'a String>,
    names: TensorNames,
) -> Result<Renamed, ConvertError> {
    let mut renamed = Renamed::default();
    for name in stored {
        let plain = without_prefixes(name, names);
        if plain.len() < name.len() {
            *renamed.dropped.entry(name[..name.len() - plain.len()].to_owned()).or_default() += 1;
        }
        if let Some(first) = renamed.stored.insert(plain.to_owned(), name.clone()) {
            return Err(ConvertError::TwoOfOneName { plain: plain.to_owned(), first, second: name.clone() });
        }
    }
    Ok(renamed)
}

fn without_prefixes(mut name: &str, names: TensorNames) -> &str {
    let is_own = |name: &str| names != TensorNames::Switch && (name.starts_with("model.") || name == names::LM_HEAD);
    let strip = |name: &'_ str| PREFIXES.iter().find_map(|&prefix| name.strip_prefix(prefix).map(str::len));
    while let Some(rest) = strip(name).map(|length| &name[name.len() - length..]) {
        if is_own(name) && !is_own(rest) {
            break;
        }
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
    for (tensor, shape) in required(config, |name| found.contains_key(name)) {
        match found.get(tensor.as_str()) {
            Some(&found) if found == shape => {}
            Some(&found) => return Err(ModelError::TensorShape { tensor, expected: shape, found: found.to_vec() }),
            None => return Err(missing(tensor)),
        }
    }
    // Which copies of the embedding a file holds varies; one is enough.
    let embeddings = config.names.tied();
    let of_stacks = if config.tie_word_embeddings { &embeddings[..] } else { &embeddings[..3] };
    let expected = [config.vocab_size, config.d_model];
    match of_stacks.iter().find_map(|name| Some((name, *found.get(&**name)?))) {
        Some((_, found)) if found == expected => Ok(()),
        Some((tensor, found)) => {
            let (tensor, expected, found) = (tensor.clone(), expected.to_vec(), found.to_vec());
            Err(ModelError::TensorShape { tensor, expected, found })
        }
        None => Err(missing(embeddings[0].clone())),
    }
}

/// What every model of this config has but its embeddings, each with its shape. `found`: what is there.
pub(super) fn required(config: &ModelConfig, found: impl Fn(&str) -> bool) -> Vec<(String, Vec<usize>)> {
    use Attention::{CrossAttention, SelfAttention};
    let (spec, names, d_model) = (config.spec(), config.names, config.d_model);
    let mut all = Vec::new();
    for stack in [Stack::Encoder, Stack::Decoder] {
        let StackSpec { positions, blocks } = spec.stack(stack);
        if blocks.is_empty() {
            continue;
        }
        all.push((names.final_norm(stack), vec![d_model]));
        all.extend(positions.map(|positions| (position_bias(stack), vec![positions.buckets, config.num_heads])));
        for (block, BlockSpec { attention, cross, feed_forward }) in blocks.iter().enumerate() {
            for (which, spec) in [(SelfAttention, Some(attention)), (CrossAttention, cross.as_ref())] {
                let Some(spec) = spec else { continue };
                let (inner, kv_inner) = (spec.inner(), spec.kv_inner());
                all.push((names.attention_norm(stack, block, which), vec![d_model]));
                for (of, width) in [('q', inner), ('k', kv_inner), ('v', kv_inner)] {
                    all.push((names.projection(stack, block, which, of), vec![width, d_model]));
                    all.extend(spec.has_bias.then(|| (names.projection_bias(stack, block, which, of), vec![width])));
                }
                all.push((names.projection(stack, block, which, 'o'), vec![d_model, inner]));
                let bias = || (names.projection_bias(stack, block, which, 'o'), vec![d_model]);
                all.extend(spec.has_output_bias.then(bias));
                let norms = match spec.qk_norm {
                    QkNorm::None => None,
                    QkNorm::Heads => Some([spec.head_dim; 2]),
                    QkNorm::Rows => Some([inner, kv_inner]),
                };
                all.extend(
                    norms
                        .into_iter()
                        .flatten()
                        .zip(['q', 'k'])
                        .map(|(width, of)| (names.qk_norm(block, of), vec![width])),
                );
            }
            all.push((names.feed_forward_norm(stack, block), vec![d_model]));
            let matrices = |names: Vec<String>, d_ff: usize| {
                let last = names.len() - 1;
                let shape = move |at| if at == last { vec![d_model, d_ff] } else { vec![d_ff, d_model] };
                names.into_iter().enumerate().map(move |(at, name)| (name, shape(at)))
            };
            match *feed_forward {
                FeedForwardSpec::Dense { d_ff, .. } => all.extend(matrices(names.dense(stack, block), d_ff)),
                FeedForwardSpec::Moe { layer, experts, router, shared } => {
                    all.push((names.router(stack, block), vec![experts, d_model]));
                    all.extend(router.has_bias.then(|| (names.router_bias(stack, block), vec![experts])));
                    if let Some(SharedSpec { d_ff, is_gated }) = shared {
                        all.extend(matrices(names.shared(block), d_ff));
                        all.extend(is_gated.then(|| (names.shared_gate(block), vec![1, d_model])));
                    }
                    for expert in (0..experts as u16).map(ExpertId) {
                        let stacked = names.stacked(config, ExpertKey { layer, expert });
                        let parts = match stacked.iter().any(|part| found(&part.tensor)) {
                            true => stacked,
                            false => names.expert(config, ExpertKey { layer, expert }),
                        };
                        all.extend(parts.into_iter().map(|ExpertPart { tensor, shape, .. }| (tensor, shape)));
                    }
                }
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
            assert_eq!(without_prefixes(stored, TensorNames::Switch), expected);
        }
        let causal = TensorNames::Causal { moe: "mlp", expert: [""; 3] };
        for (stored, expected) in [
            ("model.norm.weight", "model.norm.weight"),
            ("module.model.norm.weight", "model.norm.weight"),
            ("model.model.norm.weight", "model.norm.weight"),
            ("model.lm_head.weight", "lm_head.weight"),
        ] {
            assert_eq!(without_prefixes(stored, causal), expected);
        }
        let stored = ["module.a".to_owned(), "module.b".to_owned(), "c".to_owned()];
        let renamed = renamed(stored.iter(), TensorNames::Switch).unwrap();
        assert_eq!(renamed.dropped, BTreeMap::from([("module.".to_owned(), 2)]));
        assert_eq!(renamed.stored["b"], "module.b");
    }

    #[test]
    fn two_tensors_never_become_one() {
        // Broken: which of two copies of a weight is kept would be a matter of order.
        let stored = ["a".to_owned(), "module.a".to_owned()];
        let error = renamed(stored.iter(), TensorNames::Switch).unwrap_err().to_string();
        assert!(error.contains("module.a"), "{error}");
    }

    #[test]
    fn a_real_model_has_what_is_required() {
        // Broken: a checkpoint that can be loaded would be refused.
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/switch-tiny-64");
        let checkpoint = crate::Checkpoint::open(&dir).unwrap();
        for (name, shape) in required(checkpoint.config(), |name| checkpoint.contains(name)) {
            checkpoint.check_shape(&name, &shape).unwrap();
        }
    }
}
