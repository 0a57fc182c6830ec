//! A service for the tests of the stack: answers at once, late, or without an end, as the request says. Made by
//! hand, so that these tests need no service of ours. Each test file uses a part of it.

#![allow(dead_code, unreachable_pub, missing_docs)]

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, StreamExt, stream};
use http::uri::PathAndQuery;
use sida_rpc::{
    Channel, Client, ClientConfig, Deadline, MESSAGE_BYTES_MAX, RequestId, Server, ServerConfig, ServerError,
};
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, body::Body, server::NamedService, service::Routes};
use tonic_prost::ProstCodec;
use tower::{Service, service_fn};

/// A message that is only bytes.
pub type Bytes = Vec<u8>;
type Codec = ProstCodec<Bytes, Bytes>;

/// The service; tells by its channel when a handler was dropped.
#[derive(Clone)]
pub struct Echo {
    dropped: mpsc::UnboundedSender<&'static str>,
}

struct OnDrop(&'static str, mpsc::UnboundedSender<&'static str>);

impl Drop for OnDrop {
    fn drop(&mut self) {
        let _ = self.1.send(self.0);
    }
}

impl NamedService for Echo {
    const NAME: &'static str = "test.Echo";
}

impl Echo {
    /// `sleep N`: answers after N ms. `who`: the request's name and time left. `client`: whose it is. `fail`: INTERNAL. Else:
    /// echoes.
    async fn unary(self, request: Request<Bytes>) -> Result<Response<Bytes>, Status> {
        let _guard = OnDrop("unary", self.dropped.clone());
        let id = RequestId::of(&request).expect("the stack names every request");
        let deadline = Deadline::of(&request).map(Deadline::remaining);
        let client = Client::of(&request);
        let has_key = request.metadata().contains_key("authorization");
        let message = request.into_inner();
        let text = String::from_utf8_lossy(&message).into_owned();
        if let Some(delay_ms) = text.strip_prefix("sleep ") {
            tokio::time::sleep(Duration::from_millis(delay_ms.parse().unwrap())).await;
        }
        match text.as_str() {
            "who" => Ok(Response::new(format!("{id} {deadline:?}").into_bytes())),
            "client" => Ok(Response::new(format!("{} {has_key}", client.expect("a client")).into_bytes())),
            "fail" => Err(Status::internal("as asked")),
            _ => Ok(Response::new(message)),
        }
    }

    /// Counts every 10 ms, for ever.
    async fn count(self) -> Result<Response<impl Stream<Item = Result<Bytes, Status>> + Send>, Status> {
        let guard = OnDrop("stream", self.dropped);
        let numbers = stream::unfold((0u8, guard), |(number, guard)| async move {
            tokio::time::sleep(Duration::from_millis(10)).await;
            Some((Ok(vec![number]), (number.wrapping_add(1), guard)))
        });
        Ok(Response::new(numbers))
    }
}

impl Service<http::Request<Body>> for Echo {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let echo = self.clone();
        let mut grpc =
            tonic::server::Grpc::new(Codec::default()).apply_max_message_size_config(Some(MESSAGE_BYTES_MAX), None);
        Box::pin(async move {
            Ok(match request.uri().path() {
                "/test.Echo/Count" => {
                    let count = service_fn(move |_: Request<Bytes>| echo.clone().count());
                    grpc.server_streaming(count, request).await
                }
                _ => grpc.unary(service_fn(move |request| echo.clone().unary(request)), request).await,
            })
        })
    }
}

/// A running server and a way to it.
pub struct Running {
    pub address: String,
    pub shutdown: CancellationToken,
    pub server: JoinHandle<Result<(), ServerError>>,
    pub dropped: mpsc::UnboundedReceiver<&'static str>,
}

impl Running {
    /// Serves Echo by `config` at a free port; `assemble` adds to the server.
    pub async fn start(config: ServerConfig, assemble: impl FnOnce(Server) -> Server) -> Self {
        let (sender, dropped) = mpsc::unbounded_channel();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shutdown = CancellationToken::new();
        let server = assemble(Server::new(config).routes(Routes::new(Echo { dropped: sender })));
        let server = tokio::spawn(server.serve(listener, shutdown.clone()));
        Self { address, shutdown, server, dropped }
    }

    pub async fn channel(&self) -> Channel {
        sida_rpc::connect(&self.address, &ClientConfig::default()).await.unwrap()
    }

    /// Shuts down and waits for the server to end.
    pub async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(Duration::from_secs(10), self.server).await.expect("ends").unwrap().unwrap();
    }
}

/// One unary call.
pub async fn unary(channel: &Channel, request: Request<Bytes>) -> Result<Response<Bytes>, Status> {
    let mut grpc = tonic::client::Grpc::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    grpc.unary(request, PathAndQuery::from_static("/test.Echo/Unary"), Codec::default()).await
}

/// The endless stream: its first number, and then the rest.
pub async fn count(
    channel: &Channel,
    request: Request<Bytes>,
) -> impl Stream<Item = Result<Bytes, Status>> + Send + Unpin + use<> {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready().await.unwrap();
    let path = PathAndQuery::from_static("/test.Echo/Count");
    let mut numbers = grpc.server_streaming(request, path, Codec::default()).await.unwrap().into_inner();
    assert_eq!(numbers.next().await.unwrap().unwrap(), [0]);
    numbers
}

/// A request with a raw header.
pub fn with_header(message: &str, name: &'static str, value: &'static str) -> Request<Bytes> {
    let mut request = Request::new(message.as_bytes().to_vec());
    request.metadata_mut().insert(name, value.parse().unwrap());
    request
}
