//! The operations of a pass on the processor, over plain rows: what the thread that owns the rows does, as far as products
//! do not split themselves. Made by [`crate::cpu_backend`], for a whole batch or for a thread's piece of it.

use sida_kernels::{
    attention::{Attention, HeadRows, Sequence},
    elementwise::{add_to, add_to_rows, gate_rows, relu, sigmoid},
    norm::rms_norm,
    position_bias::PositionBias,
};
use sida_routing::LayerId;

use crate::{
    GivenUp, Spans, StillWanted,
    backbone::{Matrices, Router, Shared},
    forward::{Operations, Rows},
    kv_cache::CpuSequence,
    linear::Linear,
    loader::Host,
    pieces,
    rotary::Turns,
    spec::{Activation, AttentionSpec, Keys, ModelSpec, Rotary},
};

/// Rows of some sequences on their way through a stack.
pub(crate) struct CpuOperations<'p, 's> {
    pub(crate) spec: &'p ModelSpec,
    /// A token for each row: to be embedded, at the beginning of a pass.
    pub(crate) ids: &'p [u32],
    pub(crate) spans: &'p Spans,
    /// The decoder's, one for each span; none of prompts.
    pub(crate) sequences: &'p mut [&'s mut CpuSequence],
    /// (n, d_model): the hidden states.
    pub(crate) h: &'p mut [f32],
    /// (n, d_model): what a norm made of them.
    pub(crate) x: &'p mut [f32],
    pub(crate) scratch: &'p mut Scratch,
    /// Whether other threads have the other rows of the batch, so that these need not be shared out.
    pub(crate) is_piece: bool,
    /// Whether anybody still waits for the rows. Attention is what takes long where there are many.
    pub(crate) still_wanted: StillWanted<'s>,
}

/// What lies between the operations of one thread; kept from block to block.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// (n, inner + 2 * kv_inner), or (n, inner) of an attention to the input.
    projected: Vec<f32>,
    /// What rows are turned by, with what it is of: the same in all blocks of most models.
    turns: Option<(Rotary, Turns)>,
    /// (n, inner)
    attended: Vec<f32>,
    /// (n, d_ff)
    hidden: Vec<f32>,
    /// (n, d_model): what is about to be added to h.
    added: Vec<f32>,
    /// (wanted, vocab_size)
    pub(crate) logits: Vec<f32>,
}

impl Operations for CpuOperations<'_, '_> {
    type Memory = Host;
    type Error = GivenUp;

    fn embed(&mut self, embedding: &Linear) -> Result<(), GivenUp> {
        embedding.gather(self.ids, self.h);
        Ok(())
    }

    fn norm(&mut self, weight: &Vec<f32>) -> Result<(), GivenUp> {
        rms_norm(self.h, weight, self.spec.norm_epsilon, self.x);
        Ok(())
    }

    fn project(&mut self, weight: &Linear, bias: Option<&Vec<f32>>) -> Result<(), GivenUp> {
        weight.product(self.x, &mut self.scratch.projected);
        add_to_rows(&mut self.scratch.projected, bias.map(Vec::as_slice));
        Ok(())
    }

    fn norm_heads(&mut self, spec: &AttentionSpec, [q, k]: &[Vec<f32>; 2]) -> Result<(), GivenUp> {
        let (inner, kv_inner, epsilon) = (spec.inner(), spec.kv_inner(), self.spec.norm_epsilon);
        let mut before = Vec::with_capacity(inner);
        for row in self.scratch.projected.chunks_exact_mut(inner + 2 * kv_inner) {
            let (queries, rest) = row.split_at_mut(inner);
            for (values, weight) in [(queries, q), (&mut rest[..kv_inner], k)] {
                before.clear();
                before.extend_from_slice(values);
                rms_norm(&before, weight, epsilon, values);
            }
        }
        Ok(())
    }

    fn clip(&mut self, limit: f32) -> Result<(), GivenUp> {
        self.scratch.projected.iter_mut().for_each(|value| *value = value.clamp(-limit, limit));
        Ok(())
    }

    fn rotate(&mut self, spec: &AttentionSpec, rotary: &Rotary) -> Result<(), GivenUp> {
        let Self { spans, sequences, scratch: Scratch { projected, turns, .. }, .. } = self;
        let first = |index: usize| sequences.get(index).map_or(0, |sequence| sequence.position());
        let positions =
            spans.ranges().enumerate().flat_map(|(index, span)| (0..span.len()).map(move |row| (index, row)));
        if turns.as_ref().is_none_or(|(of, _)| of != rotary) {
            *turns =
                Some((*rotary, Turns::of(rotary, spec.head_dim, positions.map(|(index, row)| first(index) + row))));
        }
        let Some((_, turns)) = turns else { return Ok(()) };
        let turned = spec.inner() + spec.kv_inner();
        for (row, values) in projected.chunks_exact_mut(turned + spec.kv_inner()).enumerate() {
            turns.turn(row, &mut values[..turned]);
        }
        Ok(())
    }

    fn attend(&mut self, spec: &AttentionSpec, block: usize, bias: Option<&PositionBias>) -> Result<(), GivenUp> {
        let Self { spans, sequences, scratch: Scratch { projected, attended, .. }, still_wanted, .. } = self;
        let (inner, kv_inner) = (spec.inner(), spec.kv_inner());
        let width = if spec.keys == Keys::Input { inner } else { inner + 2 * kv_inner };
        if spec.keys == Keys::Cache {
            for (sequence, span) in sequences.iter_mut().zip(spans.ranges()) {
                let position = sequence.position();
                sequence.caches[block].write(position, &projected[span.start * width..span.end * width], width);
            }
        }
        let part = |values, stride, offset| HeadRows { values, stride, offset };
        let of_sequence = |(index, span): (usize, std::ops::Range<usize>)| {
            let own = &projected[span.start * width..span.end * width];
            // Keys and values side by side, where in a row keys begin, and how many came before the first query.
            let (kv, stride, keys, first_position) = match spec.keys {
                Keys::Rows => (own, width, inner, 0),
                Keys::Cache => (sequences[index].caches[block].rows(), 2 * kv_inner, 0, sequences[index].position()),
                Keys::Input => (&sequences[index].cross[block][..], 2 * kv_inner, 0, 0),
            };
            Sequence {
                query_rows: span.len(),
                first_position,
                key_rows: kv.len() / stride,
                queries: part(own, width, 0),
                keys: part(kv, stride, keys),
                values: part(kv, stride, keys + kv_inner),
            }
        };
        let all: Vec<Sequence<'_>> = spans.ranges().enumerate().map(of_sequence).collect();
        let bias = bias.filter(|_| spec.keys != Keys::Input);
        attended.clear();
        attended.resize(spans.rows() * inner, 0.0);
        let AttentionSpec { heads, kv_heads, head_dim: d_kv, scale, window, .. } = *spec;
        let causal = spec.keys == Keys::Cache;
        Attention { heads, kv_heads, d_kv, scale, causal, window, bias }.run(&all, attended, *still_wanted)
    }

    fn add_output(&mut self, weight: &Linear, bias: Option<&Vec<f32>>) -> Result<(), GivenUp> {
        let Scratch { attended, added, .. } = &mut *self.scratch;
        weight.product(attended, added);
        add_to_rows(added, bias.map(Vec::as_slice));
        add_to(self.h, added);
        Ok(())
    }

    fn feed_forward(&mut self, matrices: &Matrices<Host>) -> Result<(), GivenUp> {
        self.add_by_row(|x, scratch| matrices.compute(x, &mut scratch.hidden, &mut scratch.added));
        Ok(())
    }

    fn shared(&mut self, Shared { matrices, gate }: &Shared<Host>) -> Result<(), GivenUp> {
        let d_model = self.spec.d_model;
        self.add_by_row(|x, Scratch { hidden, added, .. }| {
            matrices.compute(x, hidden, added);
            let Some(gate) = gate else { return };
            gate.product(x, hidden); // (n, 1)
            for (row, share) in added.chunks_exact_mut(d_model).zip(hidden) {
                let share = sigmoid(*share);
                row.iter_mut().for_each(|value| *value *= share);
            }
        });
        Ok(())
    }

    /// Put off until somebody asks for its choice: a hash table may choose instead.
    fn route(&mut self, _: LayerId, _: &Router<Host>) -> Result<(), GivenUp> {
        Ok(())
    }

    fn experts(&mut self, _: LayerId) -> Result<Rows, GivenUp> {
        Ok(Rows::Leave)
    }

    fn norm_wanted(&mut self, weight: &Vec<f32>, scale: f32) -> Result<(), GivenUp> {
        self.norm(weight)?;
        if scale != 1.0 {
            self.x.iter_mut().for_each(|x| *x *= scale);
        }
        Ok(())
    }

    fn logits(&mut self, weight: &Linear) -> Result<(), GivenUp> {
        weight.product(self.x, &mut self.scratch.logits);
        Ok(())
    }
}

impl CpuOperations<'_, '_> {
    /// h += what `compute` makes of x in the scratch's `added`, by several threads where these are all rows of a batch.
    fn add_by_row(&mut self, compute: impl Fn(&[f32], &mut Scratch) + Sync) {
        let work = |h: &mut [f32], x: &[f32], scratch: &mut Scratch| {
            compute(x, scratch);
            add_to(h, &scratch.added);
        };
        match self.is_piece {
            true => work(self.h, self.x, self.scratch),
            false => pieces::by_row(self.h, self.x, self.spec.d_model, self.scratch, work),
        }
    }
}

impl Matrices<Host> {
    /// out = what the feed-forward makes of x (n, d_model), with `hidden` between.
    fn compute(&self, x: &[f32], hidden: &mut Vec<f32>, out: &mut Vec<f32>) {
        self.wi.product(x, hidden);
        match self.activation {
            Activation::Relu => relu(hidden),
            Activation::GatedSilu => gate_rows(hidden, self.wo.inputs()),
        }
        self.wo.product(hidden, out);
    }
}
