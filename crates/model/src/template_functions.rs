//! What chat templates may call beside Jinja's own: the functions that transformers gives them, and Python's methods of
//! texts, lists and dictionaries. Used by [`crate::chat_template`].

use std::io;

use minijinja::{
    Environment, Error, ErrorKind, Value, escape_formatter,
    value::{Kwargs, ValueKind},
};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use time::{OffsetDateTime, format_description};

use crate::chat_template::Raised;

/// The widest indentation of JSON.
const INDENT_MAX: usize = 16;

pub(crate) fn add_to(environment: &mut Environment<'static>) {
    environment.set_formatter(|out, state, value| match value.kind() {
        // As Python spells them.
        ValueKind::Bool => out.write_str(if value.is_true() { "True" } else { "False" }).map_err(Error::from),
        ValueKind::None => out.write_str("None").map_err(Error::from),
        _ => escape_formatter(out, state, value),
    });
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
}

/// Ends the template: it cannot have this conversation.
fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// The time of day in UTC, as C's `strftime` writes it.
fn strftime_now(format: &str) -> Result<String, Error> {
    let refused =
        |reason: String| Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {reason}"));
    let format = format_description::parse_strftime_owned(format).map_err(|error| refused(error.to_string()))?;
    OffsetDateTime::now_utc().format(&format).map_err(|error| refused(error.to_string()))
}

/// JSON as Python writes it: a blank after each comma and colon, and no character escaped that need not be.
fn tojson(value: Value, named: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = named.get("indent")?;
    let sort_keys: Option<bool> = named.get("sort_keys")?;
    if named.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson: ensure_ascii=true is not known here"));
    }
    named.assert_all_used()?;
    let failed = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    // The maps of this kind are sorted by their keys.
    let value = match sort_keys {
        Some(true) => Value::from_serialize(serde_json::to_value(&value).map_err(failed)?),
        _ => value,
    };
    let mut json = Vec::new();
    match indent {
        Some(indent) => {
            let blanks = vec![b' '; indent.min(INDENT_MAX)];
            value.serialize(&mut Serializer::with_formatter(&mut json, PrettyFormatter::with_indent(&blanks)))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut json, Spaced)),
    }
    .map_err(failed)?;
    String::from_utf8(json).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

/// JSON on one line with a blank after each comma and colon.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, is_first: bool) -> io::Result<()> {
        if is_first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, is_first: bool) -> io::Result<()> {
        if is_first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}
