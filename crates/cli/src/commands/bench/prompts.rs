//! What is asked: texts of a file, a line each, or JSON, an object a line. Read by [`super::workload`].

use std::path::Path;

use serde_json::{Map, Value};

use crate::{bad_configuration::BadConfiguration, text_file};

/// What is asked when no file is given: sentences of the length of film reviews.
const BUILT_IN: [&str; 4] = [
    "sst2 sentence: a quiet film that stays with you long after the lights come up .",
    "sst2 sentence: the plot is thin and the jokes are thinner .",
    "sst2 sentence: two hours of noise without a single idea .",
    "sst2 sentence: warm , clever and beautifully played .",
];

/// One text to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Prompt {
    pub(crate) text: String,
    /// Tokens of its answer at most, where the file says so.
    pub(crate) max_tokens: Option<usize>,
}

impl Prompt {
    fn plain(text: &str) -> Self {
        Self { text: text.to_owned(), max_tokens: None }
    }
}

/// Those that come with the program.
pub(crate) fn built_in() -> Vec<Prompt> {
    BUILT_IN.map(Prompt::plain).to_vec()
}

/// Those of a file: at least one.
pub(crate) fn of_file(file: &Path) -> Result<Vec<Prompt>, BadConfiguration> {
    parse(&text_file::read(file)?)
        .map_err(|problem| BadConfiguration::new(format!("texts {}: {problem}", file.display())))
}

/// If the first line that is not blank is a JSON object, all are; otherwise each is a text as it stands.
fn parse(content: &str) -> Result<Vec<Prompt>, String> {
    let lines = content.lines().map(str::trim_end).enumerate().filter(|(_, line)| !line.is_empty());
    let mut lines = lines.map(|(number, line)| (number + 1, line)).peekable();
    let (_, first) = lines.peek().ok_or("every line is blank")?;
    if object(first).is_err() {
        return Ok(lines.map(|(_, line)| Prompt::plain(line)).collect());
    }
    lines.map(|(number, line)| of_object(line).map_err(|problem| format!("line {number} {problem}"))).collect()
}

fn object(line: &str) -> serde_json::Result<Map<String, Value>> {
    serde_json::from_str(line)
}

fn of_object(line: &str) -> Result<Prompt, String> {
    let object = object(line).map_err(|error| format!("is no JSON object as the first line is: {error}"))?;
    let text = match object.get("prompt").or_else(|| object.get("text")) {
        None => Err("has neither `prompt` nor `text`".to_owned()),
        Some(Value::String(text)) if text.trim().is_empty() => Err("has a blank text".to_owned()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(format!("has {} for a text, expected a string", kind(other))),
    }?;
    let max_tokens = match object.get("max_tokens") {
        None | Some(Value::Null) => None,
        Some(value) => {
            let tokens = value.as_u64().filter(|tokens| (1..=u64::from(u32::MAX)).contains(tokens));
            Some(tokens.ok_or_else(|| format!("has max_tokens {value}, expected a whole number of 1 or more"))? as usize)
        }
    };
    Ok(Prompt { text, max_tokens })
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn lines_are_texts() {
        // Broken: blank lines would be sent and refused as empty texts, or a text in braces be taken for JSON.
        let texts = |content| parse(content).unwrap().into_iter().map(|prompt| prompt.text).collect::<Vec<_>>();
        assert_eq!(texts("one\r\n\n two\n"), ["one", " two"]);
        assert_eq!(texts("{braces} in a text\n{\"prompt\": \"x\"}\n"), ["{braces} in a text", "{\"prompt\": \"x\"}"]);
        assert_eq!(texts("[1, 2]\n\"quoted\"\n"), ["[1, 2]", "\"quoted\""]);
        assert_eq!(built_in().len(), 4);
    }

    #[test]
    fn objects_are_prompts() {
        // Broken: JSON would be sent as text, or every answer have the same length although the file gives each its own.
        let file = "{\"prompt\": \"one\", \"max_tokens\": 7, \"id\": 1}\n\n{\"text\": \"two\\nlines\", \"max_tokens\": null}\n";
        let expected = [
            Prompt { text: "one".into(), max_tokens: Some(7) },
            Prompt { text: "two\nlines".into(), max_tokens: None },
        ];
        assert_eq!(parse(file).unwrap(), expected);
    }

    #[test]
    fn wrong_files_are_refused_by_line() {
        // Broken: a file of nothing would divide by zero, or a line that cannot be asked be left out without a word.
        for (wrong, named) in [
            ("", "every line is blank"),
            ("\n \n\n", "every line is blank"),
            ("{}", "line 1 has neither"),
            ("{\"text\": \"x\"}\nplain\n", "line 2 is no JSON object"),
            ("{\"text\": \"x\"}\n\n{\"text\": [1, 2]}\n", "line 3 has an array"),
            ("{\"text\": \"  \"}", "line 1 has a blank text"),
            ("{\"text\": \"x\", \"max_tokens\": 0}", "max_tokens 0"),
            ("{\"text\": \"x\", \"max_tokens\": -5}", "max_tokens -5"),
            ("{\"text\": \"x\", \"max_tokens\": \"many\"}", "max_tokens \"many\""),
        ] {
            let error = parse(wrong).unwrap_err();
            assert!(error.contains(named), "{wrong:?}: {error}");
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("prompts.jsonl");
        fs::write(&file, "\n").unwrap();
        assert!(of_file(&file).unwrap_err().to_string().contains("prompts.jsonl: every line is blank"));
        fs::write(&file, b"\xff\xfe").unwrap();
        assert!(of_file(&file).unwrap_err().to_string().contains("prompts.jsonl"));
    }
}
