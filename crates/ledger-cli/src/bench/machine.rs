//! What the kernel says of a process and of the machine. Everything is optional: not every system has `/proc`.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

/// The unit of CPU times in `/proc`, the same on every Linux a program can run on.
const TICK: Duration = Duration::from_millis(10);
/// The magic number of a file system in memory.
const TMPFS: u32 = 0x0102_1994;

/// What a process has used since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Spent {
    pub(super) cpu: Option<Duration>,
    /// Bytes that it caused to be written to storage.
    pub(super) written: Option<u64>,
}

impl Spent {
    pub(super) fn read(process: u32) -> Self {
        let file = |name: &str| fs::read_to_string(format!("/proc/{process}/{name}")).ok();
        Self {
            cpu: file("stat").as_deref().and_then(cpu_time),
            written: file("io").as_deref().and_then(write_bytes),
        }
    }

    pub(super) fn since(&self, earlier: &Self) -> Self {
        Self {
            cpu: self.cpu.zip(earlier.cpu).map(|(now, then)| now.saturating_sub(then)),
            written: self.written.zip(earlier.written).map(|(now, then)| now.saturating_sub(then)),
        }
    }
}

/// The sum of user and system time, fields 14 and 15. The second field is a name that may hold anything, so fields are
/// counted from its end.
fn cpu_time(stat: &str) -> Option<Duration> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ').skip(11);
    let mut ticks = || fields.next()?.parse::<u32>().ok();
    Some(TICK * ticks()?.checked_add(ticks()?)?)
}

fn write_bytes(io: &str) -> Option<u64> {
    io.lines().find_map(|line| line.strip_prefix("write_bytes: "))?.trim().parse().ok()
}

/// Bytes of memory that a process has in use.
pub(super) fn resident(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    resident_of(&status)
}

fn resident_of(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

/// Where the figures were taken.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Machine {
    pub(super) cores: usize,
    pub(super) cpu: Option<String>,
    pub(super) system: String,
}

impl Machine {
    pub(super) fn this() -> Self {
        let name = rustix::system::uname();
        Self {
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            cpu: fs::read_to_string("/proc/cpuinfo").ok().as_deref().and_then(cpu_model),
            system: format!("{} {}", name.sysname().to_string_lossy(), name.release().to_string_lossy()),
        }
    }
}

fn cpu_model(cpuinfo: &str) -> Option<String> {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().into())
}

/// Whether files there are in memory only. The type of the number differs between systems.
pub(super) fn is_memory(folder: &Path) -> bool {
    rustix::fs::statfs(folder).is_ok_and(|found| i128::from(found.f_type) == i128::from(TMPFS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_read_past_any_name() {
        let stat = "7 (led (x) ger) S 1 7 7 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 9 0 100 1 1 1";
        assert_eq!(cpu_time(stat), Some(Duration::from_secs(3)));
        assert_eq!(cpu_time("7 (x"), None);
        assert_eq!(cpu_time("7 (x) S 1"), None);
    }

    #[test]
    fn written_bytes_are_those_that_reach_storage() {
        let io = "rchar: 1\nwchar: 2\nread_bytes: 3\nwrite_bytes: 4096\ncancelled_write_bytes: 0\n";
        assert_eq!(write_bytes(io), Some(4_096));
        assert_eq!(write_bytes(""), None);
    }

    #[test]
    fn memory_in_use_is_told_in_kilobytes() {
        assert_eq!(resident_of("VmPeak:\t 9 kB\nVmRSS:\t    2048 kB\n"), Some(2 << 20));
        assert_eq!(resident_of(""), None);
    }

    #[test]
    fn spent_is_a_difference_where_both_sides_are_known() {
        let at = |seconds, written| Spent { cpu: Some(Duration::from_secs(seconds)), written };
        let spent = at(5, Some(70)).since(&at(2, Some(50)));
        assert_eq!(spent, at(3, Some(20)));
        assert_eq!(at(5, None).since(&at(2, Some(50))).written, None);
    }

    #[test]
    fn the_model_is_taken_from_the_first_core() {
        assert_eq!(
            cpu_model("processor: 0\nmodel name\t: AMD EPYC\nmodel name: x\n").as_deref(),
            Some("AMD EPYC")
        );
        assert_eq!(cpu_model("processor: 0\n"), None);
    }
}
