//! The OpenAI-compatible door: HTTP on a port of its own, for applications that speak to OpenAI's API already. What each
//! endpoint takes, refuses and adds is in docs/openai.md, and for programs in `openapi.json`.
//!
//! In reading order: `error` (how a refusal looks), `call` (what every request gets: a deadline, an end, a count),
//! `rate_limits` (what its client may still have),
//! `fields` and `body` (how a request's JSON is read), `door` (what the endpoints share), `routes` (who answers which
//! path), `cors` (which web pages may ask). Generation: `sampling` (how an answer is to be made), `response_format`
//! (what it follows), `generation` (several sequences as one answer), `usage` (what it took), `log_probabilities`,
//! `echo` (prompts before their answers), `events` (answers as they come), `completions`, `chat_messages`,
//! `tools` and `tool_calls` (what a model may call, and does), `chat_completions`. The others: `embeddings`, `models`, `tokens`, `about`.

mod about;
pub(crate) mod body;
pub(crate) mod call;
pub(crate) mod chat_completions;
mod chat_messages;
pub(crate) mod completions;
mod cors;
pub(crate) mod door;
mod echo;
pub(crate) mod embeddings;
pub(crate) mod error;
pub(crate) mod events;
pub(crate) mod fields;
mod generation;
mod log_probabilities;
mod models;
mod rate_limits;
mod response_format;
pub(crate) mod routes;
pub(crate) mod sampling;
pub(crate) mod tokens;
mod tool_calls;
mod tools;
mod usage;
