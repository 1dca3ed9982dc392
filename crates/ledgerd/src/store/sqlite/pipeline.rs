//! Batches on their way to the file, and the thread that writes them while the ledger's own decides the next.
//!
//! What cannot change any more while the rest of a batch is decided, that is new tasks' data, history and results, goes
//! ahead in parts, into the batch's own transaction. Invariants: everything is written in the order in which it was sent;
//! a batch fails as a whole, wherever, and none after it is written until the caller has begun anew; a small batch that
//! nothing is ahead of is written by the caller's thread, for two hand-overs cost more than its rows.

use super::staged::{Part, Sealed};
use super::write::{Done, Writer};
use rusqlite::{Error, Result};
use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

enum Job {
    Part(Arc<Part>),
    Commit(Arc<Sealed>),
    /// What was refused is forgotten.
    Anew(oneshot::Sender<()>),
}

/// See the module.
pub(super) struct Pipeline {
    writer: Arc<Mutex<Writer>>,
    jobs: Sender<Job>,
    done: UnboundedReceiver<Result<Done>>,
    thread: JoinHandle<()>,
    /// Batches that the thread has and has not told of.
    underway: usize,
    /// The thread has parts of the batch that is still decided.
    begun: bool,
    /// What became of batches, not yet asked for.
    told: VecDeque<Result<Done>>,
}

impl Pipeline {
    /// # Errors
    /// When there can be no thread.
    pub(super) fn start(writer: Writer) -> std::io::Result<Self> {
        let writer = Arc::new(Mutex::new(writer));
        let ((jobs, orders), (tell, done)) = (channel(), unbounded_channel());
        let own = Arc::clone(&writer);
        let thread = std::thread::Builder::new()
            .name("ledger-writer".to_owned())
            .spawn(move || write(&own, orders, &tell))?;
        Ok(Self { writer, jobs, done, thread, underway: 0, begun: false, told: VecDeque::new() })
    }

    /// The writer, while nothing is on its way.
    pub(super) fn writer(&self) -> MutexGuard<'_, Writer> {
        lock(&self.writer)
    }

    /// Writes a part of a batch whose rest is still decided.
    pub(super) fn send(&mut self, part: Arc<Part>) {
        self.begun = true;
        // A thread that is gone says so when the batch ends.
        let _ = self.jobs.send(Job::Part(part));
    }

    /// Makes a batch durable, after those before it; [`Pipeline::next`] tells.
    pub(super) fn commit(&mut self, sealed: Arc<Sealed>) {
        if self.told.iter().any(Result::is_err) {
            // Nobody has heard yet, and this one was decided on it.
            self.told.push_back(Err(Error::InvalidQuery));
            return;
        }
        if self.is_idle() && sealed.is_small() {
            let done = self.writer().commit(&sealed);
            self.told.push_back(done);
            return;
        }
        self.begun = false;
        match self.jobs.send(Job::Commit(sealed)) {
            Ok(()) => self.underway += 1,
            Err(_) => self.told.push_back(Err(Error::InvalidQuery)),
        }
    }

    /// What became of the oldest batch that was not told of. May be dropped and called again.
    pub(super) async fn next(&mut self) -> Result<Done> {
        if let Some(done) = self.told.pop_front() {
            return done;
        }
        let done = self.done.recv().await;
        self.underway = self.underway.saturating_sub(1);
        done.unwrap_or(Err(Error::InvalidQuery))
    }

    /// Waits until nothing is on its way.
    pub(super) async fn drain(&mut self) {
        while self.underway > 0 {
            let done = self.done.recv().await;
            self.underway -= 1;
            self.told.push_back(done.unwrap_or(Err(Error::InvalidQuery)));
        }
    }

    /// Forgets what was sent and not committed.
    pub(super) async fn anew(&mut self) {
        let (answer, heard) = oneshot::channel();
        let _ = self.jobs.send(Job::Anew(answer));
        // An error means that there is no thread any more, and nothing to forget.
        let _ = heard.await;
        while self.done.try_recv().is_ok() {}
        self.told.clear();
        (self.underway, self.begun) = (0, false);
        self.writer().roll_back();
    }

    /// Ends the thread, when it has written what it has, and closes the connection.
    ///
    /// # Errors
    /// SQLite's, when the connection cannot be closed.
    pub(super) fn close(self) -> Result<()> {
        let Self { writer, jobs, thread, .. } = self;
        drop(jobs);
        let _ = thread.join();
        match Arc::try_unwrap(writer) {
            Ok(writer) => writer.into_inner().unwrap_or_else(PoisonError::into_inner).close(),
            Err(_) => Ok(()),
        }
    }

    const fn is_idle(&self) -> bool {
        self.underway == 0 && !self.begun
    }
}

/// The thread.
fn write(writer: &Mutex<Writer>, jobs: Receiver<Job>, tell: &UnboundedSender<Result<Done>>) {
    // Bytes of the open batch's parts, or why it cannot be committed.
    let mut open = Ok(0);
    for job in jobs {
        let writer = lock(writer);
        match job {
            Job::Part(part) => {
                open = open.and_then(|bytes| Ok(bytes + writer.write_part(&part)?));
            }
            Job::Commit(sealed) => {
                let done = std::mem::replace(&mut open, Ok(0)).and_then(|bytes| {
                    let done = writer.commit(&sealed)?;
                    Ok(Done { bytes: done.bytes + bytes, ..done })
                });
                if done.is_err() {
                    writer.roll_back();
                    // Those that follow were decided on it.
                    open = Err(Error::InvalidQuery);
                }
                drop((writer, sealed));
                if tell.send(done).is_err() {
                    return;
                }
            }
            Job::Anew(answer) => {
                writer.roll_back();
                open = Ok(0);
                drop(writer);
                let _ = answer.send(());
            }
        }
    }
}

fn lock(writer: &Mutex<Writer>) -> MutexGuard<'_, Writer> {
    writer.lock().unwrap_or_else(PoisonError::into_inner)
}
