//! What `quantization_config` says of packed integers: of which kind they are, in how many bits, and how many share a scale. Whatever
//! would change a value and is not read is refused by the name of its field.

use std::path::Path;

use serde_json::{Value, json};
use sida_kernels::dtype::BLOCK;

use crate::ModelError;

/// How integers are packed, and what the tensors of a matrix are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// (inputs, outputs): words hold neighbours of a column.
    Gptq {
        /// Zeros are stored as they are; without, as one less.
        is_v2: bool,
        /// Values of a group need not be neighbours, so which one each is in must be said.
        is_by_activation: bool,
    },
    /// (outputs, inputs): words hold neighbours of a row.
    CompressedTensors,
}

/// How values of a matrix may be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    /// Of an integer: 4 or 8.
    pub(super) bits: usize,
    /// Neighbours of a row that share a scale, a multiple of a block; `None`: the whole row.
    pub(super) group: Option<usize>,
}

/// What a config says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Scheme {
    pub(super) layout: Layout,
    /// Invariant: one at least, and one exactly of GPTQ. The shapes of a matrix tell which one it has.
    pub(super) forms: Vec<Form>,
}

impl Layout {
    /// What the tensors of a matrix are called behind its name: integers, scales, zeros or shape, groups, and what is refused.
    pub(super) fn parts(self) -> &'static [&'static str] {
        match self {
            Self::Gptq { .. } => &["qweight", "scales", "qzeros", "g_idx"],
            Self::CompressedTensors => {
                &["weight_packed", "weight_scale", "weight_shape", "weight_g_idx", "weight_zero_point"]
            }
        }
    }

    pub(super) fn is_gptq(self) -> bool {
        self != Self::CompressedTensors
    }
}

impl Scheme {
    /// Reads the field; `None` where it says nothing of packed integers. `path` is for messages.
    pub(super) fn read(config: &Value, path: &Path) -> Result<Option<Self>, ModelError> {
        match config["quant_method"].as_str() {
            Some("gptq") => gptq(config, path).map(Some),
            Some("compressed-tensors") => compressed_tensors(config, path).map(Some),
            _ => Ok(None),
        }
    }
}

fn gptq(config: &Value, path: &Path) -> Result<Scheme, ModelError> {
    let format = [&config["checkpoint_format"], &config["format"]].into_iter().find(|format| !format.is_null());
    let format = format.unwrap_or(&Value::Null);
    one_of(
        path,
        "quantization_config.checkpoint_format",
        format,
        &[Value::Null, json!("gptq"), json!("gptq_v2")],
        "gptq or gptq_v2",
    )?;
    let symmetric = [Value::Null, json!(true)];
    one_of(path, "quantization_config.sym", &config["sym"], &symmetric, "true: zeros are not read")?;
    let group = match config["group_size"].as_i64() {
        Some(-1) => None,
        _ => Some(group(path, "quantization_config.group_size", &config["group_size"])?),
    };
    let bits = bits(path, "quantization_config.bits", &config["bits"])?;
    let layout = Layout::Gptq { is_v2: format == "gptq_v2", is_by_activation: config["desc_act"] == true };
    Ok(Scheme { layout, forms: vec![Form { bits, group }] })
}

fn compressed_tensors(config: &Value, path: &Path) -> Result<Scheme, ModelError> {
    const GROUPS: &str = "quantization_config.config_groups";
    let (packed, none) = ([json!("pack-quantized")], [Value::Null]);
    one_of(path, "quantization_config.format", &config["format"], &packed, "pack-quantized")?;
    let caches = &config["kv_cache_scheme"];
    one_of(path, "quantization_config.kv_cache_scheme", caches, &none, "null: keys and values are not rounded")?;
    let transforms = [Value::Null, json!({})];
    let found = &config["transform_config"];
    one_of(path, "quantization_config.transform_config", found, &transforms, "none: weights are used as they are")?;
    let groups = config["config_groups"].as_object().filter(|groups| !groups.is_empty());
    let groups = groups.ok_or_else(|| refused(path, GROUPS, &config["config_groups"], "groups of matrices"))?;
    let form = |of: &Value| {
        let weights = &of["weights"];
        one_of(path, "config_groups.format", &of["format"], &[Value::Null, json!("pack-quantized")], "pack-quantized")?;
        for (field, found) in [
            ("config_groups.input_activations", &of["input_activations"]),
            ("config_groups.output_activations", &of["output_activations"]),
        ] {
            one_of(path, field, found, &none, "null: activations are not rounded")?;
        }
        one_of(path, "config_groups.weights.type", &weights["type"], &[json!("int")], "int")?;
        let symmetric = &weights["symmetric"];
        one_of(path, "config_groups.weights.symmetric", symmetric, &[json!(true)], "true: zeros are not read")?;
        let group = match weights["strategy"].as_str() {
            Some("channel") => None,
            Some("group") => Some(group(path, "config_groups.weights.group_size", &weights["group_size"])?),
            _ => return Err(refused(path, "config_groups.weights.strategy", &weights["strategy"], "group or channel")),
        };
        Ok(Form { bits: bits(path, "config_groups.weights.num_bits", &weights["num_bits"])?, group })
    };
    let forms = groups.values().map(form).collect::<Result<_, ModelError>>()?;
    Ok(Scheme { layout: Layout::CompressedTensors, forms })
}

fn bits(path: &Path, field: &'static str, found: &Value) -> Result<usize, ModelError> {
    one_of(path, field, found, &[json!(4), json!(8)], "4 or 8")?;
    Ok(if *found == 4 { 4 } else { 8 })
}

fn group(path: &Path, field: &'static str, found: &Value) -> Result<usize, ModelError> {
    let size = found.as_u64().and_then(|size| usize::try_from(size).ok());
    let size = size.filter(|&size| size > 0 && size.is_multiple_of(BLOCK));
    size.ok_or_else(|| refused(path, field, found, &format!("a multiple of {BLOCK}, or one group for a row")))
}

fn one_of(
    path: &Path,
    field: &'static str,
    found: &Value,
    accepted: &[Value],
    expected: &str,
) -> Result<(), ModelError> {
    if accepted.contains(found) { Ok(()) } else { Err(refused(path, field, found, expected)) }
}

fn refused(path: &Path, field: &'static str, found: &Value, expected: &str) -> ModelError {
    ModelError::Config { path: path.to_owned(), field, found: found.to_string(), expected: expected.to_owned() }
}
