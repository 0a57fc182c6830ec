//! The fields of a JSON object, taken one by one under their names, so that every refusal names its field, and what nobody
//! took is refused, too: a caller must not believe that it was followed. `null` is as good as not there.

use serde_json::{Map, Value};

use crate::doors::openai::error::ApiError;

/// Fields that say nothing about the answer, which OpenAI's clients send.
pub(crate) const HARMLESS: [&str; 7] =
    ["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"];

/// The fields of an object that are not taken yet.
pub(crate) struct Fields {
    /// What stands before their names: empty, or as `messages[2].`.
    within: String,
    left: Map<String, Value>,
    /// Every field that was asked for: what the description of the endpoint has to have.
    #[cfg(test)]
    pub(crate) asked: std::collections::BTreeSet<&'static str>,
}

impl Fields {
    /// The fields of `value`, which is `within` others.
    pub(crate) fn of(value: Value, within: &str) -> Result<Self, ApiError> {
        match value {
            Value::Object(left) => Ok(Self {
                within: if within.is_empty() { String::new() } else { format!("{within}.") },
                left,
                #[cfg(test)]
                asked: Default::default(),
            }),
            other if within.is_empty() => {
                Err(ApiError::invalid("invalid_json", format!("the body is {}, expected an object", kind(&other))))
            }
            other => Err(ApiError::field(within, kind(&other), "an object")),
        }
    }

    /// The full name of a field.
    pub(crate) fn name(&self, field: &str) -> String {
        format!("{}{field}", self.within)
    }

    /// The value of a field, if it is there.
    pub(crate) fn value(&mut self, field: &'static str) -> Option<Value> {
        #[cfg(test)]
        self.asked.insert(field);
        self.left.remove(field).filter(|value| !value.is_null())
    }

    /// What `read` makes of a field, if it is there; `None` from it says that this is not what is `expected`.
    pub(crate) fn read<T>(
        &mut self,
        field: &'static str,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.value(field) else { return Ok(None) };
        read(&value).map(Some).ok_or_else(|| ApiError::field(self.name(field), &value, expected))
    }

    pub(crate) fn number(&mut self, field: &'static str) -> Result<Option<f32>, ApiError> {
        self.read(field, "a number of 32 bits", number)
    }

    pub(crate) fn count(&mut self, field: &'static str) -> Result<Option<usize>, ApiError> {
        let count = |value: &Value| u32::try_from(whole(value)?).ok();
        Ok(self.read(field, "a whole number that is not negative, below 2^32", count)?.map(|count| count as usize))
    }

    pub(crate) fn flag(&mut self, field: &'static str) -> Result<Option<bool>, ApiError> {
        self.read(field, "true or false", Value::as_bool)
    }

    pub(crate) fn text(&mut self, field: &'static str) -> Result<Option<String>, ApiError> {
        self.read(field, "a text", |value| value.as_str().map(str::to_owned))
    }

    /// Refuses a field, unless it says what is so anyway.
    pub(crate) fn refuse(
        &mut self,
        field: &'static str,
        why: &str,
        is_so_anyway: impl FnOnce(&Value) -> bool,
    ) -> Result<(), ApiError> {
        match self.value(field) {
            Some(value) if !is_so_anyway(&value) => Err(ApiError::unsupported(self.name(field), why)),
            _ => Ok(()),
        }
    }

    /// Refuses what is left, if it would change the answer.
    pub(crate) fn end(self) -> Result<(), ApiError> {
        let unknown = self.left.iter().find(|(name, value)| !value.is_null() && !HARMLESS.contains(&name.as_str()));
        match unknown {
            Some((name, _)) => Err(ApiError::unsupported(self.name(name), "no such field is known here")),
            None => Ok(()),
        }
    }
}

/// A number that is one in 32 bits, too: the largest of JSON would be infinite.
pub(crate) fn number(value: &Value) -> Option<f32> {
    value.as_f64().map(|number| number as f32).filter(|number| number.is_finite())
}

/// A whole number, also where it is written as 5.0: JSON has one kind of numbers, and some languages write all alike.
pub(crate) fn whole(value: &Value) -> Option<i128> {
    // Below it a f64 is the number that was written.
    const EXACT: f64 = (1_u64 << 53) as f64;
    let exact = value.as_u64().map(i128::from).or_else(|| value.as_i64().map(i128::from));
    exact.or_else(|| value.as_f64().filter(|number| number.fract() == 0.0 && number.abs() < EXACT).map(|n| n as i128))
}

/// The id of a token.
pub(crate) fn token_id(value: &Value) -> Option<u32> {
    whole(value)?.try_into().ok()
}

/// What a value is.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn param(error: ApiError) -> String {
        error.json()["error"]["param"].as_str().expect("a field").to_owned()
    }

    #[test]
    fn what_is_wrong_is_named() {
        // Would break: a caller learns that something of its request is wrong, but not what.
        let mut fields = Fields::of(json!({"n": -1, "seed": "x", "echo": 1, "top_p": "0.5", "a": null}), "at").unwrap();
        assert_eq!(param(fields.count("n").unwrap_err()), "at.n");
        assert_eq!(param(fields.number("top_p").unwrap_err()), "at.top_p");
        assert_eq!(param(fields.flag("echo").unwrap_err()), "at.echo");
        let absurd = Fields::of(json!({"temperature": 1e300}), "").unwrap().number("temperature").unwrap_err();
        assert!(absurd.message().starts_with("temperature is 1e"), "{}", absurd.message());
        assert_eq!(fields.text("a").unwrap(), None);
        assert_eq!(fields.text("seed").unwrap().as_deref(), Some("x"));
        fields.end().unwrap();
        for (value, expected) in [(json!([1]), "a list"), (json!(null), "null"), (json!("x"), "a text")] {
            let message = Fields::of(value, "").err().expect("no object").json()["error"]["message"].to_string();
            assert!(message.contains(expected), "{message}");
        }
        assert_eq!(Fields::of(json!({"n": 5.0}), "").unwrap().count("n").unwrap(), Some(5));
        for huge in [json!({"n": 1.5}), json!({"n": 1e300}), json!({"n": 4_294_967_296_u64})] {
            assert!(Fields::of(huge, "").unwrap().count("n").is_err());
        }
    }

    #[test]
    fn what_nobody_takes_is_refused_unless_it_changes_nothing() {
        // Would break: an application believes that its answer follows a schema, while the field was not known.
        let left = |value: Value| Fields::of(value, "").unwrap().end();
        left(json!({"user": "u", "metadata": {"a": 1}, "store": true, "tools": null})).unwrap();
        assert_eq!(param(left(json!({"user": "u", "guided_json": {}})).unwrap_err()), "guided_json");
        let mut fields = Fields::of(json!({"suffix": "", "best_of": 3}), "").unwrap();
        fields.refuse("suffix", "no", |value| value == "").unwrap();
        assert_eq!(param(fields.refuse("best_of", "no", |value| value == 1).unwrap_err()), "best_of");
    }
}
