//! The stream to the daemon: opened, watched for silence, and opened again. It knows nothing of tasks.

use std::pin::Pin;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};

use crate::client::Client;
use crate::retry::{self, Backoff};
use crate::{clock, v1};

/// Frames that may wait to be sent. Few: what waits longer in the book goes in larger frames.
const WAITING_FRAMES: usize = 8;
/// How long opening a stream may take, and how long Welcome may take after that.
const PATIENCE: Duration = Duration::from_secs(10);
/// A stream that lived so long was a good one: the next failure is the first again. Shorter than the longest wait, or a
/// daemon that is killed every few seconds would find its workers waiting for most of its life.
const GOOD: Duration = Duration::from_secs(1);
/// Waits between streams: 0.1 s to 5 s, jittered; no longer than from beat to beat once that is known.
const BACKOFF: Backoff = retry::BACKOFF;

type Opening = Pin<Box<dyn Future<Output = Result<Response<Streaming<v1::WorkResponse>>, Status>> + Send>>;

/// What happened on the link.
pub(crate) enum Event {
    /// It is time to open a stream: call [`Link::open`].
    Ready,
    /// A frame came.
    Frame(v1::work_response::Frame),
    /// The stream is gone, or did not open; with its error, if it ended with one. [`Event::Ready`] follows after a wait.
    Closed(Option<Status>),
}

enum State {
    Resting(Instant),
    Opening(Opening, Instant),
    Open(Box<Streaming<v1::WorkResponse>>),
}

pub(crate) struct Link {
    state: State,
    failures: u32,
    backoff: Backoff,
    opened: Instant,
    heard: Instant,
    silence: Duration,
    /// When to leave a stream whose daemon is going away.
    leave_at: Option<Instant>,
}

impl Link {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            state: State::Resting(now),
            failures: 0,
            backoff: BACKOFF,
            opened: now,
            heard: now,
            silence: PATIENCE,
            leave_at: None,
        }
    }

    /// Opens a stream that begins with `hello`. What is put into the sender follows it.
    pub(crate) fn open(
        &mut self,
        client: &Client,
        hello: v1::Hello,
        now: Instant,
    ) -> mpsc::Sender<v1::WorkRequest> {
        let (sender, receiver) = mpsc::channel(WAITING_FRAMES);
        let mut workers = client.workers();
        let first = tokio_stream::once(request(v1::work_request::Frame::Hello(hello)));
        let requests = futures_util::StreamExt::chain(first, ReceiverStream::new(receiver));
        let opening = Box::pin(async move { workers.work(requests).await });
        self.state = State::Opening(opening, now + PATIENCE);
        (self.silence, self.leave_at) = (PATIENCE, None);
        sender
    }

    /// Welcome came: the daemon promises a frame every `idle`, and wants a beat every `beat`. A daemon that comes back gives
    /// each lease its whole length again, so who knocks as often as it would beat loses none.
    pub(crate) fn welcomed(&mut self, idle: Duration, beat: Duration) {
        self.silence = idle * 2 + Duration::from_secs(5);
        self.backoff.longest = BACKOFF.longest.min(beat).max(BACKOFF.first);
    }

    /// The daemon is going away: leaves the stream after `wait` and some more by chance, so that not all workers come
    /// at once.
    pub(crate) fn move_after(&mut self, wait: Duration, now: Instant) {
        let spread = (wait / 2).max(Duration::from_millis(500));
        self.leave_at = Some(now + wait + retry::part(spread, clock::draw()));
    }

    /// The next event. Dropping this future loses nothing.
    pub(crate) async fn next(&mut self) -> Event {
        let outcome = loop {
            break match &mut self.state {
                State::Resting(until) => {
                    sleep_until(*until).await;
                    return Event::Ready;
                }
                State::Opening(opening, give_up) => match timeout_at(*give_up, opening).await {
                    Ok(Ok(response)) => {
                        self.opened = Instant::now();
                        self.heard = self.opened;
                        self.state = State::Open(Box::new(response.into_inner()));
                        continue;
                    }
                    Ok(Err(status)) => Err(Some(status)),
                    Err(_) => Err(Some(Status::deadline_exceeded("the stream did not open in time"))),
                },
                State::Open(stream) => {
                    let silent = self.heard + self.silence;
                    let until = self.leave_at.map_or(silent, |leave| leave.min(silent));
                    match timeout_at(until, stream.message()).await {
                        Ok(Ok(Some(response))) => Ok(response.frame),
                        Ok(Ok(None)) => Err(None),
                        Ok(Err(status)) => Err(Some(status)),
                        Err(_) if self.leave_at.is_some() => Err(None),
                        Err(_) => Err(Some(Status::deadline_exceeded("nothing was heard for too long"))),
                    }
                }
            };
        };
        match outcome {
            Ok(frame) => {
                self.heard = Instant::now();
                // A frame of a later version of the protocol is a sign of life.
                frame.map_or(Event::Frame(v1::work_response::Frame::Idle(v1::Idle {})), Event::Frame)
            }
            Err(status) => {
                self.close();
                Event::Closed(status)
            }
        }
    }

    fn close(&mut self) {
        let now = Instant::now();
        let was_good = matches!(self.state, State::Open(_)) && self.opened.elapsed() >= GOOD;
        self.failures = if was_good { 1 } else { self.failures.saturating_add(1) };
        let rest = now + self.backoff.delay(self.failures, clock::draw());
        self.state = State::Resting(self.leave_at.map_or(rest, |leave| leave.max(rest)));
    }
}

pub(crate) fn request(frame: v1::work_request::Frame) -> v1::WorkRequest {
    v1::WorkRequest { frame: Some(frame) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_was_welcomed_knocks_as_often_as_it_would_beat() {
        let mut link = Link::new(Instant::now());
        let rests = |link: &mut Link| {
            link.failures = 20;
            link.close();
            let State::Resting(until) = link.state else { panic!("it rests") };
            until - Instant::now()
        };
        assert!(rests(&mut link) > Duration::from_secs(2), "half of five seconds at least");
        link.welcomed(Duration::from_secs(1), Duration::from_millis(333));
        assert!(rests(&mut link) <= Duration::from_millis(333));
        link.welcomed(Duration::from_secs(15), Duration::from_secs(20));
        assert!(rests(&mut link) <= Duration::from_secs(5), "never longer than before");
    }
}
