//! Packed integers, value for value, and what is refused of them. What whole models of them compute is held against transformers in
//! crates/model/tests/causal_parity.rs.

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
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), &json!({}), &tensors);
            let files = WeightFiles::open(dir.path()).unwrap();
            let group = Some(group).filter(|&group| group < inputs);
            let scheme = Scheme { layout, forms: vec![Form { bits, group }] };
            let matrix = Matrix::open("m", &scheme, &files, dir.path()).unwrap();
            let spec = matrix.spec();
            assert_eq!((spec.name.as_str(), &spec.shape[..]), ("m.weight", &[outputs, inputs][..]));
            let mut bytes = Vec::new();
            matrix.write(&files, &mut bytes).unwrap();
            assert!(spec.dtype.widen(&bytes) == expected, "{bits} bits, groups of {group:?}, {layout:?}");
        }
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
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (from, out) = (dir.path().join("from"), dir.path().join("out"));
        let (config, mut tensors) = fixture(name);
        // Some software adds biases of zeros.
        let bias = "model.layers.1.mlp.experts.2.up_proj.bias";
        tensors.insert(bias.to_owned(), (Dtype::F16, vec![64], vec![0; 128]));
        write(&from, &config, &tensors);
        converted(&from, &out).unwrap();
        let checkpoint = Checkpoint::open(&out).unwrap();
        checkpoint.check_tensors().unwrap();
        for (matrix, format) in formats {
            assert_eq!(checkpoint.dtype(&format!("model.layers.1.{matrix}.weight")).unwrap(), format, "{matrix}");
        }
        let plain = tensors.iter().filter(|(name, _)| checkpoint.contains(name));
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

#[test]
fn what_blocks_cannot_say_is_refused_by_name() {
    // Would break: a model would become another one; or a person would look for what is wrong with a file that is only of another
    // kind.
    const EXPERT: &str = "model.layers.1.mlp.experts.2.up_proj";
    let part = |part: &str| format!("{EXPERT}.{part}");
    type Edit = Box<dyn Fn(&mut Value, &mut Tensors)>;
    let set = |path: &'static str, to: Value| -> Edit {
        Box::new(move |config, _| *config[QUANTIZATION].pointer_mut(path).unwrap() = to.clone())
    };
    let add = |field: &'static str, to: Value| -> Edit {
        Box::new(move |config, _| config[QUANTIZATION][field] = to.clone())
    };
    let without = |name: String| -> Edit { Box::new(move |_, tensors| _ = tensors.remove(&name).unwrap()) };
    let put = |name: String, at: usize, bytes: &'static [u8]| -> Edit {
        Box::new(move |_, tensors| tensors.get_mut(&name).unwrap().2[at..][..bytes.len()].copy_from_slice(bytes))
    };
    let with = |name: String, dtype, shape: &'static [usize], bytes: Vec<u8>| -> Edit {
        Box::new(move |_, tensors| _ = tensors.insert(name.clone(), (dtype, shape.to_vec(), bytes.clone())))
    };
    let gptq: Vec<(Edit, &str)> = vec![
        (
            set("/quant_method", json!("awq")),
            "quantization_config is \"awq\", expected nothing, or what `sida convert`",
        ),
        (
            set("/quant_method", json!("fp8")),
            "quantization_config is \"fp8\", expected nothing, or what `sida convert`",
        ),
        (set("/bits", json!(3)), "quantization_config.bits is 3, expected 4 or 8"),
        (set("/bits", json!(8)), "down_proj.qweight holds 128 rows of 32 values, expected rows of whole groups of 64"),
        (set("/group_size", json!(48)), "quantization_config.group_size is 48, expected a multiple of 32"),
        (set("/group_size", json!(0)), "quantization_config.group_size is 0"),
        (set("/group_size", json!(96)), "expected rows of whole groups of 96 values"),
        (set("/group_size", json!(32)), "scales is [1, 128], expected [2, 128]"),
        (set("/sym", json!(false)), "quantization_config.sym is false, expected true"),
        (set("/checkpoint_format", json!("marlin")), "checkpoint_format is \"marlin\", expected gptq or gptq_v2"),
        (set("/checkpoint_format", json!("gptq_v2")), "qzeros holds 0x77777777, expected 0x88888888"),
        (put(part("qzeros"), 8, &[0x76]), "up_proj.qzeros holds 0x77777776, expected 0x77777777"),
        (
            put(part("g_idx"), 4, &[1]),
            "up_proj.g_idx holds group 1 for value 1 of a row, expected 0: groups by activation",
        ),
        (without(part("scales")), "tensor model.layers.1.mlp.experts.2.up_proj.scales is missing"),
        (without(part("qzeros")), "up_proj.qzeros is missing"),
        (without(part("qweight")), "up_proj.qweight is missing"),
        (
            Box::new(move |config, tensors| {
                config[QUANTIZATION]["desc_act"] = json!(true);
                tensors.retain(|name, _| !name.ends_with("g_idx"));
            }),
            "g_idx is missing",
        ),
        (with(part("scales"), Dtype::F16, &[2, 63], vec![0; 252]), "up_proj.scales is [2, 63], expected [2, 64]"),
        (with(part("scales"), Dtype::I16, &[2, 64], vec![0; 256]), "up_proj.scales is stored as I16, expected F16"),
        (with(part("qweight"), Dtype::I64, &[16, 32], vec![0; 4096]), "up_proj.qweight is stored as I64, expected I32"),
        (with(part("qweight"), Dtype::I32, &[1024], vec![0; 4096]), "up_proj.qweight holds [1024]"),
        (with(part("qweight"), Dtype::I32, &[0, 64], vec![]), "up_proj.qweight holds 64 rows of 0 values"),
        (put(part("scales"), 2, &[0, 0x7c]), "up_proj.scales holds inf, expected scales that binary16 has exactly"),
        (with(part("bias"), Dtype::F16, &[64], vec![1; 128]), "up_proj.bias holds a bias that is not 0"),
        (with(part("weight"), Dtype::F16, &[64, 128], vec![0; 16384]), "up_proj.weight holds values, and integers"),
        (with("model.x".to_owned(), Dtype::F8_E4M3, &[1], vec![0]), "model.x is stored as F8_E4M3, expected F32"),
    ];
    let group = |field: &str| format!("/config_groups/group_0/{field}").leak() as &'static str;
    let bf16 = |value: f32| bf16::from_f32(value).to_le_bytes().to_vec().leak() as &'static [u8];
    let compressed: Vec<(Edit, &str)> = vec![
        (
            set("/format", json!("float-quantized")),
            "quantization_config.format is \"float-quantized\", expected pack-q",
        ),
        (set("/kv_cache_scheme", json!({"num_bits": 8})), "quantization_config.kv_cache_scheme is {"),
        (add("transform_config", json!({"config_groups": {}})), "quantization_config.transform_config is {"),
        (set("/config_groups", json!({})), "quantization_config.config_groups is {}"),
        (set(group("input_activations"), json!({"num_bits": 8})), "config_groups.input_activations is {"),
        (set(group("weights/num_bits"), json!(2)), "config_groups.weights.num_bits is 2, expected 4 or 8"),
        (set(group("weights/type"), json!("float")), "config_groups.weights.type is \"float\", expected int"),
        (set(group("weights/symmetric"), json!(false)), "config_groups.weights.symmetric is false, expected true"),
        (set(group("weights/strategy"), json!("block")), "config_groups.weights.strategy is \"block\", expected group"),
        (
            set(group("weights/group_size"), json!(40)),
            "config_groups.weights.group_size is 40, expected a multiple of 32",
        ),
        (set(group("weights/group_size"), json!(64)), "weight_scale is [64, 2], expected [64, 1]"),
        (put(part("weight_scale"), 0, bf16(1e-9)), "holds 9.968062e-10, expected scales that binary16 has exactly"),
        (put(part("weight_scale"), 0, bf16(1e5)), "up_proj.weight_scale holds 9.984e4"),
        (put(part("weight_shape"), 0, &[63]), "up_proj.weight_packed is [64, 8], expected [63, 8]"),
        (put(part("weight_shape"), 8, &[0xff; 8]), "up_proj.weight_shape holds [64, -1]"),
        (without(part("weight_shape")), "up_proj.weight_shape is missing"),
        (
            with(part("weight_g_idx"), Dtype::I32, &[64], vec![0; 256]),
            "weight_g_idx holds group 0 for value 32 of a row",
        ),
        (
            with(part("weight_zero_point"), Dtype::I8, &[1], vec![0]),
            "up_proj.weight_zero_point holds zeros, expected none",
        ),
    ];
    for (name, cases) in [("packed-gptq", gptq), ("packed-compressed", compressed)] {
        for (edit, expected) in cases {
            let dir = tempfile::tempdir().unwrap();
            let (mut config, mut tensors) = fixture(name);
            edit(&mut config, &mut tensors);
            write(&dir.path().join("from"), &config, &tensors);
            let error = converted(&dir.path().join("from"), &dir.path().join("out")).unwrap_err();
            assert!(error.contains(expected), "{name}: {error} does not say {expected}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "something was left: {expected}");
        }
    }
}
