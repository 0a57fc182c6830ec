//! Checkpoints of published shapes with random weights, for load and speed tests: what they answer is noise,
//! but they load, route and compute as the real ones do. Called by `sida synth` and by tests, which make
//! small shapes of their own.
//!
//! In reading order: `shape` (what tensors there are), `causal` (the same of decoder-only models), `random` (seeded normal values, fast), `vocabulary` (a tokenizer that
//! fits), `zipf` (what makes some experts hot).

mod causal;
mod random;
mod shape;
mod vocabulary;
mod zipf;

use std::{
    collections::HashMap,
    io::{self, Write},
    path::Path,
};

use thiserror::Error;

pub use self::{
    causal::CausalShape,
    shape::{SwitchShape, SynthShape, published},
};
use self::{
    random::{Normal, Signs, StreamSeed},
    shape::{Fill, Weight},
};
use crate::{
    BlockFormats, ModelError, blocks,
    config::CONFIG,
    fresh_directory::FreshDirectory,
    shards::{self, TensorSpec},
};

/// Why a checkpoint cannot be made.
#[derive(Debug, Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum SynthError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("{found} is no known shape, expected one of {}", published().collect::<Vec<_>>().join(", "))]
    Shape { found: String },
    #[error("experts of decoder-only shapes are chosen evenly: a skew can be had of Switch Transformers only")]
    NoSkew,
    #[error(
        "Switch Transformers have the blocks of their shape: a number of them can be had of decoder-only models only"
    )]
    NoBlocks,
    #[error("{found} blocks, expected 1 to the {max} of the shape")]
    Blocks { found: usize, max: usize },
    #[error("a vocabulary of {found} is outside {min} to {max}")]
    Vocabulary { found: usize, min: usize, max: usize },
    #[error("skew is {found}, expected 0 to {max}")]
    Skew { found: f64, max: f64 },
}

/// Beyond this one expert takes nearly all tokens.
const SKEW_MAX: f64 = 4.0;

/// Writes a checkpoint of `shape` into `out`, which must not exist or be empty: config.json, tokenizer.json
/// and bf16 safetensors (routers in f32) of at most 4 GB each. The same shape, seed and skew give the same
/// bytes, whatever the number of threads. With `skew` s, the experts of every MoE layer get tokens as 1 / rank^s
/// (Zipf's law), each layer's in an order of their own; without, roughly evenly. Memory stays at a few MB.
/// Reports (bytes written, bytes total), and returns the bytes of all tensors.
pub fn synth(
    shape: &SynthShape,
    out: &Path,
    seed: u64,
    skew: Option<f64>,
    formats: BlockFormats,
    on_progress: &mut dyn FnMut(u64, u64),
) -> Result<u64, SynthError> {
    let skew = skew.unwrap_or(0.0);
    if !(0.0..=SKEW_MAX).contains(&skew) {
        return Err(SynthError::Skew { found: skew, max: SKEW_MAX });
    }
    let (weights, biases) = match shape {
        SynthShape::Switch(switch) if skew > 0.0 => {
            (zipf::adapted(shape.weights()), zipf::biases(switch.num_experts, skew))
        }
        SynthShape::Causal(_) if skew > 0.0 => return Err(SynthError::NoSkew),
        _ => (shape.weights(), Vec::new()),
    };
    let tokenizer = vocabulary::tokenizer(shape.vocab_size(), matches!(shape, SynthShape::Switch(_)))?;
    let specs = weights.iter().map(|weight| formats.applied(&weight.spec)).collect::<Result<Vec<_>, _>>()?;
    let of_name: HashMap<&str, &Weight> = weights.iter().map(|weight| (weight.spec.name.as_str(), weight)).collect();
    let directory = FreshDirectory::create(out)?;
    let mut config = shape.config();
    formats.tell(&mut config);
    shards::write_json(directory.path().join(CONFIG), &config)?;
    shards::write_json(directory.path().join("tokenizer.json"), &tokenizer)?;
    let total: u64 = specs.iter().map(TensorSpec::bytes).sum();
    let mut done = 0;
    let normal = Normal::new();
    shards::write(directory.path(), &specs, shards::SHARD_BYTES_MAX, &mut |spec, file| {
        let Weight { spec: whole, fill } = of_name[spec.name.as_str()];
        let stream = StreamSeed::new(seed, &spec.name);
        blocks::write(whole.dtype, spec, file, |out| match *fill {
            Fill::Ones => out.write_all(&half::bf16::ONE.to_le_bytes().repeat(whole.shape[0])),
            Fill::Normal(deviation) => normal.write_bf16(stream, deviation, Signs::Free, whole.bytes(), out),
            Fill::Router => write_router(&normal, stream, &whole.shape, out),
            Fill::Embedding => zipf::write_embeddings(&normal, stream, &whole.shape, out),
            Fill::Output { deviation, signs } => zipf::write_output(&normal, stream, whole, (deviation, signs), out),
            Fill::Biased { unit } => zipf::write_router(&normal, stream, &whole.shape, (&biases, unit), out),
        })?;
        done += spec.bytes();
        on_progress(done, total);
        Ok(())
    })?;
    directory.finish()?;
    Ok(total)
}

/// Router weights (experts, d_model), standard normal as transformers initialises them.
fn write_router(normal: &Normal, stream: StreamSeed, shape: &[usize], file: &mut dyn Write) -> io::Result<()> {
    for expert in 0..shape[0] {
        let row = normal.values(stream.child(expert as u64), shape[1]);
        let bytes: Vec<u8> = row.iter().flat_map(|&value| (value as f32).to_le_bytes()).collect();
        file.write_all(&bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs};

    use safetensors::SafeTensors;
    use serde_json::json;
    use sida_routing::{LayerId, Routes};

    use super::*;
    use crate::{ModelConfig, Reference};

    fn small() -> SwitchShape {
        SwitchShape {
            d_model: 32,
            d_kv: 8,
            d_ff: 48,
            num_heads: 3,
            encoder_layers: 2,
            decoder_layers: 4,
            sparse_step: 2,
            num_experts: 4,
            expert_capacity: 16,
            vocab_size: 512,
        }
    }

    fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
        entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
    }

    /// A measurement could not be repeated on another machine or with other threads.
    #[test]
    fn the_same_seed_gives_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str, seed, threads| {
            let out = dir.path().join(name);
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                synth(&SynthShape::Switch(small()), &out, seed, Some(1.0), BlockFormats::NONE, &mut |_, _| ())
            })
            .unwrap();
            files(&out)
        };
        let one = make("one", 7, 1);
        assert_eq!(one, make("two", 7, 2));
        assert_ne!(one["model.safetensors"], make("three", 8, 1)["model.safetensors"]);
    }

    /// What is written would not be a checkpoint, or not of the shape that was asked for.
    #[test]
    fn writes_a_checkpoint_of_its_shape() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("model");
        let mut last = (0, 0);
        let shape = SynthShape::Switch(small());
        synth(&shape, &out, 1, None, BlockFormats::NONE, &mut |done, total| last = (done, total)).unwrap();
        assert_eq!(last, (shape.bytes(), shape.bytes()));
        let config = ModelConfig::open(&out).unwrap();
        assert_eq!((config.d_ff, config.encoder_sparse, config.decoder_sparse.len()), (48, vec![false, true], 4));
        let bytes = fs::read(out.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let expert = file.tensor("decoder.block.3.layer.2.mlp.experts.expert_3.wo.weight").unwrap();
        assert_eq!((expert.shape(), expert.dtype()), (&[32, 48][..], safetensors::Dtype::BF16));
        let router = file.tensor("encoder.block.1.layer.1.mlp.router.classifier.weight").unwrap();
        assert_eq!((router.shape(), router.dtype()), (&[4, 32][..], safetensors::Dtype::F32));
    }

    /// Load tests would not be of the size their name says.
    #[test]
    fn published_shapes_have_the_published_sizes() {
        // Parameters as published, in billions at two bytes each: 7.4, 26, 6.92, 30.5, 46.7, 57.4.
        for (name, giga) in [
            ("switch-base-8", 1.24),
            ("switch-base-128", 14.8),
            ("switch-large-128", 52.7),
            ("olmoe-1b-7b", 13.84),
            ("qwen3-30b-a3b", 61.1),
            ("mixtral-8x7b", 93.4),
            ("qwen2-57b-a14b", 114.8),
        ] {
            let found = SynthShape::published(name).unwrap().bytes() as f64 / 1e9;
            assert!((found / giga - 1.0).abs() < 0.02, "{name} has {found} GB");
        }
        assert!(published().all(|name| SynthShape::published(name).is_ok()));
        assert!(matches!(SynthShape::published("switch-base-9"), Err(SynthError::Shape { .. })));
    }

    /// A decoder-only shape would not be read again, or lack a tensor of what it says it is.
    #[test]
    fn decoder_only_shapes_are_models() {
        let dir = tempfile::tempdir().unwrap();
        for (name, config) in [
            (
                "qwen3",
                json!({"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": true, "head_dim": 6,
                             "moe_intermediate_size": 5, "num_experts": 3, "decoder_sparse_step": 2}),
            ),
            (
                "qwen2",
                json!({"architectures": ["Qwen2MoeForCausalLM"], "moe_intermediate_size": 5, "num_experts": 3,
                             "shared_expert_intermediate_size": 7}),
            ),
            ("olmoe", json!({"architectures": ["OlmoeForCausalLM"], "num_experts": 3, "tie_word_embeddings": true})),
            ("mixtral", json!({"architectures": ["MixtralForCausalLM"], "num_local_experts": 3})),
        ] {
            let mut json = json!({"vocab_size": 128, "hidden_size": 8, "intermediate_size": 9, "num_hidden_layers": 2,
                                  "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2});
            json.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
            let shape = SynthShape::Causal(Box::new(CausalShape::of_config(json).unwrap()));
            let out = dir.path().join(name);
            synth(&shape, &out, 3, None, BlockFormats::NONE, &mut |_, _| ()).unwrap();
            let model = Reference::open(&out).unwrap();
            let answer = model.generate_greedy(&[5, 9, 70], 4).unwrap();
            assert!(!answer.is_empty() && answer.iter().all(|&token| token < 128), "{name}: {answer:?}");
            assert!(matches!(
                synth(&shape, &dir.path().join("no"), 3, Some(1.0), BlockFormats::NONE, &mut |_, _| ()),
                Err(SynthError::NoSkew)
            ));
        }
        assert!(matches!(CausalShape::of_config(SynthShape::Switch(small()).config()), Err(SynthError::Shape { .. })));
        let blocks = |count| SynthShape::published("olmoe-1b-7b").unwrap().with_blocks(count);
        for count in [0, 17] {
            assert!(matches!(blocks(count), Err(SynthError::Blocks { max: 16, .. })), "{count}");
        }
        let one_block = blocks(1).unwrap();
        assert!(one_block.bytes() * 10 < SynthShape::published("olmoe-1b-7b").unwrap().bytes());
    }

    /// Where a model's MoE layers send the tokens of random sentences, whose tokens are drawn log-uniformly.
    fn routed(dir: &Path, sentences: usize) -> BTreeMap<LayerId, Routes> {
        const TOKENS: usize = 28;
        let model = Reference::open(dir).unwrap();
        let (vocab_size, mut state) = (model.config().vocab_size as f64, 1_u64);
        let mut sentence = || -> Vec<u32> {
            let id = |_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                1 + (vocab_size - 2.0).powf((state >> 33) as f64 / (1_u64 << 31) as f64) as u32
            };
            (0..TOKENS).map(id).collect()
        };
        let mut all: BTreeMap<LayerId, Routes> = BTreeMap::new();
        for _ in 0..sentences {
            let (states, encoder) = model.encode(&sentence()).unwrap();
            let (logits, decoder) = model.decode_forced(&states, &sentence()).unwrap();
            assert!(logits.iter().all(|logit| logit.is_finite()));
            for layer in encoder.into_iter().chain(decoder) {
                let routes =
                    all.entry(layer.layer).or_insert(Routes { top_k: 1, experts: Vec::new(), weights: Vec::new() });
                routes.experts.extend(layer.routes.experts);
                routes.weights.extend(layer.routes.weights);
            }
        }
        all
    }

    /// The exponent under which such counts by rank are the most probable.
    fn exponent(counts: &[u64]) -> f64 {
        let likelihood = |skew: f64| -> f64 {
            zipf::shares(counts.len(), skew).iter().zip(counts).map(|(share, &count)| count as f64 * share.ln()).sum()
        };
        let tried = (0..400).map(|step| f64::from(step) / 100.0);
        tried.max_by(|&a, &b| likelihood(a).total_cmp(&likelihood(b))).unwrap()
    }

    /// Experts would be hot by another law than `--skew` names, so that load tests of residency would test another load.
    #[test]
    fn skew_makes_experts_hot() {
        let shape = SwitchShape {
            d_model: 256,
            d_kv: 32,
            d_ff: 128,
            num_heads: 8,
            encoder_layers: 4,
            num_experts: 64,
            vocab_size: 4096,
            ..small()
        };
        let dir = tempfile::tempdir().unwrap();
        for skew in [0.5, 1.5, 3.0] {
            let (out, law) = (dir.path().join(skew.to_string()), zipf::shares(shape.num_experts, skew));
            synth(&SynthShape::Switch(shape.clone()), &out, 0, Some(skew), BlockFormats::NONE, &mut |_, _| ()).unwrap();
            let routed = routed(&out, 150);
            assert_eq!(routed.len(), 4);
            for (layer, Routes { experts, weights, .. }) in routed {
                let mut counts = vec![0; shape.num_experts];
                experts.iter().flatten().for_each(|expert| counts[usize::from(expert.0)] += 1);
                counts.sort_unstable_by(|a, b| b.cmp(a));
                let of_law = |ranks: usize| {
                    let share = counts[..ranks].iter().sum::<u64>() as f64 / experts.len() as f64;
                    share / law[..ranks].iter().sum::<f64>()
                };
                let (top, fifth, exponent) = (of_law(1), of_law(shape.num_experts / 5), exponent(&counts));
                let surety = weights.iter().sum::<f32>() / weights.len() as f32;
                assert!((top - 1.0).abs() < 0.15, "skew {skew}, {layer:?}: the hottest gets {top} of its share");
                assert!(
                    (fifth - 1.0).abs() < 0.15,
                    "skew {skew}, {layer:?}: the hottest fifth gets {fifth} of its share"
                );
                assert!((exponent - skew).abs() < 0.2, "skew {skew}, {layer:?}: the exponent is {exponent}");
                assert!((0.2..0.9).contains(&surety), "skew {skew}, {layer:?}: routers are {surety} sure");
            }
        }
    }
}
