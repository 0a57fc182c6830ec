//! pytorch_model.bin: a zip archive with a pickle, read once by `sida convert`.

use sida_model::{BlockFormats, convert};

use crate::{fuzz, model_files::ModelDirectory};

fn converts(model: &ModelDirectory) -> bool {
    let out = tempfile::tempdir().expect("a temporary directory");
    convert::convert(model.path(), &out.path().join("out"), BlockFormats::NONE, &mut |_, _| {}).is_ok()
}

/// A pickle could run code, end the converter, or make it read outside the archive.
#[test]
fn single() {
    let model = ModelDirectory::copy_of("crates/model/tests/data/torch-single");
    fuzz!([model.original("pytorch_model.bin")], |bytes| {
        model.write("pytorch_model.bin", bytes);
        converts(&model)
    });
}

/// An index of shards could lead to files outside the model's directory.
#[test]
fn index() {
    let model = ModelDirectory::copy_of("crates/model/tests/data/torch-sharded");
    let file = "pytorch_model.bin.index.json";
    fuzz!([model.original(file)], |bytes| {
        model.write(file, bytes);
        converts(&model)
    });
}
