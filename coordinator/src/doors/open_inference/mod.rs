//! The Open Inference Protocol, version 2, by which clients of KServe and Triton ask: its messages become requests of the
//! [`crate::coordinator::Coordinator`], and answers become its tensors. In reading order: `service`, `question`,
//! `parameters`, `tensor`, `response`.

mod parameters;
mod question;
mod response;
pub(crate) mod service;
mod tensor;
