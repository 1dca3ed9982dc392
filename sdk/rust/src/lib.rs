//! Client and worker for ledgerd, the durable task ledger.
//!
//! A producer enqueues tasks for an agent and waits for their results; a worker runs them.
//!
//! ```no_run
//! use ledgerd_client::{Client, Context, TaskError, Worker};
//!
//! # async fn produce() -> Result<(), Box<dyn std::error::Error>> {
//! let ledger = Client::connect("127.0.0.1:7420").await?;
//! let task = ledger.enqueue("thumbnailer", "resize", &["cat.png"]).key("cat").await?;
//! let made: Vec<String> = task.result().timeout(std::time::Duration::from_secs(60)).await?;
//! # Ok(()) }
//!
//! async fn resize(files: Vec<String>, context: Context) -> Result<Vec<String>, TaskError> {
//!     context.progress(0.5, "half");
//!     Ok(files)
//! }
//!
//! # async fn work() -> Result<(), Box<dyn std::error::Error>> {
//! let worker = Worker::builder(Client::from_env()?).agents(["thumbnailer"]).task("resize", resize).build()?;
//! worker.run_until_signal().await?;
//! # Ok(()) }
//! ```
//!
//! # Payloads
//!
//! Payloads and results are JSON by default; every call has a form that takes bytes as they are.
//!
//! # Retries
//!
//! Calls that found nobody, or whose fate is unclear, are sent again: four times in all, 0.1 s to 5 s apart, with
//! jitter. That is safe because every write carries a request id, which the daemon remembers for 24 h. What the generated
//! clients in [`v1`] do is up to the caller: no retries, no request ids.
//!
//! # TLS and tokens
//!
//! [`Client::builder`] takes the authority to trust, a certificate of one's own, and a token. A token is shown to nobody, and
//! not sent over a network in the clear.
//!
//! # What this crate is not
//!
//! It decides nothing about tasks: retries of tasks, timeouts and breakers live in the daemon.

mod client;
mod clock;
mod connection;
mod dial;
mod enqueue;
mod error;
mod explain;
mod handle;
pub mod limits;
mod retry;
mod spans;
mod watch;
mod words;
mod worker;

pub mod v1 {
    //! The wire: messages and clients of package `ledger.v1`, as generated from `proto/`.
    #![allow(
        clippy::all,
        clippy::pedantic,
        clippy::nursery,
        clippy::restriction,
        missing_docs,
        unreachable_pub,
        rustdoc::all,
        rust_2018_idioms
    )]
    include!("gen/ledger.v1.rs");
}

pub use client::{ADDRESS_VARIABLE, Client, DEFAULT_ADDRESS};
pub use connection::{Bearer, ClientBuilder, Connection};
pub use enqueue::{Enqueue, NewTask};
pub use error::{Error, Violation};
pub use explain::{Explanation, Gate};
pub use handle::{Cancel, ResultOf, TaskHandle, TaskPages, Update, Wait};
pub use tokio_util::sync::CancellationToken;
pub use watch::Watch;
pub use words::UnknownWord;
pub use worker::{Context, TaskError, Worker, WorkerBuilder};

/// The descriptors of package `ledger.v1` and of what it imports: an encoded `google.protobuf.FileDescriptorSet`,
/// without comments.
pub const DESCRIPTOR: &[u8] = include_bytes!("gen/descriptor.bin");
