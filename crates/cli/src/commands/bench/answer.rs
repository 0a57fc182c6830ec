//! What comes back for a request: how many tokens, and when they came; or why there was no answer. Made by whoever asks
//! ([`super::workload`]), timed by [`super::load`], added up by [`super::samples`].

use std::time::{Duration, Instant};

use tonic::Status;

use super::http_client::CONNECT;

/// A message is kept as an example beside its count; more of it helps nobody.
const MESSAGE_CHARS_MAX: usize = 300;
/// A server that nobody can connect to is left alone for so long: asking more often says no more, and takes the machine.
const RECONNECT_AFTER: Duration = Duration::from_millis(100);

/// A request that was answered.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answer {
    /// Tokens it generated, or tokens of its text where nothing is generated.
    pub(crate) tokens: u64,
    /// When they came; nothing where nothing is generated.
    pub(crate) pace: Pace,
    /// What its passes through the model took, all sequences of their batches together; `None` where the server does not tell.
    pub(crate) forward: Option<Duration>,
    pub(crate) hash_hits: u64,
    pub(crate) hash_misses: u64,
}

/// When the tokens of an answer came.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pace {
    pub(crate) first: Option<Instant>,
    pub(crate) last: Option<Instant>,
    /// Between one message and the next.
    pub(crate) gaps: Vec<Duration>,
}

impl Pace {
    /// A message with one or more tokens came.
    pub(crate) fn came(&mut self, at: Instant) {
        if let Some(last) = self.last {
            self.gaps.push(at.saturating_duration_since(last));
        }
        self.first.get_or_insert(at);
        self.last = Some(at);
    }

    /// What a token took after the first; `None` where there were fewer than two.
    pub(crate) fn per_token(&self, tokens: u64) -> Option<Duration> {
        let whole = self.last?.saturating_duration_since(self.first?);
        (tokens > 1).then(|| whole.div_f64((tokens - 1) as f64))
    }
}

/// Why a request was not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// What failures are counted by: a gRPC status, an HTTP status, or what happened to the connection.
    pub(crate) code: String,
    /// What was said about it.
    pub(crate) message: String,
    /// How long its server asks to be left alone.
    pub(crate) retry_after: Option<Duration>,
}

impl Failure {
    /// Of a kind, in words. Long messages are cut.
    pub(crate) fn new(code: impl Into<String>, message: impl AsRef<str>) -> Self {
        let message = message.as_ref().trim();
        let cut = message.char_indices().nth(MESSAGE_CHARS_MAX).map(|(end, _)| format!("{}...", &message[..end]));
        Self { code: code.into(), message: cut.unwrap_or_else(|| message.to_owned()), retry_after: None }
    }

    /// The same, whose server asks to be left alone for so long.
    pub(crate) fn with_retry_after(self, retry_after: Option<Duration>) -> Self {
        Self { retry_after, ..self }
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::new(format!("{:?}", status.code()), status.message())
    }
}

/// A request with its end, whatever that was.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) ended: Instant,
    pub(crate) result: Result<Answer, Failure>,
}

/// Requests that were sent together, mostly one.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    /// When they should have been sent. What is measured counts from here, so that a request that had to wait for its turn to
    /// be sent is not taken for a quick one.
    pub(crate) due: Instant,
    /// When they were.
    pub(crate) sent: Instant,
    pub(crate) replies: Vec<Reply>,
}

impl Call {
    /// How long its server is left alone, if it asks for that or cannot be reached.
    pub(crate) fn pause(&self) -> Option<Duration> {
        let pause = |failure: &Failure| failure.retry_after.or((failure.code == CONNECT).then_some(RECONNECT_AFTER));
        self.replies.iter().filter_map(|reply| pause(reply.result.as_ref().err()?)).max()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_is_what_tokens_took_after_the_first() {
        // Broken: the wait for the first token would be spread over all, or messages of several tokens be taken for one token.
        let start = Instant::now();
        let mut pace = Pace::default();
        assert_eq!(pace.per_token(5), None);
        for ms in [100, 110, 140] {
            pace.came(start + Duration::from_millis(ms));
        }
        assert_eq!(pace.gaps, [Duration::from_millis(10), Duration::from_millis(30)]);
        assert_eq!(pace.per_token(3), Some(Duration::from_millis(20)));
        assert_eq!(pace.per_token(5), Some(Duration::from_millis(10)));
        assert_eq!((pace.per_token(1), pace.per_token(0)), (None, None));
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        // Broken: a server's page of HTML would fill the report, or a cut within a character would panic.
        assert_eq!(Failure::new("500", " out of memory\n").message, "out of memory");
        let long = Failure::new("500", "é".repeat(1000)).message;
        assert_eq!(long.chars().count(), MESSAGE_CHARS_MAX + 3);
        assert!(long.ends_with("é..."));
    }
}
