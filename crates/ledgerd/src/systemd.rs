//! What a service manager that asks for it is told: when calls are answered, that the daemon goes away, and that it lives.
//!
//! Whoever starts us says where with `NOTIFY_SOCKET`, as systemd does for units of `Type=notify`. Without it nothing here
//! does anything, and a manager that cannot be reached is no reason to stop serving.

use sd_notify::NotifyState;
use std::time::Duration;

/// Calls are answered.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// No more work is taken; the end may take the time that a drain has.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Settings are being read anew. [`ready`] says that it is done.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "the service manager is not told of the reload"),
    }
}

/// Signs of life for a manager that wants them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Watchdog(Option<Duration>);

impl Watchdog {
    /// As `WATCHDOG_USEC` says, when it is for this process.
    pub(crate) fn start() -> Self {
        Self(sd_notify::watchdog_enabled())
    }

    /// How often one is due: three times in the time after which the manager acts.
    pub(crate) fn interval(self) -> Option<Duration> {
        self.0.map(|limit| (limit / 3).max(Duration::from_millis(1)))
    }

    /// One sign of life.
    pub(crate) fn ping(self) {
        if self.0.is_some() {
            tell(&[NotifyState::Watchdog]);
        }
    }
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "the service manager cannot be told");
    }
}
