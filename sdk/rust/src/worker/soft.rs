//! A value that beats carry: only the newest counts, and it is repeated until a beat that carried it was answered.

/// See the module.
pub(crate) struct Soft<T> {
    /// Present until it was confirmed.
    value: Option<T>,
    /// The beat that carried it last.
    sent: Option<u64>,
}

impl<T> Default for Soft<T> {
    fn default() -> Self {
        Self { value: None, sent: None }
    }
}

impl<T: Clone> Soft<T> {
    /// A newer value, if there is one.
    pub(crate) fn set(&mut self, value: Option<T>) {
        if value.is_some() {
            (self.value, self.sent) = (value, None);
        }
    }

    /// Whether beat `sequence` should carry it: it never went, or two beats have gone without an answer.
    pub(crate) fn is_due(&self, sequence: u64) -> bool {
        self.value.is_some() && self.sent.is_none_or(|sent| sent + 2 <= sequence)
    }

    pub(crate) fn size(&self, of: impl Fn(&T) -> usize) -> usize {
        self.value.as_ref().map_or(0, of)
    }

    pub(crate) fn send(&mut self, sequence: u64) -> Option<T> {
        self.sent = Some(sequence);
        self.value.clone()
    }

    /// Beat `sequence` was answered, and with it every earlier one of the same stream.
    pub(crate) fn confirm(&mut self, sequence: u64) {
        if self.sent.is_some_and(|sent| sent <= sequence) {
            (self.value, self.sent) = (None, None);
        }
    }

    /// The stream that carried it is gone.
    pub(crate) fn unsend(&mut self) {
        self.sent = None;
    }

    /// The value, if the ledger may not have it.
    pub(crate) fn take_unsent(&mut self) -> Option<T> {
        self.value.take()
    }
}
