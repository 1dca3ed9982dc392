//! The ledgerd daemon: a durable task ledger over gRPC.
//!
//! [`run`] is all of it. `grpc` calls `ledger`, which calls `store`; wire types stay in `grpc`, SQL in `store`, wall time
//! in `clock`, and no arrow points back.

pub mod callers;
pub mod clock;
pub mod config;
pub mod ledger;
pub mod store;
pub mod systemd;
pub mod telemetry;
pub mod trust;
pub mod upkeep;

mod grpc;
mod http;
mod lately;
mod process;
#[cfg(test)]
mod reference;
mod room;
mod server;

use clock::Clock;
use config::{Config, StoreAt};
use ledger::command::{AgentRules, LedgerError};
use ledger::observed::Observer;
use ledger_core::store::{Reader, StoreError};
use server::Health;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use store::postgres::ConnectError;
use store::{DynStore, OpenError, Wake};
use telemetry::Telemetry;
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};
use tokio::task::JoinError;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use trust::{Keeper, TrustError};

/// Streams end by themselves when the grace is over; this is for their last frames to leave.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// After how long the ledger is told again what it could not take.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// How old gauges may be that are pushed.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Why the daemon could not start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    /// Certificates or callers cannot be used.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// A port cannot be had.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The data directory cannot be made.
    #[error("cannot make {}: {source}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The ledger in it cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The database cannot be used.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The store failed while it was read at the start.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The ledger had to end.
    #[error(transparent)]
    Ledger(#[from] ledger::Fatal),
    /// The server could not be set up.
    #[error("cannot serve: {0}")]
    Serve(#[from] tonic::transport::Error),
}

impl Fatal {
    /// The exit code: 65 corrupt store, 74 store I/O, 78 configuration, 1 other.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Store(StoreError::Corrupt(_))
            | Self::Open(OpenError::Corrupt { .. })
            | Self::Ledger(ledger::Fatal::Store(StoreError::Corrupt(_))) => 65,
            Self::Trust(_) | Self::Open(OpenError::Newer { .. } | OpenError::Parted(_)) => 78,
            Self::Connect(error) if error.is_configuration() => 78,
            Self::Store(_) | Self::Open(_) | Self::Connect(_) | Self::Ledger(_) | Self::Directory { .. } => {
                74
            }
            Self::Listen { .. } | Self::Serve(_) => 1,
        }
    }
}

/// Where a daemon listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listening {
    /// gRPC.
    pub grpc: SocketAddr,
    /// Probes of HTTP, when they are on.
    pub http: Option<SocketAddr>,
}

/// What may change while the daemon runs.
#[derive(Debug)]
pub struct Live {
    /// Asks for certificates and callers to be read again, which happens by itself when they change.
    pub reload: Notify,
    /// What holds for agents.
    agents: watch::Sender<Arc<AgentRules>>,
}

impl Live {
    /// As it is at the start.
    #[must_use]
    pub fn new(config: &Config) -> Arc<Self> {
        let agents = watch::Sender::new(Arc::new(config.agents.clone()));
        Arc::new(Self { reload: Notify::new(), agents })
    }

    /// Takes over what may change of a newer configuration.
    pub fn update(&self, config: &Config) {
        self.agents.send_replace(Arc::new(config.agents.clone()));
    }
}

/// Serves until `shutdown` is over, then drains. `announce` is called once calls are answered.
///
/// # Errors
/// Why it could not start, or had to end without a drain.
pub async fn run(
    config: Config,
    telemetry: Arc<Telemetry>,
    live: Arc<Live>,
    shutdown: impl Future<Output = ()>,
    announce: impl FnOnce(Listening),
) -> Result<(), Fatal> {
    tracing::info!(?config, version = env!("CARGO_PKG_VERSION"), "starting");
    // Whom to trust before anybody can connect.
    let keeper = Keeper::start(&config)?;
    let trusted = keeper.trusted();
    if config.is_open {
        tracing::warn!(
            listen = %config.listen,
            "everybody who reaches this address over the network can do anything with this ledger, or overhear those who \
             do: this was accepted with --i-accept-unauthenticated-network-access"
        );
    }
    // Ports first: one that is taken is told at once, and who connects early waits in its queue.
    let (listener, grpc) = listen(config.listen).await?;
    let (http_listener, http) = match config.http_listen {
        Some(address) => listen(address).await.map(|(listener, address)| (Some(listener), Some(address)))?,
        None => (None, None),
    };
    let (store, reader, wake) = open(&config.store, grpc).await?;
    let stop_ledger = CancellationToken::new();
    let shared = Arc::clone(&reader);
    let observer = telemetry.measures().then(|| Observer::new(telemetry.is_traced()));
    let seen = observer.as_ref().map(|(observer, _)| observer.clone());
    let mut rules = live.agents.subscribe();
    let first = Arc::clone(&rules.borrow_and_update());
    let (handle, mut ledger) =
        ledger::start(store, shared, Clock::start(), wake, seen, first, stop_ledger.clone()).await?;

    let health = Health::started().await;
    let stop = CancellationToken::new();
    // Aborted when this function ends, however it does.
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(health.clone().watch(handle.clone()));
    tasks.spawn(health.clone().live(handle.clone()));
    tasks.spawn(handle.clone().keep(config.retention));
    tasks.spawn(keeper.keep(live));
    tasks.spawn(follow_rules(rules, handle.clone()));
    let observed = CancellationToken::new();
    let observing = observer.map(|(observer, told)| {
        let (telemetry, handle) = (Arc::clone(&telemetry), handle.clone());
        let backend = config.store.backend();
        tokio::spawn(telemetry::observe(telemetry, observer, told, handle, backend, observed.clone()))
    });
    if telemetry.pushes() {
        tasks.spawn(look_for_gauges(Arc::clone(&telemetry), handle.clone()));
    }
    // Probes are answered to the end, and hear of the drain.
    let stop_probes = CancellationToken::new();
    let metrics = telemetry.measures().then(|| (Arc::clone(&telemetry), handle.clone()));
    let about = http::About { health: health.clone(), metrics };
    let probes =
        http_listener.map(|listener| tokio::spawn(http::serve(listener, about, stop_probes.clone())));
    let mut serving = {
        let (handle, health, stop) = (handle.clone(), health.clone(), stop.clone());
        let telemetry = Arc::clone(&telemetry);
        tokio::spawn(
            async move { server::serve(listener, &handle, &health, &telemetry, trusted, stop).await },
        )
    };
    announce(Listening { grpc, http });
    systemd::ready();

    tokio::select! {
        () = shutdown => {}
        // It may take long, so nobody waits for it; a ledger that cannot be right is not served on.
        error = find_corruption(&*reader) => return Err(error),
        ended = &mut ledger => return ended_ledger(ended),
        served = &mut serving => return ended_serving(served),
    }
    tracing::info!(grace = ?config.drain_grace, "draining");
    systemd::stopping();
    health.drain().await;
    let drained = timeout(config.drain_grace, handle.drain(config.drain_grace)).await;
    if !matches!(drained, Ok(Ok(()))) {
        tracing::warn!("workers could not be told of the drain");
    }
    stop.cancel();
    tokio::select! {
        served = timeout(config.drain_grace + LAST_WORDS, &mut serving) => match served {
            Ok(served) => ended_serving(served)?,
            Err(_) => tracing::warn!("some streams did not end in time and are cut"),
        },
        ended = &mut ledger => return ended_ledger(ended),
    }
    stop_ledger.cancel();
    ended_ledger(ledger.await)?;
    observed.cancel();
    if let Some(observing) = observing {
        let _ = timeout(LAST_WORDS, observing).await;
    }
    stop_probes.cancel();
    if let Some(probes) = probes {
        let _ = timeout(LAST_WORDS, probes).await;
    }
    // A look through a large store may still go on, and is not worth waiting for.
    let _ = timeout(LAST_WORDS, reader.close()).await;
    tracing::info!("drained");
    Ok(())
}

/// Tells the ledger what configuration says of agents, whenever that changes.
async fn follow_rules(mut rules: watch::Receiver<Arc<AgentRules>>, handle: ledger::Handle) {
    while rules.changed().await.is_ok() {
        loop {
            let now = Arc::clone(&rules.borrow_and_update());
            match handle.rule(now).await {
                Ok(()) | Err(LedgerError::Draining) => break,
                Err(error) => {
                    tracing::warn!(%error, "what holds for agents could not be changed; it is tried again");
                }
            }
            tokio::time::sleep(TRY_AGAIN).await;
        }
    }
}

/// Looks at the ledger now and then, for gauges that nobody asks for.
async fn look_for_gauges(telemetry: Arc<Telemetry>, handle: ledger::Handle) {
    let mut tick = tokio::time::interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        telemetry.meters.look_at(&handle).await;
    }
}

/// Opens the ledger where it is.
async fn open(at: &StoreAt, address: SocketAddr) -> Result<(DynStore, Arc<dyn Reader>, Arc<Wake>), Fatal> {
    match at {
        StoreAt::Sqlite(dir) => {
            make_directory(dir).map_err(|source| Fatal::Directory { path: dir.clone(), source })?;
            let (store, reader) = store::open(dir, store::Options::default()).await?;
            Ok((Box::new(store), reader, Arc::default()))
        }
        StoreAt::Postgres(url) => {
            let (store, reader) = store::postgres::open(url.reveal(), &process::name(address)).await?;
            let wake = store.wake();
            Ok((Box::new(store), reader, wake))
        }
    }
}

/// Looks through the whole store once; never returns when it is sound.
async fn find_corruption(reader: &dyn Reader) -> Fatal {
    match reader.check().await {
        Err(error @ StoreError::Corrupt(_)) => return error.into(),
        Err(error) => tracing::warn!(%error, "the store could not be looked through"),
        Ok(()) => tracing::debug!("the store is sound"),
    }
    std::future::pending().await
}

async fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), Fatal> {
    let named = |source| Fatal::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(named)?;
    let bound = listener.local_addr().map_err(named)?;
    Ok((listener, bound))
}

/// For the owner and the group only: the files in it hold what users sent.
fn make_directory(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o750).create(path)
}

fn ended_ledger(ended: Result<Result<(), ledger::Fatal>, JoinError>) -> Result<(), Fatal> {
    match ended {
        Ok(ended) => ended.map_err(Fatal::from),
        // What was in memory cannot be trusted any more, and what is on disk can: so no orderly end.
        Err(error) => {
            tracing::error!(%error, "the ledger panicked");
            std::process::abort()
        }
    }
}

fn ended_serving(served: Result<Result<(), tonic::transport::Error>, JoinError>) -> Result<(), Fatal> {
    match served {
        Ok(served) => served.map_err(Fatal::from),
        Err(error) => {
            tracing::error!(%error, "serving panicked");
            std::process::abort()
        }
    }
}
