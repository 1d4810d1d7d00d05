//! The names under which this daemon may be addressed. A page whose own name was made to resolve to this machine (DNS
//! rebinding) counts as of the same origin in its browser, and only the `Host` that it sends gives it away.

use axum::http::uri::Authority;
use std::net::IpAddr;

/// Beside those that no other machine can have: the address that it listens on.
#[derive(Debug, Clone)]
pub struct Names {
    listen: IpAddr,
}

impl Names {
    pub fn new(listen: IpAddr) -> Self {
        Self { listen }
    }

    /// `host` as a `Host` header has it. The port says nothing: tunnels and containers change it.
    pub(super) fn has(&self, host: &str) -> bool {
        let Ok(authority) = host.parse::<Authority>() else { return false };
        let name = authority.host();
        let address = name.strip_prefix('[').and_then(|n| n.strip_suffix(']')).unwrap_or(name);
        match address.parse::<IpAddr>() {
            Ok(ip) => ip.is_loopback() || (ip == self.listen && !ip.is_unspecified()),
            Err(_) => name.eq_ignore_ascii_case("localhost"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_other_machine_can_have_and_its_own() {
        let has = |host: &str, listen: &str| Names::new(listen.parse().expect("an address")).has(host);
        for host in ["localhost", "LocalHost:8787", "127.0.0.1", "127.1.2.3:80", "[::1]:8787", "[::1]"] {
            assert!(has(host, "127.0.0.1"), "{host}");
        }
        for host in
            ["example.com", "localhost.example.com", "10.0.0.1", "0.0.0.0:1", "[::]", "", "a b", "127.0.0.1.nip.io"]
        {
            assert!(!has(host, "0.0.0.0"), "{host}");
        }
        assert!(has("10.0.0.1:8787", "10.0.0.1") && !has("10.0.0.2", "10.0.0.1"));
    }
}
