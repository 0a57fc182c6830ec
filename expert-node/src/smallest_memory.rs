//! The smallest amounts of expert memory that are enough, for the message that refuses a smaller one: whoever gives what
//! it says is not refused again. Asked by [`crate::engine`] and by the command line, whose nodes share an amount.

use std::fmt;

use crate::ExpertMemory;

/// What a person can give instead.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SmallestMemory {
    /// In bytes.
    pub bytes: ExpertMemory,
    /// As a share of all experts, in hundredths of a per cent rounded up; `None` where not even all is enough.
    pub share: Option<ExpertMemory>,
}

/// The smallest amounts of which each of `parts` (shares of the whole, above 0) comes to `needed_bytes`, for a model whose
/// experts take `experts_bytes` together. None where no amount does.
pub fn smallest(needed_bytes: u64, experts_bytes: u64, parts: &[f64]) -> Option<SmallestMemory> {
    // Found by asking what a node would ask, so that rounding is the same on both ways.
    let is_enough =
        |memory: ExpertMemory| parts.iter().all(|&part| memory.part(part).bytes(experts_bytes) >= needed_bytes);
    let bytes = first(u64::MAX >> 2, |bytes| is_enough(ExpertMemory::Bytes(bytes)))?;
    let share = first(10_000, |hundredths| is_enough(percent(hundredths)));
    Some(SmallestMemory { bytes: ExpertMemory::Bytes(bytes), share: share.map(percent) })
}

/// As a person would write it and a flag is read.
fn percent(hundredths: u64) -> ExpertMemory {
    let text = format!("{}.{:02}%", hundredths / 100, hundredths % 100);
    text.parse().expect("a number of per cent, above 0 and at most 100")
}

/// The first of `1..=last` for which `is_enough`, which stays true once it is.
fn first(last: u64, is_enough: impl Fn(u64) -> bool) -> Option<u64> {
    if !is_enough(last) {
        return None;
    }
    let (mut too_small, mut enough) = (0, last);
    while enough - too_small > 1 {
        let middle = too_small + (enough - too_small) / 2;
        if is_enough(middle) {
            enough = middle;
        } else {
            too_small = middle;
        }
    }
    Some(enough)
}

impl fmt::Display for SmallestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self { bytes: ExpertMemory::Bytes(bytes), share: Some(ExpertMemory::Share(share)) } => {
                write!(f, "{bytes} bytes ({:.2}%)", share * 100.0)
            }
            Self { bytes, .. } => write!(f, "{bytes}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The amounts of the message, as they would be given.
    fn said(smallest: SmallestMemory) -> (u64, ExpertMemory) {
        let text = smallest.to_string();
        let (bytes, percent) = text.split_once(" bytes (").expect("both are said");
        (bytes.parse().unwrap(), percent.trim_end_matches(')').parse().unwrap())
    }

    #[test]
    fn what_is_said_is_enough_and_less_is_not() {
        // Broken: who gave the amount that a message asked for would be refused again, with the same message.
        let expert = 65_536;
        for experts in [3u64, 96, 384, 1536, 3072] {
            for parts in [&[1.0][..], &[0.5, 0.5], &[0.46875, 0.53125], &[0.3333, 0.3333, 0.3334], &[0.01, 0.99]] {
                let all = experts * expert;
                let smallest = smallest(2 * expert, all, parts).unwrap();
                let holds = |memory: ExpertMemory| parts.iter().all(|&part| memory.part(part).bytes(all) >= 2 * expert);
                let Some(ExpertMemory::Share(share)) = smallest.share else {
                    assert!(!holds(ExpertMemory::Share(1.0)), "{experts} {parts:?}");
                    continue;
                };
                let (bytes, percent) = said(smallest);
                assert!(holds(ExpertMemory::Bytes(bytes)) && !holds(ExpertMemory::Bytes(bytes - 1)), "{parts:?}");
                assert!(holds(percent) && !holds(ExpertMemory::Share(share - 0.0001)), "{experts} {parts:?}");
            }
        }
    }

    #[test]
    fn a_part_of_nothing_is_never_enough() {
        // Broken: a cluster with more nodes than experts would be told of an amount without end.
        assert_eq!(smallest(1, 100, &[0.0, 1.0]), None);
        let whole = smallest(400, 100, &[1.0]).unwrap();
        assert_eq!((whole.share, whole.to_string()), (None, "400B".to_owned()));
    }
}
