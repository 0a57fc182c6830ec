//! A model directory, opened: config, weights by name, and the manifest that each tensor is compared with
//! on first use. Opening reads headers only. Shared by backbone, expert store, predictor and `sida inspect`.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock, atomic::Ordering},
};

use sha2::{Digest as _, Sha256};
use sida_routing::Digest;

use crate::{
    ModelConfig, ModelError, StoredDType,
    family::Family,
    manifest::Manifest,
    model_name, names,
    weight_files::{StoredTensor, WeightFiles},
};

/// Tensors up to this many bytes are part of the digest (norms, routers, biases, small projections).
const DIGEST_TENSOR_BYTES_MAX: usize = 1 << 20;

/// So many of the experts' tensors at most, evenly among their names, and so many places in each are looked at to tell
/// experts apart: a few hundred pages of the largest model.
const SAMPLED_TENSORS_MAX: usize = 64;
const SAMPLED_PLACES: usize = 4;
const SAMPLE_BYTES: usize = 64;

/// A model on disk.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    name: String,
    config: ModelConfig,
    files: WeightFiles,
    manifest: Option<Manifest>,
    digest: Digest,
    /// Made when it is asked for.
    experts_digest: OnceLock<Digest>,
    /// The first tensor that was found to be damaged.
    damaged: OnceLock<String>,
}

/// One tensor where it lies.
#[derive(Clone, Copy, Debug)]
pub struct TensorBytes<'a> {
    /// How a value is stored.
    pub dtype: StoredDType,
    /// Its dimensions, outermost first.
    pub shape: &'a [usize],
    /// Row-major, little-endian; any alignment. As long as dtype and shape say.
    pub bytes: &'a [u8],
}

impl Checkpoint {
    /// Opens a directory with `config.json` and safetensors, single or sharded. Reads no weights but the
    /// small ones that make up the digest.
    pub fn open(dir: &Path) -> Result<Arc<Self>, ModelError> {
        Self::opened(dir, None, &[])
    }

    /// [`Checkpoint::open`] under a name that somebody chose.
    pub fn open_as(dir: &Path, name: Option<&str>) -> Result<Arc<Self>, ModelError> {
        Self::opened(dir, name, &[])
    }

    /// [`Checkpoint::open`], which knows the caller's `own` families beside those that are built in. Whatever is made of the
    /// checkpoint serves such a model as any other: `examples/own_family.rs`.
    pub fn open_with_families(dir: &Path, own: &[Family]) -> Result<Arc<Self>, ModelError> {
        Self::opened(dir, None, own)
    }

    fn opened(dir: &Path, name: Option<&str>, own: &[Family]) -> Result<Arc<Self>, ModelError> {
        let manifest = Manifest::read(dir)?;
        let check = |name: &str, content: Option<&[u8]>| match &manifest {
            Some(manifest) => manifest.check_file(name, content),
            None => Ok(()),
        };
        let config = ModelConfig::open_checked(dir, own, check)?;
        let files = WeightFiles::open(dir)?;
        let name = name.map_or_else(|| model_name::of_directory(dir), str::to_owned);
        let (dir, damaged, experts_digest) = (dir.to_owned(), OnceLock::new(), OnceLock::new());
        let mut checkpoint =
            Self { dir, name, config, files, manifest, digest: Digest([0; 32]), experts_digest, damaged };
        checkpoint.digest = checkpoint.identify()?;
        Ok(Arc::new(checkpoint))
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Identifies the model: SHA-256 of what its config says of what it computes, of every tensor's name, dtype and shape,
    /// and of the content of the backbone's small tensors, routers and norms among them, which any training changes. It
    /// is the same however the config is written and the weights are sharded, with a manifest or without, and costs no
    /// read of the experts. How the model writes ([`ModelConfig::generation`]) is no part of it: nodes that do not write
    /// need not know.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Tells models apart that have the same [`Checkpoint::digest`] and other experts: SHA-256 of samples of these. Any training
    /// of the experts changes them all; that each is whole is for a manifest to say.
    pub fn experts_digest(&self) -> Digest {
        *self.experts_digest.get_or_init(|| {
            let mut names: Vec<&str> = self.names().filter(|name| names::is_expert(name)).collect();
            names.sort_unstable();
            let every = names.len().div_ceil(SAMPLED_TENSORS_MAX).max(1);
            let mut hash = Sha256::new();
            for stored in names.into_iter().step_by(every).filter_map(|name| self.files.get(name)) {
                let bytes = self.files.bytes(stored);
                let room = bytes.len().saturating_sub(SAMPLE_BYTES);
                for place in 0..SAMPLED_PLACES {
                    let start = room * place / (SAMPLED_PLACES - 1);
                    hash.update(&bytes[start..bytes.len().min(start + SAMPLE_BYTES)]);
                }
            }
            Digest(hash.finalize().into())
        })
    }

    /// Where it was opened.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What people call it: the name that was chosen, else its directory's or its repository's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Every tensor's name, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.files.names()
    }

    /// Whether it holds a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.files.get(name).is_some()
    }

    /// Dtype (as safetensors calls it, or the format of its blocks), shape and bytes of a tensor as its header says; reads
    /// no weights.
    pub fn describe(&self, name: &str) -> Result<(String, &[usize], usize), ModelError> {
        let stored = self.stored(name)?;
        let dtype = match stored.weights {
            Some(blocks) if blocks.is_blocks() => blocks.to_string(),
            _ => format!("{:?}", stored.dtype),
        };
        Ok((dtype, &stored.shape, stored.bytes()))
    }

    /// A tensor's bytes, compared with the manifest on first use where there is one.
    pub fn tensor(&self, name: &str) -> Result<TensorBytes<'_>, ModelError> {
        let stored = self.stored(name)?;
        let tensor = TensorBytes { dtype: self.dtype(name)?, shape: &stored.shape, bytes: self.files.bytes(stored) };
        self.verify(name, stored, tensor.bytes)?;
        Ok(tensor)
    }

    /// What is wrong with the first tensor that did not pass its comparison with the manifest, whoever read it; none where
    /// all that were read did. For who asked for an answer and learns only that a node could not load an expert.
    pub fn damage(&self) -> Option<ModelError> {
        self.tensor(self.damaged.get()?).err()
    }

    /// Copies one of so many equal parts of a tensor's bytes into `into`, which is as long, without mapping them; the tensor
    /// is compared with the manifest on first use as by [`Checkpoint::tensor`].
    pub fn read(&self, name: &str, (part, parts): (usize, usize), into: &mut [u8]) -> Result<(), ModelError> {
        let stored = self.stored(name)?;
        if stored.bytes() != into.len() * parts || part >= parts {
            let (expected, found) = (vec![stored.bytes() / parts.max(1)], vec![into.len()]);
            return Err(ModelError::Shape { what: "room for a part of a tensor [bytes]", expected, found });
        }
        if parts == 1 {
            self.files.read(stored, 0, into)?;
            return self.verify(name, stored, into);
        }
        // The manifest knows whole tensors.
        if self.manifest.is_some() && !stored.verified.load(Ordering::Acquire) {
            self.verify(name, stored, self.files.bytes(stored))?;
            self.files.release(stored);
        }
        self.files.read(stored, part * into.len(), into)
    }

    /// [`Checkpoint::tensor`] of a shape that is known.
    pub fn tensor_of_shape(&self, name: &str, shape: &[usize]) -> Result<TensorBytes<'_>, ModelError> {
        self.check_shape(name, shape)?;
        self.tensor(name)
    }

    /// A tensor's stored dtype; refuses one that holds no weights.
    pub fn dtype(&self, name: &str) -> Result<StoredDType, ModelError> {
        let stored = self.stored(name)?;
        stored.weights.ok_or_else(|| ModelError::TensorDType {
            tensor: name.to_owned(),
            expected: "F32, BF16 or F16".to_owned(),
            found: format!("{:?}", stored.dtype),
        })
    }

    /// Refuses a tensor of another shape, from its header alone.
    pub fn check_shape(&self, name: &str, shape: &[usize]) -> Result<(), ModelError> {
        let found = &self.stored(name)?.shape;
        if found == shape {
            return Ok(());
        }
        Err(ModelError::TensorShape { tensor: name.to_owned(), expected: shape.to_owned(), found: found.clone() })
    }

    /// Asks for one of so many equal parts of a tensor to be read ahead of its use.
    pub fn will_need(&self, name: &str, (part, parts): (usize, usize)) {
        if let Some(stored) = self.files.get(name) {
            let bytes = stored.bytes() / parts.max(1);
            self.files.will_need(stored, part * bytes, bytes);
        }
    }

    /// Gives back the memory of a tensor whose bytes were copied.
    pub fn release(&self, name: &str) {
        if let Some(stored) = self.files.get(name) {
            self.files.release(stored);
        }
    }

    fn stored(&self, name: &str) -> Result<&StoredTensor, ModelError> {
        self.files.get(name).ok_or_else(|| ModelError::TensorMissing { dir: self.dir.clone(), tensor: name.to_owned() })
    }

    fn verify(&self, name: &str, stored: &StoredTensor, bytes: &[u8]) -> Result<(), ModelError> {
        if let Some(manifest) = &self.manifest
            && !stored.verified.load(Ordering::Acquire)
        {
            manifest.check_tensor(name, bytes).inspect_err(|_| _ = self.damaged.set(name.to_owned()))?;
            stored.verified.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn identify(&self) -> Result<Digest, ModelError> {
        let mut names: Vec<&str> = self.names().collect();
        names.sort_unstable();
        let mut hash = Sha256::new();
        hash.update(Sha256::digest(self.config.canonical()));
        for name in names {
            let (dtype, shape, bytes) = self.describe(name)?;
            hash.update(format!("{name} {dtype} {shape:?}\n"));
            if bytes <= DIGEST_TENSOR_BYTES_MAX && !names::is_expert(name) && self.dtype(name).is_ok() {
                hash.update(self.tensor(name)?.bytes);
            }
        }
        Ok(Digest(hash.finalize().into()))
    }
}
