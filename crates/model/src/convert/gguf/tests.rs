//! GGUF files, whole, cut, changed and of models that are not served. What whole ones compute is held against transformers in
//! crates/model/tests/causal_parity.rs.

use std::{io::Cursor, path::PathBuf};

use candle_core::{Device, quantized::gguf_file::Content};

use super::*;
use crate::{ChatTemplate, Checkpoint, ExpertStore, convert::convert, manifest::Manifest};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/parity").join(name)
}

fn converted(from: &Path, out: &Path) -> Result<(), String> {
    convert(from, out, BlockFormats::NONE, &mut |_, _| ()).map(|_| ()).map_err(|error| error.to_string())
}

/// The bytes of a tensor as another implementation reads them.
fn read_by_another(file: &[u8], tensor: &str) -> Vec<u8> {
    let mut file = Cursor::new(file);
    let content = Content::read(&mut file).unwrap();
    content.tensor(&mut file, tensor, &Device::Cpu).unwrap().data().unwrap().into_owned()
}

#[test]
fn tensors_keep_their_bytes() {
    // Would break: weights would be changed on their way, which a model bears for long without anybody seeing it.
    let out = tempfile::tempdir().unwrap();
    let (file, out) = (fixture("gguf-mixtral/model.gguf"), out.path().join("mixtral"));
    converted(&file, &out).unwrap();
    let (file, checkpoint) = (fs::read(file).unwrap(), Checkpoint::open(&out).unwrap());
    let theirs = |tensor: &str| read_by_another(&file, tensor);
    let ours = |tensor: &str| {
        let found = checkpoint.tensor(tensor).unwrap();
        (found.dtype, found.shape.to_vec(), found.bytes.to_vec())
    };
    let experts = "model.layers.0.block_sparse_moe.experts";
    let down = theirs("blk.0.ffn_down_exps.weight");
    assert_eq!(ours(&format!("{experts}.down_proj")), (StoredDType::Q6K, vec![2, 256, 256], down));
    let [gate, up] = ["gate", "up"].map(|of| theirs(&format!("blk.0.ffn_{of}_exps.weight")));
    let half = gate.len() / 2;
    let both = [&gate[..half], &up[..half], &gate[half..], &up[half..]].concat();
    assert_eq!(ours(&format!("{experts}.gate_up_proj")), (StoredDType::Q4K, vec![2, 512, 256], both));
    assert_eq!(ours("model.layers.1.self_attn.v_proj.weight").2, theirs("blk.1.attn_v.weight"));
    // Row 3 of a head of 16 is the fourth of its first half, of which every other one is.
    let (keys, row) = (theirs("blk.1.attn_k.weight"), StoredDType::Q5K.bytes(256));
    let found = ours("model.layers.1.self_attn.k_proj.weight").2;
    assert_eq!(found[(16 + 3) * row..][..row], keys[(16 + 6) * row..][..row]);
    assert_eq!(found[(16 + 8 + 3) * row..][..row], keys[(16 + 7) * row..][..row]);
    Manifest::read(&out).unwrap().expect("a manifest").verify_directory(&mut |_, _| ()).unwrap();
    // The last matrices of the first layer are larger than those of the second: slots have room for them.
    let store = ExpertStore::open(checkpoint.clone()).unwrap();
    let [first, second] = [0, 1].map(|layer| *store.shape_of(sida_routing::LayerId(layer)));
    assert_eq!(
        [first.dtype, first.output_dtype, second.dtype, second.output_dtype],
        [StoredDType::Q4K, StoredDType::Q6K, StoredDType::Q4K, StoredDType::Q4K]
    );
    assert!(store.shape() == &first && first.bytes() > second.bytes() && store.one_dtype().is_none());
}

#[test]
fn what_is_beside_the_weights_is_written() {
    // Would break: answers would not end where the model ends them, or conversations be written as no model knows them.
    let out = tempfile::tempdir().unwrap();
    let out = out.path().join("qwen3");
    converted(&fixture("gguf-qwen3/model.gguf"), &out).unwrap();
    let config = ModelConfig::open(&out).unwrap();
    // The last of these is told by its text alone.
    assert_eq!(config.generation.eos_token_ids, [2, 3]);
    assert_eq!((config.eos_token_ids, config.pad_token_id), (vec![2], 0));
    let template = ChatTemplate::open(&out).unwrap().expect("a template");
    let message = crate::ChatMessage { role: "user".to_owned(), content: Some("hi".to_owned()), ..Default::default() };
    let written = template.render(&[message], true, &[], &Map::new()).unwrap();
    assert_eq!(written, "<|im_start|>user\nhi<|im_end|>\n");
    let config: Value = serde_json::from_slice(&fs::read(out.join(CONFIG)).unwrap()).unwrap();
    assert_eq!(config[QUANTIZATION], quantization(), "other software must not take blocks for bytes");
}

/// A file with some bytes in another's place, which has as many.
fn changed(file: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let at = file.windows(from.len()).position(|window| window == from).expect("the file has these bytes");
    [&file[..at], to, &file[at + to.len()..]].concat()
}

#[test]
fn what_is_not_served_is_refused_by_name() {
    // Would break: a person would look for what is wrong with a file that is only of another kind; or get half a model.
    let dir = tempfile::tempdir().unwrap();
    let file = fs::read(fixture("gguf-qwen3/model.gguf")).unwrap();
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    // Behind the name of a tensor its dimensions are, then its format.
    let format_of = |name: &str, dimensions: usize, number: u32| {
        let name = text(name);
        let at = file.windows(name.len()).position(|window| window == name).unwrap() + name.len() + 4 + dimensions * 8;
        [&file[..at], &number.to_le_bytes(), &file[at + 4..]].concat()
    };
    let format = |number| format_of("blk.1.ffn_down_exps.weight", 3, number);
    let key = |key: &str, to: &str| changed(&file, &text(key), &text(to));
    // The number of tensors is behind the version.
    let fewer = {
        let count = u64::from_le_bytes(file[8..16].try_into().unwrap());
        [&file[..8], &(count - 1).to_le_bytes(), &file[16..]].concat()
    };
    // No token has this character: it is a byte's that is written as another.
    let header::Value::Texts(merges) = &header::Header::parse(&file).unwrap().values["tokenizer.ggml.merges"] else {
        panic!("merges are texts")
    };
    let unknown = merges[0].chars().map(|character| if character == ' ' { ' ' } else { '\u{7f}' }).collect::<String>();
    assert_eq!(unknown.len(), merges[0].len(), "the first merge is of letters");
    let merge = changed(&file, &text(&merges[0]), &text(&unknown));
    // All bits of the first block's scale.
    let no_number = {
        let header = header::Header::parse(&file).unwrap();
        let tensor = header.tensors.iter().find(|tensor| tensor.name == "blk.1.ffn_down_exps.weight").unwrap();
        let at = (header.data_at + tensor.at) as usize;
        [&file[..at], &[0xff, 0xff], &file[at + 2..]].concat()
    };
    let cases = [
        (no_number, "tensor blk.1.ffn_down_exps.weight holds a scale that is no number, in block 0"),
        (changed(&file, &text("qwen3moe"), &text("qwen9moe")), "general.architecture is qwen9moe, expected qwen3moe"),
        (key("qwen3moe.block_count", "qwen3moe.block_counx"), "qwen3moe.block_count is missing"),
        (key("qwen3moe.expert_count", "qwen3moe.expert_counx"), "qwen3moe.expert_count is missing or 0"),
        (key("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eos_token_ix"), "tokenizer.ggml.eos_token_id is missing"),
        (key("tokenizer.ggml.merges", "tokenizer.ggml.mergex"), "tokenizer.ggml.merges is missing"),
        (changed(&file, &text("qwen2"), &text("qwen9")), "tokenizer.ggml.pre is \"qwen9\", expected one of qwen2"),
        (changed(&file, &text("yarn"), &text("yorn")), "qwen3moe.rope.scaling.type is \"yorn\""),
        (key("blk.0.attn_q_norm.weight", "blk.0.attn_q_norx.weight"), "tensor blk.0.attn_q_norx.weight is of no model"),
        (key("blk.1.ffn_up_exps.weight", "blk.7.ffn_up_exps.weight"), "tensor blk.7.ffn_up_exps.weight is of no model"),
        (key("qwen3moe.rope.freq_base", "qwen3moe.residual_scale"), "qwen3moe.residual_scale is"),
        (merge, "expected two tokens that are one together"),
        (fewer, "no tensor's"),
        ([&file[..], &[0; 40]].concat(), "bytes before the end of the file that are no tensor's"),
        (format(10), "tensor blk.1.ffn_down_exps.weight is in format Q2_K, expected one of F32, F16, BF16"),
        (format(77), "tensor blk.1.ffn_down_exps.weight is in format number 77"),
        (format(12), "expected rows of whole blocks of 256 values"),
        (format_of("output.weight", 2, 0), "does not lie within the file"),
        (b"GGUF".to_vec(), "ends in its header"),
        (b"<!DOCTYPE html>".to_vec(), "HTML page"),
        (Vec::new(), "empty"),
    ];
    for (file, expected) in cases {
        let path = dir.path().join("model.gguf");
        fs::write(&path, file).unwrap();
        let error = converted(&path, &dir.path().join("out")).unwrap_err();
        assert!(error.contains(expected) && error.contains("model"), "{error} does not say {expected}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "something was left: {expected}");
    }
}

#[test]
fn a_directory_of_gguf_files_is_told_to_name_one() {
    // Would break: who has downloaded a repository of GGUF files is told of a config.json that it never had.
    let dir = tempfile::tempdir().unwrap();
    for name in ["model-00002-of-00002.gguf", "model-00001-of-00002.gguf", "README.md"] {
        fs::write(dir.path().join(name), "").unwrap();
    }
    let error = converted(dir.path(), &dir.path().join("out")).unwrap_err();
    assert!(
        error.contains("has no config.json but GGUF files") && error.contains("model-00001-of-00002.gguf"),
        "{error}"
    );
    fs::write(dir.path().join(CONFIG), "{}").unwrap();
    let error = converted(dir.path(), &dir.path().join("out")).unwrap_err();
    assert!(error.contains("architecture"), "{error}");
}

#[test]
fn blocks_are_not_made_of_blocks() {
    // Would break: weights would be rounded twice without a word.
    let dir = tempfile::tempdir().unwrap();
    let formats = BlockFormats { experts: Some(StoredDType::Q8_0), dense: None };
    let error =
        convert(&fixture("gguf-qwen3/model.gguf"), &dir.path().join("out"), formats, &mut |_, _| ()).unwrap_err();
    assert!(error.to_string().contains("blocks are made of whole values"), "{error}");
}

#[test]
fn a_file_that_was_merged_is_one() {
    // Would break: who joined the parts of a download by llama.cpp's own tool could not use the result.
    let dir = tempfile::tempdir().unwrap();
    let file = fs::read(fixture("gguf-qwen3/model.gguf")).unwrap();
    let entry = |key: &str, kind: u32, value: &[u8]| {
        [&(key.len() as u64).to_le_bytes()[..], key.as_bytes(), &kind.to_le_bytes(), value].concat()
    };
    // Together 64 bytes, so that data stays aligned: that it has no parts, as 16 bits, and a text.
    let filling = [&18_u64.to_le_bytes()[..], &[b'x'; 18]].concat();
    let added = [entry("split.count", 2, &0_u16.to_le_bytes()), entry("x", 8, &filling)].concat();
    assert_eq!(added.len(), 64);
    let keys = u64::from_le_bytes(file[16..24].try_into().unwrap()) + 2;
    let path = dir.path().join("merged.gguf");
    fs::write(&path, [&file[..16], &keys.to_le_bytes(), &added, &file[24..]].concat()).unwrap();
    converted(&path, &dir.path().join("out")).unwrap();
}

#[test]
fn parts_belong_together() {
    // Would break: a part that is missing, or another's, would be missed as a tensor, or its weights be taken.
    let dir = tempfile::tempdir().unwrap();
    let names = ["model-00001-of-00002.gguf", "model-00002-of-00002.gguf"];
    let [first, second] = names.map(|name| fixture("gguf-olmoe").join(name));
    let error = converted(&second, &dir.path().join("out")).unwrap_err();
    assert!(error.contains("split.no is 1, expected 0: name the first of the 2 parts"), "{error}");
    let (own, other) = (dir.path().join(names[0]), dir.path().join(names[1]));
    fs::copy(&first, &own).unwrap();
    let error = converted(&own, &dir.path().join("out")).unwrap_err();
    assert!(error.contains(names[1]), "{error}");
    fs::copy(&first, &other).unwrap();
    let error = converted(&own, &dir.path().join("out")).unwrap_err();
    assert!(error.contains("split.no is 0, expected 1"), "{error}");
    let renamed = dir.path().join("first.gguf");
    fs::rename(&own, &renamed).unwrap();
    let error = converted(&renamed, &dir.path().join("out")).unwrap_err();
    assert!(error.contains("expected a name that ends with -00001-of-00002.gguf"), "{error}");
}

#[test]
fn a_file_that_is_cut_or_changed_is_refused_or_read() {
    // Would break: half a download, or a hostile file, would end the process or take all its memory.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let file = fs::read(fixture("gguf-qwen3/model.gguf")).unwrap();
    for length in (0..file.len()).step_by(4001) {
        fs::write(&path, &file[..length]).unwrap();
        assert!(Gguf::open(&path).is_err(), "cut after {length} bytes");
    }
    // What is in the header decides: data is what it is.
    let header = header::Header::parse(&file).unwrap().data_at as usize;
    for at in (0..header).step_by(61) {
        for to in [0, 0x7f, 0xff] {
            let mut changed = file.clone();
            changed[at] = to;
            fs::write(&path, changed).unwrap();
            if let Ok(gguf) = Gguf::open(&path) {
                let out = tempfile::tempdir().unwrap();
                let _ = gguf.write_beside(out.path(), BlockFormats::NONE);
            }
        }
    }
}
