//! What is refused of quantised checkpoints, and how errors name it.

use super::*;

#[test]
fn what_blocks_cannot_say_is_refused_by_name() {
    // Would break: a model would become another one; or a person would look for what is wrong with a file that is only of another
    // kind.
    const EXPERT: &str = "model.layers.1.mlp.experts.2.up_proj";
    let part = |part: &str| format!("{EXPERT}.{part}");
    let first_part = |part: &str| format!("model.layers.0.mlp.experts.1.up_proj.{part}");
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
            set("/quant_method", json!("hqq")),
            "quantization_config is \"hqq\", expected nothing, or what `sida convert`",
        ),
        (set("/quant_method", json!("awq")), "quantization_config.version is null, expected gemm"),
        (set("/quant_method", json!("fp8")), "is stored as I32, expected F32, BF16, F16 or F8_E4M3"),
        (set("/bits", json!(3)), "quantization_config.bits is 3, expected 4 or 8"),
        (set("/bits", json!(8)), "down_proj.qweight holds 128 rows of 32 values, expected rows of whole groups of 64"),
        (set("/group_size", json!(48)), "quantization_config.group_size is 48, expected a multiple of 32"),
        (set("/group_size", json!(0)), "quantization_config.group_size is 0"),
        (set("/group_size", json!(96)), "expected rows of whole groups of 96 values"),
        (set("/group_size", json!(32)), "scales is [1, 128], expected [2, 128]"),
        (set("/sym", json!("no")), "quantization_config.sym is \"no\", expected true or false"),
        (
            Box::new(|config, _| {
                config[QUANTIZATION]["sym"] = json!(false);
                config[QUANTIZATION]["bits"] = json!(8);
            }),
            "quantization_config.bits is 8, expected 4 of integers with zeros of their own",
        ),
        (
            Box::new(|config, tensors| {
                config[QUANTIZATION]["sym"] = json!(false);
                tensors.get_mut(&format!("{EXPERT}.qzeros")).unwrap().2[8] = 0x7f;
            }),
            "up_proj.qzeros holds 15 for output 16, group 0, expected at most 14",
        ),
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
        (set("/format", json!("naive")), "quantization_config.format is \"naive\", expected pack-quantized or float"),
        (set("/format", json!("float-quantized")), "config_groups.weights.type is \"int\", expected float"),
        (set("/kv_cache_scheme", json!({"num_bits": 8})), "quantization_config.kv_cache_scheme is {"),
        (add("transform_config", json!({"config_groups": {}})), "quantization_config.transform_config is {"),
        (set("/config_groups", json!({})), "quantization_config.config_groups is {}"),
        (
            add("sparsity_config", json!({"format": "sparse-24-bitmask"})),
            "quantization_config.sparsity_config is {\"format\":\"sparse-24-bitmask\"}, expected none, or of the format dense",
        ),
        (set(group("weights/dynamic"), json!(true)), "config_groups.weights.dynamic is true, expected false"),
        (set(group("targets"), json!(null)), "config_groups.targets is null, expected a list of names and patterns"),
        (
            Box::new(|config, _| {
                for (number, targets) in [json!(["Embedding"]), json!(["re:.*self_attn"])].into_iter().enumerate() {
                    config[QUANTIZATION]["config_groups"][format!("group_{number}")]["targets"] = targets;
                }
            }),
            "config_groups.targets is [\"Embedding\", \"re:.*self_attn\"], expected one that fits model.layers.0.mlp.experts.0.",
        ),
        (set(group("targets"), json!([])), "config_groups.targets is [], expected one at least"),
        (
            set(group("targets"), json!(["Conv2d", "re:.*lm_head"])),
            "config_groups.targets is [\"Conv2d\", \"re:.*lm_head\"], expected Linear, or one that fits a matrix",
        ),
        (
            set("/ignore", json!(["lm_head", "re:.*(gate"])),
            "quantization_config.ignore is [\"lm_head\",\"re:.*(gate\"], expected",
        ),
        (set("/ignore", json!("lm_head")), "quantization_config.ignore is \"lm_head\", expected a list"),
        (
            set(group("weights/actorder"), json!("rows")),
            "config_groups.weights.actorder is \"rows\", expected null, true, false, group",
        ),
        (set(group("input_activations"), json!({"num_bits": 8})), "config_groups.input_activations is {"),
        (set(group("weights/num_bits"), json!(2)), "config_groups.weights.num_bits is 2, expected 4 or 8"),
        (set(group("weights/type"), json!("float")), "config_groups.weights.type is \"float\", expected int"),
        (
            set(group("weights/symmetric"), json!(null)),
            "config_groups.weights.symmetric is null, expected true or false",
        ),
        (set(group("weights/symmetric"), json!(false)), ".weight_zero_point is missing"),
        (
            Box::new(|config, _| {
                let weights = config[QUANTIZATION].pointer_mut("/config_groups/group_1/weights").unwrap();
                weights["symmetric"] = json!(false);
            }),
            "config_groups.weights.num_bits is 8, expected 4 of integers with zeros",
        ),
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
    let awq: Vec<(Edit, &str)> = vec![
        (set("/version", json!("gemv")), "quantization_config.version is \"gemv\", expected gemm"),
        (set("/bits", json!(8)), "quantization_config.bits is 8, expected 4"),
        (set("/zero_point", json!(false)), "quantization_config.zero_point is false, expected true"),
        (without(first_part("qzeros")), "up_proj.qzeros is missing"),
        (with(first_part("qzeros"), Dtype::I32, &[4, 2], vec![0; 32]), "up_proj.qzeros is [4, 2], expected [2, 4]"),
        (with(first_part("scales"), Dtype::F16, &[2, 8], vec![0; 32]), "up_proj.scales is [2, 8], expected [2, 32]"),
    ];
    let fp8: Vec<(Edit, &str)> = vec![
        (set("/fmt", json!("e5m2")), "quantization_config.fmt is \"e5m2\", expected e4m3"),
        (set("/activation_scheme", json!("x")), "quantization_config.activation_scheme is \"x\", expected dynamic"),
        (set("/weight_block_size", json!([128, 100])), "weight_block_size is [128,100], expected rows and columns"),
        (set("/weight_block_size", json!([0, 128])), "weight_block_size is [0,128], expected rows and columns"),
        (set("/weight_block_size", json!([16, 128])), "weight_scale_inv is [2, 1], expected [4, 1]"),
        (set("/weight_block_size", json!(null)), "weight_scale_inv is [2, 1], expected [1, 1]"),
        (add("kv_cache_scheme", json!("static")), "quantization_config.kv_cache_scheme is \"static\""),
        (without(first_part("weight_scale_inv")), "up_proj.weight_scale_inv is missing"),
        // What it should be called depends on the software that wrote the file.
        (
            Box::new(|config, tensors| {
                let size = config[QUANTIZATION]["weight_block_size"].clone();
                let weights = json!({"num_bits": 8, "type": "float", "symmetric": true, "strategy": "block", "block_structure": size});
                let groups = json!({"group_0": {"targets": ["Linear"], "weights": weights}});
                config[QUANTIZATION] =
                    json!({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups});
                tensors.remove("model.layers.0.mlp.experts.1.up_proj.weight_scale_inv").unwrap();
            }),
            "tensor model.layers.0.mlp.experts.1.up_proj.weight_scale is missing",
        ),
        (without(first_part("weight")), "up_proj.weight is missing"),
        (with(first_part("weight"), Dtype::F8_E5M2, &[64, 64], vec![0; 4096]), "up_proj.weight is stored as F8_E5M2"),
        (
            with(first_part("weight"), Dtype::F8_E4M3, &[64, 32], vec![0; 2048]),
            "up_proj.weight holds 64 rows of 32 values",
        ),
        (with(first_part("weight"), Dtype::F8_E4M3, &[4096], vec![0; 4096]), "up_proj.weight holds [4096]"),
        (
            put(first_part("weight_scale_inv"), 4, &[0, 0, 0x80, 0x7f]),
            "weight_scale_inv holds inf, expected scales of which 448 times are numbers",
        ),
        // Finite, but not with the largest number.
        (put(first_part("weight_scale_inv"), 4, &[0, 0, 0x7f, 0x7f]), "expected scales of which 448 times"),
        (
            with(first_part("weight_scale"), Dtype::F32, &[2, 1], vec![0; 8]),
            "up_proj.weight_scale holds another one beside",
        ),
        (
            with(first_part("weight_zero_point"), Dtype::F32, &[1], vec![0, 0, 0x80, 0x3f]),
            "up_proj.weight_zero_point holds zeros, expected none",
        ),
        // A byte that is all but a sign.
        (
            with(first_part("weight_zero_point"), Dtype::I8, &[1], vec![0x80]),
            "up_proj.weight_zero_point holds zeros, expected none",
        ),
        (put(first_part("weight"), 65, &[0xff]), "up_proj.weight holds 0xff in row 1, column 1, which is no number"),
    ];
    let all = [("packed-gptq", gptq), ("packed-compressed", compressed), ("packed-awq", awq), ("packed-fp8", fp8)];
    for (name, cases) in all {
        for (edit, expected) in cases {
            let dir = tempfile::tempdir().unwrap();
            let (mut config, mut tensors) = fixture(name);
            edit(&mut config, &mut tensors);
            write(&dir.path().join("from"), &config, &tensors);
            let (from, out) = (dir.path().join("from"), dir.path().join("out"));
            let error = convert(&from, &out, BlockFormats::NONE, &mut |_, _| ()).unwrap_err();
            let said = error.to_string();
            assert!(said.contains(expected), "{name}: {said} does not say {expected}");
            // Whoever starts the command again would only be told the same again, of a file that nobody has.
            assert!(error.is_lasting() && !said.contains(".partial"), "{name}: {said}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "something was left: {expected}");
        }
    }
}
