//! Shared by the tests: short durations, built policies, a block-on small enough to read.

use retry_core::{Config, Jitter, Policy, draw};
use std::time::Duration;

pub(crate) const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

pub(crate) const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

pub(crate) fn policy(jitter: Jitter) -> Policy {
    Config { jitter, ..Config::default() }.build().expect("the defaults are in range")
}

pub(crate) const MODES: [Jitter; 5] =
    [Jitter::None, Jitter::Proportional(0.5), Jitter::Full, Jitter::Equal, Jitter::Decorrelated];

/// `n` delays of one retry, from draws that anybody can repeat.
pub(crate) fn sample(policy: &Policy, retries_made: u32, previous: Duration, n: u64) -> Vec<Duration> {
    (0..n).map(|task| policy.delay(retries_made, draw(0x1ED6E2, task, 1), previous)).collect()
}

#[cfg(feature = "async")]
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    use std::sync::Arc;
    use std::task::{Context, Poll, Wake, Waker};
    use std::thread::Thread;

    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            // A wake-up that never comes fails the test instead of hanging it, a little late.
            Poll::Pending => std::thread::park_timeout(secs(20)),
        }
    }
}
