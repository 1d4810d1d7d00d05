//! The names under which this daemon may be addressed. With DNS rebinding, a foreign page's own name resolves to this
//! machine; its browser then sees a single origin, and only the `Host` header reveals the attack.

use super::refusal::Refusal;
use axum::http::header::HOST;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Version};
use std::net::IpAddr;

/// Names that no other machine can have, the address that the daemon listens on, and those in http.hosts.
#[derive(Debug, Clone)]
pub struct Names {
    listen: IpAddr,
    hosts: Vec<String>,
}

impl Names {
    /// `hosts` must be in lower case.
    pub fn new(listen: IpAddr, hosts: &[String]) -> Self {
        Self { listen, hosts: hosts.to_vec() }
    }

    pub(super) fn are_of_loopback(&self) -> bool {
        self.listen.is_loopback()
    }

    /// `host` as in a `Host` header. The port is ignored: tunnels and containers change it.
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

/// Requires a single `Host` header, as HTTP does: with two it would be unclear which one counts.
/// <https://www.rfc-editor.org/rfc/rfc9112#section-3.2>
pub(super) fn one_host(version: Version, headers: &HeaderMap) -> Result<(), Refusal> {
    match headers.get_all(HOST).iter().count() {
        1 => Ok(()),
        // HTTP/1.0 did not require one.
        0 if version <= Version::HTTP_10 => Ok(()),
        n => Err(Refusal::BadRequest(format!("the request has {n} Host headers: send one"))),
    }
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
