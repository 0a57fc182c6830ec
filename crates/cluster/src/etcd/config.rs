//! How a node reaches etcd and what it keeps there. Made by the command line and by tests.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use super::error::EtcdError;
use crate::member::is_host_and_port;

/// A lease is counted in seconds by etcd, and a shorter one would run out while a node computes.
pub const LEASE_TTL_MIN: Duration = Duration::from_secs(1);
/// A dead node would be a member for longer than anybody wants.
pub const LEASE_TTL_MAX: Duration = Duration::from_secs(600);
/// The longest name of a cluster.
pub const CLUSTER_BYTES_MAX: usize = 128;
/// A certificate, a key or a password is far shorter.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// How etcd is reached.
#[derive(Clone, Debug)]
pub struct EtcdConfig {
    /// `host:port` of its members, with a scheme or not. One is used at a time, the next when that fails.
    pub endpoints: Vec<String>,
    /// The cluster's name: everything is kept under `/sida/{cluster}/`.
    pub cluster: String,
    /// How long a member that is gone without a word stays listed.
    pub lease_ttl: Duration,
    /// How often everything is listed anew, whatever the watch has told.
    pub relist_interval: Duration,
    /// Copies of experts that may move in a minute where nothing was lost: a node that joins, a load that changes.
    pub moves_per_minute: u32,
    /// TLS towards etcd. An endpoint without a scheme is reached by TLS where this is set.
    pub tls: Option<EtcdTls>,
    /// Who asks.
    pub user: Option<EtcdUser>,
}

/// TLS towards etcd. The files are read at every connection, so that they can be renewed.
#[derive(Clone, Debug, Default)]
pub struct EtcdTls {
    /// PEM file of the authorities that are trusted; `None`: those of the operating system.
    pub authorities: Option<PathBuf>,
    /// PEM files of this node's certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// A user of etcd.
#[derive(Clone, Debug)]
pub struct EtcdUser {
    /// Its name.
    pub name: String,
    /// The file with its password; the end of the line is none of it. Read at every connection.
    pub password_file: PathBuf,
}

impl EtcdConfig {
    /// The defaults for these endpoints.
    pub fn new(endpoints: Vec<String>, cluster: String) -> Self {
        Self {
            endpoints,
            cluster,
            lease_ttl: Duration::from_secs(5),
            relist_interval: Duration::from_secs(30),
            moves_per_minute: 600,
            tls: None,
            user: None,
        }
    }

    /// Refuses what cannot work.
    pub(crate) fn check(&self) -> Result<(), EtcdError> {
        if self.endpoints.is_empty() {
            return Err(EtcdError::NoEndpoint);
        }
        for endpoint in &self.endpoints {
            let plain = endpoint.strip_prefix("http://");
            let address = plain.or(endpoint.strip_prefix("https://")).unwrap_or(endpoint).trim_end_matches('/');
            if !is_host_and_port(address) {
                return Err(EtcdError::Endpoint { endpoint: endpoint.clone() });
            }
            if plain.is_some() && self.tls.is_some() {
                return Err(EtcdError::PlainEndpoint { endpoint: endpoint.clone() });
            }
        }
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if !(1..=CLUSTER_BYTES_MAX).contains(&self.cluster.len()) || !self.cluster.bytes().all(plain) {
            return Err(EtcdError::Cluster { cluster: self.cluster.clone() });
        }
        if !(LEASE_TTL_MIN..=LEASE_TTL_MAX).contains(&self.lease_ttl) {
            return Err(EtcdError::LeaseTtl { found: self.lease_ttl });
        }
        if let Some(tls) = &self.tls {
            tls.read()?;
        }
        self.user.as_ref().map_or(Ok(()), |user| user.password().map(drop))
    }

    /// How long one question to etcd may take: well within a lease, so that a member of etcd that hangs does not
    /// cost the lease.
    pub(crate) fn call_timeout(&self) -> Duration {
        (self.lease_ttl / 3).min(Duration::from_secs(5))
    }
}

/// The bytes of the PEM files.
pub(crate) struct Pems {
    pub(crate) authorities: Option<Vec<u8>>,
    pub(crate) identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl EtcdTls {
    pub(crate) fn read(&self) -> Result<Pems, EtcdError> {
        let authorities = self.authorities.as_deref().map(read).transpose()?;
        let identity = match &self.identity {
            Some((certificate, key)) => Some((read(certificate)?, read(key)?)),
            None => None,
        };
        Ok(Pems { authorities, identity })
    }
}

impl EtcdUser {
    pub(crate) fn password(&self) -> Result<Password, EtcdError> {
        let file = self.password_file.display().to_string();
        let bytes = read(&self.password_file)?;
        let text = String::from_utf8(bytes).unwrap_or_default();
        match text.trim_end_matches(['\r', '\n']) {
            "" => Err(EtcdError::NoPassword { file }),
            password => Ok(Password(password.to_owned())),
        }
    }
}

/// A password, kept out of logs.
pub(crate) struct Password(pub(crate) String);

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(..)")
    }
}

fn read(path: &Path) -> Result<Vec<u8>, EtcdError> {
    let refused = |source| EtcdError::Read { file: path.display().to_string(), source };
    let bytes = fs::metadata(path).map_err(refused)?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(refused(std::io::Error::other(format!("it has {bytes} bytes, at most {FILE_BYTES_MAX} are read"))));
    }
    fs::read(path).map_err(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_work_is_refused_at_the_start() {
        // Broken: a misspelt flag would be retried for ever instead of being told.
        let good = EtcdConfig::new(vec!["10.0.0.1:2379".into(), "https://etcd-1:2379/".into()], "prod".into());
        assert!(good.check().is_ok());
        let refused = |change: &dyn Fn(&mut EtcdConfig)| {
            let mut config = good.clone();
            change(&mut config);
            config.check().unwrap_err().to_string()
        };
        assert_eq!(refused(&|c| c.endpoints.clear()), "no etcd endpoint is named");
        assert!(refused(&|c| c.endpoints[0] = "10.0.0.1".into()).starts_with("etcd endpoint \"10.0.0.1\", expected"));
        assert!(refused(&|c| c.cluster = "a/b".into()).starts_with("cluster \"a/b\", expected"));
        assert!(refused(&|c| c.lease_ttl = Duration::from_millis(10)).starts_with("lease of 10ms, expected 1s"));
        assert!(refused(&|c| c.lease_ttl = LEASE_TTL_MAX + Duration::from_secs(1)).starts_with("lease of 601s"));
        assert!(refused(&|c| c.cluster.clear()).starts_with("cluster \"\", expected"));
        assert!(refused(&|c| c.cluster = "c".repeat(CLUSTER_BYTES_MAX + 1)).starts_with("cluster \"ccc"));
        let longest = EtcdConfig { cluster: "c".repeat(CLUSTER_BYTES_MAX), lease_ttl: LEASE_TTL_MAX, ..good.clone() };
        assert!(longest.check().is_ok() && EtcdConfig { lease_ttl: LEASE_TTL_MIN, ..good.clone() }.check().is_ok());
        let no_password = |c: &mut EtcdConfig| {
            c.user = Some(EtcdUser { name: "sida".into(), password_file: "no-such-password".into() });
        };
        assert!(refused(&no_password).starts_with("cannot read no-such-password"));
        let no_file = |c: &mut EtcdConfig| {
            c.tls = Some(EtcdTls { authorities: Some("no-such.pem".into()), identity: None });
        };
        assert!(refused(&no_file).starts_with("cannot read no-such.pem"));
        let plain = |c: &mut EtcdConfig| {
            c.endpoints[0] = "http://10.0.0.1:2379".into();
            c.tls = Some(EtcdTls::default());
        };
        assert!(refused(&plain).contains("is plain text"));
    }

    #[test]
    fn a_question_takes_less_than_a_lease() {
        // Broken: one member of etcd that hangs would cost every node its lease, or a long lease half a minute.
        let timeout = |lease: u64| {
            let mut config = EtcdConfig::new(vec![], "c".into());
            config.lease_ttl = Duration::from_secs(lease);
            config.call_timeout()
        };
        assert_eq!((timeout(3), timeout(600)), (Duration::from_secs(1), Duration::from_secs(5)));
    }

    #[test]
    fn a_password_is_read_and_never_shown() {
        // Broken: the end of the line would be part of the password, or the password part of the log.
        let dir = std::env::temp_dir().join(format!("sida-password-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let password_file = dir.join("password");
        fs::write(&password_file, "s3cret\n").unwrap();
        let user = EtcdUser { name: "sida".into(), password_file: password_file.clone() };
        assert_eq!(user.password().unwrap().0, "s3cret");
        assert!(!format!("{:?} {user:?}", user.password().unwrap()).contains("s3cret"));
        fs::write(&password_file, "\n").unwrap();
        assert!(matches!(user.password(), Err(EtcdError::NoPassword { .. })));
        let longest = |bytes: u64| {
            fs::write(&password_file, "x".repeat(bytes as usize)).unwrap();
            user.password().map(|password| password.0.len() as u64)
        };
        assert!(matches!(longest(FILE_BYTES_MAX), Ok(FILE_BYTES_MAX)));
        assert!(matches!(longest(FILE_BYTES_MAX + 1), Err(EtcdError::Read { .. })), "another file than was meant");
        fs::remove_dir_all(dir).unwrap();
    }
}
