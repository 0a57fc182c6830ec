//! When a call does not come back: how long silence is borne, who is asked next, how often, and who is left
//! alone for a while. Called by a coordinator's dispatch and its lanes. Time is a [`Duration`] since any fixed
//! origin; nothing here looks at a clock.
//!
//! In reading order: [`silence`], [`choose`](choose()), [`breaker`], [`retry_budget`], [`patience`].
//!
//! [`Duration`]: std::time::Duration

pub mod breaker;
mod choose;
pub mod patience;
pub mod retry_budget;
pub mod silence;

pub use breaker::{Breaker, BreakerState};
pub use choose::choose;
pub use patience::Patience;
pub use retry_budget::RetryBudget;
pub use silence::Silence;
