//! Who gives a command, for the audit trail. A name that people read, not a proof: nobody checks it.

use ledgerd_client::limits::MAX_ACTOR_BYTES;

use crate::tail::text_head;

/// Who gives the command.
#[derive(Debug, clap::Args)]
pub(crate) struct Actor {
    /// Who you are, for the audit trail; else USER@HOST
    #[arg(long, value_name = "NAME")]
    actor: Option<String>,
}

impl Actor {
    /// The name given, or the login name and the host.
    pub(crate) fn name(&self) -> String {
        self.actor.clone().unwrap_or_else(|| login(std::env::var("USER").ok(), &host()))
    }
}

fn login(user: Option<String>, host: &str) -> String {
    let user = user.filter(|user| !user.trim().is_empty()).unwrap_or_else(|| "unknown".into());
    text_head(&format!("{user}@{host}"), MAX_ACTOR_BYTES).to_owned()
}

/// The name of this machine.
pub(crate) fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_name_it_is_the_login_at_the_host() {
        assert_eq!(login(Some("ada".into()), "box"), "ada@box");
        for nobody in [None, Some(String::new())] {
            assert_eq!(login(nobody, "box"), "unknown@box");
        }
        assert_eq!(login(Some("a".repeat(200)), "box").len(), MAX_ACTOR_BYTES);
        assert_eq!(Actor { actor: Some("CI".into()) }.name(), "CI");
    }
}
