//! Checkpoints of PyTorch, whole, wrapped, broken and hostile, are converted.

use std::{
    collections::BTreeMap,
    io::{self, Read},
};

use safetensors::SafeTensors;
use serde_json::json;

use super::*;
use crate::{
    Checkpoint, Reference, RoutedLayer, StoredDType, names, safetensors_dtype,
    synth::{CausalShape, SwitchShape, SynthShape, synth},
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// Every tensor of a converted directory as float32, by name.
fn values(dir: &Path) -> BTreeMap<String, (String, Vec<f32>)> {
    let bytes = fs::read(dir.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let widen = |view: safetensors::tensor::TensorView<'_>| {
        let dtype = safetensors_dtype::stored(view.dtype()).unwrap();
        (format!("{dtype}{:?}", view.shape()), dtype.widen(view.data()))
    };
    file.tensors().into_iter().map(|(name, view)| (name, widen(view))).collect()
}

/// Values of a PyTorch checkpoint would be lost, moved or changed on their way.
#[test]
fn keeps_every_value_of_single_and_sharded_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["torch-single", "torch-sharded"] {
        let out = dir.path().join(name);
        let mut last = (0, 0);
        let converted =
            convert(&fixture(name), &out, BlockFormats::NONE, &mut |done, total| last = (done, total)).unwrap();
        assert_eq!(converted.tied, ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight"]);
        assert_eq!(last, (converted.bytes, converted.bytes));
        let values = values(&out);
        assert_eq!(values.len(), converted.tensors);
        for (n, (name, (_, values))) in values.iter().enumerate() {
            for (i, &value) in values.iter().enumerate() {
                assert_eq!(value, ((7 * i + n) % 64) as f32 - 32.0, "{name} value {i}");
            }
        }
        assert_eq!(values["encoder.block.0.layer.1.mlp.wi.weight"].0, "BF16[16, 8]");
        assert_eq!(values["encoder.block.1.layer.1.mlp.router.classifier.weight"].0, "F32[2, 8]");
        assert_eq!(values["encoder.final_layer_norm.weight"].0, "F16[8]");
        let manifest = Manifest::read(&out).unwrap().expect("a manifest is written");
        manifest.verify_directory(&mut |_, _| ()).unwrap();
    }
}

/// Weights of a model would be taken for copies of others, and lost.
#[test]
fn keeps_a_tied_tensor_that_differs() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    fs::create_dir(&source).unwrap();
    for entry in fs::read_dir(fixture("torch-sharded")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, source.join(path.file_name().unwrap())).unwrap();
    }
    convert(&source, &out, BlockFormats::NONE, &mut |_, _| ()).unwrap();
    let converted = fs::read(out.join("model.safetensors")).unwrap();
    let shared = SafeTensors::deserialize(&converted).unwrap().tensor("shared.weight").unwrap().data().to_vec();
    // Another file, which has all tensors once more, is where one of the copies comes from.
    let other = "pytorch_model-00003-of-00003.bin";
    let mut bytes = fs::read(fixture("torch-single").join(SINGLE)).unwrap();
    let at = bytes.windows(shared.len()).position(|window| window == shared).unwrap();
    bytes[at] ^= 1;
    fs::write(source.join(other), bytes).unwrap();
    let mut index: serde_json::Value = serde_json::from_slice(&fs::read(source.join(INDEX)).unwrap()).unwrap();
    index["weight_map"]["lm_head.weight"] = other.into();
    fs::write(source.join(INDEX), index.to_string()).unwrap();
    fs::remove_dir_all(&out).unwrap();
    let tied = convert(&source, &out, BlockFormats::NONE, &mut |_, _| ()).unwrap().tied;
    assert_eq!(tied, ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight"]);
    let values = values(&out);
    assert_ne!(values["lm_head.weight"], values["shared.weight"]);
}

/// Somebody's files would be overwritten.
#[test]
fn refuses_an_output_that_holds_something() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("thesis.tex"), "").unwrap();
    let error = convert(&fixture("torch-single"), dir.path(), BlockFormats::NONE, &mut |_, _| ()).unwrap_err();
    assert!(matches!(error, ConvertError::Model(ModelError::NotEmpty { .. })), "{error}");
}

/// A hostile or broken checkpoint would panic, be half converted, or leave litter behind.
#[test]
fn refuses_broken_checkpoints_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    fs::create_dir(&source).unwrap();
    fs::copy(fixture("torch-single/config.json"), source.join("config.json")).unwrap();
    let whole = fs::read(fixture("torch-single").join(SINGLE)).unwrap();
    let refused = |bytes: &[u8]| {
        fs::write(source.join(SINGLE), bytes).unwrap();
        convert(&source, &out, BlockFormats::NONE, &mut |_, _| ()).unwrap_err().to_string()
    };
    for len in [0, 1, 100, whole.len() / 2, whole.len() - 1] {
        assert!(refused(&whole[..len]).contains(SINGLE));
    }
    let replaced = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let mut bytes = whole.clone();
        let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        bytes
    };
    let attack = refused(&replaced("torch._utils\n_rebuild_tensor_v2", "posixxxxxxxx\nsystemmmmmmmmmmmmm"));
    assert!(attack.contains("systemmmmmmmmmmmmm") && attack.contains("attack"), "{attack}");
    assert!(refused(&replaced("BFloat16Storage", "Complex6Storage")).contains("Complex6Storage"));
    assert!(!out.exists());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "only the source is left");
}

/// One tensor of a state dictionary, with the class of its storage.
struct Pickled {
    name: String,
    class: &'static str,
    key: String,
    shape: Vec<u64>,
    stride: Vec<u64>,
}

/// A state dictionary as torch 2 pickles it.
fn pickled(tensors: &[Pickled]) -> Vec<u8> {
    let text = |text: &str| [&b"X"[..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
    let integers = |values: &[u64]| {
        let values: Vec<u8> = values.iter().flat_map(|&v| [&b"J"[..], &(v as u32).to_le_bytes()].concat()).collect();
        [&b"("[..], &values, b"t"].concat()
    };
    let mut bytes = b"\x80\x02}(".to_vec();
    for Pickled { name, class, key, shape, stride } in tensors {
        bytes.extend(text(name));
        bytes.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        bytes.extend([text("storage"), format!("ctorch\n{class}\n").into_bytes(), text(key), text("cpu")].concat());
        bytes.extend(b"K\x01tQK\x00");
        bytes.extend([integers(shape), integers(stride)].concat());
        bytes.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    bytes.extend(b"u.");
    bytes
}

/// The single fixture's file with other names, and with what `more` adds as int64 tensors.
fn rewritten(rename: impl Fn(&str) -> String, more: &[&str]) -> Vec<u8> {
    let whole = fs::read(fixture("torch-single").join(SINGLE)).unwrap();
    let mut source = zip::ZipArchive::new(io::Cursor::new(&whole)).unwrap();
    let mut out = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for index in 0..source.len() {
        let mut entry = source.by_index(index).unwrap();
        let (name, mut bytes) = (entry.name().unwrap().into_owned(), Vec::new());
        entry.read_to_end(&mut bytes).unwrap();
        if name.ends_with("data.pkl") {
            let tensors = pickle::tensors(&bytes).unwrap().into_iter().map(|tensor| {
                let class = match tensor.storage.values {
                    pickle::Values::Weights(StoredDType::F32) => "FloatStorage",
                    pickle::Values::Weights(StoredDType::F16) => "HalfStorage",
                    pickle::Values::Weights(StoredDType::BF16) => "BFloat16Storage",
                    pickle::Values::Weights(blocks) => panic!("{blocks}"),
                    pickle::Values::Other(other) => panic!("{other}"),
                };
                let (name, key) = (rename(&tensor.name), tensor.storage.key);
                Pickled { name, class, key, shape: tensor.shape, stride: tensor.stride }
            });
            let more = more.iter().map(|name| {
                let (name, key) = ((*name).to_owned(), "0".to_owned());
                Pickled { name, class: "LongStorage", key, shape: vec![1, 2], stride: vec![2, 1] }
            });
            bytes = pickled(&tensors.chain(more).collect::<Vec<_>>());
        }
        out.start_file(name, stored).unwrap();
        io::Write::write_all(&mut out, &bytes).unwrap();
    }
    out.finish().unwrap().into_inner()
}

/// What a training run saved would be converted into a model that cannot be loaded, or be refused for a counter.
#[test]
fn prefixes_and_buffers_of_a_training_run_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::copy(fixture("torch-single/config.json"), source.join("config.json")).unwrap();
    let convert_to = |out: &str, file: Vec<u8>| {
        fs::write(source.join(SINGLE), file).unwrap();
        convert(&source, &dir.path().join(out), BlockFormats::NONE, &mut |_, _| ())
    };
    let plain =
        convert(&fixture("torch-single"), &dir.path().join("plain"), BlockFormats::NONE, &mut |_, _| ()).unwrap();
    let buffer = "module.encoder.embed_positions.position_ids";
    let file = rewritten(|name| format!("module.{name}"), &[buffer]);
    let converted = convert_to("wrapped", file).unwrap();
    assert_eq!(converted.others, [("encoder.embed_positions.position_ids".to_owned(), "int64")]);
    assert_eq!(converted.dropped_prefixes, [("module.".to_owned(), plain.tensors + plain.tied.len() + 1)]);
    assert_eq!(values(&dir.path().join("wrapped")), values(&dir.path().join("plain")));
    crate::Checkpoint::open(&dir.path().join("wrapped")).unwrap();

    let norm = "encoder.final_layer_norm.weight";
    let missing = rewritten(|name| if name == norm { "renamed".to_owned() } else { name.to_owned() }, &[]);
    let error = convert_to("missing", missing).unwrap_err();
    assert!(error.is_lasting() && error.to_string().contains(norm), "{error}");
    let integers = rewritten(|name| if name == norm { "renamed".to_owned() } else { name.to_owned() }, &[norm]);
    let error = convert_to("integers", integers).unwrap_err().to_string();
    assert!(error.contains(norm) && error.contains("int64"), "{error}");
    assert!(!dir.path().join("missing").exists() && !dir.path().join("integers").exists());
}

/// A person would look for a damaged archive where a page was downloaded.
#[test]
fn what_is_no_checkpoint_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::copy(fixture("torch-single/config.json"), source.join("config.json")).unwrap();
    for (content, expected) in [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        ("<!DOCTYPE html><html>", "HTML page"),
        ("", "is empty"),
    ] {
        fs::write(source.join(SINGLE), content).unwrap();
        let error =
            convert(&source, &dir.path().join("out"), BlockFormats::NONE, &mut |_, _| ()).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains(SINGLE), "{error}");
    }
}

/// An index would lead out of the model's directory, or a missing tensor would go unnoticed.
#[test]
fn refuses_hostile_indexes() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    for entry in fs::read_dir(fixture("torch-sharded")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, source.join(path.file_name().unwrap())).unwrap();
    }
    for (shard, expected) in [
        ("../pytorch_model-00001-of-00002.bin", "not a plain file name"),
        ("pytorch_model-00001-of-00002.bin", "does not hold it"),
    ] {
        let index = format!(r#"{{"weight_map": {{"no.such.tensor": "{shard}"}}}}"#);
        fs::write(source.join(INDEX), index).unwrap();
        let error =
            convert(&source, &dir.path().join("out"), BlockFormats::NONE, &mut |_, _| ()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

/// Writes the weights of a checkpoint again, all in float32.
fn in_float32(dir: &Path, out: &Path) {
    let checkpoint = Checkpoint::open(dir).unwrap();
    fs::create_dir(out).unwrap();
    fs::copy(dir.join(CONFIG), out.join(CONFIG)).unwrap();
    let spec = |name: &str| {
        let shape = checkpoint.describe(name).unwrap().1.to_vec();
        TensorSpec { name: name.to_owned(), dtype: StoredDType::F32, shape }
    };
    let specs: Vec<TensorSpec> = checkpoint.names().map(spec).collect();
    shards::write(out, &specs, u64::MAX, &mut |spec, file| {
        let tensor = checkpoint.tensor(&spec.name).unwrap();
        let values = tensor.dtype.widen(tensor.bytes);
        file.write_all(&values.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<_>>())
    })
    .unwrap();
}

/// The logits of a model after each of some tokens, and the experts that these went to.
fn answers(dir: &Path) -> (Vec<u32>, Vec<RoutedLayer>) {
    let model = Reference::open(dir).unwrap();
    let ids: Vec<u32> = (2..40).collect();
    let (states, mut routed) = match model.config().has_encoder() {
        true => model.encode(&ids).unwrap(),
        false => (Vec::new(), Vec::new()),
    };
    let (logits, of_decoder) = model.decode(&mut model.start(&states).unwrap(), &ids).unwrap();
    routed.extend(of_decoder);
    (logits.into_iter().map(f32::to_bits).collect(), routed)
}

/// A model of blocks would answer otherwise than its values in float32 do, or matrices would stay what they were.
#[test]
fn blocks_answer_as_their_values_do() {
    let causal = json!({
        "architectures": ["Qwen2MoeForCausalLM"], "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96,
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2,
        "max_position_embeddings": 64, "tie_word_embeddings": false,
    });
    let switch = SwitchShape {
        d_model: 32,
        d_kv: 16,
        d_ff: 64,
        num_heads: 2,
        encoder_layers: 2,
        decoder_layers: 2,
        sparse_step: 2,
        num_experts: 4,
        expert_capacity: 16,
        vocab_size: 300,
    };
    let causal = SynthShape::Causal(Box::new(CausalShape::of_config(causal).unwrap()));
    for (name, shape) in [("causal", causal), ("switch", SynthShape::Switch(switch))] {
        let dir = tempfile::tempdir().unwrap();
        let [plain, blocks, wide] = ["plain", "blocks", "wide"].map(|name| dir.path().join(name));
        synth(&shape, &plain, 1, None, BlockFormats::NONE, &mut |_, _| ()).unwrap();
        let formats = BlockFormats { experts: Some(StoredDType::Q4_0), dense: Some(StoredDType::Q8_0) };
        let converted = convert(&plain, &blocks, formats, &mut |_, _| ()).unwrap();
        Manifest::read(&blocks).unwrap().expect("a manifest").verify_directory(&mut |_, _| ()).unwrap();
        let checkpoint = Checkpoint::open(&blocks).unwrap();
        checkpoint.check_tensors().unwrap();
        for tensor in checkpoint.names() {
            let (dtype, shape, _) = checkpoint.describe(tensor).unwrap();
            let expected = match tensor {
                _ if tensor.contains(".experts.") => "Q4_0",
                _ if names::is_router(tensor) || names::is_position_bias(tensor) || shape.len() == 1 => continue,
                _ => "Q8_0",
            };
            assert_eq!(dtype, expected, "{name}: {tensor}");
        }
        in_float32(&blocks, &wide);
        let found = answers(&blocks);
        assert!(found == answers(&wide), "{name}");
        assert!(found.0 != answers(&plain).0, "{name} has become nothing else");
        // What is written at once is what is converted.
        let synthesised = dir.path().join("synthesised");
        assert_eq!(synth(&shape, &synthesised, 1, None, formats, &mut |_, _| ()).unwrap(), converted.bytes);
        assert!(answers(&synthesised) == found, "{name}");
        let again = convert(&blocks, &dir.path().join("again"), formats, &mut |_, _| ()).unwrap_err().to_string();
        assert!(again.contains("blocks are made of whole values"), "{again}");
    }
}

/// Rows that are no whole blocks would be cut, or the failure would not say which.
#[test]
fn refuses_rows_that_are_no_whole_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let formats = BlockFormats { experts: Some(StoredDType::Q4_0), dense: None };
    let error = convert(&fixture("torch-single"), &dir.path().join("out"), formats, &mut |_, _| ()).unwrap_err();
    let error = error.to_string();
    assert!(error.contains("mlp") && error.contains("whole blocks of 32 values"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// A person would look for what is wrong with a file that nobody has any more, and start again what fails again.
#[test]
fn a_value_that_is_no_number_is_told_of_the_tensor_that_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let [plain, out] = ["plain", "out"].map(|name| dir.path().join(name));
    let config = json!({
        "architectures": ["MixtralForCausalLM"], "vocab_size": 300, "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2,
    });
    let shape = SynthShape::Causal(Box::new(CausalShape::of_config(config).unwrap()));
    synth(&shape, &plain, 1, None, BlockFormats::NONE, &mut |_, _| ()).unwrap();
    let (tensor, file) = ("model.layers.0.block_sparse_moe.experts.1.w2.weight", plain.join("model.safetensors"));
    let mut bytes = fs::read(&file).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let at = 8 + header + metadata.info(tensor).unwrap().data_offsets.0;
    bytes[at..at + 2].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    fs::write(&file, bytes).unwrap();
    let formats = BlockFormats { experts: Some(StoredDType::Q8_0), dense: None };
    let error = convert(&plain, &out, formats, &mut |_, _| ()).unwrap_err();
    assert_eq!(error.to_string(), format!("tensor {tensor} holds values that are no numbers, or too large for Q8_0"));
    assert!(error.is_lasting() && !out.exists());
}
