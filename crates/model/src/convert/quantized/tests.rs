//! Quantised matrices, value for value, and what is refused of them. What whole models of them compute is held against transformers
//! in crates/model/tests/causal_parity.rs.

mod refused;

use std::fs;

use half::{bf16, f16};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use safetensors::{
    Dtype, SafeTensors,
    tensor::{TensorView, serialize},
};
use serde_json::json;

use super::{
    scheme::{Form, Layout},
    *,
};
use crate::{Checkpoint, convert::convert, manifest::Manifest};

/// Dtype, shape and bytes of tensors, by name.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// What a fixture says, and what it holds.
fn fixture(name: &str) -> (Value, Tensors) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/parity").join(name);
    let bytes = fs::read(dir.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter();
    let tensors = tensors.map(|(name, of)| (name, (of.dtype(), of.shape().to_vec(), of.data().to_vec()))).collect();
    (serde_json::from_slice(&fs::read(dir.join(CONFIG)).unwrap()).unwrap(), tensors)
}

/// Writes them into a directory.
fn write(dir: &Path, config: &Value, tensors: &Tensors) {
    fs::create_dir_all(dir).unwrap();
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    fs::write(dir.join("model.safetensors"), serialize(views, None).unwrap()).unwrap();
    fs::write(dir.join(CONFIG), config.to_string()).unwrap();
}

fn converted(from: &Path, out: &Path) -> Result<(), String> {
    convert(from, out, BlockFormats::NONE, &mut |_, _| ()).map(|_| ()).map_err(|error| error.to_string())
}

fn le<const SIZE: usize, T>(values: &[T], bytes: impl Fn(&T) -> [u8; SIZE]) -> Vec<u8> {
    values.iter().flat_map(bytes).collect()
}

/// Integers from 0 on, `per_line` in a line, packed along lines as both formats have it: the first lowest.
fn packed_lines(integers: &[u32], per_line: usize, bits: usize) -> Vec<u32> {
    let word = |some: &[u32]| some.iter().enumerate().fold(0, |word, (at, integer)| word | integer << (at * bits));
    integers.chunks(per_line).flat_map(|line| line.chunks(32 / bits).map(word)).collect()
}

/// (rows, columns) to (columns, rows).
fn turned<T: Copy>(values: &[T], columns: usize) -> Vec<T> {
    (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns).copied()).collect()
}

#[test]
fn every_value_is_its_integer_times_its_scale() {
    // Would break: weights would be another's, or be off by one step, which a model bears for long without anybody seeing it.
    let mut random = StdRng::seed_from_u64(5);
    let (outputs, inputs) = (24, 192);
    for bits in [4, 8] {
        for (group, version) in [(32, 0), (64, 1), (96, 2), (inputs, 0), (inputs, 1)] {
            let zero = 1 << (bits - 1);
            let integers: Vec<u32> = (0..outputs * inputs).map(|_| random.random_range(0..2 * zero)).collect();
            let scales: Vec<f16> =
                (0..outputs * inputs / group).map(|_| f16::from_bits(random.random_range(0..0x7c00))).collect();
            let expected: Vec<f32> = integers
                .iter()
                .enumerate()
                .map(|(at, &integer)| (integer as f32 - zero as f32) * scales[at / group].to_f32())
                .collect();
            let words = packed_lines(&integers, inputs, bits);
            let mut tensors = Tensors::new();
            let mut add = |name: &str, dtype, shape: [usize; 2], bytes| {
                tensors.insert(format!("m.{name}"), (dtype, shape.to_vec(), bytes));
            };
            let in_word = 32 / bits;
            let layout = if version == 0 {
                add("weight_packed", Dtype::I32, [outputs, inputs / in_word], le(&words, |word| word.to_le_bytes()));
                let wide = le(&scales, |scale| scale.to_f32().to_le_bytes());
                add("weight_scale", Dtype::F32, [outputs, inputs / group], wide);
                let sizes = le(&[outputs, inputs], |&size| (size as i64).to_le_bytes());
                tensors.insert("m.weight_shape".to_owned(), (Dtype::I64, vec![2], sizes));
                Layout::CompressedTensors
            } else {
                let words = turned(&words, inputs / in_word);
                add("qweight", Dtype::I32, [inputs / in_word, outputs], le(&words, |word| word.to_le_bytes()));
                let turned = turned(&scales, inputs / group);
                add("scales", Dtype::F16, [inputs / group, outputs], le(&turned, |scale| scale.to_le_bytes()));
                let zeros = vec![if version == 1 { zero - 1 } else { zero }; inputs / group * outputs];
                let zeros = packed_lines(&zeros, outputs, bits);
                add("qzeros", Dtype::I32, [inputs / group, outputs / in_word], le(&zeros, |word| word.to_le_bytes()));
                Layout::Gptq { is_v2: version == 2, is_by_activation: false }
            };
            let form = Form { bits, group: Some(group).filter(|&group| group < inputs), has_zeros: false };
            assert!(values(&tensors, layout, form, [outputs, inputs]) == expected, "{form:?}, {layout:?}");
        }
    }
}

/// The values of the blocks that a matrix becomes.
fn values(tensors: &Tensors, layout: Layout, form: Form, shape: [usize; 2]) -> Vec<f32> {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &json!({}), tensors);
    let files = WeightFiles::open(dir.path()).unwrap();
    let of = super::Tensors { files: &files, dir: dir.path() };
    let matrix = Integers::open("m", layout, &[form], of).unwrap();
    let spec = matrix.spec();
    assert_eq!((spec.name.as_str(), &spec.shape[..]), ("m.weight", &shape[..]));
    let mut bytes = Vec::new();
    matrix.write(of, &mut bytes).unwrap();
    spec.dtype.widen(&bytes)
}

#[test]
fn zeros_are_taken_off() {
    // Would break: all weights of a group would be too large or too small, or have another group's zero, or another's place.
    let mut random = StdRng::seed_from_u64(6);
    let (outputs, inputs, group) = (24, 192, 64);
    let groups = inputs / group;
    let integers: Vec<u32> = (0..outputs * inputs).map(|_| random.random_range(0..16)).collect();
    let scales: Vec<f16> = (0..outputs * groups).map(|_| f16::from_bits(random.random_range(0..0x7c00))).collect();
    for kind in ["v1", "v2", "awq", "packed", "bytes"] {
        // Where one less is stored, 0 and 16 are told in one way.
        let range = if kind == "v1" { 1..16 } else { 0..16 };
        let zeros: Vec<u32> = (0..outputs * groups).map(|_| random.random_range(range.clone())).collect();
        let value = |at: usize| (integers[at] as f32 - zeros[at / group] as f32) * scales[at / group].to_f32();
        let expected: Vec<f32> = (0..outputs * inputs).map(value).collect();
        let mut tensors = Tensors::new();
        let mut add = |name: &str, dtype, shape: [usize; 2], bytes| {
            tensors.insert(format!("m.{name}"), (dtype, shape.to_vec(), bytes));
        };
        let word = |words: &[u32]| le(words, |word| word.to_le_bytes());
        // (outputs, of them) to (of them, outputs), outputs packed in the order of AWQ.
        let interleaved = |integers: &[u32], of_each: usize| {
            let turned = turned(integers, of_each);
            let order = [0, 2, 4, 6, 1, 3, 5, 7];
            let words = turned.chunks(8).map(|eight| (0..8).fold(0, |word, at| word | eight[order[at]] << (4 * at)));
            words.collect::<Vec<u32>>()
        };
        let stored: Vec<u32> = zeros.iter().map(|zero| zero - u32::from(kind == "v1")).collect();
        let layout = match kind {
            "packed" | "bytes" => {
                add("weight_packed", Dtype::I32, [outputs, inputs / 8], word(&packed_lines(&integers, inputs, 4)));
                add("weight_scale", Dtype::F16, [outputs, groups], le(&scales, |scale| scale.to_le_bytes()));
                let sizes = le(&[outputs, inputs], |&size| (size as i64).to_le_bytes());
                if kind == "packed" {
                    let words = packed_lines(&turned(&zeros, groups), outputs, 4);
                    add("weight_zero_point", Dtype::I32, [outputs / 8, groups], word(&turned(&words, outputs / 8)));
                } else {
                    let bytes = zeros.iter().map(|&zero| (zero as i8 - 8) as u8).collect();
                    add("weight_zero_point", Dtype::I8, [outputs, groups], bytes);
                }
                tensors.insert("m.weight_shape".to_owned(), (Dtype::I64, vec![2], sizes));
                Layout::CompressedTensors
            }
            _ => {
                let turned_scales = le(&turned(&scales, groups), |scale| scale.to_le_bytes());
                add("scales", Dtype::F16, [groups, outputs], turned_scales);
                if kind == "awq" {
                    add("qweight", Dtype::I32, [inputs, outputs / 8], word(&interleaved(&integers, inputs)));
                    add("qzeros", Dtype::I32, [groups, outputs / 8], word(&interleaved(&zeros, groups)));
                    Layout::Awq
                } else {
                    let words = turned(&packed_lines(&integers, inputs, 4), inputs / 8);
                    add("qweight", Dtype::I32, [inputs / 8, outputs], word(&words));
                    let zeros = packed_lines(&turned(&stored, groups), outputs, 4);
                    add("qzeros", Dtype::I32, [groups, outputs / 8], word(&zeros));
                    Layout::Gptq { is_v2: kind == "v2", is_by_activation: false }
                }
            }
        };
        let form = Form { bits: 4, group: Some(group), has_zeros: true };
        assert!(values(&tensors, layout, form, [outputs, inputs]) == expected, "{kind}");
    }
}

#[test]
fn every_value_of_fp8_is_its_number_times_its_scale() {
    // Would break: weights would have another's scale. The last squares of a matrix are smaller.
    let mut random = StdRng::seed_from_u64(7);
    let (outputs, inputs) = (20, 320_usize);
    let all = usize::MAX;
    for (square, part, stored_shape) in [
        ([8, 128], "weight_scale_inv", vec![3, 3]),
        ([128, 64], "weight_scale", vec![1, 5]),
        ([1, all], "weight_scale", vec![20, 1]),
        ([1, all], "weight_scale", vec![20]),
        ([all, all], "weight_scale", vec![1]),
        ([all, all], "weight_scale", vec![]),
    ] {
        let numbers: Vec<u8> =
            (0..outputs * inputs).map(|_| random.random_range(0..0x7f) | random.random::<u8>() & 0x80).collect();
        let scales: Vec<f32> = (0..stored_shape.iter().product()).map(|_| random.random::<f32>()).collect();
        let across = inputs.div_ceil(square[1]);
        let scale = |at: usize| scales[at / inputs / square[0] * across + at % inputs / square[1]];
        let number = |code: u8| {
            // As the format has them, by a table of powers.
            let (exponent, mantissa) = (i32::from(code >> 3 & 0xf), f64::from(code & 7));
            let size = if exponent == 0 { mantissa / 512.0 } else { (8.0 + mantissa) * 2.0_f64.powi(exponent - 10) };
            if code & 0x80 == 0 { size } else { -size }
        };
        let value = |at: usize| (number(numbers[at]) * f64::from(scale(at))) as f32;
        let expected: Vec<f32> = (0..outputs * inputs).map(value).collect();
        let tensors = Tensors::from([
            ("m.weight".to_owned(), (Dtype::F8_E4M3, vec![outputs, inputs], numbers)),
            (format!("m.{part}"), (Dtype::F32, stored_shape, le(&scales, |scale| scale.to_le_bytes()))),
        ]);
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &json!({}), &tensors);
        let files = WeightFiles::open(dir.path()).unwrap();
        let of = super::Tensors { files: &files, dir: dir.path() };
        let matrix = Float8::open("m", "weight_scale", &[[3, 64], square], of).unwrap();
        assert_eq!(matrix.spec().shape, [outputs, inputs]);
        let mut bytes = Vec::new();
        matrix.write(of, &mut bytes).unwrap();
        assert!(StoredDType::F8.widen(&bytes) == expected, "{square:?}");
    }
}

#[test]
fn configs_of_fp8_are_read_as_they_are_published() {
    // Would break: checkpoints would be refused, or scales be taken for those of other rows and columns.
    let all = usize::MAX;
    let compressed = |strategy: &str, block: Value, activations: Value| {
        let weights =
            json!({"num_bits": 8, "type": "float", "symmetric": true, "strategy": strategy, "block_structure": block});
        let group = json!({"targets": ["Linear"], "weights": weights, "input_activations": activations});
        let groups = json!({"group_0": group});
        json!({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups})
    };
    let dynamic = json!({"num_bits": 8, "type": "float", "strategy": "token", "dynamic": true});
    for (config, expected) in [
        (
            json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}),
            [128, 128],
        ),
        (json!({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}), [all, all]),
        (compressed("tensor", json!(null), json!(null)), [all, all]),
        (compressed("channel", json!(null), dynamic.clone()), [1, all]),
        (compressed("block", json!([128, 64]), dynamic), [128, 64]),
    ] {
        let Some(Scheme::Float8 { squares, .. }) = Scheme::read(&config, Path::new(CONFIG)).unwrap() else {
            panic!("{config} is FP8");
        };
        assert_eq!(squares.of(["m"], Path::new(CONFIG)).unwrap(), [("m", vec![expected])], "{config}");
    }
    for (config, expected) in [
        (compressed("group", json!(null), json!(null)), "config_groups.weights.strategy is \"group\", expected tensor"),
        (
            compressed("tensor", json!(null), json!({"type": "int", "num_bits": 8})),
            "config_groups.input_activations is",
        ),
        (compressed("block", json!([128, 32]), json!(null)), "config_groups.weights.block_structure is [128,32]"),
    ] {
        let error = Scheme::read(&config, Path::new(CONFIG)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} does not say {expected}");
    }
}

#[test]
fn a_checkpoint_becomes_a_model_directory() {
    // Would break: a matrix would be taken for another, a plain one be changed, or other software take blocks for GPTQ.
    for (name, formats) in [
        ("packed-gptq", [("mlp.experts.2.up_proj", StoredDType::Q4_0), ("self_attn.q_proj", StoredDType::Q4_0)]),
        (
            "packed-compressed",
            [("mlp.experts.2.down_proj", StoredDType::Q8_0), ("mlp.experts.2.up_proj", StoredDType::Q4_0)],
        ),
        ("packed-awq", [("mlp.experts.2.down_proj", StoredDType::Q5_0), ("self_attn.q_proj", StoredDType::Q5_0)]),
        ("packed-fp8", [("mlp.experts.1.down_proj", StoredDType::F8), ("self_attn.q_proj", StoredDType::F8)]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (from, out) = (dir.path().join("from"), dir.path().join("out"));
        let (config, mut tensors) = fixture(name);
        // Some software adds biases of zeros.
        let layer = config["num_hidden_layers"].as_u64().unwrap() - 1;
        let bias = format!("model.layers.{layer}.mlp.experts.1.up_proj.bias");
        tensors.insert(bias, (Dtype::F16, vec![64], vec![0; 128]));
        write(&from, &config, &tensors);
        converted(&from, &out).unwrap();
        let checkpoint = Checkpoint::open(&out).unwrap();
        checkpoint.check_tensors().unwrap();
        for (matrix, format) in formats {
            assert_eq!(checkpoint.dtype(&format!("model.layers.{layer}.{matrix}.weight")).unwrap(), format, "{matrix}");
        }
        let is_plain = |name: &str, dtype| checkpoint.contains(name) && dtype != Dtype::F8_E4M3;
        let plain = tensors.iter().filter(|(name, (dtype, ..))| is_plain(name, *dtype));
        let same = plain.map(|(name, (.., bytes))| assert_eq!(checkpoint.tensor(name).unwrap().bytes, bytes, "{name}"));
        assert!(same.count() > 5, "{name}");
        Manifest::read(&out).unwrap().expect("a manifest").verify_directory(&mut |_, _| ()).unwrap();
        let config: Value = serde_json::from_slice(&fs::read(out.join(CONFIG)).unwrap()).unwrap();
        assert_eq!(config[QUANTIZATION], quantization());
    }
}

#[test]
fn plain_matrices_may_become_blocks_and_packed_ones_may_not() {
    // Would break: integers would be rounded twice without a word, or the rest of a model could not be made smaller.
    let dir = tempfile::tempdir().unwrap();
    let (from, out) = (dir.path().join("from"), dir.path().join("out"));
    let (config, tensors) = fixture("packed-compressed");
    write(&from, &config, &tensors);
    let formats = |experts, dense| BlockFormats { experts, dense };
    let error = convert(&from, &out, formats(Some(StoredDType::Q8_0), None), &mut |_, _| ()).unwrap_err().to_string();
    assert!(error.contains("blocks are made of whole values"), "{error}");
    convert(&from, &out, formats(None, Some(StoredDType::Q8_0)), &mut |_, _| ()).unwrap();
    let dtype = Checkpoint::open(&out).unwrap().dtype("model.layers.0.self_attn.q_proj.weight").unwrap();
    assert_eq!(dtype, StoredDType::Q8_0);
}
