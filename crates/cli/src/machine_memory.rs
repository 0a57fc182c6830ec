//! The memory of the machine, and what of it this process may take.

use std::fs;

/// Bytes in all and bytes that are available, as far as /proc/meminfo says.
pub(crate) fn total_and_available() -> Option<(u64, u64)> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    Some((meminfo_bytes(&text, "MemTotal")?, meminfo_bytes(&text, "MemAvailable")?))
}

/// Bytes that this process may take at most: all of the machine's, or what its container is given.
pub(crate) fn limit() -> Option<u64> {
    let (total, _) = total_and_available()?;
    let container = fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| container_bytes(&text));
    Some(container.map_or(total, |bytes| bytes.min(total)))
}

/// A container's limit, as cgroups tell it: a number, or `max` for none.
fn container_bytes(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// The bytes of one line of /proc/meminfo, as `MemTotal:  24689764 kB`.
fn meminfo_bytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo() {
        // Broken: memory would be shown a thousand times off, or a kernel's new line would end the command.
        let text = "MemTotal:       24689764 kB\nMemAvailable:   x kB\nHugePages_Total:       0\n";
        assert_eq!(meminfo_bytes(text, "MemTotal"), Some(24689764 * 1024));
        assert_eq!(meminfo_bytes(text, "MemAvailable"), None);
        assert_eq!(meminfo_bytes(text, "HugePages_Total"), None);
        assert_eq!(meminfo_bytes("", "MemTotal"), None);
    }

    #[test]
    fn containers() {
        // Broken: a share would be of the whole machine's memory, and a container that takes it be ended by the kernel.
        assert_eq!(container_bytes("8589934592\n"), Some(8 << 30));
        assert_eq!(container_bytes("max\n"), None);
    }
}
