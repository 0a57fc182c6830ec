//! How each call ended and how long it took, whoever ended it: its handler, a layer that refused it, its deadline, or its
//! caller by going away. A node that counts its requests is told here; handlers would not know of calls that never came
//! to them. Put in place by [`crate::server`].

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use http::{Request, Response, Uri};
use tonic::{Code, body::Body};
use tower::{Layer, Service};

use crate::{
    caller::{CallerSlot, Client},
    deadline,
    ending::ResponseFuture,
    watched_response::{Watcher, watched},
};

/// A caller's clock ran before its call came here: one that leaves so shortly before its deadline left because of that.
const CALLERS_LEAD: Duration = Duration::from_millis(10);

/// A call that has ended.
#[derive(Clone, Copy, Debug)]
pub struct Outcome<'a> {
    /// What was called, as `/sida.v1.Inference/Generate`.
    pub path: &'a str,
    /// How it ended. CANCELLED where its caller went away before the answer was whole, or DEADLINE_EXCEEDED if its time was
    /// up by then: a caller who waits no longer goes away, too.
    pub code: Code,
    /// Whose call it was; `None` where that was not found out.
    pub client: Option<&'a Client>,
    /// From when its head had come to the last byte of its answer.
    pub took: Duration,
}

/// Who is told.
pub(crate) type Observer = Arc<dyn Fn(Outcome<'_>) + Send + Sync>;

/// Makes [`OutcomeService`]s.
#[derive(Clone)]
pub(crate) struct OutcomeLayer {
    /// `None`: nobody.
    pub(crate) observer: Option<Observer>,
}

/// Tells of calls.
#[derive(Clone)]
pub(crate) struct OutcomeService<S> {
    inner: S,
    observer: Option<Observer>,
}

impl<S> Layer<S> for OutcomeLayer {
    type Service = OutcomeService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        OutcomeService { inner, observer: self.observer.clone() }
    }
}

impl<S> Service<Request<Body>> for OutcomeService<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let Some(observer) = self.observer.clone() else { return Box::pin(self.inner.call(request)) };
        let since = Instant::now();
        let deadline = deadline::timeout(request.headers()).ok().flatten().map(|timeout| since + timeout);
        let caller = CallerSlot::default();
        request.extensions_mut().insert(caller.clone());
        let open = OpenCall { uri: request.uri().clone(), since, deadline, code: None, caller, observer };
        let response = self.inner.call(request);
        Box::pin(async move {
            let open = open;
            Ok(watched(response.await?, open))
        })
    }
}

/// A call until it ends. Its observer is told when this is dropped.
struct OpenCall {
    uri: Uri,
    since: Instant,
    deadline: Option<Instant>,
    /// `None` as long as there is no status.
    code: Option<Code>,
    caller: CallerSlot,
    observer: Observer,
}

impl Watcher for OpenCall {
    fn ended_with(&mut self, code: Code) {
        self.code = Some(code);
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        let now = Instant::now();
        let is_late = self.deadline.is_some_and(|deadline| now + CALLERS_LEAD >= deadline);
        let left = if is_late { Code::DeadlineExceeded } else { Code::Cancelled };
        let (path, code, took) = (self.uri.path(), self.code.unwrap_or(left), now - self.since);
        (self.observer)(Outcome { path, code, client: self.caller.client(), took });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn who_leaves_when_the_time_is_up_has_missed_the_deadline() {
        // Broken: a missed deadline would be counted as a caller who changed his mind, as often as his timer is first.
        let told = Arc::new(Mutex::new(Vec::new()));
        let now = Instant::now();
        for (deadline, code) in [
            (None, None),
            (Some(now), None),
            (Some(now + CALLERS_LEAD / 2), None),
            (Some(now + Duration::from_secs(3600)), None),
            (Some(now), Some(Code::Ok)),
        ] {
            let told = told.clone();
            let observer: Observer = Arc::new(move |outcome| told.lock().unwrap().push(outcome.code));
            let caller = CallerSlot::default();
            drop(OpenCall { uri: Uri::from_static("/a/B"), since: now, deadline, code, caller, observer });
        }
        let late = Code::DeadlineExceeded;
        let expected = [Code::Cancelled, late, late, Code::Cancelled, Code::Ok];
        assert_eq!(*told.lock().unwrap(), expected);
    }
}
