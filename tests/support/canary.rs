//! What daemons are told and may not repeat: every test's daemon is held to it when it ends.
//!
//! Payloads and details of failures have [`WORD`] in them, and so has the password of the server that keeps a ledger; tokens
//! begin as all tokens do. The other tests of the repository, which are in Python, look for the same two.

/// In what tasks carry, unless a test says what that is.
pub(crate) const WORD: &str = "canary-5e1f";
/// What a token begins with.
const TOKEN: &str = "ldg_";

/// The first line that has a secret in it.
pub(crate) fn in_text(text: &str) -> Option<&str> {
    text.lines().find(|line| line.contains(WORD) || line.contains(TOKEN))
}

#[test]
fn a_daemon_that_tells_a_secret_fails_its_test() {
    use super::{Daemon, Folder};
    use std::panic::{AssertUnwindSafe, catch_unwind};
    for secret in [WORD, "ldg_of-somebody"] {
        let folder = Folder::new();
        std::fs::write(folder.path().join("log"), format!("all is well\nso it says: {secret}\n"))
            .expect("the folder is writable");
        let daemon = Daemon::start_in(folder);
        assert!(daemon.log().lines().count() > 2, "it goes on with the log");
        let found = catch_unwind(AssertUnwindSafe(|| drop(daemon))).expect_err("the end of a daemon looks");
        assert!(found.downcast::<String>().is_ok_and(|why| why.contains(secret)));
    }
}
