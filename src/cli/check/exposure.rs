//! What the configuration exposes to the network, and to other users of this machine.
//!
//! It examines the configuration and this process, and contacts no server.

use super::{Failure, Findings};
use crate::code::Code;
use crate::config::Config;
use crate::password::Password;
use crate::sink::connect::RedisTarget;
use crate::source::target::PostgresTarget;
use nix::unistd::geteuid;
use std::collections::HashMap;

pub(super) fn look(config: &Config, findings: &mut Findings) -> Result<(), Failure> {
    if geteuid().is_root() {
        findings.warn(
            Code::RunsAsRoot,
            "process: this runs as root, which prefetchd never needs: run the daemon as a user of its own, as \
             deploy/prefetchd.service does",
        )?;
    }
    // If the password comes from elsewhere, that of psql is an administrator's, which the daemon need not inherit.
    let is_literal = matches!(config.postgres.target.password, Password::Literal(_));
    let variables = secret_variables(|name| std::env::var(name).ok());
    for name in variables.into_iter().filter(|name| is_literal || *name != "PGPASSWORD") {
        findings.warn(
            Code::SecretExposed,
            format!(
                "environment: {name} holds a password, which every program started from here inherits, and \
             systemctl show prints for a unit: use postgres.password_file and redis.password_file"
            ),
        )?;
    }
    let postgres = &config.postgres;
    for (key, target) in [("url", Some(&postgres.target)), ("reader_url", postgres.reader.as_ref())] {
        if let Some(target) = target.filter(|target| target.is_unverified()) {
            findings.warn(Code::TlsUnverified, format!(
                "postgres: nothing verifies the identity of {}, so a third party on the network can impersonate it: set \
                 sslmode=verify-full in postgres.{key}",
                target.describe()
            ))?;
        }
    }
    let redis = &config.redis.target;
    if redis.is_unverified() {
        findings.warn(Code::TlsUnverified, format!(
            "redis: nothing verifies the identity of {redis}, so a third party on the network can impersonate it: remove \
             insecure from redis.url, and name its CA with cacert"
        ))?;
    }
    if redis.sends_password_in_clear() {
        let text = format!("redis: password and rows go to {redis} in clear text: use rediss:// in redis.url");
        findings.warn(Code::RedisPlaintext, text)?;
    }
    Ok(())
}

/// Returns the variables that contain a password. `value` looks one up.
fn secret_variables(value: impl Fn(&str) -> Option<String>) -> Vec<&'static str> {
    let literal = |password: &Password| matches!(password, Password::Literal(_));
    let postgres = |url: &str| PostgresTarget::parse(url, &HashMap::new()).is_ok_and(|to| literal(&to.password));
    let redis = |url: &str| RedisTarget::parse(url).is_ok_and(|to| literal(&to.password));
    let holds = |name: &&str| {
        let Some(text) = value(name).filter(|text| !text.is_empty()) else { return false };
        match *name {
            "PREFETCHD__REDIS__URL" => redis(&text),
            "PGPASSWORD" => true,
            _ => postgres(&text),
        }
    };
    let names = ["PGPASSWORD", "PREFETCHD__POSTGRES__URL", "PREFETCHD__POSTGRES__READER_URL", "PREFETCHD__REDIS__URL"];
    names.into_iter().filter(holds).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_variables_with_a_password_are_named() {
        for (name, value, named) in [
            ("PGPASSWORD", "x", true),
            ("PGPASSWORD", "", false),
            ("PREFETCHD__POSTGRES__URL", "postgres://me:x@127.0.0.1/db", true),
            ("PREFETCHD__POSTGRES__URL", "host=/run user=me password=x", true),
            ("PREFETCHD__POSTGRES__URL", "postgres://me@127.0.0.1/db", false),
            ("PREFETCHD__POSTGRES__READER_URL", "postgres://me:x@127.0.0.1/db", true),
            ("PREFETCHD__REDIS__URL", "redis://:x@127.0.0.1/0", true),
            ("PREFETCHD__REDIS__URL", "redis://127.0.0.1/0", false),
        ] {
            let found = secret_variables(|asked| (asked == name).then(|| value.to_owned()));
            assert_eq!(found, if named { vec![name] } else { Vec::new() }, "{name}={value}");
        }
    }
}
