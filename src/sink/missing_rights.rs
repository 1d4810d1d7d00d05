//! What a user of Redis lacks, as a fact and as the command that grants it.

use crate::remedy::RedisCommand;
use std::fmt;

/// The rights that the user lacks, in the notation of ACL SETUSER.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Missing {
    pub commands: Vec<&'static str>,
    /// `cache:product:*`.
    pub patterns: Vec<String>,
    /// MULTI is denied, so the other commands could not be tried.
    pub only_begun: bool,
    /// The nodes of a cluster on which that is so, if it is not so on all of them: they do not replicate users.
    pub on: Vec<String>,
}

impl Missing {
    pub(super) fn of_command(name: &'static str) -> Self {
        Missing { commands: vec![name], ..Missing::default() }
    }

    pub(super) fn of_pattern(pattern: String) -> Self {
        Missing { patterns: vec![pattern], ..Missing::default() }
    }

    pub fn is_empty(&self) -> bool {
        self.commands.is_empty() && self.patterns.is_empty()
    }

    pub(super) fn command(&mut self, name: &'static str) {
        if !self.commands.contains(&name) {
            self.commands.push(name);
        }
    }

    pub(super) fn pattern(&mut self, pattern: String) {
        if !self.patterns.contains(&pattern) {
            self.patterns.push(pattern);
        }
    }

    /// Adds what is missing on one node of a cluster.
    pub(super) fn add(&mut self, node: String, missing: Missing) {
        if missing.is_empty() {
            return;
        }
        missing.commands.into_iter().for_each(|name| self.command(name));
        missing.patterns.into_iter().for_each(|pattern| self.pattern(pattern));
        self.only_begun |= missing.only_begun;
        self.on.push(node);
    }

    /// Returns the command that grants what is missing.
    pub(super) fn remedy(&self, user: &str) -> String {
        let rules = self.patterns.iter().map(|pattern| format!("~{pattern}"));
        let rules: Vec<String> = rules.chain(self.commands.iter().map(|command| format!("+{command}"))).collect();
        let words: Vec<&str> = ["ACL", "SETUSER", user].into_iter().chain(rules.iter().map(String::as_str)).collect();
        let further =
            if self.only_begun { " (then check again: without MULTI the others could not be tried)" } else { "" };
        format!("{}{further}", RedisCommand(&words))
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut facts = Vec::new();
        if !self.commands.is_empty() {
            facts.push(format!("may not run {}", self.commands.join(", ")));
        }
        if !self.patterns.is_empty() {
            facts.push(format!("may not use keys like {}", self.patterns.join(", ")));
        }
        f.write_str(&facts.join(" and "))?;
        if !self.on.is_empty() {
            write!(f, " on {}", self.on.join(", "))?;
        }
        Ok(())
    }
}
