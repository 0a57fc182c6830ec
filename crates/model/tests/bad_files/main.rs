//! Model directories that are missing something, damaged, or made to do harm: each is a typed error that names
//! the thing, and none panics or takes memory by a length it claims.

mod spoiled;

use std::{fs, path::Path};

use proptest::prelude::*;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use sida_model::{Checkpoint, ExpertStore, ModelConfig, ModelError, Reference, Tokenizer};
use sida_routing::{ExpertId, ExpertKey, LayerId};
use spoiled::{edit_config, edit_header, model, open, refused, repository};

/// A missing file would be a panic, or an error that does not say which.
#[test]
fn missing_files() {
    let dir = model();
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    refused(dir.path(), |e| matches!(e, ModelError::NoWeights { .. }), "model.safetensors.index.json");
    fs::write(dir.path().join("pytorch_model.bin"), b"").unwrap();
    refused(dir.path(), |e| matches!(e, ModelError::NoWeights { .. }), "sida convert");
    fs::remove_file(dir.path().join("config.json")).unwrap();
    refused(dir.path(), |e| matches!(e, ModelError::Read { .. }), "config.json");
}

/// A truncated file would be read past its end.
#[test]
fn truncated_at_any_length() {
    let dir = model();
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let lengths = (0..64).chain((64..bytes.len()).step_by(997)).chain([bytes.len() - 1]);
    for length in lengths {
        fs::write(&path, &bytes[..length]).unwrap();
        let is_expected = |e: &ModelError| match length {
            0 => matches!(e, ModelError::MistakenFile { .. }),
            _ => matches!(e, ModelError::Header { .. }),
        };
        refused(dir.path(), is_expected, "model.safetensors");
    }
}

/// A claimed header length would be allocated or added to without a check.
#[test]
fn huge_header_lengths() {
    let dir = model();
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    for length in [u64::MAX, u64::MAX - 7, 1 << 62, 100_000_001, 99_999_999, bytes.len() as u64 - 7] {
        fs::write(&path, [&length.to_le_bytes()[..], &bytes[8..]].concat()).unwrap();
        refused(dir.path(), |e| matches!(e, ModelError::Header { .. }), "header of");
    }
}

/// Tensors could overlap, leave the file, or be of another size than their shape says.
#[test]
fn lying_offsets_and_shapes() {
    let norm = "encoder.final_layer_norm.weight";
    type Edit = fn(&mut Value);
    let lies: [(&str, Edit); 6] = [
        ("overlap", |t| t["data_offsets"] = json!([0, t["data_offsets"][1].as_u64().unwrap()])),
        ("beyond the file", |t| t["data_offsets"][1] = json!(1u64 << 40)),
        ("backwards", |t| t["data_offsets"] = json!([80, 0])),
        ("overflow", |t| t["shape"] = json!([u64::MAX, u64::MAX])),
        ("too small for its shape", |t| t["shape"] = json!([1_000_000])),
        ("no dtype", |t| t["dtype"] = json!("F31")),
    ];
    for (lie, edit) in lies {
        let dir = model();
        edit_header(dir.path(), |header| edit(&mut header[norm]));
        let error = open(dir.path()).expect_err(lie);
        assert!(matches!(error, ModelError::Header { .. }), "{lie}: {error:?}");
    }
}

/// Weights of another shape, or integers, would be computed with.
#[test]
fn other_shapes_and_dtypes_name_the_tensor() {
    let transpose = |tensor: &'static str| {
        move |header: &mut Value| {
            let shape = header[tensor]["shape"].as_array_mut().unwrap();
            shape.reverse();
        }
    };
    for tensor in [
        "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder.block.0.layer.1.EncDecAttention.q.weight",
    ] {
        let dir = model();
        edit_header(dir.path(), transpose(tensor));
        refused(dir.path(), |e| matches!(e, ModelError::TensorShape { .. }), tensor);
    }
    let dir = model();
    let expert = expert_tensor(dir.path());
    edit_header(dir.path(), |header| header[&expert]["shape"].as_array_mut().unwrap().reverse());
    refused(dir.path(), |e| matches!(e, ModelError::TensorShape { .. }), &expert);
    let dir = model();
    edit_header(dir.path(), |header| header["shared.weight"]["dtype"] = json!("I32"));
    refused(dir.path(), |e| matches!(e, ModelError::TensorDType { .. }), "shared.weight");
    let dir = model();
    edit_header(dir.path(), |header| {
        let norm = header.as_object_mut().unwrap().remove("encoder.final_layer_norm.weight").unwrap();
        header["renamed"] = norm;
    });
    refused(dir.path(), |e| matches!(e, ModelError::TensorMissing { .. }), "encoder.final_layer_norm.weight");
}

/// Bytes would be taken for weights in blocks that they are not, or the error would not say what a file lacks.
#[test]
fn blocks_that_are_none_name_the_tensor() {
    for (format, dtype, row, bytes, words) in [
        ("Q2_K", "U8", 34, 34, "is in blocks of \"Q2_K\", expected Q8_0 or Q4_0 or Q4_1 or Q5_0"),
        ("Q8_0", "U8", 33, 33, "is U8 [33], expected U8 and rows of 34 bytes for each block of Q8_0"),
        ("Q4_0", "BF16", 18, 36, "is BF16 [18], expected U8"),
    ] {
        let model = model();
        edit_header(model.path(), |header| {
            // At the end, so that nothing else moves.
            let end =
                header.as_object().unwrap().values().filter_map(|tensor| tensor["data_offsets"][1].as_u64()).max();
            let end = end.unwrap();
            header["extra"] = json!({"dtype": dtype, "shape": [row], "data_offsets": [end, end + bytes]});
            header["__metadata__"] = json!({"blocks.extra": format});
        });
        let path = model.path().join("model.safetensors");
        let mut content = fs::read(&path).unwrap();
        content.resize(content.len() + bytes as usize, 0);
        fs::write(&path, content).unwrap();
        refused(model.path(), |error| matches!(error, ModelError::Header { .. }), words);
    }
    let model = model();
    edit_header(model.path(), |header| header["__metadata__"] = json!({"blocks.nothing": "Q9"}));
    open(model.path()).unwrap();
}

/// The first expert matrix of a model.
fn expert_tensor(dir: &Path) -> String {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let mut experts: Vec<&str> = checkpoint.names().filter(|name| sida_model::names::is_expert(name)).collect();
    experts.sort_unstable();
    experts[0].to_owned()
}

/// The index could lead out of the model's folder, or name what is not there.
#[test]
fn hostile_indexes() {
    let dir = model();
    fs::rename(dir.path().join("model.safetensors"), dir.path().join("shard.safetensors")).unwrap();
    let index = |map: Value| {
        fs::write(dir.path().join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string()).unwrap();
    };
    for shard in ["../shard.safetensors", "/etc/passwd", "a/b", "..", "", "a\\b", "a\0b"] {
        index(json!({ "shared.weight": shard }));
        refused(dir.path(), |e| matches!(e, ModelError::ShardName { .. }), "index.json");
    }
    index(json!({ "shared.weight": "absent.safetensors" }));
    refused(dir.path(), |e| matches!(e, ModelError::Read { .. }), "absent.safetensors");
    index(json!({ "no.such.tensor": "shard.safetensors" }));
    refused(dir.path(), |e| matches!(e, ModelError::ShardTensor { .. }), "no.such.tensor");
    fs::write(dir.path().join("model.safetensors.index.json"), "").unwrap();
    refused(dir.path(), |e| matches!(e, ModelError::MistakenFile { .. }), "index.json is empty");
    for text in ["[]", "{\"weight_map\": 3}", &"[".repeat(200_000)] {
        fs::write(dir.path().join("model.safetensors.index.json"), text).unwrap();
        refused(dir.path(), |e| matches!(e, ModelError::Json { .. }), "index.json");
    }
    let names = Checkpoint::open(model().path()).unwrap().names().map(str::to_owned).collect::<Vec<_>>();
    index(names.into_iter().map(|name| (name, "shard.safetensors")).collect());
    open(dir.path()).unwrap();
}

/// One flipped bit would be served, in the backbone or in an expert.
#[test]
fn flipped_bits_under_a_manifest() {
    let dir = model();
    sida_model::manifest::Manifest::of_directory(dir.path(), &mut |_, _| ()).unwrap().write().unwrap();
    open(dir.path()).unwrap();
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for tensor in [expert_tensor(dir.path()), "decoder.block.0.layer.1.EncDecAttention.v.weight".to_owned()] {
        let header = u64::from_le_bytes(*whole.first_chunk().unwrap()) as usize;
        let info: Value = serde_json::from_slice(&whole[8..8 + header]).unwrap();
        let at = 8 + header + info[&tensor]["data_offsets"][0].as_u64().unwrap() as usize;
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        fs::write(&path, &bytes).unwrap();
        refused(dir.path(), |e| matches!(e, ModelError::TensorDigest { .. }), &tensor);
    }
    fs::write(&path, whole).unwrap();
    edit_config(dir.path(), "layer_norm_epsilon", json!(1e-5));
    refused(dir.path(), |e| matches!(e, ModelError::Manifest { .. }), "config.json");
}

/// Experts that are not there, or slots of another size, would end the process.
#[test]
fn experts_that_do_not_exist() {
    let dir = model();
    let store = ExpertStore::open(Checkpoint::open(dir.path()).unwrap()).unwrap();
    let mut slot = vec![0; store.shape().bytes()];
    for (layer, expert) in [(0, u16::MAX), (u16::MAX, 0)] {
        let key = ExpertKey { layer: LayerId(layer), expert: ExpertId(expert) };
        assert!(matches!(store.load(key, &mut slot), Err(ModelError::Expert { .. })));
        store.will_need(key);
    }
    let key = ExpertKey { layer: LayerId(0), expert: ExpertId(0) };
    assert!(matches!(store.load(key, &mut slot[1..]), Err(ModelError::Shape { .. })));
}

/// Token ids from outside would read another token's embedding, or past it.
#[test]
fn token_ids_outside_the_vocabulary() {
    let dir = model();
    let reference = Reference::open(dir.path()).unwrap();
    let vocab_size = reference.config().vocab_size as u32;
    for id in [vocab_size, u32::MAX] {
        assert!(matches!(reference.encode(&[0, id]), Err(ModelError::TokenId { .. })));
    }
    let (states, _) = reference.encode(&[vocab_size - 1]).unwrap();
    assert!(matches!(reference.decode_forced(&states, &[vocab_size]), Err(ModelError::TokenId { .. })));
}

/// A generation config that cannot be followed would be followed in part, or found out in the middle of an answer.
#[test]
fn generation_configs_are_checked_when_they_are_read() {
    let dir = model();
    let vocab_size = ModelConfig::open(dir.path()).unwrap().vocab_size;
    let path = dir.path().join("generation_config.json");
    let every: Vec<usize> = (0..vocab_size).collect();
    for (field, value) in [
        ("eos_token_id", json!(vocab_size)),
        ("eos_token_id", json!([1, -1])),
        ("eos_token_id", json!({"id": 1})),
        ("pad_token_id", json!(vocab_size)),
        ("bos_token_id", json!(1u64 << 40)),
        ("decoder_start_token_id", json!("<s>")),
        ("suppress_tokens", json!([0, vocab_size])),
        ("suppress_tokens", json!(every)),
        ("begin_suppress_tokens", json!([[1]])),
        ("forced_bos_token_id", json!([1])),
        ("forced_eos_token_id", json!([1, vocab_size])),
        ("min_new_tokens", json!(-1)),
        ("max_new_tokens", json!(0)),
        ("max_length", json!(1)),
        ("do_sample", json!("yes")),
        ("temperature", json!(-0.5)),
        ("top_k", json!(1.5)),
        ("top_p", json!(2)),
        ("min_p", json!(1.5)),
        ("repetition_penalty", json!(0)),
    ] {
        fs::write(&path, json!({field: value}).to_string()).unwrap();
        match Checkpoint::open(dir.path()) {
            Err(ModelError::Config { field: named, path: at, .. }) => assert_eq!((named, &at), (field, &path)),
            other => panic!("{field}: {other:?}"),
        }
    }
    for forced in ["forced_bos_token_id", "forced_eos_token_id"] {
        fs::write(&path, json!({forced: 3, "suppress_tokens": [3]}).to_string()).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(forced) && error.contains("suppress_tokens"), "{error}");
    }
    for text in ["", "[]", "{", "7"] {
        fs::write(&path, text).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&*path.to_string_lossy()) && error.contains("JSON"), "{text:?}: {error}");
    }
    fs::write(&path, " ".repeat(2 << 20)).unwrap();
    assert!(matches!(Checkpoint::open(dir.path()), Err(ModelError::FileTooLarge { .. })));
}

/// A tokenizer of another model would make ids that mean something else, or nothing.
#[test]
fn tokenizers_of_other_models() {
    let dir = repository().join("models/switch-tiny-64");
    let config = ModelConfig::open(&dir).unwrap();
    let tokenizer = Tokenizer::open(&dir, &config).unwrap();
    assert_eq!(tokenizer.encode("").unwrap(), config.eos_token_ids);
    let sentinels = tokenizer.encode("The <extra_id_0> walks").unwrap();
    assert_eq!(tokenizer.decode(&sentinels).unwrap(), "The<extra_id_0> walks");
    assert_eq!(tokenizer.decode(&[u32::MAX, 0, 1]).unwrap(), "");
    let long = "a ".repeat(sida_model::tokenizer::TEXT_BYTES_MAX);
    assert!(matches!(tokenizer.encode(&long), Err(ModelError::TextTooLong { .. })));

    let smaller = ModelConfig { vocab_size: 8191, ..config.clone() };
    assert!(matches!(Tokenizer::open(&dir, &smaller), Err(ModelError::Vocabulary { id: 8191, .. })));
    let other_end = ModelConfig { eos_token_ids: vec![7], ..config.clone() };
    assert!(matches!(Tokenizer::open(&dir, &other_end), Err(ModelError::Tokenizer { .. })));
    let broken = tempfile::tempdir().unwrap();
    assert!(matches!(Tokenizer::open(broken.path(), &config), Err(ModelError::Read { .. })));
    for text in ["{}", "{\"model\": {\"type\": \"Unigram\", \"vocab\": []}}"] {
        fs::write(broken.path().join("tokenizer.json"), text).unwrap();
        assert!(matches!(Tokenizer::open(broken.path(), &config), Err(ModelError::Tokenizer { .. })), "{text}");
    }
}

/// An expert whose matrices are stored in two dtypes would be read as one of them.
#[test]
fn experts_of_mixed_dtypes_are_widened() {
    let dir = model();
    let source = Checkpoint::open(dir.path()).unwrap();
    // Each tensor twice: as float32 values that bf16 can hold, and with the `wo` stored as bf16.
    let (mut wide, mut mixed) = (Vec::new(), Vec::new());
    for name in source.names() {
        let tensor = source.tensor(name).unwrap();
        let values: Vec<half::bf16> = tensor.dtype.widen(tensor.bytes).into_iter().map(half::bf16::from_f32).collect();
        let f32s: Vec<u8> = values.iter().flat_map(|value| value.to_f32().to_le_bytes()).collect();
        let bf16s: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        mixed.push(match name.ends_with(".wo.weight") {
            true => (name, Dtype::BF16, tensor.shape, bf16s),
            false => (name, Dtype::F32, tensor.shape, f32s.clone()),
        });
        wide.push((name, Dtype::F32, tensor.shape, f32s));
    }
    let [wide, mixed] = [wide, mixed].map(|tensors| {
        let other = tempfile::tempdir().unwrap();
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| (name, TensorView::new(*dtype, shape.to_vec(), bytes).unwrap()));
        fs::copy(dir.path().join("config.json"), other.path().join("config.json")).unwrap();
        fs::write(other.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
        Reference::open(other.path()).unwrap().encode(&[5, 9, 1]).unwrap().0
    });
    assert_eq!(mixed, wide);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Some damaged byte of a header would panic instead of being refused (or being harmless).
    #[test]
    fn no_byte_of_a_header_panics(flips in proptest::collection::vec((0usize..4096, any::<u8>()), 1..4)) {
        let dir = model();
        let path = dir.path().join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        for (at, value) in flips {
            bytes[at] = value;
        }
        fs::write(&path, bytes).unwrap();
        let _ = open(dir.path());
    }
}
