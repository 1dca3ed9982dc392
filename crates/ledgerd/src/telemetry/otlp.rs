//! Exporters over OTLP, gRPC or HTTP. The library reads most of what the environment says of them; not the certificates.

use super::asked::{Signal, of_signal};
use super::bulk::{Load, Loaded};
use opentelemetry_otlp::tonic_types::transport::{Certificate, ClientTlsConfig, Identity};
use opentelemetry_otlp::{
    ExporterBuildError, LogExporter, MetricExporter, SpanExporter, WithHttpConfig, WithTonicConfig,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::fmt::Write as _;
use std::time::Duration;

/// Certificates for the transport, as PEM. The library reads none of the variables that name them.
#[derive(Default)]
struct Certificates {
    /// Whom to trust, besides those whom this machine trusts.
    root: Option<Vec<u8>>,
    /// Our own, and its key.
    identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl Certificates {
    /// None where the environment names none.
    fn read(signal: Signal) -> Result<Option<Self>, String> {
        let read = |name: &str, what: &str, is_there: fn(&[u8]) -> bool| {
            let Some((name, path)) = of_signal(signal, name) else { return Ok(None) };
            match std::fs::read(&path) {
                // Libraries take a file with nothing in it for none.
                Ok(pem) if !is_there(&pem) => Err(format!("{name}: there is no {what} in {path}")),
                Ok(pem) => Ok(Some(pem)),
                Err(error) => Err(format!("{name}: cannot read {path}: {error}")),
            }
        };
        let is_certificate = |pem: &[u8]| CertificateDer::from_pem_slice(pem).is_ok();
        let root = read("CERTIFICATE", "certificate", is_certificate)?;
        let (own, its_key) = ("CLIENT_CERTIFICATE", "CLIENT_KEY");
        if of_signal(signal, own).is_some() != of_signal(signal, its_key).is_some() {
            let name = "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE";
            return Err(format!("{name} and OTEL_EXPORTER_OTLP_CLIENT_KEY: set both or neither"));
        }
        let certificate = read(own, "certificate", is_certificate)?;
        let key = read(its_key, "key", |pem| PrivateKeyDer::from_pem_slice(pem).is_ok())?;
        let identity = certificate.zip(key);
        Ok((root.is_some() || identity.is_some()).then_some(Self { root, identity }))
    }

    /// For gRPC.
    fn of_grpc(self) -> ClientTlsConfig {
        let mut config = ClientTlsConfig::new().with_enabled_roots();
        if let Some(root) = self.root {
            config = config.ca_certificate(Certificate::from_pem(root));
        }
        if let Some((certificate, key)) = self.identity {
            config = config.identity(Identity::from_pem(certificate, key));
        }
        config
    }

    /// A client for HTTP.
    fn of_http(self, timeout: Duration) -> Result<reqwest::blocking::Client, String> {
        let mut builder = reqwest::blocking::Client::builder().timeout(timeout);
        if let Some(root) = self.root {
            let roots = reqwest::Certificate::from_pem_bundle(&root).map_err(|error| unusable(&error))?;
            builder = builder.tls_certs_merge(roots);
        }
        if let Some((mut identity, key)) = self.identity {
            identity.push(b'\n');
            identity.extend(key);
            let identity = reqwest::Identity::from_pem(&identity).map_err(|error| unusable(&error))?;
            builder = builder.identity(identity);
        }
        // It has a runtime of its own, which may not be made or dropped within another.
        let built = std::thread::spawn(move || builder.build()).join();
        built.expect("it does not panic").map_err(|error| unusable(&error))
    }
}

/// Why certificates are refused: the cause too, as the error itself says little.
fn unusable(error: &dyn std::error::Error) -> String {
    let mut text = format!("the certificates of OTLP cannot be used: {error}");
    let mut cause = error.source();
    while let Some(inner) = cause {
        let _ = write!(text, ": {inner}");
        cause = inner.source();
    }
    text
}

/// Whether a signal travels over gRPC; else it is HTTP, as the specification has it where nothing is said.
fn is_grpc(signal: Signal) -> bool {
    of_signal(signal, "PROTOCOL").is_some_and(|(_, protocol)| protocol == "grpc")
}

/// How long one export over HTTP may take. A client that the library does not make has to be told.
fn timeout(signal: Signal) -> Duration {
    let given = of_signal(signal, "TIMEOUT").and_then(|(_, millis)| millis.parse().ok());
    given.map_or(opentelemetry_otlp::OTEL_EXPORTER_OTLP_TIMEOUT_DEFAULT, Duration::from_millis)
}

/// The exporter of a signal; each kind has a builder of its own, of the same shape.
macro_rules! exporter {
    ($(#[$about:meta])* $name:ident, $exporter:ty, $signal:expr) => {
        $(#[$about])*
        pub(super) fn $name() -> Result<$exporter, String> {
            let builder = <$exporter>::builder();
            let built = match Certificates::read($signal)? {
                Some(given) if is_grpc($signal) => builder.with_tonic().with_tls_config(given.of_grpc()).build(),
                Some(given) => builder.with_http().with_http_client(given.of_http(timeout($signal))?).build(),
                None => builder.build(),
            };
            built.map_err(|error: ExporterBuildError| error.to_string())
        }
    };
}

exporter! {
    /// For spans.
    spans_alone, SpanExporter, Signal::Traces
}

/// For spans, and where those of tasks can be put to leave with its own: over HTTP, unless it compresses what it sends.
pub(super) fn spans() -> Result<(SpanExporter, Option<Load>), String> {
    let is_protobuf = of_signal(Signal::Traces, "PROTOCOL").is_none_or(|(_, is)| is == "http/protobuf");
    let is_plain = of_signal(Signal::Traces, "COMPRESSION").is_none_or(|(_, how)| how == "none");
    if !is_protobuf || !is_plain {
        return spans_alone().map(|exporter| (exporter, None));
    }
    let certificates = Certificates::read(Signal::Traces)?.unwrap_or_default();
    let (client, load) = (certificates.of_http(timeout(Signal::Traces))?, Load::default());
    let client = Loaded { client, load: load.clone() };
    let built = SpanExporter::builder().with_http().with_http_client(client).build();
    built.map(|exporter| (exporter, Some(load))).map_err(|error| error.to_string())
}

exporter! {
    /// For metrics.
    metrics, MetricExporter, Signal::Metrics
}
exporter! {
    /// For records of the log.
    logs, LogExporter, Signal::Logs
}
