//! `ledgerd healthcheck`: for containers and service managers that can only run a program.

use std::process::ExitCode;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// What to ask, and how.
#[derive(Debug, clap::Args)]
pub(crate) struct Healthcheck {
    /// The health service to ask about
    #[arg(long, default_value = "readiness")]
    service: String,
    /// Ask /readyz (or /livez, for the service `liveness`) at this address instead of gRPC
    #[arg(long, value_name = "HOST:PORT", num_args = 0..=1, default_missing_value = "127.0.0.1:7421")]
    http: Option<String>,
    /// Seconds to wait for an answer
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=60))]
    timeout: u64,
}

impl Healthcheck {
    pub(crate) async fn run(self, global: &ledger_cli::Global) -> ExitCode {
        let asked = async {
            match &self.http {
                Some(address) => over_http(address, &self.service).await,
                None => over_grpc(global, &self.service).await,
            }
        };
        let answer = timeout(Duration::from_secs(self.timeout), asked).await;
        let why = match answer {
            Ok(Ok(())) => return ExitCode::SUCCESS,
            Ok(Err(why)) => why,
            Err(_) => "no answer in time".to_owned(),
        };
        let at = self.http.as_deref().unwrap_or(&global.address);
        crate::failed(&format!("{at}: {why}"), 1)
    }
}

async fn over_grpc(global: &ledger_cli::Global, service: &str) -> Result<(), String> {
    let client = global.connect().await.map_err(|error| error.to_string())?;
    let request = HealthCheckRequest { service: service.to_owned() };
    let answer = HealthClient::new(client.connection())
        .check(request)
        .await
        .map_err(|status| status.message().to_owned())?;
    match answer.into_inner().status() {
        ServingStatus::Serving => Ok(()),
        _ => Err(format!("{service:?} is not serving")),
    }
}

/// One request by hand: no client of HTTP is needed for it.
async fn over_http(address: &str, service: &str) -> Result<(), String> {
    let path = if service == "liveness" { "/livez" } else { "/readyz?verbose" };
    let failed = |error: std::io::Error| error.to_string();
    let mut stream = TcpStream::connect(address).await.map_err(failed)?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.map_err(failed)?;
    let mut answer = Vec::new();
    stream.take(16 << 10).read_to_end(&mut answer).await.map_err(failed)?;
    let answer = String::from_utf8_lossy(&answer);
    if answer.starts_with("HTTP/1.1 200") {
        return Ok(());
    }
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Err(body.split('\n').filter(|line| !line.is_empty()).collect::<Vec<_>>().join(", "))
}
