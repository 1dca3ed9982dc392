//! What the operating system says about this process.

use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};
use std::net::SocketAddr;
use std::time::Duration;

/// What no other process that lives is called: the host, and where we listen on it.
#[must_use]
pub(crate) fn name(address: SocketAddr) -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}/{address}", host.trim())
}

/// Processor time used since the start.
#[must_use]
pub(crate) fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or_default())
}

/// Bytes that this process caused to be written to disks; 0 where nobody counts them.
#[must_use]
pub(crate) fn written_bytes() -> u64 {
    let counts = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
    let written = counts.lines().find_map(|line| line.strip_prefix("write_bytes:"));
    written.and_then(|number| number.trim().parse().ok()).unwrap_or_default()
}

/// Connections to hold at most: half of the descriptors, so that files and the other port never run out of them.
#[must_use]
pub(crate) fn connection_limit() -> usize {
    /// Where there is no limit at all.
    const PLENTY: u64 = 1 << 20;
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(PLENTY).min(PLENTY);
    usize::try_from(descriptors / 2).unwrap_or(usize::MAX).max(1)
}
