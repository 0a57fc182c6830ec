//! One server stack and one client stack for all nodes: what every RPC gets, whichever service it calls, so
//! that deadlines, limits, health, shutdown and error details behave alike everywhere. Used by the nodes, by
//! the command line's client commands and by the tests.
//!
//! In reading order: [`status`] (errors as gRPC statuses), `ending` (calls that end early), `watched_response` (how
//! they end), `around` (layers that are functions), [`outcome`], [`deadline`], `drain`, `refusals`, [`trace`], [`request_id`], [`metadata`], [`health`] and
//! `health_service`; whom a node lets in: `reload` (files that change), [`keys`], [`caller`], [`authentication`],
//! `key_taken_away` (what ends then), [`certificate_names`], [`tls`]; connections: `peer` (one, as its server sees it), `allowance` (of what it may do often),
//! `who_leaves`, `shortage`, `connections` (all), `accept` (how they come), `connection` (one, from its first byte to
//! its last), `client_streams`, `receiving`, `request_body`, `answer_body`, `control_frames`, `http1_limits`; [`server`] (puts them
//! together), [`http_server`] and `http_trace` (for what is not gRPC), [`metrics_port`], [`client`]; [`stand_back`](mod@stand_back) (what computes behind them).

mod accept;
mod allowance;
mod answer_body;
mod around;
pub mod authentication;
pub mod caller;
pub mod certificate_names;
pub mod client;
mod client_streams;
mod connection;
mod connections;
mod control_frames;
pub mod deadline;
mod drain;
mod ending;
pub mod health;
mod health_service;
mod http1_limits;
pub mod http_server;
mod http_trace;
mod key_taken_away;
pub mod keys;
pub mod metadata;
pub mod metrics_port;
pub mod outcome;
mod peer;
mod plain_text;
mod rate_limit;
mod receiving;
mod refusals;
pub mod reload;
mod request_body;
pub mod request_id;
pub mod server;
mod shortage;
pub mod stand_back;
pub mod status;
pub mod tls;
pub mod trace;
mod turn;
mod watched_response;
mod who_leaves;

pub use authentication::{AuthenticationLayer, Gate, KeyTakenAway};
pub use caller::Client;
pub use certificate_names::NamePattern;
pub use client::{Channel, ClientConfig, ClientError, connect, connect_lazy};
pub use deadline::Deadline;
pub use health::Readiness;
pub use keys::{KeyError, KeyFile, OwnKey};
pub use metadata::METADATA_BYTES_MAX;
pub use outcome::Outcome;
pub use request_body::why_unread;
pub use request_id::RequestId;
pub use server::{MESSAGE_BYTES_MAX, Server, ServerConfig, ServerError};
pub use status::{Fault, Reason};
pub use tls::{ClientTls, ServerTls};
