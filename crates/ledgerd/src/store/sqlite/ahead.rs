//! Rows of a batch that are written while the rest of it is still being decided.
//!
//! A large batch keeps one thread busy for milliseconds, half of it in SQLite. What cannot change any more, that is new
//! tasks' data, history and results, goes to a thread beside the ledger's, into the batch's own transaction. Invariants:
//! a batch fails as a whole, wherever; nothing of a batch is on its way when its commit begins; small batches never come
//! here, for a hand-over costs more than they do.

use super::write::{Row, Writer};
use bytes::Bytes;
use ledger_core::store::TaskData;
use ledger_core::{Spec, TaskId};
use rusqlite::Result;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// History rows from which on a hand-over is worth it.
pub(super) const WORTH: usize = 256;

/// What is written ahead.
#[derive(Default)]
pub(super) struct Part {
    /// A JSON list of tasks whose keys are free; before the keys of new ones.
    pub(super) freed: Option<String>,
    pub(super) specs: Vec<(TaskId, Arc<Spec>, Arc<TaskData>)>,
    pub(super) history: Arc<Vec<Row>>,
    pub(super) results: Vec<(TaskId, Bytes)>,
}

/// The writer, and the thread that writes ahead with it.
pub(super) struct Ahead {
    writer: Arc<Mutex<Writer>>,
    parts: Sender<Part>,
    written: Receiver<Result<u64>>,
    /// Parts without an answer.
    on_their_way: usize,
}

impl Ahead {
    /// # Errors
    /// When there can be no thread.
    pub(super) fn start(writer: Writer) -> std::io::Result<Self> {
        let writer = Arc::new(Mutex::new(writer));
        let (parts, rest) = channel::<Part>();
        let (answers, written) = channel();
        let beside = Arc::clone(&writer);
        std::thread::Builder::new().name("ledger-ahead".to_owned()).spawn(move || {
            for part in rest {
                if answers.send(lock(&beside).write_part(&part)).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { writer, parts, written, on_their_way: 0 })
    }

    /// The writer, between parts.
    pub(super) fn writer(&self) -> MutexGuard<'_, Writer> {
        lock(&self.writer)
    }

    pub(super) fn send(&mut self, part: Part) {
        self.on_their_way += usize::from(self.parts.send(part).is_ok());
    }

    /// Waits for all that was sent. Bytes that it adds to the log, about.
    ///
    /// # Errors
    /// The first of any part.
    pub(super) fn wait(&mut self) -> Result<u64> {
        let mut all = Ok(0);
        for _ in 0..std::mem::take(&mut self.on_their_way) {
            let one = self.written.recv().unwrap_or(Err(rusqlite::Error::InvalidQuery));
            all = all.and_then(|bytes| Ok(bytes + one?));
        }
        all
    }

    /// Ends the thread.
    ///
    /// # Errors
    /// SQLite's, when the connection cannot be closed.
    pub(super) fn close(self) -> Result<()> {
        let Self { writer, parts, written, .. } = self;
        drop(parts);
        // Ends when the thread has let go of its half.
        while written.recv().is_ok() {}
        match Arc::try_unwrap(writer) {
            Ok(writer) => writer.into_inner().unwrap_or_else(PoisonError::into_inner).close(),
            // The thread is about to drop its handle, and with it the connection.
            Err(_) => Ok(()),
        }
    }
}

fn lock(writer: &Mutex<Writer>) -> MutexGuard<'_, Writer> {
    writer.lock().unwrap_or_else(PoisonError::into_inner)
}
