//! What may be said, what wins, and what an error says.

use super::*;

fn read(flags: &Flags, env: &[(&str, &str)]) -> Result<Loaded, ConfigErrors> {
    Loaded::read(flags, |name| {
        env.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
    })
}

fn error(flags: &Flags, env: &[(&str, &str)]) -> String {
    match read(flags, env).map(|loaded| loaded.config()) {
        Ok(Ok(config)) => panic!("{config:?}"),
        Ok(Err(error)) | Err(error) => error.to_string(),
    }
}

fn with_file(text: &str) -> (tempfile::TempDir, Flags) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("ledgerd.toml");
    std::fs::write(&path, text).expect("a file");
    (dir, Flags { config: Some(path), ..Flags::default() })
}

#[test]
fn defaults_are_safe() {
    let config = read(&Flags::default(), &[]).expect("defaults").config().expect("defaults");
    assert!(config.listen.ip().is_loopback() && config.http_listen.is_some_and(|at| at.ip().is_loopback()));
    assert_eq!(config.drain_grace, Duration::from_secs(25));
    assert_eq!(config.store, StoreAt::Sqlite("ledgerd-data".into()));
    let days = |days: u64| Some(Duration::from_secs(days * 86_400));
    assert_eq!(config.retention, Retention { done: days(7), failed: days(90) });
}

#[test]
fn flags_win_over_environment_over_file_over_defaults() {
    let (_dir, mut flags) = with_file("listen = '127.0.0.1:1'\ndrain_grace = '1s'\nlog = 'warn'\n");
    flags.listen = Some("127.0.0.1:3".to_owned());
    let env = [("LEDGERD_LISTEN", "127.0.0.1:2"), ("LEDGERD_DRAIN_GRACE", "2s"), ("LEDGERD_PORT", "tcp://x")];
    let loaded = read(&flags, &env).expect("a config");
    let config = loaded.config().expect("a config");
    assert_eq!(config.listen.port(), 3);
    assert_eq!(config.drain_grace, Duration::from_secs(2));
    assert_eq!(config.log, "warn");
    assert_eq!(config.http_listen.map(|at| at.port()), Some(7421));
    let shown = loaded.to_string();
    for (key, origin) in [
        ("listen", "# --listen"),
        ("drain_grace", "# LEDGERD_DRAIN_GRACE"),
        ("log", "ledgerd.toml"),
        ("store", "# default"),
    ] {
        let line = shown.lines().find(|line| line.starts_with(&format!("{key} = "))).expect("a line");
        assert!(line.ends_with(origin), "{line}");
    }
}

#[test]
fn a_password_is_never_shown() {
    for (given, shown) in [
        ("postgres://ann:se@cret@localhost:5432/ledger", "postgres://ann:***@localhost:5432/ledger"),
        ("postgres://ann@localhost/ledger?password=se@cret", "postgres://ann@localhost/ledger?password=***"),
        ("postgres://localhost/ledger?user=ann", "postgres://localhost/ledger?user=ann"),
    ] {
        assert_eq!(without_password(given), shown);
    }
    let flags = Flags { store: Some("postgres://ann:secret@localhost/x".into()), ..Flags::default() };
    let loaded = read(&flags, &[]).expect("a config");
    let config = loaded.config().expect("a config");
    assert!(matches!(&config.store, StoreAt::Postgres(url) if url.reveal().contains("secret")));
    let flags = Flags { store: Some("postgres://ann:secret@host/x?sslmode=disable".into()), ..flags };
    for shown in [loaded.to_string(), format!("{config:?}"), error(&flags, &[])] {
        assert!(!shown.contains("secret"), "{shown}");
    }
}

#[test]
fn what_is_shown_can_be_read() {
    let shown = read(&Flags::default(), &[]).expect("defaults").to_string();
    let (_dir, flags) = with_file(&shown);
    assert_eq!(
        read(&flags, &[]).expect("a config").config(),
        read(&Flags::default(), &[]).expect("defaults").config()
    );
}

#[test]
fn defaults_of_agents_are_a_table_of_the_file_that_is_shown_as_it_counts() {
    let (_dir, flags) = with_file(
        "log = 'warn'\n[agent_defaults.policy]\nmax_retries = 5\nlease_duration = '2m'\n\
         [agent_defaults.breaker]\nfailure_rate = 1.0\nno_window = {}\n",
    );
    let loaded = read(&flags, &[]).expect("a config");
    let config = loaded.config().expect("a config");
    assert_eq!(config.agents.defaults.policy.max_retries, Some(5));
    assert_eq!(config.agents.defaults.window, Some(None));
    let shown = loaded.to_string();
    assert!(shown.contains("agent_defaults.policy.lease_duration = \"2m\""), "{shown}");
    let (_dir, again) = with_file(&shown);
    assert_eq!(read(&again, &[]).expect("a config").config(), Ok(config));

    let page = include_str!("../../../../docs/reference/configuration.md");
    let example =
        page.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).expect("it has one");
    let (_dir, flags) = with_file(example);
    let config = read(&flags, &[]).expect("a config").config().expect("the page shows what works");
    assert_eq!(config.agents.defaults.budget_capacity, Some(20.0));

    for (text, wanted) in [
        ("agent_defaults = 5\n", "agent_defaults (from "),
        ("[agent_defaults]\nlease = '2m'\n", "agent_defaults.lease (from "),
        ("[agent_defaults.budget]\ncapacity = 0\n", "agent_defaults.budget.capacity (from "),
    ] {
        let (_dir, flags) = with_file(text);
        let error = error(&flags, &[]);
        assert!(error.starts_with(wanted) && error.contains("ledgerd.toml): "), "{error}");
    }
    // Together with what else is wrong.
    let (_dir, flags) = with_file("log_format = 'xml'\n[agent_defaults]\nmax_waiting = 0\n");
    assert_eq!(error(&flags, &[]).lines().count(), 2);
}

#[test]
fn errors_name_key_value_and_origin() {
    for (key, value) in [
        ("LISTEN", "nowhere"),
        ("LISTEN", "0.0.0.0:7420"),
        ("LISTEN", "[::]:7420"),
        ("HTTP_LISTEN", "7421"),
        ("STORE", "postgres:db"),
        ("STORE", "postgres://db.example.com/ledger?sslmode=require"),
        ("STORE", "postgres://localhost/ledger?sslmode=perhaps"),
        ("STORE", "mysql"),
        ("DATA_DIR", ""),
        ("LOG", "a=b=c"),
        ("LOG_FORMAT", "xml"),
        ("TLS_CERT", ""),
        ("TLS_CLIENT_CA", "ca.pem"),
        ("DRAIN_GRACE", "25"),
        ("DRAIN_GRACE", "-1s"),
        ("DRAIN_GRACE", "2h"),
        ("RETENTION_DONE", "999ms"),
        ("RETENTION_DONE", "never"),
        ("RETENTION_FAILED", "36501d"),
    ] {
        let name = format!("LEDGERD_{key}");
        let error = error(&Flags::default(), &[(&name, value)]);
        let key = key.to_ascii_lowercase();
        assert!(error.starts_with(&format!("{key} = {value:?} (from {name}): ")), "{error}");
    }
    let (_dir, flags) = with_file("lisen = 'x'\n");
    assert!(error(&flags, &[]).contains("lisen"), "{}", error(&flags, &[]));
    let (_dir, flags) = with_file("drain_grace = 25\n");
    assert!(error(&flags, &[]).starts_with("drain_grace (from "), "{}", error(&flags, &[]));
    let (_dir, flags) = with_file("listen = \n");
    assert!(error(&flags, &[]).contains("ledgerd.toml"));
    let missing = Flags { config: Some("/nowhere/x.toml".into()), ..Flags::default() };
    assert!(error(&missing, &[]).starts_with("/nowhere/x.toml: "));
}

#[test]
fn the_network_needs_tls_and_callers_or_a_flag_that_says_so() {
    let everywhere = ("LEDGERD_LISTEN", "0.0.0.0:7420");
    let tls = [("LEDGERD_TLS_CERT", "c.pem"), ("LEDGERD_TLS_KEY", "k.pem")];
    let callers = ("LEDGERD_CALLERS", "callers.toml");
    let client_ca = ("LEDGERD_TLS_CLIENT_CA", "ca.pem");
    for too_little in [vec![everywhere], vec![everywhere, callers], vec![everywhere, tls[0], tls[1]]] {
        let error = error(&Flags::default(), &too_little);
        assert!(error.contains("--i-accept-unauthenticated-network-access"), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        let flags = Flags { i_accept_unauthenticated_network_access: true, ..Flags::default() };
        assert!(read(&flags, &too_little).expect("values").config().expect("accepted").is_open);
    }
    let enough = read(&Flags::default(), &[everywhere, tls[0], tls[1], callers]).expect("values");
    let enough = enough.config().expect("enough");
    assert!(!enough.is_open && enough.tls.is_some_and(|tls| tls.client_ca.is_none()));
    assert_eq!(enough.callers, Some("callers.toml".into()));
    for (incomplete, key) in [
        (vec![tls[0]], "tls_key"),
        (vec![tls[1]], "tls_cert"),
        (vec![client_ca, callers], "tls_client_ca"),
        (vec![tls[0], tls[1], client_ca], "tls_client_ca"),
    ] {
        let error = error(&Flags::default(), &incomplete);
        assert!(error.starts_with(&format!("{key} = ")), "{error}");
    }
}

#[test]
fn probes_may_listen_anywhere_and_nowhere() {
    let http = |value| read(&Flags::default(), &[("LEDGERD_HTTP_LISTEN", value)]).expect("a value").config();
    assert_eq!(http("off").expect("off").http_listen, None);
    assert_eq!(http("0.0.0.0:7421").expect("anywhere").http_listen.map(|at| at.port()), Some(7421));
    assert_eq!(http("localhost:1").expect("a name").http_listen.map(|at| at.port()), Some(1));
}

#[test]
fn the_reference_has_every_key_as_it_is() {
    let page = include_str!("../../../../docs/reference/configuration.md");
    for key in super::loaded::KEYS {
        let name = format!("`{}`", key.name);
        let row = page.lines().find(|line| line.split('|').nth(1).is_some_and(|first| first.contains(&name)));
        let row = row.unwrap_or_else(|| panic!("docs/reference/configuration.md has no row of {name}"));
        let flag = format!("`--{}`", key.name.replace('_', "-"));
        let variable = format!("`LEDGERD_{}`", key.name.to_ascii_uppercase());
        for part in [flag, variable, format!("`{}`", key.default)] {
            assert!(row.contains(&part), "{name}: {part} is not in {row}");
        }
    }
    let table = page.lines().skip_while(|line| !line.starts_with("| key |")).skip(2);
    for row in table.take_while(|line| line.starts_with('|')) {
        let first = row.split('|').nth(1).unwrap_or_default();
        for name in first.split(',').map(|name| name.trim().trim_matches('`')) {
            assert!(super::loaded::KEYS.iter().any(|key| key.name == name), "there is no key {name}");
        }
    }
}

#[test]
fn the_page_has_a_row_for_every_key_and_for_nothing_else() {
    let page = include_str!("../../../../docs/reference/configuration.md");
    let table = page.split("\n## ").next().unwrap_or_default();
    let rows: Vec<&str> = table.lines().filter(|line| line.starts_with("| `")).collect();
    for key in &loaded::KEYS {
        let (flag, variable) = (key.name.replace('_', "-"), key.name.to_ascii_uppercase());
        let said = [
            format!("`{}`", key.name),
            format!("`--{flag}`"),
            format!("`LEDGERD_{variable}`"),
            format!("| `{}` |", key.default),
        ];
        let found = rows.iter().any(|row| said.iter().all(|said| row.contains(said)));
        assert!(found, "docs/reference/configuration.md has no row with all of {said:?}");
    }
    let named = rows
        .iter()
        .filter_map(|row| row.split('|').nth(1))
        .flat_map(|names| names.split('`').skip(1).step_by(2));
    for name in named {
        assert!(loaded::KEYS.iter().any(|key| key.name == name), "{name} is no key");
    }
}

#[test]
fn help_says_the_default_and_the_variable_of_every_key() {
    let command = <Flags as clap::Args>::augment_args(clap::Command::new("serve"));
    for key in super::loaded::KEYS {
        let flag = key.name.replace('_', "-");
        let arg = command.get_arguments().find(|arg| arg.get_long() == Some(&flag));
        let help = arg.and_then(clap::Arg::get_help).map(ToString::to_string).unwrap_or_default();
        let said = format!("[default: {}] [env: LEDGERD_{}]", key.default, key.name.to_ascii_uppercase());
        assert!(help.ends_with(&said), "--{flag}: {help}");
    }
}
