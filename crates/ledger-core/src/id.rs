//! Numbers that name things, and the short text form of a task's number.

use std::fmt;
use std::str::FromStr;

/// The number of a task, handed out in sequence.
///
/// People see `t` and the number in Crockford's base 32, lower case: `t1k3`. Reversible, so no second column and no
/// second index is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TaskId(pub u64);

/// The number of an agent, stable for the life of the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AgentId(pub u32);

/// The number of an open stream, unique for the life of the ledger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

impl SessionId {
    /// Bits that number the streams of one daemon; the slot of the daemon that opened it stands above them.
    const SLOT_AT: u32 = 48;

    /// The number before the first of a daemon's streams.
    #[must_use]
    pub const fn before_first(slot: u16) -> Self {
        Self((slot as u64) << Self::SLOT_AT)
    }

    /// The slot of the daemon that opened it; 0 on SQLite.
    #[must_use]
    pub const fn slot(self) -> u16 {
        (self.0 >> Self::SLOT_AT) as u16
    }
}

const DIGITS: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = [0u8; 14];
        let mut at = text.len();
        let mut rest = self.0;
        loop {
            at -= 1;
            text[at] = DIGITS[(rest % 32) as usize];
            rest /= 32;
            if rest == 0 {
                break;
            }
        }
        at -= 1;
        text[at] = b't';
        f.pad(std::str::from_utf8(&text[at..]).unwrap_or_default())
    }
}

/// A text that is no task id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a task id is `t` and up to 12 digits or letters, as EnqueueTask returned it")]
pub struct MalformedId;

impl FromStr for TaskId {
    type Err = MalformedId;

    fn from_str(text: &str) -> Result<Self, MalformedId> {
        let digits = text.strip_prefix('t').ok_or(MalformedId)?.as_bytes();
        // One spelling for one number: no leading zero, no capitals.
        if digits.is_empty() || digits.len() > 12 || digits[0] == b'0' {
            return Err(MalformedId);
        }
        digits
            .iter()
            .try_fold(0u64, |number, digit| {
                let value = DIGITS.iter().position(|known| known == digit).ok_or(MalformedId)?;
                Ok(number * 32 + value as u64)
            })
            .map(Self)
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_form_of_a_task_id_reads_back() {
        for number in [1, 31, 32, 1_023, 1_024, 123_456_789, i64::MAX as u64 >> 4] {
            let id = TaskId(number);
            assert_eq!(id.to_string().parse(), Ok(id), "{id}");
        }
        assert_eq!(TaskId(33).to_string(), "t11");
    }

    #[test]
    fn a_text_that_is_no_task_id_is_refused() {
        for text in ["", "t", "1", "t0", "t01", "tU", "t1l", "x12", "t 1", "t1234567890123"] {
            assert_eq!(text.parse::<TaskId>(), Err(MalformedId), "{text:?}");
        }
    }
}
