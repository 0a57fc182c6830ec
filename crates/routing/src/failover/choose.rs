//! Whom to ask for an expert.

use crate::ExpertId;

/// Whom to ask for an expert, as an index below `nodes`: the first of its `holders` that is up, else any other
/// node that is up (it loads the expert from its own store), else whoever is left, holders first. Never one of
/// `tried`; `None` when everybody was.
///
/// The others are taken in turn by the expert, so that the experts of a dead node do not all go to the same
/// one. A holder that is no node (a placement read beside an older list of nodes) is passed over.
pub fn choose(
    holders: &[u16],
    nodes: usize,
    expert: ExpertId,
    up: &dyn Fn(usize) -> bool,
    tried: &[usize],
) -> Option<usize> {
    let holders = holders.iter().map(|&node| usize::from(node)).filter(|&node| node < nodes);
    let start = usize::from(expert.0);
    let others = (0..nodes).map(|at| (at + start) % nodes);
    let untried = || holders.clone().chain(others.clone()).filter(|node| !tried.contains(node));
    untried().find(|&node| up(node)).or_else(|| untried().next())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every case of up to 4 nodes: all lists of distinct holders, all nodes up or down, all tried or not.
    #[test]
    fn every_case_of_four_nodes() {
        // Broken: a live node would not be asked, a dead or a tried one would be, or holders would not come first.
        let mut lists: Vec<Vec<u16>> = vec![vec![]];
        for length in 0..3 {
            for list in lists.clone().into_iter().filter(|list| list.len() == length) {
                for next in (0..5u16).filter(|next| !list.contains(next)) {
                    lists.push([&list[..], &[next]].concat());
                }
            }
        }
        for nodes in 0..=4usize {
            for holders in &lists {
                for up in 0..1u32 << nodes {
                    for tried in 0..1u32 << nodes {
                        for expert in [0u16, 1, 6] {
                            check(holders, nodes, ExpertId(expert), up, tried);
                        }
                    }
                }
            }
        }
    }

    fn check(holders: &[u16], nodes: usize, expert: ExpertId, up: u32, tried: u32) {
        let is_up = |node: usize| up >> node & 1 == 1;
        let tried_list: Vec<usize> = (0..nodes).filter(|node| tried >> node & 1 == 1).collect();
        let chosen = choose(holders, nodes, expert, &is_up, &tried_list);
        let left: Vec<usize> = (0..nodes).filter(|node| !tried_list.contains(node)).collect();
        let Some(chosen) = chosen else { return assert!(left.is_empty()) };
        assert!(left.contains(&chosen));
        let holders: Vec<usize> =
            holders.iter().map(|&node| usize::from(node)).filter(|node| left.contains(node)).collect();
        let live_holder = holders.iter().copied().find(|&node| is_up(node));
        match live_holder {
            Some(holder) => assert_eq!(chosen, holder),
            None if left.iter().any(|&node| is_up(node)) => assert!(is_up(chosen)),
            None => assert_eq!(chosen, holders.first().copied().unwrap_or(chosen)),
        }
    }

    #[test]
    fn experts_of_a_dead_node_are_spread() {
        // Broken: the node after a dead one would get all of its load.
        let chosen: Vec<_> = (0..6).map(|e| choose(&[0], 4, ExpertId(e), &|node| node != 0, &[]).unwrap()).collect();
        assert_eq!(chosen, [1, 1, 2, 3, 1, 1]);
    }
}
