//! Answers that follow a JSON Schema, or call tools. The schema becomes a grammar over bytes, and the grammar says before each token
//! which may be next: all that lead to a text of it, and an end where the text is complete. What a grammar may cost is
//! bounded, when it is made and at each token, so that no schema holds up what others wait for.

use std::{
    collections::BTreeSet,
    fmt::{self, Debug, Formatter},
    sync::Arc,
};

use llguidance::{
    Matcher, ParserFactory,
    api::{ParserLimits, TopLevelGrammar},
    toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie},
};
use parking_lot::Mutex;
use serde_json::{Value, json};
use sida_model::chat_template::TOOL_CALL;

use crate::answer::{catch_panic::catch_panic, grammar_refusal, request_error::RequestError};

/// The longest schema. Those of whole APIs have less.
pub(crate) const SCHEMA_BYTES_MAX: usize = 64 << 10;
/// What a grammar may cost. At the crate's pace the lexer's fuel of a token is 14 ms and its items are 3 ms, which is
/// reached by schemas that are made for it. One of 40 properties has 100 states and takes 300 KiB; 4,000 take 20 MiB at
/// most.
const LIMITS: ParserLimits = ParserLimits {
    max_items_in_row: 2_000,
    initial_lexer_fuel: 1_000_000,
    step_lexer_fuel: 200_000,
    step_max_items: 50_000,
    max_lexer_states: 4_000,
    max_grammar_size: 100_000,
    precompute_large_lexemes: true,
    // They would tell the log and the caller of the answer so far.
    verbose_errors: false,
};
/// Remainders by all divisors of a schema together.
const REMAINDERS_MAX: u64 = 10_000;
/// Blanks between the parts of a text. Models that have lost their way go on with blanks for ever.
const BLANKS: &str = r"[\x20\x0A\x0D\x09]{1,64}";

/// Makes grammars for one tokenizer.
pub(crate) struct GrammarMaker(ParserFactory);

/// What an answer follows.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Followed {
    /// JSON of this JSON Schema.
    JsonSchema(String),
    /// One or more calls of tools and nothing else.
    ToolCalls(ToolCalls),
}

/// The tools that may be called.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolCalls {
    /// The name of each, and the JSON Schema of its arguments.
    pub tools: Vec<(String, Value)>,
    /// Whether several may be called.
    pub several: bool,
}

/// A schema as a grammar, before its first token. Clones share what was found out about it so far, and its limits.
#[derive(Clone)]
pub(crate) struct Grammar(Arc<Mutex<Matcher>>);

/// How far the answer of one choice is in its grammar.
pub(crate) struct GrammarPlace(Matcher);

impl GrammarMaker {
    /// For tokens of these bytes, of which some end an answer.
    pub(crate) fn new(token_bytes: &[Vec<u8>], ends: &[u32]) -> Result<Self, String> {
        let vocab_size = u32::try_from(token_bytes.len()).map_err(|error| error.to_string())?;
        let ends: Vec<u32> = ends.iter().copied().filter(|&end| end < vocab_size).collect();
        let first = *ends.first().ok_or("the model has no token that ends an answer")?;
        let trie = TokTrie::from(&TokRxInfo::new(vocab_size, first), token_bytes).with_eos_tokens(&ends);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&environment).map_err(|error| error.to_string())?;
        *factory.limits_mut() = LIMITS;
        factory.quiet();
        Ok(Self(factory))
    }

    /// The grammar of what is followed. This may take long, but ends: not for a thread that others wait for.
    pub(crate) fn make(&self, followed: &Followed) -> Result<Grammar, RequestError> {
        match followed {
            Followed::JsonSchema(schema) => self.of(TopLevelGrammar::from_json_schema(parsed(schema)?)),
            Followed::ToolCalls(calls) => {
                let made = calls.grammar().and_then(|grammar| self.of(TopLevelGrammar::from_lark(grammar)));
                made.map_err(of_tools)
            }
        }
    }

    fn of(&self, grammar: TopLevelGrammar) -> Result<Grammar, RequestError> {
        catch_panic(|| {
            let mut matcher = Matcher::new(self.0.create_parser(grammar));
            // Whether there is any text, and whether the vocabulary has tokens to begin it.
            matcher.compute_mask_or_eos().map_err(stopped)?;
            Ok(Grammar(Arc::new(Mutex::new(matcher))))
        })
    }
}

/// The schema of a text, with what is ours to say about how it is followed.
fn parsed(text: &str) -> Result<Value, RequestError> {
    if text.len() > SCHEMA_BYTES_MAX {
        return Err(refused(format!("it has {} bytes, more than the {SCHEMA_BYTES_MAX} allowed", text.len())));
    }
    match serde_json::from_str(text).map_err(|error| refused(format!("it is not JSON: {error}")))? {
        Value::Object(mut schema) => {
            // Callers may not switch off what keeps an answer to the schema.
            schema.insert("x-guidance".to_owned(), json!({"whitespace_pattern": BLANKS}));
            let schema = Value::Object(schema);
            check_divisors(&schema)?;
            Ok(schema)
        }
        _ => Err(refused("it is not an object")),
    }
}

impl ToolCalls {
    /// In the notation of Lark, as the crate takes it.
    fn grammar(&self) -> Result<String, RequestError> {
        let [begins, ends] = TOOL_CALL;
        let more = if self.several { r#"("\n" call)*"# } else { "" };
        let numbers = 0..self.tools.len();
        let any = numbers.map(|number| format!("tool_{number}")).collect::<Vec<_>>().join(" | ");
        let mut grammar = format!("start: call {more}\ncall: \"{begins}\\n\" ({any}) \"\\n{ends}\"\n");
        for (number, (name, arguments)) in self.tools.iter().enumerate() {
            let schema = parsed(&call_schema(name, arguments)?.to_string())?;
            grammar += &format!("tool_{number}: %json {schema}\n");
        }
        let bytes = grammar.len();
        if bytes > SCHEMA_BYTES_MAX {
            return Err(refused(format!(
                "those of all tools have {bytes} bytes, more than the {SCHEMA_BYTES_MAX} allowed"
            )));
        }
        Ok(grammar)
    }
}

/// The schema of a call. What the arguments' schema defines for itself it refers to from its root, so it stays there.
fn call_schema(name: &str, arguments: &Value) -> Result<Value, RequestError> {
    let Value::Object(arguments) = arguments else { return Err(refused("the parameters of a tool are no object")) };
    let mut schema = json!({
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": false,
    });
    for definitions in ["$defs", "definitions"] {
        if let Some(defined) = arguments.get(definitions) {
            schema[definitions] = defined.clone();
        }
    }
    Ok(schema)
}

/// The same of what was not given as a schema, but as tools.
fn of_tools(error: RequestError) -> RequestError {
    match error {
        RequestError::JsonSchema { reason: found } => {
            let expected = "parameters by which calls can be written".to_owned();
            RequestError::Argument { field: "tools", found, expected }
        }
        other => other,
    }
}

/// Why a grammar goes no further.
fn stopped(error: impl ToString) -> RequestError {
    match grammar_refusal::reason(&error.to_string()) {
        reason if reason.contains("NoExtensionBias") => refused("no token of the model goes on from here"),
        reason => refused(reason),
    }
}

/// Refuses divisors whose grammar has a state for each remainder that numbers may leave, which no limit of the crate
/// bounds.
fn check_divisors(schema: &Value) -> Result<(), RequestError> {
    let mut divisors = BTreeSet::new();
    find_divisors(schema, &mut divisors);
    let states = divisors.iter().fold(1_u64, |states, &divisor| states.saturating_mul(divisor));
    match states > REMAINDERS_MAX {
        true => Err(refused(format!("multipleOf has {states} remainders, more than the {REMAINDERS_MAX} allowed"))),
        false => Ok(()),
    }
}

/// Every `multipleOf`, without its point.
fn find_divisors(schema: &Value, found: &mut BTreeSet<u64>) {
    match schema {
        Value::Array(list) => list.iter().for_each(|within| find_divisors(within, found)),
        Value::Object(fields) => fields.iter().for_each(|(name, value)| match value {
            Value::Number(number) if name == "multipleOf" => {
                let digits: String = number.to_string().chars().take_while(|c| !"eE".contains(*c)).collect();
                found.insert(digits.replace(['.', '-'], "").parse().unwrap_or(u64::MAX));
            }
            within => find_divisors(within, found),
        }),
        _ => {}
    }
}

fn refused(reason: impl ToString) -> RequestError {
    RequestError::JsonSchema { reason: reason.to_string() }
}

impl Grammar {
    /// The same with limits of its own: what one request costs ends no other.
    pub(crate) fn apart(&self) -> Self {
        Self(Arc::new(Mutex::new(self.0.lock().deep_clone())))
    }

    /// The place before the first token, for one choice.
    pub(crate) fn begin(&self) -> GrammarPlace {
        GrammarPlace(self.0.lock().clone())
    }
}

impl GrammarPlace {
    /// Makes impossible what may not be next: (vocab_size).
    pub(crate) fn apply(&mut self, logits: &mut [f32]) -> Result<(), RequestError> {
        let allowed = self.0.compute_mask_or_eos().map_err(stopped)?;
        for (token, logit) in logits.iter_mut().enumerate() {
            if token >= allowed.len() || !allowed.get(token) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    /// A token was chosen.
    pub(crate) fn note(&mut self, token: u32) -> Result<(), RequestError> {
        // A text that nothing may follow has no place behind its end.
        if self.0.is_stopped() { Ok(()) } else { self.0.consume_token(token).map_err(stopped) }
    }
}

impl PartialEq for Grammar {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Debug for Grammar {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("Grammar")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every byte but the last four is a token; 252 and 253 are words, 254 and 255 end an answer.
    fn maker() -> GrammarMaker {
        let mut tokens: Vec<Vec<u8>> = (0..252u8).map(|byte| vec![byte]).collect();
        tokens.extend([b"\": ".to_vec(), b"true".to_vec(), Vec::new(), Vec::new()]);
        GrammarMaker::new(&tokens, &[254, 255]).expect("a maker")
    }

    fn made(schema: &str) -> Result<Grammar, RequestError> {
        maker().make(&Followed::JsonSchema(schema.to_owned()))
    }

    fn allowed(place: &mut GrammarPlace) -> Vec<u32> {
        let mut logits = [0.0; 256];
        place.apply(&mut logits).expect("a mask");
        (0..256).filter(|&token| logits[token as usize] == 0.0).collect()
    }

    #[test]
    fn a_text_leads_to_its_end() {
        // Would break: an answer goes on behind its JSON, ends within it, or cannot take a token that fits.
        let schema = r#"{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": false}"#;
        let grammar = made(schema).expect("a grammar");
        let mut place = grammar.begin();
        assert_eq!(allowed(&mut place), [u32::from(b'{')]);
        for &byte in b"{\"a" {
            place.note(byte.into()).expect("it fits");
        }
        assert_eq!(allowed(&mut place), [u32::from(b'"'), 252]);
        place.note(252).expect("it fits");
        assert!(allowed(&mut place).contains(&253));
        place.note(253).expect("it fits");
        assert!(allowed(&mut place).contains(&u32::from(b'}')) && !allowed(&mut place).contains(&254));
        place.note(b'}'.into()).expect("it fits");
        assert_eq!(allowed(&mut place), [254, 255], "nothing but an end");
        place.note(255).expect("it ends");
        assert_eq!(allowed(&mut grammar.begin()), [u32::from(b'{')], "another choice begins at the beginning");
    }

    #[test]
    fn what_cannot_be_followed_is_refused_with_its_reason() {
        // Would break: an application believes that its answers follow a schema that nobody has understood.
        let reason = |schema: &str| match made(schema) {
            Err(RequestError::JsonSchema { reason }) => reason,
            other => panic!("{schema}: {other:?}"),
        };
        assert!(reason("{").contains("JSON"));
        assert!(reason("[]").contains("object"));
        assert!(reason(&format!("{{\"const\": \"{}\"}}", "a".repeat(SCHEMA_BYTES_MAX))).contains("bytes"));
        assert!(reason(r#"{"type": "text"}"#).contains("text"));
        assert_eq!(reason(r#"{"not": {"type": "null"}}"#), "the keyword not is not followed");
        assert_eq!(reason(r#"{"not": {}, "if": {}}"#), "the keywords if, not are not followed");
        assert!(reason(r#"{"oneOf": [{"type": "object"}, {"type": "object"}]}"#).ends_with("but anyOf is"));
        let unclosed = reason(r#"{"type": "string", "pattern": "["}"#);
        assert_eq!(unclosed, "a pattern cannot be followed: unclosed character class");
        let ahead = reason(r#"{"type": "string", "pattern": "^(?=a)b"}"#);
        assert!(ahead.starts_with("a pattern cannot be followed: look-around") && !ahead.contains('\n'), "{ahead}");
        assert!(reason(r##"{"$ref": "https://example.org/schema"}"##).to_lowercase().contains("ref"));
        assert!(!reason(r#"{"type": "string", "maxLength": -1}"#).is_empty());
        assert!(reason(r#"{"type": "integer", "multipleOf": 99999937}"#).contains("multipleOf"));
        assert!(reason(r#"{"anyOf": [{"multipleOf": 1.01}, {"multipleOf": 103}]}"#).contains("multipleOf"));
        assert!(reason(r##"{"$ref": "#"}"##).contains("no token"), "there is no such text");
        let letters: Vec<Vec<u8>> = (b'a'..=b'z').map(|letter| vec![letter]).chain([Vec::new()]).collect();
        let unable = GrammarMaker::new(&letters, &[26])
            .expect("a maker")
            .make(&Followed::JsonSchema("{\"type\": \"object\"}".to_owned()));
        assert!(
            matches!(&unable, Err(RequestError::JsonSchema { reason }) if reason.contains("no token")),
            "{unable:?}"
        );
    }

    #[test]
    fn what_costs_too_much_ends() {
        // Would break: one schema keeps the step of all for ever, or all of the memory.
        let schema = r#"{"type": "string", "pattern": "^(\\p{L}{1,1000}){1,1000}$"}"#;
        let mut place = made(schema).expect("it costs only later").begin();
        place.note(b'"'.into()).expect("it fits");
        let went_on =
            (0..1000).take_while(|_| place.note(b'a'.into()).and_then(|()| place.apply(&mut [0.0; 256])).is_ok());
        assert!(went_on.count() < 1000);
        // Long, and no dearer for it.
        let long = r#"{"type": "array", "items": {"type": "integer"}, "minItems": 1000000000}"#;
        assert_eq!(allowed(&mut made(long).expect("a grammar").begin()), [u32::from(b'[')]);
    }

    #[test]
    fn calls_of_tools_are_followed_to_their_end() {
        // Would break: an agent that asked for a call gets a text, a tool that it does not have, or arguments that it cannot read.
        let weather = json!({"type": "object", "properties": {"at": {"$ref": "#/$defs/hour"}}, "required": ["at"],
            "additionalProperties": false, "$defs": {"hour": {"type": "integer"}}});
        let tools = vec![("weather".to_owned(), weather), ("stop".to_owned(), json!({"type": "object"}))];
        let call = "<tool_call>\n{\"name\":\"weather\",\"arguments\":{\"at\":7}}\n</tool_call>";
        for several in [false, true] {
            let grammar =
                maker().make(&Followed::ToolCalls(ToolCalls { tools: tools.clone(), several })).expect("a grammar");
            let mut place = grammar.begin();
            for (at, &byte) in call.as_bytes().iter().enumerate() {
                assert!(allowed(&mut place).contains(&u32::from(byte)), "at {at}");
                place.note(byte.into()).expect("it fits");
            }
            let next = allowed(&mut place);
            assert_eq!((next.contains(&254), next.contains(&u32::from(b'\n'))), (true, several));
        }
        let first = |text: &str| {
            let mut place = maker()
                .make(&Followed::ToolCalls(ToolCalls { tools: tools.clone(), several: true }))
                .expect("made")
                .begin();
            text.bytes().all(|byte| allowed(&mut place).contains(&u32::from(byte)) && place.note(byte.into()).is_ok())
        };
        assert!(first("<tool_call>\n{\"name\": \"st") && !first("<tool_call>\n{\"name\": \"sleep"));
        let wrong = vec![("weather".to_owned(), json!({"type": "text"}))];
        assert!(maker().make(&Followed::ToolCalls(ToolCalls { tools: wrong, several: true })).is_err());
    }
}
