//! How a model wants a conversation written: the template of its checkpoint, in Jinja, rendered as transformers renders it.
//! It is in `chat_template.jinja`, or in `tokenizer_config.json` as a text or as the one called `default` of several. Used
//! by the OpenAI-compatible door and by `sida ask --chat`.
//!
//! A template is a program that came with the model: it is bounded in length, in steps and in what it writes.

use std::{
    collections::BTreeMap,
    error::Error as StdError,
    io::{self, Write},
    path::{Path, PathBuf},
};

use minijinja::{Environment, Error, ErrorKind};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::{ModelError, bounded_file, template_functions, tokenizer::TEXT_BYTES_MAX};

/// The template's own file.
const TEMPLATE_FILE: &str = "chat_template.jinja";
/// Where else it may be, and where the special tokens are that it writes.
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// The special tokens of checkpoints whose tokenizer config leaves them out.
const SPECIAL_TOKENS: &str = "special_tokens_map.json";
/// The longest of these that is read: a tokenizer config may list every added token.
const CONFIG_BYTES_MAX: u64 = 16 << 20;
/// The longest template: those of today have up to 20 KiB.
const TEMPLATE_BYTES_MAX: u64 = 1 << 20;
/// Steps of a template: a conversation of thousands of messages takes fewer, and so many take less than a second.
const STEPS_MAX: u64 = 5_000_000;
/// What the only template of an environment is called. A name without an extension escapes nothing.
const NAME: &str = "chat";
/// The special tokens that transformers gives a template.
const TOKENS: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// What templates are given that is more than a text: JSON whose fields keep their order, which is that of the prompts that
/// models were trained on.
pub type TemplateValue = minijinja::Value;
pub use minijinja::value::ValueKind;

/// How models of one form call a tool: its name and its arguments in JSON, between these.
pub const TOOL_CALL: [&str; 2] = ["<tool_call>", "</tool_call>"];

/// The template of a checkpoint.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// The special tokens by their names.
    tokens: BTreeMap<String, String>,
    calls_tools: bool,
}

/// One message of a conversation.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct ChatMessage {
    /// Who speaks, as `user`; which roles there are is up to the template.
    pub role: String,
    /// What is said; `None` where a message says nothing.
    pub content: Option<String>,
    /// Which of several that have the role.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The tools that an assistant called: a list of `{"type": "function", "function": {"name": .., "arguments": {..}}}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<TemplateValue>,
    /// Which of these calls a message of a tool answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// What an assistant thought before it said that, which is up to the template to write again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
}

/// Why a conversation cannot be written.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ChatError {
    /// The template says that it cannot have such a conversation.
    #[error("the model's chat template refuses the messages: {0}")]
    Refused(String),
    /// What it writes is longer than any prompt.
    #[error("the model's chat template writes more than {TEXT_BYTES_MAX} bytes")]
    TooLong,
    /// It goes on for too long.
    #[error("the model's chat template takes more than {STEPS_MAX} steps")]
    TooManySteps,
    /// It does what this engine does not know, or what is wrong in any.
    #[error("the model's chat template failed: {0}")]
    Failed(String),
}

/// What a template said by `raise_exception`.
#[derive(Debug, Error)]
#[error("{0}")]
pub(crate) struct Raised(pub(crate) String);

/// One of several templates of a tokenizer's config.
#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl ChatTemplate {
    /// The template of the checkpoint in `dir`; `None` if it has none.
    pub fn open(dir: &Path) -> Result<Option<Self>, ModelError> {
        let mut config = fields(&dir.join(TOKENIZER_CONFIG))?;
        let Some((path, source)) = source(dir, config.remove("chat_template"))? else { return Ok(None) };
        let mut tokens = special_tokens(fields(&dir.join(SPECIAL_TOKENS))?);
        tokens.extend(special_tokens(config));
        Self::of(source, tokens).map(Some).map_err(|error| ModelError::ChatTemplate { path, reason: told(&error) })
    }

    fn of(source: String, tokens: BTreeMap<String, String>) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(STEPS_MAX));
        template_functions::add_to(&mut environment);
        environment.add_template_owned(NAME, without_generation_tags(&source))?;
        let is_told_of_tools = environment.get_template(NAME)?.undeclared_variables(false).contains("tools");
        // Another form writes functions as elements between the same marks.
        let calls_tools = is_told_of_tools && source.contains(TOOL_CALL[0]) && !source.contains("<function=");
        Ok(Self { environment, tokens, calls_tools })
    }

    /// Whether the model is told of tools, and calls them by [`TOOL_CALL`].
    pub fn calls_tools(&self) -> bool {
        self.calls_tools
    }

    /// `messages` as the model's prompt, which is told of `tools` if there are any. It ends where the model's answer begins if
    /// `add_generation_prompt`. `variables` are what a request says to the template itself, as `enable_thinking`; they do not overrule what is passed here.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
        tools: &[TemplateValue],
        variables: &Map<String, Value>,
    ) -> Result<String, ChatError> {
        let theirs = variables.iter().map(|(name, value)| (name.as_str(), minijinja::Value::from_serialize(value)));
        let tokens = self.tokens.iter().map(|(name, token)| (name.as_str(), token.into()));
        let ours = [
            ("messages", minijinja::Value::from_serialize(messages)),
            ("add_generation_prompt", add_generation_prompt.into()),
            ("tools", if tools.is_empty() { ().into() } else { tools.to_vec().into() }),
            ("documents", ().into()),
        ];
        let context: BTreeMap<&str, minijinja::Value> = theirs.chain(tokens).chain(ours).collect();
        let template = self.environment.get_template(NAME).map_err(|error| ChatError::Failed(told(&error)))?;
        let mut written = Bounded::default();
        template.render_captured_to(context, &mut written).map_err(|error| failure(&error, written.is_full))?;
        String::from_utf8(written.bytes).map_err(|error| ChatError::Failed(error.to_string()))
    }
}

/// The template and the file that it is in.
fn source(dir: &Path, of_config: Option<Value>) -> Result<Option<(PathBuf, String)>, ModelError> {
    let path = dir.join(TEMPLATE_FILE);
    if exists(&path)? {
        let bytes = bounded_file::read(&path, TEMPLATE_BYTES_MAX)?;
        let source = String::from_utf8(bytes)
            .map_err(|error| ModelError::ChatTemplate { path: path.clone(), reason: error.to_string() })?;
        return Ok(Some((path, source)));
    }
    let path = dir.join(TOKENIZER_CONFIG);
    let refused = |reason| ModelError::ChatTemplate { path: path.clone(), reason };
    let source = match of_config {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(source)) => source,
        Some(several) => {
            let several = serde_json::from_value::<Vec<NamedTemplate>>(several);
            let expected = "chat_template should be a text, or a list of templates with names";
            let templates = several.map_err(|error| refused(format!("{expected}: {error}")))?;
            let names: Vec<String> = templates.iter().map(|template| template.name.clone()).collect();
            let default = templates.into_iter().find(|template| template.name == "default");
            let reason = || format!("chat_template holds {}, and none is called default", names.join(", "));
            default.ok_or_else(|| refused(reason()))?.template
        }
    };
    if source.len() as u64 > TEMPLATE_BYTES_MAX {
        return Err(ModelError::FileTooLarge { path, bytes: source.len() as u64, limit: TEMPLATE_BYTES_MAX });
    }
    Ok(Some((path, source)))
}

fn exists(path: &Path) -> Result<bool, ModelError> {
    path.try_exists().map_err(|source| ModelError::Read { path: path.to_owned(), source })
}

/// The fields of a JSON file; none if there is no such file.
fn fields(path: &Path) -> Result<Map<String, Value>, ModelError> {
    if exists(path)? { bounded_file::read_json(path, CONFIG_BYTES_MAX) } else { Ok(Map::new()) }
}

/// The special tokens among the fields of a config: a text, or an object with the text as `content`.
fn special_tokens(mut fields: Map<String, Value>) -> BTreeMap<String, String> {
    let text = |value: Value| match value {
        Value::String(text) => Some(text),
        Value::Object(mut token) => token.remove("content")?.as_str().map(str::to_owned),
        _ => None,
    };
    TOKENS.iter().filter_map(|name| Some(((*name).to_owned(), text(fields.remove(*name)?)?))).collect()
}

/// `source` with the tags that mark what an assistant said, which only training asks for, made tags that do nothing.
fn without_generation_tags(source: &str) -> String {
    let mut kept = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, after)) = rest.split_once("{%") {
        let Some((tag, behind)) = after.split_once("%}") else { break };
        let name = tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let tag = match name {
            "generation" => tag.replace(name, "if true"),
            "endgeneration" => tag.replace(name, "endif"),
            _ => tag.to_owned(),
        };
        kept.extend([before, "{%", &tag, "%}"]);
        rest = behind;
    }
    kept + rest
}

/// Text up to the length of the longest prompt.
#[derive(Default)]
struct Bounded {
    bytes: Vec<u8>,
    is_full: bool,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > TEXT_BYTES_MAX {
            self.is_full = true;
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn failure(error: &Error, is_full: bool) -> ChatError {
    let mut causes = std::iter::successors(Some(error as &dyn StdError), |&cause| cause.source());
    if let Some(raised) = causes.find_map(|cause| cause.downcast_ref::<Raised>()) {
        return ChatError::Refused(raised.0.clone());
    }
    match error.kind() {
        _ if is_full => ChatError::TooLong,
        ErrorKind::OutOfFuel => ChatError::TooManySteps,
        _ => ChatError::Failed(told(error)),
    }
}

/// An error with its line, and what caused it.
fn told(error: &Error) -> String {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes.fold(error.to_string(), |told, cause| format!("{told}: {cause}"))
}

#[cfg(test)]
#[path = "chat_template/tests.rs"]
mod tests;
