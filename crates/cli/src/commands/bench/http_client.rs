//! An HTTP client for one server: connections that are kept, answers that are bounded, and a code for whatever goes wrong. Used
//! by [`super::openai`].

use std::{
    error::Error,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use http::{
    HeaderMap, HeaderValue, Method, Request, Response,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER, USER_AGENT},
};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use serde_json::Value;
use sida_rpc::ClientTls;
use thiserror::Error;

use super::{answer::Failure, url::BaseUrl, url_tls};
use crate::{api_key::ApiKey, bad_configuration::BadConfiguration, told};

/// Bytes of an answer at most, and of one that tells an error.
pub(crate) const BODY_BYTES_MAX: usize = 64 << 20;
const ERROR_BYTES_MAX: usize = 64 << 10;

/// The header that tells a server how many seconds its caller waits.
const TIMEOUT: &str = "x-request-timeout";

/// The code of a failure before any request was sent.
pub(crate) const CONNECT: &str = "connect";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection is kept without a request. Servers close theirs after 5 seconds and more; a request that is sent at
/// that moment would fail.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// Asks one server, over connections that all its requests share.
pub(crate) struct HttpClient {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    base: BaseUrl,
    key: Option<ApiKey>,
    authorization: Option<HeaderValue>,
}

/// Why a body ended early.
#[derive(Debug, Error)]
pub(crate) enum BodyError {
    #[error("the answer is longer than {BODY_BYTES_MAX} bytes")]
    Length,
    #[error("the connection broke in the middle of the answer: {0}")]
    Broken(#[from] hyper::Error),
}

impl HttpClient {
    /// Connects at the first request.
    pub(crate) fn new(base: BaseUrl, key: Option<ApiKey>, tls: Option<ClientTls>) -> Result<Self, BadConfiguration> {
        let authorization = key.as_ref().map(ApiKey::bearer).transpose()?;
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let connector = HttpsConnectorBuilder::new().with_tls_config(url_tls::config(&base, &tls.unwrap_or_default())?);
        let connector = connector.https_or_http().enable_http1().wrap_connector(http);
        let mut client = Client::builder(TokioExecutor::new());
        client.pool_timer(TokioTimer::new()).pool_idle_timeout(IDLE_TIMEOUT);
        Ok(Self { client: client.build(connector), base, key, authorization })
    }

    /// The answer to a GET or, with a body of JSON, a POST, which is of use until a deadline; an answer that tells an
    /// error is one.
    pub(crate) async fn send(
        &self,
        path: &str,
        body: Option<&Value>,
        deadline: Option<Instant>,
    ) -> Result<Response<Incoming>, Failure> {
        let method = if body.is_some() { Method::POST } else { Method::GET };
        let mut request = Request::builder().method(method).uri(self.base.endpoint(path));
        request = request.header(USER_AGENT, concat!("sida/", env!("CARGO_PKG_VERSION")));
        request = request.header(ACCEPT, "application/json, text/event-stream");
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        if let Some(deadline) = deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            request = request.header(TIMEOUT, left.as_secs_f64().to_string());
        }
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        let body = Bytes::from(body.map(Value::to_string).unwrap_or_default());
        let request = request.body(Full::new(body)).map_err(|error| Failure::new("request", error.to_string()))?;
        let response = self.client.request(request).await.map_err(|error| {
            let code = if error.is_connect() { CONNECT } else { "broken" };
            Failure::new(code, told::told(&error.into()))
        })?;
        if response.status().is_success() { Ok(response) } else { Err(self.refusal(response).await) }
    }

    /// What an answer with another status says.
    async fn refusal(&self, response: Response<Incoming>) -> Failure {
        let status = response.status();
        let retry_after = retry_after(response.headers());
        let body = Limited::new(response.into_body(), ERROR_BYTES_MAX).collect().await;
        let text = body.map(|body| String::from_utf8_lossy(&body.to_bytes()).into_owned()).unwrap_or_default();
        let message = match error_message(&text) {
            message if message.is_empty() => status.canonical_reason().unwrap_or("no reason is given").to_owned(),
            message => message,
        };
        self.failure(status.as_str(), &message).with_retry_after(retry_after)
    }

    /// A failure in words of the server, which may repeat the key.
    pub(crate) fn failure(&self, code: &str, message: &str) -> Failure {
        match &self.key {
            Some(key) => Failure::new(code, key.hidden_in(message)),
            None => Failure::new(code, message),
        }
    }
}

/// In how many seconds a server wants to be asked again. (Servers that name a time of day instead are not understood.)
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse::<f64>().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}

/// A whole body of JSON.
pub(crate) async fn json(body: Incoming) -> Result<Value, Failure> {
    let body = Limited::new(body, BODY_BYTES_MAX).collect().await.map_err(|error| {
        // The error of a limited body has either type, boxed.
        if error.is::<LengthLimitError>() { BodyError::Length.into() } else { Failure::new("broken", root(&*error)) }
    })?;
    serde_json::from_slice(&body.to_bytes()).map_err(|error| Failure::new("malformed", format!("no JSON: {error}")))
}

/// The pieces of a body as they come.
pub(crate) fn pieces(body: Incoming) -> impl Stream<Item = Result<Bytes, BodyError>> {
    let mut left = BODY_BYTES_MAX;
    body.into_data_stream().map(move |piece| {
        let piece = piece?;
        left = left.checked_sub(piece.len()).ok_or(BodyError::Length)?;
        Ok(piece)
    })
}

impl From<BodyError> for Failure {
    fn from(error: BodyError) -> Self {
        let code = match error {
            BodyError::Length => "too long",
            BodyError::Broken(_) => "broken",
        };
        Self::new(code, root(&error))
    }
}

/// An error and what lies at the bottom of it.
fn root(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |&cause| cause.source());
    let (told, last) = (error.to_string(), causes.last().map(ToString::to_string).unwrap_or_default());
    if told.contains(&last) { told } else { format!("{told}: {last}") }
}

/// What a server says of an error, in any of the forms that such servers have; else the text as it stands.
pub(crate) fn error_message(text: &str) -> String {
    let body: Value = serde_json::from_str(text).unwrap_or_default();
    let known = [&body["error"]["message"], &body["error"], &body["message"], &body["detail"]];
    known.into_iter().find_map(|message| message.as_str()).unwrap_or(text).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_say_in_seconds_when_to_come_back() {
        // Would break: a header that says nothing of use keeps a client away for ever, or one that does is not heard.
        let of =
            |value: &'static str| retry_after(&HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_static(value))]));
        assert_eq!(of("7"), Some(Duration::from_secs(7)));
        assert_eq!(of(" 0.5 "), Some(Duration::from_millis(500)));
        for useless in ["", "soon", "-1", "NaN", "inf", "1e300", "Wed, 21 Oct 2026 07:28:00 GMT"] {
            assert_eq!(of(useless), None, "{useless}");
        }
        assert_eq!(retry_after(&HeaderMap::new()), None);
    }

    #[test]
    fn errors_are_told_in_the_servers_words() {
        // Broken: a person would read JSON, or nothing, instead of what is wrong.
        for (text, expected) in [
            (r#"{"error": {"message": "no such model", "code": 404}}"#, "no such model"),
            (r#"{"error": "no such model"}"#, "no such model"),
            (r#"{"object": "error", "message": "no such model"}"#, "no such model"),
            (r#"{"detail": "Not Found"}"#, "Not Found"),
            (r#"{"detail": [{"loc": 1}]}"#, r#"{"detail": [{"loc": 1}]}"#),
            ("<html>busy</html>\n", "<html>busy</html>"),
            ("", ""),
        ] {
            assert_eq!(error_message(text), expected);
        }
    }
}
