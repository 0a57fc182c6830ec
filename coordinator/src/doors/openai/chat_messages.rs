//! The messages of a conversation, as `/v1/chat/completions` and `/tokenize` take them: texts, or lists of text parts, each said
//! in a role; calls of tools, and what these answered. What this door cannot read to a model (images) is refused by name.

use serde::Serialize;
use serde_json::Value;
use sida_model::{ChatMessage, TemplateValue, chat_template::ValueKind};

use crate::doors::openai::{door::Door, error::ApiError, fields::Fields, tools};

/// Messages of one conversation at most.
const MESSAGES_MAX: usize = 4096;
/// Who may speak. What a template makes of them is up to it.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];
const ROLES_EXPECTED: &str = "system, developer, user, assistant or tool";
const OLD_FUNCTIONS: &str = "it is the older form of tools: say tools and tool_calls";
/// What an assistant's message may carry that says nothing.
const EMPTY_EXTRAS: [&str; 3] = ["refusal", "annotations", "audio"];

/// A conversation, and what its template is told beside it.
pub(crate) struct Conversation {
    messages: Vec<ChatMessage>,
    add_generation_prompt: bool,
    variables: serde_json::Map<String, Value>,
}

impl Conversation {
    /// Takes the fields that a conversation has; `None` if there are no messages.
    pub(crate) fn read(fields: &mut Fields) -> Result<Option<Self>, ApiError> {
        let variables =
            fields.read("chat_template_kwargs", "an object", |value| value.as_object().cloned())?.unwrap_or_default();
        let add_generation_prompt = fields.flag("add_generation_prompt")?.unwrap_or(true);
        let Some(messages) = fields.read("messages", "a list of messages", |value| value.as_array().cloned())? else {
            return Ok(None);
        };
        if !(1..=MESSAGES_MAX).contains(&messages.len()) {
            let found = format!("a list of {}", messages.len());
            return Err(ApiError::field("messages", found, format!("1 to {MESSAGES_MAX}")));
        }
        let mut open_calls = Vec::new();
        let message = |(number, value): (usize, Value)| {
            message(Fields::of(value, &format!("messages[{number}]"))?, &mut open_calls)
        };
        let messages = messages.into_iter().enumerate().map(message).collect::<Result<_, _>>()?;
        Ok(Some(Self { messages, add_generation_prompt, variables }))
    }

    /// The text that the model is to read, as its template writes it with what it tells of `tools`.
    pub(crate) fn written(&self, door: &Door, tools: &[TemplateValue]) -> Result<String, ApiError> {
        let template = match &door.template {
            Ok(Some(template)) => template,
            Ok(None) => {
                let message = format!(
                    "the model {} has no chat template: neither chat_template.jinja nor chat_template in \
                     tokenizer_config.json is among its files; ask /v1/completions",
                    door.model()
                );
                return Err(ApiError::unable("no_chat_template", message));
            }
            Err(error) => return Err(ApiError::unable("chat_template_unusable", error.clone())),
        };
        let written = template.render(&self.messages, self.add_generation_prompt, tools, &self.variables);
        // Even one that fails may have others: it is these messages that it cannot write.
        written.map_err(|error| ApiError::field_because("messages", error.to_string()))
    }
}

/// A message. `open_calls` are the ids of the calls that it may answer: those of the assistant's message before it, from which only
/// other answers part it.
fn message(mut fields: Fields, open_calls: &mut Vec<String>) -> Result<ChatMessage, ApiError> {
    let role = fields.text("role")?.ok_or_else(|| ApiError::missing(fields.name("role"), ROLES_EXPECTED))?;
    match role.as_str() {
        "function" => return Err(ApiError::unsupported(fields.name("role"), OLD_FUNCTIONS)),
        known if ROLES.contains(&known) => {}
        other => return Err(ApiError::field(fields.name("role"), other, ROLES_EXPECTED)),
    }
    fields.refuse("function_call", OLD_FUNCTIONS, |_| false)?;
    let (tool_calls, tool_call_id) = match role.as_str() {
        "tool" => (None, Some(answered(&mut fields, open_calls)?)),
        role => {
            open_calls.clear();
            (if role == "assistant" { called(&mut fields, open_calls)? } else { None }, None)
        }
    };
    for field in EMPTY_EXTRAS {
        fields
            .refuse(field, "only texts are read", |value| value == "" || value.as_array().is_some_and(Vec::is_empty))?;
    }
    let reasoning_content = fields.text("reasoning_content")?.filter(|thought| !thought.is_empty());
    if reasoning_content.is_some() && role != "assistant" {
        return Err(ApiError::unsupported(fields.name("reasoning_content"), "only an assistant's thoughts are read"));
    }
    let (name, at) = (fields.text("name")?, fields.name("content"));
    let content = match fields.value("content") {
        Some(content) => Some(text(content, &at)?),
        None if tool_calls.is_some() => None,
        None if role == "assistant" => {
            return Err(ApiError::missing(at, "a text or a list of text parts, or calls in tool_calls"));
        }
        None => return Err(ApiError::missing(at, "a text or a list of text parts")),
    };
    fields.end()?;
    Ok(ChatMessage { role, content, name, tool_calls, tool_call_id, reasoning_content })
}

/// A call of a tool, as templates know it.
#[derive(Serialize)]
struct Call {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "type")]
    kind: &'static str,
    function: Function,
}

#[derive(Serialize)]
struct Function {
    name: String,
    /// The object that was written, in the order of its fields; or the text, where it is none.
    arguments: TemplateValue,
}

/// Takes the id of the call that a tool has answered.
fn answered(fields: &mut Fields, open_calls: &mut Vec<String>) -> Result<String, ApiError> {
    let at = fields.name("tool_call_id");
    let expected =
        "the id of a call in tool_calls of the assistant's message before it, of which each is answered once";
    let Some(id) = fields.text("tool_call_id")? else { return Err(ApiError::missing(at, expected)) };
    match open_calls.iter().position(|open| *open == id) {
        Some(place) => Ok(open_calls.swap_remove(place)),
        None => Err(ApiError::field(at, id, expected)),
    }
}

/// Takes what an assistant has called; `None` if nothing. The ids are added to `open_calls`.
fn called(fields: &mut Fields, open_calls: &mut Vec<String>) -> Result<Option<TemplateValue>, ApiError> {
    let at = fields.name("tool_calls");
    let calls = fields.read("tool_calls", "a list of calls", |value| value.as_array().cloned())?.unwrap_or_default();
    let call = |(number, value): (usize, Value)| {
        let mut call = Fields::of(value, &format!("{at}[{number}]"))?;
        let (id, kind) = (call.text("id")?, call.text("type")?);
        if let Some(id) = &id {
            if id.is_empty() || open_calls.contains(id) {
                return Err(ApiError::field(
                    call.name("id"),
                    id.as_str(),
                    "an id that no other call of the message has",
                ));
            }
            open_calls.push(id.clone());
        }
        // A call that came in a stream has its place.
        call.count("index")?;
        if kind.as_deref().is_some_and(|kind| kind != "function") {
            return Err(ApiError::unsupported(call.name("type"), "only functions are called"));
        }
        let function = call.value("function").ok_or_else(|| ApiError::missing(call.name("function"), "an object"))?;
        let mut function = Fields::of(function, &call.name("function"))?;
        call.end()?;
        let name = tools::name(&mut function)?;
        let text = function.text("arguments")?.unwrap_or_else(|| "{}".to_owned());
        function.end()?;
        let read = serde_json::from_str::<TemplateValue>(&text).ok();
        let arguments = read.filter(|value| value.kind() == ValueKind::Map).unwrap_or_else(|| text.into());
        Ok(Call { id, kind: "function", function: Function { name, arguments } })
    };
    let calls = calls.into_iter().enumerate().map(call).collect::<Result<Vec<_>, _>>()?;
    Ok((!calls.is_empty()).then(|| TemplateValue::from_serialize(&calls)))
}

/// A text, or the texts of its parts, a line each.
fn text(content: Value, at: &str) -> Result<String, ApiError> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        other => return Err(ApiError::field(at, other, "a text or a list of text parts")),
    };
    let part = |(number, part): (usize, Value)| {
        let mut fields = Fields::of(part, &format!("{at}[{number}]"))?;
        let kind = fields.text("type")?.ok_or_else(|| ApiError::missing(fields.name("type"), "text"))?;
        if kind != "text" {
            return Err(ApiError::unsupported(fields.name("type"), format!("{kind}: only texts are read")));
        }
        let text = fields.text("text")?.ok_or_else(|| ApiError::missing(fields.name("text"), "a text"))?;
        fields.end()?;
        Ok(text)
    };
    Ok(parts.into_iter().enumerate().map(part).collect::<Result<Vec<_>, _>>()?.join("\n"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(messages: Value) -> Result<Vec<ChatMessage>, ApiError> {
        let mut fields = Fields::of(json!({"messages": messages}), "")?;
        Ok(Conversation::read(&mut fields)?.expect("messages").messages)
    }

    #[test]
    fn contents_are_texts_or_text_parts() {
        // Would break: what an application says in parts is not said to the model, or only its first part is.
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let messages = read(json!([
            {"role": "user", "content": parts, "name": "Ada"},
            {"role": "assistant", "content": "", "refusal": null, "tool_calls": [], "annotations": []},
        ]))
        .unwrap();
        assert_eq!(messages[0].content.as_deref(), Some("a\nb"));
        assert_eq!((messages[0].name.as_deref(), messages[1].content.as_deref()), (Some("Ada"), Some("")));
    }

    #[test]
    fn thoughts_are_an_assistants() {
        // Would break: a conversation with a model that thinks cannot be sent back as it came, or users think for it.
        let said = |role: &str| json!([{"role": role, "content": "4", "reasoning_content": "2 + 2"}]);
        assert_eq!(read(said("assistant")).unwrap()[0].reasoning_content.as_deref(), Some("2 + 2"));
        let error = read(said("user")).unwrap_err().json();
        assert_eq!(error["error"]["param"], "messages[0].reasoning_content");
    }

    #[test]
    fn calls_are_given_to_templates_as_transformers_does() {
        // Would break: what a model called before is shown to it in another form than it was trained on.
        let function = json!({"name": "f", "arguments": "{\"z\": 1, \"a\": [2]}"});
        let messages = read(json!([
            {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function", "function": function}]},
            {"role": "tool", "content": "7", "tool_call_id": "1"},
            {"role": "assistant", "tool_calls": [{"index": 0, "function": {"name": "f", "arguments": "not JSON"}}]},
        ]))
        .unwrap();
        let call = |message: &ChatMessage| serde_json::to_string(message.tool_calls.as_ref().unwrap()).unwrap();
        assert_eq!(
            call(&messages[0]),
            r#"[{"id":"1","type":"function","function":{"name":"f","arguments":{"z":1,"a":[2]}}}]"#
        );
        assert_eq!(messages[1].tool_call_id.as_deref(), Some("1"));
        assert_eq!(call(&messages[2]), r#"[{"type":"function","function":{"name":"f","arguments":"not JSON"}}]"#);
    }

    fn calls(ids: &[&str]) -> Value {
        let call = |id: &&str| json!({"id": id, "type": "function", "function": {"name": "f"}});
        json!({"role": "assistant", "tool_calls": ids.iter().map(call).collect::<Vec<_>>()})
    }

    #[test]
    fn tools_answer_the_calls_that_were_made() {
        // Would break: an agent that mixes up its answers is not told, and the model reads that one tool said what another did.
        let answer = |id: &str| json!({"role": "tool", "tool_call_id": id, "content": "7"});
        let user = json!({"role": "user", "content": "Hi"});
        let several = json!([calls(&["1", "2"]), answer("2"), answer("1"), user, calls(&["3"]), answer("3")]);
        assert_eq!(read(several).unwrap().len(), 6);
        for (messages, param) in [
            (json!([calls(&["1"]), {"role": "tool", "content": "7"}]), "messages[1].tool_call_id"),
            (json!([user, answer("1")]), "messages[1].tool_call_id"),
            (json!([calls(&["1"]), answer("2")]), "messages[1].tool_call_id"),
            // Somebody spoke in between.
            (json!([calls(&["1"]), user, answer("1")]), "messages[2].tool_call_id"),
            (json!([calls(&["1"]), calls(&["2"]), answer("1")]), "messages[2].tool_call_id"),
            // It is answered already.
            (json!([calls(&["1"]), answer("1"), answer("1")]), "messages[2].tool_call_id"),
            (json!([calls(&["1", "1"])]), "messages[0].tool_calls[1].id"),
            (json!([calls(&[""])]), "messages[0].tool_calls[0].id"),
        ] {
            assert_eq!(read(messages.clone()).unwrap_err().json()["error"]["param"], param, "{messages}");
        }
    }

    #[test]
    fn what_cannot_be_read_to_the_model_is_refused_by_its_place() {
        // Would break: an image is left out of what the model sees, and the answer is about nothing.
        let user = |content: Value| json!([{"role": "user", "content": content}]);
        for (messages, param) in [
            (json!([]), "messages"),
            (json!("Hi"), "messages"),
            (json!(["Hi"]), "messages[0]"),
            (json!([{"content": "Hi"}]), "messages[0].role"),
            (json!([{"role": "owner", "content": "Hi"}]), "messages[0].role"),
            (json!([{"role": "function", "content": "7", "name": "f"}]), "messages[0].role"),
            (json!([calls(&["1"]), {"role": "tool", "tool_call_id": "1"}]), "messages[1].content"),
            (json!([{"role": "assistant", "content": null}]), "messages[0].content"),
            (json!([{"role": "assistant", "tool_calls": []}]), "messages[0].content"),
            (json!([{"role": "user", "content": "a", "tool_call_id": "1"}]), "messages[0].tool_call_id"),
            (json!([{"role": "assistant", "tool_calls": [{"id": "1"}]}]), "messages[0].tool_calls[0].function"),
            (
                json!([{"role": "assistant", "tool_calls": [{"function": {"name": "</tool_call>"}}]}]),
                "messages[0].tool_calls[0].function.name",
            ),
            (json!([{"role": "user"}]), "messages[0].content"),
            (user(json!(7)), "messages[0].content"),
            (user(json!([{"type": "image_url", "image_url": {"url": "x"}}])), "messages[0].content[0].type"),
            (user(json!([{"type": "text"}])), "messages[0].content[0].text"),
            (user(json!([{"type": "text", "text": "a", "mood": "b"}])), "messages[0].content[0].mood"),
            (json!([{"role": "user", "content": "a", "weight": 1}]), "messages[0].weight"),
        ] {
            assert_eq!(read(messages.clone()).unwrap_err().json()["error"]["param"], param, "{messages}");
        }
    }
}
