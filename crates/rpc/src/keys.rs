//! Keys that callers prove themselves with: the files that a server checks them against, and the one key that a client
//! sends. A server keeps digests only, so that neither its memory nor the time of a comparison tells a key, and no error
//! or log line here quotes one. What a client may use stands behind its key. Read by [`crate::authentication`] and
//! [`crate::client`].

use std::{
    collections::{HashMap, HashSet},
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use http::HeaderValue;
use sha2::{Digest, Sha256};
use sida_routing::client_limits::{ClientLimit, ClientLimits};
use sida_telemetry::names;
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use crate::reload::{self, FileError, FromFiles, ReadFile};

/// The shortest key: nobody guesses one of so many characters that were drawn at random.
const KEY_BYTES_MIN: usize = 16;
/// The longest key, and the longest name of a client.
const KEY_BYTES_MAX: usize = 256;
const NAME_BYTES_MAX: usize = 64;
/// Keys of one file. Names of clients are labels of metrics.
const KEYS_MAX: usize = 256;

/// What every holder of the cluster's key is called.
const CLUSTER: &str = "cluster";

/// A file of the keys that a server lets in. Lines that are empty or begin with `#` say nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyFile {
    /// `name:key` a line, of clients; behind it what the client may use, as `requests-per-minute=60`.
    Clients(PathBuf),
    /// A key a line, of one cluster: nodes send the first and let in whoever has any of them.
    Cluster(PathBuf),
}

/// The key that a client sends.
#[derive(Clone, PartialEq, Eq)]
pub enum OwnKey {
    /// The key itself.
    Text(String),
    /// The first line of this file that is neither empty nor begins with `#`. Read for every connection.
    File(PathBuf),
}

/// Why keys cannot be used.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum KeyError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{file}, line {line}: {problem}")]
    Line { file: PathBuf, line: usize, problem: Problem },
    #[error("{file} holds no key")]
    NoKey { file: PathBuf },
    #[error("the key that was given: {0}")]
    Own(Problem),
}

/// What is wrong with a line. Quotes nothing of it.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Problem {
    #[error("it is not UTF-8")]
    NotText,
    #[error("expected NAME:KEY, found no colon")]
    NoColon,
    #[error("the name has to be 1 to {NAME_BYTES_MAX} letters, digits, dots, hyphens and underscores")]
    Name,
    #[error("the key has {0} characters, expected {KEY_BYTES_MIN} to {KEY_BYTES_MAX}")]
    Length(usize),
    #[error("the key may hold visible ASCII characters only")]
    Characters,
    #[error(
        "the key has a comma, expected limits behind a blank, as NAME:KEY requests-per-minute=60 queue-max=5, and none in a key"
    )]
    Comma,
    #[error("the name stands in an earlier line, too")]
    NameAgain,
    #[error("the key stands in an earlier line, too")]
    KeyAgain,
    #[error("one key more than the {KEYS_MAX} that are read")]
    TooMany,
    #[error("behind the key expected limits as requests-per-minute=N, each once: {}", limit_names())]
    LimitName,
    #[error("{} has to be a whole number from 1", .0.name())]
    LimitValue(ClientLimit),
}

/// The keys of a file, by their digests.
pub(crate) struct Keys {
    known: HashMap<[u8; 32], KnownKey>,
    /// What clients may use, by their names.
    limits: HashMap<Arc<str>, ClientLimits>,
}

/// A key that lets in.
#[derive(Clone)]
pub(crate) struct KnownKey {
    /// Whose it is.
    pub(crate) name: Arc<str>,
    /// Cancelled when the key is no longer in the file.
    pub(crate) taken_away: CancellationToken,
}

impl Keys {
    /// The key, if it is one of the file. What is looked up is a digest: how long it takes says nothing of the keys.
    pub(crate) fn known(&self, key: &[u8]) -> Option<KnownKey> {
        self.known.get(&digest(key)).cloned()
    }

    /// What the client of this name may use, as far as the file says.
    pub(crate) fn limits(&self, name: &str) -> ClientLimits {
        self.limits.get(name).copied().unwrap_or_default()
    }
}

impl KeyFile {
    fn path(&self) -> &Path {
        match self {
            Self::Clients(path) | Self::Cluster(path) => path,
        }
    }

    /// The name, the key and the limits of a line.
    fn entry<'a>(&self, line: &'a str) -> Result<(&'a str, &'a str, ClientLimits), Problem> {
        match self {
            Self::Cluster(_) => Ok((CLUSTER, line, ClientLimits::default())),
            Self::Clients(_) => {
                let (name, rest) = line.split_once(':').ok_or(Problem::NoColon)?;
                let is_fit = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
                let is_name = (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(is_fit);
                let (key, said) = rest.split_once([' ', '\t']).unwrap_or((rest, ""));
                if is_name { Ok((name, key, limits(said)?)) } else { Err(Problem::Name) }
            }
        }
    }
}

impl FromFiles for KeyFile {
    type Contents = Vec<u8>;
    type Made = Keys;
    type Error = KeyError;
    const NAME: &'static str = "keys";
    const RELOADS: &'static str = names::KEY_RELOADS_TOTAL;

    fn contents(&self, read: &mut ReadFile<'_>) -> Result<Vec<u8>, FileError> {
        read(self.path())
    }

    fn make(&self, content: &Vec<u8>) -> Result<Keys, KeyError> {
        let (mut known, mut all_limits, mut taken) = (HashMap::new(), HashMap::new(), HashSet::new());
        for (number, line) in lines(content) {
            let at = |problem| KeyError::Line { file: self.path().to_owned(), line: number, problem };
            let (name, key, limits) = line.and_then(|line| self.entry(line)).map_err(at)?;
            check(key).map_err(at)?;
            if known.len() == KEYS_MAX {
                return Err(at(Problem::TooMany));
            }
            if matches!(self, Self::Clients(_)) && !taken.insert(name) {
                return Err(at(Problem::NameAgain));
            }
            let name = Arc::<str>::from(name);
            all_limits.insert(name.clone(), limits);
            let key_of_name = KnownKey { name, taken_away: CancellationToken::new() };
            if known.insert(digest(key.as_bytes()), key_of_name).is_some() {
                return Err(at(Problem::KeyAgain));
            }
        }
        match known.is_empty() {
            true => Err(KeyError::NoKey { file: self.path().to_owned() }),
            false => Ok(Keys { known, limits: all_limits }),
        }
    }

    /// Calls of clients whose keys stay go on, and those of others are told.
    fn succeed(&self, made: &mut Keys, before: &Keys) {
        for (digest, key) in &before.known {
            match made.known.get_mut(digest) {
                Some(same) => same.taken_away = key.taken_away.clone(),
                // Nodes may call on by the key that their lanes were opened with: it is renewed while they run.
                None if matches!(self, Self::Cluster(_)) => {}
                None => key.taken_away.cancel(),
            }
        }
    }
}

impl OwnKey {
    /// The header that carries it, marked so that nothing prints it or keeps it in a table.
    pub(crate) fn header(&self) -> Result<HeaderValue, KeyError> {
        let mut header = match self {
            Self::Text(key) => bearer(key.trim()).map_err(KeyError::Own)?,
            Self::File(file) => {
                let content = reload::read(file)?;
                let (number, line) = lines(&content).next().ok_or_else(|| KeyError::NoKey { file: file.to_owned() })?;
                let at = |problem| KeyError::Line { file: file.to_owned(), line: number, problem };
                line.and_then(bearer).map_err(at)?
            }
        };
        header.set_sensitive(true);
        Ok(header)
    }
}

impl fmt::Debug for OwnKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(_) => f.write_str("Text(..)"),
            Self::File(file) => f.debug_tuple("File").field(file).finish(),
        }
    }
}

fn bearer(key: &str) -> Result<HeaderValue, Problem> {
    check(key)?;
    HeaderValue::try_from(format!("Bearer {key}")).map_err(|_| Problem::Characters)
}

/// The limits that stand behind a key.
fn limits(said: &str) -> Result<ClientLimits, Problem> {
    let mut limits = ClientLimits::default();
    for said in said.split_ascii_whitespace() {
        let (name, value) = said.split_once('=').ok_or(Problem::LimitName)?;
        let limit = ClientLimit::ALL.into_iter().find(|limit| limit.name() == name).ok_or(Problem::LimitName)?;
        let value = value.parse().ok().filter(|value| *value > 0).ok_or(Problem::LimitValue(limit))?;
        if limits.limit(limit).replace(value).is_some() {
            return Err(Problem::LimitName);
        }
    }
    Ok(limits)
}

fn limit_names() -> String {
    ClientLimit::ALL.map(ClientLimit::name).join(", ")
}

fn check(key: &str) -> Result<(), Problem> {
    if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Problem::Characters);
    }
    // Who writes one means to part a key from what comes behind it, which would become a part of the key.
    if key.contains(',') {
        return Err(Problem::Comma);
    }
    if (KEY_BYTES_MIN..=KEY_BYTES_MAX).contains(&key.len()) { Ok(()) } else { Err(Problem::Length(key.len())) }
}

/// The lines that say something, each with its number.
fn lines(content: &[u8]) -> impl Iterator<Item = (usize, Result<&str, Problem>)> {
    let lines = content.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let said = (1..).zip(lines).filter(|(_, line)| !line.is_empty() && !line.starts_with(b"#"));
    said.map(|(number, line)| (number, str::from_utf8(line).map_err(|_| Problem::NotText)))
}

fn digest(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALICE: &str = "0123456789abcdef";
    const BOB: &str = "fedcba9876543210:with-a-colon";

    fn clients(text: &str) -> Result<Keys, KeyError> {
        KeyFile::Clients("keys".into()).make(&text.as_bytes().to_vec())
    }

    #[test]
    fn a_key_tells_its_client() {
        // Would break: a client is taken for another, or a part of a key is enough.
        let keys = clients(&format!("# who may ask\r\n\n  alice:{ALICE}\r\nbob:{BOB}")).unwrap();
        let client = |keys: &Keys, key: &str| keys.known(key.as_bytes()).map(|key| key.name.to_string());
        assert_eq!(client(&keys, ALICE).as_deref(), Some("alice"));
        assert_eq!(client(&keys, BOB).as_deref(), Some("bob"));
        for other in ["", "alice", &ALICE[1..], &ALICE.to_uppercase(), &format!("{ALICE} "), &format!("alice:{ALICE}")]
        {
            assert_eq!(client(&keys, other), None, "{other}");
        }
        let both = KeyFile::Cluster("keys".into()).make(&format!("{ALICE}\n# older\n{BOB}\n").into()).unwrap();
        assert!([ALICE, BOB].iter().all(|key| client(&both, key).as_deref() == Some(CLUSTER)));
    }

    #[test]
    fn what_a_client_may_use_stands_behind_its_key() {
        // Would break: an operator's limit is not read, is another client's, or is taken for a part of the key.
        let keys =
            clients(&format!("alice:{ALICE}  requests-per-minute=60\ttokens-per-minute=9000 \nbob:{BOB}")).unwrap();
        let [requests_per_minute, tokens_per_minute] = [Some(60), Some(9000)];
        let expected = ClientLimits { requests_per_minute, tokens_per_minute, ..ClientLimits::default() };
        assert_eq!(keys.limits("alice"), expected);
        assert_eq!((keys.limits("bob"), keys.limits("carol")), Default::default());
        assert!(keys.known(ALICE.as_bytes()).is_some());
        let all: String = ClientLimit::ALL.map(|limit| format!(" {}=7", limit.name())).concat();
        let mut found = clients(&format!("alice:{ALICE}{all}")).unwrap().limits("alice");
        assert!(ClientLimit::ALL.into_iter().all(|limit| *found.limit(limit) == Some(7)));
    }

    #[test]
    fn keys_that_are_gone_are_told_of() {
        // Would break: calls by a key that was taken away go on, or those by a key that stayed are ended.
        let file = KeyFile::Clients("keys".into());
        let made = |text: String| file.make(&text.into_bytes()).unwrap();
        let before = made(format!("alice:{ALICE}\nbob:{BOB}"));
        let of = |keys: &Keys, key: &str| keys.known(key.as_bytes()).unwrap().taken_away;
        let (alice, bob) = (of(&before, ALICE), of(&before, BOB));
        let mut second = made(format!("bob:{BOB} requests-max=1\n"));
        file.succeed(&mut second, &before);
        assert!(alice.is_cancelled() && !bob.is_cancelled());
        let mut third = made(format!("alice:{ALICE}"));
        file.succeed(&mut third, &second);
        assert!(bob.is_cancelled() && !of(&third, ALICE).is_cancelled());
        let cluster = KeyFile::Cluster("keys".into());
        let before = cluster.make(&ALICE.into()).unwrap();
        cluster.succeed(&mut cluster.make(&BOB.into()).unwrap(), &before);
        assert!(!of(&before, ALICE).is_cancelled(), "lanes between nodes stay while their key is renewed");
    }

    #[test]
    fn what_is_wrong_is_named_and_not_quoted() {
        // Would break: a weak or doubled key is taken, or a log line tells a key that somebody mistyped.
        let many: String = (0..=KEYS_MAX).map(|n| format!("c{n}:key-number-{n:09}\n")).collect();
        let cases = [
            (format!("alice:{ALICE}\n\nbob"), 3, Problem::NoColon),
            (format!("alice {ALICE}"), 1, Problem::NoColon),
            (format!("alice smith:{ALICE}"), 1, Problem::Name),
            (format!(":{ALICE}"), 1, Problem::Name),
            (format!("{}:{ALICE}", "n".repeat(NAME_BYTES_MAX + 1)), 1, Problem::Name),
            ("\nalice:secret-but-shrt".replace("-shrt", ""), 2, Problem::Length(10)),
            (format!("alice:{}", "k".repeat(KEY_BYTES_MAX + 1)), 1, Problem::Length(KEY_BYTES_MAX + 1)),
            (format!("alice:{ALICE} secret"), 1, Problem::LimitName),
            (format!("alice:{ALICE} secret=1"), 1, Problem::LimitName),
            (format!("alice:{ALICE} queue-max=1 queue-max=2"), 1, Problem::LimitName),
            (format!("alice:{ALICE} queue-max=0"), 1, Problem::LimitValue(ClientLimit::Queue)),
            (format!("alice:{ALICE} queue-max=secret"), 1, Problem::LimitValue(ClientLimit::Queue)),
            (format!("alice:{ALICE}é"), 1, Problem::Characters),
            (format!("alice:{BOB}\nbob:{ALICE},requests-per-minute=60"), 2, Problem::Comma),
            (format!("alice:{ALICE}, requests-per-minute=60"), 1, Problem::Comma),
            (format!("alice:{ALICE}\nalice:{BOB}"), 2, Problem::NameAgain),
            (format!("alice:{ALICE}\nbob:{ALICE}"), 2, Problem::KeyAgain),
            (many, KEYS_MAX + 1, Problem::TooMany),
        ];
        for (text, expected_line, expected) in cases {
            let Err(error) = clients(&text) else { panic!("{expected:?}: it was taken") };
            let told = format!("{error} {error:?}");
            assert!(!told.contains(ALICE) && !told.contains("secret"), "{told}");
            let KeyError::Line { line, problem, .. } = error else { panic!("{told}") };
            assert_eq!((line, problem), (expected_line, expected), "{told}");
        }
        assert!(matches!(clients("# none\n\n"), Err(KeyError::NoKey { .. })));
        let bytes = KeyFile::Clients("keys".into()).make(&b"alice:\xff".to_vec());
        assert!(matches!(bytes, Err(KeyError::Line { problem: Problem::NotText, .. })));
    }

    #[test]
    fn the_key_that_is_sent_is_the_first_of_its_file() {
        // Would break: a cluster's key cannot be renewed, since old and new cannot stand beside each other; or a key is printed.
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("key");
        std::fs::write(&file, format!("# newer\n\n{BOB}\n{ALICE}\n")).unwrap();
        let own = OwnKey::File(file.clone());
        let header = own.header().unwrap();
        assert_eq!(header.as_bytes(), format!("Bearer {BOB}").as_bytes());
        let text = OwnKey::Text(format!("{ALICE}\n"));
        assert_eq!(text.header().unwrap().as_bytes(), format!("Bearer {ALICE}").as_bytes());
        let told = format!("{header:?} {own:?} {text:?}");
        assert!(!told.contains(ALICE) && !told.contains(BOB), "{told}");
        std::fs::write(&file, "short").unwrap();
        assert!(matches!(own.header(), Err(KeyError::Line { line: 1, problem: Problem::Length(5), .. })));
        assert!(matches!(OwnKey::Text("two words, and long".into()).header(), Err(KeyError::Own(Problem::Characters))));
    }

    proptest! {
        #[test]
        fn no_file_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            // Would break: a file of something else ends a node that serves.
            let _ = KeyFile::Clients("keys".into()).make(&bytes);
            let _ = KeyFile::Cluster("keys".into()).make(&bytes);
        }
    }
}
