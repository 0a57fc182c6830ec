//! A part of a whole, as a flag gives it.

/// A part, as 50%: above 0%, at most 100%.
pub(crate) fn parse(text: &str) -> Result<f64, String> {
    let percent = text.strip_suffix('%').and_then(|number| number.trim().parse::<f64>().ok());
    let share = percent.map(|percent| percent / 100.0).filter(|share| *share > 0.0 && *share <= 1.0);
    share.ok_or_else(|| format!("{text:?} is no share as 20%, expected above 0% and at most 100%"))
}

/// A part that something has to reach, as 50%; `off`, which nothing reaches, is infinite.
pub(crate) fn parse_or_off(text: &str) -> Result<f64, String> {
    match text {
        "off" => Ok(f64::INFINITY),
        share => parse(share).map_err(|problem| format!("{problem}, or off")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_part_of_the_whole() {
        // Would break: a share of 50 is taken for fifty queues, or nobody may wait.
        assert_eq!(parse("50%"), Ok(0.5));
        assert_eq!(parse("100%"), Ok(1.0));
        assert_eq!(parse_or_off("off"), Ok(f64::INFINITY));
        assert_eq!(parse_or_off("0.5%"), Ok(0.005));
        assert!(["", "0%", "on", "101%", "inf%"].into_iter().all(|wrong| parse_or_off(wrong).is_err()));
        for wrong in ["0%", "101%", "50", "-1%", "NaN%", "%", ""] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
