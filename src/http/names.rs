//! The names under which this daemon may be addressed. A page whose own name was made to resolve to this machine (DNS
//! rebinding) counts as of the same origin in its browser, and only the `Host` that it sends gives it away.

use super::App;
use super::refusal::Refusal;
use axum::extract::{Request, State};
use axum::http::header::HOST;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Version};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::net::IpAddr;
use std::sync::Arc;

/// Those that no other machine can have, the address that it listens on, and those of http.hosts.
#[derive(Debug, Clone)]
pub struct Names {
    listen: IpAddr,
    hosts: Vec<String>,
}

impl Names {
    /// `hosts` in lower case.
    pub fn new(listen: IpAddr, hosts: &[String]) -> Self {
        Self { listen, hosts: hosts.to_vec() }
    }

    /// `host` as a `Host` header has it. The port says nothing: tunnels and containers change it.
    pub(super) fn has(&self, host: &str) -> bool {
        let Ok(authority) = host.parse::<Authority>() else { return false };
        let name = authority.host();
        let address = name.strip_prefix('[').and_then(|n| n.strip_suffix(']')).unwrap_or(name);
        match address.parse::<IpAddr>() {
            _ if host.contains('@') => false,
            Ok(ip) => {
                let is_listed = || self.hosts.iter().any(|host| host.parse() == Ok(ip));
                ip.is_loopback() || (ip == self.listen && !ip.is_unspecified()) || is_listed()
            }
            Err(_) => {
                let name = name.strip_suffix('.').unwrap_or(name);
                name.eq_ignore_ascii_case("localhost") || self.hosts.iter().any(|host| host.eq_ignore_ascii_case(name))
            }
        }
    }
}

/// As HTTP has it: with two nobody knows which one counts.
/// <https://www.rfc-editor.org/rfc/rfc9112#section-3.2>
pub(super) fn one_host(version: Version, headers: &HeaderMap) -> Result<(), Refusal> {
    match headers.get_all(HOST).iter().count() {
        1 => Ok(()),
        // Which had none.
        0 if version <= Version::HTTP_10 => Ok(()),
        n => Err(Refusal::BadRequest(format!("the request has {n} Host headers: send one"))),
    }
}

/// On a loopback address, what holds rows, or says which there are, is shown under a known name only. Elsewhere whoever
/// gets here may ask under any.
pub(super) async fn known_name(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let names = &app.context.names;
    let host = request.headers().get(HOST);
    let is_known = host.is_none_or(|host| host.to_str().is_ok_and(|host| names.has(host)))
        && request.uri().authority().is_none_or(|authority| names.has(authority.as_str()));
    if is_known || !names.listen.is_loopback() {
        return next.run(request).await;
    }
    Refusal::ForeignHost(host.map(|host| host.as_bytes().escape_ascii().to_string()).unwrap_or_default())
        .into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_other_machine_can_have_and_its_own() {
        let has = |host: &str, listen: &str| Names::new(listen.parse().expect("an address"), &[]).has(host);
        for host in ["localhost", "LocalHost:8787", "localhost.", "127.0.0.1", "127.1.2.3:80", "[::1]:8787", "[::1]"] {
            assert!(has(host, "127.0.0.1"), "{host}");
        }
        for host in [
            "example.com",
            "localhost.example.com",
            "10.0.0.1",
            "0.0.0.0:1",
            "[::]",
            "",
            "a b",
            "127.0.0.1.nip.io",
            "localhost@example.com",
            "example.com@localhost",
        ] {
            assert!(!has(host, "0.0.0.0"), "{host}");
        }
        assert!(has("10.0.0.1:8787", "10.0.0.1") && !has("10.0.0.2", "10.0.0.1"));
    }

    #[test]
    fn further_names_are_those_of_the_configuration() {
        let hosts = ["cache.example", "10.0.0.7", "fd00::7"].map(str::to_owned);
        let names = Names::new("127.0.0.1".parse().expect("an address"), &hosts);
        for host in ["Cache.Example", "cache.example.:80", "10.0.0.7:1", "[fd00:0::7]:8787"] {
            assert!(names.has(host), "{host}");
        }
        for host in ["example", "x.cache.example", "10.0.0.8", "[fd00::8]"] {
            assert!(!names.has(host), "{host}");
        }
    }
}
