//! An HTTP client for a running daemon.
//!
//! Reads need no token and send none. The token for operations is sent only to the daemon that it belongs to, whatever
//! `--url` says.

use super::{Failure, Said};
use crate::code::Code;
use crate::config::{ClientSettings, Secret};
use crate::token;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;
use ureq::http::{Response, Uri};
use ureq::{Agent, Body};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Applies to event streams, too, which send something every second.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) struct Client {
    /// Without a trailing slash.
    pub base: String,
    agent: Agent,
    /// The settings of the configured daemon, if there is a configuration.
    settings: Option<ClientSettings>,
}

/// Where to send operations.
pub(super) struct Door {
    /// Without a trailing slash.
    pub base: String,
    /// The token, or why there is none.
    pub token: Result<Secret, String>,
}

/// Why there is no answer that helps.
#[derive(Debug)]
pub(super) struct ClientError {
    /// `None` if the daemon has one that is not known here.
    code: Option<Code>,
    text: String,
}

impl ClientError {
    pub(super) fn new(code: Code, text: String) -> Self {
        ClientError { code: Some(code), text }
    }

    /// Something else listens there.
    pub(super) fn by_a_stranger(at: &str, status: u16) -> Self {
        Self::new(Code::NotPrefetchd, format!("{at} answered {status}: is prefetchd running there?"))
    }
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<ClientError> for Failure {
    fn from(ClientError { code, text }: ClientError) -> Self {
        Failure { exit: 1, said: Some(Said { message: text, code }) }
    }
}

/// Says what it means that no answer came.
fn silence(base: &str, error: &ureq::Error) -> ClientError {
    let text = match error {
        ureq::Error::Timeout(ureq::Timeout::Connect) | ureq::Error::ConnectionFailed | ureq::Error::HostNotFound => {
            format!("{base} cannot be reached: {error}")
        }
        ureq::Error::Timeout(_) => format!(
            "{base} accepts connections but does not answer: whatever listens there hangs, or is frozen (state T in ps: kill -CONT \
             goes on with it); if it is prefetchd, restart it"
        ),
        error => format!("{base} does not answer: {error}"),
    };
    ClientError::new(Code::DaemonUnreachable, text)
}

impl Client {
    /// Returns a client for the daemon at `url`, or for the configured one.
    pub(super) fn new(file: Option<&Path>, url: Option<&str>) -> Result<Self, Failure> {
        let (base, settings) = match (url, ClientSettings::load(file)) {
            (Some(url), settings) => (url.to_owned(), settings.ok()),
            (None, settings) => {
                let settings = settings?;
                (own_url(settings.listen)?, Some(settings))
            }
        };
        let base = if base.contains("://") { base } else { format!("http://{base}") };
        Ok(Self::at(&base, settings))
    }

    /// Returns a client for whatever listens there, which may not be prefetchd.
    pub(super) fn of_a_stranger(listen: SocketAddr) -> Result<Self, Failure> {
        Ok(Self::at(&own_url(listen)?, None))
    }

    fn at(base: &str, settings: Option<ClientSettings>) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            // The daemon is on this machine or nearby, where a proxy for the internet cannot reach it.
            .proxy(None)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_per_read(Some(READ_TIMEOUT))
            .build();
        Self { base: base.trim_end_matches('/').to_owned(), agent: Agent::new_with_config(config), settings }
    }

    /// Returns any response, whatever its status.
    pub(super) fn get(&self, path: &str) -> Result<Response<Body>, ClientError> {
        let request = self.agent.get(format!("{}{path}", self.base));
        request.call().map_err(|error| silence(&self.base, &error))
    }

    /// Returns the JSON of a successful response, however long it takes, or the daemon's error message.
    pub(super) fn post(&self, path: &str, body: &serde_json::Value) -> Result<serde_json::Value, ClientError> {
        self.post_within(None, path, body)
    }

    /// The same, for what the daemon answers at once.
    pub(super) fn post_quickly(&self, path: &str, body: &serde_json::Value) -> Result<serde_json::Value, ClientError> {
        self.post_within(Some(READ_TIMEOUT), path, body)
    }

    fn post_within(
        &self,
        each_read: Option<Duration>,
        path: &str,
        body: &serde_json::Value,
    ) -> Result<serde_json::Value, ClientError> {
        let Door { base, token } = self.door();
        let mut request = self.agent.post(format!("{base}{path}")).header("Content-Type", "application/json");
        if let Ok(token) = &token {
            request = request.header("Authorization", format!("Bearer {}", token.expose()));
        }
        let request = request.config().timeout_per_read(each_read).build();
        let mut answer = request.send(body.to_string()).map_err(|error| silence(&base, &error))?;
        let status = answer.status();
        let text = self.text(path, &mut answer)?;
        match serde_json::from_str::<serde_json::Value>(&text) {
            Ok(json) if status.is_success() => Ok(json),
            Ok(json) if json["message"].is_string() => {
                let message = super::printable(json["message"].as_str().unwrap_or_default());
                let text = match token {
                    Err(why) if status.as_u16() == 401 => format!("{message}\nno token was sent: {why}"),
                    _ => message,
                };
                Err(ClientError { code: json["error"].as_str().and_then(Code::of), text })
            }
            _ => Err(ClientError::by_a_stranger(&format!("{base}{path}"), status.as_u16())),
        }
    }

    pub(super) fn text(&self, path: &str, answer: &mut Response<Body>) -> Result<String, ClientError> {
        let broken = |error| ClientError::new(Code::DaemonUnreachable, format!("{}{path}: {error}", self.base));
        answer.body_mut().read_to_string().map_err(broken)
    }

    pub(super) fn door(&self) -> Door {
        let Some(settings) = &self.settings else { return self.door_of_this_machine() };
        match &settings.admin_token {
            Ok(None) => self.door_of_this_machine(),
            Ok(Some(token)) => match meant(&self.base, settings.listen, &settings.hosts) {
                Some(base) => Door { base, token: Ok(token.clone()) },
                None => {
                    let why = format!(
                        "the token in http.admin_token_file is for the daemon at http.listen ({}), and {} is neither that nor \
                         one of http.hosts",
                        settings.listen, self.base
                    );
                    Door { base: self.base.clone(), token: Err(why) }
                }
            },
            Err(error) => Door { base: self.base.clone(), token: Err(error.to_string()) },
        }
    }

    /// Uses the token that `run` has left on this machine.
    fn door_of_this_machine(&self) -> Door {
        let mut wrong = Vec::new();
        for address in addresses(&self.base).into_iter().filter(|address| address.ip().is_loopback()) {
            match token::find(address) {
                // By address, because a name might lead to another program.
                Ok(token) => return Door { base: format!("http://{address}"), token: Ok(token.into()) },
                Err(why) => wrong.push(why),
            }
        }
        if wrong.is_empty() {
            wrong.push(format!("{} is not this machine, where `run` leaves its token", self.base));
        }
        Door { base: self.base.clone(), token: Err(wrong.join("; ")) }
    }

    /// Returns the JSON of a response with one of these statuses, and its text.
    pub(super) fn json(&self, path: &str, good: &[u16]) -> Result<(serde_json::Value, String), ClientError> {
        let mut answer = self.get(path)?;
        let status = answer.status().as_u16();
        let text = self.text(path, &mut answer)?;
        match serde_json::from_str(&text) {
            Ok(json) if good.contains(&status) => Ok((json, text)),
            _ => Err(ClientError::by_a_stranger(&format!("{}{path}", self.base), status)),
        }
    }
}

/// Returns where to send operations if `base` addresses the daemon that listens on `listen` and has these additional
/// names.
fn meant(base: &str, listen: SocketAddr, hosts: &[String]) -> Option<String> {
    let is_its_own = |at: &SocketAddr| {
        let everywhere = listen.ip().is_unspecified() && at.ip().is_loopback() && (listen.is_ipv6() || at.is_ipv4());
        (at.ip() == listen.ip() || everywhere) && (at.port() == listen.port() || listen.port() == 0)
    };
    if let Some(at) = addresses(base).into_iter().find(is_its_own) {
        return Some(format!("http://{at}"));
    }
    let url = base.parse::<Uri>().ok()?;
    let host = url.host()?.trim_matches(['[', ']']);
    hosts.iter().any(|name| name.eq_ignore_ascii_case(host)).then(|| base.to_owned())
}

/// Returns the addresses in a URL without a DNS lookup. Of names, only `localhost` has any.
fn addresses(base: &str) -> Vec<SocketAddr> {
    let Ok(url) = base.parse::<Uri>() else { return Vec::new() };
    let (Some("http"), Some(host)) = (url.scheme_str(), url.host()) else { return Vec::new() };
    let ips: Vec<IpAddr> = if host.eq_ignore_ascii_case("localhost") {
        vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]
    } else {
        host.trim_matches(['[', ']']).parse().into_iter().collect()
    };
    let port = url.port_u16().unwrap_or(80);
    ips.into_iter().map(|ip| SocketAddr::new(ip, port)).collect()
}

fn own_url(listen: SocketAddr) -> Result<String, Failure> {
    if listen.port() == 0 {
        return Err(Failure::config(
            Code::UrlNeeded,
            "http.listen has port 0, so any port may be the daemon's: give --url, as its log names it",
        ));
    }
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    Ok(format!("http://{}", SocketAddr::new(ip, listen.port())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_to_listen_on_becomes_one_to_ask() {
        for (listen, url) in [
            ("127.0.0.1:8787", "http://127.0.0.1:8787"),
            ("0.0.0.0:1", "http://127.0.0.1:1"),
            ("[::]:1", "http://[::1]:1"),
            ("10.0.0.1:80", "http://10.0.0.1:80"),
        ] {
            assert_eq!(own_url(listen.parse().unwrap()).ok().as_deref(), Some(url));
        }
        assert!(own_url("127.0.0.1:0".parse().unwrap()).is_err());
    }

    #[test]
    fn a_url_names_addresses_only_where_it_says_so() {
        for (url, named) in [
            ("http://127.0.0.1:8787", &["127.0.0.1:8787"][..]),
            ("http://LOCALHOST:1", &["127.0.0.1:1", "[::1]:1"]),
            ("http://[::1]:1/", &["[::1]:1"]),
            ("http://127.0.0.1", &["127.0.0.1:80"]),
            ("http://127.0.0.1:8787@evil.example/", &[]),
            ("http://localhost.evil.example:8787", &[]),
            ("http://10.0.0.1:8787", &["10.0.0.1:8787"]),
            ("https://127.0.0.1:8787", &[]),
            ("nonsense", &[]),
        ] {
            let expected: Vec<SocketAddr> = named.iter().map(|address| address.parse().unwrap()).collect();
            assert_eq!(addresses(url), expected, "{url}");
        }
    }

    #[test]
    fn a_configured_token_is_for_its_own_daemon() {
        let hosts = ["cache.example".to_owned()];
        for (url, listen, base) in [
            ("http://127.0.0.1:8787", "127.0.0.1:8787", Some("http://127.0.0.1:8787")),
            ("http://localhost:8787", "[::1]:8787", Some("http://[::1]:8787")),
            ("http://localhost:8787", "0.0.0.0:8787", Some("http://127.0.0.1:8787")),
            ("http://[::1]:8787", "0.0.0.0:8787", None),
            ("http://127.0.0.1:4711", "127.0.0.1:0", Some("http://127.0.0.1:4711")),
            ("http://127.0.0.1:4711", "127.0.0.1:8787", None),
            ("http://127.0.0.2:8787", "127.0.0.1:8787", None),
            ("http://10.0.0.1:8787", "0.0.0.0:8787", None),
            ("http://10.0.0.1:8787", "10.0.0.1:8787", Some("http://10.0.0.1:8787")),
            ("http://Cache.Example/prefetchd", "127.0.0.1:8787", Some("http://Cache.Example/prefetchd")),
            ("http://cache.example@evil.example", "127.0.0.1:8787", None),
            ("http://evil.example", "127.0.0.1:8787", None),
        ] {
            assert_eq!(meant(url, listen.parse().unwrap(), &hosts).as_deref(), base, "{url} and {listen}");
        }
    }
}
