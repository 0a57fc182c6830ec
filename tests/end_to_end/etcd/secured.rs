//! TLS, client certificates and passwords towards etcd.

use std::{fs, path::Path};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use sida_tests::{Etcd, LiveCluster, etcd::ServerTls};

use super::settled;

/// A node could not join where etcd lets in only who proves itself, or would write its password into the log.
#[tokio::test(flavor = "multi_thread")]
async fn etcd_lets_in_who_proves_itself() {
    let dir = tempfile::tempdir().expect("a directory");
    let tls = certificates(dir.path());
    let mut etcd = Etcd::start_tls(tls.clone());
    etcd.enable_auth("sida", "s3cret-word", "/sida/default/");
    let (right, wrong) = (dir.path().join("password"), dir.path().join("wrong"));
    fs::write(&right, "s3cret-word\n").expect("a file");
    fs::write(&wrong, "an0ther-word\n").expect("a file");
    let shown = |path: &Path| path.display().to_string();
    let flags = [
        ["--etcd-ca".to_owned(), shown(&tls.authorities)],
        ["--etcd-cert".to_owned(), shown(&tls.client.0)],
        ["--etcd-key".to_owned(), shown(&tls.client.1)],
        ["--etcd-user".to_owned(), "sida".to_owned()],
        ["--etcd-password-file".to_owned(), shown(&wrong)],
    ]
    .concat();
    let mut live = LiveCluster::new(&etcd.endpoints());
    live.add_flags(&flags.iter().map(String::as_str).collect::<Vec<_>>());
    live.start("coordinator-0");
    live.start("expert-node-0");
    let keys = || etcd.ctl(&["get", "--prefix", "--keys-only", "/sida/"]);
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    assert_eq!(keys().trim(), "", "a wrong password was let in");
    assert!(!live.status("coordinator-0").await.expect("a status").etcd_connected);
    // The password is mended where it stands; nobody is restarted.
    fs::copy(&right, &wrong).expect("a file");
    settled(&live, &["coordinator-0", "expert-node-0"]).await;
    for name in ["coordinator-0", "expert-node-0"] {
        let log = live.process(name).log();
        assert!(!log.contains("0ther-word") && !log.contains("s3cret"), "{log}");
    }
}

/// An authority, a certificate for 127.0.0.1 and one for clients.
fn certificates(dir: &Path) -> ServerTls {
    let mut params = CertificateParams::new(Vec::<String>::new()).expect("parameters");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("an authority");
    let ca = dir.join("ca.pem");
    fs::write(&ca, authority.pem()).expect("a file");
    let issue = |name: &str| {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).expect("parameters");
        params.subject_alt_names.push(SanType::IpAddress([127, 0, 0, 1].into()));
        let certificate = params.signed_by(&key, &authority).expect("a certificate");
        let files = (dir.join(format!("{name}.pem")), dir.join(format!("{name}.key")));
        fs::write(&files.0, certificate.pem()).expect("a file");
        fs::write(&files.1, key.serialize_pem()).expect("a file");
        files
    };
    let (certificate, key) = issue("etcd");
    ServerTls { authorities: ca, certificate, key, client: issue("client") }
}
