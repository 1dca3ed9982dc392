//! What a program says beside its output and exit code: a question, when to be tried again, tasks that follow.
//!
//! One JSON object in the file that `LEDGERD_REPLY` names, read once the program has ended. Fields that are not known
//! are refused: a misspelt `follow_up` would else be work that is silently lost.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use ledgerd_client::TaskError;
use ledgerd_client::v1::{ErrorClass, NewTask};
use rustix::fs::OFlags;
use serde::Deserialize;
use serde_json::value::RawValue;
use tempfile::TempDir;

use crate::line::{self, Defaults};
use crate::policy::Span;
use crate::time::now;

/// Most bytes: a hundred follow-ups with payloads that are no files.
const LIMIT: u64 = 4 << 20;

/// The place of a reply.
#[derive(Debug)]
pub(crate) struct ReplyFile {
    path: PathBuf,
    _folder: TempDir,
}

/// What the program wrote there.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Reply {
    /// The task waits for an answer to this.
    question: Option<String>,
    /// It goes on by itself after so long.
    block_for: Option<Span>,
    /// After a failure: not to be tried again before.
    retry_after: Option<Span>,
    /// After a failure: of which class it is.
    class: Option<String>,
    /// After a failure: a short code of the program's own.
    code: Option<String>,
    /// With a success: tasks to enqueue, as lines of a task file.
    follow_ups: Vec<Box<RawValue>>,
}

impl ReplyFile {
    /// A place in a folder of the attempt's own.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub(crate) fn prepare() -> std::io::Result<Self> {
        let folder = tempfile::Builder::new().prefix("ledgerd-").tempdir()?;
        Ok(Self { path: folder.path().join("reply.json"), _folder: folder })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What is there; nothing said where there is nothing.
    ///
    /// # Errors
    /// A sentence about what is wrong with it.
    pub(crate) fn read(&self) -> Result<Reply, String> {
        // NONBLOCK: a pipe in the file's place must not hold the worker.
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).expect("flags fit");
        let Ok(file) = OpenOptions::new().read(true).custom_flags(flags).open(&self.path) else {
            return Ok(Reply::default());
        };
        let mut bytes = Vec::new();
        file.take(LIMIT + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| format!("the reply cannot be read: {error}"))?;
        if bytes.len() as u64 > LIMIT {
            return Err(format!("the reply is over its limit of {LIMIT} bytes"));
        }
        if bytes.trim_ascii().is_empty() {
            return Ok(Reply::default());
        }
        serde_json::from_slice(&bytes).map_err(|error| format!("the reply is not understood: {error}"))
    }
}

impl Reply {
    /// The block that it asks for, whatever the exit code.
    pub(crate) fn block(&self) -> Option<TaskError> {
        let question = self.question.as_ref()?;
        let until = self.block_for.and_then(|span| now().checked_add(span.0).ok());
        Some(TaskError::block(question.as_str(), until.map(std::time::SystemTime::from)))
    }

    /// What it adds to a failure.
    ///
    /// # Errors
    /// A sentence when there is no such class.
    pub(crate) fn refine(&self, mut error: TaskError) -> Result<TaskError, String> {
        if let Some(name) = &self.class {
            let class = ErrorClass::from_str_name(&format!("ERROR_CLASS_{}", name.to_uppercase()))
                .filter(|class| *class != ErrorClass::Unspecified)
                .ok_or_else(|| format!("the reply names class {name:?}, which is none"))?;
            error = error.class(class);
        }
        if let Some(code) = &self.code {
            error = error.code(code.as_str());
        }
        Ok(match self.retry_after {
            Some(span) => error.hint(span.0),
            None => error,
        })
    }

    /// The tasks that follow a success; for `agent` where they name none.
    ///
    /// # Errors
    /// A sentence about the first that is none.
    pub(crate) fn follow_ups(&self, agent: &str) -> Result<Vec<NewTask>, String> {
        let defaults = Defaults { agent: Some(agent.into()), task_type: None, now: now() };
        let task = |(number, text): (usize, &RawValue)| {
            line::parse(text.get().as_bytes(), &defaults)
                .map_err(|why| format!("follow_ups[{number}] of the reply: {why}"))
        };
        self.follow_ups.iter().map(|text| &**text).enumerate().map(task).collect()
    }
}
