//! The members of a cluster that never changes, from a TOML file that every node gets (`--static FILE`):
//!
//! ```toml
//! replicas = 2                       # holders per expert; 1 when left out
//!
//! [[coordinator]]
//! name = "coordinator-0"
//! address = "10.0.0.1:50051"
//!
//! [[expert-node]]
//! name = "expert-node-0"
//! address = "10.0.0.2:50051"
//! weight = 2.0                       # share of the experts; 1.0 when left out
//!
//! [[predictor-node]]
//! name = "predictor-node-0"
//! address = "10.0.0.3:50051"
//! ```
//!
//! Read by the command line. Errors name the line, so that a person can mend it.

use std::{
    fs::File,
    io::{self, Read},
    ops::Range,
    path::Path,
};

use serde::Deserialize;
use sida_routing::NodeId;
use thiserror::Error;
use toml::Spanned;

use crate::{
    cluster::{Cluster, ClusterError},
    member::{Address, Member, Role, is_host_and_port, is_name},
};

/// The largest file read: some ten thousand members.
pub const FILE_BYTES_MAX: u64 = 1 << 20;

/// A checked file.
#[derive(Clone, Debug)]
pub struct StaticFile {
    /// Everyone in it: coordinators, then expert-nodes, then predictor-nodes, each in the order of the file.
    pub members: Vec<Member>,
    /// Holders per expert.
    pub replicas: usize,
}

/// Why a file is refused.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum StaticFileError {
    #[error("cannot read {file}: {source}")]
    Read { file: String, source: io::Error },
    #[error("{file} is longer than {expected} bytes")]
    Length { file: String, expected: u64 },
    #[error("{file} is no UTF-8 text")]
    Text { file: String },
    #[error("{file} line {line}: {message}")]
    Syntax { file: String, line: usize, message: String },
    #[error("{file} line {line}: key {key}: found {found:?}, expected {expected}")]
    Value { file: String, line: usize, key: &'static str, found: String, expected: &'static str },
    #[error("{file} has no member called {node:?}; it names {}", if .known.is_empty() { "nobody".to_owned() } else { .known.join(", ") })]
    Unknown { file: String, node: String, known: Vec<String> },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Document {
    replicas: Option<Spanned<i64>>,
    #[serde(default)]
    coordinator: Vec<Entry>,
    #[serde(default)]
    expert_node: Vec<Entry>,
    #[serde(default)]
    predictor_node: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: Spanned<String>,
    address: Spanned<String>,
    weight: Option<Spanned<f64>>,
}

impl StaticFile {
    /// Reads and checks a file.
    pub fn open(path: &Path) -> Result<Self, StaticFileError> {
        let file = path.display().to_string();
        let read = |source| StaticFileError::Read { file: file.clone(), source };
        let mut bytes = Vec::new();
        File::open(path).map_err(read)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(read)?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            return Err(StaticFileError::Length { file, expected: FILE_BYTES_MAX });
        }
        let text = String::from_utf8(bytes).map_err(|_| StaticFileError::Text { file: file.clone() })?;
        Self::parse(&file, &text)
    }

    /// Checks the text of a file; `file` is its name in errors.
    pub fn parse(file: &str, text: &str) -> Result<Self, StaticFileError> {
        let document: Document = toml::from_str(text).map_err(|error| StaticFileError::Syntax {
            file: file.to_owned(),
            line: line_of(text, error.span().unwrap_or_default()),
            message: error.message().to_owned(),
        })?;
        let check = Check { file, text };
        let mut members: Vec<Member> = Vec::new();
        let roles = [
            (Role::Coordinator, document.coordinator),
            (Role::ExpertNode, document.expert_node),
            (Role::PredictorNode, document.predictor_node),
        ];
        for (role, entries) in roles {
            for entry in entries {
                let member = check.member(role, &entry)?;
                if members.iter().any(|other| other.node == member.node) {
                    return Err(check.value("name", &entry.name, "a name that no other member has"));
                }
                members.push(member);
            }
        }
        let replicas = match document.replicas {
            None => 1,
            Some(replicas) => usize::try_from(*replicas.get_ref())
                .ok()
                .filter(|&replicas| replicas > 0)
                .ok_or_else(|| check.value("replicas", &replicas, "at least 1"))?,
        };
        Ok(Self { members, replicas })
    }

    /// The member called `node`, which has to be there: a node looks itself up by this.
    pub fn member(&self, file: &str, node: &str) -> Result<&Member, StaticFileError> {
        self.members.iter().find(|member| member.node.as_str() == node).ok_or_else(|| StaticFileError::Unknown {
            file: file.to_owned(),
            node: node.to_owned(),
            known: self.members.iter().map(|member| member.node.to_string()).collect(),
        })
    }

    /// The cluster of this file for a model of `moe_layers` layers with `num_experts` experts each.
    pub fn cluster(&self, moe_layers: usize, num_experts: usize) -> Result<Cluster, ClusterError> {
        Cluster::fixed(self.members.clone(), moe_layers, num_experts, self.replicas)
    }
}

/// What errors are told by: the file's name and text.
struct Check<'a> {
    file: &'a str,
    text: &'a str,
}

impl Check<'_> {
    fn member(&self, role: Role, entry: &Entry) -> Result<Member, StaticFileError> {
        let (name, address) = (entry.name.get_ref(), entry.address.get_ref());
        if !is_name(name) {
            return Err(self.value("name", &entry.name, "letters, digits, '-', '_' and '.'"));
        }
        if !is_host_and_port(address) {
            return Err(self.value("address", &entry.address, "host:port, the port 1 to 65535"));
        }
        let weight = match &entry.weight {
            None => 1.0,
            Some(weight) if weight.get_ref().is_finite() && *weight.get_ref() > 0.0 => *weight.get_ref(),
            Some(weight) => return Err(self.value("weight", weight, "a positive finite number")),
        };
        Ok(Member { node: NodeId::from(name.as_str()), role, address: Address::Grpc(address.clone()), weight })
    }

    fn value<T: ToString>(&self, key: &'static str, found: &Spanned<T>, expected: &'static str) -> StaticFileError {
        let line = line_of(self.text, found.span());
        StaticFileError::Value { file: self.file.to_owned(), line, key, found: found.get_ref().to_string(), expected }
    }
}

/// The line, from 1, on which `span` begins.
fn line_of(text: &str, span: Range<usize>) -> usize {
    text.as_bytes().iter().take(span.start).filter(|&&byte| byte == b'\n').count() + 1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = r#"
replicas = 2
[[coordinator]]
name = "c0"
address = "127.0.0.1:50051"
[[expert-node]]
name = "e0"
address = "[::1]:50052"
weight = 2.5
[[expert-node]]
name = "e1"
address = "expert-node-1.sida.svc:50053"
"#;

    #[test]
    fn a_good_file_becomes_a_cluster() {
        // Broken: `--static` would start nothing.
        let file = StaticFile::parse("cluster.toml", GOOD).unwrap();
        let seen: Vec<_> = file.members.iter().map(|m| (m.node.as_str(), m.role, m.weight)).collect();
        assert_eq!(
            seen,
            [("c0", Role::Coordinator, 1.0), ("e0", Role::ExpertNode, 2.5), ("e1", Role::ExpertNode, 1.0)]
        );
        assert_eq!(file.replicas, 2);
        assert_eq!(file.cluster(2, 8).unwrap().placement().nodes().len(), 2);
        assert_eq!(file.member("cluster.toml", "e1").unwrap().address.to_string(), "expert-node-1.sida.svc:50053");
        let unknown = file.member("cluster.toml", "e7").unwrap_err().to_string();
        assert_eq!(unknown, "cluster.toml has no member called \"e7\"; it names c0, e0, e1");
    }

    #[test]
    fn errors_name_key_and_line() {
        // Broken: a person would search the file for what is wrong with it.
        let cases = [
            ("name = \"c0\"", "name = \"c 0\"", "line 4: key name"),
            ("name = \"e1\"", "name = \"e0\"", "line 11: key name"),
            ("127.0.0.1:50051", "127.0.0.1", "line 5: key address"),
            ("[::1]:50052", "[::1]:0", "line 8: key address"),
            ("weight = 2.5", "weight = -1.0", "line 9: key weight"),
            ("weight = 2.5", "weight = nan", "line 9: key weight"),
            ("weight = 2.5", "weight = inf", "line 9: key weight"),
            ("weight = 2.5", "weight = 0.0", "line 9: key weight"),
            ("weight = 2.5", "wieght = 2.5", "line 9: unknown field `wieght`"),
            ("replicas = 2", "replicas = 0", "line 2: key replicas"),
            ("[[coordinator]]", "[[coordinators]]", "line 3: unknown field `coordinators`"),
            ("name = \"c0\"", "name = ", "line 4: "),
        ];
        for (good, bad, expected) in cases {
            let error = StaticFile::parse("cluster.toml", &GOOD.replace(good, bad)).unwrap_err().to_string();
            assert!(error.starts_with(&format!("cluster.toml {expected}")), "{bad}: {error}");
        }
        let missing = StaticFile::open(Path::new("no-such-file.toml")).unwrap_err();
        assert!(matches!(missing, StaticFileError::Read { file, .. } if file == "no-such-file.toml"));
    }

    #[test]
    fn files_are_read_up_to_their_bound() {
        // Broken: a good file would be refused, or a wrong path (a model, a disk) read into memory to its end.
        let path = std::env::temp_dir().join(format!("sida-static-{}.toml", std::process::id()));
        let opened = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            StaticFile::open(&path)
        };
        let padded = |bytes: u64| format!("{GOOD}{}", " ".repeat(bytes as usize - GOOD.len()));
        assert_eq!(opened(padded(FILE_BYTES_MAX).as_bytes()).unwrap().members.len(), 3);
        assert!(matches!(opened(padded(FILE_BYTES_MAX + 1).as_bytes()), Err(StaticFileError::Length { .. })));
        assert!(matches!(opened(b"\xff"), Err(StaticFileError::Text { .. })));
        std::fs::remove_file(path).unwrap();
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC{0,200}", at in 0usize..300, cut in 0usize..300) {
            // Broken: a half-written file would end a node with a panic.
            let _ = StaticFile::parse("x", &text);
            let mut damaged = GOOD.to_owned();
            damaged.truncate(cut.min(GOOD.len()));
            damaged.insert_str(at.min(damaged.len()), &text);
            let _ = StaticFile::parse("x", &damaged);
        }
    }
}
