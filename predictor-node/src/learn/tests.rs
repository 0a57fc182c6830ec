//! What becomes of a training, on the shipped predictor and labels made up here.

use std::{fs, path::Path};

use sida_model::Checkpoint;
use sida_predictor::{FILE_NAME, HashPredictor};
use sida_routing::{ExpertId, LabelsExtent, LayerId};

use super::*;

/// A learner whose thread is this one, in a directory of its own, and the predictor that it begins with.
fn learns(cluster: &Path) -> (Learns, Arc<dyn HashPredictor>) {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/switch-tiny-64");
    let checkpoint = Checkpoint::open(&model).unwrap();
    let file = model.join(FILE_NAME);
    let predictor = sida_predictor::open(&file, checkpoint.config(), checkpoint.digest()).unwrap();
    let state = State { traffic: Traffic::new(Learning { tokens_max: 1000 }), is_over: false };
    let learns = Learns {
        shared: Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() }),
        serving: Arc::new(Serving::new(predictor.clone())),
        shape: PredictorShape::of(checkpoint.config()),
        file,
        dir: LearntDir::open(cluster.join("learnt")).unwrap(),
        throttle: Throttle::new(1.0),
        options: FurtherOptions::default(),
    };
    (learns, predictor)
}

/// Sequences of 24 tokens whose experts in each layer are those of `expert(sequence, layer, token)`.
fn labels(sequences: &[Vec<u32>], expert: impl Fn(usize, u16, usize) -> ExpertId) -> Vec<Arc<Labels>> {
    let extent = LabelsExtent { layers: 3, num_experts: 64, kept: 1 };
    let of_sequence = |(at, tokens): (usize, &Vec<u32>)| {
        let entries = (0..tokens.len()).flat_map(|token| (0..3).map(move |layer| (layer, token)));
        let experts: Vec<_> = entries.map(|(layer, token)| expert(at, layer, token)).collect();
        let probabilities = vec![0.9; experts.len()];
        Arc::new(Labels::new(tokens.clone(), extent, experts, probabilities).unwrap())
    };
    sequences.iter().enumerate().map(of_sequence).collect()
}

fn sequences(seed: u32) -> Vec<Vec<u32>> {
    (0..30).map(|n| (0..24).map(|at| 3 + (seed + n * 7919 + at * 104_729) % 2000).collect()).collect()
}

/// A net would stay behind its traffic, one that got worse would serve, or what served before would be gone.
#[test]
fn the_better_one_serves() {
    let cluster = tempfile::tempdir().unwrap();
    let (mut learns, first) = learns(cluster.path());
    let learnt_dir = cluster.path().join("learnt");
    let shipped = learns.file.clone();
    let changed = |_, layer: u16, _| ExpertId(5 + layer);
    let parts = Parts { learnt: labels(&sequences(1), changed), tested: labels(&sequences(2), changed) };
    assert_eq!(learns.learn(&parts).unwrap(), Outcome::Swapped);
    let second = learns.serving.now();
    assert_ne!(second.digest(), first.digest());
    assert_eq!(learns.file, learnt_dir.join(FILE_NAME));
    let read = |name: &str| fs::read(learnt_dir.join(name)).ok();
    assert!(read("predictor.previous.safetensors") == Some(fs::read(&shipped).unwrap()));

    // It learns what nobody asks for any more: traffic is by now what the predictor that serves says of it.
    let newest = sequences(3);
    let tables = second.encode(&newest.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
    let as_served = |at: usize, layer, token| tables[at].experts(LayerId(layer), token)[0];
    let parts = Parts { learnt: labels(&sequences(4), |_, _, _| ExpertId(40)), tested: labels(&newest, as_served) };
    let before = read(FILE_NAME);
    assert_eq!(learns.learn(&parts).unwrap(), Outcome::NotBetter);
    assert_eq!(learns.serving.now().digest(), second.digest());
    assert!(read(FILE_NAME) == before && read("predictor.candidate.safetensors").is_none());
}

/// A disk that is gone or full would take the predictor with it.
#[test]
fn what_cannot_be_written_leaves_what_serves() {
    let cluster = tempfile::tempdir().unwrap();
    let (mut learns, first) = learns(cluster.path());
    fs::remove_dir_all(cluster.path().join("learnt")).unwrap();
    let same = |_, _, _| ExpertId(5);
    let parts = Parts { learnt: labels(&sequences(1)[..2], same), tested: labels(&sequences(2)[..2], same) };
    let error = learns.learn(&parts).unwrap_err().to_string();
    assert!(error.contains("predictor.candidate.safetensors"), "{error}");
    assert_eq!(learns.serving.now().digest(), first.digest());
}

/// A directory that is gone would fill the log, two lines a second; or what fails next would not be told.
#[test]
fn a_failure_is_told_once_until_it_changes() {
    let mut failure = LastFailure::default();
    let told = ["gone", "gone", "gone", "full", "full", "gone"].map(|error| failure.is_news(error));
    assert_eq!(told, [true, false, false, true, false, true]);
    assert!(LastFailure::default().is_news("gone"), "once something was learnt in between");
}

/// A node could not end while it learns, or would learn once more first.
#[test]
fn it_ends_at_once() {
    let cluster = tempfile::tempdir().unwrap();
    let (mut learns, _) = learns(cluster.path());
    learns.throttle = Throttle::new(1e-6);
    learns.shared.state.lock().is_over = true;
    let same = |_, _, _| ExpertId(5);
    let parts = Parts { learnt: labels(&sequences(1), same), tested: labels(&sequences(2), same) };
    let ended = learns.learn(&parts);
    assert!(matches!(ended, Err(PredictorNodeError::Predictor(PredictorError::GivenUp))), "{ended:?}");
    assert!(learns.shared.next().is_none());
}
