//! One connection from its first byte to its last: the handshake under a limit, calls, and a goodbye when the server
//! ends, when its place is needed, or when it had no call for too long. Run by [`crate::server`] and [`crate::http_server`],
//! once for each connection that [`crate::accept`] accepted. gRPC is HTTP/2 only; where HTTP/1.1 is served as well, a
//! peer's first bytes say which it speaks.
//!
//! A peer that is silent during the handshake is dropped at once when it has to leave: nothing was promised to it. Later
//! it is told (GOAWAY), so that a call which is on its way at that moment is answered still.

use std::{
    collections::HashSet,
    convert::Infallible,
    io::{self, Cursor},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::{Request, Response};
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
};
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    net::TcpStream,
    time::{self, Instant},
};
use tokio_rustls::server::TlsStream;
use tonic::body::Body;
use tower::Service;

use crate::{
    answer_body::{AnswerBody, AnswerExecutor},
    caller::FarEnd,
    certificate_names::{self, NamePattern},
    control_frames,
    http1_limits::watched,
    peer::Peer,
    plain_text,
    receiving::Receiving,
    reload::Reloading,
    request_body::{Messages, RequestBody, Unit},
    server::{ServerConfig, http2_builder},
    tls::PortTls,
    turn::Turn,
};

/// What an HTTP/2 client says first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long a peer that was told to leave may take for that after its last call.
const GOODBYE: Duration = Duration::from_secs(3);

/// How long the calls may go on of a peer that was told to leave for another.
const DISPLACED_CALLS: Duration = Duration::from_secs(30);

/// Why a connection is ended without a farewell.
const EXPELLED: &str = "it did not leave while many others came";
const HARMFUL: &str = "it does harm";

/// How long a peer that does harm is left to wait for its end, so that it does not come again at once. It costs its place,
/// which is free before if another needs it.
const HARMFUL_WAITS: Duration = Duration::from_secs(5);

/// How to serve a connection.
pub(crate) struct Connector<S> {
    service: S,
    http2: http2::Builder<AnswerExecutor>,
    /// `None`: who does not speak HTTP/2 is refused.
    http1: Option<Http1>,
    /// `None`: plain text.
    tls: Option<Arc<Reloading<PortTls>>>,
    /// Names of certificates that are let in; empty: all that TLS lets in.
    client_names: Vec<NamePattern>,
    handshake_timeout: Duration,
    idle_timeout: Duration,
    /// How long a peer may be silent until it is asked whether it is there, and how long it may take to say so. Whole
    /// seconds.
    keepalive: (Duration, Duration),
    /// Bytes that a connection carries until others have their turn.
    turn_bytes: u32,
    limits: Arc<CallLimits>,
}

impl<S> Connector<S> {
    /// Connections of a server to `service`. `http1` and `streams`: as the fields of these names are.
    pub(crate) fn new(
        config: &ServerConfig,
        service: S,
        tls: Option<Arc<Reloading<PortTls>>>,
        http1: Option<Http1>,
        streams: Option<HashSet<String>>,
    ) -> Arc<Self> {
        let receiving = Receiving::new(config.receiving_bytes_max, config.large_bytes_per_second);
        let stall_timeout = config.stall_timeout;
        Arc::new(Self {
            service,
            http2: http2_builder(config),
            http1,
            tls,
            client_names: config.tls.clone().map_or_else(Vec::new, |tls| tls.client_names),
            handshake_timeout: config.handshake_timeout,
            idle_timeout: config.idle_timeout,
            keepalive: (config.keepalive_interval, config.keepalive_timeout),
            turn_bytes: config.frame_bytes_max,
            limits: Arc::new(CallLimits { stall_timeout, receiving, streams }),
        })
    }
}

/// Limits of calls.
#[derive(Debug)]
pub(crate) struct CallLimits {
    /// How long the peer may take for a request, and take nothing of an answer.
    stall_timeout: Duration,
    /// The memory of requests that come.
    receiving: Arc<Receiving>,
    /// Of gRPC: paths of calls that are streams of messages from the client. `None`: a request is a whole body.
    streams: Option<HashSet<String>>,
}

impl CallLimits {
    fn unit(&self, path: &str) -> Unit {
        match &self.streams {
            None => Unit::Body { bytes: 0 },
            Some(streams) if streams.contains(path) => Unit::Messages(Messages::default()),
            Some(_) => Unit::Message(Messages::default()),
        }
    }
}

/// How HTTP/1.1 is served.
pub(crate) struct Http1 {
    pub(crate) builder: http1::Builder,
    /// How long the head of a request may take from its first byte.
    pub(crate) head_timeout: Duration,
}

/// What answers the calls of connections.
pub(crate) trait ConnectionService:
    Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send + 'static>
    + Clone
    + Send
    + Sync
    + 'static
{
}

impl<S> ConnectionService for S where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send + 'static>
        + Clone
        + Send
        + Sync
        + 'static
{
}

impl<S: ConnectionService> Connector<S> {
    /// Serves `stream` until its peer leaves or has to.
    pub(crate) async fn serve(self: Arc<Self>, stream: TcpStream, peer: Arc<Peer>) {
        let connection = peer_address(&stream);
        // A decoding step is many small messages: none may wait for the next to fill a packet.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(connection, %error, "small messages may wait");
        }
        // What is not sent yet of an answer lies here, where it counts, and not in the system, which takes megabytes.
        #[cfg(target_os = "linux")]
        if let Err(error) = SockRef::from(&stream).set_tcp_notsent_lowat(2 * self.turn_bytes) {
            tracing::debug!(connection, %error, "the system takes more of an answer than it can send");
        }
        // HTTP/2 pings by itself; whoever speaks HTTP/1.1 and is gone without a word is found by this alone.
        let keepalive = TcpKeepalive::new().with_time(self.keepalive.0).with_interval(self.keepalive.1).with_retries(1);
        if let Err(error) = SockRef::from(&stream).set_tcp_keepalive(&keepalive) {
            tracing::debug!(connection, %error, "a peer that is gone may be kept");
        }
        let address = stream.peer_addr().ok().map(|address| address.ip());
        let end = FarEnd { address, certificate_name: None };
        let served = match &self.tls {
            None => self.greet_and_serve(std::future::ready(Ok((stream, end))), peer).await,
            Some(tls) => {
                let acceptor = tls.current();
                let secured = async {
                    let mut stream = stream;
                    if self.http1.is_some() {
                        plain_text::refuse(&mut stream).await?;
                    }
                    let stream = acceptor.accept(stream).await?;
                    let certificate_name = let_in(&stream, &self.client_names)?;
                    Ok((stream, FarEnd { certificate_name, ..end }))
                };
                self.greet_and_serve(secured, peer).await
            }
        };
        match served {
            Ok(()) => tracing::debug!(connection, "closed"),
            Err(error) => tracing::debug!(connection, error, "broken off"),
        }
    }

    /// `secured` becomes the connection once TLS, if any, is agreed on, and who is at its other end.
    async fn greet_and_serve<IO>(
        &self,
        secured: impl Future<Output = io::Result<(IO, FarEnd)>>,
        peer: Arc<Peer>,
    ) -> Result<(), String>
    where
        IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let greeting = time::timeout(self.handshake_timeout, async {
            let (io, end) = secured.await?;
            Ok::<_, io::Error>((greeted(io).await?, end))
        });
        let greeted = tokio::select! {
            greeted = greeting => greeted,
            () = peer.leave.cancelled() => return Err("told to leave before its handshake was over".to_owned()),
        };
        match greeted {
            Ok(Ok((Greeted { io, speaks_http2: true, .. }, end))) => self.serve_http2(io, end, peer).await,
            Ok(Ok((Greeted { io, said, .. }, end))) => match &self.http1 {
                Some(http1) => self.serve_http1(http1, io, end, peer).await,
                None => Err(format!("handshake: HTTP/2 was expected, found {}", said.escape_ascii())),
            },
            Ok(Err(error)) => Err(format!("handshake: {error}")),
            Err(_) => Err(format!("no handshake within {:?}", self.handshake_timeout)),
        }
    }

    async fn serve_http2<IO>(&self, io: IO, end: FarEnd, peer: Arc<Peer>) -> Result<(), String>
    where
        IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let turn = Turn::new(self.turn_bytes as usize);
        let io = control_frames::Counted::new(io, peer.clone(), turn.clone(), PREFACE.len());
        let connection = self.http2.serve_connection(TokioIo::new(io), self.counted(end, &peer));
        tokio::pin!(connection);
        tokio::select! {
            ended = turn.of(connection.as_mut()) => return ended.map_err(|error| error.to_string()),
            () = peer.harmful.cancelled() => {
                // Nothing is read of it meanwhile.
                let _ = time::timeout(HARMFUL_WAITS, peer.leave.cancelled()).await;
                return Err(HARMFUL.to_owned());
            }
            () = self.has_to_leave(&peer) => {}
        }
        connection.as_mut().graceful_shutdown();
        last_words(turn.of(connection.as_mut()), &peer).await
    }

    async fn serve_http1<IO>(&self, http1: &Http1, io: IO, end: FarEnd, peer: Arc<Peer>) -> Result<(), String>
    where
        IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let turn = Turn::new(self.turn_bytes as usize);
        let (io, heads) = watched(io, peer.clone(), turn.clone(), self.limits.stall_timeout);
        let connection = http1.builder.serve_connection(TokioIo::new(io), self.counted(end, &peer));
        tokio::pin!(connection);
        tokio::select! {
            ended = turn.of(connection.as_mut()) => return ended.map_err(|error| error.to_string()),
            () = heads.too_slow(http1.head_timeout) => {
                return Err(format!("no whole head of a request within {:?}", http1.head_timeout));
            }
            () = self.has_to_leave(&peer) => {}
        }
        connection.as_mut().graceful_shutdown();
        last_words(turn.of(connection.as_mut()), &peer).await
    }

    fn counted(&self, end: FarEnd, peer: &Arc<Peer>) -> TowerToHyperService<Counted<S>> {
        let (inner, limits) = (self.service.clone(), self.limits.clone());
        TowerToHyperService::new(Counted { inner, end, peer: peer.clone(), limits })
    }

    /// Waits until `peer` is told to leave, or has had no call for too long.
    async fn has_to_leave(&self, peer: &Peer) {
        tokio::select! {
            () = peer.leave.cancelled() => {}
            () = peer.quiet_for(self.idle_timeout, Instant::now()) => {}
        }
    }
}

/// What is left of a connection that was told to end.
async fn last_words<E: ToString>(ending: impl Future<Output = Result<(), E>>, peer: &Peer) -> Result<(), String> {
    let displaced = async {
        peer.displaced.cancelled().await;
        time::sleep(DISPLACED_CALLS).await;
    };
    tokio::select! {
        ended = ending => ended.map_err(|error| error.to_string()),
        () = peer.quiet_for(GOODBYE, Instant::now()) => Err("did not leave when it was told to".to_owned()),
        () = peer.expelled.cancelled() => Err(EXPELLED.to_owned()),
        () = peer.harmful.cancelled() => Err(HARMFUL.to_owned()),
        () = displaced => Err("its calls did not end when its place was needed".to_owned()),
    }
}

fn peer_address(stream: &TcpStream) -> String {
    stream.peer_addr().map_or_else(|error| error.to_string(), |address| address.to_string())
}

/// What the peer of a connection is called by the certificate that it showed, if any; an error if it must have one of
/// `allowed` and has none of them.
fn let_in(stream: &TlsStream<TcpStream>, allowed: &[NamePattern]) -> io::Result<Option<Arc<str>>> {
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let names = certificate.map_or_else(Vec::new, |certificate| certificate_names::names(certificate));
    if allowed.is_empty() || names.iter().any(|name| allowed.iter().any(|allowed| allowed.matches(name))) {
        return Ok(names.into_iter().next());
    }
    // Somebody whom our authority knows: a member with a wrong certificate, or no member.
    tracing::warn!(
        names = names.join(", "),
        "a certificate of another name than those of --tls-client-names is refused"
    );
    Err(io::Error::new(io::ErrorKind::PermissionDenied, "its certificate has none of the names that are let in"))
}

/// A connection whose client has begun to speak.
struct Greeted<IO> {
    io: IO,
    speaks_http2: bool,
    /// Its first bytes.
    said: Vec<u8>,
}

/// `io` once the client has said whether it speaks HTTP/2. Read here, because hyper would wait for it without a limit.
async fn greeted<IO>(mut io: IO) -> io::Result<Greeted<impl AsyncRead + AsyncWrite + Send + Unpin>>
where
    IO: AsyncRead + AsyncWrite + Send + Unpin,
{
    let mut said = Vec::with_capacity(PREFACE.len());
    // A request of HTTP/1.1 may be shorter than the preface, so that no more is awaited than tells them apart.
    while said.len() < PREFACE.len() && PREFACE.starts_with(&said) {
        if (&mut io).take((PREFACE.len() - said.len()) as u64).read_buf(&mut said).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    let (reader, writer) = tokio::io::split(io);
    let io = tokio::io::join(Cursor::new(said.clone()).chain(reader), writer);
    Ok(Greeted { io, speaks_http2: said == PREFACE, said })
}

/// A service whose calls are counted, each until the last byte of its answer, and know where they came from.
#[derive(Clone)]
struct Counted<S> {
    inner: S,
    end: FarEnd,
    peer: Arc<Peer>,
    limits: Arc<CallLimits>,
}

impl<S: ConnectionService> Service<Request<Incoming>> for Counted<S> {
    type Response = Response<AnswerBody>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Incoming>) -> Self::Future {
        request.extensions_mut().insert(self.end.clone());
        let call = self.peer.call();
        let (unit, limit, share) =
            (self.limits.unit(request.uri().path()), self.limits.stall_timeout, self.limits.receiving.share());
        let answering = self.inner.call(request.map(|body| Body::new(RequestBody::new(body, unit, limit, share))));
        Box::pin(async move { Ok(answering.await?.map(|inner| AnswerBody::new(inner, call))) })
    }
}
