//! The way to the daemon: the SDK's client, and its errors as failures of a command.

pub(crate) use ledgerd_client::Client;
use ledgerd_client::Error;

use crate::Global;
use crate::failure::{Exit, Failure, exit_of};

/// Connects, so that a daemon that is down is told as such, whatever the command was about to do.
///
/// # Errors
/// [`Failure::Unreachable`], or a usage error for an address that is none.
pub(crate) async fn connect(global: &Global) -> Result<Client, Failure> {
    let address = global.address();
    global.connect().await.map_err(|error| match error {
        Error::Unavailable { message, .. } => {
            // The SDK's sentence names the address as ours will; only the cause is wanted.
            let prefix = format!("cannot connect to {address}: ");
            Failure::Unreachable(message.strip_prefix(&prefix).unwrap_or(&message).to_lowercase())
        }
        other => other.into(),
    })
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let exit = match &error {
            Error::Unavailable { message, reason, .. } if reason.is_empty() => {
                return Self::Unreachable(message.clone());
            }
            Error::Unavailable { .. } => Exit::Unreachable,
            Error::NotFound { .. } => Exit::NotFound,
            Error::InvalidArgument { .. }
            | Error::Address { .. }
            | Error::Credentials { .. }
            | Error::PayloadTooLarge { .. } => Exit::Usage,
            Error::Timeout { .. } => Exit::Timeout,
            Error::TaskFailed { .. } | Error::TaskCancelled { .. } => Exit::TaskFailed,
            Error::Rpc { code, .. } => exit_of(*code),
            _ => Exit::Failure,
        };
        match error.reason() {
            Some(reason) => Self::new(exit, format!("{error} ({reason})")),
            None => Self::new(exit, error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nobody_listening_is_told_with_the_address() {
        let global = Global { address: "127.0.0.1:1".into(), ..Global::default() };
        let Err(failure) = connect(&global).await else { panic!("somebody listens on port 1") };
        let sentence = failure.sentence(&global.address).expect("a sentence");
        assert!(
            sentence.starts_with("cannot reach ledgerd at 127.0.0.1:1: connection refused"),
            "{sentence}"
        );
        let global = Global { address: "nonsense".into(), ..global };
        let Err(Failure::Said(exit, _)) = connect(&global).await else { panic!("an address") };
        assert_eq!(exit, Exit::Usage);
    }

    #[test]
    fn errors_of_the_worker_have_exit_codes() {
        let unavailable = |reason: &str| Error::Unavailable {
            reason: reason.into(),
            message: "starting".into(),
            retry_after: None,
        };
        assert_eq!(Failure::from(unavailable("")), Failure::Unreachable("starting".into()));
        assert_eq!(
            Failure::from(unavailable("STARTING")),
            Failure::new(Exit::Unreachable, "starting (STARTING)")
        );
    }
}
