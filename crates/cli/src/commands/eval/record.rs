//! What is known of one example by name: a line of a table, or a JSON object with lists and objects within it. Read by
//! [`crate::commands::eval::data_file`], asked by [`crate::commands::eval::task`].
//!
//! A field within an object is named by a path, `passage.text`. Where a path leads through a list, each of its items is an
//! example of its own: `passage.questions.question` makes one of every question.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use serde_json::{Map, Value};

use crate::bad_configuration::BadConfiguration;

/// More examples than this are a mistake: their answers would not fit beside the model.
pub(crate) const EXAMPLES_MAX: usize = 1 << 20;

/// Where something stands in the data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The path as it was given.
    pub(crate) file: Arc<str>,
    /// From 1.
    pub(crate) line: usize,
}

/// One example's fields.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) place: Place,
    object: Arc<Map<String, Value>>,
    /// Which item is meant of each list on the way, by the list's path.
    items: BTreeMap<String, usize>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} line {}", self.file, self.line)
    }
}

impl Place {
    /// Refuses a field that holds something else than it should.
    pub(crate) fn refuse(
        &self,
        field: &str,
        found: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> BadConfiguration {
        BadConfiguration::new(format!("{self}, field {field}: found {found}, expected {expected}"))
    }
}

impl Record {
    /// The examples of an object: one, or one for each item of the lists that `paths` lead through, in the order of the
    /// file.
    pub(crate) fn expand(
        place: Place,
        object: Map<String, Value>,
        paths: &[&str],
    ) -> Result<Vec<Self>, BadConfiguration> {
        let first = Self { place: place.clone(), object: Arc::new(object), items: BTreeMap::new() };
        let mut records = vec![first];
        let lists = paths.iter().flat_map(|path| path.match_indices('.').map(|(at, _)| &path[..at]));
        for list in lists {
            let examples = records.iter().map(|record| record.items_of(list).unwrap_or(1)).sum::<usize>();
            if examples > EXAMPLES_MAX {
                return Err(place.refuse(list, format!("{examples} examples"), format!("{EXAMPLES_MAX} at most")));
            }
            records = records.into_iter().flat_map(|record| record.each_of(list)).collect();
        }
        Ok(records)
    }

    /// How many items a list has that is not chosen from yet; `None` where there is no such list.
    fn items_of(&self, path: &str) -> Option<usize> {
        let is_chosen = self.items.contains_key(path);
        self.find(path).filter(|_| !is_chosen)?.as_array().map(Vec::len)
    }

    /// A record for each item of such a list; this one where there is none.
    fn each_of(self, path: &str) -> Vec<Self> {
        let Some(items) = self.items_of(path) else { return vec![self] };
        let chosen = |item| {
            let mut record = self.clone();
            record.items.insert(path.to_owned(), item);
            record
        };
        (0..items).map(chosen).collect()
    }

    /// What a path leads to. A field that is called like the whole path goes before the path.
    fn find(&self, path: &str) -> Option<&Value> {
        if let Some(value) = self.object.get(path) {
            return Some(self.item_of(path, value));
        }
        let (first, _) = path.split_once('.')?;
        let mut value = self.item_of(first, self.object.get(first)?);
        let mut end = first.len();
        while end < path.len() {
            let name = path[end + 1..].split('.').next()?;
            end += 1 + name.len();
            value = self.item_of(&path[..end], value.get(name)?);
        }
        Some(value)
    }

    /// The chosen item of a list, or the value itself.
    fn item_of<'v>(&self, path: &str, value: &'v Value) -> &'v Value {
        let item = self.items.get(path).and_then(|&item| value.get(item));
        item.unwrap_or(value)
    }

    /// Whether there is such a field.
    pub(crate) fn has(&self, field: &str) -> bool {
        self.find(field).is_some_and(|value| !value.is_null())
    }

    /// A field's text, without blanks around it. Numbers and truth values are texts, too; nothing at all is none.
    pub(crate) fn text(&self, field: &str) -> Result<String, BadConfiguration> {
        let value = self.value(field)?;
        let text = match value {
            Value::String(text) => text.trim().to_owned(),
            Value::Number(_) | Value::Bool(_) => value.to_string(),
            other => return Err(self.place.refuse(field, kind(other), "a text")),
        };
        if text.is_empty() { Err(self.place.refuse(field, "an empty text", "a text")) } else { Ok(text) }
    }

    /// A field's list of texts.
    pub(crate) fn texts(&self, field: &str) -> Result<Vec<String>, BadConfiguration> {
        let expected = "a list of texts that are not empty";
        let Value::Array(list) = self.value(field)? else {
            return Err(self.place.refuse(field, kind(self.value(field)?), expected));
        };
        let texts = list.iter().map(|item| match item.as_str().map(str::trim) {
            Some(text) if !text.is_empty() => Ok(text.to_owned()),
            Some(_) => Err(self.place.refuse(field, "an empty text", expected)),
            None => Err(self.place.refuse(field, format!("{} in the list", kind(item)), expected)),
        });
        texts.collect()
    }

    fn value(&self, field: &str) -> Result<&Value, BadConfiguration> {
        self.find(field).ok_or_else(|| {
            let names: BTreeSet<_> = self.object.keys().map(String::as_str).collect();
            let names: Vec<_> = names.into_iter().collect();
            self.place.refuse(field, "no such field", format!("one of {}", names.join(", ")))
        })
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    pub(crate) fn expand(value: Value, paths: &[&str]) -> Vec<Record> {
        let place = Place { file: "data.jsonl".into(), line: 3 };
        let Value::Object(object) = value else { panic!("no object") };
        Record::expand(place, object, paths).unwrap()
    }

    #[test]
    fn lists_on_the_way_make_an_example_of_each_item() {
        // Would break: questions and answers of MultiRC are mixed up, or asked in another order from run to run.
        let passage = json!({"passage": {"text": " p ", "questions": [
            {"question": "q1", "answers": [{"text": "a", "label": 1}, {"text": "b", "label": 0}]},
            {"question": "q2", "answers": [{"text": "c", "label": 1}]},
            {"question": "q3", "answers": []},
        ]}});
        let fields = ["passage.questions.question", "passage.questions.answers.text", "passage.text"];
        let records = expand(passage, &fields);
        let found: Vec<_> = records.iter().map(|record| fields.map(|field| record.text(field).unwrap())).collect();
        let expected = [["q1", "a", "p"], ["q1", "b", "p"], ["q2", "c", "p"]];
        assert_eq!(found, expected.map(|example| example.map(str::to_owned)));
        assert_eq!(records[1].text("passage.questions.answers.label").unwrap(), "0");
    }

    #[test]
    fn a_list_at_the_end_is_one_value() {
        // Would break: each choice of an example becomes an example.
        let records = expand(json!({"a.b": ["x", " y "], "n": null, "t": true}), &["a.b", "t"]);
        assert_eq!(records.len(), 1);
        assert_eq!(records[0].texts("a.b").unwrap(), ["x", "y"]);
        assert_eq!(records[0].text("t").unwrap(), "true");
        assert!(records[0].has("t") && !records[0].has("n") && !records[0].has("a"));
        // Items are chosen once of each list, also if they are lists.
        assert_eq!(expand(json!({"a": [[1, 2, 3]]}), &["a.t", "a.u"]).len(), 1);
    }

    #[test]
    fn lists_of_lists_are_bounded() {
        // Would break: a small file whose lists multiply takes all memory.
        let list: Vec<_> = (0..1500).map(|number| json!({"t": number})).collect();
        let Value::Object(object) = json!({"a": list, "b": list}) else { panic!("no object") };
        let place = Place { file: "data.jsonl".into(), line: 3 };
        let refused = Record::expand(place, object, &["a.t", "b.t"]).unwrap_err().to_string();
        assert_eq!(refused, "data.jsonl line 3, field b: found 2250000 examples, expected 1048576 at most");
    }

    #[test]
    fn what_a_field_should_hold_is_told_with_its_place() {
        // Would break: somebody looks through a file of a million lines for the one that is wrong.
        let record = &expand(json!({"list": ["x", 1], "blank": " ", "blanks": [""], "o": {}}), &[])[0];
        let told = [
            record.text("absent").map(drop),
            record.text("o.absent").map(drop),
            record.text("blank").map(drop),
            record.text("list").map(drop),
            record.texts("list").map(drop),
            record.texts("blanks").map(drop),
            record.texts("o").map(drop),
        ]
        .map(|refused| refused.unwrap_err().to_string());
        let expected = [
            "field absent: found no such field, expected one of blank, blanks, list, o",
            "field o.absent: found no such field, expected one of blank, blanks, list, o",
            "field blank: found an empty text, expected a text",
            "field list: found a list, expected a text",
            "field list: found a number in the list, expected a list of texts that are not empty",
            "field blanks: found an empty text, expected a list of texts that are not empty",
            "field o: found an object, expected a list of texts that are not empty",
        ];
        assert_eq!(told, expected.map(|message| format!("data.jsonl line 3, {message}")));
    }
}
