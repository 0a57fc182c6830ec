//! Training and serving together, on routing made up here, so that no model is needed.

mod refused;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use half::f16;
use rand::{SeedableRng, rngs::StdRng};
use sida_routing::{Digest, ExpertId, LayerId};

use super::{descent::Learnt, record::StackRecording, *};
use crate::{
    FILE_NAME, HashPredictor, PredictorShape, PredictorState, file::PredictorFile, lstm::stack_net::StackNet,
    open_shape, transformer::TransformerNet,
};

const VOCAB: usize = 24;
const EXPERTS: usize = 4;
const D_MODEL: usize = 8;
pub(super) const MODEL: Digest = Digest([7; 32]);

pub(super) fn shape() -> PredictorShape {
    let encoder_width = Some(D_MODEL);
    PredictorShape {
        vocab_size: VOCAB,
        num_experts: EXPERTS,
        chosen: 1,
        encoder_layers: 0..2,
        decoder_layers: 2..3,
        encoder_width,
    }
}

/// Of a model that reads its prompts by its decoder.
pub(super) fn decoder_only() -> PredictorShape {
    PredictorShape { encoder_layers: 0..0, decoder_layers: 0..2, encoder_width: None, ..shape() }
}

/// A stack of a recording that is made up here.
struct MadeUp {
    layers: usize,
    /// Where the neighbour is that experts depend on.
    neighbour: isize,
    reads_input: bool,
}

impl MadeUp {
    /// Sequences of random lengths whose experts depend on the token and, in every other layer, on its neighbour. Those that read
    /// an input depend also on which of two kinds one token of it is, where the others say something else.
    fn record(&self, sequences: usize, random: &mut impl FnMut(usize) -> usize) -> StackRecording {
        let mut recorded = StackRecording {
            embedding: (0..VOCAB * D_MODEL).map(|i| ((i * 7919) % 101) as f32 / 50.0 - 1.0).collect(),
            d_model: D_MODEL,
            kept: 2,
            sequences: Vec::new(),
            experts: Vec::new(),
            probabilities: Vec::new(),
            inputs: Vec::new(),
        };
        for _ in 0..sequences {
            let tokens: Vec<u32> = (0..2 + random(9)).map(|_| random(VOCAB) as u32).collect();
            let (mut experts, mut kind) = (Vec::new(), 0);
            if self.reads_input {
                kind = random(2);
                let tokens = 1 + random(6);
                let mut states = vec![f16::ZERO; tokens * D_MODEL];
                states.chunks_exact_mut(D_MODEL).for_each(|state| state[1 + random(2)] = f16::ONE);
                let said = random(tokens) * D_MODEL;
                states[said..said + 3].copy_from_slice(&[2.0, 0.0, 0.0].map(f16::from_f32));
                states[said + 1 + kind] = f16::ONE;
                recorded.inputs.push(states);
            }
            for at in 0..tokens.len() {
                let other = tokens.get((at as isize + self.neighbour) as usize).copied().unwrap_or(0);
                for layer in 0..self.layers {
                    let (token, other) = (tokens[at] as usize, other as usize / 12);
                    let expert = match (self.reads_input, layer) {
                        (true, _) => 2 * kind + other,
                        (false, 0) => 2 * other + token % 2,
                        (false, _) => token % EXPERTS,
                    };
                    experts.extend([expert, (expert + 1) % EXPERTS].map(|e| ExpertId(e as u16)));
                }
            }
            recorded.probabilities.push([0.75, 0.25].repeat(experts.len() / 2));
            recorded.experts.push(experts);
            recorded.sequences.push(tokens);
        }
        recorded
    }
}

fn numbers(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed;
    move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    }
}

/// The encoder's neighbour is the next token, the decoder's the last one; the decoder reads what the encoder made of its input.
pub(super) fn recording(sequences: usize, seed: u64) -> Recording {
    let mut random = numbers(seed);
    let encoder = MadeUp { layers: 2, neighbour: 1, reads_input: false }.record(sequences, &mut random);
    let decoder = MadeUp { layers: 1, neighbour: -1, reads_input: true }.record(sequences, &mut random);
    Recording { model: MODEL, shape: shape(), encoder, decoder }
}

/// Of [`decoder_only`].
pub(super) fn recording_decoder_only(sequences: usize, seed: u64) -> Recording {
    let decoder = MadeUp { layers: 2, neighbour: -1, reads_input: false }.record(sequences, &mut numbers(seed));
    Recording { model: MODEL, shape: decoder_only(), encoder: StackRecording::of_labels(&[]), decoder }
}

/// A trained file and what was measured; training takes seconds, so each net is trained once for all tests.
pub(super) fn trained(net: Net) -> (tempfile::TempDir, PathBuf, Vec<HitRate>) {
    static TRAINED: [OnceLock<(Vec<u8>, Vec<HitRate>)>; 3] = [const { OnceLock::new() }; 3];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE_NAME);
    let (file, rates) = TRAINED[net as usize].get_or_init(|| {
        let rates = train_to(&path, net, [recording(1500, 1), recording(100, 2)]);
        (fs::read(&path).unwrap(), rates)
    });
    fs::write(&path, file).unwrap();
    (dir, path, rates.clone())
}

/// Trains a net on the first recording, measures it on the other, and writes it to `path`.
pub(super) fn train_to(path: &Path, net: Net, [learnt, held_out]: [Recording; 2]) -> Vec<HitRate> {
    let options = TrainOptions {
        net,
        width: 32,
        token_width: 32,
        epochs: 3,
        batch_tokens: 256,
        learning_rate: 0.01,
        seed: 1,
        ..TrainOptions::default()
    };
    train(&learnt, &held_out, &options, path, &mut |_| ()).unwrap()
}

/// A predictor that serves would be lost when a new one cannot be measured: the disk is full, or somebody ends the training.
#[test]
fn what_was_there_stays_until_another_is_measured() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE_NAME);
    fs::write(&path, "serves").unwrap();
    // What is measured cannot come to its place.
    fs::create_dir_all(dir.path().join(format!(".{FILE_NAME}.{}.unmeasured/x", std::process::id()))).unwrap();
    let options = TrainOptions { net: Net::Table, ..TrainOptions::default() };
    let failed = train(&recording(20, 1), &recording(20, 2), &options, &path, &mut |_| ());
    assert!(matches!(failed, Err(PredictorError::Write { .. })));
    assert_eq!(fs::read(&path).unwrap(), b"serves");
}

/// A file of a net of which nothing is trained.
fn untrained(net: Net, recording: &Recording) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE_NAME);
    let mut tensors = Tensors::default();
    for stack in [Stack::Encoder, Stack::Decoder] {
        fresh(net, recording, stack).store(&mut tensors).unwrap();
    }
    tensors.write(&unmeasured(net), &path).unwrap();
    (dir, path)
}

fn fresh(net: Net, recording: &Recording, stack: Stack) -> Box<dyn Learnt> {
    let (recorded, layers) = (recording.of_stack(stack), shape().layers(stack).len());
    let random = &mut StdRng::seed_from_u64(1);
    descent::fresh(net, recorded, stack, layers * EXPERTS, (32, 24), random).unwrap()
}

fn unmeasured(net: Net) -> Metadata {
    let (hit_rates, alphas) = (measure::unmeasured(0..3), measure::uncalibrated(0..3));
    Metadata { net, model: MODEL, top_k: 3, hit_rates, chances: alphas.clone(), alphas }
}

/// As of a model without an encoder.
fn without_inputs() -> Recording {
    let mut recording = recording(1, 1);
    recording.decoder.inputs.clear();
    recording
}

/// Inputs of some lengths.
fn inputs() -> Vec<Vec<f16>> {
    recording(4, 3).decoder.inputs
}

fn widened(input: &[f16]) -> Vec<f32> {
    input.iter().map(|state| state.to_f32()).collect()
}

fn open(path: &std::path::Path) -> Arc<dyn HashPredictor> {
    open_shape(path, shape(), MODEL).unwrap()
}

/// A predictor would not learn, or not what its net can express: the table knows the token, the others also its
/// neighbours on the side they may look at.
#[test]
fn nets_learn_what_they_can_see() {
    let (_dir, path, table) = trained(Net::Table);
    assert!(table[0].top1 < 0.75 && table[1].top1 > 0.99 && table[2].top1 < 0.75, "{table:?}");
    assert_eq!(open(&path).hit_rates(), table);
    for net in [Net::Lstm, Net::Transformer] {
        let (_dir, path, rates) = trained(net);
        assert!(rates.iter().all(|rate| rate.top1 > 0.95 && rate.top3 >= rate.top1), "{net:?}: {rates:?}");
        let predictor = open(&path);
        let tables = predictor.encode(&[&[3, 20, 5]]).unwrap();
        assert_eq!(tables[0].experts(LayerId(0), 0)[0], ExpertId(3));
        let alpha = tables[0].alphas(LayerId(0), 0)[0];
        assert!((0.5..1.0).contains(&alpha), "distillation teaches the probability, too: {alpha}");
        // The router always chooses it, by a probability of 0.75.
        let chance = tables[0].chances(LayerId(0), 0).expect("chances")[0];
        assert!(chance > alpha + 0.1, "a chance of {chance}, beside an alpha of {alpha}");
        assert!(rates.iter().all(|rate| rate.chance_error.is_some_and(|error| error < 0.2)), "{rates:?}");
    }
}

/// A line of text would take the place of what was measured with thousands, and be served by from then on.
#[test]
fn too_little_text_calibrates_nothing() {
    let (dir, path, _) = trained(Net::Table);
    let before = fs::read(&path).unwrap();
    let enough = || recording(100, 4);
    for (few, stack) in
        [(recording(3, 4), "encoder"), (Recording { decoder: recording(3, 4).decoder, ..enough() }, "decoder")]
    {
        let refused = calibrate(&path, &few, &path).unwrap_err().to_string();
        assert!(refused.contains(&format!("held-out tokens of the {stack}, expected 256 or more")), "{refused}");
        assert!(fs::read(&path).unwrap() == before);
    }
    let fresh = dir.path().join("fresh.safetensors");
    train(
        &recording(100, 1),
        &recording(3, 2),
        &TrainOptions { net: Net::Table, ..TrainOptions::default() },
        &fresh,
        &mut |_| (),
    )
    .unwrap();
    let calibrated = |path: &std::path::Path| {
        let metadata = PredictorFile::read(path, shape(), MODEL).unwrap().metadata;
        metadata.alphas != measure::uncalibrated(0..3) && metadata.hit_rates.iter().all(|rate| rate.tokens > 0)
    };
    assert!(!calibrated(&fresh));
    calibrate(&fresh, &enough(), &fresh).unwrap();
    assert!(calibrated(&fresh));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "something was left");
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
    let sequences: Vec<Vec<u32>> = (1..4).map(|n| (0..40).map(|i| i * n % VOCAB as u32).collect()).collect();
    let tokens: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
    let inputs = inputs();
    for (net, recording, stack) in [
        (Net::Lstm, recording(1, 1), Stack::Encoder),
        (Net::Transformer, recording(1, 1), Stack::Encoder),
        (Net::Transformer, recording(1, 1), Stack::Decoder),
        (Net::Lstm, without_inputs(), Stack::Decoder),
    ] {
        let (_dir, path) = untrained(net, &recording);
        let mut file = PredictorFile::read(&path, shape(), MODEL).unwrap();
        let reads_input = !recording.of_stack(stack).inputs.is_empty();
        let read: Vec<&[f16]> = inputs[..3].iter().filter(|_| reads_input).map(Vec::as_slice).collect();
        let found = match (stack, net) {
            (Stack::Encoder, Net::Transformer) => {
                TransformerNet::from_file(&mut file).unwrap().unwrap().encode(&tokens)
            }
            (Stack::Encoder, _) => StackNet::from_file(&mut file, stack).unwrap().unwrap().encode(&tokens),
            (Stack::Decoder, _) => {
                let served = StackNet::from_file(&mut file, stack).unwrap().unwrap();
                assert_eq!(served.reads_input(), reads_input);
                let mut states: Vec<_> =
                    inputs[..3].iter().map(|input| served.start(&widened(input)).unwrap()).collect();
                served.decode(&mut states.iter_mut().collect::<Vec<_>>(), &tokens).unwrap()
            }
        };
        let expected = fresh(net, &recording, stack).logits(&tokens, &read).unwrap();
        let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            // The file holds float16.
            assert!((found - expected).abs() < 5e-3, "{net:?} {stack:?}, {reads_input}: {found}, not {expected}");
        }
    }
}

/// A prediction would depend on what else is in the batch, or on how a sequence is cut into steps.
#[test]
fn predictions_do_not_depend_on_batch_or_steps() {
    for (_dir, path) in [
        without_rates(trained(Net::Table)),
        without_rates(trained(Net::Lstm)),
        without_rates(trained(Net::Transformer)),
        untrained(Net::Lstm, &without_inputs()),
    ] {
        let predictor = open(&path);
        let (net, reads_input) = (predictor.net().to_owned(), predictor.reads_input());
        let sequences: Vec<Vec<u32>> = vec![vec![1, 2, 3], vec![9], (0..90).map(|i| i * 5 % 24).collect(), vec![4, 4]];
        let tokens: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
        let started: Vec<_> = inputs().iter().map(|input| predictor.start(&widened(input)).unwrap()).collect();
        let together = predictor.encode(&tokens).unwrap();
        let mut states = started.clone();
        let decoded = predictor.decode(&mut states.iter_mut().collect::<Vec<_>>(), &tokens).unwrap();
        for (n, tokens) in tokens.iter().enumerate() {
            assert_eq!(predictor.encode(&[tokens]).unwrap()[0], together[n], "{net}");
            let mut state = started[n].clone();
            for (at, token) in tokens.iter().enumerate() {
                let step = predictor.decode(&mut [&mut state], &[&[*token]]).unwrap();
                let layer = LayerId(2);
                assert_eq!(step[0].experts(layer, 0), decoded[n].experts(layer, at), "{net} step {at}");
                assert_eq!(step[0].alphas(layer, 0), decoded[n].alphas(layer, at), "{net} step {at}");
                if !reads_input {
                    state = PredictorState::from_bytes(&state.to_bytes()).unwrap();
                }
            }
            assert_eq!(state, states[n]);
        }
    }
}

fn without_rates((dir, path, _): (tempfile::TempDir, PathBuf, Vec<HitRate>)) -> (tempfile::TempDir, PathBuf) {
    (dir, path)
}

/// A decoder's prediction would be made of nothing where the input is what it depends on, or of what is no input.
#[test]
fn a_net_that_reads_the_input_wants_it() {
    let (_dir, path, _) = trained(Net::Lstm);
    let predictor = open(&path);
    assert!(predictor.reads_input());
    let refused = |error: Result<_, PredictorError>| match error {
        Err(PredictorError::Input { reason }) => reason,
        _ => panic!("not refused for its input"),
    };
    for states in [&[][..], &[0.5; 7], &[f32::NAN; 8]] {
        refused(predictor.start(states));
    }
    let mut state = PredictorState::default();
    let without = predictor.decode(&mut [&mut state], &[&[1]]).map(|_| PredictorState::default());
    assert!(refused(without).contains("read by this net"));
    // The same tokens behind other inputs.
    let expert = |kind: usize| {
        let mut input = [2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        input[1 + kind] = 1.0;
        let mut state = predictor.start(&input).unwrap();
        predictor.decode(&mut [&mut state], &[&[4]]).unwrap()[0].experts(LayerId(2), 0)[0]
    };
    assert_eq!([expert(0), expert(1)], [ExpertId(0), ExpertId(2)]);
}
