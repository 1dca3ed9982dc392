//! Maps by number: of tasks, agents and sessions.

use crate::TaskId;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

/// Task numbers come in sequence, so one multiplication spreads them well and costs a tenth of the default hash.
#[derive(Clone, Copy, Debug, Default)]
pub struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u32(&mut self, number: u32) {
        self.write_u64(u64::from(number));
    }

    fn write_u64(&mut self, number: u64) {
        // The table takes its bits from both ends: fold the well-mixed high half into the low one.
        let mixed = (self.0 ^ number).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

/// A map by number.
pub type ById<K, V> = HashMap<K, V, BuildHasherDefault<IdHasher>>;
/// A map by task.
pub type ByTask<V> = ById<TaskId, V>;
/// A set of tasks.
pub type TaskSet = HashSet<TaskId, BuildHasherDefault<IdHasher>>;
