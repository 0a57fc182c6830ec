//! Byte counts as a person reads them. Used by everything that prints.

/// `bytes` in the largest binary unit that keeps it at or above one: `512 B`, `13.8 MiB`, `2.0 GiB`.
pub(crate) fn shown(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        // Broken: a budget would be shown a thousand times too large or too small.
        assert_eq!(shown(0), "0 B");
        assert_eq!(shown(1023), "1023 B");
        assert_eq!(shown(1024), "1.0 KiB");
        assert_eq!(shown(14_471_168), "13.8 MiB");
        assert_eq!(shown(2 << 30), "2.0 GiB");
        assert_eq!(shown(u64::MAX), "16777216.0 TiB");
    }
}
