//! Maps by number and by name, with hashes that cost less than what they find. Names are users' words: their hash has a
//! seed of the process.

use crate::{AgentId, TaskId};
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

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
/// A map by name.
pub type ByName<V> = HashMap<Arc<str>, V, foldhash::fast::RandomState>;
/// A map by an agent's idempotency key.
pub type ByKey<V> = HashMap<(AgentId, Arc<str>), V, foldhash::fast::RandomState>;
/// A set of tasks.
pub type TaskSet = HashSet<TaskId, BuildHasherDefault<IdHasher>>;
