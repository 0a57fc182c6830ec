//! What is asked about a line of data: a prompt, and either choices of which one is right, or the text that should follow.
//! The paper's tasks are known by name; others are told by flags.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::{
    bad_configuration::BadConfiguration,
    commands::eval::{
        data_file,
        record::{Place, Record},
        span_corruption,
        template::Template,
    },
};

/// More choices cannot be scored by one request.
const CHOICES_MAX: usize = 64;

/// Tasks whose files and prompts are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum TaskName {
    /// GLUE's SST-2, a table with the columns sentence and label
    Sst2,
    /// The Microsoft Research Paraphrase Corpus, a table with the columns Quality, #1 String and #2 String
    Mrpc,
    /// SuperGLUE's MultiRC, an object a passage: each answer of each question is an example
    Multirc,
    /// T5's span corruption of the text of --template: its perplexity
    Spans,
}

/// Which data, and how it is asked.
#[derive(Args, Clone, Debug)]
pub(crate) struct TaskArguments {
    /// Labelled data: tables with a header and tabs between columns, or JSON, an object a line
    #[arg(long, value_name = "FILE", required_unless_present = "routes", num_args = 1..)]
    data: Vec<PathBuf>,
    /// A task of the paper, in place of the flags that say what a line means: those that are given go first
    #[arg(long, value_enum)]
    task: Option<TaskName>,
    /// The prompt, with {field} for a column of a table or a path into an object, as {passage.text} [default: {text}]
    #[arg(long, value_name = "TEXT")]
    template: Option<Template>,
    /// What may be answered; the likeliest is the answer [default: the list in the field `choices`]
    #[arg(long, value_name = "TEXTS", value_delimiter = ',')]
    choices: Vec<String>,
    /// The field of the right choice: its text, or its number from 0 [default: label]
    #[arg(long, value_name = "FIELD")]
    label: Option<String>,
    /// The field of the text that should follow, for perplexity [default: target, of lines that have it]
    #[arg(long, value_name = "FIELD", conflicts_with_all = ["choices", "label"])]
    target: Option<String>,
    /// Cut longer prompts to so many tokens, of which an end of sequence stays the last; 0: refuse what the model does not
    /// take [default: that of --task, or 0]
    #[arg(long, value_name = "N")]
    prompt_tokens_max: Option<usize>,
    /// Use only so many examples from the beginning; 0: all
    #[arg(long, value_name = "N", default_value_t = 0)]
    examples: usize,
    /// For --task spans: other words are hidden. With --routes: other experts are guessed wrong
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) seed: u64,
}

/// What is asked, and what should come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Example {
    pub(crate) place: Place,
    pub(crate) prompt: String,
    pub(crate) wanted: Wanted,
}

/// What should come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// One of these; the right one, counted from 0.
    Choice(Vec<String>, usize),
    /// This text.
    Target(String),
}

impl Wanted {
    /// The texts whose likelihood is asked for.
    pub(crate) fn targets(&self) -> Vec<String> {
        match self {
            Self::Choice(choices, _) => choices.clone(),
            Self::Target(target) => vec![target.clone()],
        }
    }
}

/// What a line means.
#[derive(Clone, Debug)]
pub(crate) struct Task {
    template: Template,
    wants: Wants,
    /// Prompts of more tokens are cut.
    pub(crate) prompt_tokens_max: Option<usize>,
}

/// Where the answer is.
#[derive(Clone, Debug)]
enum Wants {
    /// These choices; the field of the right one.
    Choice { choices: Vec<String>, label: String },
    /// The field of the text that follows.
    Target(String),
    /// A target where the line has one, or else choices of its own.
    AsGiven { label: String },
    /// What span corruption hides.
    Spans { seed: u64 },
}

/// The field of a line's choices, where no flag gives them.
const CHOICES: &str = "choices";
/// The field of the text that follows, if no flag names another.
const TARGET: &str = "target";

impl TaskArguments {
    /// The task that the flags describe.
    pub(crate) fn task(&self) -> Result<Task, BadConfiguration> {
        let (template, choices, label, tokens_max) = match self.task {
            None => ("{text}", &[][..], "label", 0),
            Some(TaskName::Sst2) => ("sst2 sentence: {sentence}", &["negative", "positive"][..], "label", 80),
            Some(TaskName::Mrpc) => (
                "mrpc sentence1: {#1 String} sentence2: {#2 String}",
                &["not_equivalent", "equivalent"][..],
                "Quality",
                128,
            ),
            Some(TaskName::Multirc) => (
                "multirc question: {passage.questions.question} answer: {passage.questions.answers.text} paragraph: {passage.text}",
                &["False", "True"][..],
                "passage.questions.answers.label",
                256,
            ),
            Some(TaskName::Spans) => ("{text}", &[][..], "label", 0),
        };
        let template = self.template.clone().map_or_else(|| template.parse(), Ok).map_err(BadConfiguration::new)?;
        let label = self.label.clone().unwrap_or_else(|| label.to_owned());
        let choices = match self.choices.as_slice() {
            [] => choices.iter().map(|&choice| choice.to_owned()).collect(),
            given => check_choices(given).map(|()| given.to_vec()).map_err(|problem| {
                BadConfiguration::new(format!("--choices are {}, expected {problem}", given.join(",")))
            })?,
        };
        let wants = match (self.task, &self.target) {
            (Some(TaskName::Spans), None) if self.choices.is_empty() => Wants::Spans { seed: self.seed },
            (Some(TaskName::Spans), _) => {
                return Err(BadConfiguration::new(
                    "--task spans has answers of its own: leave out --choices and --target",
                ));
            }
            (_, Some(target)) => Wants::Target(target.clone()),
            (None, None) if choices.is_empty() => Wants::AsGiven { label },
            _ => Wants::Choice { choices, label },
        };
        let prompt_tokens_max = Some(self.prompt_tokens_max.unwrap_or(tokens_max)).filter(|&tokens| tokens > 0);
        Ok(Task { template, wants, prompt_tokens_max })
    }

    /// The examples, in the order of the files.
    pub(crate) fn examples(&self, task: &Task) -> Result<Vec<Example>, BadConfiguration> {
        let most = if self.examples == 0 { usize::MAX } else { self.examples };
        let mut examples = Vec::new();
        for file in &self.data {
            if examples.len() >= most {
                break;
            }
            for record in data_file::read(file, &task.fields(), most - examples.len())? {
                examples.extend(task.example(&record, examples.len() as u64)?);
            }
        }
        match examples.is_empty() {
            // Files without a single line were refused before.
            true => Err(BadConfiguration::new(format!(
                "no text has the {} words of which some can be hidden",
                span_corruption::WORDS_MIN
            ))),
            false => Ok(examples),
        }
    }

    /// What was asked for, as the report repeats it.
    pub(crate) fn parameters(&self, task: &Task) -> serde_json::Value {
        serde_json::json!({
            "data": self.data.iter().map(|file| file.display().to_string()).collect::<Vec<_>>(),
            "task": self.task,
            "template": task.template.to_string(),
            "prompt_tokens_max": task.prompt_tokens_max,
        })
    }
}

fn check_choices(choices: &[String]) -> Result<(), String> {
    let are_told_apart = choices.iter().enumerate().all(|(at, choice)| !choices[..at].contains(choice));
    let is_fine = (2..=CHOICES_MAX).contains(&choices.len()) && are_told_apart;
    let is_full = choices.iter().all(|choice| !choice.trim().is_empty());
    if is_fine && is_full { Ok(()) } else { Err(format!("2 to {CHOICES_MAX} different texts, none empty")) }
}

impl Task {
    /// The fields that lines are asked for.
    fn fields(&self) -> Vec<&str> {
        let more = match &self.wants {
            Wants::Choice { label, .. } => vec![label.as_str()],
            Wants::Target(target) => vec![target.as_str()],
            Wants::AsGiven { label } => vec![TARGET, CHOICES, label],
            Wants::Spans { .. } => Vec::new(),
        };
        self.template.fields().chain(more).collect()
    }

    /// What a line asks, as the example of this number; `None` where a text is too short for words of it to be hidden.
    fn example(&self, record: &Record, number: u64) -> Result<Option<Example>, BadConfiguration> {
        let prompt = self.template.fill(|field| record.text(field))?;
        let example = |prompt, wanted| Ok(Some(Example { place: record.place.clone(), prompt, wanted }));
        match &self.wants {
            Wants::Target(target) => example(prompt, Wanted::Target(record.text(target)?)),
            Wants::AsGiven { .. } if record.has(TARGET) => example(prompt, Wanted::Target(record.text(TARGET)?)),
            Wants::AsGiven { label } => example(prompt, choice(record, record.texts(CHOICES)?, label)?),
            Wants::Choice { choices, label } => example(prompt, choice(record, choices.clone(), label)?),
            Wants::Spans { seed } => match span_corruption::corrupt(&prompt, seed.wrapping_add(number)) {
                Some((shown, hidden)) => example(shown, Wanted::Target(hidden)),
                None => Ok(None),
            },
        }
    }
}

/// The choices, and which of them the field of a record says is right.
fn choice(record: &Record, choices: Vec<String>, label: &str) -> Result<Wanted, BadConfiguration> {
    check_choices(&choices).map_err(|expected| record.place.refuse(CHOICES, format!("{choices:?}"), expected))?;
    let found = record.text(label)?;
    let named = choices.iter().position(|choice| *choice == found);
    let numbered = || found.parse().ok().filter(|&number| number < choices.len());
    match named.or_else(numbered) {
        Some(right) => Ok(Wanted::Choice(choices, right)),
        None => {
            let expected = format!("one of {}, or its number, 0 to {}", choices.join(", "), choices.len() - 1);
            Err(record.place.refuse(label, found, expected))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        task: TaskArguments,
    }

    /// The examples that a file of this content gives with these flags.
    fn examples(content: &str, flags: &[&str]) -> Result<Vec<(String, Wanted)>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), content).unwrap();
        let path = file.path().to_str().unwrap();
        let line = Line::try_parse_from([&["eval", "--data", path], flags].concat()).map_err(|e| e.to_string())?;
        let found = line.task.task().and_then(|task| line.task.examples(&task));
        let found = found.map_err(|error| error.to_string().replace(path, "data"))?;
        Ok(found.into_iter().map(|example| (example.prompt, example.wanted)).collect())
    }

    fn choice(choices: [&str; 2], right: usize) -> Wanted {
        Wanted::Choice(choices.map(str::to_owned).to_vec(), right)
    }

    #[test]
    fn the_papers_tasks_are_known_by_name() {
        // Would break: a data set as it is published needs work before it can be asked, or is asked otherwise than the
        // model was trained.
        let sst2 = examples("sentence\tlabel\na fine film . \t1\ndull\t0\n", &["--task", "sst2"]);
        let sentiment = |right| choice(["negative", "positive"], right);
        let expected = [("sst2 sentence: a fine film .", sentiment(1)), ("sst2 sentence: dull", sentiment(0))];
        assert_eq!(sst2.unwrap(), expected.map(|(prompt, wanted)| (prompt.to_owned(), wanted)));
        let mrpc = "\u{feff}Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\t\"A says.\tB \"says\".\r\n";
        let expected = "mrpc sentence1: \"A says. sentence2: B \"says\".".to_owned();
        let wanted = choice(["not_equivalent", "equivalent"], 1);
        assert_eq!(examples(mrpc, &["--task", "mrpc"]).unwrap(), [(expected, wanted)]);
        let multirc =
            r#"{"passage": {"text": "P.", "questions": [{"question": "Q?", "answers": [{"text": "A", "label": 0}]}]}}"#;
        let expected = "multirc question: Q? answer: A paragraph: P.".to_owned();
        assert_eq!(examples(multirc, &["--task", "multirc"]).unwrap(), [(expected, choice(["False", "True"], 0))]);
        let spans = examples("text\none two three four five six seven\n\nshort\n", &["--task", "spans"]).unwrap();
        let [(shown, Wanted::Target(hidden))] = &spans[..] else { panic!("{spans:?}") };
        assert!(shown.contains("<extra_id_0>") && hidden.starts_with("<extra_id_0> "), "{spans:?}");
    }

    #[test]
    fn lines_say_themselves_what_is_wanted() {
        // Would break: data of one's own needs flags that repeat what it says.
        let lines = r#"{"text": "t1", "target": "x"}
            {"text": "t2", "choices": ["1", "0"], "label": 0}
            {"text": "t3", "choices": ["a", "b"], "label": "b"}"#;
        // A label that is the text of a choice is that choice, whatever its number is.
        let expected =
            [("t1", Wanted::Target("x".into())), ("t2", choice(["1", "0"], 1)), ("t3", choice(["a", "b"], 1))];
        let expected = expected.map(|(prompt, wanted)| (prompt.to_owned(), wanted));
        assert_eq!(examples(lines, &[]).unwrap(), expected);
        assert_eq!(examples(lines, &["--examples", "1"]).unwrap(), expected[..1]);
        let target = examples("a\tb\nx\ty\n", &["--template", "say {a}", "--target", "b"]);
        assert_eq!(target.unwrap(), [("say x".to_owned(), Wanted::Target("y".into()))]);
        let other = examples("s\tc\nx\t1\n", &["--task", "sst2", "--template", "{s}", "--label", "c"]);
        assert_eq!(other.unwrap(), [("x".to_owned(), choice(["negative", "positive"], 1))]);
    }

    #[test]
    fn lines_that_do_not_fit_are_refused_with_their_place() {
        // Would break: accuracy is counted over wrong labels, or the error leaves the line to be searched for.
        let sst2: &[&str] = &["--task", "sst2"];
        for (content, flags, told) in [
            ("sentence\tlabel\nx\t2\n", sst2, "data line 2, field label: found 2, expected one of negative, positive"),
            ("sentence\tlabel\nx\t-1\n", sst2, "field label: found -1"),
            ("sentence\tlabel\nx\t\n", sst2, "data line 2, field label: found an empty text"),
            ("sentence\tlabel\n \t1\n", sst2, "data line 2, field sentence: found an empty text"),
            ("text\tlabel\nx\t1\n", sst2, "field sentence: found no such field, expected one of label, text"),
            ("text\tlabel\nx\t1\n", &[], "data line 2, field choices: found no such field"),
            (r#"{"text": "x", "choices": ["a"], "label": 0}"#, &[], "field choices: found [\"a\"], expected 2 to 64"),
            (r#"{"text": "x", "choices": ["a", "a"], "label": 0}"#, &[], "expected 2 to 64 different texts"),
            (r#"{"text": "x", "choices": "ab", "label": 0}"#, &[], "field choices: found a text, expected a list"),
            (r#"{"text": "x", "target": ["a"]}"#, &[], "data line 1, field target: found a list, expected a text"),
            (r#"{"text": "x"}"#, &["--choices", "a"], "--choices are a, expected 2 to 64"),
            (r#"{"text": "x"}"#, &["--choices", "a,b", "--task", "spans"], "--task spans has answers of its own"),
            (r#"{"text": "x"}"#, &["--task", "spans"], "no text has the 6 words"),
            (r#"{"text": "x"}"#, &["--template", "text"], "no field, expected one as {text}"),
        ] {
            let refused = examples(content, flags).unwrap_err();
            assert!(refused.contains(told), "{content}: {refused}");
        }
    }
}
