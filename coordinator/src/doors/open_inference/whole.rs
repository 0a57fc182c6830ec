//! One response to a request: all of its texts are answered, or it fails with the first that is not.

use std::time::Instant;

use futures::{Stream, StreamExt, future};
use sida_proto::inference::ModelInferResponse;

use crate::doors::open_inference::{
    question::Question,
    response::{Envelope, Generated},
    statistics,
};
use crate::{
    answer::{
        output::{Pooling, Token},
        request_error::RequestError,
        token_stream::TokenStream,
        trace::Timings,
    },
    coordinator::Coordinator,
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
    let begun = Instant::now();
    match answer(coordinator, envelope, question, caller).await {
        Ok((response, timings)) => {
            statistics::answered(coordinator, begun, &timings);
            Ok(response)
        }
        Err(error) => {
            statistics::failed(coordinator, begun);
            Err(error)
        }
    }
}

/// The same, with what each of its texts took.
async fn answer(
    coordinator: &Coordinator,
    envelope: &Envelope,
    question: Question,
    caller: CallMetadata,
) -> Result<(ModelInferResponse, Vec<Timings>), RequestError> {
    if question.embeds() {
        let encodings = coordinator.encode_all(encodings(&question, caller)).await?;
        let timings = encodings.iter().map(|encoding| encoding.trace.timings).collect();
        return Ok((envelope.embeddings(encodings), timings));
    }
    let all = generations(&question, caller);
    let count = all.len();
    coordinator.may_wait("texts (their number)", count)?;
    let texts = all.into_iter().zip(1..).map(|(params, number)| async move {
        let generated = async { collected(coordinator.generate(params).await?).await };
        generated.await.map_err(|error: RequestError| error.of_one(number, count))
    });
    let (texts, timings): (Vec<_>, Vec<_>) = future::try_join_all(texts).await?.into_iter().unzip();
    Ok((envelope.generation(&question.outputs, &texts), timings))
}

/// The tokens of one text, which are noted in the statistics when they end.
pub(crate) async fn tokens(
    coordinator: &Coordinator,
    params: GenerateParams,
) -> Result<impl Stream<Item = Result<Token, RequestError>> + Send + use<>, RequestError> {
    let (begun, coordinator) = (Instant::now(), coordinator.clone());
    let tokens = coordinator.generate(params).await.inspect_err(|_| statistics::failed(&coordinator, begun))?;
    Ok(tokens.inspect(move |token| match token {
        Ok(Token { finish: Some(finish), .. }) => statistics::answered(&coordinator, begun, &[finish.trace.timings]),
        Ok(_) => {}
        Err(_) => statistics::failed(&coordinator, begun),
    }))
}

/// The text of all tokens, and what it took.
async fn collected(mut tokens: TokenStream) -> Result<(Generated, Timings), RequestError> {
    let (mut all, mut timings) = (Generated { text: String::new(), finish: None }, Timings::default());
    while let Some(token) = tokens.next().await {
        let token = token?;
        all.text.push_str(&token.text);
        all.finish = token.finish.as_ref().map(|finish| finish.reason);
        timings = token.finish.map_or(timings, |finish| finish.trace.timings);
    }
    Ok((all, timings))
}

/// The requests for the texts of a generation.
pub(crate) fn generations(question: &Question, caller: CallMetadata) -> Vec<GenerateParams> {
    let CallMetadata { deadline, trace, client, door } = caller;
    let deadline = question.deadline(deadline, Instant::now());
    let params = |text: &String| GenerateParams {
        deadline,
        trace,
        door,
        client: client.clone(),
        ..question.wanted.params(text.as_str().into())
    };
    question.texts.iter().map(params).collect()
}

fn encodings(question: &Question, caller: CallMetadata) -> Vec<EncodeParams> {
    let CallMetadata { deadline, trace, client, .. } = caller;
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
