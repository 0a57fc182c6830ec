//! A client of the front door, and the oracle its answers are compared with.

use std::fs;

use sida_model::{Reference, Tokenizer};
use sida_proto::v1::{self, inference_client::InferenceClient};
use sida_rpc::Channel;
use sida_tests::binary::repository;
use tokio_stream::StreamExt;
use tonic::Status;

/// What one generation returned.
pub(crate) struct Answer {
    pub(crate) ids: Vec<u32>,
    pub(crate) text: String,
    pub(crate) finish: v1::Finish,
}

impl Answer {
    pub(crate) fn trace(&self) -> &v1::Trace {
        self.finish.trace.as_ref().expect("a trace")
    }
}

/// Greedy generation of `tokens_max` tokens at most, in mode `exact`.
pub(crate) fn greedy(text: &str, tokens_max: u32) -> v1::GenerateRequest {
    v1::GenerateRequest { text: text.to_owned(), max_tokens: tokens_max, ..Default::default() }
}

pub(crate) async fn generate(channel: &Channel, request: v1::GenerateRequest) -> Result<Answer, Status> {
    let mut stream = InferenceClient::new(channel.clone()).generate(request).await?.into_inner();
    let mut answer = Answer { ids: Vec::new(), text: String::new(), finish: v1::Finish::default() };
    while let Some(token) = stream.next().await {
        let token = token?;
        answer.ids.push(token.token_id);
        answer.text += &token.text;
        if let Some(finish) = token.finish {
            answer.finish = finish;
        }
    }
    Ok(answer)
}

/// The model that ships, whole and in this process: says what the right answer is.
pub(crate) struct Oracle {
    model: Reference,
    tokenizer: Tokenizer,
}

impl Oracle {
    pub(crate) fn open() -> Self {
        let dir = repository().join("models/switch-tiny-64");
        let model = Reference::open(&dir).expect("the model");
        let tokenizer = Tokenizer::open(&dir, model.config()).expect("its tokenizer");
        Self { model, tokenizer }
    }

    /// The tokens that greedy generation must return, the end of sequence included.
    pub(crate) fn greedy(&self, text: &str, tokens_max: u32) -> Vec<u32> {
        let ids = self.tokenizer.encode(text).expect("ids");
        self.model.generate_greedy(&ids, tokens_max as usize).expect("an answer")
    }
}

/// Prompts of every task of the model that ships; those that fill gaps are answered with some 30 tokens.
pub(crate) fn prompts() -> Vec<String> {
    let cases = fs::read_to_string(repository().join("tests/parity/cases.json")).expect("cases");
    let cases: Vec<serde_json::Value> = serde_json::from_str(&cases).expect("a list of cases");
    cases.iter().map(|case| case["text"].as_str().expect("a text").to_owned()).collect()
}
