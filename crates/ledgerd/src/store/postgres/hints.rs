//! Hints between daemons, by LISTEN and NOTIFY. None of them is needed: polling finds the same, later.

use super::open::hint_options;
use crate::store::wake::Wake;
use sqlx::ConnectOptions;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgListener, PgPoolOptions};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

const CHANNEL: &str = "ledgerd";
pub(super) const SEND: &str = "SELECT pg_notify('ledgerd', $1)";
/// From one hint about work to the next: what comes meanwhile goes with the next.
const APART: Duration = Duration::from_millis(4);
/// How long the first connection is waited for.
const PATIENCE: Duration = Duration::from_secs(2);
/// After a connection was lost.
const PAUSE: Duration = Duration::from_millis(500);

/// What a batch did that concerns others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Hint {
    /// It changed agents or breakers, wrote mail, or a daemon came or went.
    pub(super) news: bool,
    /// It left tasks that wait.
    pub(super) work: bool,
    /// It ended tasks.
    pub(super) ends: bool,
}

impl Hint {
    pub(super) const NEWS: Self = Self { news: true, work: false, ends: false };

    const fn is_none(self) -> bool {
        !(self.news || self.work || self.ends)
    }

    const fn and(self, other: Self) -> Self {
        Self { news: self.news || other.news, work: self.work || other.work, ends: self.ends || other.ends }
    }

    fn text(self, slot: u16) -> String {
        let letters = [(self.news, 'n'), (self.work, 'w'), (self.ends, 'e')];
        let said: String = letters.iter().filter(|(said, _)| *said).map(|(_, letter)| *letter).collect();
        format!("{slot} {said}")
    }
}

/// Sends and hears them, on two connections and tasks of its own.
#[derive(Debug)]
pub(super) struct Hints {
    send: mpsc::UnboundedSender<(u16, Hint)>,
    /// Our slot: what we said ourselves is no news.
    own: Arc<AtomicU16>,
    listens: JoinHandle<()>,
}

impl Hints {
    /// Returns when it listens, or soon if that is not to be had: then it goes on trying.
    pub(super) async fn start(options: &PgConnectOptions, wake: Arc<Wake>) -> Self {
        let options = hint_options(options);
        let (send, hints) = mpsc::unbounded_channel();
        tokio::spawn(speak(options.clone(), hints));
        let own = Arc::new(AtomicU16::new(0));
        let (ready, listening) = oneshot::channel();
        let listens = tokio::spawn(listen(options, wake, Arc::clone(&own), ready));
        let _ = tokio::time::timeout(PATIENCE, listening).await;
        Self { send, listens, own }
    }

    /// Tells the others, soon.
    pub(super) fn tell(&self, slot: u16, hint: Hint) {
        self.own.store(slot, Ordering::Relaxed);
        if !hint.is_none() {
            // Whoever sends them goes with the store alone.
            let _ = self.send.send((slot, hint));
        }
    }
}

impl Drop for Hints {
    fn drop(&mut self) {
        // It reads for ever, and nothing depends on what it has read.
        self.listens.abort();
    }
}

/// Ends when the store does, after the last hint.
async fn speak(options: PgConnectOptions, mut hints: mpsc::UnboundedReceiver<(u16, Hint)>) {
    let mut conn: Option<PgConnection> = None;
    while let Some((slot, mut hint)) = hints.recv().await {
        while let Ok((_, more)) = hints.try_recv() {
            hint = hint.and(more);
        }
        if conn.is_none() {
            conn = options.connect().await.ok();
        }
        if let Some(open) = &mut conn
            && let Err(error) = sqlx::query(SEND).bind(hint.text(slot)).execute(open).await
        {
            tracing::debug!(%error, "a hint to other daemons was lost");
            conn = None;
        }
        tokio::time::sleep(APART).await;
    }
}

async fn listen(options: PgConnectOptions, wake: Arc<Wake>, own: Arc<AtomicU16>, ready: oneshot::Sender<()>) {
    let mut ready = Some(ready);
    loop {
        if let Err(error) = hear(&options, &wake, &own, &mut ready).await {
            tracing::debug!(%error, "other daemons are not heard; polling goes on");
        }
        tokio::time::sleep(PAUSE).await;
        // What was said meanwhile was missed.
        wake.news();
        wake.work();
    }
}

async fn hear(
    options: &PgConnectOptions,
    wake: &Wake,
    own: &AtomicU16,
    ready: &mut Option<oneshot::Sender<()>>,
) -> Result<(), sqlx::Error> {
    let pool = PgPoolOptions::new().max_connections(1).connect_with(options.clone()).await?;
    let mut listener = PgListener::connect_with(&pool).await?;
    listener.listen(CHANNEL).await?;
    if let Some(ready) = ready.take() {
        let _ = ready.send(());
    }
    // None: the connection was lost, and with it what was said then.
    while let Some(heard) = listener.try_recv().await? {
        let (slot, said) = heard.payload().split_once(' ').unwrap_or_default();
        let ours = slot.parse() == Ok(own.load(Ordering::Relaxed));
        for letter in said.chars().filter(|_| !ours) {
            match letter {
                'n' => wake.news(),
                'w' => wake.work(),
                'e' => wake.ends(),
                // Of a later release.
                _ => {}
            }
        }
    }
    Ok(())
}
