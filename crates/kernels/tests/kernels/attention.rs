//! Attention: what it computes, and that nothing but its own row changes a bit.

use std::sync::atomic::{AtomicUsize, Ordering};

use sida_kernels::{
    attention::{Attention, HeadRows, QUERIES_PER_TASK, Sequence},
    still_wanted::{GivenUp, StillWanted},
};

/// As T5's, without a bias.
fn of_t5(heads: usize, d_kv: usize, causal: bool) -> Attention<'static> {
    Attention { heads, kv_heads: heads, d_kv, scale: 1.0, causal, window: None, bias: None }
}

fn values(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.0 - 1.0).collect()
}

fn rows(values: &[f32], stride: usize, offset: usize) -> HeadRows<'_> {
    HeadRows { values, stride, offset }
}

/// Float64 and no tricks.
fn plain(attention: &Attention<'_>, sequence: &Sequence<'_>) -> Vec<f64> {
    let Attention { heads, kv_heads, d_kv, scale, causal, window, .. } = *attention;
    let mut out = Vec::new();
    for query in 0..sequence.query_rows {
        for head in 0..heads {
            let of_head = |of: HeadRows<'_>, row: usize, head: usize, i: usize| {
                f64::from(of.values[row * of.stride + of.offset + head * d_kv + i])
            };
            let own = |i| of_head(sequence.queries, query, head, i);
            let at = |of, row, i| of_head(of, row, head * kv_heads / heads, i);
            let end = if causal { sequence.first_position + query + 1 } else { sequence.key_rows };
            let keys = window.map_or(0, |window| end.saturating_sub(window))..end;
            let dot = |key| (0..d_kv).map(|i| own(i) * at(sequence.keys, key, i)).sum::<f64>();
            let shares: Vec<f64> = keys.clone().map(|key| (f64::from(scale) * dot(key)).exp()).collect();
            let sum: f64 = shares.iter().sum();
            let weighted = |i| keys.clone().zip(&shares).map(move |(key, share)| share * at(sequence.values, key, i));
            out.extend((0..d_kv).map(|i| weighted(i).sum::<f64>() / sum));
        }
    }
    out
}

/// Attention would compute something else than its equation, for some shape.
#[test]
fn follows_its_equation() {
    for (heads, d_kv, queries, keys) in [(4, 32, 18, 18), (1, 7, 5, 9), (3, 20, 1, 33), (2, 64, 9, 6), (2, 49, 4, 1)] {
        for causal in [false, true] {
            if causal && queries > keys {
                continue;
            }
            let width = heads * d_kv;
            let fused = values(queries.max(keys) * 3 * width, heads);
            let attention = of_t5(heads, d_kv, causal);
            let sequence = Sequence {
                query_rows: queries,
                first_position: if causal { keys - queries } else { 0 },
                key_rows: keys,
                queries: rows(&fused, 3 * width, 0),
                keys: rows(&fused, 3 * width, width),
                values: rows(&fused, 3 * width, 2 * width),
            };
            let mut out = vec![0.0; queries * width];
            attention.run(&[sequence], &mut out, StillWanted::default()).unwrap();
            for (i, (out, exact)) in out.iter().zip(plain(&attention, &sequence)).enumerate() {
                assert!((f64::from(*out) - exact).abs() < 2e-5, "{heads}x{d_kv} {i}: {out} is not {exact}");
            }
        }
    }
}

/// Heads would read another head's keys, or queries beyond their window, where threads share a prompt.
#[test]
fn heads_share_keys_within_a_window() {
    let (heads, d_kv, rows_) = (4, 32, 130);
    for (kv_heads, window) in [(2, None), (1, Some(7)), (4, Some(129)), (2, Some(1))] {
        let attention = Attention { kv_heads, scale: 0.3, window, ..of_t5(heads, d_kv, true) };
        let stride = (heads + 2 * kv_heads) * d_kv;
        let fused = values(rows_ * stride, kv_heads);
        let sequence = |first: usize, count: usize| Sequence {
            query_rows: count,
            first_position: first,
            key_rows: first + count,
            queries: rows(&fused[first * stride..], stride, 0),
            keys: rows(&fused, stride, heads * d_kv),
            values: rows(&fused, stride, (heads + kv_heads) * d_kv),
        };
        let mut whole = vec![0.0; rows_ * heads * d_kv];
        attention.run(&[sequence(0, rows_)], &mut whole, StillWanted::default()).unwrap();
        for (out, exact) in whole.iter().zip(plain(&attention, &sequence(0, rows_))) {
            assert!((f64::from(*out) - exact).abs() < 2e-5, "{kv_heads} {window:?}: {out} is not {exact}");
        }
        for query in 0..rows_ {
            let mut alone = vec![0.0; heads * d_kv];
            attention.run(&[sequence(query, 1)], &mut alone, StillWanted::default()).unwrap();
            assert_eq!(alone, whole[query * heads * d_kv..][..heads * d_kv], "{kv_heads} {window:?}: {query}");
        }
    }
}

/// A token would change with its batch, with threads, or with how many tokens are decoded at once.
#[test]
fn every_query_is_the_same_alone() {
    let (heads, d_kv, keys) = (4, 24, 70);
    let width = heads * d_kv;
    let fused = values(keys * 3 * width, 3);
    for causal in [false, true] {
        let attention = of_t5(heads, d_kv, causal);
        let sequence = |first: usize, count: usize| Sequence {
            query_rows: count,
            first_position: first,
            key_rows: keys,
            queries: rows(&fused[first * 3 * width..], 3 * width, 0),
            keys: rows(&fused, 3 * width, width),
            values: rows(&fused, 3 * width, 2 * width),
        };
        let mut together = vec![0.0; 2 * keys * width];
        let all = [sequence(0, keys), sequence(0, keys)];
        attention.run(&all, &mut together, StillWanted::default()).unwrap();
        for query in 0..keys {
            let mut alone = vec![0.0; width];
            attention.run(&[sequence(query, 1)], &mut alone, StillWanted::default()).unwrap();
            assert_eq!(alone, together[query * width..][..width]);
            assert_eq!(alone, together[(keys + query) * width..][..width]);
        }
    }
}

/// A token after a long text would change with the number of threads that share its heads.
#[test]
fn heads_of_a_query_are_the_same_by_any_number_of_threads() {
    let (d_kv, keys) = (40, 2_000);
    for (heads, kv_heads) in [(6, 3), (6, 6), (8, 1)] {
        let (width, kv_width) = (heads * d_kv, kv_heads * d_kv);
        let (queries, kv) = (values(width, 5), values(keys * 2 * kv_width, 7));
        let attention = Attention { kv_heads, ..of_t5(heads, d_kv, true) };
        let of = |offset| rows(&kv, 2 * kv_width, offset);
        let (own, first_position) = (rows(&queries, width, 0), keys - 1);
        let (keys, values) = (of(0), of(kv_width));
        let sequence = Sequence { query_rows: 1, first_position, key_rows: 2_000, queries: own, keys, values };
        let by = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = vec![0.0; width];
            pool.install(|| attention.run(&[sequence], &mut out, StillWanted::default())).unwrap();
            out
        };
        let alone = by(1);
        for (out, exact) in alone.iter().zip(plain(&attention, &sequence)) {
            assert!((f64::from(*out) - exact).abs() < 2e-5, "{heads} of {kv_heads}: {out} is not {exact}");
        }
        for threads in [2, 3, 5] {
            assert_eq!(by(threads), alone, "{heads} of {kv_heads} by {threads}");
        }
    }
}

/// A prompt of many thousands of tokens would be computed to its end although nobody waits for it.
#[test]
fn what_is_not_wanted_is_left_undone() {
    let (heads, d_kv, keys) = (2, 16, 20 * QUERIES_PER_TASK);
    let width = heads * d_kv;
    let fused = values(keys * 3 * width, 3);
    let part = |part| rows(&fused, 3 * width, part * width);
    let (queries, key_rows, first_position) = (part(0), keys, 0);
    let sequence = Sequence { query_rows: keys, first_position, key_rows, queries, keys: part(1), values: part(2) };
    let attention = of_t5(heads, d_kv, false);
    let asked = AtomicUsize::new(0);
    let is_wanted = || asked.fetch_add(1, Ordering::Relaxed) < 4;
    let mut out = vec![0.0; keys * width];
    let run = attention.run(&[sequence], &mut out, StillWanted::while_true(&is_wanted));
    assert_eq!(run, Err(GivenUp));
    // The first time before all, then before each piece.
    let computed = out.chunks(QUERIES_PER_TASK * width).filter(|piece| piece.iter().any(|&value| value != 0.0));
    assert_eq!(computed.count(), 3);
}
