//! Prompts that are crafted so that all of their rows go to one expert of each layer, and so to one expert-node: whoever sends
//! them shall delay others no more than by as many ordinary prompts. How one looks is found as an attacker would, who has the
//! model: by what its routers choose.

use std::{collections::BTreeMap, time::Duration};

use rand::{Rng, rngs::StdRng};
use sida_model::Reference;
use sida_proto::v1::{EncodeRequest, Pooling, RoutingMode, inference_client::InferenceClient};
use sida_rpc::{ClientConfig, OwnKey, connect};
use sida_tests::{Load, Sandbox, SandboxConfig, load_client::Report};
use tokio::task::JoinSet;

use super::{is_long, random};
use crate::client::prompts;

const HONEST_KEY: &str = "honest-0123456789abcdef";
const OTHER_KEY: &str = "others-0123456789abcdef";
/// What the others send.
struct Others {
    prompt_tokens: usize,
    /// Requests at a time.
    requests: usize,
    rounds: usize,
    duration: Duration,
}

impl Others {
    fn new() -> Self {
        match is_long() {
            true => Self { prompt_tokens: 256, requests: 8, rounds: 5, duration: Duration::from_secs(10) },
            false => Self { prompt_tokens: 64, requests: 4, rounds: 1, duration: Duration::from_secs(1) },
        }
    }
}

/// Tokens of the vocabulary that are tried.
const TRIED: usize = 200;
/// The end of a sequence and what is special are no words of a prompt.
const FIRST_WORD: u32 = 10;

/// One client's prompts would make everybody else wait for a single expert-node.
#[tokio::test(flavor = "multi_thread")]
async fn prompts_of_one_expert_delay_others_as_ordinary_ones_do() {
    let mut random = random("prompts_of_one_expert_delay_others_as_ordinary_ones_do");
    let dir = tempfile::tempdir().expect("a folder");
    let keys = dir.path().join("keys");
    std::fs::write(&keys, format!("honest:{HONEST_KEY}\nothers:{OTHER_KEY}\n")).expect("written");
    let client = |key: &str| ClientConfig { key: Some(OwnKey::Text(key.to_owned())), ..ClientConfig::default() };
    let coordinator_flags = vec!["--api-keys".to_owned(), keys.display().to_string()];
    let config = SandboxConfig { coordinator_flags, client: client(HONEST_KEY), ..Default::default() };
    let reference = Reference::open(&config.model).expect("the model");
    let (word, share) = word_of_one_expert(&reference, &mut random);
    println!("token {word} again and again: {:.1}% of the rows go to one expert of their layer", share * 100.0);
    assert!(share > 0.9, "the prompts are not what this test is about: {share}");
    let words = reference.config().vocab_size as u32;
    let others = Others::new();
    let crafted = vec![word; others.prompt_tokens];
    let ordinary: Vec<u32> = (0..others.prompt_tokens).map(|_| random.random_range(FIRST_WORD..words)).collect();

    let sandbox = Sandbox::start(config).await;
    let load = Load { channels: sandbox.channels(), texts: prompts(), mode: RoutingMode::Exact, tokens: 8, workers: 2 };
    let expected = load.every_text().await.answers();
    let address = sandbox.address().to_owned();
    let mut p99 = BTreeMap::<&str, Vec<Duration>>::new();
    for _ in 0..others.rounds {
        for (name, tokens) in [("ordinary", &ordinary), ("crafted", &crafted)] {
            let (report, answered) = beside(&load, &others, &address, &client(OTHER_KEY), tokens).await;
            println!("{name}: {answered} of the others' were answered; {report}");
            report.assert_as(&expected);
            assert!(answered > 0, "the others were answered, too");
            p99.entry(name).or_default().push(report.latency(0.99));
        }
    }
    let median = |name: &str| {
        let mut of = p99[name].clone();
        of.sort();
        of[of.len() / 2].as_secs_f64()
    };
    let ratio = median("crafted") / median("ordinary");
    println!("p99 of honest requests beside crafted prompts: {ratio:.2} times that beside ordinary ones");
    assert!(!is_long() || ratio <= 2.0, "{ratio:.2}");
}

/// What `load` sees while others ask for encodings of `tokens`, and how many of these were answered.
async fn beside(
    load: &Load,
    &Others { requests, duration, .. }: &Others,
    address: &str,
    client: &ClientConfig,
    tokens: &[u32],
) -> (Report, usize) {
    let mut others = JoinSet::new();
    for _ in 0..requests {
        let channel = connect(address, client).await.expect("connected");
        let request = EncodeRequest { tokens: tokens.to_vec(), pooling: Pooling::Mean.into(), ..Default::default() };
        others.spawn(async move {
            let mut client = InferenceClient::new(channel);
            let (end, mut answered) = (tokio::time::Instant::now() + duration, 0);
            while tokio::time::Instant::now() < end {
                client.encode(request.clone()).await.expect("answered");
                answered += 1;
            }
            answered
        });
    }
    let report = load.run(duration).await;
    (report, others.join_all().await.into_iter().sum())
}

/// The token of which, said again and again, the largest share of all rows goes to the one expert that gets most of its
/// layer's; and that share.
fn word_of_one_expert(reference: &Reference, random: &mut StdRng) -> (u32, f64) {
    const TOKENS: usize = 32;
    let words = reference.config().vocab_size as u32;
    let share = |word: u32| {
        let (_, layers) = reference.encode(&[word; TOKENS]).expect("encoded");
        let most: usize = layers
            .iter()
            .map(|layer| {
                let mut rows = BTreeMap::new();
                for expert in layer.routes.experts.iter().flatten() {
                    *rows.entry(expert).or_insert(0) += 1;
                }
                rows.into_values().max().unwrap_or(0)
            })
            .sum();
        most as f64 / (layers.len() * TOKENS) as f64
    };
    let tried = (0..TRIED).map(|_| random.random_range(FIRST_WORD..words)).map(|word| (word, share(word)));
    tried.max_by(|(_, a), (_, b)| a.total_cmp(b)).expect("some were tried")
}
