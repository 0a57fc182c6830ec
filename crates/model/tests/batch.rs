//! A sequence in a batch is the sequence alone, to the bit: what allows sequences to join and leave at any step,
//! and rows to be computed anywhere.

use std::path::{Path, PathBuf};

use sida_model::{
    Backend, Beside, Checkpoint, CpuBackend, CpuSequence, ExpertStore, ModelError, MoeRows, NewSequence, Reference,
    Spans, Stack, StillWanted, cache_size::room, reference::greedy,
};
use sida_routing::Grouping;

type States = <CpuBackend as Backend>::States;

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/switch-tiny-64")
}

/// A model that runs batches, as a coordinator with every expert at hand would.
struct Batches {
    backend: CpuBackend,
    experts: ExpertStore,
}

impl Batches {
    fn open() -> Self {
        let checkpoint = Checkpoint::open(&model()).unwrap();
        let backend = CpuBackend::load(&checkpoint, &mut |_, _| ()).unwrap();
        Self { backend, experts: ExpertStore::open(checkpoint).unwrap() }
    }

    fn encode(&mut self, sequences: &[&[u32]]) -> (Vec<f32>, Spans) {
        let spans = Spans::new(sequences.iter().map(|ids| ids.len()));
        let states = self.pass(Stack::Encoder, &sequences.concat(), &spans, Vec::new());
        let mut values = Vec::new();
        self.backend.values(&states, &mut values).unwrap();
        (values, spans)
    }

    fn step(&mut self, sequences: Vec<&mut CpuSequence>, tokens: &[u32]) -> Vec<Vec<f32>> {
        let states = self.pass(Stack::Decoder, tokens, &Spans::single_tokens(tokens.len()), sequences);
        let logits = self.backend.logits(&states, &(0..tokens.len()).collect::<Vec<_>>()).unwrap();
        logits.chunks(self.backend.config().vocab_size).map(<[f32]>::to_vec).collect()
    }

    fn pass(&mut self, stack: Stack, ids: &[u32], spans: &Spans, sequences: Vec<&mut CpuSequence>) -> States {
        let Self { backend, experts } = self;
        let mut pass = backend.begin(stack, ids, spans, sequences, Beside::default()).unwrap();
        while let Some(layer) = backend.advance(&mut pass).unwrap() {
            let grouping = Grouping::new(&backend.routes(&mut pass).unwrap());
            let MoeRows::Host(x) = backend.rows(&mut pass) else { panic!("rows of the processor") };
            let output = experts.combined(layer, x, &grouping).unwrap();
            backend.add(&mut pass, &output).unwrap();
        }
        backend.finish(pass).unwrap().states
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// A pass that nobody waits for would go on, whole or in a piece per thread, or be taken for one that ended.
#[test]
fn a_pass_that_is_not_wanted_ends() {
    let mut batches = Batches::open();
    for sequences in [1, 4] {
        let ids: Vec<u32> = (0..sequences * 100).map(|i| 3 + i * 37 % 8000).collect();
        let spans = Spans::new((0..sequences).map(|_| 100));
        let expected = batches.encode(&ids.chunks(100).collect::<Vec<_>>()).0;
        for is_wanted in [true, false] {
            let still_wanted = || is_wanted;
            let beside = Beside { still_wanted: StillWanted::while_true(&still_wanted), ..Beside::default() };
            let backend = &mut batches.backend;
            let mut pass = backend.begin(Stack::Encoder, &ids, &spans, Vec::new(), beside).unwrap();
            match backend.advance(&mut pass) {
                Ok(Some(_)) => assert!(is_wanted, "{sequences}"),
                Err(ModelError::GivenUp(_)) => assert!(!is_wanted, "{sequences}"),
                other => panic!("{sequences}: {other:?}"),
            }
        }
        assert_eq!(bits(&batches.encode(&ids.chunks(100).collect::<Vec<_>>()).0), bits(&expected));
    }
}

/// Answers would depend on who else asks at the same time.
#[test]
fn a_sequence_in_a_batch_is_the_sequence_alone() {
    let mut batches = Batches::open();
    let reference = Reference::open(&model()).unwrap();
    let d_model = reference.config().d_model;
    let long: Vec<u32> = (0..300).map(|i| 3 + i * 37 % 8000).chain([1]).collect();
    let sequences: [&[u32]; 4] = [&[5, 99, 1207, 44, 8191, 17, 1], &[1], &long, &[700, 3, 700, 3, 1]];
    let (encoded, spans) = batches.encode(&sequences);
    let mut states = Vec::new();
    let mut alone_states = Vec::new();
    for (ids, span) in sequences.iter().zip(spans.ranges()) {
        let (alone, _) = reference.encode(ids).unwrap();
        assert_eq!(bits(&encoded[span.start * d_model..span.end * d_model]), bits(&alone));
        states.push(reference.start(&alone).unwrap());
        alone_states.push(reference.start(&alone).unwrap());
    }
    // Sequence s joins at step s, so that all positions differ.
    let mut tokens = vec![0; sequences.len()];
    for step in 0..80 {
        let batch = sequences.len().min(step + 1);
        let logits = batches.step(states.iter_mut().take(batch).collect(), &tokens[..batch]);
        for (s, logits) in logits.iter().enumerate() {
            let (alone, _) = reference.decode(&mut alone_states[s], &[tokens[s]]).unwrap();
            assert_eq!(bits(logits), bits(&alone), "step {step} of {s}");
            tokens[s] = greedy(logits);
        }
    }
}

/// A row would be computed twice or not at all where threads share a batch, or differently by the piece that it is in.
#[test]
fn pieces_of_a_batch_are_the_batch() {
    let sequences: Vec<Vec<u32>> =
        (0..9).map(|s| (0..20 + s * 30).map(|i| 3 + (i * 37 + s * 11) % 8000).collect()).collect();
    let sequences: Vec<&[u32]> = sequences.iter().map(|ids| &ids[..]).collect();
    let by_threads = [1, 2, 4].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| bits(&Batches::open().encode(&sequences).0))
    });
    assert!(by_threads[0] == by_threads[1] && by_threads[0] == by_threads[2]);
}

/// A coordinator would reserve other bytes than sequences take, and run out of memory, or a running step would take more.
#[test]
fn sequences_take_what_is_reserved() {
    let mut batches = Batches::open();
    let prompts: [&[u32]; 3] = [&[5, 99, 1207, 44, 1], &[1], &[700, 3, 1]];
    let spans = Spans::new(prompts.map(<[u32]>::len));
    let states = batches.pass(Stack::Encoder, &prompts.concat(), &spans, Vec::new());
    let tokens = [1, 64, 65];
    let new = |(rows, tokens_max)| NewSequence { rows, tokens_max };
    let new: Vec<NewSequence> = spans.ranges().zip(tokens).map(new).collect();
    let size = batches.backend.cache_size();
    for (started, new) in batches.backend.start(Some(&states), &new).unwrap().into_iter().zip(new) {
        let mut sequence = started.unwrap();
        let reserved = (size.of_tokens(new.tokens_max), size.of_input(new.rows.len()));
        assert_eq!(sequence.bytes(), reserved);
        assert_eq!(sequence.fork().unwrap().bytes(), reserved);
        assert_eq!(sequence.fork_prefix(0, new.tokens_max).unwrap().bytes(), reserved);
        assert_eq!(size.of_request(new.rows.len(), 3, new.tokens_max), 3 * reserved.0 + reserved.1);
        for token in 0..new.tokens_max as u32 {
            batches.step(vec![&mut sequence], &[token]);
        }
        assert_eq!(sequence.bytes(), reserved, "after {} tokens", new.tokens_max);
        assert!(sequence.fork_prefix(new.tokens_max + 1, 100).is_err(), "more than there are");
        let own = size.of_tokens(1) / room(1) as u64 * new.tokens_max as u64;
        assert_eq!((batches.backend.trim(&mut sequence), sequence.bytes()), (own, (own, reserved.1)));
    }
}

/// A sequence that no memory is left for would take those down that start with it.
#[test]
fn no_memory_for_one_is_its_own_error() {
    let mut batches = Batches::open();
    let spans = Spans::new([2, 3, 1]);
    let states = batches.pass(Stack::Encoder, &[5, 1, 700, 3, 1, 1], &spans, Vec::new());
    let new = |(rows, tokens_max)| NewSequence { rows, tokens_max };
    let new: Vec<NewSequence> = spans.ranges().zip([1, 1 << 44, 1]).map(new).collect();
    let mut started = batches.backend.start(Some(&states), &new).unwrap().into_iter();
    let mut next = || started.next().unwrap();
    let (mut first, refused, mut last) = (next().unwrap(), next(), next().unwrap());
    assert!(matches!(refused, Err(ModelError::OutOfMemory { bytes, .. }) if bytes > 1 << 44), "{refused:?}");
    assert_eq!(batches.step(vec![&mut first, &mut last], &[0, 0]).len(), 2);
}

/// Scoring one target would change what the next one sees.
#[test]
fn forks_go_their_own_ways() {
    let reference = Reference::open(&model()).unwrap();
    let (encoded, _) = reference.encode(&[5, 99, 1207, 1]).unwrap();
    let mut trunk = reference.start(&encoded).unwrap();
    reference.decode(&mut trunk, &[0, 23]).unwrap();
    let logits = |state: &mut CpuSequence, token| reference.decode(state, &[token]).unwrap().0;
    let (mut left, mut right) = (trunk.fork().unwrap(), trunk.fork().unwrap());
    logits(&mut left, 30);
    assert_eq!(logits(&mut right, 44), logits(&mut trunk, 44));
    assert_eq!((left.position(), right.position()), (3, 3));
}
