//! Chat templates against what transformers makes of them, and against files that are not what they should be.

use std::fs;

use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Case {
    template: String,
    messages: Vec<ChatMessage>,
    add_generation_prompt: bool,
    #[serde(default)]
    tools: Vec<TemplateValue>,
    variables: Map<String, Value>,
    text: Option<String>,
    error: Option<String>,
}

fn tokens() -> BTreeMap<String, String> {
    [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(name, token)| (name.to_owned(), token.to_owned())).into()
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::of(source.to_owned(), tokens()).expect("a template")
}

fn user(content: &str) -> ChatMessage {
    ChatMessage { role: "user".to_owned(), content: Some(content.to_owned()), ..Default::default() }
}

#[test]
fn conversations_are_written_as_transformers_writes_them() {
    // Would break: a chat model gets a prompt that it was not trained on, and answers worse without anybody seeing why.
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests");
    let cases = fs::read(tests.join("data/parity/chat.json")).expect("cases");
    let cases: Vec<Case> = serde_json::from_slice(&cases).expect("cases");
    assert!(cases.len() >= 20, "{}", cases.len());
    for (number, case) in cases.iter().enumerate() {
        let path = tests.join("parity/chat").join(format!("{}.jinja", case.template));
        let template = template(&fs::read_to_string(path).expect("a template"));
        let written = template.render(&case.messages, case.add_generation_prompt, &case.tools, &case.variables);
        let expected = match (&case.text, &case.error) {
            (Some(text), _) => Ok(text.clone()),
            (None, error) => Err(ChatError::Refused(error.clone().expect("a text or an error"))),
        };
        assert_eq!(written, expected, "case {number}, {}", case.template);
    }
}

#[test]
fn a_template_is_found_where_checkpoints_have_it() {
    // Would break: a model that has a template is said to have none, or is asked by the one for tools.
    let dir = tempfile::tempdir().unwrap();
    let write = |file: &str, content: &str| fs::write(dir.path().join(file), content).unwrap();
    let rendered = || {
        let template = ChatTemplate::open(dir.path()).unwrap()?;
        Some(template.render(&[user("Hi")], true, &[], &Map::new()).unwrap())
    };
    assert_eq!(rendered(), None);
    write("tokenizer_config.json", r#"{"eos_token": "<e>", "model_max_length": 512}"#);
    assert_eq!(rendered(), None, "no template in the config");
    write("special_tokens_map.json", r#"{"bos_token": {"content": "<b>", "lstrip": false}, "eos_token": "<old>"}"#);
    let source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token }}";
    write("tokenizer_config.json", &format!(r#"{{"eos_token": "<e>", "chat_template": "{source}"}}"#));
    assert_eq!(rendered().unwrap(), "<b>Hi<e>");
    let several = r#"{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}"#;
    write("tokenizer_config.json", several);
    assert_eq!(rendered().unwrap(), "D");
    write("chat_template.jinja", "J{{ messages | length }}\n");
    assert_eq!(rendered().unwrap(), "J1", "its own file goes first");
}

#[test]
fn templates_that_cannot_be_used_are_told() {
    // Would break: an operator learns from the first chat that the template is wrong, or not which file it is in.
    let dir = tempfile::tempdir().unwrap();
    let refusal = |file: &str, content: &[u8]| {
        fs::write(dir.path().join(file), content).unwrap();
        ChatTemplate::open(dir.path()).unwrap_err().to_string()
    };
    let several = refusal("tokenizer_config.json", br#"{"chat_template": [{"name": "rag", "template": "T"}]}"#);
    assert!(several.contains("tokenizer_config.json") && several.contains("rag"), "{several}");
    let number = refusal("tokenizer_config.json", br#"{"chat_template": 7}"#);
    assert!(number.contains("tokenizer_config.json"), "{number}");
    let open = refusal("chat_template.jinja", b"{% for message in messages %}");
    assert!(open.contains("chat_template.jinja"), "{open}");
    assert!(refusal("chat_template.jinja", b"\xff").contains("chat_template.jinja"));
    let long = refusal("chat_template.jinja", &vec![b'x'; TEMPLATE_BYTES_MAX as usize + 1]);
    assert!(long.contains("more than"), "{long}");
}

#[test]
fn a_template_has_bounds() {
    // Would break: a model's file keeps a thread for ever, or takes all memory.
    let failure = |source: &str| template(source).render(&[user("Hi")], true, &[], &Map::new()).unwrap_err();
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{{ '' }}{% endfor %}{% endfor %}";
    assert_eq!(failure(endless), ChatError::TooManySteps);
    let long = "{% set text = 'x' * 10000 %}{% for a in range(1000) %}{{ text }}{% endfor %}";
    assert_eq!(failure(long), ChatError::TooLong);
    let unknown = failure("{{ messages[0].content.frobnicate() }}");
    assert!(matches!(&unknown, ChatError::Failed(reason) if reason.contains("frobnicate")), "{unknown}");
}

#[test]
fn what_a_request_says_overrules_nothing_of_ours() {
    // Would break: a caller puts other messages or tokens into a prompt than those that were checked.
    let variables = serde_json::json!({"messages": "m", "bos_token": "b", "add_generation_prompt": "a", "x": "y"});
    let Value::Object(variables) = variables else { unreachable!("an object") };
    let written = template("{{ bos_token }}{{ messages[0].content }}{{ add_generation_prompt }}{{ x }}");
    assert_eq!(written.render(&[user("Hi")], false, &[], &variables).unwrap(), "<s>HiFalsey");
}

#[test]
fn the_day_is_written_as_strftime_writes_it() {
    // Would break: a prompt that tells the day fails, or tells it in another form than the model knows.
    let written = template("{{ strftime_now('%d %b %Y') }}").render(&[user("Hi")], false, &[], &Map::new()).unwrap();
    let words: Vec<&str> = written.split(' ').collect();
    assert!(words.len() == 3 && words[0].len() == 2 && words[1].len() == 3 && words[2].starts_with("20"), "{written}");
}
