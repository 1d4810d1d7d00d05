//! What a session knows of the types of columns: the stream names them by OID only.

use super::row_type::{Inexact, JsonType};
use crate::schema::Oid;
use std::collections::{HashMap, HashSet};

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KnownTypes {
    /// Types whose text is `t` or `f`: boolean and the domains over it.
    pub booleans: HashSet<Oid>,
    /// What the columns of tables become whose format is JSON, or why that cannot be reproduced.
    pub in_json: HashMap<Oid, Result<JsonType, Inexact>>,
}

impl KnownTypes {
    /// Takes over what was found later. Returns whether anything is new.
    pub fn learn(&mut self, found: KnownTypes) -> bool {
        let mut is_new = false;
        for oid in found.booleans {
            is_new |= self.booleans.insert(oid);
        }
        for (oid, json) in found.in_json {
            is_new |= self.in_json.get(&oid) != Some(&json);
            self.in_json.insert(oid, json);
        }
        is_new
    }
}
