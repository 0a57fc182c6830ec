//! One response to a request: all of its texts are answered, or it fails with the first that is not.

use std::time::Instant;

use futures::{StreamExt, future};
use sida_proto::inference::ModelInferResponse;

use crate::doors::open_inference::{
    parameters,
    question::Question,
    response::{Envelope, Generated},
};
use crate::{
    answer::{output::Pooling, request_error::RequestError},
    coordinator::{Coordinator, TokenStream},
    doors::messages::CallMetadata,
    intake::accept::{EncodeParams, GenerateParams},
};

/// The response.
pub(crate) async fn whole(
    coordinator: &Coordinator,
    envelope: &Envelope,
    question: Question,
    caller: CallMetadata,
) -> Result<ModelInferResponse, RequestError> {
    if question.embeds() {
        let encodings = coordinator.encode_all(encodings(&question, caller)).await?;
        return Ok(envelope.embeddings(encodings));
    }
    let texts = generations(&question, caller)
        .into_iter()
        .map(|params| async { collected(coordinator.generate(params).await?).await });
    Ok(envelope.generation(&question.outputs, &future::try_join_all(texts).await?))
}

/// The text of all tokens.
async fn collected(mut tokens: TokenStream) -> Result<Generated, RequestError> {
    let mut all = Generated { text: String::new(), finish: None };
    while let Some(token) = tokens.next().await {
        let token = token?;
        all.text.push_str(&token.text);
        all.finish = token.finish.map(|finish| finish.reason);
    }
    Ok(all)
}

/// The requests for the texts of a generation.
pub(crate) fn generations(question: &Question, caller: CallMetadata) -> Vec<GenerateParams> {
    let CallMetadata { deadline, trace, client } = caller;
    let deadline = question.deadline(deadline, Instant::now());
    let params = |text: &String| GenerateParams {
        deadline,
        trace,
        client: client.clone(),
        ..parameters::generation(&question.wanted, text)
    };
    question.texts.iter().map(params).collect()
}

fn encodings(question: &Question, caller: CallMetadata) -> Vec<EncodeParams> {
    let CallMetadata { deadline, trace, client } = caller;
    let deadline = question.deadline(deadline, Instant::now());
    let params = |text: &String| EncodeParams {
        prompt: text.clone().into(),
        routing: question.wanted.routing,
        priority: question.wanted.priority,
        pooling: Pooling::Mean,
        deadline,
        trace,
        client: client.clone(),
        ..EncodeParams::default()
    };
    question.texts.iter().map(params).collect()
}
