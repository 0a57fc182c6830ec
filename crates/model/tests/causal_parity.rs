//! Decoder-only models against transformers: golden.json under tests/data/parity/causal-* says what transformers computed
//! for small random ones of every family (tests/parity/make_causal_configs.py), and the one beside models/qwen3-tiny-32 for
//! that (tests/parity/make_decoder_golden.py). Chosen experts and greedy tokens must be identical, numbers within 1e-4 of the
//! largest of their kind; a prompt gives the same bits whole, in pieces, and token by token. The same of GGUF files, converted:
//! tests/data/parity/gguf-* (tests/parity/make_gguf.py), whose tokenizers must give the same ids, too; and of GPTQ, AWQ,
//! compressed-tensors and FP8: packed-* (tests/parity/make_packed.py).

use std::{fs, path::Path};

use serde::Deserialize;
use sida_model::{BlockFormats, Reference, RoutedLayer, Tokenizer, convert};

const TOLERANCE: f64 = 1e-4;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
    #[serde(default)]
    texts: Vec<Text>,
}

#[derive(Deserialize)]
struct Text {
    text: String,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Case {
    /// Of a model with a tokenizer.
    text: Option<String>,
    ids: Vec<u32>,
    /// The tokens of which logits and states are told.
    rows: Vec<usize>,
    /// (rows, any): the tokens whose logits are told; all of them where there are none.
    logit_ids: Option<Vec<Vec<u32>>>,
    /// (rows, vocab_size or as many as there are in `logit_ids`)
    logits: Vec<Vec<f32>>,
    /// (rows, d_model): behind the last norm
    states: Vec<Vec<f32>>,
    /// (layers, tokens, top_k)
    experts: Vec<Vec<Vec<u16>>>,
    greedy: Vec<u32>,
}

/// A model that people deploy would answer otherwise than with transformers.
#[test]
fn decoder_only_models_agree_with_transformers() {
    let parity = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/parity");
    let mut seen = 0;
    for entry in fs::read_dir(parity).unwrap() {
        let dir = entry.unwrap().path();
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        if !name.starts_with("causal-") {
            continue;
        }
        seen += 1;
        let golden: Golden = serde_json::from_slice(&fs::read(dir.join("golden.json")).unwrap()).unwrap();
        let model = Reference::open(&dir).unwrap_or_else(|error| panic!("{name}: {error}"));
        golden.cases.iter().for_each(|case| compare(&name, &model, case));
    }
    assert!(seen >= 10, "tests/data/parity holds {seen} causal-* folders");
}

/// A GGUF file would become another model than it is, or its texts other tokens.
#[test]
fn gguf_files_agree_with_transformers() {
    let parity = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/parity");
    let out = tempfile::tempdir().unwrap();
    for name in ["gguf-qwen3", "gguf-qwen2", "gguf-olmoe", "gguf-mixtral"] {
        let dir = parity.join(name);
        let first = ["model.gguf", "model-00001-of-00002.gguf"].map(|file| dir.join(file));
        let file = first.iter().find(|file| file.exists()).expect("a file");
        let converted = out.path().join(name);
        convert::convert(file, &converted, BlockFormats::NONE, &mut |_, _| ()).unwrap();
        let golden: Golden = serde_json::from_slice(&fs::read(dir.join("golden.json")).unwrap()).unwrap();
        let model = Reference::open(&converted).unwrap_or_else(|error| panic!("{name}: {error}"));
        golden.cases.iter().for_each(|case| compare(name, &model, case));
        let tokenizer = Tokenizer::open(&converted, model.config()).unwrap();
        assert!(golden.texts.len() > 5, "{name}");
        for Text { text, ids } in &golden.texts {
            assert_eq!(&tokenizer.encode(text).unwrap(), ids, "{name}: {text:?}");
        }
    }
}

/// Would break: a checkpoint of packed integers or FP8 would become another model than it is.
#[test]
fn quantized_checkpoints_agree_with_transformers() {
    let parity = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/parity");
    let out = tempfile::tempdir().unwrap();
    for name in ["packed-gptq", "packed-awq", "packed-compressed", "packed-fp8"] {
        let (dir, converted) = (parity.join(name), out.path().join(name));
        convert::convert(&dir, &converted, BlockFormats::NONE, &mut |_, _| ()).unwrap();
        let golden: Golden = serde_json::from_slice(&fs::read(dir.join("golden.json")).unwrap()).unwrap();
        let model = Reference::open(&converted).unwrap_or_else(|error| panic!("{name}: {error}"));
        golden.cases.iter().for_each(|case| compare(name, &model, case));
        assert!(golden.cases.len() >= 3, "{name}: golden.json has {} cases", golden.cases.len());
    }
}

/// Would break: the model that comes with the source, of trained weights in int8, says other things than its authors measured;
/// or its tokenizer cuts texts into other tokens than those it was trained on.
#[test]
fn the_shipped_model_agrees_with_transformers() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/qwen3-tiny-32");
    let golden: Golden = serde_json::from_slice(&fs::read(dir.join("golden.json")).unwrap()).unwrap();
    let model = Reference::open(&dir).unwrap();
    let tokenizer = Tokenizer::open(&dir, model.config()).unwrap();
    for case in &golden.cases {
        assert_eq!(tokenizer.encode(case.text.as_deref().expect("a text")).unwrap(), case.ids, "{:?}", case.text);
        compare("qwen3-tiny-32", &model, case);
    }
    assert!(golden.cases.len() >= 5, "golden.json has {} cases", golden.cases.len());
}

fn compare(name: &str, model: &Reference, case: &Case) {
    let vocab = model.config().vocab_size;
    let of = |pieces: &[&[u32]]| {
        let mut sequence = model.start(&[]).unwrap();
        let decoded = pieces.iter().map(|piece| model.decode(&mut sequence, piece).unwrap());
        let (logits, routing): (Vec<_>, Vec<_>) = decoded.unzip();
        (logits.concat(), routing)
    };
    let near = |what: &str, row: usize, found: &[f32], expected: &[f32]| {
        assert_eq!(found.len(), expected.len(), "{name}: {what} after {} tokens", row + 1);
        let largest = expected.iter().fold(0.0_f64, |most, value| most.max(f64::from(value.abs())));
        let worst = found.iter().zip(expected).map(|(found, expected)| f64::from((found - expected).abs()));
        let worst = worst.fold(0.0, f64::max) / largest;
        assert!(worst < TOLERANCE, "{name}: {what} after {} tokens are off by {worst:.1e}", row + 1);
    };
    let (logits, routing) = of(&[&case.ids]);
    let (states, d_model) = (model.last_hidden(&case.ids).unwrap(), model.config().d_model);
    for (at, (&row, (expected_logits, expected_states))) in
        case.rows.iter().zip(case.logits.iter().zip(&case.states)).enumerate()
    {
        let all = &logits[row * vocab..][..vocab];
        let told = case.logit_ids.as_ref().map(|ids| ids[at].iter().map(|&id| all[id as usize]).collect::<Vec<_>>());
        near("logits", row, told.as_deref().unwrap_or(all), expected_logits);
        near("states", row, &states[row * d_model..][..d_model], expected_states);
    }
    for (layer, (RoutedLayer { routes, .. }, expected)) in routing[0].iter().zip(&case.experts).enumerate() {
        for (token, expected) in expected.iter().enumerate() {
            let found = &routes.experts[token * routes.top_k..][..routes.top_k];
            let found: Vec<u16> = found.iter().flatten().map(|expert| expert.0).collect();
            assert_eq!(&found, expected, "{name}: layer {layer}, token {token}");
        }
    }
    assert_eq!(routing[0].len(), case.experts.len(), "{name}: MoE layers");
    let middle = case.ids.len() / 2;
    let single: Vec<&[u32]> = case.ids.chunks(1).collect();
    assert!(of(&[&case.ids[..middle], &case.ids[middle..]]).0 == logits || middle == 0, "{name}: in two pieces");
    assert!(of(&single).0 == logits, "{name}: token by token");
    let mut other = model.start(&[]).unwrap();
    model.decode(&mut other, &[&case.ids[..middle], &[0, 1, 2]].concat()).unwrap();
    let mut begun = other.fork_prefix(middle, case.ids.len()).unwrap();
    let rest = model.decode(&mut begun, &case.ids[middle..]).unwrap().0;
    assert!(rest == logits[middle * vocab..], "{name}: from another's beginning");
    let answer = model.generate_greedy(&case.ids, case.greedy.len()).unwrap();
    assert_eq!(answer, case.greedy[..answer.len()], "{name}: greedy tokens");
    assert!(answer.len() == case.greedy.len() || model.config().generation.is_end(*answer.last().unwrap()), "{name}");
}
