//! `sida.manifest.json`: the SHA-256 of every file and of every tensor of a model directory, so that one
//! flipped bit on a disk is an error that names the tensor and not a wrong token.
//!
//! Made by [`crate::convert`]; [`crate::Checkpoint`] checks each tensor against it on
//! first use, `sida verify` checks everything.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use sida_routing::Digest;

use crate::{ModelError, bounded_file, regular_file, weight_files::damaged};

/// Its name in a model directory.
pub const FILE_NAME: &str = "sida.manifest.json";
/// A manifest beyond this is refused; 100 bytes a tensor make this half a million tensors.
const BYTES_MAX: u64 = 64 << 20;
/// The layout of the file that this code writes and reads.
const FORMAT: u32 = 1;

/// What a model directory held when its manifest was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Where it was read from or is about: names it in errors.
    dir: PathBuf,
    /// Invariant: every key is a plain file name.
    files: BTreeMap<String, FileEntry>,
    tensors: BTreeMap<String, Digest>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct FileEntry {
    bytes: u64,
    sha256: Digest,
}

/// The manifest as JSON, nothing checked yet.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format: u32,
    files: BTreeMap<String, StoredFile>,
    tensors: BTreeMap<String, String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredFile {
    bytes: u64,
    sha256: String,
}

impl Manifest {
    /// Reads the manifest of a model directory; `None` if it has none.
    pub fn read(dir: &Path) -> Result<Option<Self>, ModelError> {
        let path = dir.join(FILE_NAME);
        if !path.try_exists().map_err(|source| ModelError::Read { path: path.clone(), source })? {
            return Ok(None);
        }
        let stored: Stored = bounded_file::read_json(&path, BYTES_MAX)?;
        let refuse = |reason: String| ModelError::Manifest { path: path.clone(), reason };
        if stored.format != FORMAT {
            return Err(refuse(format!("format {} is unknown, expected {FORMAT}", stored.format)));
        }
        let digest = |of: &str, hex: &str| {
            parse_hex(hex).ok_or_else(|| refuse(format!("{of:?} has SHA-256 {hex:?}, expected 64 hex digits")))
        };
        let mut files = BTreeMap::new();
        for (name, StoredFile { bytes, sha256 }) in stored.files {
            if !is_plain_file_name(&name) {
                return Err(refuse(format!("{name:?} is not a plain file name")));
            }
            let sha256 = digest(&name, &sha256)?;
            files.insert(name, FileEntry { bytes, sha256 });
        }
        let mut tensors = BTreeMap::new();
        for (name, sha256) in stored.tensors {
            let sha256 = digest(&name, &sha256)?;
            tensors.insert(name, sha256);
        }
        Ok(Some(Self { dir: dir.to_owned(), files, tensors }))
    }

    /// Hashes what makes up the model in `dir` (config, tokenizer and weights; no predictor, no texts) and
    /// every tensor of its weights. Reports (bytes done, bytes total).
    pub fn of_directory(dir: &Path, on_progress: &mut dyn FnMut(u64, u64)) -> Result<Self, ModelError> {
        let files = files_of(dir)?;
        let hashed = hash(dir, &files, on_progress)?;
        Ok(Self { dir: dir.to_owned(), files: hashed.files, tensors: hashed.tensors })
    }

    /// Writes it into its directory, whole or not at all.
    pub fn write(&self) -> Result<(), ModelError> {
        let stored = Stored {
            format: FORMAT,
            files: (self.files.iter())
                .map(|(name, file)| (name.clone(), StoredFile { bytes: file.bytes, sha256: file.sha256.to_string() }))
                .collect(),
            tensors: self.tensors.iter().map(|(name, sha256)| (name.clone(), sha256.to_string())).collect(),
        };
        let path = self.dir.join(FILE_NAME);
        let partial = self.dir.join(format!(".{FILE_NAME}.partial"));
        let json =
            serde_json::to_vec_pretty(&stored).map_err(|source| ModelError::Json { path: path.clone(), source })?;
        fs::write(&partial, json)
            .and_then(|()| fs::rename(&partial, &path))
            .map_err(|source| ModelError::Write { path, source })
    }

    /// Checks one tensor's bytes. A tensor that the manifest does not list is refused: it was not there when
    /// the manifest was written.
    pub fn check_tensor(&self, tensor: &str, bytes: &[u8]) -> Result<(), ModelError> {
        let expected =
            self.tensors.get(tensor).copied().ok_or_else(|| self.refuse(format!("does not list tensor {tensor}")))?;
        let found = sha256(bytes);
        if found == expected {
            return Ok(());
        }
        Err(ModelError::TensorDigest { tensor: tensor.to_owned(), expected, found })
    }

    /// Checks the content of one small file, such as config.json, that was read whole; none where there is no such file.
    pub fn check_file(&self, name: &str, content: Option<&[u8]>) -> Result<(), ModelError> {
        let (expected, content) = match (self.files.get(name), content) {
            (Some(expected), Some(content)) => (expected, content),
            (Some(_), None) => return Err(self.refuse(format!("lists file {name}, which is missing"))),
            (None, Some(_)) => return Err(self.refuse(format!("does not list file {name}"))),
            (None, None) => return Ok(()),
        };
        self.compare_file(name, expected, &FileEntry { bytes: content.len() as u64, sha256: sha256(content) })
    }

    /// Checks every tensor and every file that it lists, tensors first: they name the damage best. Files
    /// that it does not list are left alone.
    pub fn verify_directory(&self, on_progress: &mut dyn FnMut(u64, u64)) -> Result<(), ModelError> {
        let present: BTreeSet<String> = files_of(&self.dir)?.into_iter().collect();
        if let Some(missing) = self.files.keys().find(|name| !present.contains(*name)) {
            return Err(self.refuse(format!("lists file {missing}, which is missing")));
        }
        let listed: Vec<String> = self.files.keys().cloned().collect();
        let found = hash(&self.dir, &listed, on_progress)?;
        for (tensor, &expected) in &self.tensors {
            match found.tensors.get(tensor) {
                Some(&found) if found == expected => {}
                Some(&found) => return Err(ModelError::TensorDigest { tensor: tensor.clone(), expected, found }),
                None => return Err(self.refuse(format!("lists tensor {tensor}, which is missing"))),
            }
        }
        self.files.iter().try_for_each(|(name, expected)| self.compare_file(name, expected, &found.files[name]))
    }

    /// How many tensors it lists.
    pub fn tensors(&self) -> usize {
        self.tensors.len()
    }

    /// How many files it lists.
    pub fn files(&self) -> usize {
        self.files.len()
    }

    fn compare_file(&self, name: &str, expected: &FileEntry, found: &FileEntry) -> Result<(), ModelError> {
        if found.bytes != expected.bytes {
            return Err(self.refuse(format!("says {name} has {} bytes, found {}", expected.bytes, found.bytes)));
        }
        if found.sha256 != expected.sha256 {
            let (expected, found) = (expected.sha256, found.sha256);
            return Err(self.refuse(format!("says {name} has SHA-256 {expected}, found {found}: the file is damaged")));
        }
        Ok(())
    }

    fn refuse(&self, reason: String) -> ModelError {
        ModelError::Manifest { path: self.dir.join(FILE_NAME), reason }
    }
}

/// What [`hash`] found.
struct Hashed {
    files: BTreeMap<String, FileEntry>,
    tensors: BTreeMap<String, Digest>,
}

/// Hashes files, and the tensors of those that are safetensors, with all threads of the rayon pool.
fn hash(dir: &Path, names: &[String], on_progress: &mut dyn FnMut(u64, u64)) -> Result<Hashed, ModelError> {
    let mut hashed = Hashed { files: BTreeMap::new(), tensors: BTreeMap::new() };
    let mut maps = Vec::new();
    for name in names {
        maps.push((name, map(&dir.join(name))?));
    }
    // Weights are read twice: once whole, once tensor by tensor.
    let passes = |name: &str| if is_weights(name) { 2 } else { 1 };
    let total = maps.iter().map(|(name, map)| passes(name) * map.len() as u64).sum();
    let mut done = 0;
    for (name, map) in &maps {
        let whole = || FileEntry { bytes: map.len() as u64, sha256: sha256(map) };
        if passes(name) == 1 {
            hashed.files.insert((*name).clone(), whole());
        } else {
            let (file, tensors) = rayon::join(whole, || tensor_digests(&dir.join(name), map));
            hashed.files.insert((*name).clone(), file);
            for (tensor, digest) in tensors? {
                if hashed.tensors.insert(tensor.clone(), digest).is_some() {
                    let reason = format!("tensor {tensor} is in another file, too");
                    return Err(ModelError::Header { file: dir.join(name), reason });
                }
            }
        }
        done += passes(name) * map.len() as u64;
        on_progress(done, total);
    }
    Ok(hashed)
}

/// The digest of each tensor of one safetensors file.
fn tensor_digests(path: &Path, map: &[u8]) -> Result<Vec<(String, Digest)>, ModelError> {
    let file = SafeTensors::deserialize(map).map_err(|error| damaged(path, map, &error))?;
    Ok(file.tensors().into_par_iter().map(|(name, tensor)| (name, sha256(tensor.data()))).collect())
}

/// Maps a file.
fn map(path: &Path) -> Result<Mmap, ModelError> {
    let failed = |source| ModelError::Read { path: path.to_owned(), source };
    let file = regular_file::open(path)?;
    if file.metadata().map_err(failed)?.len() == 0 {
        // Nothing cannot be mapped.
        return Err(ModelError::MistakenFile { path: path.to_owned(), expected: "a part of a model", found: "empty" });
    }
    // SAFETY: model files are not changed while they are open; the same holds for `Checkpoint`.
    unsafe { Mmap::map(&file) }.map_err(failed)
}

/// The files of a model directory that a manifest speaks of, sorted: its JSON (the manifest itself apart)
/// and its weights. A predictor carries its own digest and may be trained anew at any time.
fn files_of(dir: &Path) -> Result<Vec<String>, ModelError> {
    let failed = |source| ModelError::Read { path: dir.to_owned(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let is_file = fs::metadata(entry.path()).map_err(failed)?.is_file();
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_json = name.ends_with(".json") && name != FILE_NAME;
        if is_file && !name.starts_with('.') && (is_json || is_weights(&name)) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Whether a file holds weights of the model: `model.safetensors` or a shard of it.
fn is_weights(name: &str) -> bool {
    name.starts_with("model") && name.ends_with(".safetensors")
}

/// Whether a name from a file stays inside the directory it is joined to.
pub(crate) fn is_plain_file_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= 255 && name != "." && name != ".." && !name.contains(['/', '\\', '\0', ':'])
}

/// SHA-256 of bytes in memory.
pub fn sha256(bytes: &[u8]) -> Digest {
    Digest(Sha256::digest(bytes).into())
}

/// 32 bytes from 64 hex digits.
pub fn parse_hex(hex: &str) -> Option<Digest> {
    if hex.len() != 64 || !hex.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, digits) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(Digest(bytes))
}

#[cfg(test)]
mod tests {
    use safetensors::{Dtype, tensor::TensorView};

    use super::*;

    fn model(dir: &Path) {
        let (a, b) = ([1u8; 16], [2u8; 32]);
        let tensors = [
            ("layer.a", TensorView::new(Dtype::F32, vec![4], &a).unwrap()),
            ("layer.b", TensorView::new(Dtype::F32, vec![8], &b).unwrap()),
        ];
        fs::write(dir.join("model.safetensors"), safetensors::serialize(tensors, None).unwrap()).unwrap();
        fs::write(dir.join("config.json"), b"{}").unwrap();
        fs::write(dir.join("README.md"), b"not part of the model").unwrap();
    }

    fn written(dir: &Path) -> Manifest {
        model(dir);
        Manifest::of_directory(dir, &mut |_, _| ()).unwrap().write().unwrap();
        Manifest::read(dir).unwrap().unwrap()
    }

    /// A manifest would not describe the directory it was made of, or would lose something on disk.
    #[test]
    fn verifies_what_it_was_made_of() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Manifest::read(dir.path()).unwrap(), None);
        let manifest = written(dir.path());
        assert_eq!((manifest.tensors(), manifest.files()), (2, 2));
        let mut reported = Vec::new();
        manifest.verify_directory(&mut |done, total| reported.push((done, total))).unwrap();
        assert!(reported.last().is_some_and(|(done, total)| done == total));
        manifest.check_tensor("layer.a", &[1; 16]).unwrap();
        manifest.check_file("config.json", Some(b"{}")).unwrap();
        manifest.check_file("generation_config.json", None).unwrap();
    }

    /// A flipped bit would be served, or reported without a name.
    #[test]
    fn names_the_tensor_with_a_flipped_bit() {
        let dir = tempfile::tempdir().unwrap();
        let manifest = written(dir.path());
        let path = dir.path().join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 4;
        fs::write(&path, bytes).unwrap();
        let error = manifest.verify_directory(&mut |_, _| ()).unwrap_err();
        assert!(matches!(&error, ModelError::TensorDigest { tensor, .. } if tensor == "layer.b"), "{error}");
        assert!(manifest.check_tensor("layer.a", &[3; 16]).is_err());
        assert!(manifest.check_tensor("layer.c", &[3; 16]).is_err());
    }

    /// A damaged or missing small file would pass.
    #[test]
    fn names_the_file_that_is_changed_or_missing() {
        let dir = tempfile::tempdir().unwrap();
        let manifest = written(dir.path());
        fs::write(dir.path().join("config.json"), b"[]").unwrap();
        let error = manifest.verify_directory(&mut |_, _| ()).unwrap_err().to_string();
        assert!(error.contains("config.json"), "{error}");
        fs::remove_file(dir.path().join("config.json")).unwrap();
        let error = manifest.verify_directory(&mut |_, _| ()).unwrap_err().to_string();
        assert!(error.contains("config.json"), "{error}");
    }

    /// A hostile manifest would lead out of its directory, or take the process down.
    #[test]
    fn refuses_hostile_manifests() {
        let dir = tempfile::tempdir().unwrap();
        let hex = "0".repeat(64);
        let entry = format!(r#"{{"bytes": 1, "sha256": "{hex}"}}"#);
        for json in [
            "".to_owned(),
            "[]".to_owned(),
            r#"{"format": 2, "files": {}, "tensors": {}}"#.to_owned(),
            format!(r#"{{"format": 1, "files": {{"../config.json": {entry}}}, "tensors": {{}}}}"#),
            format!(r#"{{"format": 1, "files": {{"a/b": {entry}}}, "tensors": {{}}}}"#),
            r#"{"format": 1, "files": {}, "tensors": {"a": "zz"}}"#.to_owned(),
            format!(r#"{{"format": 1, "files": {{}}, "tensors": {{"a": "{}"}}}}"#, "+0".repeat(32)),
            "[".repeat(100_000),
        ] {
            fs::write(dir.path().join(FILE_NAME), &json).unwrap();
            let error = Manifest::read(dir.path()).unwrap_err().to_string();
            assert!(error.contains(FILE_NAME), "{error}");
        }
    }
}
