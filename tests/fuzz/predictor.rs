//! The predictor's file, and a sequence's state, which travels to a predictor-node and back.

use std::{fs, panic::AssertUnwindSafe, path::PathBuf};

use sida_model::Checkpoint;
use sida_predictor::{
    Net, PredictorState,
    train::{RecordOptions, Recording, Text, TrainOptions, train},
};

use crate::{fuzz, model_files::ModelDirectory};

/// A small model with a tokenizer.
fn model() -> ModelDirectory {
    let model = ModelDirectory::copy_of("tests/data/parity/random-saved");
    model.write("tokenizer.json", include_bytes!("seeds/tokenizer.json"));
    model
}

/// Trains a net of `model` for a moment; what it learns does not matter.
fn trained(model: &ModelDirectory, net: Net) -> Vec<u8> {
    let text = Text { input: "a fine film".into(), target: Some("a film".into()) };
    let recording = Recording::of(model.path(), &[text], &RecordOptions::default(), &mut |_, _| {});
    let recording = recording.expect("a recording");
    let options = TrainOptions { net, width: 4, epochs: 1, top_k: 2, ..TrainOptions::default() };
    let path: PathBuf = model.path().join(sida_predictor::FILE_NAME);
    train(&recording, &recording, &options, &path, &mut |_| {}).expect("a predictor");
    fs::read(path).expect("the predictor's file")
}

/// A predictor could end the node that opens it, or name experts that do not exist.
#[test]
fn file() {
    let model = model();
    let checkpoint = Checkpoint::open(model.path()).expect("a checkpoint");
    let seeds = [Net::Table, Net::Lstm, Net::Transformer].map(|net| trained(&model, net));
    fuzz!(seeds, |bytes| {
        model.write(sida_predictor::FILE_NAME, bytes);
        let path = model.path().join(sida_predictor::FILE_NAME);
        let Ok(opened) = sida_predictor::open(&path, checkpoint.config(), checkpoint.digest()) else { return false };
        let Ok(tables) = opened.encode(&[&[3, 4, 5], &[6]]) else { return false };
        let Ok(mut state) = opened.start(&vec![0.5; 3 * checkpoint.config().d_model]) else { return false };
        let Ok(decoded) = opened.decode(&mut [&mut state], &[&[5, 7]]) else { return false };
        let exists = |expert: &sida_routing::ExpertId| usize::from(expert.0) < checkpoint.config().num_experts;
        assert!(tables.iter().chain(&decoded).all(|table| table.all_experts().iter().all(exists)));
        true
    });
}

/// A state from another node could end this one, or poison every later token of its sequence. Such states come of nets that
/// read no input.
#[test]
fn state() {
    let model = ModelDirectory::copy_of("tests/data/parity/causal-text");
    let checkpoint = Checkpoint::open(model.path()).expect("a checkpoint");
    trained(&model, Net::Lstm);
    let path = model.path().join(sida_predictor::FILE_NAME);
    let opened = sida_predictor::open(&path, checkpoint.config(), checkpoint.digest()).expect("a predictor");
    // It has no state of its own that a panic could leave behind.
    let opened = AssertUnwindSafe(opened);
    let mut state = PredictorState::default();
    opened.decode(&mut [&mut state], &[&[5, 7]]).expect("a step");
    fuzz!([state.to_bytes()], |bytes| {
        let Ok(mut state) = PredictorState::from_bytes(bytes) else { return false };
        let Ok(tables) = opened.decode(&mut [&mut state], &[&[8]]) else { return false };
        assert!(tables[0].all_alphas().iter().all(|alpha| (0.0..=1.0).contains(alpha)));
        true
    });
}
