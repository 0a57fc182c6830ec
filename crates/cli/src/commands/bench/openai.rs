//! A server that speaks OpenAI's protocol: what it is asked, and by which endpoint. Answers are read by
//! [`super::openai_answer`]. Used by [`super::workload`].

use http::Response;
use hyper::body::Incoming;
use serde_json::{Value, json};
use sida_coordinator::{Alpha, GenerateParams, RoutingMode};
use sida_rpc::ClientTls;

use super::{
    answer::{Answer, Failure},
    http_client::{self, HttpClient},
    openai_answer,
    url::BaseUrl,
    workload::Method,
};
use crate::api_key::ApiKey;

/// A server and the model that it is asked for.
pub(crate) struct OpenAi {
    client: HttpClient,
    model: String,
}

impl OpenAi {
    /// Asks the server which models it has if `model` does not name one.
    pub(crate) async fn open(
        base: &BaseUrl,
        key: Option<ApiKey>,
        tls: Option<ClientTls>,
        model: Option<&str>,
    ) -> anyhow::Result<Self> {
        let client = HttpClient::new(base.clone(), key, tls)?;
        let model = match model {
            Some(model) => model.to_owned(),
            None => first_model(&client).await.map_err(|failure| {
                let Failure { code, message, .. } = failure;
                match code.as_str() {
                    http_client::CONNECT if message.contains("certificate") => anyhow::anyhow!(
                        "cannot connect to {base}: {message} (--tls-ca names the authority that signed the server's certificate)"
                    ),
                    http_client::CONNECT => anyhow::anyhow!("cannot connect to {base}: {message}"),
                    _ => anyhow::anyhow!(
                        "{base}/models did not tell which model to ask for (name it by --model-name): {code}: {message}"
                    ),
                }
            })?,
        };
        Ok(Self { client, model })
    }

    /// Asks for a text to be answered as `params` say, or to be embedded.
    pub(crate) async fn ask(&self, method: Method, text: &str, params: &GenerateParams) -> Result<Answer, Failure> {
        let body = body(method, &self.model, text, params);
        let response = self.client.send(endpoint(method), Some(&body), params.deadline).await?;
        let answer = match method {
            Method::Encode => openai_answer::embedding(http_client::json(response.into_body()).await?),
            _ => openai_answer::streamed(method, response).await,
        };
        answer.map_err(|failure| {
            self.client.failure(&failure.code, &failure.message).with_retry_after(failure.retry_after)
        })
    }
}

async fn first_model(client: &HttpClient) -> Result<String, Failure> {
    let response: Response<Incoming> = client.send("/models", None, None).await?;
    let models = http_client::json(response.into_body()).await?;
    let first = models["data"][0]["id"].as_str().filter(|id| !id.is_empty());
    first.map(str::to_owned).ok_or_else(|| client.failure("malformed", "it lists no model"))
}

fn endpoint(method: Method) -> &'static str {
    match method {
        Method::Encode => "/embeddings",
        Method::Chat => "/chat/completions",
        Method::Generate | Method::Score => "/completions",
    }
}

/// A request. What was not asked for is left out, since some servers refuse fields that they do not know.
fn body(method: Method, model: &str, text: &str, params: &GenerateParams) -> Value {
    if method == Method::Encode {
        return json!({"model": model, "input": text, "encoding_format": "float"});
    }
    let mut body = json!({"model": model, "stream": true, "stream_options": {"include_usage": true}});
    match method {
        Method::Chat => body["messages"] = json!([{"role": "user", "content": text}]),
        _ => body["prompt"] = json!(text),
    }
    let sampling = &params.sampling;
    for (name, value) in [
        ("max_tokens", (params.max_tokens > 0).then(|| json!(params.max_tokens))),
        ("min_tokens", params.min_tokens.map(|tokens| json!(tokens))),
        ("ignore_eos", params.ignore_eos.then_some(Value::Bool(true))),
        ("temperature", sampling.temperature.map(|temperature| json!(temperature))),
        ("top_k", sampling.top_k.map(|top_k| json!(top_k))),
        ("top_p", sampling.top_p.map(|top_p| json!(top_p))),
        ("min_p", sampling.min_p.map(|min_p| json!(min_p))),
        ("repetition_penalty", sampling.repetition_penalty.map(|penalty| json!(penalty))),
        ("frequency_penalty", (sampling.frequency_penalty != 0.0).then(|| json!(sampling.frequency_penalty))),
        ("presence_penalty", (sampling.presence_penalty != 0.0).then(|| json!(sampling.presence_penalty))),
        ("seed", sampling.seed.map(|seed| json!(seed))),
        ("stop", (!params.stop.is_empty()).then(|| json!(params.stop))),
        ("routing", routing(params.routing)),
    ] {
        if let Some(value) = value {
            body[name] = value;
        }
    }
    body
}

/// The field that only our own server knows; left out where it would say what is so anyway.
fn routing(mode: RoutingMode) -> Option<Value> {
    match mode {
        RoutingMode::Exact => None,
        RoutingMode::Guided => Some(json!({"mode": "guided"})),
        RoutingMode::Hash { alpha: Alpha::Router } => Some(json!({"mode": "hash", "alpha": "router"})),
        RoutingMode::Hash { alpha: Alpha::Predicted } => Some(json!({"mode": "hash", "alpha": "predicted"})),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_openais() {
        // Broken: servers would refuse what they are sent, or answer something else than was asked.
        let params = GenerateParams::default();
        let common = json!({"model": "m", "stream": true, "stream_options": {"include_usage": true}});
        let with = |name: &str, value: Value| {
            let mut body = common.clone();
            body[name] = value;
            body
        };
        assert_eq!(body(Method::Generate, "m", "hello", &params), with("prompt", json!("hello")));
        let messages = json!([{"role": "user", "content": "hello"}]);
        assert_eq!(body(Method::Chat, "m", "hello", &params), with("messages", messages));
        let embedding = json!({"model": "m", "input": "hello", "encoding_format": "float"});
        assert_eq!(body(Method::Encode, "m", "hello", &params), embedding);
        let endpoints = [Method::Generate, Method::Chat, Method::Encode].map(endpoint);
        assert_eq!(endpoints, ["/completions", "/chat/completions", "/embeddings"]);
    }

    #[test]
    fn what_is_asked_for_is_in_the_request() {
        // Broken: both sides of a comparison would generate other lengths.
        let mut params = GenerateParams {
            routing: RoutingMode::Hash { alpha: Alpha::Predicted },
            max_tokens: 7,
            min_tokens: Some(0),
            ignore_eos: true,
            stop: vec!["END".into()],
            ..GenerateParams::default()
        };
        (params.sampling.temperature, params.sampling.top_k) = (Some(0.5), Some(9));
        (params.sampling.top_p, params.sampling.seed) = (Some(0.25), Some(3));
        let body = body(Method::Generate, "m", "hello", &params);
        for (name, expected) in [
            ("max_tokens", json!(7)),
            ("min_tokens", json!(0)),
            ("ignore_eos", json!(true)),
            ("temperature", json!(0.5)),
            ("top_k", json!(9)),
            ("top_p", json!(0.25)),
            ("seed", json!(3)),
            ("stop", json!(["END"])),
            ("routing", json!({"mode": "hash", "alpha": "predicted"})),
        ] {
            assert_eq!(body[name], expected, "{name}");
        }
    }
}
