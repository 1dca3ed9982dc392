//! `ledgerd token new`: a token for its owner, and a stanza for the daemon that knows its digest alone.

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use ledgerd::callers::{Callers, Role};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// What tokens begin with, so that scanners for secrets know them.
const PREFIX: &str = "ldg_";

/// The commands about tokens.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Token {
    /// Print a new token once, and what to add to the file of callers
    ///
    /// The token goes to standard output, the stanza to standard error; with --add it is appended to the file instead.
    /// A daemon reads the file again within seconds.
    New(New),
}

/// Whose token, and for what.
#[derive(Debug, clap::Args)]
pub(crate) struct New {
    /// What the audit trail calls its owner
    #[arg(long)]
    name: String,
    /// What it is for; may be given several times
    #[arg(long = "role", required = true, value_enum)]
    roles: Vec<Role>,
    /// Agents it reaches: a name, a beginning like `review-*`, or `*`; may be given several times
    #[arg(long = "agent", required = true, value_name = "PATTERN")]
    agents: Vec<String>,
    /// It may read payloads and results
    #[arg(long)]
    payloads: bool,
    /// Append the stanza to this file, made when it is missing
    #[arg(long, value_name = "FILE")]
    add: Option<PathBuf>,
}

impl Token {
    pub(crate) fn run(self) -> ExitCode {
        let Self::New(new) = self;
        match new.make() {
            Ok(()) => ExitCode::SUCCESS,
            Err((error, code)) => crate::failed(&error, code),
        }
    }
}

impl New {
    /// The error says what went wrong, and with which exit code.
    fn make(&self) -> Result<(), (String, u8)> {
        let mut random = [0; 32];
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let filled = provider.secure_random.fill(&mut random);
        filled.map_err(|_| ("the operating system gives no random bytes".to_owned(), 1))?;
        let token = format!("{PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(random));
        let stanza = self.stanza(&token);
        // What the daemon would refuse is refused here.
        Callers::read(&stanza).map_err(|error| (error, 2))?;
        match &self.add {
            Some(path) => {
                append(path, &stanza).map_err(|error| (format!("{}: {error}", path.display()), 74))?;
            }
            None => eprint_stanza(&stanza),
        }
        writeln!(io::stdout().lock(), "{token}").map_err(|error| (error.to_string(), 74))
    }

    fn stanza(&self, token: &str) -> String {
        let digest = Sha256::digest(token.as_bytes()).iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        });
        let roles: Vec<_> = self.roles.iter().map(|role| role.as_str()).collect();
        format!(
            "[[caller]]\nname = {:?}\nroles = {roles:?}\nagents = {:?}\npayloads = {}\ntoken_sha256 = \"{digest}\"\n",
            self.name, self.agents, self.payloads
        )
    }
}

fn eprint_stanza(stanza: &str) {
    let _ = write!(io::stderr().lock(), "# add this to the file of callers\n{stanza}");
}

/// In one write, so that a daemon never reads half of it; and never behind a file that is broken already.
fn append(path: &Path, stanza: &str) -> io::Result<()> {
    let before = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error),
    };
    let gap = match before.trim_end() {
        "" => "",
        text if before.len() > text.len() => "\n",
        _ => "\n\n",
    };
    let added = format!("{gap}{stanza}");
    Callers::read(&format!("{before}{added}")).map_err(io::Error::other)?;
    let mut file = OpenOptions::new().append(true).create(true).mode(0o640).open(path)?;
    file.write_all(added.as_bytes())?;
    file.sync_all()
}
