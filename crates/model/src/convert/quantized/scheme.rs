//! What `quantization_config` says of weights in fewer bits: of which kind they are, in how many bits, and which share a scale.
//! Whatever would change a value and is not read is refused by the name of its field.

use std::path::Path;

use serde_json::{Map, Value, json};
use sida_kernels::{dtype::BLOCK, float8::F8_BLOCK};

use super::targets::{Targets, fit_nothing};
use crate::ModelError;

/// What a config says.
#[derive(Clone, Debug)]
pub(super) enum Scheme {
    /// Packed integers.
    Integers(Layout, Groups<Form>),
    /// Numbers of 8 bits, e4m3. So many rows and columns share a scale, at most all of them.
    Float8 {
        /// What a matrix's scales are usually called behind its name.
        scale: &'static str,
        /// Which rows and columns.
        squares: Groups<[usize; 2]>,
    },
}

/// The forms that matrices may have, and which may have them; where several fit a matrix, its shapes tell which one it has.
/// Invariant: one at least, and one exactly but of compressed-tensors.
#[derive(Clone, Debug)]
pub(super) struct Groups<F>(Vec<(Targets, F)>);

impl<F: Copy> Groups<F> {
    /// One form for all.
    fn one(form: F) -> Self {
        Self(vec![(Targets::all(), form)])
    }

    /// Each of the matrices with the forms that it may have, at least one. Refuses a group that is for none of them: a matrix
    /// that should be of it would be taken for one of another. `path` is for messages.
    pub(super) fn of<'m>(
        &self,
        matrices: impl IntoIterator<Item = &'m str>,
        path: &Path,
    ) -> Result<Vec<(&'m str, Vec<F>)>, ModelError> {
        let mut unused = vec![true; self.0.len()];
        let mut all = Vec::new();
        for matrix in matrices {
            let mut forms = Vec::new();
            for ((targets, form), unused) in self.0.iter().zip(&mut unused) {
                if targets.fit(matrix) {
                    forms.push(*form);
                    *unused = false;
                }
            }
            if forms.is_empty() {
                return Err(fit_nothing(self.0.iter().map(|(targets, _)| targets), matrix, path));
            }
            all.push((matrix, forms));
        }
        match unused.iter().position(|&unused| unused && !all.is_empty()) {
            Some(group) => Err(self.0[group].0.fit_none(path)),
            None => Ok(all),
        }
    }
}

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
    /// (inputs, outputs): words hold neighbours of a row, interleaved.
    Awq,
    /// (outputs, inputs): words hold neighbours of a row.
    CompressedTensors,
}

/// How integers of a matrix may be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    /// Of an integer: 4 or 8.
    pub(super) bits: usize,
    /// Neighbours of a row that share a scale, a multiple of a block; `None`: the whole row.
    pub(super) group: Option<usize>,
    /// Whether each group says which integer stands for 0. Then there are 4 bits.
    pub(super) has_zeros: bool,
}

impl Layout {
    /// What the tensors of a matrix are called behind its name: integers, scales, zeros or shape, groups, and zeros.
    pub(super) fn parts(self) -> &'static [&'static str] {
        match self {
            Self::Gptq { .. } | Self::Awq => &["qweight", "scales", "qzeros", "g_idx"],
            Self::CompressedTensors => {
                &["weight_packed", "weight_scale", "weight_shape", "weight_g_idx", "weight_zero_point"]
            }
        }
    }

    /// Whether inputs come before outputs.
    pub(super) fn is_turned(self) -> bool {
        self != Self::CompressedTensors
    }
}

impl Scheme {
    /// Reads the field; `None` where it says nothing of these kinds. `path` is for messages.
    pub(super) fn read(config: &Value, path: &Path) -> Result<Option<Self>, ModelError> {
        match config["quant_method"].as_str() {
            Some("gptq") => gptq(config, path).map(Some),
            Some("awq") => awq(config, path).map(Some),
            Some("fp8") => fp8(config, path).map(Some),
            Some("compressed-tensors") => compressed_tensors(config, path).map(Some),
            _ => Ok(None),
        }
    }

    /// What tensors of a matrix are called behind its name that are no weights of their own. Of FP8: a scale, by either name, zeros
    /// that are none, and a scale of activations, which are not rounded.
    pub(super) fn parts(&self) -> &'static [&'static str] {
        match self {
            Self::Integers(layout, _) => layout.parts(),
            Self::Float8 { .. } => &["weight_scale_inv", "weight_scale", "weight_zero_point", "input_scale"],
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
    let symmetric = [Value::Null, json!(true), json!(false)];
    one_of(path, "quantization_config.sym", &config["sym"], &symmetric, "true or false")?;
    let layout = Layout::Gptq { is_v2: format == "gptq_v2", is_by_activation: config["desc_act"] == true };
    grouped(config, path, layout, config["sym"] == false)
}

fn awq(config: &Value, path: &Path) -> Result<Scheme, ModelError> {
    let version = &config["version"];
    one_of(path, "quantization_config.version", version, &[json!("gemm"), json!("GEMM")], "gemm")?;
    let found = &config["zero_point"];
    one_of(path, "quantization_config.zero_point", found, &[json!(true)], "true: integers with zeros")?;
    grouped(config, path, Layout::Awq, true)
}

/// The form of integers where the config has no groups of matrices.
fn grouped(config: &Value, path: &Path, layout: Layout, has_zeros: bool) -> Result<Scheme, ModelError> {
    let group = match config["group_size"].as_i64() {
        Some(-1) => None,
        _ => Some(group(path, "quantization_config.group_size", &config["group_size"])?),
    };
    let bits = bits(path, "quantization_config.bits", &config["bits"], has_zeros)?;
    Ok(Scheme::Integers(layout, Groups::one(Form { bits, group, has_zeros })))
}

fn fp8(config: &Value, path: &Path) -> Result<Scheme, ModelError> {
    one_of(path, "quantization_config.fmt", &config["fmt"], &[Value::Null, json!("e4m3")], "e4m3")?;
    let schemes = [Value::Null, json!("dynamic"), json!("static")];
    one_of(path, "quantization_config.activation_scheme", &config["activation_scheme"], &schemes, "dynamic or static")?;
    no_caches(config, path)?;
    let size = &config["weight_block_size"];
    let square = match size {
        Value::Null => [usize::MAX; 2],
        _ => square(path, "quantization_config.weight_block_size", size)?,
    };
    Ok(Scheme::Float8 { scale: "weight_scale_inv", squares: Groups::one(square) })
}

fn compressed_tensors(config: &Value, path: &Path) -> Result<Scheme, ModelError> {
    const GROUPS: &str = "quantization_config.config_groups";
    const FORMATS: &str = "pack-quantized or float-quantized";
    let format = &config["format"];
    let is_float = format == "float-quantized";
    one_of(path, "quantization_config.format", format, &[json!("pack-quantized"), json!("float-quantized")], FORMATS)?;
    no_caches(config, path)?;
    let found = &config["sparsity_config"];
    if found["format"] != "dense" {
        let expected = "none, or of the format dense: no weight is left out";
        one_of(path, "quantization_config.sparsity_config", found, &[Value::Null, json!({})], expected)?;
    }
    let transforms = [Value::Null, json!({})];
    let found = &config["transform_config"];
    one_of(path, "quantization_config.transform_config", found, &transforms, "none: weights are used as they are")?;
    if !config["ignore"].is_null() {
        // Which matrices have fewer bits is seen by what is stored of them; what cannot be read may mean others.
        Targets::read("quantization_config.ignore", &config["ignore"], path)?;
    }
    let groups = config["config_groups"].as_object().filter(|groups| !groups.is_empty());
    let groups = groups.ok_or_else(|| refused(path, GROUPS, &config["config_groups"], "groups of matrices"))?;
    for of in groups.values() {
        one_of(path, "config_groups.format", &of["format"], &[Value::Null, format.clone()], FORMATS)?;
        // Of FP8 they may be rounded, which loses nothing where it is not done: it is for machines that multiply FP8.
        let activations = &of["input_activations"];
        if !(is_float && activations["type"] == "float" && activations["num_bits"] == 8) {
            let expected = "null: activations are not rounded";
            one_of(path, "config_groups.input_activations", activations, &[Value::Null], expected)?;
        }
        let expected = "null: activations are not rounded";
        one_of(path, "config_groups.output_activations", &of["output_activations"], &[Value::Null], expected)?;
        let (kind, expected) = if is_float { (json!("float"), "float") } else { (json!("int"), "int") };
        one_of(path, "config_groups.weights.type", &of["weights"]["type"], &[kind], expected)?;
        let expected = "false: scales are stored";
        one_of(
            path,
            "config_groups.weights.dynamic",
            &of["weights"]["dynamic"],
            &[Value::Null, json!(false)],
            expected,
        )?;
    }
    if is_float {
        return Ok(Scheme::Float8 { scale: "weight_scale", squares: forms(groups, path, compressed_float)? });
    }
    Ok(Scheme::Integers(Layout::CompressedTensors, forms(groups, path, compressed_integers)?))
}

/// The form of each group's weights, as `form` reads it.
fn forms<F>(
    groups: &Map<String, Value>,
    path: &Path,
    form: fn(&Value, &Path) -> Result<F, ModelError>,
) -> Result<Groups<F>, ModelError> {
    let read = |of: &Value| Ok((Targets::of_group(&of["targets"], path)?, form(&of["weights"], path)?));
    Ok(Groups(groups.values().map(read).collect::<Result<_, ModelError>>()?))
}

/// In which order columns were rounded, and whether their groups follow it: the words of `ActivationOrdering` of compressed-tensors
/// 0.12.
const ORDERS: [&str; 4] = ["group", "weight", "dynamic", "static"];

fn compressed_integers(weights: &Value, path: &Path) -> Result<Form, ModelError> {
    let symmetric = &weights["symmetric"];
    one_of(path, "config_groups.weights.symmetric", symmetric, &[json!(true), json!(false)], "true or false")?;
    let group = match weights["strategy"].as_str() {
        Some("channel") => None,
        Some("group") => Some(group(path, "config_groups.weights.group_size", &weights["group_size"])?),
        _ => return Err(refused(path, "config_groups.weights.strategy", &weights["strategy"], "group or channel")),
    };
    // Whether the values of a group are neighbours is told by a tensor; a word that is not known may say something else.
    let order = &weights["actorder"];
    let known = order.as_str().is_some_and(|order| ORDERS.iter().any(|known| order.eq_ignore_ascii_case(known)));
    if !(order.is_null() || order.is_boolean() || known) {
        let expected = format!("null, true, false, {}", ORDERS.join(", "));
        return Err(refused(path, "config_groups.weights.actorder", order, &expected));
    }
    let has_zeros = *symmetric == false;
    let bits = bits(path, "config_groups.weights.num_bits", &weights["num_bits"], has_zeros)?;
    Ok(Form { bits, group, has_zeros })
}

fn compressed_float(weights: &Value, path: &Path) -> Result<[usize; 2], ModelError> {
    one_of(path, "config_groups.weights.num_bits", &weights["num_bits"], &[json!(8)], "8")?;
    one_of(path, "config_groups.weights.symmetric", &weights["symmetric"], &[json!(true)], "true")?;
    match weights["strategy"].as_str() {
        Some("tensor") => Ok([usize::MAX; 2]),
        Some("channel") => Ok([1, usize::MAX]),
        Some("block") => square(path, "config_groups.weights.block_structure", &weights["block_structure"]),
        _ => {
            let expected = "tensor, channel or block";
            Err(refused(path, "config_groups.weights.strategy", &weights["strategy"], expected))
        }
    }
}

fn no_caches(config: &Value, path: &Path) -> Result<(), ModelError> {
    let (field, found) = ("quantization_config.kv_cache_scheme", &config["kv_cache_scheme"]);
    one_of(path, field, found, &[Value::Null], "null: keys and values are not rounded")
}

fn bits(path: &Path, field: &'static str, found: &Value, has_zeros: bool) -> Result<usize, ModelError> {
    if has_zeros {
        one_of(path, field, found, &[json!(4)], "4 of integers with zeros of their own")?;
    } else {
        one_of(path, field, found, &[json!(4), json!(8)], "4 or 8")?;
    }
    Ok(if *found == 4 { 4 } else { 8 })
}

fn group(path: &Path, field: &'static str, found: &Value) -> Result<usize, ModelError> {
    let size = size(found).filter(|size| size.is_multiple_of(BLOCK));
    size.ok_or_else(|| refused(path, field, found, &format!("a multiple of {BLOCK}, or one group for a row")))
}

/// Rows and columns.
fn square(path: &Path, field: &'static str, found: &Value) -> Result<[usize; 2], ModelError> {
    let sizes =
        found.as_array().filter(|sizes| sizes.len() == 2).and_then(|sizes| Some([size(&sizes[0])?, size(&sizes[1])?]));
    let sizes = sizes.filter(|[_, columns]| columns.is_multiple_of(F8_BLOCK));
    sizes.ok_or_else(|| refused(path, field, found, &format!("rows and columns, these a multiple of {F8_BLOCK}")))
}

fn size(found: &Value) -> Option<usize> {
    found.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|&size| size > 0)
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
