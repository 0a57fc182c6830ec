//! Weights: the header of a safetensors file, and the index of a sharded checkpoint.

use crate::{fuzz, model_files::ModelDirectory};

/// A header could name bytes outside its file, or lengths that overflow.
#[test]
fn safetensors() {
    let model = ModelDirectory::copy_of("tests/data/parity/random-one-expert-f16");
    fuzz!([model.original("model.safetensors")], |bytes| {
        model.write("model.safetensors", bytes);
        model.runs()
    });
}

/// A damaged file of several could take the tensors of another.
#[test]
fn shard() {
    let model = ModelDirectory::copy_of("tests/data/parity/random-router-bias");
    let file = "model-00002-of-00003.safetensors";
    fuzz!([model.original(file)], |bytes| {
        model.write(file, bytes);
        model.runs()
    });
}

/// An index could lead to files outside the model's directory.
#[test]
fn index() {
    let model = ModelDirectory::copy_of("tests/data/parity/random-router-bias");
    let file = "model.safetensors.index.json";
    fuzz!([model.original(file)], |bytes| {
        model.write(file, bytes);
        model.runs()
    });
}
