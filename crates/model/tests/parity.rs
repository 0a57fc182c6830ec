//! The reference against transformers: golden.json files say what transformers computed (see
//! tests/parity/make_golden.py), for the models under models/, for the small random ones under
//! tests/data/parity/, and for larger ones where SIDA_MODELS_DIR names a folder that holds them. No Python.
//!
//! Routing and greedy tokens must be identical, numbers within 1e-4 of the largest of their kind. A router's
//! choice between two experts whose probabilities differ by less than 1e-4 may go either way; such are counted.

mod golden;

use std::path::{Path, PathBuf};

use golden::{Case, Golden, Logits, Stacked};
use sida_model::{ModelConfig, ModelError, Reference, RoutedLayer, Stack, Tokenizer};

/// Numbers may differ by this, relative to the largest of their kind.
const TOLERANCE: f64 = 1e-4;
/// Router probabilities that differ by less are a tie.
const NEAR_TIE: f32 = 1e-4;

/// What was compared.
#[derive(Debug, Default)]
struct Tally {
    cases: usize,
    choices: usize,
    near_ties_that_differ: usize,
    greedy_tokens: usize,
    worst_logit: f64,
    worst_state: f64,
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn folders(under: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(under).unwrap_or_else(|error| panic!("{}: {error}", under.display()));
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    folders.retain(|path| path.is_dir() && path.file_name().unwrap().to_string_lossy().starts_with(prefix));
    folders.sort();
    folders
}

/// Outputs of the models that ship would differ from transformers'.
#[test]
fn shipped_models_agree_with_transformers() {
    for name in ["switch-tiny-64", "switch-mini-8"] {
        let dir = repository().join("models").join(name);
        compare(&dir, &dir.join("golden.json"));
    }
}

/// Some field of the config, some layout or some dtype would be read otherwise than transformers reads it.
#[test]
fn random_models_agree_with_transformers() {
    let dirs = folders(&repository().join("tests/data/parity"), "random-");
    assert!(!dirs.is_empty(), "tests/data/parity holds no random-* folder");
    dirs.iter().for_each(|dir| compare(dir, &dir.join("golden.json")));
}

/// A larger model would differ from transformers. Runs where SIDA_MODELS_DIR has it.
#[test]
fn larger_models_agree_with_transformers() {
    let Some(models) = std::env::var_os("SIDA_MODELS_DIR").map(PathBuf::from) else {
        println!("SIDA_MODELS_DIR is not set: larger models are not compared");
        return;
    };
    for entry in std::fs::read_dir(repository().join("tests/data/parity")).unwrap() {
        let path = entry.unwrap().path();
        if let Some(name) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".golden.json")) {
            compare(&models.join(name), &path);
        }
    }
}

/// A config that this code would compute wrongly would be accepted.
#[test]
fn unsupported_models_are_refused_by_field() {
    let dirs = folders(&repository().join("tests/data/parity"), "refused-");
    assert!(!dirs.is_empty(), "tests/data/parity holds no refused-* folder");
    for dir in dirs {
        match ModelConfig::open(&dir) {
            Err(ModelError::Config { .. }) => {}
            other => panic!("{}: {other:?}", dir.display()),
        }
    }
}

fn compare(dir: &Path, golden: &Path) {
    let golden = Golden::open(golden);
    let reference = Reference::open(dir).unwrap().with_enforced_capacity(golden.enforce_capacity);
    let tokenizer = dir.join("tokenizer.json").exists().then(|| Tokenizer::open(dir, reference.config()).unwrap());
    let mut tally = Tally::default();
    for case in &golden.cases {
        let mut comparison = Comparison { reference: &reference, case, tally: &mut tally };
        comparison.tokens(tokenizer.as_ref());
        let states = comparison.encoder();
        comparison.greedy(&states);
        comparison.forced(&states);
    }
    println!("{}: {tally:?}", dir.file_name().unwrap().to_string_lossy());
    assert!(tally.cases > 0, "{} has no cases", dir.display());
}

struct Comparison<'a> {
    reference: &'a Reference,
    case: &'a Case,
    tally: &'a mut Tally,
}

impl Comparison<'_> {
    fn tokens(&mut self, tokenizer: Option<&Tokenizer>) {
        self.tally.cases += 1;
        if let (Some(tokenizer), Some(text)) = (tokenizer, &self.case.text) {
            assert_eq!(tokenizer.encode(text).unwrap(), self.case.input_ids, "{text}");
        }
    }

    fn encoder(&mut self) -> Vec<f32> {
        let (states, routing) = self.reference.encode(&self.case.input_ids).unwrap();
        let values = &states;
        let count = values.len() as f64;
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / count;
        let variance = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / (count - 1.0);
        let golden = &self.case.encoder;
        let scale = values.iter().map(|v| f64::from(v.abs())).fold(0.0, f64::max);
        let state = |found: f64, expected: f64| (found - expected).abs() / scale;
        let edges = (values.iter().zip(&golden.first8)).chain(values.iter().rev().zip(golden.last8.iter().rev()));
        let worst = edges.map(|(&found, &expected)| state(f64::from(found), expected)).fold(0.0, f64::max);
        let worst = worst.max(state(mean, golden.mean)).max(state(variance.sqrt(), golden.std));
        assert!(worst < TOLERANCE, "encoder states are off by {worst:e}");
        self.tally.worst_state = self.tally.worst_state.max(worst);
        self.routing(&routing, &self.case.encoder_experts, self.case.encoder_probs.as_ref());
        self.dropped(&routing, self.case.encoder_dropped.as_ref());
        states
    }

    /// Token by token, as a server decodes.
    fn greedy(&mut self, states: &[f32]) {
        let inputs = &self.case.greedy_ids[..self.case.greedy_ids.len() - 1];
        let mut state = self.reference.start(states).unwrap();
        let mut steps: Vec<RoutedLayer> = Vec::new();
        for (step, &input) in inputs.iter().enumerate() {
            let (logits, routing) = self.reference.decode(&mut state, &[input]).unwrap();
            if step == 0 {
                self.first_step(&logits);
            }
            let chosen = sida_model::reference::greedy(&logits);
            assert_eq!(chosen, self.case.greedy_ids[step + 1], "step {step} of {:?}", self.case.text);
            self.tally.greedy_tokens += 1;
            match step {
                0 => steps = routing,
                _ => steps.iter_mut().zip(routing).for_each(|(all, new)| append(all, new)),
            }
        }
        self.routing(&steps, &self.case.decoder_experts, self.case.decoder_probs.as_ref());
        let answer = self.reference.generate_greedy(&self.case.input_ids, inputs.len()).unwrap();
        assert_eq!(answer, self.case.greedy_ids[1..]);
    }

    fn first_step(&mut self, logits: &[f32]) {
        let top: Vec<f64> = self.case.first_step_top5.iter().map(|&(_, logit)| logit).collect();
        let ids = self.case.first_step_top5.iter().map(|&(id, _)| id).collect();
        self.logits(logits, &Logits { ids: Some(ids), logits: top, sum: None, abs_sum: None });
        if let Some(golden) = &self.case.first_step_logits {
            self.logits(logits, golden);
        }
    }

    /// A whole target in one call.
    fn forced(&mut self, states: &[f32]) {
        let Some(forced) = &self.case.forced else { return };
        let (logits, routing) = self.reference.decode_forced(states, &forced.decoder_input_ids).unwrap();
        let vocab_size = self.reference.config().vocab_size;
        self.logits(&logits[logits.len() - vocab_size..], &forced.last_logits);
        self.routing(&routing, &forced.experts, None);
        self.dropped(&routing, forced.dropped.as_ref());
        if forced.dropped.is_none() {
            self.stepwise_is_the_same(states, &forced.decoder_input_ids, &logits);
        }
    }

    /// Scoring a target at once and writing it token by token must not differ in a single bit.
    fn stepwise_is_the_same(&self, states: &[f32], ids: &[u32], together: &[f32]) {
        let mut state = self.reference.start(states).unwrap();
        let stepwise: Vec<f32> =
            ids.iter().flat_map(|&id| self.reference.decode(&mut state, &[id]).unwrap().0).collect();
        assert!(stepwise.iter().zip(together).all(|(a, b)| a.to_bits() == b.to_bits()));
    }

    fn logits(&mut self, found: &[f32], golden: &Logits) {
        let scale = golden.logits.iter().fold(0.0, |max: f64, logit| max.max(logit.abs()));
        let ids = golden.ids.clone().unwrap_or_else(|| (0..found.len() as u32).collect());
        assert_eq!(ids.len(), golden.logits.len());
        for (&id, &expected) in ids.iter().zip(&golden.logits) {
            let off = (f64::from(found[id as usize]) - expected).abs() / scale;
            assert!(off < TOLERANCE, "logit of token {id} is {}, expected {expected}", found[id as usize]);
            self.tally.worst_logit = self.tally.worst_logit.max(off);
        }
        let wide = found.iter().map(|&logit| f64::from(logit));
        if let (Some(sum), Some(abs_sum)) = (golden.sum, golden.abs_sum) {
            assert!((wide.clone().sum::<f64>() - sum).abs() < TOLERANCE * abs_sum);
            assert!((wide.map(f64::abs).sum::<f64>() - abs_sum).abs() < TOLERANCE * abs_sum);
        }
    }

    fn routing(&mut self, found: &[RoutedLayer], experts: &Stacked<u16>, probabilities: Option<&Stacked<f32>>) {
        assert_eq!(found.len(), experts.len(), "MoE layers of a stack");
        let num_experts = self.reference.config().num_experts;
        for layer in found {
            let router = self.router(layer);
            for (token, &expected) in experts[&router].iter().enumerate() {
                let row = &layer.probabilities[token * num_experts..][..num_experts];
                let (best, most) = best(row);
                self.tally.choices += 1;
                if best != expected {
                    let gap = most - row[usize::from(expected)];
                    assert!(gap < NEAR_TIE, "{router} sends token {token} to {best}, not {expected}: gap {gap}");
                    self.tally.near_ties_that_differ += 1;
                }
                if let Some(probabilities) = probabilities {
                    let expected = probabilities[&router][token];
                    assert!((most - expected).abs() < 1e-4, "{router} token {token}: {most}, expected {expected}");
                }
            }
        }
    }

    fn dropped(&self, found: &[RoutedLayer], golden: Option<&Stacked<usize>>) {
        for layer in golden.iter().flat_map(|_| found) {
            let dropped: Vec<usize> =
                (0..layer.routes.tokens()).filter(|&t| layer.routes.experts[t].is_none()).collect();
            assert_eq!(dropped, golden.unwrap()[&self.router(layer)], "tokens dropped by {}", self.router(layer));
        }
    }

    /// What transformers calls the router of a layer.
    fn router(&self, layer: &RoutedLayer) -> String {
        match self.reference.config().moe_block(layer.layer) {
            (Stack::Encoder, block) => format!("encoder.block.{block}.layer.1.mlp.router"),
            (Stack::Decoder, block) => format!("decoder.block.{block}.layer.2.mlp.router"),
        }
    }
}

fn best(row: &[f32]) -> (u16, f32) {
    let start = (0, f32::NEG_INFINITY);
    row.iter().zip(0..).fold(start, |best, (&p, expert)| if p > best.1 { (expert, p) } else { best })
}

fn append(all: &mut RoutedLayer, new: RoutedLayer) {
    assert_eq!(all.layer, new.layer);
    all.probabilities.extend(new.probabilities);
    all.routes.experts.extend(new.routes.experts);
    all.routes.weights.extend(new.routes.weights);
}
