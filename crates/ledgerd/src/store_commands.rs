//! `ledgerd migrate`, `export`, `import`, `backup` and `restore`: a ledger's schema, its way to another store, and back from the
//! dead.
//!
//! Reads the configuration as `serve` does, asks `ledgerd::upkeep`, and prints. Answers go to standard output, everything else
//! to standard error; exit codes are the daemon's.

use crate::{CONFIG, failed};
use clap::{Args, Subcommand};
use ledger_cli::Format;
use ledgerd::config::{Flags, StoreAt};
use ledgerd::store::moving::{Backup, MoveError, Total};
use ledgerd::store::schema::{Standing, Step};
use ledgerd::upkeep;
use serde_json::json;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// A file that is there already, and an output that cannot be named.
const USAGE: u8 = 2;
const IO: u8 = 74;
const CORRUPT: u8 = 65;
/// Bytes that are read from a file, and written to it, at once.
const BUFFER: usize = 1 << 20;

/// Which ledger.
#[derive(Debug, Args)]
pub(crate) struct StoreFlags {
    /// TOML file of the daemon [env: LEDGERD_CONFIG]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Directory of the ledger [default: ledgerd-data] [env: LEDGERD_DATA_DIR]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<String>,
    /// `sqlite` in the data directory, `sqlite:DIR`, or `postgres://USER@HOST/DATABASE` [default: sqlite] [env: LEDGERD_STORE]
    #[arg(long, value_name = "STORE")]
    store: Option<String>,
}

impl StoreFlags {
    fn place(self) -> Result<StoreAt, ExitCode> {
        let Self { config, data_dir, store } = self;
        let flags = Flags { config, data_dir, store, ..Flags::default() };
        let config = crate::read(&flags).and_then(|loaded| loaded.config());
        config.map(|config| config.store).map_err(|errors| failed(&errors, CONFIG))
    }
}

/// `migrate`.
#[derive(Debug, Subcommand)]
pub(crate) enum Migrate {
    /// List the migrations, and whether each is applied
    Status(StoreFlags),
    /// Ask whether the schema is this release's: exit 0 when it is, 78 when it is older, newer or missing, 65 when altered
    Check(StoreFlags),
    /// Apply what is pending, as `serve` does when it starts; on SQLite no daemon may run
    Apply(StoreFlags),
}

impl Migrate {
    pub(crate) async fn run(self, output: Format) -> ExitCode {
        let (flags, applies, checks) = match self {
            Self::Status(flags) => (flags, false, false),
            Self::Check(flags) => (flags, false, true),
            Self::Apply(flags) => (flags, true, false),
        };
        let at = match flags.place() {
            Ok(at) => at,
            Err(code) => return code,
        };
        let steps = if applies { upkeep::apply(&at).await } else { upkeep::steps(&at).await };
        let steps = match steps {
            Ok(steps) => steps,
            Err(error) => return failed(&error, error.exit_code()),
        };
        print(&show_steps(&steps, output), &mut io::stdout());
        if checks { verdict(Standing::of(&steps)) } else { ExitCode::SUCCESS }
    }
}

fn verdict(standing: Standing) -> ExitCode {
    match standing {
        Standing::UpToDate => ExitCode::SUCCESS,
        Standing::Missing => {
            failed(&"there is no ledger yet; ledgerd migrate apply, or serve, makes one", CONFIG)
        }
        Standing::Behind => {
            failed(&"migrations are pending; ledgerd migrate apply, or serve, applies them", CONFIG)
        }
        Standing::Newer => {
            failed(&"the schema is newer than this ledgerd knows; run the newer release", CONFIG)
        }
        Standing::Altered => failed(&"a migration is not as released; restore a backup", CORRUPT),
    }
}

/// `export`.
#[derive(Debug, Args)]
pub(crate) struct Export {
    /// Where to, or `-` for standard output
    file: PathBuf,
    /// Replace the file if there is one
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    store: StoreFlags,
}

impl Export {
    pub(crate) async fn run(self, output: Format) -> ExitCode {
        let at = match self.store.place() {
            Ok(at) => at,
            Err(code) => return code,
        };
        if self.file == Path::new("-") {
            let exported = upkeep::export(&at, BufWriter::with_capacity(BUFFER, io::stdout())).await;
            return told(exported, output, &mut io::stderr());
        }
        if !self.force && self.file.symlink_metadata().is_ok() {
            return exists(&self.file);
        }
        // Under another name until it is whole, readable by its owner alone: it has all that users sent.
        let made = tempfile::Builder::new().prefix(".ledgerd-export-").tempfile_in(folder(&self.file));
        let made = match made {
            Ok(made) => made,
            Err(error) => return failed(&format_args!("{}: {error}", self.file.display()), IO),
        };
        let exported = upkeep::export(&at, BufWriter::with_capacity(BUFFER, made.as_file())).await;
        let exported = match exported {
            Ok(totals) => totals,
            Err(error) => return failed(&error, error.exit_code()),
        };
        let kept = made.as_file().sync_all().and_then(|()| {
            let kept = if self.force { made.persist(&self.file) } else { made.persist_noclobber(&self.file) };
            kept.map_err(|error| error.error)?;
            File::open(folder(&self.file))?.sync_all()
        });
        match kept {
            Ok(()) => told(Ok(exported), output, &mut io::stdout()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => exists(&self.file),
            Err(error) => failed(&format_args!("{}: {error}", self.file.display()), IO),
        }
    }
}

fn exists(file: &Path) -> ExitCode {
    failed(&format_args!("{} is there already; --force replaces it", file.display()), USAGE)
}

fn folder(file: &Path) -> &Path {
    file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."))
}

/// `import`.
#[derive(Debug, Args)]
pub(crate) struct Import {
    /// What was exported, or `-` for standard input
    file: PathBuf,
    #[command(flatten)]
    store: StoreFlags,
}

impl Import {
    pub(crate) async fn run(self, output: Format) -> ExitCode {
        let at = match self.store.place() {
            Ok(at) => at,
            Err(code) => return code,
        };
        let imported = if self.file == Path::new("-") {
            upkeep::import(&at, io::stdin().lock()).await
        } else {
            match File::open(&self.file) {
                Ok(file) => upkeep::import(&at, BufReader::with_capacity(BUFFER, file)).await,
                Err(error) => return failed(&format_args!("{}: {error}", self.file.display()), IO),
            }
        };
        told(imported, output, &mut io::stdout())
    }
}

/// `backup`.
#[derive(Debug, Args)]
pub(crate) struct BackUp {
    /// Where to: a file that is not there yet, or a directory, in which it is named by the time
    target: PathBuf,
    #[command(flatten)]
    store: StoreFlags,
}

impl BackUp {
    pub(crate) async fn run(self, output: Format) -> ExitCode {
        match self.store.place() {
            Ok(at) => told_of(upkeep::backup(&at, &self.target).await, output),
            Err(code) => code,
        }
    }
}

/// `restore`.
#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// What `backup` wrote
    #[arg(required_unless_present = "raise_fences")]
    file: Option<PathBuf>,
    /// Only look through the file, every page and row
    #[arg(long)]
    check: bool,
    /// Take no file: make leases and numbers void that may have been given out since, in a ledger that other means have restored
    #[arg(long, conflicts_with_all = ["file", "check"])]
    raise_fences: bool,
    #[command(flatten)]
    store: StoreFlags,
}

impl Restore {
    pub(crate) async fn run(self, output: Format) -> ExitCode {
        if let (true, Some(file)) = (self.check, &self.file) {
            return told_of(upkeep::check_backup(file).await, output);
        }
        let at = match self.store.place() {
            Ok(at) => at,
            Err(code) => return code,
        };
        let Some(file) = self.file else {
            return match upkeep::raise_fences(&at).await {
                Ok(raised) => {
                    let shown = match output {
                        Format::Table => format!("{raised} fences raised\n"),
                        Format::Json => document(&json!({ "raised": raised.to_string() })),
                    };
                    print(&shown, &mut io::stdout());
                    ExitCode::SUCCESS
                }
                Err(error) => failed(&error, error.exit_code()),
            };
        };
        told_of(upkeep::restore(&at, &file).await, output)
    }
}

fn told_of(done: Result<Backup, MoveError>, output: Format) -> ExitCode {
    match done {
        Ok(backup) => {
            print(&show_backup(&backup, output), &mut io::stdout());
            ExitCode::SUCCESS
        }
        Err(error) => failed(&error, error.exit_code()),
    }
}

fn show_backup(backup: &Backup, output: Format) -> String {
    let Backup { file, last_seq, totals } = backup;
    match output {
        Format::Table => {
            format!("{}: history up to row {last_seq}\n\n{}", file.display(), show_totals(totals, output))
        }
        Format::Json => document(&json!({
            "file": file.display().to_string(),
            "last_seq": last_seq.to_string(),
            "tables": tables(totals),
        })),
    }
}

fn told(done: Result<Vec<Total>, MoveError>, output: Format, out: &mut impl Write) -> ExitCode {
    match done {
        Ok(totals) => {
            print(&show_totals(&totals, output), out);
            ExitCode::SUCCESS
        }
        Err(error) => failed(&error, error.exit_code()),
    }
}

/// A reader that goes away is no error.
fn print(text: &str, out: &mut impl Write) {
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn show_steps(steps: &[Step], output: Format) -> String {
    match output {
        Format::Table => {
            let row =
                |step: &Step| [step.version.to_string(), step.name.clone(), step.state.as_str().to_owned()];
            columns(["VERSION", "NAME", "STATE"], steps.iter().map(row))
        }
        Format::Json => {
            let step = |step: &Step| json!({ "version": step.version.to_string(), "name": step.name, "state": step.state.as_str() });
            document(&json!({
                "migrations": steps.iter().map(step).collect::<Vec<_>>(),
                "standing": Standing::of(steps).as_str(),
            }))
        }
    }
}

fn show_totals(totals: &[Total], output: Format) -> String {
    match output {
        Format::Table => {
            let row = |total: &Total| [total.table.to_owned(), total.rows.to_string(), total.sha256.clone()];
            columns(["TABLE", "ROWS", "SHA-256"], totals.iter().map(row))
        }
        Format::Json => document(&json!({ "tables": tables(totals) })),
    }
}

fn tables(totals: &[Total]) -> serde_json::Value {
    let total = |total: &Total| json!({ "table": total.table, "rows": total.rows.to_string(), "sha256": total.sha256 });
    totals.iter().map(total).collect()
}

/// As the client commands print JSON: 64-bit numbers are texts.
fn document(value: &serde_json::Value) -> String {
    format!("{value:#}\n")
}

/// Rows under a heading, aligned, two blanks between.
fn columns(heading: [&str; 3], rows: impl Iterator<Item = [String; 3]>) -> String {
    let rows: Vec<[String; 3]> = std::iter::once(heading.map(str::to_owned)).chain(rows).collect();
    let width = |at: usize| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0);
    let (first, second) = (width(0), width(1));
    rows.iter().map(|[a, b, c]| format!("{a:first$}  {b:second$}  {c}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ledgerd::store::schema::StepState;

    #[test]
    fn steps_and_totals_are_shown_for_people_and_programs() {
        let steps = [
            Step { version: 1, name: "ledger".to_owned(), state: StepState::Applied },
            Step { version: 2, name: "waiting".to_owned(), state: StepState::Pending },
        ];
        assert_eq!(
            show_steps(&steps, Format::Table),
            "VERSION  NAME     STATE\n1        ledger   APPLIED\n2        waiting  PENDING\n"
        );
        let shown: serde_json::Value =
            serde_json::from_str(&show_steps(&steps, Format::Json)).expect("it is JSON");
        assert_eq!(shown["migrations"][1]["state"], "PENDING");
        assert_eq!(shown["standing"], "BEHIND");
        let totals = [Total { table: "agents", rows: 7, sha256: "00ff".to_owned() }];
        assert_eq!(show_totals(&totals, Format::Table), "TABLE   ROWS  SHA-256\nagents  7     00ff\n");
        let shown: serde_json::Value =
            serde_json::from_str(&show_totals(&totals, Format::Json)).expect("it is JSON");
        assert_eq!(shown["tables"][0]["rows"], "7");
    }
}
