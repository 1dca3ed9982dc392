//! A daemon that is killed again and again, and comes back under the same address.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ledgerd_client::CancellationToken;
use tokio::time::{Instant, sleep_until};

use crate::daemon::Daemon;
use crate::failure::{Exit, Failure};
use crate::guard::Guard;

/// Ports that no system hands out to callers by itself. One of those could be taken by a caller while the daemon is
/// down, and a caller could even be connected to itself.
const PORTS: std::ops::Range<u16> = 20_000..30_000;

pub(super) struct Keeper {
    pub(super) daemon: Daemon,
    data_dir: PathBuf,
    guard: Guard,
    /// When it was killed.
    pub(super) kills: Vec<Instant>,
    /// From a kill until the daemon listened again.
    pub(super) slowest: Duration,
}

impl Keeper {
    /// Starts a daemon on a port that is free.
    pub(super) async fn start(data_dir: &Path, guard: &Guard) -> Result<Self, Failure> {
        let first = PORTS.start + (std::process::id() % u32::from(PORTS.end - PORTS.start)) as u16;
        let is_free = |port: &u16| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok();
        let port = (first..PORTS.end).chain(PORTS.start..first).find(is_free);
        let port =
            port.ok_or_else(|| Failure::new(Exit::Failure, "every port of 20000 to 29999 is taken"))?;
        let daemon = Daemon::start_at(&format!("127.0.0.1:{port}"), data_dir, None, guard).await?;
        Ok(Self {
            daemon,
            data_dir: data_dir.into(),
            guard: guard.clone(),
            kills: Vec::new(),
            slowest: Duration::ZERO,
        })
    }

    /// Kills the daemon with SIGKILL and starts it again, each time that `every` has passed, until `stop`.
    pub(super) async fn kill_every(
        &mut self,
        every: Duration,
        stop: &CancellationToken,
    ) -> Result<(), Failure> {
        if every.is_zero() {
            stop.cancelled().await;
            return Ok(());
        }
        let mut next = Instant::now() + every;
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = sleep_until(next) => {}
            }
            let killed = Instant::now();
            if let Some(status) = self.daemon.process.ended() {
                let failure =
                    Failure::new(Exit::Failure, format!("the daemon ended with {status} by itself"));
                return Err(self.daemon.blame(failure));
            }
            self.daemon.process.kill();
            self.kills.push(killed);
            let address = self.daemon.address.clone();
            self.daemon = Daemon::start_at(&address, &self.data_dir, None, &self.guard).await?;
            self.slowest = self.slowest.max(killed.elapsed());
            next = (next + every).max(Instant::now());
        }
    }
}
