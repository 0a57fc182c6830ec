//! One model in the many files that may hold it: which copies of its embedding there are, how its config is written, what a
//! generation config says. All of them are opened, and mean what they mean to transformers.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use safetensors::{SafeTensors, tensor::TensorView};
use serde::Deserialize;
use serde_json::{Value, json};
use sida_model::{Checkpoint, Reference, generation::DefaultSampling, manifest::Manifest, names};
use tempfile::TempDir;

const EMBEDDINGS: [&str; 4] =
    ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"];
const INPUT: [u32; 6] = [5, 17, 9, 30, 3, 7];

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/parity/random-steps")
}

/// The model, in a folder of its own.
fn model() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(source().join(file), dir.path().join(file)).unwrap();
    }
    dir
}

/// A tied model with its embedding under these names, the values of each multiplied by a number.
fn with_copies(copies: &[(&str, f32)]) -> TempDir {
    let dir = model();
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let shared = file.tensor("shared.weight").unwrap();
    let values = shared.data().as_chunks::<4>().0.iter().map(|&value| f32::from_le_bytes(value));
    let values: Vec<f32> = values.collect();
    let scaled = |by: f32| values.iter().flat_map(|value| (value * by).to_le_bytes()).collect::<Vec<u8>>();
    let copies: Vec<(&str, Vec<u8>)> = copies.iter().map(|&(name, by)| (name, scaled(by))).collect();
    let view = |data| TensorView::new(shared.dtype(), shared.shape().to_vec(), data).unwrap();
    let mut tensors: BTreeMap<String, TensorView<'_>> = file.tensors().into_iter().collect();
    tensors.retain(|name, _| !EMBEDDINGS.contains(&name.as_str()));
    tensors.extend(copies.iter().map(|(name, data)| ((*name).to_owned(), view(data.as_slice()))));
    fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
    dir
}

/// Encoder states of the input, and the logits of the decoder's first step.
fn computed(dir: &Path) -> (Vec<f32>, Vec<f32>) {
    let reference = Reference::open(dir).unwrap();
    let (states, _) = reference.encode(&INPUT).unwrap();
    let logits = reference.decode(&mut reference.start(&states).unwrap(), &[2]).unwrap().0;
    (states, logits)
}

/// A file that transformers loads would be refused for the name of its only copy.
#[test]
fn any_copy_of_a_tied_embedding_will_do() {
    let expected = computed(&source());
    for only in EMBEDDINGS {
        assert_eq!(computed(with_copies(&[(only, 1.0)]).path()), expected, "{only}");
    }
    assert_eq!(computed(with_copies(&EMBEDDINGS.map(|name| (name, 1.0))).path()), expected);
    let none = with_copies(&[]);
    assert!(Reference::open(none.path()).unwrap_err().to_string().contains("shared.weight"));
}

/// Copies that differ would be taken for the same, or another one be used than transformers does.
#[test]
fn copies_that_differ_are_used_each_in_its_place() {
    let (states, logits) = computed(&source());
    let head = with_copies(&[("shared.weight", 1.0), ("lm_head.weight", 2.0), ("decoder.embed_tokens.weight", 1.0)]);
    let doubled: Vec<f32> = logits.iter().map(|logit| logit * 2.0).collect();
    assert_eq!(computed(head.path()), (states.clone(), doubled));
    let found = names::embeddings(&Checkpoint::open(head.path()).unwrap()).unwrap();
    assert_eq!(found.differing, ["lm_head.weight"]);
    assert_eq!([found.encoder, found.decoder, found.head], ["shared.weight", "shared.weight", "lm_head.weight"]);
    // The encoder alone has another embedding; where the decoder's is missing it is the shared one.
    let encoder = with_copies(&[("shared.weight", 1.0), ("encoder.embed_tokens.weight", -1.0)]);
    let found = computed(encoder.path());
    assert!(found.0 != states && found.1 != logits);
    let reference = Reference::open(encoder.path()).unwrap();
    let forced = |reference: &Reference| reference.decode_forced(&states, &[2, 5]).unwrap().0;
    assert_eq!(forced(&reference), forced(&Reference::open(&source()).unwrap()));
}

/// A node with experts of another training would answer a part of the rows, and nobody would notice.
#[test]
fn models_that_differ_in_their_experts_are_told_apart() {
    let dir = model();
    let path = dir.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let experts: Vec<_> = {
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let of_experts = tensors.iter().filter(|(name, _)| name.contains(".experts."));
        of_experts
            .map(|(_, tensor)| (tensor.data().as_ptr() as usize - bytes.as_ptr() as usize, tensor.data().len()))
            .collect()
    };
    assert!(!experts.is_empty());
    for (start, length) in experts {
        bytes[start..start + length].iter_mut().for_each(|byte| *byte ^= 1);
    }
    fs::write(&path, bytes).unwrap();
    let digests = |dir: &Path| {
        let checkpoint = Checkpoint::open(dir).unwrap();
        (checkpoint.digest(), checkpoint.experts_digest())
    };
    let (other, own) = (digests(dir.path()), digests(&source()));
    assert_eq!(other.0, own.0);
    assert_ne!(other.1, own.1);
    assert_eq!(digests(model().path()), own, "the same files elsewhere");
}

/// Nodes that hold one model would take it for two, or two models for one.
#[test]
fn the_digest_is_of_what_the_config_means() {
    let digest = |edit: &dyn Fn(&mut Value) -> String| {
        let dir = model();
        let path = dir.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let text = edit(&mut config);
        fs::write(&path, text).unwrap();
        Checkpoint::open(dir.path()).unwrap().digest()
    };
    let set = |field: &'static str, value: Value| {
        move |config: &mut Value| {
            config[field] = value.clone();
            config.to_string()
        }
    };
    let expected = Checkpoint::open(&source()).unwrap().digest();
    assert_eq!(digest(&|config| config.to_string()), expected, "on one line");
    assert_eq!(digest(&|config| format!("\n\n{config:#}\n")), expected, "indented");
    assert_eq!(digest(&set("transformers_version", json!("9.0.0"))), expected);
    assert_eq!(digest(&set("is_gated_act", json!(false))), expected, "a default that is said");
    assert_eq!(digest(&set("eos_token_id", json!([7, 9]))), expected, "how it writes");
    for (field, value) in [
        ("layer_norm_epsilon", json!(1e-5)),
        ("expert_capacity", json!(3)),
        ("relative_attention_max_distance", json!(77)),
        ("encoder_sparse_step", json!(0)),
    ] {
        assert_ne!(digest(&set(field, value)), expected, "{field}");
    }
    let dir = model();
    fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [7, 9]}"#).unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap().digest(), expected);
}

fn with_generation(config: &Value) -> TempDir {
    let dir = model();
    fs::write(dir.path().join("generation_config.json"), config.to_string()).unwrap();
    dir
}

/// What a generation config says of an answer would be passed over.
#[test]
fn generation_configs_are_followed() {
    let greedy = |config: Value, tokens_max: usize| {
        let dir = with_generation(&config);
        Reference::open(dir.path()).unwrap().generate_greedy(&INPUT, tokens_max).unwrap()
    };
    let plain = greedy(json!({}), 8);
    assert_eq!(plain, Reference::open(&source()).unwrap().generate_greedy(&INPUT, 8).unwrap());
    let first = plain[0];
    let at = plain.iter().position(|&id| id != first).expect("it writes two tokens");
    let second = plain[at];
    assert!(plain.len() == 8 && at < 7, "the test's model goes on: {plain:?}");
    // Any of several ends.
    assert_eq!(greedy(json!({"eos_token_id": [60, second]}), 8), plain[..=at]);
    assert_eq!(greedy(json!({"eos_token_id": second}), 8), plain[..=at]);
    // A start token of its own; where it is missing, bos.
    let other = |field: &str| greedy(json!({field: 11}), 8);
    assert!(other("decoder_start_token_id") != plain && other("decoder_start_token_id") == other("bos_token_id"));
    // Tokens that are never written, or not first.
    assert!(!greedy(json!({"suppress_tokens": [first, second]}), 8).iter().any(|id| [first, second].contains(id)));
    let begin = greedy(json!({"begin_suppress_tokens": [first]}), 8);
    assert_ne!(begin[0], first);
    // Tokens that are written first and last.
    let forced = greedy(json!({"forced_bos_token_id": 40, "forced_eos_token_id": [50, 7]}), 5);
    assert_eq!((forced[0], forced.len(), forced[4]), (40, 5, 7), "{forced:?}");
    // No end before the least length, which counts the start token.
    for least in [
        json!({"eos_token_id": [first, second], "min_new_tokens": 3}),
        json!({"eos_token_id": [first, second], "min_length": 4}),
    ] {
        let long = greedy(least, 8);
        assert!(long.len() > 3 && !long[..3].iter().any(|id| [first, second].contains(id)), "{long:?}");
    }
}

/// A default would be read as another one, or a model that says nothing be taken to say something.
#[test]
fn defaults_of_requests_are_read() {
    let read = |config: Value| {
        let dir = with_generation(&config);
        Checkpoint::open(dir.path()).unwrap().config().generation.clone()
    };
    let nothing = read(json!({"max_length": 20, "temperature": null}));
    assert_eq!((nothing.tokens_min, nothing.tokens_max, nothing.sampling), (0, None, DefaultSampling::default()));
    assert_eq!(nothing.eos_token_ids, [7], "config.json's");
    assert_eq!(read(json!({"max_length": 33})).tokens_max, Some(32));
    assert_eq!(read(json!({"max_length": 33, "max_new_tokens": 5})).tokens_max, Some(5));
    assert_eq!(read(json!({"min_length": 9, "min_new_tokens": 2})).tokens_min, 2);
    let sampling =
        |temperature, top_k, top_p| DefaultSampling { temperature, top_k, top_p, ..DefaultSampling::default() };
    assert_eq!(read(json!({"do_sample": true})).sampling, sampling(1.0, 50, 0.0));
    let all = json!({"do_sample": true, "temperature": 0.7, "top_k": 0, "top_p": 0.9});
    assert_eq!(read(all).sampling, sampling(0.7, 0, 0.9));
    assert_eq!(read(json!({"temperature": 0.7, "top_p": 0.9})).sampling, sampling(0.0, 0, 0.9), "nothing is drawn");
    let penalized = read(json!({"repetition_penalty": 1.5, "min_p": 0.25}));
    assert_eq!((penalized.sampling.repetition_penalty, penalized.sampling.min_p), (1.5, 0.25));
    assert!(penalized.ignored.is_empty(), "{:?}", penalized.ignored);
    assert_eq!(read(json!({"num_beams": 4})).ignored, ["num_beams is 4"]);
    // Without the file, config.json says the same.
    let dir = model();
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["suppress_tokens"] = json!([3]);
    config["num_beams"] = json!(2);
    fs::write(&path, config.to_string()).unwrap();
    let generation = Checkpoint::open(dir.path()).unwrap().config().generation.clone();
    assert_eq!((generation.suppress_tokens, generation.ignored), (vec![3], vec!["num_beams is 2".to_owned()]));
}

/// A generation config that was changed, or taken away, after the manifest was written would be believed.
#[test]
fn the_manifest_covers_the_generation_config() {
    let dir = with_generation(&json!({"eos_token_id": 7}));
    Manifest::of_directory(dir.path(), &mut |_, _| ()).unwrap().write().unwrap();
    Checkpoint::open(dir.path()).unwrap();
    let path = dir.path().join("generation_config.json");
    fs::write(&path, json!({"eos_token_id": 9}).to_string()).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("generation_config.json"), "{error}");
    fs::remove_file(&path).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("generation_config.json"), "{error}");
}

/// generation.golden.json, as tests/parity/make_generation.py writes it.
#[derive(Deserialize)]
struct Golden {
    input: Vec<u32>,
    generation: Vec<Generated>,
    copies: Vec<Copies>,
}

#[derive(Deserialize)]
struct Generated {
    config: Value,
    arguments: Arguments,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Arguments {
    max_new_tokens: Option<usize>,
}

#[derive(Deserialize)]
struct Copies {
    copies: BTreeMap<String, f32>,
    states: Vec<f32>,
    logits: Vec<f32>,
}

/// A model would answer otherwise than transformers' `generate()` does by the same files.
#[test]
fn transformers_answers_the_same() {
    let golden = fs::read(source().join("../generation.golden.json")).unwrap();
    let Golden { input, generation, copies } = serde_json::from_slice(&golden).unwrap();
    assert_eq!((input, generation.len() > 15, copies.len() > 8), (INPUT.to_vec(), true, true));
    for Generated { config, arguments, ids } in generation {
        let dir = with_generation(&config);
        let reference = Reference::open(dir.path()).unwrap();
        let tokens_max = arguments.max_new_tokens.or(reference.config().generation.tokens_max).expect("one says it");
        assert_eq!(reference.generate_greedy(&INPUT, tokens_max).unwrap(), ids, "{config}");
    }
    for Copies { copies, states, logits } in copies {
        let named: Vec<(String, f32)> = copies.iter().map(|(name, &by)| (format!("{name}.weight"), by)).collect();
        let named: Vec<(&str, f32)> = named.iter().map(|(name, by)| (name.as_str(), *by)).collect();
        let computed = computed(with_copies(&named).path());
        for (found, expected) in [(&computed.0, &states), (&computed.1, &logits)] {
            let largest = expected.iter().fold(0.0f32, |most, value| most.max(value.abs()));
            assert_eq!(found.len(), expected.len());
            let is_near = found.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 1e-4 * largest);
            assert!(is_near, "{copies:?}: {found:?}, expected {expected:?}");
        }
    }
}
