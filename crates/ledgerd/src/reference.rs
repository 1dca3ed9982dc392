//! Pages under `docs/reference` that are written by tests: with `LEDGERD_WRITE_REFERENCE=1` they are, without it they are
//! compared. Part of both the library's tests and the program's.

/// Holds that a page is as the code says.
pub(crate) fn is_kept(page: &str, text: &str) {
    let path = format!("{}/docs/reference/{page}", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("LEDGERD_WRITE_REFERENCE").is_some() {
        std::fs::write(&path, text).expect("the folder is writable");
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == text,
        "run this test with LEDGERD_WRITE_REFERENCE=1 and look at docs/reference/{page}"
    );
}
