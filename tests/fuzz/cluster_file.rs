//! The file of `--static`, which a person writes by hand.

use sida_cluster::StaticFile;

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
