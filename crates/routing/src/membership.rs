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

pub mod epoch;
pub mod members;
pub mod writer;

pub use epoch::{Verdict, is_stale, judge};
pub use members::Members;
pub use writer::{Decision, Pace, Standing, Writer};
