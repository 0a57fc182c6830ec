//! Rows grouped by expert, and the way back: the core of dispatch. A row is one (token, choice) pair, so a
//! top-k router makes k rows of a token. Expert-nodes see only contiguous groups of rows.

use crate::{ExpertId, Routes};

/// A run of consecutive rows for one expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// Who computes them.
    pub expert: ExpertId,
    /// How many rows. Never 0.
    pub rows: u32,
}

/// A run of rows for one expert, and where it is among all the rows of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacedGroup {
    /// Who computes them.
    pub expert: ExpertId,
    /// The place of the first of them in grouped order.
    pub first: u32,
    /// How many. Never 0.
    pub rows: u32,
}

/// The rows of one MoE layer, ordered by expert.
#[derive(Clone, Debug, PartialEq)]
pub struct Grouping {
    /// The groups by ascending expert; their rows follow one another in `tokens` and `weights`.
    pub groups: Vec<Group>,
    /// For each grouped row, the token it came from: gather by it, scatter back by it.
    pub tokens: Vec<u32>,
    /// For each grouped row, the factor of its result.
    pub weights: Vec<f32>,
}

impl Grouping {
    /// Groups the rows by expert, keeping the order of tokens within an expert (a stable counting sort,
    /// O(rows + experts)).
    pub fn new(routes: &Routes) -> Self {
        let experts_max = routes.experts.iter().flatten().map(|e| usize::from(e.0) + 1).max().unwrap_or(0);
        let mut counts = vec![0u32; experts_max];
        for expert in routes.experts.iter().flatten() {
            counts[usize::from(expert.0)] += 1;
        }
        let mut next = Vec::with_capacity(experts_max);
        let mut rows_total = 0u32;
        for &count in &counts {
            next.push(rows_total);
            rows_total += count;
        }
        let mut tokens = vec![0; rows_total as usize];
        let mut weights = vec![0.0; rows_total as usize];
        for (row, expert) in routes.experts.iter().enumerate() {
            if let Some(expert) = expert {
                let at = &mut next[usize::from(expert.0)];
                tokens[*at as usize] = (row / routes.top_k) as u32;
                weights[*at as usize] = routes.weights[row];
                *at += 1;
            }
        }
        let groups = counts
            .iter()
            .enumerate()
            .filter(|&(_, &rows)| rows > 0)
            .map(|(expert, &rows)| Group { expert: ExpertId(expert as u16), rows })
            .collect();
        Self { groups, tokens, weights }
    }

    /// `out[token] += weight * result` for each grouped row of `results`, which start at grouped row
    /// `first_row`. Rows are `d_model` wide. Within a token the order of additions is that of its experts'
    /// ids, so the sum does not depend on which node answered first as long as calls are combined in order.
    pub fn combine(&self, first_row: usize, results: &[f32], d_model: usize, out: &mut [f32]) {
        for (row, result) in results.chunks_exact(d_model).enumerate() {
            let (token, weight) = (self.tokens[first_row + row] as usize, self.weights[first_row + row]);
            for (o, r) in out[token * d_model..][..d_model].iter_mut().zip(result) {
                *o += weight * r;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn routes(top_k: usize) -> impl Strategy<Value = Routes> {
        prop::collection::vec((prop::option::weighted(0.9, 0u16..9), 0.0f32..1.0), 0..40).prop_map(move |rows| Routes {
            top_k,
            experts: rows.iter().take(rows.len() / top_k * top_k).map(|r| r.0.map(ExpertId)).collect(),
            weights: rows.iter().take(rows.len() / top_k * top_k).map(|r| r.1).collect(),
        })
    }

    proptest! {
        /// Rows would reach another expert than the one chosen, or come back to another token.
        #[test]
        fn grouping_and_combining_equal_going_token_by_token(routes in (1usize..4).prop_flat_map(routes)) {
            let d_model = 3;
            let x = |token: usize| [token as f32, 1.0, -(token as f32)];
            let expert = |e: ExpertId, row: &[f32]| -> Vec<f32> { row.iter().map(|v| v * f32::from(e.0 + 1)).collect() };

            let grouping = Grouping::new(&routes);
            prop_assert!(grouping.groups.is_sorted_by(|a, b| a.expert < b.expert));
            let mut results = Vec::new();
            let mut rows = grouping.tokens.iter();
            for group in &grouping.groups {
                prop_assert!(group.rows > 0);
                for &token in rows.by_ref().take(group.rows as usize) {
                    results.extend(expert(group.expert, &x(token as usize)));
                }
            }
            prop_assert!(rows.next().is_none());
            let mut out = vec![0.0; routes.tokens() * d_model];
            grouping.combine(0, &results, d_model, &mut out);

            for token in 0..routes.tokens() {
                let mut expected = vec![0.0; d_model];
                let mut choices: Vec<_> = (token * routes.top_k..(token + 1) * routes.top_k)
                    .filter_map(|row| routes.experts[row].map(|e| (e, routes.weights[row])))
                    .collect();
                choices.sort_by_key(|choice| choice.0);
                for (e, weight) in choices {
                    expected.iter_mut().zip(expert(e, &x(token))).for_each(|(o, r)| *o += weight * r);
                }
                prop_assert_eq!(&out[token * d_model..][..d_model], &expected[..]);
            }
        }
    }
}
