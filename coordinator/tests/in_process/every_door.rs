//! Requests of all kinds, by all doors, at the same time: each answer is the one that its request alone gets.

use futures::{StreamExt, future::join_all};
use serde_json::{Value, json};
use sida_coordinator::{GenerateParams, Sampling};
use sida_proto::{
    inference::{grpc_inference_service_client::GrpcInferenceServiceClient, infer_parameter::ParameterChoice},
    v1::{GenerateRequest, inference_client::InferenceClient},
};

use crate::{
    front_door::{Served, served},
    open_inference::{all, asking, streamed, texts, with},
    plain_http::{Answer, post},
};

/// Texts of several lengths.
const TEXTS: [&str; 4] = [
    "sst2 sentence: dull .",
    "sst2 sentence: a gorgeous , witty , seductive movie .",
    "a film that <extra_id_0> from its first scene to its last , and <extra_id_1> it .",
    "sst2 sentence: nobody who has seen the first half of it would want to know how the second half of it ends , or why .",
];

/// A way in.
#[derive(Clone, Copy, Debug)]
enum Door {
    Sida,
    OpenAi,
    OpenAiStream,
    OpenInference,
    OpenInferenceStream,
    OpenInferenceByHttp,
}

const DOORS: [Door; 6] = [
    Door::Sida,
    Door::OpenAi,
    Door::OpenAiStream,
    Door::OpenInference,
    Door::OpenInferenceStream,
    Door::OpenInferenceByHttp,
];

/// One request.
#[derive(Clone, Copy, Debug)]
struct Asked {
    text: &'static str,
    tokens_max: u32,
    tokens_min: u32,
    temperature: f32,
    seed: u64,
}

impl Asked {
    /// The request of that number: half are drawn, each by a seed of its own, and the others are greedy.
    fn new(number: u64) -> Self {
        let tokens_max = 4 + u32::try_from(number % 13).expect("less than 13");
        let temperature = if number.is_multiple_of(2) { 0.0 } else { 0.9 };
        let text = TEXTS[number as usize / 2 % TEXTS.len()];
        Self { text, tokens_max, tokens_min: tokens_max / 2, temperature, seed: number }
    }

    fn params(self) -> GenerateParams {
        let sampling = Sampling { temperature: Some(self.temperature), seed: Some(self.seed), ..Sampling::default() };
        GenerateParams {
            prompt: self.text.into(),
            max_tokens: self.tokens_max as usize,
            min_tokens: Some(self.tokens_min as usize),
            sampling,
            ..Default::default()
        }
    }

    fn message(self) -> GenerateRequest {
        GenerateRequest {
            text: self.text.to_owned(),
            max_tokens: self.tokens_max,
            min_tokens: Some(self.tokens_min),
            temperature: Some(self.temperature),
            seed: Some(self.seed),
            ..Default::default()
        }
    }

    /// Its parameters as JSON writes them. The temperature has one digit behind the point.
    fn fields(self) -> Value {
        let temperature = (f64::from(self.temperature) * 10.0).round() / 10.0;
        json!({
            "max_tokens": self.tokens_max, "min_tokens": self.tokens_min, "temperature": temperature, "seed": self.seed,
        })
    }

    /// What is answered to it alone, by no door.
    async fn alone(self, served: &Served) -> String {
        let tokens = served.cluster.coordinator.generate(self.params()).await.expect("accepted");
        tokens.map(|token| token.expect("a token").text).collect().await
    }

    /// What is answered to it by a door.
    async fn by(self, door: Door, served: &Served) -> String {
        match door {
            Door::Sida => {
                let mut client = InferenceClient::new(served.channel.clone());
                let tokens = client.generate(self.message()).await.expect("accepted").into_inner();
                tokens.map(|token| token.expect("a token").text).collect().await
            }
            Door::OpenAi => {
                let answer = self.completed(served, false).await.json();
                answer["choices"][0]["text"].as_str().expect("a text").to_owned()
            }
            Door::OpenAiStream => {
                let answer = self.completed(served, true).await;
                let events = answer.events();
                let (done, chunks) = events.split_last().expect("events");
                assert_eq!(*done, "[DONE]", "{events:?}");
                let chunks = chunks.iter().map(|chunk| serde_json::from_str::<Value>(chunk).expect("JSON"));
                chunks.map(|chunk| chunk["choices"][0]["text"].as_str().expect("a text").to_owned()).collect()
            }
            Door::OpenInference => {
                let mut client = GrpcInferenceServiceClient::new(served.channel.clone());
                let answer = client.model_infer(self.inference(served)).await.expect("answered").into_inner();
                texts(&answer, "text_output").concat()
            }
            Door::OpenInferenceStream => {
                let mut client = GrpcInferenceServiceClient::new(served.channel.clone());
                let parts = all(&mut client, vec![streamed(self.inference(served))]).await;
                let text = |part: &sida_proto::inference::ModelStreamInferResponse| {
                    assert_eq!(part.error_message, "");
                    let response = part.infer_response.as_ref().expect("a response");
                    // The last says that it is the last, and may say nothing else.
                    if response.outputs.is_empty() { String::new() } else { texts(response, "text_output").concat() }
                };
                parts.iter().map(text).collect()
            }
            Door::OpenInferenceByHttp => {
                let input = json!({"name": "text_input", "shape": [1], "datatype": "BYTES", "data": [self.text]});
                let body = json!({"inputs": [input], "parameters": self.fields()});
                let model = served.cluster.coordinator.checkpoint().name();
                let answer = post(served.http, &format!("/v2/models/{model}/infer"), &body).await.json();
                let outputs = answer["outputs"].as_array().unwrap_or_else(|| panic!("{answer}"));
                let output = outputs.iter().find(|output| output["name"] == "text_output").expect("a text");
                output["data"][0].as_str().expect("a text").to_owned()
            }
        }
    }

    async fn completed(self, served: &Served, streams: bool) -> Answer {
        let mut body = self.fields();
        body["model"] = served.cluster.coordinator.checkpoint().name().into();
        body["prompt"] = self.text.into();
        body["stream"] = streams.into();
        let answer = post(served.http, "/v1/completions", &body).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answer
    }

    fn inference(self, served: &Served) -> sida_proto::inference::ModelInferRequest {
        let parameters = [
            ("max_tokens", ParameterChoice::Int64Param(self.tokens_max.into())),
            ("min_tokens", ParameterChoice::Int64Param(self.tokens_min.into())),
            ("temperature", ParameterChoice::DoubleParam(self.temperature.into())),
            ("seed", ParameterChoice::Uint64Param(self.seed)),
        ];
        let request = asking(served, &[self.text]);
        parameters.into_iter().fold(request, |request, (name, choice)| with(request, name, choice))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn company_changes_no_answer() {
    // Would break: what one is answered depends on who asks at the same time, or on the door that he comes by.
    const REQUESTS: u64 = 64;
    let served = served().await;
    let mut expected = Vec::new();
    for number in 0..REQUESTS {
        expected.push(Asked::new(number).alone(&served).await);
    }
    let of_text = |text: &str| expected.iter().filter(|answer| *answer == text).count();
    assert!(expected.iter().all(|answer| of_text(answer) < REQUESTS as usize / 2), "answers differ: {expected:?}");
    // Each door gets requests of every kind.
    let asked = (0..REQUESTS).map(|number| {
        let door = DOORS[(number as usize / 2 + number as usize % 2 * 3) % DOORS.len()];
        let served = &served;
        async move { (door, Asked::new(number).by(door, served).await) }
    });
    for ((door, found), (number, expected)) in join_all(asked).await.into_iter().zip((0..).zip(expected)) {
        assert_eq!(found, expected, "{:?} by {door:?}", Asked::new(number));
    }
}
