//! The file of `--static`, which a person writes by hand.

use sida_cluster::{Address, Member, MemberRecord, Role, StaticFile};
use sida_routing::Digest;

use crate::fuzz;

const SEED: &str = r#"
replicas = 2

[[coordinator]]
name = "coordinator-0"
address = "10.0.0.1:50051"

[[expert-node]]
name = "expert-node-0"
address = "10.0.0.2:50051"
weight = 2.0

[[expert-node]]
name = "expert-node-1"
address = "expert-node-1.sida:50051"

[[predictor-node]]
name = "predictor-node-0"
address = "[::1]:50051"
"#;

/// A slip of the hand would be a panic instead of an error that names the line.
#[test]
fn static_file() {
    fuzz!([SEED.into()], |bytes| {
        let Ok(text) = std::str::from_utf8(bytes) else { return false };
        match StaticFile::parse("cluster.toml", text) {
            Ok(file) => {
                assert!(file.replicas >= 1);
                true
            }
            Err(error) => {
                assert!(error.to_string().contains("cluster.toml"), "{error}");
                false
            }
        }
    });
}

/// One damaged key in etcd could end every node, or place experts on a node that nobody can reach.
#[test]
fn member_record() {
    let address = Address::Grpc("10.0.0.7:50051".into());
    let member = Member { node: "e0".into(), role: Role::ExpertNode, address, weight: 2.5 };
    let seed = MemberRecord { member, model: Digest([0xab; 32]), ready_epoch: 7 }.encode();
    fuzz!([seed], |bytes| match MemberRecord::decode("e0", bytes) {
        Ok(record) => {
            assert!(record.member.weight.is_finite() && record.member.weight > 0.0);
            assert_eq!(MemberRecord::decode("e0", &record.encode()).ok(), Some(record));
            true
        }
        Err(_) => false,
    });
}
