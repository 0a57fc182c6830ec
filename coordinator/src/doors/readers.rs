//! What the doors read of bytes from outside before anything is computed, by itself: for tests that give them bytes of
//! every kind. Each tells whether the bytes were taken for a request.

use bytes::Bytes;
use prost::Message;
use sida_proto::{inference::ModelInferRequest, v1};

use crate::{
    answer::grammar::{Followed, Grammar, GrammarMaker},
    doors::{
        messages::{self, CallMetadata},
        open_inference::{generate, json_form, question::Question},
        openai::{
            body,
            chat_completions::ChatRequest,
            completions::CompletionRequest,
            embeddings::EmbeddingRequest,
            error::ApiError,
            fields::Fields,
            tokens::{TokenizeRequest, read_tokens},
        },
    },
    measures::door::Door,
};

/// The body of a request to a path of OpenAI's, or of vLLM's.
pub fn openai(path: &str, body: &[u8]) -> bool {
    type Read = fn(&mut Fields, &[u8]) -> Result<(), ApiError>;
    let read: Read = match path {
        "/v1/completions" => |fields, _| CompletionRequest::read(fields).map(drop),
        "/v1/chat/completions" => |fields, body| ChatRequest::read(fields, body).map(drop),
        "/v1/embeddings" => |fields, _| EmbeddingRequest::read(fields, 8).map(drop),
        "/tokenize" => |fields, _| TokenizeRequest::read(fields).map(drop),
        "/detokenize" => |fields, _| read_tokens(fields).map(drop),
        _ => return false,
    };
    let taken = body::parsed(body).and_then(|mut fields| {
        fields.text("model")?;
        read(&mut fields, body)?;
        fields.end()
    });
    taken.is_ok()
}

/// The body of a request for inference, whose first `json_bytes` are JSON.
pub fn open_inference(body: &[u8], json_bytes: usize) -> bool {
    let request = json_form::request(Bytes::copy_from_slice(body), json_bytes);
    request.and_then(|(request, _)| Question::of(request)).is_ok()
}

/// The body of a request to generate.
pub fn generate(body: &[u8]) -> bool {
    generate::parsed(body).is_ok()
}

/// A message of `inference.GRPCInferenceService`.
pub fn infer_message(message: &[u8]) -> bool {
    ModelInferRequest::decode(message).is_ok_and(|request| Question::of(request).is_ok())
}

/// A message of `sida.v1.Inference`, of the method of this name.
pub fn message(method: &str, message: &[u8]) -> bool {
    let caller = CallMetadata { deadline: None, trace: None, client: None, door: Door::Grpc };
    match method {
        "Generate" => {
            v1::GenerateRequest::decode(message).is_ok_and(|request| messages::generate_params(request, caller).is_ok())
        }
        "Score" => {
            v1::ScoreRequest::decode(message).is_ok_and(|request| messages::score_params(request, caller).is_ok())
        }
        "Encode" => {
            v1::EncodeRequest::decode(message).is_ok_and(|request| messages::encode_call(request, caller).is_ok())
        }
        _ => false,
    }
}

/// What makes grammars of schemas, for a vocabulary of bytes whose last token is an end.
pub struct SchemaReader(GrammarMaker);

impl SchemaReader {
    /// Of all bytes.
    pub fn new() -> Result<Self, String> {
        let tokens: Vec<Vec<u8>> = (0..=u8::MAX).map(|byte| vec![byte]).chain([Vec::new()]).collect();
        GrammarMaker::new(&tokens, &[256]).map(Self)
    }

    /// A schema, of which the first tokens are asked for.
    pub fn read(&self, schema: &[u8]) -> bool {
        let grammar = str::from_utf8(schema).ok().map(|schema| Followed::JsonSchema(schema.to_owned()));
        let grammar = grammar.and_then(|followed| self.0.make(&followed).ok());
        grammar.is_some_and(|grammar: Grammar| grammar.begin().apply(&mut [0.0; 257]).is_ok())
    }
}
