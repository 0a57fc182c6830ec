//! A member as it stands in etcd, under `/sida/{cluster}/members/{node}`: JSON, so that a person can read it by
//! `etcdctl get`. Written by the member itself under its lease, read by everybody. Compiled without the feature
//! `etcd`, too: it only turns bytes into checked values.

use serde::{Deserialize, Serialize};
use sida_routing::{Digest, NodeId};
use thiserror::Error;

use crate::member::{Address, Member, Role, is_host_and_port, is_name};

/// The longest record: some twenty times what one takes.
pub const RECORD_BYTES_MAX: usize = 8 << 10;

/// A member, and how far it is.
#[derive(Clone, Debug)]
pub struct MemberRecord {
    /// Who it is and how it is reached.
    pub member: Member,
    /// The model it serves.
    pub model: Digest,
    /// What the newest placement places on it is loaded up to this epoch, as far as there is room.
    pub ready_epoch: u64,
}

impl PartialEq for MemberRecord {
    /// Whether the others would read the same.
    fn eq(&self, other: &Self) -> bool {
        self.member.node == other.member.node && self.encode() == other.encode()
    }
}

/// Why a record is no member's.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum MemberRecordError {
    #[error("the record has {found} bytes, at most {expected} are read")]
    Length { found: usize, expected: usize },
    #[error("{0}")]
    Syntax(#[from] serde_json::Error),
    #[error("{field} is {found:?}, expected {expected}")]
    Value { field: &'static str, found: String, expected: &'static str },
}

/// The record as it is written. Fields that a later version adds are passed over.
#[derive(Serialize, Deserialize)]
struct Document {
    role: String,
    address: String,
    weight: f64,
    model: String,
    #[serde(default)]
    ready_epoch: u64,
}

impl MemberRecord {
    /// The record's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let document = Document {
            role: self.member.role.to_string(),
            address: self.member.address.to_string(),
            weight: self.member.weight,
            model: self.model.to_string(),
            ready_epoch: self.ready_epoch,
        };
        serde_json::to_vec(&document).expect("text and numbers are JSON")
    }

    /// The member called `name`, if that and the record are one's.
    pub fn decode(name: &str, bytes: &[u8]) -> Result<Self, MemberRecordError> {
        if bytes.len() > RECORD_BYTES_MAX {
            return Err(MemberRecordError::Length { found: bytes.len(), expected: RECORD_BYTES_MAX });
        }
        let document: Document = serde_json::from_slice(bytes)?;
        let refused = |field, found: &str, expected| MemberRecordError::Value { field, found: found.into(), expected };
        if !is_name(name) {
            return Err(refused("name", name, "letters, digits, '-', '_' and '.'"));
        }
        if !is_host_and_port(&document.address) {
            return Err(refused("address", &document.address, "host:port"));
        }
        if !(document.weight.is_finite() && document.weight > 0.0) {
            return Err(refused("weight", &document.weight.to_string(), "a positive finite number"));
        }
        let role = Role::from_name(&document.role);
        let role = role.ok_or_else(|| refused("role", &document.role, "a node's role"))?;
        let model = digest(&document.model);
        let model = model.ok_or_else(|| refused("model", &document.model, "the 64 hex digits of a SHA-256"))?;
        let address = Address::Grpc(document.address);
        let member = Member { node: NodeId::from(name), role, address, weight: document.weight };
        Ok(Self { member, model, ready_epoch: document.ready_epoch })
    }
}

/// The digest that `hex` writes.
fn digest(hex: &str) -> Option<Digest> {
    if hex.len() != 64 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let bytes: Vec<u8> =
        (0..32).map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16)).collect::<Result<_, _>>().ok()?;
    Digest::from_slice(&bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record() -> MemberRecord {
        let address = Address::Grpc("10.0.0.7:50051".into());
        let member = Member { node: "e0".into(), role: Role::ExpertNode, address, weight: 2.5 };
        MemberRecord { member, model: Digest([0xab; 32]), ready_epoch: 7 }
    }

    #[test]
    fn what_a_member_writes_all_read() {
        // Broken: nodes of one build would not know each other.
        let read = MemberRecord::decode("e0", &record().encode()).unwrap();
        assert_eq!((read.model, read.ready_epoch), (record().model, 7));
        assert_eq!(format!("{:?}", read.member), format!("{:?}", record().member));
        let bytes: Vec<u8> = (0..32).collect();
        let uneven = MemberRecord { model: Digest::from_slice(&bytes).unwrap(), ..record() };
        assert_eq!(MemberRecord::decode("e0", &uneven.encode()).unwrap().model, uneven.model);
    }

    #[test]
    fn a_record_that_says_another_thing_is_another() {
        // Broken: a member would not write that it has loaded, or has moved, or would write the same for ever.
        assert_eq!(record(), record());
        let changed = |change: &dyn Fn(&mut MemberRecord)| {
            let mut other = record();
            change(&mut other);
            other != record()
        };
        assert!(changed(&|r| r.member.node = "e1".into()) && changed(&|r| r.ready_epoch += 1));
        assert!(changed(&|r| r.member.address = Address::Grpc("10.0.0.8:50051".into())));
        assert!(changed(&|r| r.member.role = Role::Coordinator) && changed(&|r| r.model = Digest([0; 32])));
    }

    #[test]
    fn errors_name_the_field() {
        // Broken: one bad record would be a riddle, or would place experts on a node that nobody can reach.
        let text = String::from_utf8(record().encode()).unwrap();
        let cases = [
            ("expert-node", "expert", "role is \"expert\""),
            ("10.0.0.7:50051", "10.0.0.7", "address is \"10.0.0.7\""),
            ("2.5", "-2.5", "weight is \"-2.5\""),
            ("2.5", "0.0", "weight is \"0\""),
            ("abab", "xyab", "model is "),
            ("abab", "ab", "model is "),
            ("abab", "ababab", "model is "),
            ("weight", "wieght", "missing field `weight`"),
        ];
        for (good, bad, expected) in cases {
            let error = MemberRecord::decode("e0", text.replacen(good, bad, 1).as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        assert!(MemberRecord::decode("e/0", text.as_bytes()).is_err());
        let padded = |bytes: usize| MemberRecord::decode("e0", format!("{text:bytes$}").as_bytes());
        assert!(padded(RECORD_BYTES_MAX).is_ok());
        assert!(matches!(padded(RECORD_BYTES_MAX + 1), Err(MemberRecordError::Length { .. })));
        let later = text.replace("\"weight\"", "\"zone\":\"a\",\"weight\"");
        assert!(MemberRecord::decode("e0", later.as_bytes()).is_ok());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), at in 0usize..200, byte: u8) {
            // Broken: one damaged key in etcd would end every node.
            let _ = MemberRecord::decode("e0", &bytes);
            let mut damaged = record().encode();
            let at = at % damaged.len();
            damaged[at] = byte;
            let _ = MemberRecord::decode("e0", &damaged);
        }
    }
}
