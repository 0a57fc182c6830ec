//! A whole number within bounds, as a flag gives it. Clap's own parsers tell bounds as Rust writes ranges.

use std::{fmt::Display, ops::RangeInclusive, str::FromStr};

/// Of a limit: nothing would pass one of 0.
pub(crate) fn one_or_more<N>(text: &str) -> Result<N, String>
where
    N: FromStr + PartialOrd + From<u8>,
{
    let number = text.parse().ok().filter(|number| *number >= N::from(1));
    number.ok_or_else(|| "expected a whole number, 1 or more".to_owned())
}

/// A parser of the numbers of `range`.
pub(crate) fn within<N>(range: RangeInclusive<N>) -> impl Fn(&str) -> Result<N, String> + Clone
where
    N: FromStr + PartialOrd + Display + Clone,
{
    move |text: &str| {
        let number = text.parse().ok().filter(|number| range.contains(number));
        number.ok_or_else(|| format!("expected a whole number, {} to {}", range.start(), range.end()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_kept_and_told() {
        // Would break: a limit of 0 lets nothing pass, or who sets it is told of bounds in Rust's notation.
        assert_eq!(one_or_more::<u64>("1"), Ok(1));
        assert_eq!(one_or_more(&u64::MAX.to_string()), Ok(u64::MAX));
        for wrong in ["0", "-1", "1.5", "", "many", "18446744073709551616"] {
            assert!(one_or_more::<u64>(wrong).is_err_and(|told| told.ends_with("1 or more")), "{wrong}");
        }
        let parse = within::<u64>(4096..=1 << 24);
        assert_eq!((parse("4096"), parse("16777216")), (Ok(4096), Ok(1 << 24)));
        for wrong in ["4095", "16777217", "x"] {
            assert!(parse(wrong).is_err_and(|told| told.ends_with("4096 to 16777216")), "{wrong}");
        }
    }
}
