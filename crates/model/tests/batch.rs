//! A sequence in a batch is the sequence alone, to the bit: what allows sequences to join and leave at any step,
//! and rows to be computed anywhere.

use std::path::{Path, PathBuf};

use sida_model::{
    Backbone, Checkpoint, DecoderState, ExpertScratch, ExpertStore, FeedForward, MoeGate, Reference, Spans, Stack,
    Tensor, reference::greedy, tensor_rows,
};
use sida_routing::{ExpertKey, Grouping};

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/switch-tiny-64")
}

/// A model that runs batches, as a coordinator with every expert at hand would.
struct Batches {
    backbone: Backbone,
    experts: ExpertStore,
}

impl Batches {
    fn open() -> Self {
        let checkpoint = Checkpoint::open(&model()).unwrap();
        let backbone = Backbone::load(&checkpoint, &mut |_, _| ()).unwrap();
        Self { backbone, experts: ExpertStore::open(checkpoint).unwrap() }
    }

    fn encode(&self, sequences: &[&[u32]]) -> (Tensor, Spans) {
        let spans = Spans::new(sequences.iter().map(|ids| ids.len()));
        let mut h = self.backbone.embed(Stack::Encoder, &sequences.concat()).unwrap();
        for layer in self.backbone.encoder().layers() {
            h = layer.attend(&h, &spans).unwrap();
            h = self.feed_forward(layer.feed_forward(), &h);
        }
        (self.backbone.encoder().finish(&h).unwrap(), spans)
    }

    fn step(&self, states: &mut [&mut DecoderState], tokens: &[u32]) -> Vec<Vec<f32>> {
        let spans = Spans::single_tokens(tokens.len());
        let mut h = self.backbone.embed(Stack::Decoder, tokens).unwrap();
        for layer in self.backbone.decoder().layers() {
            h = layer.attend(&h, states, &spans).unwrap();
            h = self.feed_forward(layer.feed_forward(), &h);
        }
        states.iter_mut().for_each(|state| state.advance(1));
        self.backbone.logits(&self.backbone.decoder().finish(&h).unwrap()).unwrap().to_vec2().unwrap()
    }

    fn feed_forward(&self, feed_forward: &FeedForward, h: &Tensor) -> Tensor {
        match feed_forward {
            FeedForward::Dense(dense) => dense.forward(h).unwrap(),
            FeedForward::Moe(gate) => (h + self.moe(gate, &gate.normed(h).unwrap())).unwrap(),
        }
    }

    fn moe(&self, gate: &MoeGate, x: &Tensor) -> Tensor {
        let grouping = Grouping::new(&gate.route(x).unwrap());
        let shape = self.experts.shape();
        let mut slot = vec![0; shape.bytes()];
        let mut output = vec![0.0; x.elem_count()];
        tensor_rows::rows(x, |x| {
            let row = |token: u32| &x[token as usize * shape.d_model..][..shape.d_model];
            let mut first = 0;
            for group in &grouping.groups {
                let tokens = &grouping.tokens[first..][..group.rows as usize];
                let rows: Vec<f32> = tokens.iter().flat_map(|&token| row(token)).copied().collect();
                let mut results = vec![0.0; rows.len()];
                self.experts.load(ExpertKey { layer: gate.id(), expert: group.expert }, &mut slot).unwrap();
                shape.forward(&slot, &rows, &mut results, &mut ExpertScratch::default());
                grouping.combine(first, &results, shape.d_model, &mut output);
                first += tokens.len();
            }
        })
        .unwrap();
        tensor_rows::from_rows(output, shape.d_model).unwrap()
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Answers would depend on who else asks at the same time.
#[test]
fn a_sequence_in_a_batch_is_the_sequence_alone() {
    let batches = Batches::open();
    let reference = Reference::open(&model()).unwrap();
    let long: Vec<u32> = (0..300).map(|i| 3 + i * 37 % 8000).chain([1]).collect();
    let sequences: [&[u32]; 4] = [&[5, 99, 1207, 44, 8191, 17, 1], &[1], &long, &[700, 3, 700, 3, 1]];
    let (encoded, spans) = batches.encode(&sequences);
    let encoded: Vec<Vec<f32>> = encoded.to_vec2().unwrap();
    let mut states = Vec::new();
    let mut alone_states = Vec::new();
    for (ids, span) in sequences.iter().zip(spans.ranges()) {
        let (alone, _) = reference.encode(ids).unwrap();
        assert_eq!(bits(&encoded[span].concat()), bits(&alone.flatten_all().unwrap().to_vec1().unwrap()));
        states.push(reference.start(&alone).unwrap());
        alone_states.push(reference.start(&alone).unwrap());
    }
    // Sequence s joins at step s, so that all positions differ.
    let mut tokens = vec![0; sequences.len()];
    for step in 0..80 {
        let batch = sequences.len().min(step + 1);
        let mut joined: Vec<&mut DecoderState> = states.iter_mut().take(batch).collect();
        let logits = batches.step(&mut joined, &tokens[..batch]);
        for (s, logits) in logits.iter().enumerate() {
            let (alone, _) = reference.decode(&mut alone_states[s], &[tokens[s]]).unwrap();
            assert_eq!(bits(logits), bits(&alone.flatten_all().unwrap().to_vec1().unwrap()), "step {step} of {s}");
            tokens[s] = greedy(logits);
        }
    }
}

/// Scoring one target would change what the next one sees.
#[test]
fn forks_go_their_own_ways() {
    let reference = Reference::open(&model()).unwrap();
    let (encoded, _) = reference.encode(&[5, 99, 1207, 1]).unwrap();
    let mut trunk = reference.start(&encoded).unwrap();
    reference.decode(&mut trunk, &[0, 23]).unwrap();
    let logits = |state: &mut DecoderState, token| -> Vec<f32> {
        reference.decode(state, &[token]).unwrap().0.flatten_all().unwrap().to_vec1().unwrap()
    };
    let (mut left, mut right) = (trunk.fork(), trunk.fork());
    logits(&mut left, 30);
    assert_eq!(logits(&mut right, 44), logits(&mut trunk, 44));
    assert_eq!((left.position(), right.position()), (3, 3));
}
