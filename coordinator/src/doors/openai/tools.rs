//! The fields by which a chat is given tools: `tools`, `tool_choice`, `parallel_tool_calls`. The model is told of tools by its
//! template; how it calls them is read by [`crate::doors::openai::tool_calls`].

use serde::Deserialize;
use serde_json::{Value, json};
use sida_model::{TemplateValue, chat_template::TOOL_CALL};

use crate::{
    answer::grammar::ToolCalls,
    doors::openai::{door::Door, error::ApiError, fields::Fields, sampling::Wanted, tool_calls::Callable},
};

/// Tools of a request, and characters of a name, at most: as many as OpenAI takes.
const TOOLS_MAX: usize = 128;
const NAME_CHARS_MAX: usize = 64;
const CHOICES: &str = "none, auto, required, or {\"type\": \"function\", \"function\": {\"name\": NAME}}";

/// The tools that a model may call.
pub(crate) struct Tools {
    /// As the template is given them: in the order of fields in which they came.
    pub(crate) shown: Vec<TemplateValue>,
    /// The name of each, and the schema of its arguments.
    known: Vec<(String, Value)>,
    choice: Choice,
    several: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Choice {
    Auto,
    Required,
    Named(String),
}

impl Tools {
    /// Takes the fields of a request, of which `body` is the text. `None`: no tool may be called, and the model is told of none.
    pub(crate) fn read(fields: &mut Fields, body: &[u8]) -> Result<Option<Self>, ApiError> {
        let tools = fields.read("tools", "a list of tools", |value| value.as_array().cloned())?.unwrap_or_default();
        let choice = fields.value("tool_choice");
        let several = fields.flag("parallel_tool_calls")?.unwrap_or(true);
        if tools.len() > TOOLS_MAX {
            return Err(ApiError::field("tools", format!("a list of {}", tools.len()), format!("at most {TOOLS_MAX}")));
        }
        let known = tools.into_iter().enumerate().map(|(number, tool)| function(tool, &format!("tools[{number}]")));
        let known = known.collect::<Result<Vec<_>, _>>()?;
        for (number, (name, _)) in known.iter().enumerate() {
            if known[..number].iter().any(|(other, _)| other == name) {
                let at = format!("tools[{number}].function.name");
                return Err(ApiError::field(at, name.as_str(), "a name that no other tool has"));
            }
        }
        let Some(choice) = chosen(choice, &known)? else { return Ok(None) };
        Ok((!known.is_empty()).then(|| Self { shown: ordered(body), known, choice, several }))
    }

    /// Says that the model cannot be told of tools, if so.
    pub(crate) fn check(&self, door: &Door) -> Result<(), ApiError> {
        match &door.template {
            Ok(Some(template)) if !template.calls_tools() => {
                let [begins, ends] = TOOL_CALL;
                let why = format!("the model's chat template tells it of no tools that are called by {begins}..{ends}");
                Err(ApiError::unsupported("tools", why))
            }
            // What else is wrong with a template is told when it is used.
            _ => Ok(()),
        }
    }

    /// Has the answer call a tool where that is asked for, and end behind one call where there may be no more.
    pub(crate) fn apply(&self, wanted: &mut Wanted) -> Result<(), ApiError> {
        let named = |name: &str| self.known.iter().filter(|(known, _)| known == name).cloned().collect();
        let tools = match &self.choice {
            Choice::Auto => {
                if !self.several {
                    wanted.stop.push(TOOL_CALL[1].to_owned());
                }
                return Ok(());
            }
            Choice::Required => self.known.clone(),
            Choice::Named(name) => named(name),
        };
        if wanted.json_schema.is_some() {
            return Err(ApiError::unsupported("response_format", "the answer has to call a tool (tool_choice)"));
        }
        if !wanted.stop.is_empty() {
            // An answer that is cut anywhere is no call.
            return Err(ApiError::unsupported("stop", "the answer has to call a tool (tool_choice)"));
        }
        let several = self.several && self.choice == Choice::Required;
        wanted.tool_calls = Some(ToolCalls { tools, several });
        Ok(())
    }

    /// What the answer may call.
    pub(crate) fn callable(&self) -> Callable {
        let names = self.known.iter().map(|(name, _)| name.clone()).collect();
        Callable { names, is_all: self.choice != Choice::Auto }
    }
}

/// The name of a tool, and the schema of its arguments.
fn function(tool: Value, at: &str) -> Result<(String, Value), ApiError> {
    let mut tool = Fields::of(tool, at)?;
    match tool.text("type")?.as_deref() {
        Some("function") => {}
        Some(other) => {
            return Err(ApiError::unsupported(tool.name("type"), format!("{other}: only functions are called")));
        }
        None => return Err(ApiError::missing(tool.name("type"), "function")),
    }
    let value = tool.value("function").ok_or_else(|| ApiError::missing(tool.name("function"), "an object"))?;
    let mut function = Fields::of(value, &tool.name("function"))?;
    tool.end()?;
    let name = name(&mut function)?;
    function.text("description")?;
    function.flag("strict")?;
    let parameters = function.read("parameters", "a JSON Schema", |value| value.as_object().cloned())?;
    function.end()?;
    Ok((name, parameters.map_or_else(|| json!({"type": "object"}), Value::Object)))
}

/// Takes the name of a function. It is read to the model among the marks of its calls.
pub(crate) fn name(function: &mut Fields) -> Result<String, ApiError> {
    let name = function.text("name")?.ok_or_else(|| ApiError::missing(function.name("name"), "a name"))?;
    let is_fit = |character: char| character.is_ascii_alphanumeric() || "_-.".contains(character);
    if (1..=NAME_CHARS_MAX).contains(&name.chars().count()) && name.chars().all(is_fit) {
        return Ok(name);
    }
    let expected = format!("1 to {NAME_CHARS_MAX} letters, digits, underscores, hyphens and dots");
    Err(ApiError::field(function.name("name"), name, expected))
}

/// What `tool_choice` says; `None`: no tool.
fn chosen(choice: Option<Value>, known: &[(String, Value)]) -> Result<Option<Choice>, ApiError> {
    let Some(choice) = choice else { return Ok(Some(Choice::Auto)) };
    let is_known = |name: &str| known.iter().any(|(known, _)| known == name);
    let named = choice["function"]["name"].as_str().filter(|_| choice["type"] == "function");
    match (choice.as_str(), named) {
        (Some("none"), _) => Ok(None),
        (Some("auto"), _) => Ok(Some(Choice::Auto)),
        (Some("required"), _) if known.is_empty() => {
            Err(ApiError::field("tool_choice", "required", "none or auto where there are no tools"))
        }
        (Some("required"), _) => Ok(Some(Choice::Required)),
        (_, Some(name)) if is_known(name) => Ok(Some(Choice::Named(name.to_owned()))),
        (_, Some(name)) => Err(ApiError::field("tool_choice", name, "the name of one of the tools")),
        _ => Err(ApiError::field("tool_choice", choice, CHOICES)),
    }
}

/// The tools with their fields in the order of the text, which is the order that models know from their training.
fn ordered(body: &[u8]) -> Vec<TemplateValue> {
    #[derive(Deserialize)]
    struct Body {
        tools: Option<Vec<TemplateValue>>,
    }
    // It was read as JSON with such a list before.
    serde_json::from_slice::<Body>(body).ok().and_then(|body| body.tools).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(request: Value) -> Result<Option<Tools>, ApiError> {
        let body = request.to_string();
        Tools::read(&mut Fields::of(request, "").unwrap(), body.as_bytes())
    }

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}})
    }

    #[test]
    fn a_choice_says_what_the_answer_has_to_be() {
        // Would break: an agent that asked for a call gets a text, or calls what it did not allow.
        let of = |choice: Value, several: bool| {
            let request =
                json!({"tools": [tool("a"), tool("b")], "tool_choice": choice, "parallel_tool_calls": several});
            let mut wanted = Wanted::default();
            let tools = read(request).unwrap()?;
            tools.apply(&mut wanted).unwrap();
            let names = |calls: ToolCalls| calls.tools.into_iter().map(|(name, _)| name).collect::<Vec<_>>();
            Some((wanted.tool_calls.clone().map(|calls| calls.several), wanted.tool_calls.map(names), wanted.stop))
        };
        let named = json!({"type": "function", "function": {"name": "b"}});
        let list = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        assert_eq!(of(json!("none"), true), None);
        assert_eq!(of(json!(null), true), Some((None, None, vec![])));
        assert_eq!(of(json!("auto"), false), Some((None, None, vec!["</tool_call>".to_owned()])));
        assert_eq!(of(json!("required"), true), Some((Some(true), list(&["a", "b"]), vec![])));
        assert_eq!(of(named, true), Some((Some(false), list(&["b"]), vec![])));
        assert!(read(json!({"tools": []})).unwrap().is_none());
    }

    #[test]
    fn what_would_cut_a_call_is_refused() {
        // Would break: an agent that asked for a call gets a piece of one as text.
        let tools = |choice: &str| read(json!({"tools": [tool("a")], "tool_choice": choice})).unwrap().unwrap();
        let stopping = || Wanted { stop: vec![",".to_owned()], ..Wanted::default() };
        assert_eq!(tools("required").apply(&mut stopping()).unwrap_err().json()["error"]["param"], "stop");
        assert!(tools("auto").apply(&mut stopping()).is_ok());
    }

    #[test]
    fn what_is_no_tool_is_refused_by_its_place() {
        // Would break: a tool that nobody can call is shown to the model.
        for (request, param) in [
            (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
            (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
            (json!({"tools": [tool("a"), tool("a b")]}), "tools[1].function.name"),
            (
                json!({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}),
                "tools[0].function.parameters",
            ),
            (json!({"tools": [tool("a")], "tool_choice": "always"}), "tool_choice"),
            (
                json!({"tools": [tool("a")], "tool_choice": {"type": "function", "function": {"name": "b"}}}),
                "tool_choice",
            ),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"tools": vec![tool("a"); TOOLS_MAX + 1]}), "tools"),
            (json!({"tools": [tool("a"), tool("b"), tool("a")]}), "tools[2].function.name"),
        ] {
            let Err(error) = read(request.clone()) else { panic!("{request} was taken") };
            assert_eq!(error.json()["error"]["param"], param, "{request}");
        }
    }
}
