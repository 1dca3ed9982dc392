//! Which PostgreSQL servers a daemon trusts with a ledger: those that keep what they acknowledge, and prove who they are.

use crate::postgres::{Server, is_root};
use crate::support::*;
use std::path::Path;
use std::process::Command;

/// What a daemon says that cannot start, and its exit code.
fn refused(store: &str) -> (Option<i32>, String) {
    let output = command()
        .args(["serve", "--listen", "127.0.0.1:0", "--http-listen", "off", "--store", store])
        .output()
        .expect("the binary starts");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn assert_refused(store: &str, sentence: &str) {
    let (code, said) = refused(store);
    assert_eq!(code, Some(78), "{said}");
    let told = said.lines().filter(|line| line.contains("PostgreSQL at")).count();
    assert!(told == 1 && said.contains(sentence), "{sentence:?} once in\n{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_may_lose_commits_is_refused() {
    if postgres::server().is_none() {
        return;
    }
    let server = Server::start();
    let folder = Folder::new();
    let store = postgres::database(&server.url, &folder);
    let serves = async |folder| {
        let daemon = Daemon::start_with(folder, "127.0.0.1:0", &["--store", &store]);
        daemon.client().await;
    };
    serves(folder.clone()).await;
    for (setting, sentence) in [
        ("fsync=off", "runs with fsync=off, so a crash may take commits that were spoken of; set fsync=on"),
        ("full_page_writes=off", "runs with full_page_writes=off, so a crash may tear its pages"),
    ] {
        server.control(&["-o", &format!("-c {setting}"), "-m", "fast", "restart"]);
        assert_refused(&store, sentence);
    }
    // As a base backup leaves it that is to follow another server: it answers reads, and takes no writes.
    server.control(&["-m", "fast", "stop"]);
    std::fs::write(Path::new(&server.data).join("standby.signal"), "").expect("the folder is writable");
    server.control(&["start"]);
    assert_eq!(crate::postgres::ask(&store, "SELECT count(*) FROM task_history"), "0");
    assert_refused(&store, "is a standby, which takes no writes; name the primary");
    server.control(&["promote"]);
    serves(folder).await;
}

/// Makes an authority `name`.pem, and what it signs for `host` as `name`-server.pem and .key.
fn authority(folder: &Path, name: &str, host: &str) {
    let config = format!(
        "[req]\ndistinguished_name = name\nprompt = no\n[name]\nCN = {name}\n\
         [authority]\nbasicConstraints = critical, CA:TRUE\nkeyUsage = critical, keyCertSign\n\
         [server]\nbasicConstraints = critical, CA:FALSE\nsubjectAltName = DNS:{host}\n"
    );
    std::fs::write(folder.join(format!("{name}.cnf")), config).expect("the folder is writable");
    let openssl = |words: String| {
        let done = Command::new("openssl").args(words.split(' ')).current_dir(folder).output();
        let done = done.expect("openssl makes the certificates of this test");
        assert!(done.status.success(), "{words}: {}", String::from_utf8_lossy(&done.stderr));
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(format!(
        "req -x509 {key} -days 2 -config {name}.cnf -extensions authority -keyout {name}.key -out {name}.pem"
    ));
    openssl(format!("req {key} -config {name}.cnf -keyout {name}-server.key -out {name}-server.csr"));
    openssl(format!(
        "x509 -req -in {name}-server.csr -CA {name}.pem -CAkey {name}.key -CAcreateserial -days 2 -extfile {name}.cnf \
         -extensions server -out {name}-server.pem"
    ));
}

/// Puts a file where the server finds it, as its own.
fn give(server: &Server, from: &Path, name: &str) {
    let to = Path::new(&server.data).join(name);
    let mut install = Command::new("install");
    if is_root() {
        install.args(["-o", "postgres"]);
    }
    let done = install.args(["-m", "600"]).arg(from).arg(to).status();
    assert!(done.is_ok_and(|status| status.success()), "{name} is installed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_proves_by_its_certificate_that_it_is_the_one_that_was_named() {
    if postgres::server().is_none() {
        return;
    }
    let server = Server::start();
    let folder = Folder::new();
    let plain = postgres::database(&server.url, &folder);
    let to = |host: &str, authority: &str| {
        let named = plain.replace("127.0.0.1", host);
        let authority = folder.path().join(authority);
        format!("{named}?sslmode=verify-full&sslrootcert={}", authority.display())
    };
    authority(folder.path(), "ours", "localhost");
    authority(folder.path(), "others", "localhost");
    assert_refused(&to("localhost", "ours.pem"), "does not prove who it is: server does not support TLS");
    give(&server, &folder.path().join("ours-server.pem"), "server.crt");
    give(&server, &folder.path().join("ours-server.key"), "server.key");
    server.control(&["-o", "-c ssl=on", "-m", "fast", "restart"]);

    let daemon =
        Daemon::start_with(folder.clone(), "127.0.0.1:0", &["--store", &to("localhost", "ours.pem")]);
    let client = daemon.client().await;
    let id = enqueue(&client, task("a")).await;
    assert_eq!(history(&client, &id).await.len(), 1);
    let secret = "SELECT count(*) > 2 AND bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) \
        WHERE application_name LIKE 'ledgerd%'";
    assert_eq!(crate::postgres::ask(&plain, secret), "t", "each of its connections is encrypted");

    for (store, sentence) in [
        // Its certificate is for localhost.
        (
            to("127.0.0.1", "ours.pem"),
            "does not prove who it is: invalid peer certificate: certificate not valid for name",
        ),
        (to("localhost", "others.pem"), "does not prove who it is: invalid peer certificate: UnknownIssuer"),
        (to("localhost", "none.pem"), "a file of certificates cannot be read"),
    ] {
        assert_refused(&store, sentence);
    }
}
