//! The Open Inference Protocol, version 2, by which clients of KServe and Triton ask: its messages become requests of the
//! [`crate::coordinator::Coordinator`], and answers become its tensors.
//!
//! In reading order: `service` (by gRPC), `question` (what is asked for), `parameters`, `tensor`, `whole` (one
//! response), `response`, `about` (server and model), `statistics`, `http` and `json_form` (the same by HTTP),
//! `generate` (by HTTP in fewer words).

mod about;
pub(crate) mod generate;
pub(crate) mod http;
pub(crate) mod json_form;
mod parameters;
pub(crate) mod question;
mod response;
pub(crate) mod service;
mod statistics;
mod tensor;
mod whole;
