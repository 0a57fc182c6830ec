//! The fields of a decoder-only model's config.json, each checked as it is read: what is there of another kind, or out of bounds, is
//! refused by its name. What several of them mean together, attention and rotary positions, is read here as well.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{
    ModelError,
    spec::{AttentionSpec, Keys, QkNorm, Rotary, RotaryScaling},
};

/// The fields of a config.json, each checked as it is read: a field that is null counts as one that is not there.
#[derive(Debug)]
pub struct Json<'a> {
    pub(super) object: &'a Map<String, Value>,
    pub(super) path: &'a Path,
}

impl<'a> Json<'a> {
    /// A field that is there and not null.
    pub fn get(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    /// The error that a field is not as expected.
    pub fn refuse(&self, field: &'static str, found: String, expected: impl Into<String>) -> ModelError {
        ModelError::Config { path: self.path.to_owned(), field, found, expected: expected.into() }
    }

    /// A whole number; `default` where the file leaves it out, an error if there is none.
    pub fn size(&self, field: &'static str, default: Option<usize>, min: u64, max: u64) -> Result<usize, ModelError> {
        let expected = || format!("{min} to {max}");
        match (self.get(field), default) {
            (Some(value), _) => match value.as_u64().filter(|value| (min..=max).contains(value)) {
                Some(value) => Ok(value as usize),
                None => Err(self.refuse(field, value.to_string(), expected())),
            },
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.refuse(field, "nothing".to_owned(), expected())),
        }
    }

    /// A size that may be absent.
    pub fn size_if_any(&self, field: &'static str, min: u64, max: u64) -> Result<Option<usize>, ModelError> {
        self.get(field).map(|_| self.size(field, None, min, max)).transpose()
    }

    /// True or false; `default` where the file leaves it out.
    pub fn flag(&self, field: &'static str, default: bool) -> Result<bool, ModelError> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.refuse(field, value.to_string(), "true or false")),
        }
    }

    /// A number; `default` where the file leaves it out.
    pub fn number(&self, field: &'static str, default: f64, min: f64, max: f64) -> Result<f64, ModelError> {
        Ok(self.number_if_any(field, min, max)?.unwrap_or(default))
    }

    /// A number that may be absent.
    pub fn number_if_any(&self, field: &'static str, min: f64, max: f64) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64().filter(|value| (min..=max).contains(value)) {
            Some(value) => Ok(Some(value)),
            None => Err(self.refuse(field, value.to_string(), format!("{min} to {max}"))),
        }
    }

    /// Refuses any other text than this.
    pub fn text(&self, field: &'static str, expected: &str) -> Result<(), ModelError> {
        match self.get(field) {
            Some(value) if value.as_str() != Some(expected) => {
                Err(self.refuse(field, value.to_string(), format!("{expected:?}")))
            }
            _ => Ok(()),
        }
    }

    /// A list of texts or numbers; none where the file leaves it out.
    pub fn list(&self, field: &'static str) -> Result<Option<&'a [Value]>, ModelError> {
        let list = |value: &'a Value| match value.as_array() {
            Some(list) => Ok(&list[..]),
            None => Err(self.refuse(field, value.to_string(), "a list")),
        };
        self.get(field).map(list).transpose()
    }

    /// How many experts a layer has: files have one name for it or the other.
    pub fn experts(&self, default: usize) -> Result<usize, ModelError> {
        let name = if self.get("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
        self.size(name, Some(default), 1, 16_384)
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> Result<usize, ModelError> {
        self.size("num_hidden_layers", None, 1, 1024)
    }

    /// The tokens of a sequence at most: what `max_position_embeddings` says, and what scaled positions make of it.
    pub fn positions(&self, rotary: Option<Rotary>) -> Result<Option<usize>, ModelError> {
        let said = self.size_if_any("max_position_embeddings", 1, 1 << 32)?;
        Ok(said.map(|said| match rotary.map(|rotary| rotary.scaling) {
            Some(RotaryScaling::Linear { factor }) => (said as f64 * factor) as usize,
            // Files have the number before it is scaled, or behind.
            Some(RotaryScaling::Yarn { factor, trained, .. }) => said.max((trained * factor) as usize),
            Some(RotaryScaling::None | RotaryScaling::Llama3 { .. }) | None => said,
        }))
    }

    /// What all families here share of attention: heads, positions. `head_dim` is that of the file, or what follows from the
    /// sizes. `default_kv_heads`: as many as heads if none.
    pub fn attention(&self, default_theta: f64, default_kv_heads: Option<usize>) -> Result<AttentionSpec, ModelError> {
        let heads = self.size("num_attention_heads", None, 1, 1024)?;
        let kv_heads = self.size("num_key_value_heads", Some(default_kv_heads.unwrap_or(heads)), 1, 1024)?;
        let hidden_size = self.size("hidden_size", None, 1, 65_536)?;
        let head_dim = match self.size_if_any("head_dim", 2, 4096)? {
            Some(head_dim) => head_dim,
            None => hidden_size / heads,
        };
        if head_dim < 2 || head_dim % 2 == 1 {
            return Err(self.refuse("head_dim", head_dim.to_string(), "an even number"));
        }
        Ok(AttentionSpec {
            heads,
            kv_heads,
            head_dim,
            keys: Keys::Cache,
            scale: (head_dim as f64).powf(-0.5) as f32,
            has_bias: false,
            has_output_bias: false,
            qk_norm: QkNorm::None,
            clip: None,
            rotary: Some(self.rotary(default_theta)?),
            window: None,
        })
    }

    /// Rotary positions, as releases before transformers 5 write them (`rope_theta`, `rope_scaling`) or as later ones do
    /// (`rope_parameters`).
    fn rotary(&self, default_theta: f64) -> Result<Rotary, ModelError> {
        let nothing = Map::new();
        let object = |field: &'static str| match self.get(field) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(object)),
            Some(other) => Err(self.refuse(field, other.to_string(), "an object")),
        };
        let scaling = match (object("rope_scaling")?, object("rope_parameters")?) {
            (Some(_), Some(_)) => {
                let expected = "one of rope_parameters and rope_scaling";
                return Err(self.refuse("rope_scaling", "beside rope_parameters".to_owned(), expected));
            }
            (scaling, parameters) => scaling.or(parameters).unwrap_or(&nothing),
        };
        let within = Json { object: scaling, path: self.path };
        let theta = match within.number_if_any("rope_theta", 1.000_001, 1e12)? {
            Some(theta) => theta,
            None => self.number("rope_theta", default_theta, 1.000_001, 1e12)?,
        };
        // No family here turns a part of a head.
        within.number("partial_rotary_factor", 1.0, 1.0, 1.0)?;
        self.number("partial_rotary_factor", 1.0, 1.0, 1.0)?;
        if scaling.values().any(Value::is_object) {
            return Err(self.refuse("rope_parameters", "parameters by layer".to_owned(), "the same for all layers"));
        }
        let trained = || match self.number_if_any("original_max_position_embeddings", 1.0, 1e9)? {
            Some(trained) => Ok(trained),
            None => match within.number_if_any("original_max_position_embeddings", 1.0, 1e9)? {
                Some(trained) => Ok(trained),
                None => match self.number_if_any("max_position_embeddings", 1.0, 1e9)? {
                    Some(trained) => Ok(trained),
                    None => Err(self.refuse("original_max_position_embeddings", "nothing".to_owned(), "a number")),
                },
            },
        };
        let kind = within.get("rope_type").or(within.get("type"));
        let positive = |field| match within.number_if_any(field, 1e-6, 1e9)? {
            Some(value) => Ok(value),
            None => Err(self.refuse(field, "nothing".to_owned(), "a number")),
        };
        let scaling = match kind.and_then(Value::as_str) {
            None if kind.is_none() => RotaryScaling::None,
            Some("default") => RotaryScaling::None,
            Some("linear") => RotaryScaling::Linear { factor: positive("factor")? },
            Some("llama3") => RotaryScaling::Llama3 {
                factor: positive("factor")?,
                low_freq_factor: positive("low_freq_factor")?,
                high_freq_factor: positive("high_freq_factor")?,
                trained: trained()?,
            },
            Some("yarn") => {
                let factor = positive("factor")?;
                let scaled = |by: f64| if factor > 1.0 { 0.1 * by * factor.ln() + 1.0 } else { 1.0 };
                let (mscale, all) =
                    (within.number_if_any("mscale", 0.0, 1e6)?, within.number_if_any("mscale_all_dim", 0.0, 1e6)?);
                let attention_factor = match (within.number_if_any("attention_factor", 0.0, 1e6)?, mscale, all) {
                    (Some(factor), ..) => factor,
                    (None, Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => scaled(mscale) / scaled(all),
                    _ => scaled(1.0),
                };
                RotaryScaling::Yarn {
                    factor,
                    beta_fast: within.number("beta_fast", 32.0, 1e-6, 1e6)?,
                    beta_slow: within.number("beta_slow", 1.0, 1e-6, 1e6)?,
                    trained: trained()?,
                    attention_factor,
                    truncate: within.flag("truncate", true)?,
                }
            }
            _ => {
                let found = kind.map_or_else(String::new, Value::to_string);
                return Err(self.refuse("rope_type", found, "default, linear, llama3 or yarn"));
            }
        };
        Ok(Rotary { theta, scaling })
    }
}
