//! Who may call, and who calls: a layer that lets in whoever has a key of the server's file, where there is one, and tells
//! handlers the [`Client`], and by [`KeyTakenAway`] when its key lets in no more. For every door, whatever its responses are made of: how a refusal looks, and which paths are
//! open to all, is given to the layer. Put in place by [`crate::server`] for gRPC.
//!
//! Invariant: a key goes no further than this. The header is taken off the request, and nothing here prints it.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use http::{HeaderMap, Request, Response, header::AUTHORIZATION};
use sida_routing::client_limits::ClientLimits;
use sida_telemetry::Seldom;
use tokio_util::sync::CancellationToken;
use tower::{Layer, Service};

use crate::{
    caller::{CallerSlot, Client, FarEnd},
    keys::{KeyError, KeyFile},
    reload::Reloading,
    status::{Fault, Reason},
};

/// Before a key in its header, in any case.
const SCHEME: &str = "Bearer";

/// gRPC services that whoever reaches the port may ask: probes have no key.
const OPEN_SERVICES: [&str; 2] = ["/grpc.health.", "/grpc.reflection."];

/// The keys that let in. Clones are the same; the default has none and lets in everybody.
#[derive(Clone, Default)]
pub struct Gate {
    keys: Option<Arc<Reloading<KeyFile>>>,
    /// Log lines of calls that were refused.
    refusals: Arc<Seldom>,
}

impl Gate {
    /// Lets in whoever has one of the keys in `file`.
    pub fn open(file: KeyFile) -> Result<Self, KeyError> {
        Reloading::open(file).map(|keys| Self { keys: Some(keys), ..Self::default() })
    }

    /// Looks every `period` whether the file has changed, for ever. Several may follow one file.
    pub async fn follow(&self, period: Duration) {
        match &self.keys {
            Some(keys) => match keys.clone().follow(period).await {},
            None => std::future::pending().await,
        }
    }

    /// What the keys' file says that a client may use. Of one without a key it says nothing.
    pub fn limits(&self, client: &Client) -> ClientLimits {
        let keys = self.keys.as_ref().zip(client.key_name());
        keys.map_or_else(ClientLimits::default, |(keys, name)| keys.current().limits(name))
    }

    /// Whose call it is that has these headers and came from there; the fault of one who has no key that is known.
    fn caller(&self, headers: &HeaderMap, end: Option<&FarEnd>) -> Result<Caller, Fault> {
        let Some(keys) = &self.keys else {
            return Ok(Caller { client: end.and_then(Client::of_connection), key_taken_away: None });
        };
        let refused = |message| Fault::new(Reason::Unauthenticated, message);
        let header = headers.get(AUTHORIZATION).ok_or_else(|| refused("a key is needed: authorization: Bearer KEY"))?;
        let key = key(header.as_bytes()).ok_or_else(|| refused("authorization holds no key, expected Bearer KEY"))?;
        let known = keys.current().known(key).ok_or_else(|| refused("the key is not known here"))?;
        Ok(Caller { client: Some(Client::of_key(known.name)), key_taken_away: Some(KeyTakenAway(known.taken_away)) })
    }

    /// Says now and then who is refused, and why: the node at the other end may be one of ours with a wrong key.
    fn tell(&self, fault: &Fault, path: &str, end: Option<&FarEnd>) {
        if let Some(lines_left_out) = self.refusals.next(Instant::now()) {
            let address = end.and_then(|end| end.address).map(tracing::field::display);
            tracing::warn!(path, address, reason = fault.message(), lines_left_out, "a call was refused");
        }
    }
}

/// Whose call it is.
struct Caller {
    client: Option<Client>,
    key_taken_away: Option<KeyTakenAway>,
}

/// Tells when the key of a call lets in no more: an extension of its request. Absent where no key was asked for.
#[derive(Clone, Debug)]
pub struct KeyTakenAway(CancellationToken);

impl KeyTakenAway {
    /// Completes when that is so.
    pub async fn happens(&self) {
        self.0.cancelled().await;
    }

    /// What the call is told then.
    pub fn fault(&self) -> Fault {
        Fault::new(Reason::Unauthenticated, "the key that this call came by was taken away")
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.keys {
            None => f.write_str("Gate(all)"),
            Some(keys) => f.debug_tuple("Gate").field(keys).finish(),
        }
    }
}

/// The key in a header's value, not checked.
fn key(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked(SCHEME.len())?;
    let is_bearer = scheme.eq_ignore_ascii_case(SCHEME.as_bytes()) && key.first() == Some(&b' ');
    is_bearer.then(|| key.trim_ascii())
}

/// Whether a path is of a service that needs no key.
pub(crate) fn is_open_service(path: &str) -> bool {
    OPEN_SERVICES.iter().any(|open| path.starts_with(open))
}

/// Makes [`AuthenticationService`]s whose refusals have a body `B`.
pub struct AuthenticationLayer<B> {
    gate: Gate,
    is_open: fn(&str) -> bool,
    refuse: fn(Fault) -> Response<B>,
}

/// Lets in whoever has a key.
pub struct AuthenticationService<S, B> {
    inner: S,
    layer: AuthenticationLayer<B>,
}

impl<B> AuthenticationLayer<B> {
    /// Lets in whom `gate` knows, and everybody to the paths that `is_open` says; `refuse` makes the response of others.
    pub fn new(gate: Gate, is_open: fn(&str) -> bool, refuse: fn(Fault) -> Response<B>) -> Self {
        Self { gate, is_open, refuse }
    }
}

impl<B> Clone for AuthenticationLayer<B> {
    fn clone(&self) -> Self {
        Self { gate: self.gate.clone(), is_open: self.is_open, refuse: self.refuse }
    }
}

impl<S: Clone, B> Clone for AuthenticationService<S, B> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), layer: self.layer.clone() }
    }
}

impl<S, B> Layer<S> for AuthenticationLayer<B> {
    type Service = AuthenticationService<S, B>;

    fn layer(&self, inner: S) -> Self::Service {
        AuthenticationService { inner, layer: self.clone() }
    }
}

impl<S, Q, B> Service<Request<Q>> for AuthenticationService<S, B>
where
    S: Service<Request<Q>, Response = Response<B>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    B: Send + 'static,
{
    type Response = Response<B>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<B>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Q>) -> Self::Future {
        let AuthenticationLayer { gate, is_open, refuse } = &self.layer;
        if !is_open(request.uri().path()) {
            match gate.caller(request.headers(), request.extensions().get()) {
                Ok(Caller { client, key_taken_away }) => {
                    introduce(client, &mut request);
                    key_taken_away.and_then(|event| request.extensions_mut().insert(event));
                }
                Err(fault) => {
                    gate.tell(&fault, request.uri().path(), request.extensions().get());
                    let response = refuse(fault);
                    return Box::pin(std::future::ready(Ok(response)));
                }
            }
        }
        request.headers_mut().remove(AUTHORIZATION);
        Box::pin(self.inner.call(request))
    }
}

/// Tells all who handle the request, and the log, whose it is.
fn introduce<Q>(client: Option<Client>, request: &mut Request<Q>) {
    let Some(client) = client else { return };
    tracing::Span::current().record("client", tracing::field::display(&client));
    if let Some(slot) = request.extensions().get::<CallerSlot>() {
        slot.fill(&client);
    }
    request.extensions_mut().insert(client);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_read_as_http_writes_it() {
        // Would break: clients of the web's libraries, which write `bearer`, are refused, or a password is taken for a key.
        for (value, expected) in [
            ("Bearer abc", Some("abc")),
            ("bearer abc", Some("abc")),
            ("BEARER   abc ", Some("abc")),
            ("Bearer ", Some("")),
            ("Bearer", None),
            ("Bearerabc", None),
            ("Basic abc", None),
            ("abc", None),
            ("", None),
        ] {
            assert_eq!(key(value.as_bytes()), expected.map(str::as_bytes), "{value:?}");
        }
    }

    #[test]
    fn only_what_tells_nothing_is_open() {
        // Would break: whoever reaches the port sees the cluster or uses the model, or no probe is answered.
        for open in ["/grpc.health.v1.Health/Check", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"] {
            assert!(is_open_service(open), "{open}");
        }
        for closed in ["/sida.v1.Cluster/Status", "/sida.v1.Inference/Model", "/sida.v1.Experts/Lane", "/", "/grpc", ""]
        {
            assert!(!is_open_service(closed), "{closed}");
        }
    }
}
