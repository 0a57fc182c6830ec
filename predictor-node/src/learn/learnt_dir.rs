//! The directory of what a node has learnt. The file that serves is always there whole: another takes its place in one step,
//! after it has been copied beside.

use std::{
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
};

use crate::PredictorNodeError;

/// The predictor that serves, once something was learnt: the name that it has beside a model.
const LEARNT: &str = sida_predictor::FILE_NAME;
/// What served before it.
const PREVIOUS: &str = "predictor.previous.safetensors";
/// What is tested.
const CANDIDATE: &str = "predictor.candidate.safetensors";
/// Locked by the node that learns here.
const LOCK: &str = "predictor.lock";

/// A directory that this node alone writes to.
pub(crate) struct LearntDir {
    dir: PathBuf,
    /// The lock goes with it.
    _lock: File,
}

impl LearntDir {
    /// Makes it, if it is not there. Refuses one that cannot be written, and one in which another node learns.
    pub(crate) fn open(dir: PathBuf) -> Result<Self, PredictorNodeError> {
        let refuse = |source| PredictorNodeError::LearnDir { dir: dir.clone(), source };
        fs::create_dir_all(&dir).map_err(refuse)?;
        let lock = File::create(dir.join(LOCK)).map_err(refuse)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { dir, _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(refuse(io::Error::other("another node learns there"))),
            Err(TryLockError::Error(error)) => Err(refuse(error)),
        }
    }

    /// Where a candidate goes.
    pub(crate) fn candidate(&self) -> PathBuf {
        self.dir.join(CANDIDATE)
    }

    /// Forgets the candidate.
    pub(crate) fn discard(&self) -> Result<(), PredictorNodeError> {
        fs::remove_file(self.candidate()).map_err(|source| self.failed(source))
    }

    /// Puts the candidate in the place of the file `serving`, which is kept as the previous one; where it is now.
    pub(crate) fn publish(&self, serving: &Path) -> Result<PathBuf, PredictorNodeError> {
        let partial = self.dir.join(format!(".{PREVIOUS}.partial"));
        let learnt = self.dir.join(LEARNT);
        fs::copy(serving, &partial)
            .and_then(|_| fs::rename(&partial, self.dir.join(PREVIOUS)))
            .and_then(|()| fs::rename(self.candidate(), &learnt))
            .map_err(|source| self.failed(source))?;
        Ok(learnt)
    }

    fn failed(&self, source: io::Error) -> PredictorNodeError {
        PredictorNodeError::LearnDir { dir: self.dir.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What served would be lost when something else takes its place, or two nodes overwrite each other's files.
    #[test]
    fn the_previous_one_is_kept() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("learnt");
        let dir = LearntDir::open(path.clone()).unwrap();
        let read = |name: &str| fs::read_to_string(path.join(name)).ok();
        let first = parent.path().join("trained");
        fs::write(&first, "first").unwrap();
        fs::write(dir.candidate(), "second").unwrap();
        let serving = dir.publish(&first).unwrap();
        assert_eq!((read(LEARNT).as_deref(), read(PREVIOUS).as_deref()), (Some("second"), Some("first")));
        fs::write(dir.candidate(), "third").unwrap();
        assert_eq!(dir.publish(&serving).unwrap(), serving);
        assert_eq!((read(LEARNT).as_deref(), read(PREVIOUS).as_deref()), (Some("third"), Some("second")));
        assert_eq!((read(CANDIDATE), fs::read_to_string(&first).unwrap()), (None, "first".to_owned()));
        fs::write(dir.candidate(), "worse").unwrap();
        dir.discard().unwrap();
        assert_eq!((read(CANDIDATE), read(LEARNT).as_deref()), (None, Some("third")));
        // Without a candidate there is nothing to put in the place of what serves.
        assert!(dir.publish(&serving).is_err());
        assert_eq!(read(LEARNT).as_deref(), Some("third"));

        let second = LearntDir::open(path.clone()).err().unwrap().to_string();
        assert!(second.contains("another node learns there"), "{second}");
        drop(dir);
        assert!(LearntDir::open(path).is_ok());
        let refused = LearntDir::open(first.join("below a file")).err().unwrap().to_string();
        assert!(refused.contains("below a file"), "{refused}");
    }
}
