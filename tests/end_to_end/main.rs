//! A cluster of processes, asked over gRPC as an application would. What single crates promise is tested beside them;
//! here is what only holds when all of it runs together.
//!
//! In reading order: [`client`] (asking), [`golden`] (the answers are the model's own), [`service`] (health,
//! reflection, deadlines, the end), [`bad_input`], [`failure`] (nodes that die), [`https`] and [`members`] (whom ports
//! let in), [`abuse`] (connections that do harm), [`faults`] (everything that goes wrong under load), [`etcd`] (nodes
//! that come and go), [`learning`] (a predictor gets better), [`eval`] (its figures are those of answers), [`commands`] (what needs no cluster), [`conversions`] (two of one model), [`bad_models`]
//! (files that are not what they should be).

mod abuse;
mod bad_input;
mod bad_models;
mod client;
mod commands;
mod conversions;
mod etcd;
mod eval;
mod failure;
mod faults;
mod golden;
mod https;
mod learning;
mod members;
mod service;
