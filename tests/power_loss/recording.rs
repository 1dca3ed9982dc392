//! What a daemon wrote to its files, in order; and what a disk may have of it after a power cut.

use std::path::Path;

const WRITE: u32 = 1;
const TRUNCATE: u32 = 2;
const SYNC: u32 = 3;
const SYNCED: u32 = 4;
const HEADER: usize = 24;
/// What a disk writes whole or not at all.
const SECTOR: usize = 512;
/// The database, its log, and as many files of payloads as there may be.
pub(super) const NAMES: [&str; 4] =
    ["ledger.db", "ledger.db-wal", "ledger.payloads/00000001", "ledger.payloads/00000002"];

enum Operation {
    Write(usize, Vec<u8>),
    Truncate(usize),
    Sync(u64),
    Synced(u64),
}

struct Entry {
    /// Where it ends in the recording.
    end: u64,
    file: usize,
    operation: Operation,
}

/// All of it.
pub(super) struct Recording(Vec<Entry>);

/// The files after a cut; an empty one may not be there at all.
pub(super) type Image = [Vec<u8>; NAMES.len()];

/// Numbers that look random; the same for the same seed (xorshift).
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n.max(1) as u64) as usize
    }
}

impl Recording {
    pub(super) fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).expect("the recording is there");
        let mut entries = Vec::new();
        let mut at = 0;
        while let Some(header) = bytes.get(at..at + HEADER) {
            let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
            let long = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"));
            let (offset, length) = (long(8), long(16) as usize);
            at += HEADER + length;
            // The daemon was killed while it recorded.
            let Some(data) = bytes.get(at - length..at) else { break };
            let operation = match word(0) {
                WRITE => Operation::Write(offset as usize, data.to_vec()),
                TRUNCATE => Operation::Truncate(offset as usize),
                SYNC => Operation::Sync(offset),
                SYNCED => Operation::Synced(offset),
                other => panic!("the recording has an operation {other}"),
            };
            entries.push(Entry { end: at as u64, file: word(4) as usize - 1, operation });
        }
        Self(entries)
    }

    pub(super) fn end(&self) -> u64 {
        self.0.last().map_or(0, |entry| entry.end)
    }

    /// Writes and syncs of a file.
    pub(super) fn counts(&self, file: usize) -> (usize, usize) {
        let of = |is: fn(&Operation) -> bool| {
            self.0.iter().filter(|entry| entry.file == file && is(&entry.operation)).count()
        };
        (of(|o| matches!(o, Operation::Write(..))), of(|o| matches!(o, Operation::Synced(_))))
    }

    /// Where a file of payloads has most that is not on the disk: just before each of their syncs.
    pub(super) fn before_payloads_are_synced(&self) -> Vec<u64> {
        let entries = self.0.iter().zip(self.0.iter().skip(1));
        let is_sync = |next: &Entry| next.file >= 2 && matches!(next.operation, Operation::Sync(_));
        entries.filter(|(_, next)| is_sync(next)).map(|(before, _)| before.end).collect()
    }

    /// How often the log began anew.
    pub(super) fn log_restarts(&self) -> usize {
        let first = |entry: &&Entry| entry.file == 1 && matches!(entry.operation, Operation::Write(0, _));
        self.0.iter().filter(first).count().saturating_sub(1)
    }

    /// The files as they were written, whatever was synced.
    pub(super) fn all(&self) -> Image {
        let mut image = Image::default();
        for entry in &self.0 {
            apply(&mut image[entry.file], &entry.operation);
        }
        image
    }

    /// What a disk may hold when the power goes at `cut`: all that was synced; of the rest, each write whole, torn or not at
    /// all, in any order.
    pub(super) fn after_power_loss(&self, cut: u64, dice: &mut Dice) -> Image {
        let before = self.0.iter().take_while(|entry| entry.end <= cut).count();
        let mut image = Image::default();
        for (file, content) in image.iter_mut().enumerate() {
            let durable = self.durable(file, before);
            let mut pending = Vec::new();
            // The write that the cut falls into has begun.
            for (index, entry) in self.0.iter().enumerate().take(before + 1).filter(|(_, e)| e.file == file) {
                if index < durable {
                    apply(content, &entry.operation);
                } else {
                    pending.push(&entry.operation);
                }
            }
            while !pending.is_empty() {
                let operation = pending.swap_remove(dice.below(pending.len()));
                match (dice.below(4), operation) {
                    (0, _) => {}
                    (1, Operation::Write(offset, data)) => {
                        let part = SECTOR * dice.below(data.len().div_ceil(SECTOR));
                        write(content, *offset, &data[..part.min(data.len())]);
                    }
                    _ => apply(content, operation),
                }
            }
        }
        image
    }

    /// The first `n` entries of which those of this file are durable: what was recorded before its last sync began that had
    /// ended.
    fn durable(&self, file: usize, before: usize) -> usize {
        let entries = &self.0[..before];
        let synced = |number: u64| {
            entries
                .iter()
                .any(|e| e.file == file && matches!(e.operation, Operation::Synced(n) if n == number))
        };
        // Few syncs are open at one time, so the search ends soon.
        let last = entries.iter().rposition(|entry| {
            entry.file == file && matches!(entry.operation, Operation::Sync(number) if synced(number))
        });
        last.unwrap_or(0)
    }
}

fn apply(content: &mut Vec<u8>, operation: &Operation) {
    match operation {
        Operation::Write(offset, data) => write(content, *offset, data),
        Operation::Truncate(length) => content.resize(*length, 0),
        Operation::Sync(_) | Operation::Synced(_) => {}
    }
}

fn write(content: &mut Vec<u8>, offset: usize, data: &[u8]) {
    if data.is_empty() {
        return;
    }
    if content.len() < offset + data.len() {
        content.resize(offset + data.len(), 0);
    }
    content[offset..offset + data.len()].copy_from_slice(data);
}
