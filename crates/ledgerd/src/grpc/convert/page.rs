//! Pages of lists: how many, and where to go on; and where a watch does.
//!
//! A token is hexadecimal: version, digest of the filter, where to go on, checksum. It is no secret, but one that was
//! made up, garbled, or given for another filter is refused rather than answered with the wrong rows. That of a watch has a digest
//! of the ledger instead, for it goes on with any filter.

use super::check::{At, Check};
use super::digest::Digest;
use crate::ledger::command::LedgerError;
use ledger_core::watch::{Cut, End};
use prost::Message;
use std::fmt::Write as _;

const VERSION: u8 = 1;
/// Version and digest before the cursor, checksum after it.
const HEAD: usize = 9;
const TAIL: usize = 4;
/// Longer than any name, so that nobody makes us read megabytes.
const PAGE_TOKEN: usize = 1_024;
/// A place among rows has ten bytes for each slot, and slots are used again.
const RESUME_TOKEN: usize = 64 << 10;
const SLOT_BYTES: usize = 10;

/// A page that was asked for.
#[derive(Debug)]
pub(in crate::grpc) struct Page {
    /// At most so many.
    pub(in crate::grpc) limit: usize,
    filter: u64,
    cursor: Option<Vec<u8>>,
}

impl Page {
    /// Reads size and token of a request; `filter` is the request without them.
    pub(in crate::grpc) fn read(
        check: &mut Check,
        (size, default): (i32, usize),
        token: &str,
        filter: &impl Message,
        list: &str,
    ) -> Self {
        let limit = match usize::try_from(size) {
            Ok(0) => default,
            Ok(size @ 1..=1_000) => size,
            _ => {
                check.refuse(At::Root, "page_size", "ask for 1 to 1,000, or 0 for the default");
                default
            }
        };
        let filter = Digest::of("filter").part(list.as_bytes()).part(&filter.encode_to_vec()).finish();
        let cursor = match token {
            "" => Some(Vec::new()),
            token => open(token, PAGE_TOKEN).filter(|(of, _)| *of == filter).map(|(_, cursor)| cursor),
        };
        if cursor.is_none() {
            check.refuse(
                At::Root,
                "page_token",
                "send the token of the previous page with the same filter, unchanged",
            );
        }
        Self { limit, filter, cursor: cursor.filter(|cursor| !cursor.is_empty()) }
    }

    /// Go on before this number.
    pub(in crate::grpc) fn before(&self) -> Result<Option<u64>, LedgerError> {
        let Some(cursor) = &self.cursor else { return Ok(None) };
        match <[u8; 8]>::try_from(cursor.as_slice()) {
            Ok(bytes) => Ok(Some(u64::from_be_bytes(bytes))),
            Err(_) => Err(crate::grpc::status::invalid("page_token", "send the token of the previous page")),
        }
    }

    /// The token to go on before this number; empty when there is none.
    pub(in crate::grpc) fn token_before(&self, before: Option<u64>) -> String {
        before.map(|before| self.seal(&before.to_be_bytes())).unwrap_or_default()
    }

    /// Cuts a sorted list that is in memory: what comes after the cursor, and the token of the next page.
    pub(in crate::grpc) fn cut<T>(&self, mut all: Vec<T>, name: impl Fn(&T) -> &str) -> (Vec<T>, String) {
        all.sort_by(|a, b| name(a).cmp(name(b)));
        let start = self
            .cursor
            .as_ref()
            .map_or(0, |cursor| all.partition_point(|item| name(item).as_bytes() <= cursor.as_slice()));
        let more = all.len() > start + self.limit;
        let items: Vec<T> = all.into_iter().skip(start).take(self.limit).collect();
        let token = match items.last() {
            Some(last) if more => self.seal(name(last).as_bytes()),
            _ => String::new(),
        };
        (items, token)
    }

    fn seal(&self, cursor: &[u8]) -> String {
        seal(self.filter, cursor)
    }
}

/// A place in the history of a ledger, as one that watches is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::grpc) struct Place {
    /// Digest of the ledger's seed.
    ledger: u64,
    pub(in crate::grpc) cut: Cut,
}

impl Place {
    /// Where the history ends.
    pub(in crate::grpc) fn at(end: &End) -> Self {
        let ledger = Digest::of("ledger").part(&end.seed.to_be_bytes()).finish();
        Self { ledger, cut: end.cut.clone() }
    }

    /// Reads the token of an earlier watch; none where there is none.
    pub(in crate::grpc) fn read(check: &mut Check, token: &str) -> Option<Self> {
        if token.is_empty() {
            return None;
        }
        let place = open(token, RESUME_TOKEN).and_then(|(ledger, cursor)| {
            let (slots, []) = cursor.as_chunks::<SLOT_BYTES>() else { return None };
            let cut = slots
                .iter()
                .map(|&[a, b, ref seq @ ..]| (u16::from_be_bytes([a, b]), u64::from_be_bytes(*seq)));
            Some(Self { ledger, cut: cut.collect() })
        });
        if place.is_none() {
            check.refuse(At::Root, "resume_token", "send the token of a message of WatchTasks, unchanged");
        }
        place
    }

    /// Whether it lies in the history that has this end, and all that follows it is still there.
    pub(in crate::grpc) fn is_within(&self, end: &End) -> bool {
        self.ledger == Self::at(end).ledger && end.cut.reaches(&self.cut) && self.cut.reaches(&end.removed)
    }

    /// The token to go on behind it.
    pub(in crate::grpc) fn token(&self) -> String {
        let slots = self.cut.slots();
        let mut cursor = Vec::with_capacity(SLOT_BYTES * slots.len());
        for (slot, seq) in slots {
            cursor.extend(slot.to_be_bytes());
            cursor.extend(seq.to_be_bytes());
        }
        seal(self.ledger, &cursor)
    }
}

fn seal(digest: u64, cursor: &[u8]) -> String {
    let mut bytes = vec![VERSION];
    bytes.extend(digest.to_be_bytes());
    bytes.extend(cursor);
    bytes.extend(checksum(&bytes));
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Digest and cursor of a token.
fn open(token: &str, longest: usize) -> Option<(u64, Vec<u8>)> {
    if token.len() > longest || !token.len().is_multiple_of(2) {
        return None;
    }
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let pairs = token.as_bytes().chunks_exact(2);
    let bytes: Vec<u8> =
        pairs.map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect::<Option<_>>()?;
    let (rest, sum) = bytes.split_at_checked(bytes.len().checked_sub(TAIL)?)?;
    let (&[version, ref digest @ ..], cursor) = rest.split_first_chunk::<HEAD>()?;
    let good = !cursor.is_empty() && checksum(rest) == *sum && version == VERSION;
    good.then(|| (u64::from_be_bytes(*digest), cursor.to_vec()))
}

fn checksum(bytes: &[u8]) -> [u8; TAIL] {
    let [a, b, c, d, ..] = Digest::of("page token").part(bytes).finish().to_be_bytes();
    [a, b, c, d]
}

/// A fingerprint of errors alike, as people see it.
pub(super) fn fingerprint_text(fingerprint: u64) -> String {
    format!("{fingerprint:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(token: &str, filter: &str) -> Result<Page, LedgerError> {
        let mut check = Check::default();
        let page = Page::read(&mut check, (0, 50), token, &filter.to_owned(), "tasks");
        check.done(page)
    }

    #[test]
    fn a_token_leads_to_where_the_page_ended() {
        let token = page("", "f").expect("a page").token_before(Some(7));
        assert_eq!(page(&token, "f").expect("a page").before().expect("a number"), Some(7));
        assert_eq!(page("", "f").expect("a page").token_before(None), "");
    }

    #[test]
    fn forged_garbled_and_foreign_tokens_are_refused() {
        let token = page("", "f").expect("a page").token_before(Some(7));
        assert!(page(&token, "g").is_err(), "another filter");
        for at in 0..token.len() {
            let mut bytes = token.clone().into_bytes();
            bytes[at] = if bytes[at] == b'0' { b'1' } else { b'0' };
            let garbled = String::from_utf8(bytes).expect("ASCII");
            assert!(page(&garbled, "f").is_err(), "{garbled}");
        }
        for forged in
            ["0", "zz", "01", "é", "AB", &token[2..], &token[..token.len() - 2], &"00".repeat(5_000)]
        {
            assert!(page(forged, "f").is_err(), "{forged}");
        }
    }

    #[test]
    fn a_place_is_what_its_token_says_and_nothing_else_is_one() {
        let end = |seed, slots: &[(u16, u64)], removed: &[(u16, u64)]| {
            let cut = |slots: &[(u16, u64)]| slots.iter().copied().collect();
            End { seed, cut: cut(slots), removed: cut(removed) }
        };
        let read = |token: &str| {
            let mut check = Check::default();
            let place = Place::read(&mut check, token);
            check.done(place)
        };
        let here = [(0, 3), (9, u64::MAX)];
        let place = Place::at(&end(7, &here, &[]));
        let token = place.token();
        assert_eq!(read(&token).expect("a token"), Some(place.clone()));
        assert_eq!(read("").expect("no token"), None);
        assert!(place.is_within(&end(7, &[(0, 3), (2, 1), (9, u64::MAX)], &here)));
        assert!(!place.is_within(&end(8, &here, &[])), "another ledger");
        assert!(
            !place.is_within(&end(7, &[(0, 2), (9, u64::MAX)], &[])),
            "a ledger that has not come so far"
        );
        assert!(!place.is_within(&end(7, &[(0, 4), (9, u64::MAX)], &[(0, 4)])), "what follows was removed");
        let page = page("", "f").expect("a page").token_before(Some(7));
        for bad in ["00", "x", &token[2..], &token[..token.len() - 2], &token.replace('9', "8"), &page] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_list_in_memory_is_cut_without_gaps() {
        let all = || vec!["c", "a", "b"];
        let first = Page { limit: 2, filter: 1, cursor: None };
        let (items, token) = first.cut(all(), |name| name);
        assert_eq!(items, ["a", "b"]);
        let second = Page { limit: 2, filter: 1, cursor: open(&token, PAGE_TOKEN).map(|(_, cursor)| cursor) };
        assert_eq!(second.cut(all(), |name| name), (vec!["c"], String::new()));
    }
}
