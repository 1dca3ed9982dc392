//! The way to a daemon: where it is, how to trust it, and how to say who one is.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Uri};
use tonic::{Request, Status};
use tower::service_fn;

use crate::client::{ADDRESS_VARIABLE, Client, DEFAULT_ADDRESS};
use crate::clock;
use crate::dial::Dialer;
use crate::error::Error;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection that sends the token, where there is one, with every call.
pub type Connection = InterceptedService<Channel, Bearer>;

/// Sends a token with every call. Shows it to nobody.
#[derive(Clone, Default)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl fmt::Debug for Bearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Bearer(***)" } else { "Bearer(none)" })
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

/// How to connect, beyond an address: see [`Client::builder`].
#[derive(Clone)]
pub struct ClientBuilder {
    address: String,
    ca: Option<Vec<u8>>,
    identity: Option<(Vec<u8>, Vec<u8>)>,
    bearer: Bearer,
}

/// Keys and tokens are shown to nobody.
impl fmt::Debug for ClientBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientBuilder")
            .field("address", &self.address)
            .field("has_ca", &self.ca.is_some())
            .field("has_certificate", &self.identity.is_some())
            .field("bearer", &self.bearer)
            .finish()
    }
}

impl ClientBuilder {
    pub(crate) fn new(address: &str) -> Self {
        Self { address: address.to_owned(), ca: None, identity: None, bearer: Bearer::default() }
    }

    /// As the environment says: `LEDGERD_ADDRESS`, `LEDGERD_TLS_CA`, `LEDGERD_CLIENT_CERT` with `LEDGERD_CLIENT_KEY`, and
    /// `LEDGERD_TOKEN_FILE` or `LEDGERD_TOKEN`. What is not set or empty is left out.
    ///
    /// # Errors
    ///
    /// [`Error::Credentials`] when a file cannot be read or a token cannot be one.
    pub fn from_env() -> Result<Self, Error> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let address = variable(ADDRESS_VARIABLE);
        let mut builder = Self::new(address.as_deref().unwrap_or(DEFAULT_ADDRESS));
        if let Some(ca) = variable("LEDGERD_TLS_CA") {
            builder = builder.ca_file(ca)?;
        }
        match (variable("LEDGERD_CLIENT_CERT"), variable("LEDGERD_CLIENT_KEY")) {
            (Some(cert), Some(key)) => builder = builder.certificate_files(cert, key)?,
            (None, None) => {}
            _ => return Err(fault("set both LEDGERD_CLIENT_CERT and LEDGERD_CLIENT_KEY, or neither")),
        }
        builder.token_from_env()
    }

    /// The token in the file that `LEDGERD_TOKEN_FILE` names, else the one in `LEDGERD_TOKEN`; none when neither is set.
    ///
    /// # Errors
    ///
    /// [`Error::Credentials`] when the file cannot be read or what is there cannot be a token.
    pub fn token_from_env(self) -> Result<Self, Error> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        match (variable("LEDGERD_TOKEN_FILE"), variable("LEDGERD_TOKEN")) {
            (Some(file), _) => self.token_file(file),
            (None, Some(token)) => self.token(&token),
            (None, None) => Ok(self),
        }
    }

    /// Trusts daemons whose certificate comes from an authority in this PEM file, and no others. Without it the
    /// authorities that browsers trust count. Turns TLS on for an address without `http://`.
    ///
    /// # Errors
    ///
    /// [`Error::Credentials`] when the file cannot be read.
    pub fn ca_file(mut self, path: impl AsRef<Path>) -> Result<Self, Error> {
        self.ca = Some(read(path.as_ref())?);
        Ok(self)
    }

    /// Shows the certificate in this PEM file, whose key is in the other. Turns TLS on for an address without `http://`.
    ///
    /// # Errors
    ///
    /// [`Error::Credentials`] when one of them cannot be read.
    pub fn certificate_files(mut self, cert: impl AsRef<Path>, key: impl AsRef<Path>) -> Result<Self, Error> {
        self.identity = Some((read(cert.as_ref())?, read(key.as_ref())?));
        Ok(self)
    }

    /// Sends this token with every call.
    ///
    /// # Errors
    ///
    /// [`Error::Credentials`] when it cannot be a token.
    pub fn token(mut self, token: &str) -> Result<Self, Error> {
        let token = token.trim();
        let good = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
        let value = format!("Bearer {token}").parse::<MetadataValue<Ascii>>().ok().filter(|_| good);
        let mut value = value.ok_or_else(|| fault("the token is empty, or has characters that none has"))?;
        value.set_sensitive(true);
        self.bearer = Bearer(Some(value));
        Ok(self)
    }

    /// Sends the token in this file with every call. It is read once.
    ///
    /// # Errors
    ///
    /// [`Error::Credentials`] when it cannot be read or holds no token.
    pub fn token_file(self, path: impl AsRef<Path>) -> Result<Self, Error> {
        let text = String::from_utf8(read(path.as_ref())?)
            .map_err(|_| fault(&format!("{} holds no token", path.as_ref().display())))?;
        self.token(&text)
    }

    /// Connects; see [`Client::connect`].
    ///
    /// # Errors
    ///
    /// As [`Client::connect`], and [`Error::Credentials`] when files hold no certificates.
    pub async fn connect(self) -> Result<Client, Error> {
        let (endpoint, dialer) = self.places()?;
        let connected = match dialer {
            Some(dialer) => {
                endpoint.connect_with_connector(service_fn(move |_: Uri| dialer.clone().dial())).await
            }
            None => endpoint.connect().await,
        };
        let channel = connected.map_err(|error| Error::Unavailable {
            reason: String::new(),
            message: format!("cannot connect to {}: {}", self.address, root_cause(&error)),
            retry_after: None,
        })?;
        Ok(Client::over(InterceptedService::new(channel, self.bearer)))
    }

    /// Connects with the first call; see [`Client::lazy`].
    ///
    /// # Errors
    ///
    /// As [`Client::lazy`], and [`Error::Credentials`] when files hold no certificates.
    pub fn lazy(self) -> Result<Client, Error> {
        let (endpoint, dialer) = self.places()?;
        let channel = match dialer {
            Some(dialer) => {
                endpoint.connect_with_connector_lazy(service_fn(move |_: Uri| dialer.clone().dial()))
            }
            None => endpoint.connect_lazy(),
        };
        Ok(Client::over(InterceptedService::new(channel, self.bearer)))
    }

    /// Where to connect, and who dials where there are several addresses.
    fn places(&self) -> Result<(Endpoint, Option<Dialer>), Error> {
        let places: Vec<Place<'_>> = self
            .address
            .split(',')
            .map(|address| Place::read(address.trim(), self.ca.is_some() || self.identity.is_some()))
            .collect::<Result<_, _>>()?;
        let bad =
            |message: &str| Error::Address { address: self.address.clone(), message: message.to_owned() };
        let first = places.first().ok_or_else(|| bad(EXPECTED))?;
        if places.iter().any(|place| place.is_secure != first.is_secure) {
            return Err(bad("write all of them with https:// or none"));
        }
        if self.bearer.0.is_some() && !first.is_secure && !places.iter().all(Place::is_here) {
            return Err(bad("a token is not sent over a network in the clear; use https://"));
        }
        let endpoint = self.endpoint(first)?;
        let dialer = match places.len() {
            1 => None,
            _ => {
                let all = places.iter().map(|place| place.authority.to_owned());
                Some(Dialer::new(all.collect(), clock::draw() as usize))
            }
        };
        Ok((endpoint, dialer))
    }

    fn endpoint(&self, place: &Place<'_>) -> Result<Endpoint, Error> {
        let bad = |_| Error::Address { address: place.authority.to_owned(), message: EXPECTED.to_owned() };
        let scheme = if place.is_secure { "https" } else { "http" };
        let endpoint = Endpoint::from_shared(format!("{scheme}://{}", place.authority)).map_err(bad)?;
        let endpoint =
            endpoint.user_agent(concat!("ledgerd-client/", env!("CARGO_PKG_VERSION"))).map_err(bad)?;
        let endpoint = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(20))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true)
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(4 << 20);
        if !place.is_secure {
            return Ok(endpoint);
        }
        let tls = match &self.ca {
            Some(pem) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)),
            None => ClientTlsConfig::new().with_webpki_roots(),
        };
        let tls = match &self.identity {
            Some((cert, key)) => tls.identity(Identity::from_pem(cert, key)),
            None => tls,
        };
        endpoint.tls_config(tls).map_err(|error| fault(&format!("TLS: {}", root_cause(&error))))
    }
}

const EXPECTED: &str = "expected host:port, http://host:port or https://host:port";

/// One address.
struct Place<'a> {
    authority: &'a str,
    is_secure: bool,
}

impl<'a> Place<'a> {
    /// `is_secure`: what holds for an address that does not say.
    fn read(address: &'a str, is_secure: bool) -> Result<Self, Error> {
        let (rest, is_secure) = match (address.strip_prefix("https://"), address.strip_prefix("http://")) {
            (Some(rest), _) => (rest, true),
            (None, Some(rest)) => (rest, false),
            (None, None) => (address, is_secure),
        };
        let authority = rest.trim_end_matches('/');
        let good = authority.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty() && port.parse::<u16>().is_ok() && !authority.contains('/')
        });
        match good {
            true => Ok(Self { authority, is_secure }),
            false => Err(Error::Address { address: address.to_owned(), message: EXPECTED.to_owned() }),
        }
    }

    /// Whether it is on this machine, whose own network nobody else hears.
    fn is_here(&self) -> bool {
        let host = self.authority.rsplit_once(':').map_or(self.authority, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|error| fault(&format!("{}: {error}", path.display())))
}

fn fault(message: &str) -> Error {
    Error::Credentials { message: message.to_owned() }
}

/// What is behind an error of the transport, whose own words say little.
pub(crate) fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(address: &str) -> Result<(Endpoint, Option<Dialer>), Error> {
        ClientBuilder::new(address).places()
    }

    #[test]
    fn addresses_are_host_and_port_with_or_without_scheme() {
        for good in [
            "localhost:7420",
            "127.0.0.1:7420",
            "http://ledger.internal:80/",
            "[::1]:7420",
            "https://host:7420",
        ] {
            assert!(matches!(places(good), Ok((_, None))), "{good}");
        }
        for several in ["a:1,b:2", "a:1, http://b:2", "https://a:1,https://b:2"] {
            assert!(matches!(places(several), Ok((_, Some(_)))), "{several}");
        }
        for bad in [
            "",
            "localhost",
            ":7420",
            "host:notaport",
            "http://host:1/path",
            "a b:1",
            "a:1,",
            "a:1,b",
            "https://a:1,http://b:2",
        ] {
            assert!(matches!(places(bad), Err(Error::Address { .. })), "{bad}");
        }
    }

    #[test]
    fn a_token_is_hidden_and_stays_off_open_networks() {
        let with = |address: &str| ClientBuilder::new(address).token(" ldg_secret\n").expect("a token");
        for safe in ["https://ledger.example:7420", "127.0.0.1:7420", "localhost:1", "[::1]:1"] {
            assert!(with(safe).places().is_ok(), "{safe}");
        }
        for open in ["ledger.example:7420", "127.0.0.1:1,10.0.0.1:1"] {
            let error = with(open).places().expect_err(open);
            assert!(error.to_string().contains("in the clear"), "{error}");
        }
        let shown = format!("{:?}", with("127.0.0.1:1"));
        assert!(!shown.contains("secret"), "{shown}");
        for none in ["", " ", "a b", "a\u{7f}"] {
            assert!(
                matches!(ClientBuilder::new("a:1").token(none), Err(Error::Credentials { .. })),
                "{none:?}"
            );
        }
    }
}
