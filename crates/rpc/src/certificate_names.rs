//! The names in a certificate, and patterns of names that are let in. Read off the certificate that a client showed, by
//! [`crate::connection`], once TLS has checked that an authority of ours signed it.

use std::{fmt, str::FromStr, sync::Arc};

use thiserror::Error;
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer, X509Certificate},
};

/// The longest name read, of a host as of a person.
const NAME_BYTES_MAX: usize = 256;
/// Names of one certificate that are read.
const NAMES_MAX: usize = 64;

/// The names of a certificate in DER: of its subject (CN), then those of hosts and URIs that it is good for.
pub(crate) fn names(certificate: &[u8]) -> Vec<Arc<str>> {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { return Vec::new() };
    let subject = certificate.subject().iter_common_name().filter_map(|name| name.as_str().ok());
    let others = certificate.subject_alternative_name().ok().flatten();
    let others = others.iter().flat_map(|others| &others.value.general_names).filter_map(|name| match name {
        GeneralName::DNSName(name) | GeneralName::URI(name) => Some(*name),
        _ => None,
    });
    let is_fit = |name: &&str| (1..=NAME_BYTES_MAX).contains(&name.len()) && !name.contains(char::is_control);
    subject.chain(others).filter(is_fit).take(NAMES_MAX).map(Arc::from).collect()
}

/// Names that are let in: one, or all that end so where it begins with `*`. Upper and lower case are the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamePattern(String);

/// Not a pattern of names.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{found:?} is no pattern of names, expected a name as node.example, or * and the end of one as *.example")]
pub struct NamePatternError {
    found: String,
}

impl NamePattern {
    /// Whether the name is one of those.
    pub(crate) fn matches(&self, name: &str) -> bool {
        let name = name.to_ascii_lowercase();
        match self.0.strip_prefix('*') {
            Some(end) => name.len() > end.len() && name.ends_with(end),
            None => name == self.0,
        }
    }
}

impl FromStr for NamePattern {
    type Err = NamePatternError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let name = text.strip_prefix('*').unwrap_or(text);
        let is_fit = (1..=NAME_BYTES_MAX).contains(&name.len()) && !name.contains(['*', ' ']);
        match is_fit {
            true => Ok(Self(text.to_ascii_lowercase())),
            false => Err(NamePatternError { found: text.to_owned() }),
        }
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    fn pattern(text: &str) -> NamePattern {
        text.parse().unwrap()
    }

    #[test]
    fn all_names_of_a_certificate_are_read() {
        // Would break: a node is refused, or let in, by a part of what its certificate says.
        let mut params = CertificateParams::new(vec!["node.sida".to_owned(), "10.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, "A node");
        params.subject_alt_names.push(SanType::URI("spiffe://sida/node".try_into().unwrap()));
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let found = names(certificate.der());
        assert!(found.iter().map(AsRef::as_ref).eq(["A node", "node.sida", "spiffe://sida/node"]), "{found:?}");
        assert_eq!(names(b"no certificate"), Vec::<Arc<str>>::new());
    }

    #[test]
    fn patterns_let_in_what_they_say_and_no_more() {
        // Would break: a name that only looks like a member's is let in.
        let all = pattern("*.sida.example");
        assert!(all.matches("node-0.sida.example") && all.matches("a.b.SIDA.example"));
        for other in ["sida.example", ".sida.example", "node-0.sida.example.org", "xsida.example", ""] {
            assert!(!all.matches(other), "{other}");
        }
        let one = pattern("Node.example");
        assert!(one.matches("node.EXAMPLE") && !one.matches("a.node.example") && !one.matches("node.example."));
        for wrong in ["", "*", "a*b", "**.x", "two words"] {
            assert!(wrong.parse::<NamePattern>().is_err(), "{wrong:?}");
        }
    }
}
