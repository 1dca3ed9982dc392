//! The client half of the `ledgerd` command line.
//!
//! [`Command`] is a set of clap subcommands that a binary embeds beside its own, and [`Global`] the flags that all of
//! them share. Each command is a plain call over the SDK, an answer on standard output and an exit code:
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | failed |
//! | 2 | the command line is wrong |
//! | 3 | not found |
//! | 4 | no ledgerd answers |
//! | 5 | the task that was waited for failed or was cancelled |
//! | 124 | the time for waiting is over |
//!
//! It never prints through logging, never panics on what a server or a user says, and holds no state of its own.

mod actor;
mod agent;
mod attempt;
pub mod bench;
mod breaker;
mod checkpoint;
mod child;
mod connect;
mod daemon;
pub mod demo;
mod dlq;
mod enqueue;
mod exec;
mod explain;
mod failure;
#[cfg(test)]
mod fake;
mod guard;
mod import;
mod line;
mod output;
mod policy;
mod program;
mod reply;
mod stats;
mod tail;
mod task;
mod template;
mod time;
mod wait;
mod watch;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;

pub use agent::AgentCommand;
pub use breaker::BreakerCommand;
pub use dlq::DlqCommand;
pub use output::Format;
pub use stats::Stats;
pub use task::TaskCommand;
pub use worker::WorkerCommand;

/// Keeps what all commands share apart from what one command is about.
const HEADING: &str = "Connection and output";

/// Flags of every client command.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Global {
    /// Where ledgerd listens, https://HOST:PORT for TLS; of several daemons that serve one ledger, with commas between them,
    /// one that answers
    #[arg(
        long,
        global = true,
        help_heading = HEADING,
        env = "LEDGERD_ADDRESS",
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:7420"
    )]
    pub address: String,
    /// PEM file with the authority of the daemon's certificate; turns TLS on
    #[arg(long, global = true, help_heading = HEADING, env = "LEDGERD_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// PEM file with the certificate to show the daemon; turns TLS on
    #[arg(
        long,
        global = true,
        help_heading = HEADING,
        env = "LEDGERD_CLIENT_CERT",
        value_name = "FILE",
        requires = "client_key"
    )]
    pub client_cert: Option<PathBuf>,
    /// PEM file with its key
    #[arg(
        long,
        global = true,
        help_heading = HEADING,
        env = "LEDGERD_CLIENT_KEY",
        value_name = "FILE",
        requires = "client_cert"
    )]
    pub client_key: Option<PathBuf>,
    /// File with the token to send; else the token in LEDGERD_TOKEN
    #[arg(long, global = true, help_heading = HEADING, env = "LEDGERD_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// How to print answers
    #[arg(short, long, global = true, help_heading = HEADING, value_enum, default_value_t)]
    pub output: Format,
}

impl Global {
    /// A variable that is set to nothing counts as not set, as in the SDKs.
    fn address(&self) -> &str {
        if self.address.is_empty() { ledgerd_client::DEFAULT_ADDRESS } else { &self.address }
    }

    /// Connects with what the flags say. A token has no flag of its own: other users of a machine see command lines.
    ///
    /// # Errors
    /// As [`ledgerd_client::ClientBuilder::connect`].
    pub async fn connect(&self) -> Result<ledgerd_client::Client, ledgerd_client::Error> {
        let mut builder = ledgerd_client::Client::builder(self.address());
        let given = |path: &Option<PathBuf>| path.clone().filter(|path| !path.as_os_str().is_empty());
        if let Some(ca) = given(&self.tls_ca) {
            builder = builder.ca_file(ca)?;
        }
        if let (Some(cert), Some(key)) = (given(&self.client_cert), given(&self.client_key)) {
            builder = builder.certificate_files(cert, key)?;
        }
        let builder = match given(&self.token_file) {
            Some(file) => builder.token_file(file)?,
            None => builder.token_from_env()?,
        };
        builder.connect().await
    }
}

/// The client commands.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Enqueue, look at, wait for, change, answer and cancel tasks
    #[command(subcommand)]
    Task(TaskCommand),
    /// Look at agents, change their settings, pause and resume them
    #[command(subcommand)]
    Agent(AgentCommand),
    /// Look at circuit breakers and reset them
    #[command(subcommand)]
    Breaker(BreakerCommand),
    /// Look at dead letters, redrive and discard them
    #[command(subcommand)]
    Dlq(DlqCommand),
    /// Look at workers, or be one
    #[command(subcommand)]
    Worker(WorkerCommand),
    /// Counts of the whole ledger
    Stats(Stats),
    /// Show the main job end to end, with trouble
    ///
    /// Starts a daemon on a SQLite file, and a worker process for each of three agents. Enqueues every text file under
    /// DIR for each of them. Kills a worker, lets an agent fail until its breaker opens, and checks that every task is
    /// done and every result right: exit code 0 means all of that. Takes half a minute.
    Demo(demo::Args),
    /// Measure a daemon under load
    ///
    /// One JSON object on standard output, the same for people on standard error. Without --target a daemon is started
    /// for the run, in a data directory of its own. Ends when all that was enqueued is done, and fails unless the
    /// daemon's counts agree with what it said.
    Bench(bench::Args),
}

impl Command {
    /// Whether this takes tasks: then its spans are worth exporting.
    #[must_use]
    pub const fn is_worker(&self) -> bool {
        matches!(self, Self::Worker(WorkerCommand::Exec(_)))
    }

    /// Runs the command to its end. Answers go to standard output, everything else to standard error.
    pub async fn run(self, global: &Global) -> ExitCode {
        let done = match self {
            Self::Task(command) => command.run(global).await,
            Self::Agent(command) => command.run(global).await,
            Self::Breaker(command) => command.run(global).await,
            Self::Dlq(command) => command.run(global).await,
            Self::Worker(command) => command.run(global).await,
            Self::Stats(command) => command.run(global).await,
            Self::Demo(command) => command.run(global).await,
            Self::Bench(command) => command.run(global).await,
        };
        let Err(failure) = done else { return ExitCode::SUCCESS };
        if let Some(sentence) = failure.sentence(global.address()) {
            output::remark(&format!("ledgerd: {sentence}"));
        }
        failure.exit_code()
    }
}

#[cfg(test)]
mod command_tests;

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        global: Global,
        #[command(subcommand)]
        command: Command,
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_flags_stand_before_or_after_the_command() {
        for line in ["x -o json --address h:1 task list", "x task list -o json --address h:1"] {
            let cli = Cli::try_parse_from(line.split(' ')).expect("arguments");
            assert_eq!((cli.global.output, cli.global.address.as_str()), (Format::Json, "h:1"));
            assert!(matches!(cli.command, Command::Task(TaskCommand::List(_))));
        }
    }

    #[test]
    fn an_empty_address_is_the_default() {
        let global = |address: &str| Global { address: address.into(), ..Global::default() };
        assert_eq!((global("").address(), global("h:1").address()), ("127.0.0.1:7420", "h:1"));
    }

    #[test]
    fn what_is_missing_is_named() {
        for (line, named) in [
            ("x task update t1", "--priority"),
            ("x task update t1 --delay 1h --run-at 2h", "--run-at"),
            ("x task unblock t1", "--answer"),
            ("x agent pause a", "--reason"),
        ] {
            let error = Cli::try_parse_from(line.split(' ')).expect_err(line).to_string();
            assert!(error.contains(named), "{line}: {error}");
        }
    }

    #[test]
    fn every_command_of_the_manual_is_there() {
        for line in [
            "x task enqueue a t",
            "x task enqueue --from f.jsonl --skip-bad",
            "x task list --agent a --state failed,retry --since -1h --label k=v --limit 5",
            "x task list --all",
            "x task show t1 --data",
            "x task history t1",
            "x task explain t1",
            "x task wait t1 --timeout 10s",
            "x task cancel t1 --reason no",
            "x task update t1 --priority 9 --reason hurry",
            "x task update t1 --delay 1h --request-id r",
            "x task update t1 --run-at -1m",
            "x task unblock t1 --answer yes --actor ada",
            "x task unblock t1 --answer -",
            "x task unblock t1 --answer=",
            "x agent list",
            "x agent show a",
            "x agent configure a --max-retries 3 --jitter full --hint-max 10m",
            "x agent pause a --reason repairs --for 1h --actor ada",
            "x agent resume a",
            "x breaker list",
            "x breaker show a",
            "x breaker reset a",
            "x dlq list --reason poison",
            "x dlq show t1",
            "x dlq redrive t1 t2",
            "x dlq discard t1 --note old",
            "x dlq group --type review --limit 3",
            "x dlq redrive --agent a --since 1h --rate 5 --priority 9 --payload {} --to-agent b --note why --yes",
            "x dlq discard --fingerprint 00ff --dry-run --note why",
            "x worker list --agent a",
            "x worker exec --agent a --type t --capacity 2 -- prog -p {{payload.prompt}} --flag",
            "x stats",
            "x demo some/folder --json --keep",
            "x bench --target h:1 --callers 4 --batch 1 --duration 2s",
        ] {
            if let Err(error) = Cli::try_parse_from(line.split(' ')) {
                panic!("{line}: {error}");
            }
        }
    }
}
