//! The `ledgerd` command: the daemon, and its own client.

#[cfg(test)]
mod command_line;
mod loop_bench;
mod probe;
#[cfg(test)]
mod reference;
mod store_commands;
mod token;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use ledgerd::config::{Flags, Loaded};
use ledgerd::telemetry::{Telemetry, WorkerSpans};
use ledgerd::{Listening, Live, systemd};
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Batches allocate on one thread and free on another, which the C library's allocator is slow at.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A durable task ledger that streams assignments to fleets of agent workers
#[derive(Debug, Parser)]
#[command(name = "ledgerd", version, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    global: ledger_cli::Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon
    Serve(Flags),
    /// Run a daemon to try things with, in a directory that goes away unless one is named
    Dev(Flags),
    /// Show what `serve` would go by, and where each value comes from
    CheckConfig(Flags),
    /// See how the schema of a ledger stands, and bring it up to date
    #[command(subcommand)]
    Migrate(store_commands::Migrate),
    /// Write a whole ledger to a file, to move it to another store
    ///
    /// Reads the ledger as it is at one moment, beside a daemon if one runs. What that daemon does afterwards is not in the
    /// file: to move a ledger, stop it first.
    Export(store_commands::Export),
    /// Make a ledger of a file that `export` wrote, in a store that has none
    ///
    /// What was written is read back and compared with the file. When anything is wrong, nothing is kept.
    Import(store_commands::Import),
    /// Copy the ledger to a file, a daemon may serve it, and look through the copy
    ///
    /// For a ledger on SQLite; one in PostgreSQL is backed up by PostgreSQL.
    Backup(store_commands::BackUp),
    /// Make a ledger of a backup where there is none
    ///
    /// What may have been given out after the backup is void: a worker that holds a lease of then is told that it is lost.
    Restore(store_commands::Restore),
    /// Ask a daemon whether it takes work: exit 0 when it does, 1 when not
    Healthcheck(probe::Healthcheck),
    /// Make tokens for callers
    #[command(subcommand)]
    Token(token::Token),
    /// Print the completion script of a shell
    Completion {
        /// Which
        shell: Shell,
    },
    /// The ledger's loop alone, for `bench suite`
    #[command(hide = true)]
    BenchLoop(loop_bench::Args),
    #[command(flatten)]
    Client(ledger_cli::Command),
}

/// Bad configuration, as sysexits has it.
const CONFIG: u8 = 78;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error, 1),
    };
    let code = runtime.block_on(run(cli));
    // Whoever ends in good order has waited for all. A daemon that must not go on has a ledger on a thread of its own, which would be
    // waited for without end.
    runtime.shutdown_background();
    code
}

async fn run(Cli { global, command }: Cli) -> ExitCode {
    match command {
        Command::Serve(flags) => serve(&flags, |_| {}).await,
        Command::Dev(flags) => dev(flags).await,
        Command::CheckConfig(flags) => check_config(&flags),
        Command::Migrate(command) => command.run(global.output).await,
        Command::Export(command) => command.run(global.output).await,
        Command::Import(command) => command.run(global.output).await,
        Command::Backup(command) => command.run(global.output).await,
        Command::Restore(command) => command.run(global.output).await,
        Command::Healthcheck(probe) => probe.run(&global).await,
        Command::Token(command) => command.run(),
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "ledgerd", &mut std::io::stdout());
            ExitCode::SUCCESS
        }
        Command::BenchLoop(args) => match args.run().await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(&error, 1),
        },
        Command::Client(command) => client(command, &global).await,
    }
}

async fn client(command: ledger_cli::Command, global: &ledger_cli::Global) -> ExitCode {
    let spans = match command.is_worker().then(WorkerSpans::start).transpose() {
        Ok(spans) => spans.flatten(),
        Err(error) => return failed(&error, 1),
    };
    let code = command.run(global).await;
    if let Some(spans) = spans {
        spans.end();
    }
    code
}

async fn serve(flags: &Flags, then: impl FnOnce(Listening)) -> ExitCode {
    let config = match read(flags).and_then(|loaded| loaded.config()) {
        Ok(config) => config,
        Err(errors) => return failed(&errors, CONFIG),
    };
    let telemetry = match Telemetry::start(&config) {
        Ok(telemetry) => Arc::new(telemetry),
        Err(error) => return failed(&error, CONFIG),
    };
    let shutdown = CancellationToken::new();
    let live = Live::new(&config);
    let again = {
        let (flags, telemetry, live) = (flags.clone(), Arc::clone(&telemetry), Arc::clone(&live));
        move || {
            systemd::reloading();
            match read(&flags).and_then(|loaded| loaded.config()) {
                Ok(config) => {
                    match telemetry.set_log(&config.log) {
                        Ok(()) => tracing::info!(log = config.log, "settings were read again"),
                        Err(error) => tracing::warn!(%error, "the log goes on as before"),
                    }
                    live.update(&config);
                }
                Err(errors) => tracing::warn!(%errors, "settings cannot be used; those before stay in force"),
            }
            live.reload.notify_one();
            systemd::ready();
        }
    };
    if let Err(error) = on_signals(shutdown.clone(), again) {
        return failed(&error, 1);
    }
    let announce = |listening: Listening| {
        let mut out = std::io::stdout().lock();
        // Whoever started us may not read: that is no reason to end.
        let _ = writeln!(out, "ledgerd listening on {}", listening.grpc);
        if let Some(http) = listening.http {
            let _ = writeln!(out, "http listening on {http}");
        }
        let _ = out.flush();
        drop(out);
        then(listening);
    };
    let ended =
        ledgerd::run(config, Arc::clone(&telemetry), live, shutdown.cancelled_owned(), announce).await;
    telemetry.end();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(fatal) => failed(&fatal, fatal.exit_code()),
    }
}

async fn dev(mut flags: Flags) -> ExitCode {
    let temporary = match flags.data_dir {
        Some(_) => None,
        None => match tempfile::Builder::new().prefix("ledgerd-dev-").tempdir() {
            Ok(dir) => Some(dir),
            Err(error) => return failed(&error, 74),
        },
    };
    if let Some(dir) = &temporary {
        flags.data_dir = Some(dir.path().display().to_string());
    }
    serve(&flags, |listening| {
        let address = listening.grpc;
        let mut out = std::io::stdout().lock();
        let _ = writeln!(
            out,
            "\nTry, in another terminal:\n  \
             ledgerd --address {address} worker exec --agent echo --capacity 2 -- cat\n  \
             ledgerd --address {address} task enqueue echo hello --payload '{{\"text\":\"hi\"}}'\n  \
             ledgerd --address {address} stats\n"
        );
    })
    .await
}

fn check_config(flags: &Flags) -> ExitCode {
    match read(flags).and_then(|loaded| loaded.config().map(|_| loaded)) {
        Ok(loaded) => {
            let _ = write!(std::io::stdout().lock(), "{loaded}");
            ExitCode::SUCCESS
        }
        Err(errors) => failed(&errors, CONFIG),
    }
}

fn read(flags: &Flags) -> Result<Loaded, ledgerd::config::ConfigErrors> {
    Loaded::read(flags, |name| std::env::var(name).ok())
}

/// The first signal asks for a drain, the second ends the process. SIGHUP asks for the settings to be read again: the log,
/// what holds for agents, certificates and callers.
fn on_signals(shutdown: CancellationToken, again: impl Fn() + Send + 'static) -> std::io::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            again();
        }
    });
    tokio::spawn(async move {
        for last in [false, true] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if last {
                std::process::exit(1);
            }
            shutdown.cancel();
        }
    });
    Ok(())
}

fn failed(error: &dyn std::fmt::Display, code: u8) -> ExitCode {
    for line in error.to_string().lines() {
        let _ = writeln!(std::io::stderr().lock(), "ledgerd: {line}");
    }
    ExitCode::from(code)
}
