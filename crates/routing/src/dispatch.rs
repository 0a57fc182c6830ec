//! The expert calls of one MoE layer, decided: which node is asked for which rows, when a call is given up, who is asked
//! then, and when nobody is.
//!
//! [`LayerCalls`] is a state machine without clock, channel or thread. Its [`Driver`] tells it what time it is and what
//! came, makes the calls that it wants, and waits for as long as it says. The coordinator drives it with lanes and
//! threads, the simulation with a clock and a network of its own.
//!
//! In reading order: [`call`], what is asked; [`driver`], what the decisions stand on; [`layer_calls`], the state and its
//! events; `assignment`, a node for every piece; `outstanding`, which calls are given up; `node_wait`, how long nobody
//! is borne.

mod assignment;
pub mod call;
pub mod driver;
pub mod layer_calls;
#[cfg(test)]
mod layer_calls_properties;
#[cfg(test)]
mod layer_calls_tests;
mod node_wait;
mod outstanding;
#[cfg(test)]
mod scripted_nodes;

pub use call::{Call, GivenUp, Piece, Why};
pub use driver::{Driver, Note};
pub use layer_calls::{Bounds, Finished, LayerCalls, Next};
pub use node_wait::Outlook;
