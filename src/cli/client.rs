//! Asks a running daemon, over HTTP.

use super::Failure;
use crate::config::{ClientSettings, Secret};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;
use ureq::http::Response;
use ureq::{Agent, Body};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Also of an event stream, which says something every second.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) struct Client {
    /// Without a slash at its end.
    pub base: String,
    agent: Agent,
    token: Option<Secret>,
}

impl Client {
    /// Of the daemon at `url`, or of the one that the configuration describes.
    pub(super) fn new(file: Option<&Path>, url: Option<&str>) -> Result<Self, Failure> {
        let (base, token) = match (url, ClientSettings::load(file)) {
            // The token is not the given daemon's if the configuration is not; reads need none.
            (Some(url), settings) => (url.to_owned(), settings.ok().and_then(|s| s.admin_token.ok().flatten())),
            (None, settings) => {
                let settings = settings?;
                (own_url(settings.listen)?, settings.admin_token.ok().flatten())
            }
        };
        let base = if base.contains("://") { base } else { format!("http://{base}") };
        Ok(Self::at(&base, token))
    }

    /// Of whatever listens there, which may be no prefetchd: it gets no token.
    pub(super) fn of_a_stranger(listen: SocketAddr) -> Result<Self, Failure> {
        Ok(Self::at(&own_url(listen)?, None))
    }

    fn at(base: &str, token: Option<Secret>) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            // A daemon is next to us; a proxy for the outer world does not know it.
            .proxy(None)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_per_read(Some(READ_TIMEOUT))
            .build();
        Self { base: base.trim_end_matches('/').to_owned(), agent: Agent::new_with_config(config), token }
    }

    /// Any answer, whatever its status.
    pub(super) fn get(&self, path: &str) -> Result<Response<Body>, String> {
        let mut request = self.agent.get(format!("{}{path}", self.base));
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {}", token.expose()));
        }
        request.call().map_err(|error| format!("{} does not answer: {error}", self.base))
    }

    /// The JSON of a good answer, however long it takes; else what the daemon says of it.
    pub(super) fn post(&self, path: &str, body: &serde_json::Value) -> Result<serde_json::Value, String> {
        let mut request = self.agent.post(format!("{}{path}", self.base)).header("Content-Type", "application/json");
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {}", token.expose()));
        }
        let request = request.config().timeout_per_read(None).build();
        let mut answer =
            request.send(body.to_string()).map_err(|error| format!("{} does not answer: {error}", self.base))?;
        let status = answer.status();
        let text = answer.body_mut().read_to_string().map_err(|error| format!("{}{path}: {error}", self.base))?;
        match serde_json::from_str::<serde_json::Value>(&text) {
            Ok(json) if status.is_success() => Ok(json),
            Ok(json) if json["message"].is_string() => {
                Err(super::printable(json["message"].as_str().unwrap_or_default()))
            }
            _ => Err(format!("{}{path} answered {}: is that a prefetchd?", self.base, status.as_u16())),
        }
    }

    /// The JSON of an answer with one of these statuses, and its text.
    pub(super) fn json(&self, path: &str, good: &[u16]) -> Result<(serde_json::Value, String), String> {
        let mut answer = self.get(path)?;
        let status = answer.status().as_u16();
        let text = answer.body_mut().read_to_string().map_err(|error| format!("{}{path}: {error}", self.base))?;
        match serde_json::from_str(&text) {
            Ok(json) if good.contains(&status) => Ok((json, text)),
            _ => Err(format!("{}{path} answered {status}: is that a prefetchd?", self.base)),
        }
    }
}

fn own_url(listen: SocketAddr) -> Result<String, Failure> {
    if listen.port() == 0 {
        return Err(Failure::config(
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
}
