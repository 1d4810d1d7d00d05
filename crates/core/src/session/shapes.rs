//! How the stream describes the tables: which relation belongs to which table, and how its rows become hashes.

use crate::checkpoint::Blocked;
use crate::plan::mapping::Mapping;
use crate::schema::{Oid, Relation, TableId, TableSpec};
use crate::typed::known::KnownTypes;
use std::collections::HashMap;
use std::sync::Arc;

pub(super) struct Shapes {
    specs: Arc<[TableSpec]>,
    by_oid: HashMap<Oid, TableId>,
    types: KnownTypes,
    /// Indexed by table, as the stream last described them.
    shapes: Vec<Option<Shape>>,
}

struct Shape {
    relation: Arc<Relation>,
    /// Or why its rows cannot be written.
    mapping: Result<Arc<Mapping>, Blocked>,
}

impl Shape {
    fn bind(spec: &TableSpec, relation: Arc<Relation>, types: &KnownTypes) -> Self {
        let mapping = Mapping::bind(spec, &relation, types);
        let mapping = mapping.map(Arc::new).map_err(|why| Blocked::from_message(&why.to_string()));
        Shape { relation, mapping }
    }
}

impl Shapes {
    pub fn new(specs: Arc<[TableSpec]>, types: KnownTypes) -> Self {
        let shapes = specs.iter().map(|_| None).collect();
        Shapes { specs, by_oid: HashMap::new(), types, shapes }
    }

    /// Takes a new description. It triggers no load until a change with these columns arrives, because a replay begins
    /// with old descriptions.
    pub fn describe(&mut self, relation: Arc<Relation>) {
        let Some(spec) = self.specs.iter().find(|spec| spec.table == relation.name) else {
            self.by_oid.remove(&relation.oid);
            return;
        };
        // A table that was dropped and created again has a new OID under its old name.
        self.by_oid.retain(|_, other| *other != spec.id);
        self.by_oid.insert(relation.oid, spec.id);
        self.shapes[spec.id.index()] = Some(Shape::bind(spec, relation, &self.types));
    }

    /// Takes over what a load has found out about types.
    pub fn learn_types(&mut self, found: KnownTypes) {
        if !self.types.learn(found) {
            return;
        }
        for (spec, shape) in self.specs.iter().zip(&mut self.shapes) {
            *shape = shape.take().map(|shape| Shape::bind(spec, shape.relation, &self.types));
        }
    }

    pub fn table(&self, oid: Oid) -> Option<TableId> {
        self.by_oid.get(&oid).copied()
    }

    /// Returns the mapping for changes of this relation, if its table is configured.
    pub fn mapping(&self, oid: Oid) -> Option<&Result<Arc<Mapping>, Blocked>> {
        self.shapes[self.table(oid)?.index()].as_ref().map(|shape| &shape.mapping)
    }

    /// Returns the fingerprint of the table's present mapping.
    pub fn fingerprint(&self, table: TableId) -> Option<u64> {
        let shape = self.shapes[table.index()].as_ref()?;
        shape.mapping.as_ref().ok().map(|mapping| mapping.fingerprint)
    }
}
