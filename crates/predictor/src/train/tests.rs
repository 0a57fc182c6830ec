//! Training and serving together, on routing made up here, so that no model is needed.

use std::{
    fs,
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use rand::{SeedableRng, rngs::StdRng};
use sida_routing::{Digest, ExpertId, LayerId};

use super::{lstm_net::LstmNet, record::StackRecording, *};
use crate::{
    FILE_NAME, HashPredictor, PredictorShape, PredictorState, file::PredictorFile, lstm::stack_net::StackNet,
    open_shape,
};

const VOCAB: usize = 24;
const EXPERTS: usize = 4;
const MODEL: Digest = Digest([7; 32]);

fn shape() -> PredictorShape {
    PredictorShape { vocab_size: VOCAB, num_experts: EXPERTS, encoder_layers: 0..2, decoder_layers: 2..3 }
}

/// Sequences of random lengths whose experts depend on the token and, in every other layer, on its neighbour:
/// the next token in the encoder, the last one in the decoder.
fn recording(sequences: usize, seed: u64) -> Recording {
    let mut state = seed;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let mut stack = |layers: usize, neighbour: isize| {
        let mut recorded = StackRecording {
            embedding: (0..VOCAB * 8).map(|i| ((i * 7919) % 101) as f32 / 50.0 - 1.0).collect(),
            d_model: 8,
            kept: 2,
            sequences: Vec::new(),
            experts: Vec::new(),
            probabilities: Vec::new(),
        };
        for _ in 0..sequences {
            let tokens: Vec<u32> = (0..2 + random(9)).map(|_| random(VOCAB) as u32).collect();
            let mut experts = Vec::new();
            for at in 0..tokens.len() {
                let other = tokens.get((at as isize + neighbour) as usize).copied().unwrap_or(0);
                for layer in 0..layers {
                    let expert = (tokens[at] + if layer == 0 { other / 12 } else { 0 }) as usize % EXPERTS;
                    experts.extend([expert, (expert + 1) % EXPERTS].map(|e| ExpertId(e as u16)));
                }
            }
            recorded.probabilities.push([0.75, 0.25].repeat(experts.len() / 2));
            recorded.experts.push(experts);
            recorded.sequences.push(tokens);
        }
        recorded
    };
    let (encoder, decoder) = (stack(2, 1), stack(1, -1));
    Recording { model: MODEL, shape: shape(), encoder, decoder }
}

/// A trained file and what was measured; training takes seconds, so each net is trained once for all tests.
fn trained(net: Net) -> (tempfile::TempDir, PathBuf, Vec<HitRate>) {
    static TRAINED: [OnceLock<(Vec<u8>, Vec<HitRate>)>; 2] = [const { OnceLock::new() }; 2];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE_NAME);
    let (file, rates) = TRAINED[usize::from(net == Net::Lstm)].get_or_init(|| {
        let options =
            TrainOptions { net, top_k: 3, width: 32, epochs: 8, batch_tokens: 256, learning_rate: 0.01, seed: 1 };
        let rates = train(&recording(1500, 1), &recording(100, 2), &options, &path, &mut |_| ()).unwrap();
        (fs::read(&path).unwrap(), rates)
    });
    fs::write(&path, file).unwrap();
    (dir, path, rates.clone())
}

fn open(path: &std::path::Path) -> Arc<dyn HashPredictor> {
    open_shape(path, shape(), MODEL).unwrap()
}

/// A predictor would not learn, or not what its net can express: the table knows the token, the LSTM also its
/// neighbours on the side it may look at.
#[test]
fn nets_learn_what_they_can_see() {
    let (_dir, path, table) = trained(Net::Table);
    assert!(table[0].top1 < 0.75 && table[1].top1 > 0.99 && table[2].top1 < 0.75, "{table:?}");
    assert_eq!(open(&path).hit_rates(), table);
    let (_dir, path, lstm) = trained(Net::Lstm);
    assert!(lstm.iter().all(|rate| rate.top1 > 0.95 && rate.top3 >= rate.top1), "{lstm:?}");
    let predictor = open(&path);
    let tables = predictor.encode(&[&[3, 20, 5]]).unwrap();
    assert_eq!(tables[0].experts(LayerId(0), 0)[0], ExpertId(0));
    let alpha = tables[0].alphas(LayerId(0), 0)[0];
    assert!((0.5..1.0).contains(&alpha), "distillation teaches the probability, too: {alpha}");
}

/// The same texts and seed would give another predictor each time.
#[test]
fn a_seed_gives_the_same_net() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE_NAME);
    let options = TrainOptions { width: 8, epochs: 1, ..TrainOptions::default() };
    let trained = |seed| {
        let options = TrainOptions { seed, ..options.clone() };
        train(&recording(30, 1), &recording(3, 2), &options, &path, &mut |_| ()).unwrap();
        // Without the header, whose metadata have no order.
        let file = fs::read(&path).unwrap();
        let header_bytes = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        file[8 + header_bytes..].to_vec()
    };
    assert!(trained(1) == trained(1) && trained(1) != trained(2));
}

/// What serves would be another net than what was trained.
#[test]
fn what_is_stored_computes_what_was_trained() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE_NAME);
    let recording = recording(1, 1);
    let sequences: Vec<Vec<u32>> = (1..4).map(|n| (0..40).map(|i| i * n % VOCAB as u32).collect()).collect();
    let tokens: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
    for stack in [Stack::Encoder, Stack::Decoder] {
        let (recorded, layers) = (recording.of_stack(stack), shape().layers(stack).len());
        let net = LstmNet::new(recorded, stack, layers, EXPERTS, 32, &mut StdRng::seed_from_u64(1)).unwrap();
        let mut tensors = Tensors::default();
        net.store(&mut tensors).unwrap();
        let (hit_rates, calibration) = (measure::unmeasured(0..3), measure::uncalibrated(0..3));
        tensors.write(&Metadata { net: Net::Lstm, model: MODEL, top_k: 3, hit_rates, calibration }, &path).unwrap();
        let served = StackNet::from_file(&mut PredictorFile::read(&path, shape()).unwrap(), stack).unwrap().unwrap();
        let found = match stack {
            Stack::Encoder => served.encode(&tokens),
            Stack::Decoder => {
                let mut states = vec![PredictorState::default(); tokens.len()];
                served.decode(&mut states.iter_mut().collect::<Vec<_>>(), &tokens).unwrap()
            }
        };
        let expected: Vec<f32> = net.logits(&tokens).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            // The file holds float16.
            assert!((found - expected).abs() < 5e-3, "{stack:?}: {found}, not {expected}");
        }
    }
}

/// A prediction would depend on what else is in the batch, or on how a sequence is cut into steps.
#[test]
fn predictions_do_not_depend_on_batch_or_steps() {
    for net in [Net::Table, Net::Lstm] {
        let (_dir, path, _) = trained(net);
        let predictor = open(&path);
        let sequences: Vec<Vec<u32>> = vec![vec![1, 2, 3], vec![9], (0..90).map(|i| i * 5 % 24).collect(), vec![4, 4]];
        let tokens: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
        let together = predictor.encode(&tokens).unwrap();
        let mut states = vec![PredictorState::default(); 4];
        let decoded = predictor.decode(&mut states.iter_mut().collect::<Vec<_>>(), &tokens).unwrap();
        for (n, tokens) in tokens.iter().enumerate() {
            assert_eq!(predictor.encode(&[tokens]).unwrap()[0], together[n], "{net:?}");
            let mut state = PredictorState::default();
            for (at, token) in tokens.iter().enumerate() {
                let step = predictor.decode(&mut [&mut state], &[&[*token]]).unwrap();
                let layer = LayerId(2);
                assert_eq!(step[0].experts(layer, 0), decoded[n].experts(layer, at), "{net:?} step {at}");
                assert_eq!(step[0].alphas(layer, 0), decoded[n].alphas(layer, at), "{net:?} step {at}");
                state = PredictorState::from_bytes(&state.to_bytes()).unwrap();
            }
            assert_eq!(state, states[n]);
        }
    }
}

/// A wrong state, token or file would panic, or be taken for the right one.
#[test]
fn refuses_what_does_not_fit() {
    let (dir, path, _) = trained(Net::Lstm);
    let predictor = open(&path);
    assert!(matches!(predictor.encode(&[&[24]]), Err(PredictorError::Token { id: 24, .. })));
    let mut foreign = PredictorState { values: vec![0.5; 7] };
    assert!(matches!(predictor.decode(&mut [&mut foreign], &[&[1]]), Err(PredictorError::State { .. })));
    assert!(matches!(predictor.decode(&mut [], &[&[1]]), Err(PredictorError::States { .. })));
    let other = Digest([8; 32]);
    assert!(matches!(open_shape(&path, shape(), other), Err(PredictorError::Model { .. })));
    let wider = PredictorShape { num_experts: 5, ..shape() };
    assert!(matches!(open_shape(&path, wider, MODEL), Err(PredictorError::Tensor { .. })));
    let whole = fs::read(&path).unwrap();
    let broken = dir.path().join("broken.safetensors");
    let refused = |bytes: &[u8]| {
        fs::write(&broken, bytes).unwrap();
        open_shape(&broken, shape(), MODEL).err().map(|error| error.to_string())
    };
    for len in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        assert!(refused(&whole[..len]).is_some_and(|error| error.contains("broken.safetensors")));
    }
    let replaced = |from: &str, to: &str| {
        let at = whole.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        let mut bytes = whole.clone();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        refused(&bytes).unwrap()
    };
    assert!(replaced("sida-predictor-1", "sida-predictor-9").contains("format"));
    assert!(replaced("\"top_k\":\"3\"", "\"top_k\":\"5\"").contains("top_k"));
    assert!(replaced("encoder.head_bias", "encoder.head_boss").contains("head_bias"));
    let mut infinite = whole.clone();
    let last = infinite.len() - 2;
    infinite[last..].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
    assert!(refused(&infinite).unwrap().contains("not finite"));
}
