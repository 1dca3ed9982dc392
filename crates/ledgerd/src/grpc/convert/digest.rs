//! Digests that are stored: the same content must have the same digest in every later version.
//!
//! XXH3, 64 bits, of <https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md>, which never changes. It tells a
//! repeated call from another one under the same key; whoever makes two contents collide on purpose deceives but himself.
//! Not a hash of the standard library: those may change between releases and runs.

use twox_hash::XxHash3_64;

/// A digest over parts: of the length and the hash of each, so that no two lists of parts run into one.
#[derive(Clone, Debug)]
pub(super) struct Digest {
    /// Few parts are usual; labels make more.
    parts: Vec<u8>,
}

impl Digest {
    /// Over things of one kind; another kind never has an equal digest but by chance.
    pub(super) fn of(kind: &str) -> Self {
        Self { parts: Vec::with_capacity(8 * 16) }.part(kind.as_bytes())
    }

    /// With one more part.
    pub(super) fn part(mut self, bytes: &[u8]) -> Self {
        self.parts.extend((bytes.len() as u64).to_le_bytes());
        self.parts.extend(XxHash3_64::oneshot(bytes).to_le_bytes());
        self
    }

    /// The number.
    pub(super) fn finish(self) -> u64 {
        XxHash3_64::oneshot(&self.parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_digests_stay_what_they_are() {
        // The specification's own: of nothing, without a seed.
        assert_eq!(XxHash3_64::oneshot(b""), 0x2D06_8005_38D3_94C2);
        assert_eq!(Digest::of("test").part(b"a").part(b"").finish(), 14_848_860_324_954_800_524);
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
