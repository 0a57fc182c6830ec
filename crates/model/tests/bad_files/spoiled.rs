//! A small model that a test can spoil, and what opening it says then.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::Value;
use sida_model::{Backbone, Checkpoint, ExpertStore, ModelError, Reference};
use sida_routing::{ExpertId, ExpertKey, LayerId};
use tempfile::TempDir;

pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A small single-file model that works, in a folder of its own.
pub(crate) fn model() -> TempDir {
    let source = repository().join("tests/data/parity/random-steps");
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(source.join(file), dir.path().join(file)).unwrap();
    }
    Reference::open(dir.path()).unwrap();
    dir
}

/// Changes the header of model.safetensors.
pub(crate) fn edit_header(dir: &Path, edit: impl FnOnce(&mut Value)) {
    let path = dir.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    edit(&mut header);
    let header = serde_json::to_vec(&header).unwrap();
    let content = [&(header.len() as u64).to_le_bytes()[..], &header, &bytes[8 + length..]].concat();
    fs::write(path, content).unwrap();
}

pub(crate) fn edit_config(dir: &Path, field: &str, value: Value) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config[field] = value;
    fs::write(path, serde_json::to_vec(&config).unwrap()).unwrap();
}

/// Opens everything of a model, as a coordinator with an expert-node does. What can be told without loading is told the
/// same: else `sida doctor` would pass a model that cannot be loaded, or refuse one that can.
pub(crate) fn open(dir: &Path) -> Result<(), ModelError> {
    let checkpoint = Checkpoint::open(dir)?;
    let (checked, loaded) = (checkpoint.check_tensors(), load(&checkpoint));
    let told = |result: &Result<(), ModelError>| result.as_ref().map_err(ToString::to_string).copied();
    match &loaded {
        Err(ModelError::TensorDigest { .. }) => {
            assert_eq!(checkpoint.damage().map(|damage| damage.to_string()), told(&loaded).err());
        }
        _ => {
            assert_eq!(told(&checked), told(&loaded));
            assert!(checkpoint.damage().is_none());
        }
    }
    loaded
}

fn load(checkpoint: &Arc<Checkpoint>) -> Result<(), ModelError> {
    Backbone::load(checkpoint, &mut |_, _| ())?;
    let experts = ExpertStore::open(checkpoint.clone())?;
    let mut slot = vec![0; experts.shape().bytes()];
    for layer in 0..experts.config().moe_layer_count() as u16 {
        for expert in 0..experts.config().num_experts as u16 {
            experts.load(ExpertKey { layer: LayerId(layer), expert: ExpertId(expert) }, &mut slot)?;
        }
    }
    Ok(())
}

#[track_caller]
pub(crate) fn refused(dir: &Path, expected: impl FnOnce(&ModelError) -> bool, words: &str) {
    let error = open(dir).expect_err("must be refused");
    assert!(expected(&error), "{error:?}");
    assert!(error.to_string().contains(words), "{error} does not say {words:?}");
}
