//! A directory that appears whole or not at all: written under a hidden name beside its place, renamed when
//! complete, removed otherwise. Called by [`crate::convert`] and [`crate::synth`].
//!
//! A process that is ended in the middle removes nothing, unless it asks for that when it is told to end ([`remove_unfinished`]). What
//! was left is removed by the next that writes to the same place: as long as it is written its writer holds a lock of it, which
//! ends with the process.

use std::{
    fs::{self, File, TryLockError},
    hash::{BuildHasher, Hasher, RandomState},
    path::{Path, PathBuf},
    sync::Mutex,
    thread,
    time::Duration,
};

use crate::ModelError;

/// Differs from process to process; ids of processes do not, where each is the first of its container and several share
/// a volume.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// What this process is writing.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// How often what is still being written is removed anew.
const REMOVALS_MAX: usize = 100;

/// Removes what this process has not finished, for one that is told to end: nothing can be finished afterwards. Returns what cannot be
/// removed.
pub fn remove_unfinished() -> Vec<PathBuf> {
    // Kept locked: no other is begun, and none is moved to its place.
    let unfinished = unfinished();
    // A file that comes into it meanwhile makes a removal fail.
    let remains = |partial: &Path| !(0..REMOVALS_MAX).any(|_| fs::remove_dir_all(partial).is_ok() || !partial.exists());
    let left = unfinished.iter().filter(|partial| remains(partial)).cloned().collect();
    std::mem::forget(unfinished);
    left
}

/// Waits until nobody writes `partial` any more, which another began ([`ModelError::BeingWritten`]): until it is finished or given
/// up.
pub fn wait_for_other(partial: &Path) {
    // Locked by its writer. One that is gone is at its place, or removed.
    if let Ok(directory) = File::open(partial) {
        let _ = directory.lock_shared();
    }
    // Of several that waited not all shall begin at a time: each would see another, and give up.
    thread::sleep(Duration::from_millis(random() % 1000));
}

/// A directory being written. Dropped before [`FreshDirectory::finish`], it leaves nothing.
pub(crate) struct FreshDirectory {
    place: PathBuf,
    partial: PathBuf,
    /// Locked until it is finished.
    _lock: File,
    finished: bool,
}

impl FreshDirectory {
    /// Starts one; `place` must not exist or be empty, and nobody else be writing it: the second to finish would have worked in
    /// vain.
    pub(crate) fn create(place: &Path) -> Result<Self, ModelError> {
        let failed = |source| ModelError::Write { path: place.to_owned(), source };
        if place.exists() && fs::read_dir(place).map_err(failed)?.next().is_some() {
            return Err(ModelError::NotEmpty { dir: place.to_owned() });
        }
        // What a link leads to is moved, not the link.
        let place = &place.canonicalize().unwrap_or_else(|_| place.to_owned());
        let name = place.file_name().unwrap_or_default().to_string_lossy();
        let partial = place.with_file_name(format!(".{name}.{:016x}.partial", random()));
        let unlocked = partial.with_extension("unlocked");
        let mut unfinished = unfinished();
        fs::create_dir_all(&unlocked).map_err(failed)?;
        let lock = File::open(&unlocked).map_err(failed)?;
        // Where files cannot be locked, nothing that is left over is ever removed.
        let _ = lock.try_lock();
        // Others take a partial one that is not locked for a left-over.
        fs::rename(&unlocked, &partial).map_err(failed)?;
        unfinished.push(partial.clone());
        drop(unfinished);
        let directory = Self { place: place.to_owned(), partial, _lock: lock, finished: false };
        // After it is locked: of two that begin at a time, at least one sees the other.
        match remove_left_over(place, &directory.partial) {
            None => Ok(directory),
            Some(other) => Err(ModelError::BeingWritten { dir: place.to_owned(), partial: other }),
        }
    }

    /// Where to write until then.
    pub(crate) fn path(&self) -> &Path {
        &self.partial
    }

    /// Moves it to its place.
    pub(crate) fn finish(mut self) -> Result<(), ModelError> {
        let mut unfinished = unfinished();
        unfinished.retain(|other| *other != self.partial);
        fs::rename(&self.partial, &self.place)
            .map_err(|source| ModelError::Write { path: self.place.clone(), source })?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for FreshDirectory {
    fn drop(&mut self) {
        if !self.finished {
            unfinished().retain(|other| *other != self.partial);
            // The error that led here says more than a failure to clean up would.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

fn unfinished() -> std::sync::MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Removes what others have left that were to write this place and have ended. One that is still being written is locked: the
/// first such one, `own` aside.
fn remove_left_over(place: &Path, own: &Path) -> Option<PathBuf> {
    let name = place.file_name().unwrap_or_default().to_string_lossy();
    let begins = format!(".{name}.");
    let is_partial = |found: &str| {
        let random = found.strip_prefix(&begins).and_then(|rest| rest.strip_suffix(".partial"));
        random.is_some_and(|random| random.len() == 16 && random.bytes().all(|byte| byte.is_ascii_hexdigit()))
    };
    let parent = place.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let left_over =
            entry.file_name().to_str().is_some_and(is_partial) && entry.file_type().is_ok_and(|kind| kind.is_dir());
        if !left_over || Some(entry.file_name().as_os_str()) == own.file_name() {
            continue;
        }
        let Ok(lock) = File::open(entry.path()) else { continue };
        match lock.try_lock() {
            // What cannot be removed is in nobody's way.
            Ok(()) => _ = fs::remove_dir_all(entry.path()),
            Err(TryLockError::WouldBlock) => return Some(entry.path()),
            // Where files cannot be locked, nobody can tell.
            Err(TryLockError::Error(_)) => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("an entry").file_name());
        let mut names: Vec<_> = names.map(|name| name.to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_link_to_an_empty_directory_is_a_place() {
        // Would break: what is written to a volume that a link leads to is lost at its end.
        let dir = tempfile::tempdir().expect("a directory");
        let (volume, link) = (dir.path().join("volume"), dir.path().join("link"));
        fs::create_dir(&volume).expect("a directory");
        std::os::unix::fs::symlink(&volume, &link).expect("a link");
        let directory = FreshDirectory::create(&link).expect("created");
        fs::write(directory.path().join("shard"), "bytes").expect("written");
        directory.finish().expect("finished");
        assert_eq!(
            (entries(&volume), entries(dir.path())),
            (vec!["shard".to_owned()], vec!["link".into(), "volume".into()])
        );
    }

    #[test]
    fn what_an_earlier_run_left_is_removed_and_nothing_else() {
        // Would break: every run that is interrupted leaves gigabytes under a hidden name; or one run removes what another is
        // writing, or what was never its own; or two write the same place for hours, of which one can have it.
        let dir = tempfile::tempdir().expect("a directory");
        let place = dir.path().join("model");
        let left = dir.path().join(".model.0123456789abcdef.partial");
        fs::create_dir(&left).expect("written");
        fs::write(left.join("shard"), "bytes").expect("written");
        for other in [".model.tmp.partial", ".other.0123456789abcdef.partial", "notes"] {
            fs::create_dir(dir.path().join(other)).expect("written");
        }
        let first = FreshDirectory::create(&place).expect("created");
        assert!(!left.exists());
        let second = FreshDirectory::create(&place).err().expect("refused").to_string();
        assert!(second.contains("is being written already"), "{second}");
        assert!(first.path().exists(), "it is still being written");
        first.finish().expect("moved");
        assert_eq!(entries(dir.path()), [".model.tmp.partial", ".other.0123456789abcdef.partial", "model", "notes"]);
    }

    #[test]
    fn what_is_finished_or_given_up_is_not_kept_in_mind() {
        // Would break: a process that is told to end removes a model that it has finished.
        let dir = tempfile::tempdir().expect("a directory");
        let of_here = || unfinished().iter().filter(|partial| partial.starts_with(dir.path())).count();
        let given_up = FreshDirectory::create(&dir.path().join("a")).expect("created");
        let finished = FreshDirectory::create(&dir.path().join("b")).expect("created");
        assert_eq!(of_here(), 2);
        drop(given_up);
        finished.finish().expect("moved");
        assert_eq!((of_here(), entries(dir.path())), (0, vec!["b".to_owned()]));
    }
}
