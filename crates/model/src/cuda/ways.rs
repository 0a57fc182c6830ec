//! Which way rows are multiplied on a GPU (`kernels/product_*.cu`), and steps attend (`kernels/attention_steps.cu`). All ways give the
//! same bits, so this is about time only.

/// Up to so many rows at once all groups are tiles of `few`: two kernels less, and their blocks are shorter. Measured on an H200, a
/// layer's experts, four tenths of the rows being of one: 93 instead of 107 us at 224 rows, no difference at 640, 222 instead of
/// 206 at 900.
const ALL_FEW_ROWS_MAX: usize = 640;
/// With more, groups of at most so many are one tile of `few`, which reads its expert once.
const FEW_GROUP_ROWS_MAX: usize = 32;
/// So many rows of an expert, on the average, fill tiles of `wide` well enough: 0.72 of the time of `many` at 72 rows (H200, the
/// experts of qwen3-30b-a3b).
const WIDE_GROUP_ROWS_MIN: usize = 64;
/// Outputs and rows of a block.
pub(super) const FEW_TILE: (usize, usize) = (16, 32);
pub(super) const MANY_TILE: (usize, usize) = (64, 64);
pub(super) const WIDE_TILE: (usize, usize) = (128, 128);
/// What `wide` takes of k at a time in each of its four runs, a multiple of it.
const WIDE_RUNS: usize = 4 * 64;

/// Keys of a cache that are summed by themselves. The fewer, the sooner a step is done, and the longer a prompt takes. Measured on an
/// H200, 8 blocks of qwen3-30b-a3b, with 512 and with 1,024: prompts of 2,048 and 8,000 tokens took 1.03 and 1.07 of what they took
/// with one run, and 0.99 and 1.03.
pub(super) const RUN: usize = 512;
/// Heads that share keys and values, at most, where a step takes them as the rows of one tile.
const GROUP_MAX: usize = 16;

/// A way to multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// A few rows: each weight is read once.
    Few,
    /// Tiles through shared memory.
    Many,
    /// Larger ones, by the instructions of Hopper.
    Wide,
}

/// Whether `wide` takes a matrix of (outputs, inputs); of a gated one W has two rows for each output.
pub(super) fn is_wide(outputs: usize, inputs: usize) -> bool {
    outputs.is_multiple_of(WIDE_TILE.0) && inputs.is_multiple_of(WIDE_RUNS)
}

/// For `rows` rows and a matrix of so many. `can_be_wide`: the device and the matrix can be.
pub(super) fn of_dense(rows: usize, outputs: usize, multiprocessors: usize, can_be_wide: bool) -> Way {
    let blocks = |(of_outputs, of_rows): (usize, usize)| outputs / of_outputs * rows.div_ceil(of_rows);
    // A multiprocessor makes one tile of `wide` at a time: of its turns two thirds must be used, and of a tile more than half, however
    // many outputs there are. Measured on an H200, 2048 -> 5120 and 4096 -> 2048: 1.01 and 1.11 of the time of `many` with
    // fewer turns used, 0.64 to 0.9 with more.
    let wide = blocks(WIDE_TILE);
    if can_be_wide && 2 * rows > WIDE_TILE.1 && 3 * wide >= 2 * wide.next_multiple_of(multiprocessors) {
        return Way::Wide;
    }
    // Where one tile of `few` has all rows, it reads the matrix once. Where tiles of `many` would keep less than half of the
    // device busy, those of `few` are quicker: encodings of eight took 1.84 ms with them, and 1.57 without.
    match rows > FEW_TILE.1 && 2 * blocks(MANY_TILE) >= multiprocessors {
        true => Way::Many,
        false => Way::Few,
    }
}

/// Whether the logits of a router are made of 8 outputs and 32 rows a block, which reads less, and not of 4 and 8, of which there are
/// more: if those keep the device busy. Measured on an H200, 128 experts: 67 instead of 97 us at 2,048 rows, 19 instead of 29 at 512.
pub(super) fn are_many_to_route(rows: usize, experts: usize, multiprocessors: usize) -> bool {
    experts.is_multiple_of(8) && experts / 8 * rows.div_ceil(32) >= multiprocessors
}

/// How caches of several runs of keys are attended to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LongWay {
    /// A block for some queries of a head.
    Heads,
    /// Of a step, which has a query for each sequence: one for all heads that share keys and values.
    Groups,
    /// Of a step: one for each run of keys of those.
    Runs,
}

/// For so many sequences of at most `longest` queries, heads that share keys and values in groups, caches of `runs` runs at most, and
/// room for what `parts_max` runs of a head make.
pub(super) fn of_long_caches(
    longest: usize,
    sequences: usize,
    (heads, group): (usize, usize),
    runs: usize,
    parts_max: usize,
    multiprocessors: usize,
) -> LongWay {
    if longest > 1 || group > GROUP_MAX {
        return LongWay::Heads;
    }
    // Blocks that are there anyway keep the device busy: three are on a multiprocessor at a time.
    let is_busy = heads / group * sequences >= 3 * multiprocessors;
    match is_busy || sequences * heads * runs > parts_max {
        true => LongWay::Groups,
        false => LongWay::Runs,
    }
}

/// How the rows of an MoE layer become tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// Groups of at most so many rows are tiles of `few`.
    pub(super) few_rows: usize,
    /// The way of the others.
    pub(super) others: Way,
    /// What is left of those behind whole tiles is one of `few` if it is at most so much.
    pub(super) rest_rows: usize,
}

/// For `rows` rows in so many groups, or fewer.
pub(super) fn of_experts(rows: usize, groups: usize, can_be_wide: bool) -> Cut {
    if rows <= ALL_FEW_ROWS_MAX {
        Cut { few_rows: ALL_FEW_ROWS_MAX, others: Way::Many, rest_rows: 0 }
    } else if can_be_wide && rows >= groups * WIDE_GROUP_ROWS_MIN {
        Cut { few_rows: FEW_GROUP_ROWS_MAX, others: Way::Wide, rest_rows: FEW_TILE.1 }
    } else {
        Cut { few_rows: FEW_GROUP_ROWS_MAX, others: Way::Many, rest_rows: 0 }
    }
}

impl Cut {
    /// Rows of a tile of the others.
    pub(super) fn tile(&self) -> usize {
        if self.others == Way::Wide { WIDE_TILE.1 } else { MANY_TILE.1 }
    }

    /// How many rows of a group are multiplied in the way of the others: its first ones (as `few_from` of routing.cu).
    pub(super) fn others_of(&self, rows: usize) -> usize {
        let rest = rows % self.tile();
        match () {
            () if rows <= self.few_rows => 0,
            () if rest <= self.rest_rows => rows - rest,
            () => rows,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A group's rows would be multiplied by the wrong kernel, twice, or not at all.
    #[test]
    fn every_row_of_a_group_has_one_way() {
        for (cut, rows_max) in
            [(of_experts(640, 8, true), 640), (of_experts(641, 600, true), 700), (of_experts(16384, 128, true), 700)]
        {
            for rows in 0..=rows_max {
                let (others, tile) = (cut.others_of(rows), cut.tile());
                assert!(others <= rows && (rows > cut.few_rows || others == 0), "{cut:?}, {rows}");
                let rest = rows - others;
                assert!(rest <= cut.few_rows.max(cut.rest_rows), "{cut:?}, {rows}: {rest} rows are left for few");
                // Where both multiply, only whole tiles are of the others.
                assert!(others == 0 || rest == 0 || others.is_multiple_of(tile), "{cut:?}, {rows}");
            }
        }
    }

    /// Passes would be slower than they were: large ones by `many`, small ones by `wide`.
    #[test]
    fn ways_are_those_that_measured_best() {
        let dense = |rows, outputs| of_dense(rows, outputs, 132, true);
        assert_eq!([1, 32].map(|rows| dense(rows, 5120)), [Way::Few; 2]);
        // A vocabulary has outputs enough for any way.
        assert_eq!(
            [1, 32, 33, 64, 65].map(|rows| dense(rows, 151_936)),
            [Way::Few, Way::Few, Way::Many, Way::Many, Way::Wide]
        );
        assert_eq!((dense(512, 5120), dense(512, 2048), dense(1147, 2048)), (Way::Many, Way::Many, Way::Many));
        assert_eq!((dense(2048, 5120), dense(2048, 2048), dense(1147, 5120)), (Way::Wide, Way::Wide, Way::Wide));
        assert_eq!(of_dense(2048, 5120, 132, false), Way::Many);
        let experts = |rows, groups| of_experts(rows, groups, true).others;
        assert_eq!(
            (experts(2048 * 8, 128), experts(512 * 8, 128), experts(1147, 128)),
            (Way::Wide, Way::Many, Way::Many)
        );
        assert_eq!(of_experts(2048 * 8, 128, false).others, Way::Many);
    }

    /// Rows would be read that are not there, or steps of a few sequences wait for few blocks.
    #[test]
    fn routers_of_few_rows_have_many_blocks() {
        let many = |rows, experts| are_many_to_route(rows, experts, 132);
        assert!(many(512, 128) && many(2048, 128) && many(8192, 8));
        assert!(!many(1, 128) && !many(256, 128) && !many(2048, 60));
    }

    /// What runs make would be written beyond its room, a group's heads be left out, or a long cache be read by a few blocks.
    #[test]
    fn steps_attend_by_runs_where_that_fills_the_device() {
        let of = |sequences, heads, runs| of_long_caches(1, sequences, heads, runs, 1 << 16, 132);
        assert_eq!((of(1, (32, 8), 2), of(64, (32, 8), 8)), (LongWay::Runs, LongWay::Runs));
        assert_eq!(of(128, (32, 8), 8), LongWay::Groups, "many sequences");
        assert_eq!((of(64, (32, 8), 32), of(65, (32, 8), 32)), (LongWay::Runs, LongWay::Groups), "no room");
        assert_eq!((of(1, (32, 16), 8), of(1, (34, 17), 8)), (LongWay::Runs, LongWay::Heads), "one tile of heads");
        assert_eq!(of_long_caches(2, 1, (32, 8), 8, 1 << 16, 132), LongWay::Heads, "prompts");
    }

    /// A matrix would be read beyond its end, or a run of k end within a stage.
    #[test]
    fn wide_takes_whole_tiles_and_stages() {
        assert!(is_wide(1536, 2048) && is_wide(2048, 768) && is_wide(128, 256));
        assert!(!is_wide(2048, 1408) && !is_wide(64, 256) && !is_wide(192, 256));
    }
}
