//! GGUF files, read once by `sida convert`.

use sida_model::{BlockFormats, convert};

use crate::{fuzz, model_files::ModelDirectory};

/// A header could claim what takes all memory, or have tensors read that lie outside the file.
#[test]
fn gguf() {
    let model = ModelDirectory::copy_of("tests/data/parity/gguf-qwen2");
    let file = "model.gguf";
    fuzz!([model.original(file)], |bytes| {
        model.write(file, bytes);
        let out = tempfile::tempdir().expect("a temporary directory");
        convert::convert(&model.path().join(file), &out.path().join("out"), BlockFormats::NONE, &mut |_, _| {}).is_ok()
    });
}
