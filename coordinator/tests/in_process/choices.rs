//! Several answers to one prompt, log-probabilities, penalties and biases: what each is, that no company changes it, and what
//! of it is refused.

use std::collections::{BTreeMap, BTreeSet};

use futures::{StreamExt, future::join_all};
use sida_coordinator::{
    Coordinator, FinishReason, GenerateParams, MicroBatching, PredictorSource, RequestError, Sampling, Token,
};
use sida_model::{Reference, Tokenizer};
use sida_proto::v1::{GenerateRequest, inference_client::InferenceClient};
use tonic::Code;

use crate::{
    front_door::served,
    plain_experts::{decoder_only_dir, model_dir, start, start_model},
};

const TEXT: &str = "The <extra_id_0> walks in <extra_id_1> park with a small dog.";

/// One answer of a request.
#[derive(Clone, Debug, Default, PartialEq)]
struct Choice {
    ids: Vec<u32>,
    text: String,
    logprobs: Vec<(f32, Vec<(u32, f32)>)>,
    finish: Option<(FinishReason, usize)>,
}

impl Choice {
    fn add(&mut self, token: Token) {
        assert_eq!(self.finish, None, "a choice goes on after its end");
        self.ids.push(token.id);
        self.text += &token.text;
        let logprobs = token
            .logprobs
            .map(|told| (told.logprob, told.top.iter().map(|likely| (likely.id, likely.logprob)).collect()));
        self.logprobs.extend(logprobs);
        self.finish = token.finish.map(|finish| (finish.reason, finish.generated_tokens));
    }
}

async fn choices(coordinator: &Coordinator, params: GenerateParams) -> Result<Vec<Choice>, RequestError> {
    let mut tokens = coordinator.generate(params.clone()).await?;
    let mut choices = vec![Choice::default(); params.choices.max(1)];
    while let Some(token) = tokens.next().await {
        let token = token?;
        choices[token.choice].add(token);
    }
    for Choice { ids, finish, .. } in &choices {
        assert_eq!(finish.map(|(_, tokens)| tokens), Some(ids.len()), "a choice without an end");
    }
    Ok(choices)
}

/// A request that asks for everything. It ends at a vowel, of which most answers have one sooner or later.
fn everything(text: &str) -> GenerateParams {
    let sampling = Sampling {
        temperature: Some(1.3),
        top_k: Some(200),
        top_p: Some(0.98),
        min_p: Some(0.001),
        repetition_penalty: Some(1.1),
        frequency_penalty: 0.5,
        presence_penalty: -0.25,
        logit_bias: BTreeMap::from([(3, -100.0), (40, 1.5)]),
        seed: Some(11),
    };
    let vowels = if text == TEXT { "u" } else { "aeiou" };
    let (prompt, stop) = (text.into(), vowels.chars().map(String::from).collect());
    GenerateParams { prompt, sampling, stop, max_tokens: 12, logprobs: Some(4), ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_choice_is_a_request_with_a_seed_of_its_own() {
    // Would break: a choice depends on its number of neighbours, on its batch, or on another choice's draws, ends or caches;
    // or it cannot be had again by itself.
    for (dir, text) in [(model_dir(), TEXT), (decoder_only_dir(), "the expert of the token")] {
        let cluster = start_model(&dir, 2, PredictorSource::Off, |_| ()).await;
        let alone = async |choice: u64| {
            let params = everything(text);
            let sampling = Sampling { seed: Some(11 + choice), ..params.sampling.clone() };
            choices(&cluster.coordinator, GenerateParams { sampling, ..params }).await.expect("an answer").remove(0)
        };
        let mut expected = Vec::new();
        for choice in 0..20 {
            expected.push(alone(choice).await);
        }
        let lengths: BTreeSet<usize> = expected.iter().map(|choice| choice.ids.len()).collect();
        assert!(lengths.len() > 2, "none goes on behind the end of another: {lengths:?}");
        assert!(expected.windows(2).any(|pair| pair[0].ids != pair[1].ids), "all are the same: nothing is drawn");
        for micro_batching in [MicroBatching::Never, MicroBatching::Always] {
            let cluster = start_model(&dir, 2, PredictorSource::Off, |c| c.micro_batching = micro_batching).await;
            // 20 are so many that several threads draw; 3 are in the same batch, and join it while it runs.
            let ask = |count| choices(&cluster.coordinator, GenerateParams { choices: count, ..everything(text) });
            let (many, few, one) = tokio::join!(ask(20), ask(3), ask(0));
            assert_eq!(many.expect("answers"), expected);
            assert_eq!(few.expect("answers"), expected[..3]);
            assert_eq!(one.expect("an answer"), expected[..1]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn choices_end_each_by_itself() {
    // Would break: a request ends with its first choice, or the last one waits for tokens that never come.
    let cluster = start(1, PredictorSource::Off, |_| ()).await;
    let sampling = Sampling { temperature: Some(3.0), seed: Some(5), ..Default::default() };
    let params = GenerateParams {
        prompt: TEXT.into(),
        sampling,
        stop: vec!["u".to_owned()],
        choices: 16,
        max_tokens: 9,
        ..Default::default()
    };
    let choices = choices(&cluster.coordinator, params).await.expect("answers");
    let lengths: BTreeSet<usize> = choices.iter().map(|choice| choice.ids.len()).collect();
    assert!(lengths.len() > 2, "they all end together: {lengths:?}");
    let stopped = choices.iter().filter(|choice| matches!(choice.finish, Some((FinishReason::Stop, _)))).count();
    assert!(stopped > 2, "{stopped} of {} met a stop text", choices.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn unseeded_choices_differ() {
    // Would break: who asks for several answers gets the same one several times.
    let cluster = start(1, PredictorSource::Off, |_| ()).await;
    let sampling = Sampling { temperature: Some(5.0), ..Default::default() };
    let params = GenerateParams { prompt: TEXT.into(), sampling, choices: 2, max_tokens: 16, ..Default::default() };
    let choices = choices(&cluster.coordinator, GenerateParams { ignore_eos: true, ..params }).await.expect("answers");
    assert_ne!(choices[0].ids, choices[1].ids);
}

#[tokio::test(flavor = "multi_thread")]
async fn logprobs_are_the_models_own() {
    // Would break: a token's probability is told after penalties or temperature, of another place, or of another token.
    for (dir, text) in [(model_dir(), TEXT), (decoder_only_dir(), "the expert of the token")] {
        let reference = Reference::open(&dir).expect("reference");
        let prompt = Tokenizer::open(&dir, reference.config()).expect("tokenizer").encode(text).expect("ids");
        let cluster = start_model(&dir, 2, PredictorSource::Off, |_| ()).await;
        let answer = choices(&cluster.coordinator, everything(text)).await.expect("an answer").remove(0);
        assert_eq!(answer.logprobs.len(), answer.ids.len());
        let (states, before) = match reference.config().has_encoder() {
            true => (
                reference.encode(&prompt).expect("states").0,
                vec![reference.config().generation.decoder_start_token_id],
            ),
            false => (Vec::new(), prompt),
        };
        let (logits, _) = reference.decode_forced(&states, &[&before[..], &answer.ids].concat()).expect("logits");
        let rows = logits.chunks_exact(reference.config().vocab_size).skip(before.len() - 1);
        for ((row, &id), (logprob, top)) in rows.zip(&answer.ids).zip(&answer.logprobs) {
            let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
            let expected = |id: u32| (f64::from(row[id as usize]) - sum.ln()) as f32;
            assert!((logprob - expected(id)).abs() < 1e-4, "{id}: {logprob} for {}", expected(id));
            let mut ids: Vec<u32> = (0..row.len() as u32).collect();
            ids.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]).then(a.cmp(&b)));
            assert_eq!(top.iter().map(|likely| likely.0).collect::<Vec<_>>(), ids[..4]);
            assert!(top.iter().all(|&(id, logprob)| (logprob - expected(id)).abs() < 1e-4), "{top:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn greedy_answers_follow_biases_and_penalties() {
    // Would break: what a request asks of the logits is left out where no token is drawn.
    let cluster = start(1, PredictorSource::Off, |_| ()).await;
    let ask = async |sampling: Sampling| {
        let params =
            GenerateParams { prompt: TEXT.into(), sampling, max_tokens: 10, ignore_eos: true, ..Default::default() };
        choices(&cluster.coordinator, params).await.expect("an answer").remove(0).ids
    };
    let plain = ask(Sampling::default()).await;
    let told = |ids: &[u32], id: u32| ids.iter().filter(|&&other| other == id).count();
    let only = ask(Sampling { logit_bias: [(77, 100.0)].into(), ..Default::default() }).await;
    assert_eq!(only, [77; 10]);
    let without = ask(Sampling { logit_bias: [(plain[0], -100.0)].into(), ..Default::default() }).await;
    assert_eq!((told(&without, plain[0]), told(&plain, plain[0]) > 0), (0, true));
    // A token that wins by far wins no more once it has lost enough: 60 of bias, less 2 for each time and 2 for the first.
    let once = |bias, frequency_penalty, presence_penalty| Sampling {
        logit_bias: [(77, bias), (78, bias - 1.0)].into(),
        frequency_penalty,
        presence_penalty,
        ..Default::default()
    };
    let turns = ask(once(100.0, 2.0, 0.0)).await;
    assert_eq!(told(&turns, 77) + told(&turns, 78), 10, "{turns:?}");
    assert!(told(&turns, 77).abs_diff(told(&turns, 78)) <= 4 && told(&turns, 78) > 0, "{turns:?}");
    let repeated = ask(Sampling { repetition_penalty: Some(100.0), ..Default::default() }).await;
    assert!(repeated.iter().all(|&id| told(&repeated, id) == 1), "{repeated:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_sees_choices_and_logprobs() {
    // Would break: a client by gRPC cannot tell the choices apart, or one that asks for one sees something new.
    let served = served().await;
    let mut client = InferenceClient::new(served.channel.clone());
    let request = |choices, logprobs| GenerateRequest {
        text: TEXT.into(),
        max_tokens: 6,
        choices,
        logprobs,
        temperature: Some(1.0),
        seed: Some(3),
        ..Default::default()
    };
    let mut responses = Vec::new();
    for (choices, logprobs) in [(0, None), (3, Some(2)), (1, Some(0))] {
        let mut stream = client.generate(request(choices, logprobs)).await.expect("accepted").into_inner();
        let mut all = Vec::new();
        while let Some(response) = stream.message().await.expect("a token") {
            all.push(response);
        }
        responses.push(all);
    }
    let [plain, three, one] = responses.try_into().expect("three answers");
    assert!(plain.iter().all(|response| response.choice == 0 && response.logprobs.is_none()));
    assert_eq!(three.iter().filter(|response| response.finish.is_some()).count(), 3);
    assert!(three.last().is_some_and(|response| response.finish.is_some()), "it ends with the last choice");
    let first: Vec<u32> =
        three.iter().filter(|response| response.choice == 0).map(|response| response.token_id).collect();
    assert_eq!(first, plain.iter().map(|response| response.token_id).collect::<Vec<_>>());
    let tops = |responses: &[sida_proto::v1::GenerateResponse]| {
        responses.iter().map(|response| response.logprobs.as_ref().map(|told| told.top.len())).collect::<Vec<_>>()
    };
    assert!(tops(&three).iter().all(|&count| count == Some(2)) && tops(&one).iter().all(|&count| count == Some(0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn absurd_values_are_refused_by_name() {
    // Would break: a value that no answer can follow reaches the model, takes all memory, or is refused without saying which.
    let served = served().await;
    let mut client = InferenceClient::new(served.channel.clone());
    type Set = fn(&mut GenerateRequest, f32);
    let fields: [(&str, Set); 5] = [
        ("min_p", |request, value| request.min_p = Some(value)),
        ("repetition_penalty", |request, value| request.repetition_penalty = Some(value)),
        ("frequency_penalty", |request, value| request.frequency_penalty = value),
        ("presence_penalty", |request, value| request.presence_penalty = value),
        ("logit_bias", |request, value| request.logit_bias = [(1, value)].into()),
    ];
    let plain = GenerateRequest { text: TEXT.into(), max_tokens: 2, ..Default::default() };
    let mut cases = vec![
        ("logit_bias", GenerateRequest { logit_bias: [(u32::MAX, 1.0)].into(), ..plain.clone() }),
        ("logit_bias", GenerateRequest { logit_bias: (0..1025).map(|id| (id, 1.0)).collect(), ..plain.clone() }),
        ("logprobs", GenerateRequest { logprobs: Some(21), ..plain.clone() }),
        ("logprobs", GenerateRequest { logprobs: Some(u32::MAX), ..plain.clone() }),
        ("choices", GenerateRequest { choices: 129, ..plain.clone() }),
        ("choices", GenerateRequest { choices: 1_000_000_000, ..plain.clone() }),
        ("tokens", GenerateRequest { text: String::new(), tokens: vec![5, u32::MAX], ..plain.clone() }),
        ("tokens", GenerateRequest { tokens: vec![5], ..plain.clone() }),
    ];
    for (field, set) in fields {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 101.0, -101.0] {
            let mut request = plain.clone();
            set(&mut request, value);
            cases.push((field, request));
        }
    }
    for (field, request) in cases {
        let status = client.generate(request).await.expect_err(field);
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().starts_with(field), "{field}: {status}");
    }
    // What needs more memory than there is by itself is refused as well, and choices count.
    let narrow = start(1, PredictorSource::Off, |config| config.limits.cache_bytes_max = 1 << 20).await;
    let ask = |count| {
        let params = GenerateParams { prompt: TEXT.into(), choices: count, max_tokens: 4, ..Default::default() };
        choices(&narrow.coordinator, params)
    };
    assert_eq!(ask(2).await.expect("answers").len(), 2);
    assert!(matches!(ask(128).await, Err(RequestError::CacheTooSmall { .. })));
    let sequences = start(1, PredictorSource::Off, |config| config.limits.sequences_max = 4).await;
    let params = GenerateParams { prompt: TEXT.into(), choices: 5, max_tokens: 4, ..Default::default() };
    assert!(matches!(
        choices(&sequences.coordinator, params).await,
        Err(RequestError::Argument { field: "choices", .. })
    ));
    // All that are within the limits at once are answered, also where they take turns.
    let params = GenerateParams { prompt: TEXT.into(), choices: 3, max_tokens: 4, ..Default::default() };
    for answer in join_all((0..5).map(|_| choices(&sequences.coordinator, params.clone()))).await {
        assert_eq!(answer.expect("answers").len(), 3);
    }
}
