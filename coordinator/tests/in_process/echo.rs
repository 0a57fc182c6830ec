//! Prompts before their answers, with how likely their tokens were: what evaluations of models ask for.

use serde_json::{Value, json};
use sida_model::{Reference, Tokenizer};

use crate::{
    openai_door::{TEXT, chunks, served},
    plain_experts::{decoder_only_dir, model_dir},
    plain_http::post,
};

const PROMPT: &str = "the router of é chose";

/// ln p of each token but the first, by the reference, and the likeliest in its place.
fn expected(ids: &[u32]) -> Vec<(f64, f64)> {
    let reference = Reference::open(&decoder_only_dir()).expect("reference");
    let (logits, _) = reference.decode_forced(&[], ids).expect("logits");
    let rows = logits.chunks_exact(reference.config().vocab_size);
    let of = |(row, &token): (&[f32], &u32)| {
        let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
        let likeliest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        (f64::from(row[token as usize]) - sum.ln(), f64::from(likeliest) - sum.ln())
    };
    rows.zip(&ids[1..]).map(of).collect()
}

fn list<'a>(logprobs: &'a Value, name: &str) -> &'a Vec<Value> {
    logprobs[name].as_array().unwrap_or_else(|| panic!("no {name} in {logprobs}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompts_tokens_have_the_models_probabilities() {
    // Would break: an evaluation scores a model by probabilities that are not its own, or by those of other tokens.
    let dir = decoder_only_dir();
    let served = served(&dir, |_| ()).await;
    let reference = Reference::open(&dir).expect("reference");
    let ids = Tokenizer::open(&dir, reference.config()).expect("tokenizer").encode(PROMPT).expect("ids");
    let request = json!({"prompt": [PROMPT, ids], "echo": true, "logprobs": 2, "max_tokens": 0});
    let alone = post(served.http, "/v1/completions", &request).await;
    assert_eq!(alone.status, 200, "{alone:?}");
    let alone = alone.json();
    assert_eq!(alone["choices"][0]["logprobs"], alone["choices"][1]["logprobs"], "a text, and its tokens");
    assert_eq!(
        (&alone["usage"]["prompt_tokens"], &alone["usage"]["completion_tokens"]),
        (&json!(2 * ids.len()), &json!(0))
    );
    let choice = &alone["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(PROMPT), &json!("length")));
    let logprobs = &choice["logprobs"];
    let (found, top) = (list(logprobs, "token_logprobs"), list(logprobs, "top_logprobs"));
    assert!(found[0].is_null() && top[0].is_null(), "nothing is before the first");
    for ((found, top), (own, likeliest)) in found[1..].iter().zip(&top[1..]).zip(expected(&ids)) {
        assert!((found.as_f64().expect("a number") - own).abs() < 1e-4, "{found} for {own}");
        let most = top.as_object().expect("others").values().filter_map(Value::as_f64).fold(f64::MIN, f64::max);
        assert!((most - likeliest).abs() < 1e-4, "{top} for {likeliest}");
    }
    assert_eq!(found.len(), ids.len());
    let offsets: Vec<usize> =
        list(logprobs, "text_offset").iter().map(|at| at.as_u64().expect("a place") as usize).collect();
    assert!(offsets[0] == 0 && offsets.is_sorted() && offsets.iter().all(|&at| at <= PROMPT.chars().count()));

    // Of a prompt of one token nobody tells of others, and a list has a place for it all the same.
    for (generated, expected) in [(0, 1), (1, 2)] {
        let request = json!({"prompt": ids[..1], "echo": true, "logprobs": 1, "max_tokens": generated});
        let one = post(served.http, "/v1/completions", &request).await.json();
        for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            assert_eq!(list(&one["choices"][0]["logprobs"], name).len(), expected, "{name}: {one}");
        }
    }

    // With an answer behind it, whole and as it comes.
    let mut request =
        json!({"prompt": PROMPT, "echo": true, "logprobs": 2, "max_tokens": 3, "n": 2, "ignore_eos": true});
    let whole = post(served.http, "/v1/completions", &request).await.json();
    for choice in whole["choices"].as_array().expect("choices") {
        for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            let list = list(&choice["logprobs"], name);
            assert_eq!(
                (list[..ids.len()].to_vec(), list.len()),
                (logprobs[name].as_array().expect("a list").clone(), ids.len() + 3)
            );
        }
        assert_eq!(list(&choice["logprobs"], "text_offset")[ids.len()], PROMPT.chars().count());
    }
    request["stream"] = true.into();
    let answer = post(served.http, "/v1/completions", &request).await;
    let (events, mut tokens) = (answer.events(), vec![Vec::new(); 2]);
    for part in chunks(&events).iter().flat_map(|chunk| chunk["choices"].as_array().expect("choices")) {
        let index = part["index"].as_u64().expect("an index") as usize;
        tokens[index].extend(list(&part["logprobs"], "token_logprobs").clone());
    }
    for (index, tokens) in tokens.iter().enumerate() {
        assert_eq!(tokens, list(&whole["choices"][index]["logprobs"], "token_logprobs"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_no_probability_is_said_to_have_none() {
    // Would break: a model with an encoder is scored by numbers that mean nothing, or a prompt alone cannot be asked for.
    let encoder = served(&model_dir(), |_| ()).await;
    let request = json!({"prompt": TEXT, "echo": true, "logprobs": 1, "max_tokens": 0});
    let refused = post(encoder.http, "/v1/completions", &request).await;
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("logprobs")), "{refused:?}");
    assert!(refused.body.contains("encoder"), "{refused:?}");
    let request = json!({"prompt": TEXT, "echo": true, "max_tokens": 0, "stream": true, "stream_options": {"include_usage": true}});
    let answer = post(encoder.http, "/v1/completions", &request).await;
    let events = answer.events();
    let chunks = chunks(&events);
    assert_eq!(
        (&chunks[0]["choices"][0]["text"], &chunks[0]["choices"][0]["finish_reason"]),
        (&json!(TEXT), &json!("length"))
    );
    assert!(chunks.len() == 2 && chunks[1]["usage"]["prompt_tokens"].as_u64() > Some(1), "{chunks:?}");

    let decoder = served(&decoder_only_dir(), |_| ()).await;
    let one = json!({"prompt": [7], "echo": true, "logprobs": 0, "max_tokens": 0});
    let one = post(decoder.http, "/v1/completions", &one).await.json();
    assert_eq!(one["choices"][0]["logprobs"]["token_logprobs"], json!([null]), "{one}");
}
