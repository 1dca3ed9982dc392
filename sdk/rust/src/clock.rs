//! The only reader of the wall clock and of entropy in this crate.
//!
//! Nothing here is fit for secrets: the draws spread load and keep identifiers apart, no more.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

static DRAWS: AtomicU64 = AtomicU64::new(0);

/// The wall time.
#[expect(clippy::disallowed_methods, reason = "the one place that reads the wall clock")]
pub(crate) fn now() -> SystemTime {
    SystemTime::now()
}

/// Milliseconds since 1970; 0 on a clock set before that.
pub(crate) fn unix_ms() -> u64 {
    let since = now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A number that differs from call to call and from process to process.
pub(crate) fn draw() -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u64(DRAWS.fetch_add(1, Ordering::Relaxed));
    hasher.write_u32(std::process::id());
    hasher.write_u128(now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos());
    hasher.finish()
}

/// A fresh request id: 32 hexadecimal digits.
pub(crate) fn request_id() -> String {
    format!("{:016x}{:016x}", draw(), draw())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn request_ids_do_not_repeat() {
        let ids: HashSet<String> = (0..10_000).map(|_| request_id()).collect();
        assert_eq!(ids.len(), 10_000);
        assert!(ids.iter().all(|id| id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit())));
    }

    #[test]
    fn wall_time_is_past_2020() {
        assert!(unix_ms() > 1_577_836_800_000);
    }
}
