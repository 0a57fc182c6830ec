//! Checkpoints of published shapes with random weights, for load and speed tests: what they answer is noise,
//! but they load, route and compute as the real ones do. Called by `sida synth` and by tests, which make
//! small shapes of their own.
//!
//! In reading order: `shape` (what tensors there are), `random` (seeded normal values, fast), `vocabulary` (a tokenizer that fits).

mod random;
mod shape;
mod vocabulary;

use std::{
    io::{self, Write},
    path::Path,
};

use thiserror::Error;

pub use self::shape::{PUBLISHED, SynthShape};
use self::{
    random::{Normal, StreamSeed},
    shape::Fill,
};
use crate::{
    ModelError,
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
    #[error("{found} is no known shape, expected one of {}", PUBLISHED.join(", "))]
    Shape { found: String },
    #[error("a vocabulary of {found} is outside {min} to {max}")]
    Vocabulary { found: usize, min: usize, max: usize },
    #[error("skew is {found}, expected 0 to {max}")]
    Skew { found: f64, max: f64 },
}

/// Beyond this one expert takes nearly all tokens.
const SKEW_MAX: f64 = 4.0;

/// Writes a checkpoint of `shape` into `out`, which must not exist or be empty: config.json, tokenizer.json
/// and bf16 safetensors (routers in f32) of at most 4 GB each. The same shape, seed and skew give the same
/// bytes, whatever the number of threads. With `skew` s, a layer's experts get tokens roughly as 1 / rank^s
/// (Zipf), each layer in an order of its own; without, roughly evenly. Memory stays at a few MB.
/// Reports (bytes written, bytes total).
pub fn synth(
    shape: &SynthShape,
    out: &Path,
    seed: u64,
    skew: Option<f64>,
    on_progress: &mut dyn FnMut(u64, u64),
) -> Result<(), SynthError> {
    let skew = skew.unwrap_or(0.0);
    if !(0.0..=SKEW_MAX).contains(&skew) {
        return Err(SynthError::Skew { found: skew, max: SKEW_MAX });
    }
    let tokenizer = vocabulary::tokenizer(shape.vocab_size)?;
    let weights = shape.weights();
    let specs: Vec<TensorSpec> = weights.iter().map(|weight| weight.spec.clone()).collect();
    let fills: std::collections::HashMap<&str, Fill> =
        weights.iter().map(|weight| (weight.spec.name.as_str(), weight.fill)).collect();
    let directory = FreshDirectory::create(out)?;
    shards::write_json(directory.path().join("config.json"), &shape.config())?;
    shards::write_json(directory.path().join("tokenizer.json"), &tokenizer)?;
    let total: u64 = specs.iter().map(TensorSpec::bytes).sum();
    let mut done = 0;
    let normal = Normal::new();
    shards::write(directory.path(), &specs, shards::SHARD_BYTES_MAX, &mut |spec, file| {
        let stream = StreamSeed::new(seed, &spec.name);
        match fills[spec.name.as_str()] {
            Fill::Ones => file.write_all(&half::bf16::ONE.to_le_bytes().repeat(spec.shape[0]))?,
            Fill::Normal(deviation) => normal.write_bf16(stream, deviation, spec.bytes(), file)?,
            Fill::Router => write_router(&normal, stream, &spec.shape, skew, file)?,
        }
        done += spec.bytes();
        on_progress(done, total);
        Ok(())
    })?;
    Ok(directory.finish()?)
}

/// Router weights (experts, d_model). There is no bias to make an expert popular by, but the logits of a
/// normalised token are normal with its row's length as deviation, so a longer row wins more often.
fn write_router(
    normal: &Normal,
    stream: StreamSeed,
    shape: &[usize],
    skew: f64,
    file: &mut dyn Write,
) -> io::Result<()> {
    let lengths = random::shuffled(stream, row_lengths(normal, shape[0], skew));
    for (expert, length) in lengths.iter().enumerate() {
        let row = normal.values(stream.child(expert as u64), shape[1]);
        let bytes: Vec<u8> = row.iter().flat_map(|value| ((value * length) as f32).to_le_bytes()).collect();
        file.write_all(&bytes)?;
    }
    Ok(())
}

/// The length of each rank's row, mean 1. An expert wins when its logit is above a threshold that about one
/// logit of a token exceeds: P(length z > t) = share, so length ~ 1 / quantile(1 - share).
fn row_lengths(normal: &Normal, experts: usize, skew: f64) -> Vec<f64> {
    /// Above it the quantile nears 0: an expert with the longest row wins half of the time at most.
    const SHARE_MAX: f64 = 0.4;
    let weights: Vec<f64> = (1..=experts).map(|rank| (rank as f64).powf(-skew)).collect();
    let total: f64 = weights.iter().sum();
    let lengths: Vec<f64> =
        weights.iter().map(|weight| 1.0 / normal.quantile(1.0 - (weight / total).min(SHARE_MAX))).collect();
    let mean = lengths.iter().sum::<f64>() / experts as f64;
    lengths.iter().map(|length| length / mean).collect()
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs};

    use safetensors::SafeTensors;

    use super::*;
    use crate::{ModelConfig, StoredDType};

    fn small() -> SynthShape {
        SynthShape {
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
            pool.install(|| synth(&small(), &out, seed, Some(1.0), &mut |_, _| ())).unwrap();
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
        synth(&small(), &out, 1, None, &mut |done, total| last = (done, total)).unwrap();
        assert_eq!(last, (small().bytes(), small().bytes()));
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
        // Parameters as published: 7.4 billion for base-128, 26 billion for large-128, at two bytes each.
        for (name, giga) in [("switch-base-8", 1.24), ("switch-base-128", 14.8), ("switch-large-128", 52.7)] {
            let found = SynthShape::published(name).unwrap().bytes() as f64 / 1e9;
            assert!((found / giga - 1.0).abs() < 0.02, "{name} has {found} GB");
        }
        assert!(PUBLISHED.iter().all(|name| SynthShape::published(name).is_ok()));
        assert!(matches!(SynthShape::published("switch-base-9"), Err(SynthError::Shape { .. })));
    }

    /// A skew would not make some experts hot, so that load tests of residency would test an even load.
    #[test]
    fn skew_makes_experts_hot() {
        let normal = Normal::new();
        let (experts, d_model, tokens) = (32, 64, 4000);
        let share = |skew| {
            let mut bytes = Vec::new();
            write_router(&normal, StreamSeed::new(3, "router"), &[experts, d_model], skew, &mut bytes).unwrap();
            let weights = StoredDType::F32.widen(&bytes);
            let mut counts = vec![0; experts];
            for token in 0..tokens {
                let x = normal.values(StreamSeed::new(token, "token"), d_model);
                let logit = |row: &[f32]| -> f64 { row.iter().zip(&x).map(|(w, x)| f64::from(*w) * x).sum() };
                let logits: Vec<f64> = weights.chunks(d_model).map(logit).collect();
                counts[(0..experts).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap()] += 1;
            }
            counts.sort_unstable_by(|a, b| b.cmp(a));
            counts.iter().take(4).sum::<u64>() as f64 / tokens as f64
        };
        let (even, skewed) = (share(0.0), share(1.2));
        assert!(even < 0.3 && skewed > 0.5, "the 4 hottest of 32 experts take {even} and {skewed}");
    }
}
