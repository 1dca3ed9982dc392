//! The same promises on PostgreSQL: with `LEDGERD_TEST_STORE=postgres` every daemon of the tests keeps its ledger in a database
//! of its own on the server that `.ci/postgres` has started, one for each folder.

use super::{Folder, canary};
use std::process::Command;

/// Whether daemons are started on PostgreSQL unless a test says otherwise.
pub(crate) fn is_store() -> bool {
    std::env::var("LEDGERD_TEST_STORE").is_ok_and(|store| store == "postgres")
}

/// The store of a daemon in this folder, unless its flags name one.
pub(super) fn store_flags(folder: &Folder, flags: &[&str]) -> Vec<String> {
    if !is_store() || flags.contains(&"--store") {
        return Vec::new();
    }
    let url = server().expect("LEDGERD_TEST_STORE=postgres needs .ci/postgres around the tests");
    vec!["--store".to_owned(), database(&url, folder)]
}

/// Where the server of the tests is; none when there is none.
pub(crate) fn server() -> Option<String> {
    std::env::var("LEDGERD_TEST_POSTGRES_URL").ok()
}

/// The database that belongs to a folder, made when there is none.
pub(crate) fn database(server: &str, folder: &Folder) -> String {
    let path = folder.path().display().to_string();
    let name: String = path.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    let name = format!("e2e{}", name.to_ascii_lowercase());
    let (base, _) = server.rsplit_once('/').expect("an address with a database");
    let bin = std::env::var("LEDGERD_TEST_POSTGRES_BIN").expect("it comes with the address");
    let create = format!("CREATE DATABASE {name} TEMPLATE template0");
    let made =
        Command::new(format!("{bin}/psql")).args([server, "-qc", &create]).output().expect("psql runs");
    let said = String::from_utf8_lossy(&made.stderr);
    assert!(made.status.success() || said.contains("already exists"), "{said}");
    // The server trusts this machine, so a password is nothing to it; that it is shown nowhere is ours to hold.
    let (user, host) = base.split_once('@').expect("an address with a user");
    format!("{user}:{}@{host}/{name}", canary::WORD)
}
