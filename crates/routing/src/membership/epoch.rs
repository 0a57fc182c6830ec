//! Which of two placements is the later one, and which calls belong to the past. Called by coordinators and
//! expert-nodes for every placement they hear of, and by expert-nodes for every call.
//!
//! Epochs only rise. A node acts on the greatest it has seen, wherever it came from, so that a writer paused
//! past its lease, a late watch event or a coordinator cut off from the store can do no harm: what they know is
//! older, and is refused.

use crate::{Digest, Placement};

/// What to do with a placement that was heard of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is newer: take it.
    Adopt,
    /// It is the one in use.
    Known,
    /// It is older: a late or repeated message. Nothing to do.
    Older,
    /// Another placement with the epoch of the one in use. Only a store that lost what was written can bring
    /// that about. The one in use stays; log it. The writer's next epoch is greater than both.
    Conflict,
    /// It places another model's experts. Refuse it and log it.
    OtherModel,
}

/// Judges `offered` against the one in use, if any. Each comes with the digest of its model; `experts` of both
/// must agree too, which only fails for one that was written wrongly.
pub fn judge(current: Option<(&Placement, Digest)>, offered: &Placement, model: Digest) -> Verdict {
    let Some((current, own)) = current else { return Verdict::Adopt };
    if own != model || !current.extent().same_experts(&offered.extent()) {
        return Verdict::OtherModel;
    }
    match offered.epoch().cmp(&current.epoch()) {
        std::cmp::Ordering::Greater => Verdict::Adopt,
        std::cmp::Ordering::Less => Verdict::Older,
        std::cmp::Ordering::Equal if offered.same_holders(current) => Verdict::Known,
        std::cmp::Ordering::Equal => Verdict::Conflict,
    }
}

/// Whether a call or plan made for the placement of epoch `call` is refused by a node that knows `known`. 0 is
/// no epoch: probes, and clusters without placement.
pub fn is_stale(known: u64, call: u64) -> bool {
    call != 0 && call < known
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Candidate, Extent};

    fn placement(epoch: u64, names: &[&str], experts: usize) -> Placement {
        let candidates: Vec<_> = names.iter().map(|&name| Candidate { node: name.into(), weight: 1.0 }).collect();
        let extent = Extent { moe_layers: 1, num_experts: experts, replicas: 1 };
        Placement::compute(epoch, extent, &candidates).unwrap()
    }

    #[test]
    fn epochs_never_go_back() {
        // Broken: a late message would undo a move, and rows would go where their experts no longer are.
        let (own, other) = (Digest([1; 32]), Digest([2; 32]));
        let current = placement(5, &["a", "b"], 8);
        let against = |offered: &Placement, model| judge(Some((&current, own)), offered, model);
        assert_eq!(judge(None, &current, own), Verdict::Adopt);
        assert_eq!(against(&placement(6, &["a"], 8), own), Verdict::Adopt);
        assert_eq!(against(&current, own), Verdict::Known);
        assert_eq!(against(&placement(5, &["a"], 8), own), Verdict::Conflict);
        assert_eq!(against(&placement(4, &["a"], 8), own), Verdict::Older);
        assert_eq!(against(&placement(6, &["a"], 8), other), Verdict::OtherModel);
        assert_eq!(against(&placement(6, &["a"], 9), own), Verdict::OtherModel);
    }

    #[test]
    fn only_older_calls_are_refused() {
        // Broken: the calls of a paused coordinator would be computed, or those of one that hears news first would not.
        assert!(is_stale(5, 4));
        assert!(!is_stale(5, 5) && !is_stale(5, 6) && !is_stale(5, 0) && !is_stale(0, 1));
    }
}
