//! A directory that appears whole or not at all: written under a hidden name beside its place, renamed when
//! complete, removed otherwise. Called by [`crate::convert`] and [`crate::synth`].

use std::{
    fs,
    hash::{BuildHasher, Hasher, RandomState},
    path::{Path, PathBuf},
};

use crate::ModelError;

/// Differs from process to process; ids of processes do not, where each is the first of its container and several share
/// a volume.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// A directory being written. Dropped before [`FreshDirectory::finish`], it leaves nothing.
pub(crate) struct FreshDirectory {
    place: PathBuf,
    partial: PathBuf,
    finished: bool,
}

impl FreshDirectory {
    /// Starts one; `place` must not exist or be empty.
    pub(crate) fn create(place: &Path) -> Result<Self, ModelError> {
        let failed = |source| ModelError::Write { path: place.to_owned(), source };
        if place.exists() && fs::read_dir(place).map_err(failed)?.next().is_some() {
            return Err(ModelError::NotEmpty { dir: place.to_owned() });
        }
        let name = place.file_name().unwrap_or_default().to_string_lossy();
        let partial = place.with_file_name(format!(".{name}.{:016x}.partial", random()));
        fs::create_dir_all(&partial).map_err(failed)?;
        Ok(Self { place: place.to_owned(), partial, finished: false })
    }

    /// Where to write until then.
    pub(crate) fn path(&self) -> &Path {
        &self.partial
    }

    /// Moves it to its place.
    pub(crate) fn finish(mut self) -> Result<(), ModelError> {
        fs::rename(&self.partial, &self.place)
            .map_err(|source| ModelError::Write { path: self.place.clone(), source })?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for FreshDirectory {
    fn drop(&mut self) {
        if !self.finished {
            // The error that led here says more than a failure to clean up would.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}
