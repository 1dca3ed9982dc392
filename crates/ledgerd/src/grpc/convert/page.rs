//! Pages of lists: how many, and where to go on.
//!
//! A token is hexadecimal: version, digest of the filter, where to go on, checksum. It is no secret, but one that was
//! made up, garbled, or given for another filter is refused rather than answered with the wrong rows.

use super::check::{At, Check};
use super::digest::Digest;
use crate::ledger::command::LedgerError;
use prost::Message;
use std::fmt::Write as _;

const VERSION: u8 = 1;
/// Version and digest before the cursor, checksum after it.
const HEAD: usize = 9;
const TAIL: usize = 4;

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
        let cursor = if token.is_empty() { Some(Vec::new()) } else { open(token, filter) };
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
        let mut bytes = vec![VERSION];
        bytes.extend(self.filter.to_be_bytes());
        bytes.extend(cursor);
        bytes.extend(checksum(&bytes));
        bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    }
}

fn open(token: &str, filter: u64) -> Option<Vec<u8>> {
    // Longer than any name, so that nobody makes us read megabytes.
    if token.len() > 1_024 || !token.len().is_multiple_of(2) {
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
    let good = rest.len() > HEAD
        && checksum(rest) == *sum
        && rest[0] == VERSION
        && rest[1..HEAD] == filter.to_be_bytes();
    good.then(|| rest[HEAD..].to_vec())
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
    fn a_list_in_memory_is_cut_without_gaps() {
        let all = || vec!["c", "a", "b"];
        let first = Page { limit: 2, filter: 1, cursor: None };
        let (items, token) = first.cut(all(), |name| name);
        assert_eq!(items, ["a", "b"]);
        let second = Page { limit: 2, filter: 1, cursor: open(&token, 1) };
        assert_eq!(second.cut(all(), |name| name), (vec!["c"], String::new()));
    }
}
