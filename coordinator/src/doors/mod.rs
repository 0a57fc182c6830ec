//! The doors of a coordinator, by which requests of other processes come in: gRPC, and HTTP as OpenAI's clients speak it.
//!
//! In reading order: `inference_service` serves `sida.v1.Inference`; `messages` turns wire messages into what is asked for and
//! answers into wire messages; `request_count` counts them; `cluster_service` serves `sida.v1.Cluster`, the status of the
//! cluster; `open_inference` is the protocol of KServe's and Triton's clients; `openai` is the other door;
//! `readers` reads what all of them take, for tests.

pub(crate) mod cluster_service;
pub(crate) mod inference_service;
pub(crate) mod messages;
pub(crate) mod open_inference;
pub(crate) mod openai;
pub mod readers;
pub(crate) mod request_count;
