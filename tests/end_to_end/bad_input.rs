//! What a client can get wrong: each a status that says what, and a service that goes on.

use bytes::{Buf, BufMut, Bytes};
use sida_proto::v1::{self, inference_client::InferenceClient};
use sida_rpc::{Channel, Reason};
use sida_tests::{Sandbox, SandboxConfig};
use tonic::{
    Code, Request, Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
};

use crate::client::{generate, greedy};

const TEXT: &str = "sst2 sentence: a small film with a large heart .";

async fn refused(channel: &Channel, request: v1::GenerateRequest) -> (Code, Option<Reason>) {
    let status = generate(channel, request).await.err().expect("a refusal");
    (status.code(), Reason::of(&status))
}

/// A mistake in a request would be answered as if it were none, or with a code that says "try again".
#[tokio::test(flavor = "multi_thread")]
async fn requests_out_of_range() {
    let sandbox = Sandbox::start(SandboxConfig::default()).await;
    let channel = sandbox.channel();
    let invalid = |reason| (Code::InvalidArgument, Some(reason));
    for text in ["", "   ", "\n\t"] {
        assert_eq!(refused(&channel, greedy(text, 4)).await, invalid(Reason::EmptyText), "{text:?}");
    }
    let long = "word ".repeat(600);
    assert_eq!(refused(&channel, greedy(&long, 4)).await, invalid(Reason::TextTooLong));
    assert_eq!(refused(&channel, greedy(&"w".repeat(2 << 20), 4)).await, invalid(Reason::TextTooLong));
    let plain = greedy(TEXT, 4);
    for request in [
        v1::GenerateRequest { max_tokens: u32::MAX, ..plain.clone() },
        v1::GenerateRequest { min_tokens: Some(5), ..plain.clone() },
        v1::GenerateRequest { temperature: Some(-1.0), ..plain.clone() },
        v1::GenerateRequest { temperature: Some(f32::NAN), ..plain.clone() },
        v1::GenerateRequest { top_p: Some(1.5), ..plain.clone() },
        v1::GenerateRequest { min_p: Some(f32::NAN), ..plain.clone() },
        v1::GenerateRequest { frequency_penalty: f32::INFINITY, ..plain.clone() },
        v1::GenerateRequest { logit_bias: [(u32::MAX, 1.0)].into(), ..plain.clone() },
        v1::GenerateRequest { choices: u32::MAX, ..plain.clone() },
        v1::GenerateRequest { logprobs: Some(u32::MAX), ..plain.clone() },
        v1::GenerateRequest { text: String::new(), tokens: vec![u32::MAX], ..plain.clone() },
        v1::GenerateRequest { stop: vec![String::new()], ..plain.clone() },
        v1::GenerateRequest { stop: vec!["x".into(); 10_000], ..plain.clone() },
        v1::GenerateRequest { routing: Some(v1::RoutingOptions { mode: 77, alpha: 0 }), ..plain.clone() },
    ] {
        let shown = format!("{request:?}").chars().take(300).collect::<String>();
        assert_eq!(refused(&channel, request).await, invalid(Reason::InvalidRequest), "{shown}");
    }

    let mut client = InferenceClient::new(channel.clone());
    for targets in [vec![], vec!["a".to_owned(); 65], vec![" ".to_owned()]] {
        let request = v1::ScoreRequest { text: TEXT.into(), targets, ..Default::default() };
        let status = client.score(request).await.expect_err("a refusal");
        assert_eq!((status.code(), Reason::of(&status)), invalid(Reason::InvalidRequest));
    }
    generate(&channel, plain).await.expect("the service goes on");
}

/// A text in any script, or none, would end the coordinator.
#[tokio::test(flavor = "multi_thread")]
async fn strange_texts() {
    let sandbox = Sandbox::start(SandboxConfig::default()).await;
    let texts =
        ["\u{0}", "<pad>", "</s>", "<extra_id_0>", "日本語のテキスト", "\u{202e}\u{feff}x", "🦀🦀🦀", "a\u{301}"];
    for text in texts {
        if let Err(status) = generate(&sandbox.channel(), greedy(text, 4)).await {
            assert_eq!(status.code(), Code::InvalidArgument, "{text:?}: {status}");
        }
    }
    generate(&sandbox.channel(), greedy(TEXT, 4)).await.expect("the service goes on");
}

/// Bytes that are no message would end the coordinator, or be blamed on it.
#[tokio::test(flavor = "multi_thread")]
async fn malformed_messages() {
    let sandbox = Sandbox::start(SandboxConfig::default()).await;
    for body in [&b"\xff\xff\xff\xff"[..], b"\x0a\xff\xff\xff\xff\x0fx", b"\x0a\x03abc\x0b", &[0x0a; 3]] {
        let status = send(&sandbox.channel(), "/sida.v1.Inference/Encode", body).await.expect_err("a refusal");
        let found = (status.code(), Reason::of(&status));
        assert_eq!(found, (Code::InvalidArgument, Some(Reason::MalformedMessage)), "{body:?}: {status}");
    }
    let unknown = send(&sandbox.channel(), "/sida.v1.Inference/Translate", b"").await.expect_err("a refusal");
    assert_eq!(unknown.code(), Code::Unimplemented);
    generate(&sandbox.channel(), greedy(TEXT, 4)).await.expect("the service goes on");
}

/// Sends any bytes as the one message of a call.
async fn send(channel: &Channel, path: &'static str, body: &[u8]) -> Result<Bytes, Status> {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let request = Request::new(Bytes::copy_from_slice(body));
    Ok(client.unary(request, PathAndQuery::from_static(path), Verbatim).await?.into_inner())
}

/// A codec that leaves bytes as they are.
struct Verbatim;

impl Codec for Verbatim {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Verbatim {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for Verbatim {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}
