//! The last bytes of a stream of any length, in bounded memory.

/// Keeps the last `limit` bytes it was given and counts all of them.
#[derive(Debug)]
pub(crate) struct Tail {
    kept: Vec<u8>,
    limit: usize,
    seen: u64,
}

impl Tail {
    /// An empty tail of at most `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self { kept: Vec::new(), limit, seen: 0 }
    }

    /// Takes the next bytes.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.seen += bytes.len() as u64;
        let bytes = &bytes[bytes.len().saturating_sub(self.limit)..];
        self.kept.extend_from_slice(bytes);
        // Twice the limit before moving: each byte is then moved at most once, and a ring with its two halves is
        // not needed. The price is memory, still bounded.
        if self.kept.len() > 2 * self.limit {
            let surplus = self.kept.len() - self.limit;
            self.kept.drain(..surplus);
        }
    }

    /// The last bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.kept[self.kept.len().saturating_sub(self.limit)..]
    }

    /// How many bytes came in all.
    #[cfg(test)]
    pub(crate) fn seen(&self) -> u64 {
        self.seen
    }

    /// All of it when it fits; else a first line that says how much is missing, and the end. Never over the limit.
    pub(crate) fn into_marked(self) -> Vec<u8> {
        if self.seen <= self.limit as u64 {
            return self.kept;
        }
        let mut keep = self.limit;
        loop {
            let bytes = self.bytes();
            let mut end = &bytes[bytes.len() - keep.min(bytes.len())..];
            // Text is cut between characters: at most three continuation bytes can open the cut.
            let torn = end.iter().take(3).take_while(|byte| **byte & 0xC0 == 0x80).count();
            end = &end[torn..];
            let omitted = self.seen - end.len() as u64;
            let mark = format!("[ledgerd: {omitted} bytes omitted]\n");
            if mark.len() + end.len() <= self.limit || keep == 0 {
                let mut marked = mark.into_bytes();
                marked.extend_from_slice(end);
                marked.truncate(self.limit);
                return marked;
            }
            keep = self.limit.saturating_sub(mark.len());
        }
    }
}

/// The last `limit` bytes of text, cut between characters.
pub(crate) fn text_tail(text: &str, limit: usize) -> &str {
    let mut start = text.len().saturating_sub(limit);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}

/// The first `limit` bytes of text, cut between characters.
pub(crate) fn text_head(text: &str, limit: usize) -> &str {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_output_is_kept_whole() {
        let mut tail = Tail::new(8);
        tail.push(b"abcd");
        tail.push(b"efgh");
        assert_eq!(tail.into_marked(), b"abcdefgh");
    }

    #[test]
    fn memory_stays_bounded_whatever_comes() {
        let mut tail = Tail::new(100);
        for _ in 0..1_000 {
            tail.push(&[b'x'; 77]);
            assert!(tail.kept.len() <= 200 && tail.kept.capacity() <= 512);
        }
        tail.push(&[b'y'; 100_000]);
        assert_eq!(tail.bytes(), [b'y'; 100]);
        assert_eq!(tail.seen(), 177_000);
    }

    #[test]
    fn long_output_is_its_end_under_a_mark_that_counts_the_rest() {
        let mut tail = Tail::new(100);
        for n in 0..1_000 {
            tail.push(format!("{n}\n").as_bytes());
        }
        let seen = tail.seen();
        let marked = String::from_utf8(tail.into_marked()).expect("text");
        assert!(marked.len() <= 100 && marked.len() > 90, "{}", marked.len());
        let (mark, end) = marked.split_once('\n').expect("a first line");
        assert_eq!(mark, format!("[ledgerd: {} bytes omitted]", seen - end.len() as u64));
        assert!(end.ends_with("998\n999\n"));
    }

    #[test]
    fn a_cut_never_tears_a_character() {
        for shift in 0..4 {
            let mut tail = Tail::new(64);
            tail.push(&b"abc"[..shift.min(3)]);
            tail.push("€".repeat(50).as_bytes());
            assert!(String::from_utf8(tail.into_marked()).is_ok());
        }
        assert_eq!(text_tail("a€", 3), "€");
        assert_eq!(text_tail("a€", 2), "");
        assert_eq!(text_head("€a", 2), "");
    }
}
