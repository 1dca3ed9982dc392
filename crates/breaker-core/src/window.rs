//! The last calls, or those of the last while: what the two rates are taken of.
//!
//! Not a judge: [`Breaker`](crate::Breaker) compares the counts with the settings.

use crate::config::Window;
use crate::span;
use std::time::Duration;

const BUCKETS: usize = 10;
const FAILED: u8 = 0b01;
const SLOW: u8 = 0b10;

/// How many calls, how many of them failed, how many were slow.
pub(crate) type Counts = (u32, u32, u32);

/// Counts over a window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// The last calls, two bits each, the oldest overwritten by the newest.
    Ring { calls: Box<[u8]>, next: usize, len: usize, counts: Counts },
    /// Buckets of time. A bucket is found by its tick, and of another tick it is empty: an idle gap needs no timer.
    Buckets { length: Duration, newest: u64, buckets: [Bucket; BUCKETS] },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bucket {
    tick: u64,
    calls: u16,
    failures: u16,
    slow: u16,
}

impl Seen {
    pub(crate) fn new(window: Window) -> Self {
        match window {
            Window::Count { size, .. } => Self::Ring {
                calls: vec![0; (size as usize).div_ceil(4)].into_boxed_slice(),
                next: 0,
                len: 0,
                counts: (0, 0, 0),
            },
            Window::Time { bucket, .. } => {
                Self::Buckets { length: bucket, newest: 0, buckets: [Bucket::default(); BUCKETS] }
            }
        }
    }

    /// Counts a call. A `now` from before the newest bucket goes into that one: time does not run back here.
    #[inline]
    pub(crate) fn count(&mut self, window: Window, now: Duration, failed: bool, slow: bool) {
        match self {
            Self::Ring { calls, next, len, counts } => {
                let Window::Count { size, .. } = window else { return };
                let size = size as usize;
                let shift = *next % 4 * 2;
                let four = &mut calls[*next / 4];
                let oldest = *four >> shift & 0b11;
                if *len < size {
                    *len += 1;
                    counts.0 += 1;
                } else if oldest != 0 {
                    counts.1 -= u32::from(oldest & FAILED);
                    counts.2 -= u32::from(oldest >> 1);
                }
                let call = (u8::from(failed) * FAILED) | (u8::from(slow) * SLOW);
                *four ^= (oldest ^ call) << shift;
                counts.1 += u32::from(failed);
                counts.2 += u32::from(slow);
                *next = if *next + 1 == size { 0 } else { *next + 1 };
            }
            Self::Buckets { length, newest, buckets } => {
                *newest = tick(now, *length).max(*newest);
                let bucket = &mut buckets[(*newest % BUCKETS as u64) as usize];
                if bucket.tick != *newest {
                    *bucket = Bucket { tick: *newest, ..Bucket::default() };
                }
                bucket.calls = bucket.calls.saturating_add(1);
                bucket.failures = bucket.failures.saturating_add(u16::from(failed));
                bucket.slow = bucket.slow.saturating_add(u16::from(slow));
            }
        }
    }

    pub(crate) fn counts(&self, now: Duration) -> Counts {
        match self {
            Self::Ring { counts, .. } => *counts,
            Self::Buckets { length, newest, buckets } => {
                let newest = tick(now, *length).max(*newest);
                let live = |bucket: &&Bucket| bucket.tick + BUCKETS as u64 > newest;
                buckets.iter().filter(live).fold((0, 0, 0), |sum, bucket| {
                    let (calls, failures, slow) = (bucket.calls, bucket.failures, bucket.slow);
                    (sum.0 + u32::from(calls), sum.1 + u32::from(failures), sum.2 + u32::from(slow))
                })
            }
        }
    }

    /// As bytes, for [`decode`](Self::decode) with the same window. Little endian.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self {
            Self::Ring { calls, next, len, .. } => {
                bytes.extend((*next as u32).to_le_bytes());
                bytes.extend((*len as u32).to_le_bytes());
                bytes.extend_from_slice(calls);
            }
            Self::Buckets { newest, buckets, .. } => {
                bytes.extend(newest.to_le_bytes());
                for bucket in buckets {
                    bytes.extend(bucket.tick.to_le_bytes());
                    for count in [bucket.calls, bucket.failures, bucket.slow] {
                        bytes.extend(count.to_le_bytes());
                    }
                }
            }
        }
        bytes
    }

    /// What [`encode`](Self::encode) wrote for this window; none if it did not.
    pub(crate) fn decode(window: Window, bytes: &[u8]) -> Option<Self> {
        let mut seen = Self::new(window);
        match &mut seen {
            Self::Ring { calls, next, len, counts } => {
                let Window::Count { size, .. } = window else { return None };
                let (head, rest) = bytes.split_at_checked(8)?;
                *next = u32::from_le_bytes(head[..4].try_into().ok()?) as usize;
                *len = u32::from_le_bytes(head[4..].try_into().ok()?) as usize;
                let size = size as usize;
                if rest.len() != calls.len() || *next >= size || *len > size {
                    return None;
                }
                calls.copy_from_slice(rest);
                let of = |place: usize| calls[place / 4] >> (place % 4 * 2);
                let known = (0..*len).map(|age| (*next + size - 1 - age) % size);
                for place in known {
                    counts.0 += 1;
                    counts.1 += u32::from(of(place) & FAILED != 0);
                    counts.2 += u32::from(of(place) & SLOW != 0);
                }
            }
            Self::Buckets { newest, buckets, .. } => {
                let (head, mut rest) = bytes.split_at_checked(8)?;
                *newest = u64::from_le_bytes(head.try_into().ok()?);
                for bucket in buckets.iter_mut() {
                    let (one, others) = rest.split_at_checked(14)?;
                    let count = |at: usize| u16::from_le_bytes([one[at], one[at + 1]]);
                    let tick = u64::from_le_bytes(one[..8].try_into().ok()?);
                    *bucket = Bucket { tick, calls: count(8), failures: count(10), slow: count(12) };
                    rest = others;
                }
                if !rest.is_empty() {
                    return None;
                }
            }
        }
        Some(seen)
    }
}

/// Ticks begin at 10, so that an unused bucket is of none.
#[inline]
fn tick(now: Duration, length: Duration) -> u64 {
    match (span::nanos(now), span::nanos(length)) {
        (u64::MAX, _) | (_, 0) => far_tick(now, length),
        (now, length) => now / length + BUCKETS as u64,
    }
}

#[cold]
fn far_tick(now: Duration, length: Duration) -> u64 {
    u64::try_from(now.as_nanos() / length.as_nanos().max(1))
        .unwrap_or(u64::MAX - 32)
        .saturating_add(BUCKETS as u64)
}
