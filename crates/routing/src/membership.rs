//! What to believe of the membership store, and what to write into it. Called by whoever keeps the session with
//! the store (etcd); nothing here talks to it, and time is a [`Duration`](std::time::Duration) since any fixed
//! origin.
//!
//! In reading order: [`members`], who counts now; [`epoch`], which placement is adopted and which call is
//! refused; [`writer`], what the elected coordinator writes next.
//!
//! A session goes like this. On connecting, and after every lost connection, [`Members::reconnected`], then a
//! list of all members into [`Members::listed`], then a watch from the list's revision on into
//! [`Members::put`] and [`Members::deleted`]; a list again at a steady pace, for watches may lose events, and
//! whenever the watch says that its revision was compacted away. Every placement seen, from a list, a watch or
//! a node's refusal, goes through [`judge`]. The coordinator that holds the election calls [`Writer::decide`]
//! whenever something changed and when the last decision said to wait until; it writes in a transaction that
//! compares its election's key and the revision of the placement it decided on, and reports success by
//! [`Writer::written`]. If the transaction fails it decides again after the next list: somebody else wrote, or
//! it is no longer elected.
//!
//! Three things that a session must see to, for no decision can (the simulation found each of them):
//! - Decide only on fresh knowledge: when the last question that the store has answered was asked a second ago
//!   or later. A process that was stopped goes on with beliefs of before, and would drop nodes whose
//!   registrations wait to be read.
//! - Write a node's own record one at a time, and compare it with every list: of two under way the older may
//!   come last.
//! - Take an election that was won for one's own when its answer was lost (the leader's key is under one's own
//!   lease), and a list from before it for no sign that it is over.

pub mod epoch;
pub mod members;
pub mod writer;

pub use epoch::{Verdict, is_stale, judge};
pub use members::Members;
pub use writer::{Decision, Pace, Standing, Writer};
