//! How the stream describes the tables: which relation is whose, and how its rows become hashes.

use crate::checkpoint::Blocked;
use crate::plan::mapping::Mapping;
use crate::schema::{Oid, Relation, TableId, TableSpec};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

pub(super) struct Shapes {
    specs: Arc<[TableSpec]>,
    by_oid: HashMap<Oid, TableId>,
    /// Types whose text is `t` or `f`.
    booleans: HashSet<Oid>,
    /// By table, as the stream last described it.
    shapes: Vec<Option<Shape>>,
}

struct Shape {
    relation: Arc<Relation>,
    /// Or why its rows cannot become hashes.
    mapping: Result<Arc<Mapping>, Blocked>,
}

impl Shape {
    fn bind(spec: &TableSpec, relation: Arc<Relation>, booleans: &HashSet<Oid>) -> Self {
        let mapping = Mapping::bind(spec, &relation, booleans);
        let mapping = mapping.map(Arc::new).map_err(|why| Blocked::from_message(&why.to_string()));
        Shape { relation, mapping }
    }
}

impl Shapes {
    pub fn new(specs: Arc<[TableSpec]>, booleans: HashSet<Oid>) -> Self {
        let shapes = specs.iter().map(|_| None).collect();
        Shapes { specs, by_oid: HashMap::new(), booleans, shapes }
    }

    /// Nothing is loaded because of it before a change comes in that shape: a replay begins with shapes of the past.
    pub fn describe(&mut self, relation: Arc<Relation>) {
        let Some(spec) = self.specs.iter().find(|spec| spec.table == relation.name) else {
            self.by_oid.remove(&relation.oid);
            return;
        };
        // A table dropped and made again has a new oid under the old name.
        self.by_oid.retain(|_, other| *other != spec.id);
        self.by_oid.insert(relation.oid, spec.id);
        self.shapes[spec.id.index()] = Some(Shape::bind(spec, relation, &self.booleans));
    }

    /// More types may turn out to be boolean.
    pub fn learn_booleans(&mut self, booleans: HashSet<Oid>) {
        let known = self.booleans.len();
        self.booleans.extend(booleans);
        if self.booleans.len() == known {
            return;
        }
        for (spec, shape) in self.specs.iter().zip(&mut self.shapes) {
            *shape = shape.take().map(|shape| Shape::bind(spec, shape.relation, &self.booleans));
        }
    }

    pub fn table(&self, oid: Oid) -> Option<TableId> {
        self.by_oid.get(&oid).copied()
    }

    /// The mapping for a change of this relation, where it is one of ours.
    pub fn mapping(&self, oid: Oid) -> Option<&Result<Arc<Mapping>, Blocked>> {
        self.shapes[self.table(oid)?.index()].as_ref().map(|shape| &shape.mapping)
    }

    /// Of the table's present mapping.
    pub fn fingerprint(&self, table: TableId) -> Option<u64> {
        let shape = self.shapes[table.index()].as_ref()?;
        shape.mapping.as_ref().ok().map(|mapping| mapping.fingerprint)
    }
}
