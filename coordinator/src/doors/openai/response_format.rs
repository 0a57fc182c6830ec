//! The field `response_format`: that an answer is JSON, or JSON of a schema. Other servers' fields for the same are not
//! known.

use serde_json::{Value, json};

use crate::doors::openai::{error::ApiError, fields::Fields};

/// What `type` may be.
const TYPES: &str = "text, json_object or json_schema";

/// Takes the field: the JSON Schema that an answer follows; `None` where it is any text.
pub(crate) fn read(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let Some(value) = fields.value("response_format") else { return Ok(None) };
    let mut format = Fields::of(value, "response_format")?;
    let kind = format.text("type")?;
    let schema = match kind.as_deref() {
        Some("text") => None,
        Some("json_object") => Some(json!({"type": "object"})),
        Some("json_schema") => Some(schema(&mut format)?),
        Some(other) => return Err(ApiError::field("response_format.type", other, TYPES)),
        None => return Err(ApiError::missing("response_format.type", TYPES)),
    };
    format.end()?;
    Ok(schema.map(|schema| schema.to_string()))
}

fn schema(format: &mut Fields) -> Result<Value, ApiError> {
    const WITHIN: &str = "response_format.json_schema";
    let value = format.value("json_schema").ok_or_else(|| ApiError::missing(WITHIN, "an object"))?;
    let mut named = Fields::of(value, WITHIN)?;
    // A name and a description tell the model of OpenAI what the schema is for; strict or not, it is followed to the
    // letter.
    named.text("name")?;
    named.text("description")?;
    named.flag("strict")?;
    let schema = named.value("schema").ok_or_else(|| ApiError::missing(named.name("schema"), "a JSON Schema"))?;
    named.end()?;
    Ok(schema)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_read_or_refused_by_name() {
        // Would break: an application believes that its answer is JSON, while its wish was not understood.
        let read = |value: Value| read(&mut Fields::of(json!({"response_format": value}), "").unwrap());
        assert_eq!(read(json!(null)).unwrap(), None);
        assert_eq!(read(json!({"type": "text"})).unwrap(), None);
        assert_eq!(read(json!({"type": "json_object"})).unwrap().as_deref(), Some(r#"{"type":"object"}"#));
        let named = |schema: Value| json!({"type": "json_schema", "json_schema": schema});
        let whole = named(json!({"name": "n", "description": "d", "strict": true, "schema": {"type": "null"}}));
        assert_eq!(read(whole).unwrap().as_deref(), Some(r#"{"type":"null"}"#));
        for (wrong, param) in [
            (json!("json_object"), "response_format"),
            (json!({}), "response_format.type"),
            (json!({"type": "xml"}), "response_format.type"),
            (json!({"type": "json_object", "schema": {}}), "response_format.schema"),
            (json!({"type": "json_schema"}), "response_format.json_schema"),
            (named(json!({"name": "n"})), "response_format.json_schema.schema"),
            (named(json!({"schema": {}, "grammar": 1})), "response_format.json_schema.grammar"),
            (named(json!({"schema": {}, "strict": "yes"})), "response_format.json_schema.strict"),
        ] {
            assert_eq!(read(wrong.clone()).unwrap_err().json()["error"]["param"], param, "{wrong}");
        }
    }
}
