//! Experts that come to a GPU and leave it between passes and beside them: outputs are those of a model whose experts all are there.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use super::*;

/// A plan would change an output, or not be followed.
#[test]
fn plans_change_no_output() {
    let Some(ordinal) = device() else { return println!("SIDA_CUDA_DEVICE is not set: nothing is compared") };
    let mut random = rand::rngs::StdRng::seed_from_u64(11);
    // A fifth of its experts holds what a batch plans.
    let dir = models().into_iter().find(|dir| dir.ends_with("switch-tiny-64")).expect("switch-tiny-64");
    let mut all = open(&dir, ordinal, Precision::Bf16, 1.0, 0);
    let mut planned = open(&dir, ordinal, Precision::Bf16, 0.2, u64::MAX);
    let mut demanded = open(&dir, ordinal, Precision::Bf16, 0.2, 1 << 20);
    let vocab = all.config().vocab_size;
    let batches: Vec<_> = (0..40).map(|_| random_batch(&mut random, vocab, &[12])).collect();
    let plans: Vec<Plan> =
        batches.iter().zip(0..).map(|((ids, spans), number)| plan(number, &all.encode(ids, spans).experts)).collect();
    let (mut misses, mut misses_unplanned) = (0, 0);
    for ((ids, spans), plan) in batches.iter().zip(&plans) {
        planned.plan(plan);
        while planned.experts().load_ahead() {}
        misses += planned.encode(ids, spans).demand_loads;
        planned.release(plan.id);
        misses_unplanned += demanded.encode(ids, spans).demand_loads;
        all.encode(ids, spans);
        let expected = all.states();
        assert!(planned.states() == expected && demanded.states() == expected);
    }
    println!("misses with plans {misses}, without {misses_unplanned}; {:?}", planned.counters());
    assert_eq!(misses, 0);
    assert!(misses_unplanned > 0);
}

/// An expert would leave that a running pass is still to use, or come to a pass that looks for it elsewhere.
#[test]
fn what_moves_beside_a_pass_changes_no_output() {
    let Some(ordinal) = device() else { return println!("SIDA_CUDA_DEVICE is not set: nothing is compared") };
    let mut random = rand::rngs::StdRng::seed_from_u64(17);
    for dir in models() {
        let mut all = open(&dir, ordinal, Precision::Bf16, 1.0, 0);
        let experts = all.config().num_experts as u16;
        let vocab = all.config().vocab_size;
        for (share, wrong) in [(0.3, 0.0), (0.3, 0.05), (0.5, 0.02)] {
            let mut planned = open(&dir, ordinal, Precision::Bf16, share, u64::MAX);
            let batches: Vec<_> = (0..40).map(|_| random_batch(&mut random, vocab, &[30, 60, 14])).collect();
            let mut hinted = |(ids, spans): &(Vec<u32>, Spans), number| {
                let mut experts_of = all.encode(ids, spans).experts;
                for expert in experts_of.iter_mut().flatten() {
                    if random.random_bool(wrong) {
                        *expert = random.random_range(0..experts);
                    }
                }
                (plan(number, &experts_of), all.states())
            };
            let hinted: Vec<_> = batches.iter().zip(0..).map(|(batch, number)| hinted(batch, number)).collect();
            let (beside, is_over) = (planned.experts(), AtomicBool::new(false));
            let misses = thread::scope(|scope| {
                scope.spawn(|| {
                    while !is_over.load(Ordering::Relaxed) {
                        if !beside.load_ahead() {
                            thread::yield_now();
                        }
                    }
                });
                let mut misses = 0;
                for (number, (ids, spans)) in batches.iter().enumerate() {
                    if number % 4 == 0 {
                        hinted[number..].iter().take(4).for_each(|(plan, _)| planned.plan(plan));
                    }
                    let (plan, expected) = &hinted[number];
                    misses += planned.encode(ids, spans).demand_loads;
                    assert!(planned.states() == *expected, "{} at {share}", dir.display());
                    planned.release(plan.id);
                }
                is_over.store(true, Ordering::Relaxed);
                misses
            });
            let counters = planned.counters();
            println!("{} at {share}, {wrong} wrong: {misses} misses, {counters:?}", dir.display());
            assert!(counters.prefetch_loads > 0);
        }
    }
}

/// A layer would run on rows whose experts were missing, since meanwhile the last of them came.
#[test]
fn what_comes_while_a_pass_stops_changes_no_output() {
    let Some(ordinal) = device() else { return println!("SIDA_CUDA_DEVICE is not set: nothing is compared") };
    let mut random = rand::rngs::StdRng::seed_from_u64(23);
    for dir in models() {
        let mut all = open(&dir, ordinal, Precision::Bf16, 1.0, u64::MAX);
        let (ids, spans) = random_batch(&mut random, all.config().vocab_size, &[30, 60, 14]);
        all.encode(&ids, &spans);
        let options =
            Options { precision: Precision::Bf16, share: 1.0, host_bytes: u64::MAX, packs: true, comes_late: true };
        let mut late = OnDevice::open(&dir, ordinal, options);
        late.encode(&ids, &spans);
        assert!(late.states() == all.states(), "{}", dir.display());
    }
}

/// Experts that left would be taken for those that came into their slots, also by a pass that is replayed.
#[test]
fn experts_that_take_turns_change_no_output() {
    let Some(ordinal) = device() else { return println!("SIDA_CUDA_DEVICE is not set: nothing is compared") };
    let mut random = rand::rngs::StdRng::seed_from_u64(12);
    let Some(dir) = models().into_iter().next() else { panic!("no models") };
    let mut model = open(&dir, ordinal, Precision::Bf16, 0.0, u64::MAX);
    let batches: Vec<_> = (0..3).map(|_| random_batch(&mut random, model.config().vocab_size, &[30])).collect();
    let mut expected = vec![None; batches.len()];
    let mut evictions = 0;
    for round in 0..5 {
        for ((ids, spans), expected) in batches.iter().zip(&mut expected) {
            let passed = model.encode(ids, spans);
            assert!(round == 0 || passed.demand_loads > 0, "what left came back by itself");
            let encoded = model.states();
            let mut sequences = model.start(spans);
            let start = model.config().generation.decoder_start_token_id;
            let mut tokens = vec![start];
            for _ in 0..6 {
                let fed = [*tokens.last().unwrap()];
                tokens.extend(model.decode(&fed, &Spans::single_tokens(1), &mut sequences, &[0]).tokens);
            }
            assert!(&(encoded.clone(), tokens.clone()) == expected.get_or_insert((encoded, tokens)), "round {round}");
        }
        assert!(model.counters().evictions > evictions);
        evictions = model.counters().evictions;
    }
}
