//! The small files of a model directory: config.json, tokenizer.json, sida.manifest.json. This file also has the
//! [`ModelDirectory`] that the other targets of model files damage.

use std::{
    fs,
    path::{Path, PathBuf},
};

use sida_model::{Checkpoint, ModelConfig, Reference, Tokenizer, manifest};
use tempfile::TempDir;

use crate::fuzz;

/// A copy of a model directory of this repository, one file of which is damaged at a time.
pub(crate) struct ModelDirectory {
    dir: TempDir,
    source: PathBuf,
}

impl ModelDirectory {
    /// Copies the files of `source`, a path from the root of the repository.
    pub(crate) fn copy_of(source: &str) -> Self {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(source);
        let dir = tempfile::tempdir().expect("a temporary directory");
        for entry in fs::read_dir(&source).unwrap_or_else(|error| panic!("{}: {error}", source.display())) {
            let file = entry.expect("an entry").path();
            fs::copy(&file, dir.path().join(file.file_name().expect("a file name"))).expect("a copy");
        }
        Self { dir, source }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The undamaged bytes of a file.
    pub(crate) fn original(&self, file: &str) -> Vec<u8> {
        fs::read(self.source.join(file)).expect("a file of the seed")
    }

    pub(crate) fn write(&self, file: &str, bytes: &[u8]) {
        fs::write(self.dir.path().join(file), bytes).expect("a file written");
    }

    /// Whether the whole model can be loaded and run on a few tokens.
    pub(crate) fn runs(&self) -> bool {
        let Ok(model) = Reference::open(self.path()) else { return false };
        let ids: Vec<u32> = (0..6).map(|id| id % model.config().vocab_size as u32).collect();
        model.encode(&ids).and_then(|_| model.generate_greedy(&ids, 2)).is_ok()
    }
}

/// A config could end the process that reads it, or be believed where the weights say otherwise.
#[test]
fn config() {
    for source in ["tests/data/parity/random-saved", "tests/data/parity/random-untied-classic"] {
        let model = ModelDirectory::copy_of(source);
        fuzz!([model.original("config.json")], |bytes| {
            model.write("config.json", bytes);
            let Ok(config) = ModelConfig::open(model.path()) else { return false };
            assert_eq!(config.encoder_sparse.len(), config.encoder_layers);
            assert_eq!(config.decoder_sparse.len(), config.decoder_layers);
            model.runs()
        });
    }
}

/// A tokenizer could end a coordinator, or produce ids that the model does not have.
#[test]
fn tokenizer() {
    let model = ModelDirectory::copy_of("tests/data/parity/random-saved");
    let config = ModelConfig::open(model.path()).expect("a config");
    let seed = include_bytes!("seeds/tokenizer.json").to_vec();
    fuzz!([seed], |bytes| {
        model.write("tokenizer.json", bytes);
        let Ok(tokenizer) = Tokenizer::open(model.path(), &config) else { return false };
        let Ok(ids) = tokenizer.encode("a fine film <extra_id_0> , caf\u{e9} \u{1f600}") else { return false };
        assert!(ids.iter().all(|&id| (id as usize) < config.vocab_size));
        tokenizer.decode(&ids).is_ok()
    });
}

/// A manifest could end the process that reads it, or lead it to files elsewhere.
#[test]
fn manifest() {
    let model = ModelDirectory::copy_of("tests/data/parity/random-one-expert-f16");
    let made = manifest::Manifest::of_directory(model.path(), &mut |_, _| {}).expect("a manifest");
    made.write().expect("a manifest written");
    let seed = fs::read(model.path().join(manifest::FILE_NAME)).expect("the manifest");
    fuzz!([seed], |bytes| {
        model.write(manifest::FILE_NAME, bytes);
        let Ok(checkpoint) = Checkpoint::open(model.path()) else { return false };
        checkpoint.names().all(|name| checkpoint.tensor(name).is_ok())
    });
}
