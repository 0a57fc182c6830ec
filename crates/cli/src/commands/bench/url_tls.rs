//! TLS towards `--url`, from the flags that describe it for gRPC. Used by [`super::http_client`].

use std::path::Path;

use hyper_rustls::ConfigBuilderExt;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use sida_rpc::ClientTls;

use super::url::BaseUrl;
use crate::bad_configuration::BadConfiguration;

/// What the flags say. Authorities of the operating system are read only where they are needed.
pub(crate) fn config(base: &BaseUrl, tls: &ClientTls) -> Result<ClientConfig, BadConfiguration> {
    if tls.domain.is_some() {
        return Err(BadConfiguration::new(
            "--tls-domain is not for --url, whose certificate must carry the URL's own host",
        ));
    }
    let builder = ClientConfig::builder();
    let builder = match &tls.authorities {
        None if !base.is_https() => builder.with_root_certificates(RootCertStore::empty()),
        None => builder.with_native_roots().map_err(|error| {
            BadConfiguration::because("the operating system has no authorities to trust (name some by --tls-ca)", error)
        })?,
        Some(file) => {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(certificates(file)?);
            builder.with_root_certificates(roots)
        }
    };
    let Some((chain, key)) = &tls.identity else { return Ok(builder.with_no_client_auth()) };
    let unreadable =
        |error| BadConfiguration::because(format!("cannot read {} as PEM of a private key", key.display()), error);
    let (chain, key) = (certificates(chain)?, PrivateKeyDer::from_pem_file(key).map_err(unreadable)?);
    let refused = |error| match error {
        rustls::Error::InconsistentKeys(_) => BadConfiguration::new("--tls-cert and --tls-key do not belong together"),
        other => BadConfiguration::because("--tls-cert and --tls-key cannot be used", other),
    };
    builder.with_client_auth_cert(chain, key).map_err(refused)
}

/// All certificates of a file; at least one.
fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, BadConfiguration> {
    let shown = file.display();
    let unreadable = |error| BadConfiguration::because(format!("cannot read {shown} as PEM of certificates"), error);
    let found = CertificateDer::pem_file_iter(file).map_err(unreadable)?;
    let found: Vec<_> = found.collect::<Result<_, _>>().map_err(unreadable)?;
    if found.is_empty() { Err(BadConfiguration::new(format!("{shown} holds no certificate"))) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn files_that_cannot_be_used_are_named() {
        // Broken: a wrong file would be found out as a connection that fails, or any server be trusted.
        let dir = tempfile::tempdir().unwrap();
        let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let [certificate, key, empty, absent] =
            ["cert.pem", "key.pem", "empty.pem", "absent.pem"].map(|name| dir.path().join(name));
        fs::write(&certificate, own.cert.pem()).unwrap();
        fs::write(&key, own.signing_key.serialize_pem()).unwrap();
        fs::write(&empty, "nothing").unwrap();
        let base: BaseUrl = "https://localhost/v1".parse().unwrap();
        let with = |authorities: Option<&Path>, identity: Option<(&Path, &Path)>| {
            let identity = identity.map(|(chain, key)| (chain.to_owned(), key.to_owned()));
            let tls = ClientTls { authorities: authorities.map(Path::to_owned), identity, domain: None };
            config(&base, &tls).map(drop).map_err(|error| error.to_string())
        };
        assert_eq!(with(Some(&certificate), None), Ok(()));
        assert_eq!(with(Some(&certificate), Some((&certificate, &key))), Ok(()));
        assert!(with(Some(&absent), None).unwrap_err().contains("absent.pem"));
        assert!(with(Some(&empty), None).unwrap_err().contains("empty.pem"));
        assert!(with(Some(&certificate), Some((&certificate, &empty))).unwrap_err().contains("empty.pem"));
        let domain = ClientTls { domain: Some("other".into()), ..ClientTls::default() };
        assert!(config(&base, &domain).unwrap_err().to_string().contains("--tls-domain"));
    }
}
