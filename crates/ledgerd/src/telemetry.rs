//! Logs: lines on standard error, for people or for machines.

use crate::config::{Config, LogFormat};
use std::io::{IsTerminal, Write};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

/// Flushes what was logged when it is dropped.
#[derive(Debug)]
#[must_use = "logs are flushed when this is dropped"]
pub struct Guard(());

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = std::io::stderr().flush();
    }
}

/// A filter by level and module.
///
/// # Errors
/// What is wrong with the text.
pub fn filter(text: &str) -> Result<EnvFilter, ParseError> {
    EnvFilter::builder().parse(text)
}

/// Starts logging. Once in a process: later calls leave it as it is.
pub fn start(config: &Config) -> Guard {
    let filter = filter(&config.log).unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Somebody else's subscriber, as in a test, is as good.
    let _ = match config.log_format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
    Guard(())
}
