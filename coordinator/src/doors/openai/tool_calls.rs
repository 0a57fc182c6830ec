//! How a model's text becomes calls of tools: what stands between `<tool_call>` and `</tool_call>` is a name and arguments in
//! JSON. Read as the text comes, so that a stream says what is text at once, and a call when it is whole. What looks like a
//! call and is none stays text: nothing that the model said is lost. A call that the limit of tokens cuts is one as well, with as
//! much of its arguments as there is, as OpenAI's has it; of one that is cut before its name is whole nothing is told.

use serde_json::Value;
use sida_model::chat_template::TOOL_CALL;

use crate::answer::output::FinishReason;

/// What a model said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    Text(String),
    Call {
        name: String,
        /// In JSON; of a call that was cut the beginning of it.
        arguments: String,
    },
}

/// What an answer may call.
#[derive(Clone, Debug, Default)]
pub(crate) struct Callable {
    /// The names of the tools that there are.
    pub(crate) names: Vec<String>,
    /// Whether it is calls and nothing else.
    pub(crate) is_all: bool,
}

/// Reads one answer.
pub(crate) struct Reader {
    callable: Callable,
    /// What is not told yet: the beginning of a call, or what may be one.
    rest: String,
    is_in_call: bool,
    calls: usize,
}

impl Reader {
    /// Of an answer that may call these.
    pub(crate) fn new(callable: Callable) -> Self {
        Self { callable, rest: String::new(), is_in_call: false, calls: 0 }
    }

    /// How many calls there were.
    pub(crate) fn calls(&self) -> usize {
        self.calls
    }

    /// What is told once `text` has come, too; of the last text, with why it is the last, everything.
    pub(crate) fn read(&mut self, text: &str, last: Option<FinishReason>) -> Vec<Said> {
        let is_last = last.is_some();
        let [begins, ends] = TOOL_CALL;
        let mut said = Vec::new();
        self.rest += text;
        loop {
            let mark = if self.is_in_call { ends } else { begins };
            let Some(at) = self.rest.find(mark) else { break };
            let after = self.rest.split_off(at + mark.len());
            let mut before = std::mem::replace(&mut self.rest, after);
            before.truncate(at);
            if self.is_in_call {
                said.push(self.call(&before, true));
            } else {
                // Blanks before a call belong to it.
                self.text(before.trim_end(), &mut said);
            }
            self.is_in_call = !self.is_in_call;
        }
        if is_last && self.is_in_call {
            // An end stands in the place of the mark, or a stop text did.
            let rest = std::mem::take(&mut self.rest);
            let cut = begun(&rest).filter(|_| last == Some(FinishReason::Length));
            let whole = &rest[..rest.len() - held_back(&rest, ends)];
            match cut.filter(|(name, _)| parsed(whole).is_none() && self.callable.names.contains(name)) {
                Some((name, arguments)) => {
                    self.calls += 1;
                    said.push(Said::Call { name, arguments });
                }
                None if parsed(whole).is_some() => said.push(self.call(whole, false)),
                // It was cut before it had a name, or what follows one: nothing is said yet.
                None if last == Some(FinishReason::Length) && is_begun(&rest) => {}
                None => said.push(self.call(&rest, false)),
            }
        } else if !self.is_in_call {
            // Where there are only calls, a beginning of one that was cut is no text.
            let is_whole = is_last && !self.callable.is_all;
            let told = if is_whole { self.rest.len() } else { self.rest.len() - held_back(&self.rest, begins) };
            let text: String = self.rest.drain(..told).collect();
            self.text(if is_last && self.calls > 0 { text.trim_end() } else { &text }, &mut said);
        }
        said
    }

    fn text(&self, text: &str, said: &mut Vec<Said>) {
        // Between calls stand blanks that say nothing.
        let text = if self.calls > 0 { text.trim_start() } else { text };
        if !text.is_empty() {
            said.push(Said::Text(text.to_owned()));
        }
    }

    /// The call that `written` is; or the text, as it stood there.
    fn call(&mut self, written: &str, is_ended: bool) -> Said {
        match parsed(written) {
            Some((name, arguments)) if self.callable.names.contains(&name) => {
                self.calls += 1;
                Said::Call { name, arguments }
            }
            _ => {
                let [begins, ends] = TOOL_CALL;
                Said::Text(format!("{begins}{written}{}", if is_ended { ends } else { "" }))
            }
        }
    }
}

fn parsed(written: &str) -> Option<(String, String)> {
    let call: Value = serde_json::from_str(written.trim()).ok()?;
    let name = call["name"].as_str()?.to_owned();
    match &call["arguments"] {
        Value::Null => Some((name, "{}".to_owned())),
        arguments @ Value::Object(_) => Some((name, arguments.to_string())),
        _ => None,
    }
}

/// Whether a call may begin so that is cut before the end of its name.
fn is_begun(written: &str) -> bool {
    let blanks_apart: String = written.chars().filter(|character| !character.is_whitespace()).collect();
    let begins = "{\"name\":\"";
    begins.starts_with(&blanks_apart) || blanks_apart.strip_prefix(begins).is_some_and(|name| !name.contains('"'))
}

/// The name of a call whose text was cut behind it, and what there is of its arguments.
fn begun(written: &str) -> Option<(String, String)> {
    let (key, rest) = string(written.trim_start().strip_prefix('{')?)?;
    let (name, rest) = string(rest.trim_start().strip_prefix(':')?)?;
    let arguments = || {
        let (key, rest) = string(rest.trim_start().strip_prefix(',')?)?;
        let rest = rest.trim_start().strip_prefix(':')?.trim_start();
        (key == "arguments" && rest.starts_with('{')).then(|| rest.to_owned())
    };
    (key == "name").then(|| (name, arguments().unwrap_or_default()))
}

/// The text of JSON that something begins with, and what comes behind it.
fn string(written: &str) -> Option<(String, &str)> {
    let mut strings = serde_json::Deserializer::from_str(written).into_iter::<String>();
    let string = strings.next()?.ok()?;
    Some((string, &written[strings.byte_offset()..]))
}

/// How many bytes at the end of a text may be the beginning of `mark`, with the blanks before it.
fn held_back(text: &str, mark: &str) -> usize {
    let begun = (1..mark.len()).rev().find(|&length| text.ends_with(&mark[..length])).unwrap_or(0);
    let before = &text[..text.len() - begun];
    begun + (before.len() - before.trim_end().len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn call(name: &str, arguments: &str) -> Said {
        Said::Call { name: name.to_owned(), arguments: arguments.to_owned() }
    }

    fn text(text: &str) -> Said {
        Said::Text(text.to_owned())
    }

    fn callable(names: &[&str]) -> Callable {
        Callable { names: names.iter().map(|&name| name.to_owned()).collect(), is_all: false }
    }

    /// What is said of an answer that comes in these pieces, with neighbouring texts as one.
    fn read(pieces: &[&str]) -> Vec<Said> {
        let mut reader = Reader::new(callable(&["a", "b"]));
        let mut all: Vec<Said> = Vec::new();
        for (number, piece) in pieces.iter().enumerate() {
            for said in reader.read(piece, (number + 1 == pieces.len()).then_some(FinishReason::End)) {
                match (all.last_mut(), said) {
                    (Some(Said::Text(before)), Said::Text(more)) => before.push_str(&more),
                    (_, said) => all.push(said),
                }
            }
        }
        all
    }

    const CASES: [&str; 9] = [
        "Hello <b> there.\n",
        "I look.\n<tool_call>\n{\"name\": \"a\", \"arguments\": {\"x\": \"</t\"}}\n</tool_call>",
        "<tool_call>{\"name\": \"a\"}</tool_call>\n<tool_call>\n{\"name\": \"b\", \"arguments\": {}}\n</tool_call>\n",
        "<tool_call>\n{\"name\": \"a\", \"arguments\": {}}",
        "<tool_call>{\"name\": \"c\", \"arguments\": {}}</tool_call>",
        "<tool_call>not JSON</tool_call> and more",
        "<tool_call>{\"name\": \"a\", \"argu",
        "<tool_call>{\"name\": \"a\", \"arguments\": [1]}</tool_call>",
        "a < b <tool",
    ];

    fn expected() -> [Vec<Said>; 9] {
        [
            vec![text(CASES[0])],
            vec![text("I look."), call("a", "{\"x\":\"</t\"}")],
            vec![call("a", "{}"), call("b", "{}")],
            vec![call("a", "{}")],
            vec![text(CASES[4])],
            vec![text(CASES[5])],
            vec![text(CASES[6])],
            vec![text(CASES[7])],
            vec![text(CASES[8])],
        ]
    }

    #[test]
    fn calls_are_told_from_text() {
        // Would break: an agent does not see a call, sees one of a tool that it does not have, or misses what the model said.
        for (case, expected) in CASES.iter().zip(expected()) {
            assert_eq!(read(&[case]), expected, "{case}");
        }
    }

    #[test]
    fn text_is_told_as_soon_as_it_is_no_call() {
        // Would break: a streamed answer comes only when it is whole.
        let mut reader = Reader::new(callable(&["a"]));
        assert_eq!(reader.read("Hello", None), [text("Hello")]);
        assert_eq!(reader.read(" <", None), []);
        assert_eq!(reader.read("b", None), [text(" <b")]);
        assert_eq!(reader.read(" <tool_call>{\"name\": \"a\"}</tool_call>", None), [call("a", "{}")]);
        assert_eq!((reader.read("\n", Some(FinishReason::End)), reader.calls()), (vec![], 1));
    }

    #[test]
    fn a_call_that_is_cut_is_a_call_with_what_there_is_of_its_arguments() {
        // Would break: an agent shows its user half a call as the model's words, where OpenAI's clients see a call that was cut.
        let cut = |written: &str, reason| {
            let mut reader = Reader::new(callable(&["a"]));
            let said = reader.read(&format!("<tool_call>\n{written}"), Some(reason));
            (said, reader.calls())
        };
        for (written, arguments) in [
            (r#"{"name": "a", "arguments": {"x": "y z"#, r#"{"x": "y z"#),
            (r#"{"name": "a", "arguments": {"#, "{"),
            (r#"{"name": "a", "argu"#, ""),
            (r#"{"name": "a""#, ""),
            // Only what ends it is missing, or half of that.
            (r#"{"name": "a", "arguments": {"x": 1}}"#, r#"{"x":1}"#),
            ("{\"name\": \"a\", \"arguments\": {\"x\": 1}}\n</tool_", r#"{"x":1}"#),
        ] {
            assert_eq!(cut(written, FinishReason::Length), (vec![call("a", arguments)], 1), "{written}");
        }
        for written in [r#"{"name": "a"#, r#"{"na"#, ""] {
            assert_eq!(cut(written, FinishReason::Length), (vec![], 0), "{written}");
        }
        for written in [r#"{"name": "other", "arguments": {"#, r#"{"call": "a", "x": "#, "no"] {
            let expected = (vec![text(&format!("<tool_call>\n{written}"))], 0);
            assert_eq!(cut(written, FinishReason::Length), expected, "{written}");
        }
        // A model that ends by itself in the middle of a call has said something else.
        let ended = r#"{"name": "a", "arguments": {"x": "#;
        assert_eq!(cut(ended, FinishReason::End), (vec![text(&format!("<tool_call>\n{ended}"))], 0));
    }

    #[test]
    fn of_an_answer_that_is_only_calls_no_cut_mark_is_shown() {
        // Would break: an agent that has the model call a tool shows its user `<tool_ca`.
        for mark in ["<", "<tool_ca", "\n<tool_call"] {
            let mut reader = Reader::new(Callable { is_all: true, ..callable(&["a"]) });
            assert_eq!(reader.read(mark, Some(FinishReason::Length)), []);
        }
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(case in 0usize..CASES.len(), cuts in prop::collection::btree_set(0usize..90, 0..12)) {
            // Would break: whether a call is seen depends on how the model's tokens cut it.
            let whole = CASES[case];
            let mut pieces = Vec::new();
            let mut from = 0;
            for cut in cuts.into_iter().filter(|cut| *cut < whole.len() && whole.is_char_boundary(*cut)) {
                pieces.push(&whole[from..cut]);
                from = cut;
            }
            pieces.push(&whole[from..]);
            prop_assert_eq!(read(&pieces), expected()[case].clone(), "{:?}", pieces);
        }
    }
}
