//! Checking what came: every violation is found at once, each with the path of its field.
//!
//! A path is spelled only when its field breaks a rule: the usual call pays nothing for it. Values are never repeated in
//! an answer; they may be large, or somebody's.

use crate::ledger::command::LedgerError;
use ledger_core::{TaskId, Timestamp, Violation};
use std::fmt::Write as _;
use std::ops::RangeInclusive;
use std::time::Duration;

/// Where something stands in a request.
#[derive(Clone, Copy, Debug)]
pub(in crate::grpc) enum At {
    /// The request itself.
    Root,
    /// A message in it.
    In(&'static str),
    /// One of a list.
    Item(&'static str, usize),
}

impl At {
    /// The path of a field there; an empty one is the place itself.
    pub(in crate::grpc) fn path(self, field: &str) -> String {
        let mut path = match self {
            Self::Root => return field.to_owned(),
            Self::In(name) => name.to_owned(),
            Self::Item(name, index) => format!("{name}[{index}]"),
        };
        if !field.is_empty() {
            let _ = write!(path, ".{field}");
        }
        path
    }
}

/// What was found so far.
#[derive(Debug, Default)]
pub(in crate::grpc) struct Check {
    found: Vec<Violation>,
}

impl Check {
    /// Everything was looked at: the value, when nothing was found.
    pub(in crate::grpc) fn done<T>(self, value: T) -> Result<T, LedgerError> {
        if self.found.is_empty() { Ok(value) } else { Err(LedgerError::Invalid(self.found)) }
    }

    /// What was found, to be added to.
    pub(in crate::grpc) const fn found(&mut self) -> &mut Vec<Violation> {
        &mut self.found
    }

    /// Notes a violation.
    pub(in crate::grpc) fn refuse(&mut self, at: At, field: &str, rule: impl Into<String>) {
        self.found.push(Violation::new(at.path(field), rule));
    }

    /// Notes a violation unless `good`.
    pub(in crate::grpc) fn must(&mut self, good: bool, at: At, field: &str, rule: &str) {
        if !good {
            self.refuse(at, field, rule);
        }
    }

    /// A name or key: so many bytes, nothing that a terminal or a reader could be fooled by.
    pub(in crate::grpc) fn plain(&mut self, at: At, field: &str, text: &str, bytes: RangeInclusive<usize>) {
        if !bytes.contains(&text.len()) {
            self.refuse(at, field, size_rule(&bytes));
        } else if !is_plain(text) {
            self.refuse(
                at,
                field,
                "leave out control characters and characters that turn the direction of text",
            );
        }
    }

    /// Free text: only its size counts. NUL, which not every store can hold, is replaced, since the end of a log may
    /// well contain one and a worker must be able to report it.
    pub(in crate::grpc) fn free(&mut self, at: At, field: &str, text: String, most: usize) -> String {
        self.must_fit(at, field, text.len(), most);
        if text.contains('\0') { text.replace('\0', "\u{fffd}") } else { text }
    }

    /// Bytes, at most so many.
    pub(in crate::grpc) fn must_fit(&mut self, at: At, field: &str, len: usize, most: usize) {
        if len > most {
            self.refuse(at, field, size_rule(&(0..=most)));
        }
    }

    /// An agent's name.
    pub(in crate::grpc) fn agent(&mut self, at: At, field: &str, name: &str) {
        let good = ledger_core::agent::is_agent_name(name);
        self.must(
            good,
            at,
            field,
            "name an agent: 1 to 63 of a-z, 0-9, `.`, `_`, `-`, the first a letter or digit",
        );
    }

    /// A task's id. What stands in for a malformed one is never used.
    pub(in crate::grpc) fn task(&mut self, at: At, field: &str, text: &str) -> TaskId {
        text.parse().unwrap_or_else(|_| {
            self.refuse(
                at,
                field,
                "write a task id as EnqueueTask returned it, `t` and up to 12 digits or letters",
            );
            TaskId(0)
        })
    }

    /// A span of time, not negative.
    pub(in crate::grpc) fn span(
        &mut self,
        at: At,
        field: &str,
        span: Option<prost_types::Duration>,
    ) -> Option<Duration> {
        /// What protobuf allows: 10,000 years.
        const LONGEST: i64 = 315_576_000_000;
        let span = span?;
        match (u64::try_from(span.seconds), u32::try_from(span.nanos)) {
            (Ok(seconds), Ok(nanos)) if span.seconds <= LONGEST && nanos < 1_000_000_000 => {
                Some(Duration::new(seconds, nanos))
            }
            _ => {
                self.refuse(at, field, "send 0 s or more, with 0 to 999,999,999 nanos");
                None
            }
        }
    }

    /// An instant, rounded up to the next millisecond: nothing starts or ends too early.
    pub(in crate::grpc) fn time(
        &mut self,
        at: At,
        field: &str,
        time: Option<prost_types::Timestamp>,
    ) -> Option<Timestamp> {
        // What protobuf allows: the years 1 to 9999.
        const YEARS: RangeInclusive<i64> = -62_135_596_800..=253_402_300_799;
        let time = time?;
        if !YEARS.contains(&time.seconds) || !(0..1_000_000_000).contains(&time.nanos) {
            self.refuse(at, field, "send a time from year 1 to 9999, with 0 to 999,999,999 nanos");
            return None;
        }
        let nanos = u64::try_from(time.nanos).unwrap_or_default();
        Some(Timestamp::from_millis(time.seconds * 1_000).after(Duration::from_nanos(nanos)))
    }

    /// A number of an enum; none when it is the unspecified one.
    pub(in crate::grpc) fn word<T: TryFrom<i32> + Default + PartialEq>(
        &mut self,
        at: At,
        field: &str,
        number: i32,
    ) -> Option<T> {
        match T::try_from(number) {
            Ok(word) => (word != T::default()).then_some(word),
            Err(_) => {
                self.refuse(at, field, "send a number that the enum has");
                None
            }
        }
    }

    /// Labels, in the order of their keys.
    pub(in crate::grpc) fn labels(
        &mut self,
        at: At,
        labels: impl ExactSizeIterator<Item = (String, String)>,
    ) -> Vec<(String, String)> {
        use ledger_core::limits::{LABEL_KEY_BYTES, LABEL_VALUE_BYTES, LABELS};
        if labels.len() > LABELS {
            self.refuse(at, "labels", "give at most 64 labels");
            return Vec::new();
        }
        let labels: Vec<_> = labels.collect();
        for (key, value) in &labels {
            // One violation for all of them: a bad key must not be repeated, so they could not be told apart.
            if !(1..=LABEL_KEY_BYTES).contains(&key.len()) || value.len() > LABEL_VALUE_BYTES {
                self.refuse(at, "labels", "keys have 1 to 63 bytes, values at most 255");
                break;
            }
            if !is_plain(key) || !is_plain(value) {
                self.refuse(
                    at,
                    "labels",
                    "leave out control characters and characters that turn the direction of text",
                );
                break;
            }
        }
        labels
    }
}

fn size_rule(bytes: &RangeInclusive<usize>) -> String {
    match (*bytes.start(), *bytes.end()) {
        (0, most) => format!("send at most {most} bytes"),
        (least, most) => format!("send {least} to {most} bytes"),
    }
}

/// Nothing that ends a line, moves a cursor or turns the direction of text.
fn is_plain(text: &str) -> bool {
    let tricks = |c: char| {
        c.is_control()
            || matches!(c,
                '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{2028}' | '\u{2029}'
                | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    // Most text is ASCII, and that is quick to tell.
    text.bytes().all(|byte| (0x20..0x7f).contains(&byte)) || !text.chars().any(tricks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_that_fools_readers_is_not_plain() {
        for text in ["a\0b", "a\nb", "a\u{202e}b", "a\u{2066}b", "\u{1b}[31m", "\u{7f}", "\u{85}"] {
            assert!(!is_plain(text), "{text:?}");
        }
        for text in ["", "a b", "it's; DROP TABLE tasks --", "héllo", "任务", "🦀"] {
            assert!(is_plain(text), "{text:?}");
        }
    }

    #[test]
    fn spans_and_times_outside_of_protobufs_range_are_refused() {
        use prost_types::{Duration as Span, Timestamp as Time};
        let spans =
            [(-1, 0), (0, -1), (0, 1_000_000_000), (1, 2_000_000_000), (315_576_000_001, 0), (i64::MIN, 0)];
        for (seconds, nanos) in spans {
            let mut check = Check::default();
            assert_eq!(check.span(At::Root, "f", Some(Span { seconds, nanos })), None);
            assert!(check.done(()).is_err(), "{seconds} s {nanos} ns");
        }
        // The last second of year 9999 is good, year 10000 is not.
        let times = [(253_402_300_800, 0), (0, -1), (0, 1_000_000_000), (-62_135_596_801, 0), (i64::MAX, 0)];
        for (seconds, nanos) in times {
            let mut check = Check::default();
            assert_eq!(check.time(At::Root, "f", Some(Time { seconds, nanos })), None);
            assert!(check.done(()).is_err(), "{seconds} s {nanos} ns");
        }
        let mut check = Check::default();
        let time = check.time(At::Root, "f", Some(Time { seconds: 253_402_300_799, nanos: 1 }));
        assert_eq!(time, Some(Timestamp::from_millis(253_402_300_799_001)), "rounded up, never too early");
        assert!(check.done(()).is_ok());
    }
}
