# Every command a person or CI types. Bare `just` lists them; `just ci` is CI.

# Tools from wheels (buf, just, pytest) live here; see .ci/venv.
export PATH := justfile_directory() / "target/venv/bin" + ":" + env("PATH")

# The same for every build below, so that all of them share one set of compiled dependencies.
everything := "--locked --workspace --all-features"

# Beside a server of their own. Most tests wait, for a lease, a restart or the disk: two at once for each core keep the cores busy.
cargo_test := "RUST_TEST_THREADS=$((2 * " + num_cpus() + ")) .ci/postgres cargo test " + everything

# Lists the recipes
_list:
    @{{ quote(just_executable()) }} --list --unsorted

# Compiles everything, dev profile
build:
    cargo build {{ everything }}

# Whatever runs the daemon compiles it as the tests do and not by `cargo build`: dev-dependencies change features of shared
# crates, so that all of them would be compiled twice.

# Runs every test: Rust, the daemon's promises on PostgreSQL once more, then the Python client
test: && python-test
    {{ cargo_test }}
    LEDGERD_TEST_STORE=postgres {{ cargo_test }} --test ledgerd -- --skip replicas:: --skip moving:: --skip postgres

# Checks every interleaving of a few threads on a shared breaker
loom:
    RUSTFLAGS='--cfg loom' CARGO_PROFILE_DEV_OPT_LEVEL=2 cargo test --locked --package breaker-core --test loom --target-dir target/loom

# Runs the tests of a client that knows nothing but proto/
python-test *args: _tools
    cargo test {{ everything }} --no-run
    python -m pytest tests/python {{ args }}

# Checks everything under deploy/, and rolls daemons under load as a cluster would; LEDGERD_REHEARSALS says how often
deploy-check *args: _tools
    tests/deploy/tools
    target/deploy/venv/bin/python tests/deploy/check.py {{ args }}
    cargo test {{ everything }} --no-run
    python tests/deploy/scrape.py
    python tests/deploy/rehearse.py sqlite
    .ci/postgres python tests/deploy/rehearse.py postgres

# Has a real OpenTelemetry Collector, with the configuration of deploy/, take what a daemon exports; builds it, in two minutes
collector-check: _tools
    tests/deploy/tools
    PATH="$PWD/target/deploy/venv/bin:$PATH" GOTOOLCHAIN=local go build -C tests/deploy/collector -buildvcs=false -o ../../../target/deploy/bin/collector .
    cargo test {{ everything }} --no-run
    python tests/deploy/collect.py

# Checks format, proto, clippy and docs; warnings are fatal
lint: _tools
    cargo fmt --all --check
    cd proto && buf lint
    cargo clippy {{ everything }} --all-targets -- -D warnings
    RUSTDOCFLAGS='-D warnings' cargo doc {{ everything }} --no-deps

# Checks what the layout promises: lean leaf crates, short files
tree-check:
    .ci/tree-check

# Writes the client code of the SDKs from proto/; every test run compares it
gen:
    cargo run --quiet --locked --all-features --bin codegen

# Writes the pages of docs/reference that come from the code; every test run compares them
reference:
    LEDGERD_WRITE_REFERENCE=1 cargo test {{ everything }} --bins --lib reference

# Checks advisories, licences, bans and sources of dependencies; needs cargo-deny 0.20
deny:
    cargo deny --locked check

# Shows the main job end to end
demo *args:
    cargo run --quiet --release --locked -- demo {{ args }}

# Counts the instructions of single operations and compares them with what is on record; needs valgrind
counts *args:
    .ci/counts {{ args }}

# Puts every goal beside what this machine can do; about ten minutes and 8 GB of disk
bench *args: counts
    cargo run --quiet --release --locked --package breaker-core --example contended
    cargo run --quiet --release --locked -- bench suite {{ args }}

# The same with fewer and shorter rounds, in under three minutes
bench-quick *args:
    cargo run --quiet --release --locked -- bench suite --quick {{ args }}

# Measures once more for docs/benchmarks.md: goals, curves and plots; in about fifteen minutes
bench-docs *args:
    -cargo run --quiet --release --locked -- bench suite --curves {{ args }} > target/bench.json
    cargo run --quiet --release --locked --package ledger-core --example benchmarks -- target/bench.json

# Loads one daemon as told, and says what that cost
load *args:
    cargo run --quiet --release --locked -- bench {{ args }}

# Measures a healthy agent beside many tasks that cannot run
waiting *args:
    cargo run --quiet --release --locked -- bench waiting {{ args }}

# Runs every attack on the wire for 3 s beside a good client, in the clear and under TLS, and prints its times; about five minutes
attacks ms="3000":
    LEDGERD_ATTACK_MS={{ ms }} cargo test {{ everything }} --test ledgerd -- --nocapture --test-threads 1 from_its_work

# Simulates an outage under several retry policies; writes docs/outage
outage-plot *args:
    cargo run --quiet --release --locked --package ledger-core --example outage -- {{ args }}

# Puts a real daemon through an outage, killing it all the while; writes docs/outage, in about ten minutes
outage *args:
    -cargo run --quiet --release --locked -- bench outage {{ args }} > target/outage.json
    cargo run --quiet --release --locked --package ledger-core --example outage -- --daemon target/outage.json

# All of CI, cheap checks first; `.ci/run` does this on a bare machine
ci: tree-check lint counts loom test deploy-check

_tools:
    @.ci/venv
