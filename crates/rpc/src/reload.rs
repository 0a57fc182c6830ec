//! What is made of files, as certificates and keys are, and made anew when they change, so that a node need not be started
//! again for it. A node looks at its files every few seconds and goes by their content: links that are swapped, as
//! Kubernetes does for secrets, change no time of modification that could be trusted. Files that cannot be used leave in
//! service what was made before. Used by [`crate::tls`] and [`crate::keys`].

use std::{
    convert::Infallible,
    error::Error,
    fmt,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

use sha2::{Digest, Sha256};
use sida_telemetry::{counter, names};
use thiserror::Error;
use tokio::{task, time};

/// The longest file read: far above any chain of certificates or list of keys.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// How a look at changed files turned out, as the metric says it.
const OUTCOMES: [&str; 2] = ["loaded", "refused"];

/// Why a file cannot be read.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum FileError {
    #[error("cannot read {file}: {source}")]
    Read { file: PathBuf, source: io::Error },
    #[error("{file} is longer than {expected} bytes")]
    Length { file: PathBuf, expected: u64 },
}

/// Reads a file.
pub(crate) type ReadFile<'a> = dyn FnMut(&Path) -> Result<Vec<u8>, FileError> + 'a;

/// What can be made of the content of files.
pub(crate) trait FromFiles: Send + Sync + 'static {
    /// What the files hold.
    type Contents;
    /// What is made.
    type Made: Send + Sync + 'static;
    /// Why it cannot be. Goes into the log, so it quotes no secret.
    type Error: Error + From<FileError>;
    /// What it is called in the log.
    const NAME: &'static str;
    /// The metric that counts how often it was made anew, by outcome.
    const RELOADS: &'static str;

    /// Reads every file by `read`, always in the same order.
    fn contents(&self, read: &mut ReadFile<'_>) -> Result<Self::Contents, FileError>;

    /// Makes it of what the files hold.
    fn make(&self, contents: &Self::Contents) -> Result<Self::Made, Self::Error>;

    /// Has what was `made` take the place of what was there `before`.
    fn succeed(&self, _made: &mut Self::Made, _before: &Self::Made) {}
}

/// What is made of files, as they were when they were last whole.
pub(crate) struct Reloading<S: FromFiles> {
    source: S,
    current: RwLock<Arc<S::Made>>,
    /// What was found at the last look, whether it could be used or not: only a change is tried.
    found: Mutex<Found>,
}

/// What a look at files found: a digest of their content, or why they cannot be read.
type Found = Result<[u8; 32], String>;

impl<S: FromFiles> Reloading<S> {
    /// Makes it for the first time.
    pub(crate) fn open(source: S) -> Result<Arc<Self>, S::Error> {
        for outcome in OUTCOMES {
            counter!(S::RELOADS, names::OUTCOME => outcome).increment(0);
        }
        let (contents, digest) = read_all(&source)?;
        let current = RwLock::new(Arc::new(source.make(&contents)?));
        Ok(Arc::new(Self { source, current, found: Mutex::new(Ok(digest)) }))
    }

    /// As it is now. Whoever holds it keeps what it was when they asked.
    pub(crate) fn current(&self) -> Arc<S::Made> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Looks at the files every `period`, for ever.
    pub(crate) async fn follow(self: Arc<Self>, period: Duration) -> Infallible {
        loop {
            time::sleep(period).await;
            let this = self.clone();
            // A volume may be slow, and the runtime's own threads carry calls.
            if let Err(error) = task::spawn_blocking(move || this.look()).await {
                tracing::error!(%error, what = S::NAME, "looking at files failed");
            }
        }
    }

    /// Looks at the files once. Several may do so at a time: a change is acted on by one of them.
    fn look(&self) {
        let read = read_all(&self.source);
        let now = read.as_ref().map(|(_, digest)| *digest).map_err(FileError::to_string);
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if *found == now {
            return;
        }
        *found = now;
        let made = read.map_err(S::Error::from).and_then(|(contents, _)| self.source.make(&contents));
        let [loaded, refused] = OUTCOMES;
        let outcome = match made {
            Ok(mut made) => {
                self.source.succeed(&mut made, &self.current());
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(made);
                tracing::info!(what = S::NAME, "changed files were read and are in service");
                loaded
            }
            Err(error) => {
                tracing::warn!(what = S::NAME, %error, "changed files cannot be used: what was read before stays in service");
                refused
            }
        };
        counter!(S::RELOADS, names::OUTCOME => outcome).increment(1);
    }
}

/// Looks at files every `period`, for ever, where something is made of files.
pub(crate) async fn follow_if_any<S: FromFiles>(reloading: Option<Arc<Reloading<S>>>, period: Duration) -> Infallible {
    match reloading {
        Some(reloading) => reloading.follow(period).await,
        None => std::future::pending().await,
    }
}

impl<S: FromFiles + fmt::Debug> fmt::Debug for Reloading<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)
    }
}

/// The content of a file, if it is not too long.
pub(crate) fn read(file: &Path) -> Result<Vec<u8>, FileError> {
    let failed = |source| FileError::Read { file: file.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(file).map_err(failed)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(FileError::Length { file: file.to_owned(), expected: FILE_BYTES_MAX });
    }
    Ok(bytes)
}

/// What all files of a source hold, and a digest of it.
fn read_all<S: FromFiles>(source: &S) -> Result<(S::Contents, [u8; 32]), FileError> {
    let mut digest = Sha256::new();
    let contents = source.contents(&mut |file| {
        let content = read(file)?;
        digest.update((content.len() as u64).to_le_bytes());
        digest.update(&content);
        Ok(content)
    })?;
    Ok((contents, digest.finalize().into()))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    /// A number, of a file that holds one.
    #[derive(Debug)]
    struct Number(PathBuf);

    #[derive(Debug, Error)]
    enum NumberError {
        #[error(transparent)]
        File(#[from] FileError),
        #[error("it is no number")]
        Text,
    }

    impl FromFiles for Number {
        type Contents = Vec<u8>;
        type Made = u32;
        type Error = NumberError;
        const NAME: &'static str = "number";
        const RELOADS: &'static str = "numbers_total";

        fn contents(&self, read: &mut ReadFile<'_>) -> Result<Vec<u8>, FileError> {
            read(&self.0)
        }

        fn make(&self, content: &Vec<u8>) -> Result<u32, NumberError> {
            String::from_utf8_lossy(content).trim().parse().map_err(|_| NumberError::Text)
        }
    }

    #[test]
    fn what_is_broken_or_gone_leaves_what_was_there() {
        // Would break: half a file, or a volume that is away for a moment, ends a node's service.
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("number");
        fs::write(&file, "1").unwrap();
        let reloading = Reloading::open(Number(file.clone())).unwrap();
        assert_eq!(*reloading.current(), 1);
        for (content, expected) in [(Some("x"), 1), (None, 1), (Some("2"), 2), (Some("2"), 2), (Some(""), 2)] {
            match content {
                Some(content) => fs::write(&file, content).unwrap(),
                None => fs::remove_file(&file).unwrap(),
            }
            reloading.look();
            assert_eq!(*reloading.current(), expected, "{content:?}");
        }
    }

    #[test]
    fn a_link_that_is_swapped_is_a_change() {
        // Would break: Kubernetes renews a secret, and no node notices: the file's own time and place stay as they were.
        let dir = tempfile::tempdir().unwrap();
        for (folder, number) in [("..1", "1"), ("..2", "2")] {
            fs::create_dir(dir.path().join(folder)).unwrap();
            fs::write(dir.path().join(folder).join("number"), number).unwrap();
        }
        let data = dir.path().join("..data");
        symlink("..1", &data).unwrap();
        symlink("..data/number", dir.path().join("number")).unwrap();
        let reloading = Reloading::open(Number(dir.path().join("number"))).unwrap();
        symlink("..2", dir.path().join("..new")).unwrap();
        fs::rename(dir.path().join("..new"), &data).unwrap();
        reloading.look();
        assert_eq!(*reloading.current(), 2);
    }

    #[test]
    fn a_file_that_is_too_long_is_not_read() {
        // Would break: a wrong path, as that of a model, is read into memory every few seconds.
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("long");
        File::create(&file).unwrap().set_len(FILE_BYTES_MAX + 1).unwrap();
        assert!(matches!(read(&file), Err(FileError::Length { .. })));
        File::options().write(true).open(&file).unwrap().set_len(FILE_BYTES_MAX).unwrap();
        assert_eq!(read(&file).unwrap().len() as u64, FILE_BYTES_MAX);
    }
}
