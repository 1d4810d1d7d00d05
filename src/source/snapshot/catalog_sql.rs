//! The catalog queries, as SQL.
//!
//! Every name is in `pg_catalog`, to which the session's `search_path` is pinned. [`super::catalog`] interprets the
//! answers, by the order of the columns here.

use crate::loader::range::Sizes;
use crate::schema::QualifiedName;
use crate::source::answer::quoted;
use crate::source::slot::MAY_REPLICATE;
use postgres_protocol::escape::escape_literal;

/// A table to be described.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    pub name: &'a QualifiedName,
    /// The columns that the configuration selects; none means all.
    pub chosen: &'a [String],
}

/// How many of the inheriting tables are named.
const HEIRS_NAMED: u32 = 3;

/// The columns of the primary key of `c`, or of its identity index: as RelationGetIndexList chooses it, which excludes
/// deferrable and invalid ones.
const IDENTITY: &str = "(SELECT json_agg(a.attname ORDER BY k.place)
           FROM pg_index i
          CROSS JOIN LATERAL unnest(i.indkey) WITH ORDINALITY AS k(attnum, place)
           JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
          WHERE i.indrelid = c.oid AND i.indisvalid AND i.indimmediate AND k.place <= i.indnkeyatts
            AND CASE c.relreplident WHEN 'i' THEN i.indisreplident WHEN 'n' THEN false ELSE i.indisprimary END)";

/// Four columns about `c` for [`readable`]. LOCK TABLE and `ctid` require the privilege on the whole table.
const RIGHTS: &str = "has_schema_privilege(c.relnamespace, 'USAGE'), has_table_privilege(c.oid, 'SELECT'),
               CASE WHEN NOT has_table_privilege(c.oid, 'SELECT') THEN
                   (SELECT json_agg(h.attname) FROM pg_attribute h
                     WHERE h.attrelid = c.oid AND h.attnum > 0 AND NOT h.attisdropped
                       AND NOT has_column_privilege(c.oid, h.attnum, 'SELECT')) END,
               row_security_active(c.oid)";

/// A recursive query for the tables of `this` and all their partitions: place and oid. Unlike pg_partition_tree(), it
/// waits for no lock.
const TREE: &str = "SELECT place, oid FROM this
         UNION ALL
        SELECT tree.place, i.inhrelid
          FROM tree JOIN pg_class k ON k.oid = tree.oid AND k.relkind = 'p'
          JOIN pg_inherits i ON i.inhparent = tree.oid AND NOT i.inhdetachpending";

/// A query for the tables of the publication, one row each: oid, column numbers, row filter. The same as
/// `pg_publication_tables`, whose plan may compute the whole list once for each table. Servers before 15 have neither
/// columns nor filters: both names then mean those of `older`.
fn listed_sql(publication: &str) -> String {
    format!(
        "SELECT listed.* FROM (VALUES (NULL::int2vector, NULL::pg_node_tree)) older(attrs, qual)
          CROSS JOIN LATERAL (
                SELECT relid, attrs, qual
                  FROM pg_publication p CROSS JOIN LATERAL pg_get_publication_tables(p.pubname::text)
                 WHERE p.pubname = {}) listed",
        escape_literal(publication)
    )
}

pub(super) fn heads_sql(asked: &[Asked<'_>], publication: &str) -> String {
    let name = |(place, Asked { name, .. }): (usize, &Asked<'_>)| {
        format!("({place}, {}, {})", escape_literal(&name.schema), escape_literal(&name.table))
    };
    let names = asked.iter().enumerate().map(name).collect::<Vec<_>>().join(", ");
    let (listed, planned_code) = (listed_sql(publication), planned_code("SELECT place, oid FROM family"));
    let publication = escape_literal(publication);
    let heirs_count =
        "CASE WHEN c.relkind = 'p' THEN 0 ELSE (SELECT count(*) FROM pg_inherits i WHERE i.inhparent = c.oid) END";
    // Schema and name alternate.
    let heirs_names = format!(
        "(SELECT json_agg(h.part ORDER BY h.oid, h.place)
            FROM (SELECT i.oid, p.part, p.place
                    FROM (SELECT h.oid, hn.nspname, h.relname
                            FROM pg_inherits i JOIN pg_class h ON h.oid = i.inhrelid
                            JOIN pg_namespace hn ON hn.oid = h.relnamespace
                           WHERE c.relkind <> 'p' AND i.inhparent = c.oid ORDER BY h.oid LIMIT {HEIRS_NAMED}) i
                   CROSS JOIN LATERAL (VALUES (i.nspname, 1), (i.relname, 2)) p(part, place)) h)"
    );
    format!(
        "WITH RECURSIVE this AS MATERIALIZED (
            SELECT w.place, c.* FROM (VALUES {names}) w(place, schema, name)
              JOIN pg_namespace n ON n.nspname = w.schema::name
              JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = w.name::name),
        tree(place, oid) AS ({TREE}),
        ancestors(place, oid) AS (
            SELECT c.place, a.relid FROM this c CROSS JOIN LATERAL pg_partition_ancestors(c.oid) a
             WHERE c.relispartition AND a.relid <> c.oid),
        -- The bounds of a partition that has partitions are planned, too, in terms of its ancestors' keys.
        family(place, oid) AS (SELECT place, oid FROM tree UNION ALL SELECT place, oid FROM ancestors),
        planned(place, code) AS ({planned_code}),
        listed(oid, attrs, qual) AS MATERIALIZED ({listed}),
        whole(place, oid) AS (SELECT a.place, min(l.oid) FROM ancestors a JOIN listed l ON l.oid = a.oid GROUP BY 1),
        part(place, oid) AS (
            SELECT t.place, min(l.oid) FROM tree t JOIN this c ON c.place = t.place AND c.oid <> t.oid
              JOIN listed l ON l.oid = t.oid GROUP BY 1),
        leaves(place, count) AS (SELECT place, count(*) FROM tree GROUP BY 1)
        SELECT c.oid, c.relkind, c.relpersistence, c.relreplident, pg_relation_is_publishable(c.oid), {IDENTITY},
               l.oid IS NOT NULL, pg_get_expr(l.qual, l.oid), whole.oid::regclass, part.oid::regclass, {RIGHTS}, current_user,
               -- Row filter and column list, since 15. Of the filter's tree the columns that it reads.
               (SELECT json_agg(DISTINCT f.attname)
                  FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = c.oid
                 CROSS JOIN LATERAL regexp_matches(to_jsonb(r) ->> 'prqual', ':varattno ([0-9]+)', 'g') var
                  JOIN pg_attribute f ON f.attrelid = c.oid AND f.attnum = var[1]::int
                 WHERE p.pubname = {publication}),
               EXISTS (SELECT FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = c.oid
                        WHERE p.pubname = {publication} AND to_jsonb(r) ->> 'prattrs' IS NOT NULL),
               (SELECT p.oid || ' ' || p.xmin || ' ' || coalesce(r.oid, 0) FROM pg_publication p
                  LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = c.oid
                 WHERE p.pubname = {publication}),
               {heirs_count}, {heirs_names},
               (SELECT json_agg(g.attname) FROM pg_attribute g
                 WHERE g.attrelid = c.oid AND g.attgenerated <> '' AND NOT g.attisdropped),
               planned.code, c.place, c.relnatts, leaves.count
          FROM this c JOIN leaves ON leaves.place = c.place LEFT JOIN planned ON planned.place = c.place
          LEFT JOIN listed l ON l.oid = c.oid LEFT JOIN whole ON whole.place = c.place
          LEFT JOIN part ON part.place = c.place"
    )
}

/// A query for the columns that the publication sends of these tables, in the order in which it sends them.
pub(super) fn columns_sql(these: &str, publication: &str) -> String {
    let listed = listed_sql(publication);
    let types = types_sql();
    format!(
        "WITH RECURSIVE this AS MATERIALIZED ({these}),
        listed(oid, attrs, qual) AS MATERIALIZED ({listed}),
        a AS MATERIALIZED (
            SELECT c.place, a.* FROM this c JOIN pg_attribute a ON a.attrelid = c.oid LEFT JOIN listed l ON l.oid = c.oid
             WHERE a.attnum > 0 AND NOT a.attisdropped AND (l.attrs IS NULL OR a.attnum = ANY (l.attrs))
               -- Before 18 never published, whatever 15 says in attrs; from 18 on attrs is exact, where it is there.
               AND (a.attgenerated = '' OR (current_setting('server_version_num')::int >= 180000
                                            AND a.attnum = ANY (l.attrs)))),
        -- Each type once, however many columns are of it: itself, and what it is a domain over, through any depth.
        chain(type, oid, typtype, typbasetype) AS (
            SELECT t.oid, t.oid, t.typtype, t.typbasetype FROM pg_type t WHERE t.oid IN (SELECT a.atttypid FROM a)
             UNION ALL
            SELECT chain.type, t.oid, t.typtype, t.typbasetype FROM chain JOIN pg_type t ON t.oid = chain.typbasetype
             WHERE chain.typtype = 'd'),
        -- The types that its values are made of. Those of the server itself, below 16384, never change.
        reached(type, oid) AS (
            SELECT a.atttypid, a.atttypid FROM a WHERE a.atttypid >= 16384
             UNION
            SELECT reached.type, part.oid
              FROM reached JOIN pg_type t ON t.oid = reached.oid
             CROSS JOIN LATERAL (
                SELECT t.typbasetype UNION ALL SELECT t.typelem
                 UNION ALL
                SELECT x.atttypid FROM pg_attribute x
                 WHERE x.attrelid = t.typrelid AND x.attnum > 0 AND NOT x.attisdropped
                 UNION ALL
                SELECT g.rngsubtype FROM pg_range g WHERE g.rngtypid = t.oid
                 UNION ALL
                SELECT g.rngtypid FROM pg_range g WHERE g.rngmultitypid = t.oid) part(oid)
             WHERE part.oid >= 16384),
        made_of(type, what) AS (
            SELECT reached.type, reached.oid || ' ' || coalesce(
                       (SELECT json_agg(e.enumlabel ORDER BY e.oid)::text FROM pg_enum e WHERE e.enumtypid = t.oid),
                       (SELECT json_agg(json_build_array(x.attnum, x.atttypid, x.atttypmod) ORDER BY x.attnum)::text
                          FROM pg_attribute x
                         WHERE x.attrelid = t.typrelid AND x.attnum > 0 AND NOT x.attisdropped), '')
              FROM reached JOIN pg_type t ON t.oid = reached.oid),
        types AS MATERIALIZED (
            {types}),
        {JSON_TYPES}
        SELECT a.place, a.attname, a.atttypid, a.atttypmod, types.base, types.boolean, types.equals, types.greater,
               types.at_most, a.attnum || ' ' || coalesce(types.made_of::text, ''), types.from_text,
               a.attnotnull, in_json.parts
          FROM a JOIN types ON types.type = a.atttypid JOIN in_json ON in_json.type = a.atttypid
         ORDER BY a.place, a.attnum"
    )
}

/// The part of [`columns_sql`] about what each type becomes in JSON: an array of the types that its values are made of, each
/// of them as `[oid, kind, what follows]`. The kinds are those of [`super::catalog::json_type`].
///
/// `json_categorize_type` in json.c, which looks through domains.
const JSON_TYPES: &str = "part(type, oid) AS (
            SELECT DISTINCT a.atttypid, a.atttypid FROM a
             UNION
            SELECT part.type, next.oid
              FROM part JOIN pg_type t ON t.oid = part.oid
             CROSS JOIN LATERAL (
                SELECT t.typbasetype WHERE t.typtype = 'd'
                 UNION ALL
                SELECT t.typelem WHERE t.typsubscript = 'array_subscript_handler'::regproc
                 UNION ALL
                SELECT x.atttypid FROM pg_attribute x
                 WHERE t.typtype = 'c' AND x.attrelid = t.typrelid AND x.attnum > 0 AND NOT x.attisdropped) next(oid)),
        in_json(type, parts) AS (
            SELECT part.type, json_agg(CASE
                       WHEN t.typtype = 'd' THEN json_build_array(t.oid::int8, 'domain', t.typbasetype::int8)
                       WHEN t.oid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype, 'float4'::regtype, 'float8'::regtype,
                                      'numeric'::regtype) THEN json_build_array(t.oid::int8, 'number')
                       WHEN t.oid = 'bool'::regtype THEN json_build_array(t.oid::int8, 'boolean')
                       WHEN t.oid = 'timestamp'::regtype THEN json_build_array(t.oid::int8, 'timestamp')
                       WHEN t.oid = 'timestamptz'::regtype THEN json_build_array(t.oid::int8, 'timestamptz')
                       WHEN t.oid IN ('json'::regtype, 'jsonb'::regtype) THEN json_build_array(t.oid::int8, 'json')
                       WHEN t.oid IN ('int2vector'::regtype, 'oidvector'::regtype)
                       THEN json_build_array(t.oid::int8, 'vector', t.typelem::int8)
                       WHEN t.typsubscript = 'array_subscript_handler'::regproc
                       THEN json_build_array(t.oid::int8, 'array', t.typelem::int8,
                                             (SELECT e.typdelim FROM pg_type e WHERE e.oid = t.typelem))
                       WHEN t.typtype = 'c' THEN json_build_array(t.oid::int8, 'composite', (
                            SELECT json_agg(json_build_array(x.attname, x.atttypid::int8) ORDER BY x.attnum)
                              FROM pg_attribute x
                             WHERE x.attrelid = t.typrelid AND x.attnum > 0 AND NOT x.attisdropped))
                       -- FirstNormalObjectId; a cast WITH INOUT is not called.
                       WHEN t.oid >= 16384 AND EXISTS (
                            SELECT FROM pg_cast k
                             WHERE k.castsource = t.oid AND k.casttarget = 'json'::regtype AND k.castmethod = 'f')
                       THEN json_build_array(t.oid::int8, 'cast', t.oid::regtype::text)
                       ELSE json_build_array(t.oid::int8, 'string') END)
              FROM part JOIN pg_type t ON t.oid = part.oid
             GROUP BY part.type)";

/// The part of [`columns_sql`] about types: their names in SQL, how they compare, and how a text becomes a value.
fn types_sql() -> String {
    // The type's own comparison operators, by their strategy in its default btree operator class.
    let operator = |strategy: u8, otherwise: &str| {
        format!(
            "coalesce((SELECT format('OPERATOR(%I.%s)', n.nspname, o.oprname)
                           FROM pg_opclass k
                           JOIN pg_amop m ON m.amopfamily = k.opcfamily AND m.amopstrategy = {strategy}
                                         AND m.amoplefttype = k.opcintype AND m.amoprighttype = k.opcintype
                           JOIN pg_operator o ON o.oid = m.amopopr JOIN pg_namespace n ON n.oid = o.oprnamespace
                          WHERE k.opcintype = base.oid AND k.opcdefault
                            AND k.opcmethod = (SELECT oid FROM pg_am WHERE amname = 'btree')), 'OPERATOR(pg_catalog.{otherwise})')"
        )
    };
    let (equals, greater, at_most) = (operator(3, "="), operator(5, ">"), operator(2, "<="));
    format!(
        "SELECT base.type, format('%I.%I', bn.nspname, bt.typname) AS base, base.oid = 'bool'::regtype AS boolean,
                   {equals} AS equals, {greater} AS greater, {at_most} AS at_most,
                   (SELECT hashtextextended(string_agg(of.what, ';' ORDER BY of.what), 0) FROM made_of of
                     WHERE of.type = base.type) AS made_of,
                   CASE WHEN base.oid < 16384 THEN 'cast'
                        WHEN bt.typcategory = 'A' THEN 'never'
                        -- A composite type may get an attribute of a domain at any time.
                        WHEN EXISTS (SELECT FROM reached r JOIN pg_type t ON t.oid = r.oid
                                      WHERE r.type = base.type AND t.typtype IN ('c', 'd') AND r.oid NOT IN
                                            (SELECT over.oid FROM chain over WHERE over.type = base.type AND over.typtype = 'd'))
                        THEN 'never'
                        WHEN EXISTS (SELECT FROM reached r JOIN pg_range g ON r.oid IN (g.rngtypid, g.rngmultitypid)
                                      WHERE r.type = base.type
                                        AND (g.rngcanonical::oid >= 16384 OR g.rngsubdiff::oid >= 16384))
                        THEN 'never'
                        ELSE 'literal' END AS from_text
              FROM chain base
              JOIN pg_type bt ON bt.oid = base.oid JOIN pg_namespace bn ON bn.oid = bt.typnamespace
             WHERE base.typtype <> 'd'"
    )
}

/// A query for the relations that hold the rows of these tables.
pub(super) fn leaves_sql(these: &str, sizes: Sizes) -> String {
    let (pages, bytes) = match sizes {
        Sizes::Measured => ("pg_relation_size(c.oid) / current_setting('block_size')::int", "pg_table_size(c.oid)"),
        Sizes::Remembered => {
            ("greatest(c.relpages, 0)", "greatest(c.relpages, 0) * current_setting('block_size')::bigint")
        }
    };
    format!(
        "WITH RECURSIVE this AS MATERIALIZED ({these}),
        -- As above, with the transactions that attached a partition and those that it is a part of.
        tree(place, oid, attached) AS (
            SELECT place, oid, '' FROM this
             UNION ALL
            SELECT tree.place, i.inhrelid, tree.attached || ' ' || i.xmin
              FROM tree JOIN pg_class k ON k.oid = tree.oid AND k.relkind = 'p'
              JOIN pg_inherits i ON i.inhparent = tree.oid AND NOT i.inhdetachpending)
        SELECT tree.place, c.oid, n.nspname, c.relname, c.relkind, c.relpersistence, c.relreplident, {IDENTITY},
               pg_relation_filenode(c.oid), {pages}, {bytes}, c.relpages, c.reltuples::float8, {RIGHTS},
               -- The function answers as of now, whatever the snapshot sees.
               CASE WHEN pg_relation_filenode(c.oid) = c.relfilenode THEN c.xmin::text END, tree.attached
          FROM tree JOIN pg_class c ON c.oid = tree.oid JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind <> 'p'
         ORDER BY tree.place, c.oid"
    )
}

/// A query for functions that another role may replace, and that Postgres calls as the reading role when it merely
/// plans to read one of `relations` (a query of place and oid), one for each place: the planner simplifies the
/// expressions of indexes, statistics and partition keys, and calls IMMUTABLE functions of constants to do so. Returns
/// no row if there is none, or if neither the reading role nor any role that it can become may replicate: then there is
/// little to gain.
///
/// `eval_const_expressions` in relcache.c, plancat.c and partcache.c
pub(super) fn planned_code(relations: &str) -> String {
    format!(
        "SELECT f.place, min(p.oid::regprocedure::text)
            FROM ({relations}) f(place, oid)
           CROSS JOIN LATERAL (
                  SELECT 'pg_class'::regclass AS class, i.indexrelid AS oid FROM pg_index i
                   WHERE i.indrelid = f.oid AND (i.indexprs IS NOT NULL OR i.indpred IS NOT NULL)
                   UNION ALL
                  SELECT 'pg_statistic_ext'::regclass, s.oid FROM pg_statistic_ext s WHERE s.stxrelid = f.oid
                   UNION ALL
                  SELECT 'pg_class'::regclass, k.partrelid FROM pg_partitioned_table k
                   WHERE k.partrelid = f.oid) holder
            JOIN pg_depend d ON d.classid = holder.class AND d.objid = holder.oid
            LEFT JOIN pg_operator o ON o.oid = d.refobjid AND d.refclassid = 'pg_operator'::regclass
            JOIN pg_proc p ON p.oid = coalesce(o.oprcode, d.refobjid)
                          AND (d.refclassid = 'pg_proc'::regclass OR o.oid IS NOT NULL)
            JOIN pg_roles owner ON owner.oid = p.proowner AND NOT owner.rolsuper AND owner.rolname <> current_user
           WHERE {MAY_REPLICATE}
           GROUP BY 1"
    )
}

/// [`planned_code`] for the table that has this name now, its partitions, and the tables of which it is a partition.
pub(super) fn planned_now(table: &QualifiedName) -> String {
    let now = format!("to_regclass({})", escape_literal(&quoted(table)));
    let family = format!(
        "SELECT 0, {now}::oid UNION SELECT 0, t.relid FROM pg_partition_tree({now}) t \
         UNION SELECT 0, a.relid FROM pg_partition_ancestors({now}) a"
    );
    format!("(SELECT code FROM ({}) planned(place, code))", planned_code(&family))
}
