//! Digests that are stored: the same content must have the same digest in every later version.
//!
//! The first 64 bits of SHA-256. Not a hash of the standard library: those may change between releases and runs.

use sha2::{Digest as _, Sha256};

/// A digest over parts, each with its length before it, so that no two lists of parts run into one.
#[derive(Clone, Debug)]
pub(super) struct Digest(Sha256);

impl Digest {
    /// Over things of one kind; another kind never has an equal digest.
    pub(super) fn of(kind: &str) -> Self {
        Self(Sha256::new()).part(kind.as_bytes())
    }

    /// With one more part.
    pub(super) fn part(mut self, bytes: &[u8]) -> Self {
        self.0.update((bytes.len() as u64).to_be_bytes());
        self.0.update(bytes);
        self
    }

    /// The number.
    pub(super) fn finish(self) -> u64 {
        let hash = self.0.finalize();
        u64::from_be_bytes([hash[0], hash[1], hash[2], hash[3], hash[4], hash[5], hash[6], hash[7]])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_digests_stay_what_they_are() {
        assert_eq!(Digest::of("test").part(b"a").part(b"").finish(), 12607038567117558619);
    }

    #[test]
    fn parts_do_not_run_into_each_other() {
        let digest =
            |parts: &[&str]| parts.iter().fold(Digest::of("k"), |d, part| d.part(part.as_bytes())).finish();
        let all = [digest(&["ab", "c"]), digest(&["a", "bc"]), digest(&["abc"]), digest(&["ab", "c", ""])];
        for (at, one) in all.iter().enumerate() {
            assert!(!all[at + 1..].contains(one));
        }
    }
}
