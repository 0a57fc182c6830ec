//! Models on a GPU against the reference on the CPU and against transformers' outputs. Runs where SIDA_CUDA_DEVICE
//! names a device (`SIDA_CUDA_DEVICE=0 cargo test -p sida-model --features cuda --test cuda`); SIDA_MODELS_DIR adds
//! models as in parity.rs.
#![cfg(feature = "cuda")]

#[allow(dead_code)] // parity.rs reads the rest.
mod golden;

mod causal_on_device;
mod every_format;
mod exceptions;
mod experts_elsewhere;
mod experts_that_move;
mod on_device;

use std::path::{Path, PathBuf};

use golden::Golden;
use on_device::{OnDevice, Options, ROWS_MAX, plan};
use rand::{Rng, SeedableRng};
use sida_model::{
    Backend, Beside, BlockFormats, Checkpoint, DeviceError, ExpertDevice, ExpertScratch, ExpertSlot, ExpertStore,
    ModelConfig, ModelError, MoeRows, NewSequence, Precision, Reference, SlotRows, SlotRun, Spans, Stack, StoredDType,
    Urgency, Wanted, convert,
    cuda::{CudaError, DeviceDense, DeviceSequence, DeviceSlab, DeviceStates, Gpu},
    reference::greedy,
};
use sida_routing::{ExpertId, ExpertKey, LayerId, Plan};

/// Float32 on both sides, summed in another order.
const TOLERANCE_F32: f64 = 1e-4;
/// Router probabilities that differ by less are a tie.
const NEAR_TIE: f32 = 1e-4;

fn device() -> Option<usize> {
    let ordinal = std::env::var("SIDA_CUDA_DEVICE").ok()?.parse().expect("SIDA_CUDA_DEVICE is a number");
    Some(ordinal)
}

fn models() -> Vec<PathBuf> {
    let models = std::env::var_os("SIDA_MODELS_DIR").map(PathBuf::from);
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models");
    let shipped = models.unwrap_or(shipped);
    let names = ["switch-tiny-64", "switch-mini-8", "switch-mini-64"];
    names.iter().map(|name| shipped.join(name)).filter(|dir| dir.join("config.json").exists()).collect()
}

/// Those, and the smallest with all its matrices in blocks of either format.
fn models_and_blocks(into: &Path) -> Vec<PathBuf> {
    let mut dirs = models();
    for dtype in [StoredDType::Q4_0, StoredDType::Q8_0] {
        let dir = into.join(dtype.to_string());
        let formats = BlockFormats { experts: Some(dtype), dense: Some(dtype) };
        convert::convert(&dirs[0], &dir, formats, &mut |_, _| ()).unwrap();
        dirs.push(dir);
    }
    dirs
}

fn open(dir: &Path, ordinal: usize, precision: Precision, share: f64, host_bytes: u64) -> OnDevice {
    OnDevice::open(dir, ordinal, Options { precision, share, host_bytes, packs: true, comes_late: false })
}

/// Everything resident, in bf16, and not packed.
fn open_plain(dir: &Path, ordinal: usize) -> OnDevice {
    OnDevice::open(
        dir,
        ordinal,
        Options { precision: Precision::Bf16, share: 1.0, host_bytes: u64::MAX, packs: false, comes_late: false },
    )
}

fn relative(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |v: f64| v * v;
    let off: f64 = found.iter().zip(expected).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let all: f64 = expected.iter().map(|&b| square(f64::from(b))).sum();
    let relative = (off / all).sqrt();
    assert!(!relative.is_nan(), "not a number");
    relative
}

fn generate(model: &mut OnDevice, ids: &[u32], tokens_max: usize) -> Vec<u32> {
    let generation = model.config().generation.clone();
    let spans = Spans::new([ids.len()]);
    model.encode(ids, &spans);
    let mut sequences = model.start(&spans);
    let (mut answer, mut token) = (Vec::new(), generation.decoder_start_token_id);
    while answer.len() < tokens_max && !answer.last().is_some_and(|&last| generation.is_end(last)) {
        token = model.decode(&[token], &Spans::new([1]), &mut sequences, &[0]).tokens[0];
        answer.push(token);
    }
    answer
}

/// A model on a GPU would answer with other tokens than transformers does, or route otherwise.
#[test]
fn float32_agrees_with_transformers() {
    let Some(ordinal) = device() else { return println!("SIDA_CUDA_DEVICE is not set: nothing is compared") };
    for dir in models() {
        let path = dir.join("golden.json");
        if !path.exists() {
            continue;
        }
        for share in [1.0, 0.3] {
            let mut model = open(&dir, ordinal, Precision::F32, share, u64::MAX);
            let reference = Reference::open(&dir).unwrap();
            let (mut choices, mut ties, mut tokens) = (0, 0, 0);
            for case in &Golden::open(&path).cases {
                let ids = &case.input_ids;
                let passed = model.encode(ids, &Spans::new([ids.len()]));
                let states = model.states();
                let (expected, routing) = reference.encode(ids).unwrap();
                let off = relative(&states, &expected);
                assert!(off < TOLERANCE_F32, "{}: encoder states are off by {off:e}", dir.display());
                for (layer, found) in routing.iter().zip(&passed.experts) {
                    let experts = reference.config().num_experts;
                    for (token, &found) in found.iter().enumerate() {
                        choices += 1;
                        let chosen = layer.routes.experts[token].unwrap().0;
                        let row = &layer.probabilities[token * experts..][..experts];
                        if chosen != found {
                            ties += 1;
                            let gap = row[usize::from(chosen)] - row[usize::from(found)];
                            assert!(gap < NEAR_TIE, "token {token} goes to {found}, not {chosen}: gap {gap}");
                        }
                    }
                }
                let expected = &case.greedy_ids[1..];
                assert_eq!(generate(&mut model, ids, expected.len()), expected, "{:?}", case.text);
                tokens += expected.len();
            }
            let counters = model.counters();
            println!(
                "{} at {share}: {choices} choices, {ties} near ties that differ, {tokens} tokens, {counters:?}",
                dir.display()
            );
        }
    }
}

fn random_batch(random: &mut impl Rng, vocab: usize, lengths: &[usize]) -> (Vec<u32>, Spans) {
    let rows: usize = lengths.iter().sum();
    let ids = (0..rows).map(|_| random.random_range(2..vocab as u32)).collect();
    (ids, Spans::new(lengths.iter().copied()))
}

/// A sequence's bits would depend on who shares its batch, on whether its experts were there, or on a recorded pass
/// being replayed.
#[test]
fn rows_do_not_depend_on_their_batch() {
    let Some(ordinal) = device() else { return println!("SIDA_CUDA_DEVICE is not set: nothing is compared") };
    let seed = rand::rng().random();
    println!("seed {seed}");
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let into = tempfile::tempdir().unwrap();
    for dir in models_and_blocks(into.path()) {
        for precision in [Precision::Bf16, Precision::F32] {
            let mut all = open(&dir, ordinal, precision, 1.0, 0);
            let mut part = open(&dir, ordinal, precision, 0.25, u64::MAX);
            let (vocab, d_model) = (all.config().vocab_size, all.config().d_model);
            let lengths = [5, 1, 40, 90, 300, 17, 8, 33, 500, 512];
            let (ids, spans) = random_batch(&mut random, vocab, &lengths);
            all.encode(&ids, &spans);
            let together = all.states();
            assert!(together.iter().all(|v| v.is_finite()));
            for range in spans.ranges() {
                for round in 0..3 {
                    let model = if round == 1 { &mut part } else { &mut all };
                    model.encode(&ids[range.clone()], &Spans::new([range.len()]));
                    let alone = model.states();
                    let same = &together[range.start * d_model..range.end * d_model];
                    assert!(
                        alone.iter().zip(same).all(|(a, b)| a.to_bits() == b.to_bits()),
                        "{} {precision:?}: {} rows differ alone, round {round}, by {:e}",
                        dir.display(),
                        range.len(),
                        relative(&alone, same)
                    );
                }
            }
            assert!(part.counters().demand_loads > 0 && part.counters().evictions > 0);
        }
    }
}

/// A sequence that the device has no memory for would take those down that start with it, or that run.
#[test]
fn no_memory_for_one_is_its_own_error() {
    let Some(ordinal) = device() else { return println!("SIDA_CUDA_DEVICE is not set: nothing is compared") };
    let checkpoint = Checkpoint::open(&models()[0]).unwrap();
    let gpu = Gpu::open(ordinal).unwrap();
    let mut dense = DeviceDense::open(gpu, &checkpoint, Precision::Bf16, ROWS_MAX).unwrap();
    let spans = Spans::new([2, 3, 1]);
    let pass = dense.begin(Stack::Encoder, &[5, 1, 700, 3, 1, 1], &spans, Vec::new(), Beside::default()).unwrap();
    let states = dense.finish(pass).unwrap().states;
    let new = |(rows, tokens_max)| NewSequence { rows, tokens_max };
    let new: Vec<NewSequence> = spans.ranges().zip([1, 1 << 40, 65]).map(new).collect();
    let mut started = dense.start(Some(&states), &new).unwrap();
    assert!(matches!(&started[1], Err(ModelError::Device(DeviceError::Failed(_)))), "{:?}", started[1]);
    let mut begin = |sequence: &mut DeviceSequence, tokens: usize| {
        let (ids, spans) = (vec![0; tokens], Spans::new([tokens]));
        dense.begin(Stack::Decoder, &ids, &spans, vec![sequence], Beside::default()).map(drop)
    };
    // Whole blocks of tokens have room, and no token more.
    for (at, room) in [(0, 64), (2, 128)] {
        let sequence = started[at].as_mut().unwrap();
        begin(sequence, room).unwrap();
        assert!(matches!(begin(sequence, room + 1), Err(ModelError::Shape { .. })));
    }
}

/// Decoding token by token, in whatever company, would give other logits than decoding at once.
#[test]
fn decoding_does_not_depend_on_company_or_steps() {
    let Some(ordinal) = device() else { return println!("SIDA_CUDA_DEVICE is not set: nothing is compared") };
    let mut random = rand::rngs::StdRng::seed_from_u64(7);
    for dir in models() {
        for precision in [Precision::Bf16, Precision::F32] {
            let mut model = open(&dir, ordinal, precision, 1.0, 0);
            let vocab = model.config().vocab_size;
            let (ids, spans) = random_batch(&mut random, vocab, &[7, 60, 12]);
            let (targets, target_spans) = random_batch(&mut random, vocab, &[80, 80, 80]);
            model.encode(&ids, &spans);
            let mut sequences = model.start(&spans);
            let wanted: Vec<u32> = (0..240).collect();
            model.decode(&targets, &target_spans, &mut sequences, &wanted);
            let at_once = model.logits(240);
            model.encode(&ids, &spans);
            let mut sequences = model.start(&spans);
            for step in 0..80 {
                let fed: Vec<u32> = (0..3).map(|sequence| targets[sequence * 80 + step]).collect();
                let passed = model.decode(&fed, &Spans::single_tokens(3), &mut sequences, &[0, 1, 2]);
                let logits = model.logits(3);
                for sequence in 0..3 {
                    let expected = &at_once[(sequence * 80 + step) * vocab..][..vocab];
                    let found = &logits[sequence * vocab..][..vocab];
                    assert!(
                        found.iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits()),
                        "{precision:?} step {step} of {sequence}: off by {:e}",
                        relative(found, expected)
                    );
                    assert_eq!(passed.tokens[sequence], greedy(found));
                }
            }
        }
    }
}

/// bf16 on tensor cores would compute another function than float32.
#[test]
fn bf16_is_near_float32() {
    let Some(ordinal) = device() else { return println!("SIDA_CUDA_DEVICE is not set: nothing is compared") };
    let seed = rand::rng().random();
    println!("seed {seed}");
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let into = tempfile::tempdir().unwrap();
    for dir in models_and_blocks(into.path()) {
        let mut narrow = open(&dir, ordinal, Precision::Bf16, 1.0, 0);
        let mut wide = open(&dir, ordinal, Precision::F32, 1.0, 0);
        let lengths = [20, 200, 3, 64];
        let (ids, spans) = random_batch(&mut random, narrow.config().vocab_size, &lengths);
        let found = narrow.encode(&ids, &spans);
        let expected = wide.encode(&ids, &spans);
        let (a, b) = (narrow.states(), wide.states());
        // Rows that were routed alike all the way, and saw only such: the first layer's choices tell enough here.
        let d_model = narrow.config().d_model;
        let alike = |row: usize| found.experts.iter().zip(&expected.experts).all(|(f, e)| f[row] == e[row]);
        let rows: Vec<usize> = (0..ids.len()).filter(|&row| alike(row)).collect();
        let pick =
            |v: &[f32]| -> Vec<f32> { rows.iter().flat_map(|&r| &v[r * d_model..][..d_model]).copied().collect() };
        let off = relative(&pick(&a), &pick(&b));
        println!(
            "{}: {} of {} rows routed alike, off by {off:.2e}; all rows by {:.2e}",
            dir.display(),
            rows.len(),
            ids.len(),
            relative(&a, &b)
        );
        assert!(rows.len() * 10 > ids.len() * 8 && off < 3e-2);
    }
}

/// Weights that came packed would not be those of the model.
#[test]
fn packing_changes_no_bit() {
    let Some(ordinal) = device() else { return println!("SIDA_CUDA_DEVICE is not set: nothing is compared") };
    let mut random = rand::rngs::StdRng::seed_from_u64(13);
    for dir in models() {
        let mut plain = open_plain(&dir, ordinal);
        let vocab = plain.config().vocab_size;
        let batches: Vec<_> = (0..8).map(|_| random_batch(&mut random, vocab, &[40, 300, 7])).collect();
        // With a third of the experts, those that others left take their slots.
        for share in [1.0, 0.34] {
            let mut packed = open(&dir, ordinal, Precision::Bf16, share, u64::MAX);
            assert!(packed.is_packed && !plain.is_packed);
            for (ids, spans) in &batches {
                plain.encode(ids, spans);
                packed.encode(ids, spans);
                let (states, expected) = (packed.states(), plain.states());
                assert!(states == expected, "{} at {share}", dir.display());
            }
        }
    }
}

/// A weight far below the others of its row would be lost: those in the row's head, those beyond it, and zeros.
#[test]
fn exceptions_change_no_bit() {
    let mut random = rand::rngs::StdRng::seed_from_u64(19);
    for dir in models() {
        let odd = tempfile::tempdir().unwrap();
        exceptions::copy_with(&dir, odd.path());
        let store = ExpertStore::open(Checkpoint::open(odd.path()).unwrap()).unwrap();
        assert!(ExpertSlot::choose(&store, Precision::Bf16, true).unwrap().is_packed());
        let Some(ordinal) = device() else { return println!("SIDA_CUDA_DEVICE is not set: nothing is compared") };
        let mut plain = open_plain(odd.path(), ordinal);
        let mut packed = open(odd.path(), ordinal, Precision::Bf16, 1.0, u64::MAX);
        // Experts with few rows and with many.
        for lengths in [&[5][..], &[40, 30], &[300, 400], &[500, 500, 300, 200]] {
            let (ids, spans) = random_batch(&mut random, plain.config().vocab_size, lengths);
            plain.encode(&ids, &spans);
            packed.encode(&ids, &spans);
            let (states, expected) = (packed.states(), plain.states());
            assert!(states == expected, "{} with rows {lengths:?}", dir.display());
        }
    }
}

/// What does not fit would be a panic, or a wrong answer.
#[test]
fn what_does_not_fit_is_refused() {
    let Some(ordinal) = device() else {
        assert!(Gpu::open(999).unwrap_err().is_missing_device());
        return;
    };
    assert!(matches!(Gpu::open(999), Err(CudaError::NoDevice { ordinal: 999, .. })));
    let dir = models().remove(0);
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let mut dense = DeviceDense::open(Gpu::open(ordinal).unwrap(), &checkpoint, Precision::Bf16, 64).unwrap();
    let mut begins = |ids: &[u32], lengths: &[usize]| {
        dense.begin(Stack::Encoder, ids, &Spans::new(lengths.iter().copied()), Vec::new(), Beside::default()).is_ok()
    };
    assert!(!begins(&[3; 65], &[65]) && !begins(&[u32::MAX], &[1]) && !begins(&[], &[]) && !begins(&[3; 2], &[1]));
    assert!(begins(&[3; 64], &[64]));
}
