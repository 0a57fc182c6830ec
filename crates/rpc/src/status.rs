//! Errors as gRPC statuses: the one table from what went wrong to the code that a client sees. A node names a
//! [`Reason`], adds what a person needs to know, and gets a status with `google.rpc.ErrorInfo` (reason, domain
//! `sida`, metadata) and, where a retry helps, `RetryInfo` and `grpc-retry-pushback-ms`. Clients and coordinators read it back with
//! [`Reason::of`].

use std::{collections::HashMap, fmt, time::Duration};

use tonic::{
    Code, Status,
    metadata::{MetadataMap, MetadataValue},
};
use tonic_types::{ErrorDetails, StatusExt};

/// The `domain` of every `ErrorInfo` of ours.
pub const DOMAIN: &str = "sida";

/// Where a gRPC client looks for when to try again, in milliseconds.
const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// The longest message sent: it travels in a header, and peers bound those.
const MESSAGE_BYTES_MAX: usize = 1024;

/// What went wrong, as a client can act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// A field of the request is out of its range.
    InvalidRequest,
    /// The text has no tokens.
    EmptyText,
    /// The text has more tokens than this service takes.
    TextTooLong,
    /// A message between nodes did not pass `sida_proto::wire`.
    MalformedMessage,
    /// `grpc-timeout` is not as gRPC defines it.
    MalformedDeadline,
    /// The call's metadata is longer than this node takes.
    MetadataTooLarge,
    /// The caller shows no key that this node knows.
    Unauthenticated,
    /// The peer serves another model.
    ModelMismatch,
    /// The request needs a predictor and there is none.
    NoPredictor,
    /// This build or checkpoint cannot do what was asked.
    Unsupported,
    /// As many requests wait as may.
    QueueFull,
    /// Others wait, and the caller has its share of the queue.
    ClientShare,
    /// The caller has what its operator lets it have.
    ClientLimit,
    /// What waits ahead takes longer than the caller does.
    NoTime,
    /// The caller's time is up.
    DeadlineExceeded,
    /// The caller has gone.
    Cancelled,
    /// No node could compute an expert.
    ExpertUnavailable,
    /// This node cannot load an expert; another may.
    ExpertLoadFailed,
    /// This node's device failed; another's may not.
    DeviceFailed,
    /// Too many expert calls failed lately for more of them to be made.
    RetriesExhausted,
    /// The caller's placement is older than this node's.
    StaleEpoch,
    /// No predictor-node answered.
    PredictorUnavailable,
    /// This node is about to end.
    ShuttingDown,
    /// A broken invariant of ours.
    Internal,
}

/// A reason's code, its name on the wire, and how long to wait before a retry that may help.
type Row = (Reason, Code, &'static str, Option<Duration>);

#[rustfmt::skip]
const TABLE: &[Row] = &[
    (Reason::InvalidRequest,       Code::InvalidArgument,    "INVALID_REQUEST",       None),
    (Reason::EmptyText,            Code::InvalidArgument,    "EMPTY_TEXT",            None),
    (Reason::TextTooLong,          Code::InvalidArgument,    "TEXT_TOO_LONG",         None),
    (Reason::MalformedMessage,     Code::InvalidArgument,    "MALFORMED_MESSAGE",     None),
    (Reason::MalformedDeadline,    Code::InvalidArgument,    "MALFORMED_DEADLINE",    None),
    (Reason::MetadataTooLarge,     Code::ResourceExhausted,  "METADATA_TOO_LARGE",    None),
    (Reason::Unauthenticated,      Code::Unauthenticated,    "UNAUTHENTICATED",       None),
    (Reason::ModelMismatch,        Code::FailedPrecondition, "MODEL_MISMATCH",        None),
    (Reason::NoPredictor,          Code::FailedPrecondition, "NO_PREDICTOR",          None),
    (Reason::Unsupported,          Code::Unimplemented,      "UNSUPPORTED",           None),
    (Reason::QueueFull,            Code::ResourceExhausted,  "QUEUE_FULL",            Some(Duration::from_millis(100))),
    (Reason::ClientShare,          Code::ResourceExhausted,  "CLIENT_SHARE",          Some(Duration::from_millis(100))),
    (Reason::ClientLimit,          Code::ResourceExhausted,  "CLIENT_LIMIT",          Some(Duration::from_secs(1))),
    (Reason::NoTime,               Code::ResourceExhausted,  "NO_TIME",               Some(Duration::from_millis(100))),
    (Reason::DeadlineExceeded,     Code::DeadlineExceeded,   "DEADLINE_EXCEEDED",     None),
    (Reason::Cancelled,            Code::Cancelled,          "CANCELLED",             None),
    (Reason::ExpertUnavailable,    Code::Unavailable,        "EXPERT_UNAVAILABLE",    Some(Duration::from_secs(1))),
    (Reason::ExpertLoadFailed,     Code::Unavailable,        "EXPERT_LOAD_FAILED",    None),
    (Reason::DeviceFailed,         Code::Unavailable,        "DEVICE_FAILED",         None),
    (Reason::RetriesExhausted,     Code::Unavailable,        "RETRIES_EXHAUSTED",     Some(Duration::from_secs(1))),
    (Reason::StaleEpoch,           Code::FailedPrecondition, "STALE_EPOCH",           None),
    (Reason::PredictorUnavailable, Code::Unavailable,        "PREDICTOR_UNAVAILABLE", Some(Duration::from_secs(1))),
    (Reason::ShuttingDown,         Code::Unavailable,        "SHUTTING_DOWN",         Some(Duration::from_secs(1))),
    (Reason::Internal,             Code::Internal,           "INTERNAL",              None),
];

/// An error on its way to a client.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    reason: Reason,
    message: String,
    metadata: HashMap<String, String>,
    retry_after: Option<Duration>,
}

impl Reason {
    /// The gRPC code of this reason.
    pub fn code(self) -> Code {
        self.row().1
    }

    /// The reason's name on the wire.
    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// The reason of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.2 == name).map(|row| row.0)
    }

    /// The reason that a status of ours carries; `None` for a status that some other software made.
    pub fn of(status: &Status) -> Option<Self> {
        let info = status.get_details_error_info().filter(|info| info.domain == DOMAIN)?;
        Self::from_name(&info.reason)
    }

    fn row(self) -> &'static Row {
        // Rows stand in the order of the enum; a test holds that.
        &TABLE[self as usize]
    }
}

impl Fault {
    /// An error with a sentence for a person.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), metadata: HashMap::new(), retry_after: reason.row().3 }
    }

    /// An error whose sentence is that of `error`.
    pub fn from_error(reason: Reason, error: &dyn std::error::Error) -> Self {
        Self::new(reason, error.to_string())
    }

    /// Adds a named fact to the `ErrorInfo`: a node, a layer, a limit.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl fmt::Display) -> Self {
        self.metadata.insert(key.to_owned(), value.to_string());
        self
    }

    /// When a retry may help.
    #[must_use]
    pub fn retry_after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }

    /// What went wrong.
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// When a retry may help, if it may.
    pub fn retry_hint(&self) -> Option<Duration> {
        self.retry_after
    }

    /// The sentence.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason.name(), self.message)
    }
}

impl std::error::Error for Fault {}

impl From<Fault> for Status {
    fn from(fault: Fault) -> Self {
        let Fault { reason, mut message, metadata, retry_after } = fault;
        message.truncate(message.floor_char_boundary(MESSAGE_BYTES_MAX));
        let mut details = ErrorDetails::with_error_info(reason.name(), DOMAIN, metadata);
        let mut trailers = MetadataMap::new();
        if let Some(delay) = retry_after {
            details.set_retry_info(retry_after);
            // What gRPC's own retries read. A number is ASCII.
            let millis = delay.as_millis().min(i32::MAX as u128) as u64;
            trailers.insert(PUSHBACK, MetadataValue::from(millis));
        }
        Status::with_error_details_and_metadata(reason.code(), message, details, trailers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_stands_in_its_row() {
        // Broken: a reason would be sent with another's code.
        for (index, row) in TABLE.iter().enumerate() {
            assert_eq!(row.0 as usize, index);
            assert_eq!(Reason::from_name(row.2), Some(row.0));
        }
        assert_eq!(Reason::Internal as usize + 1, TABLE.len(), "the last reason has no row");
    }

    #[test]
    fn a_client_reads_what_a_node_said() {
        // Broken: clients could not tell a full queue from a text that is too long, or when to come back.
        let fault = Fault::new(Reason::QueueFull, "1024 requests wait").with("queued", 1024);
        let status = Status::from(fault.retry_after(Duration::from_millis(250)));
        assert_eq!((status.code(), Reason::of(&status)), (Code::ResourceExhausted, Some(Reason::QueueFull)));
        assert_eq!(status.get_details_error_info().unwrap().metadata["queued"], "1024");
        assert_eq!(status.get_details_retry_info().unwrap().retry_delay, Some(Duration::from_millis(250)));
        assert_eq!(status.metadata().get("grpc-retry-pushback-ms").unwrap(), "250");
        let internal = Fault::from_error(Reason::Internal, &std::fmt::Error);
        assert_eq!((internal.reason(), internal.message()), (Reason::Internal, std::fmt::Error.to_string().as_str()));
        assert_eq!(internal.to_string(), format!("INTERNAL: {}", std::fmt::Error), "as it stands in the log");
        let internal = Status::from(internal);
        assert!(internal.get_details_retry_info().is_none() && internal.metadata().is_empty());
        assert_eq!(Reason::of(&Status::unavailable("another's")), None);
        let other = ErrorDetails::with_error_info("QUEUE_FULL", "another.domain", HashMap::new());
        let other = Status::with_error_details(Code::ResourceExhausted, "x", other);
        assert_eq!(Reason::of(&other), None, "a reason of some other software");
    }

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        // Broken: an error that echoes a long text would be dropped by the peer's header limit, or panic here.
        let status = Status::from(Fault::new(Reason::TextTooLong, "é".repeat(5000) + "x"));
        assert!(status.message().len() <= MESSAGE_BYTES_MAX && status.message().ends_with('é'));
        let whole = "x".repeat(MESSAGE_BYTES_MAX);
        assert_eq!(Status::from(Fault::new(Reason::TextTooLong, &whole)).message(), whole);
    }
}
