-- The table of the demo: a small lookup table that is read much more often than it is written.
-- Running these files again changes nothing.

CREATE TABLE IF NOT EXISTS categories (
    -- The primary key is the replica identity: the columns by which an UPDATE or DELETE in the stream identifies its
    -- row, and of which the Redis key consists. A table without one cannot be followed.
    id            text PRIMARY KEY,
    name          text NOT NULL,
    display_order integer,
    featured      boolean,
    parent_id     text REFERENCES categories (id)
);

INSERT INTO categories (id, name, display_order, featured, parent_id) VALUES
    ('cat-001', 'Beverages',   1, true,  NULL),
    ('cat-002', 'Bakery',      2, false, NULL),
    ('cat-003', 'Produce',     3, true,  NULL),
    ('cat-004', 'Household',   4, false, NULL),
    ('cat-005', 'Coffee, tea', 5, true,  'cat-001')
ON CONFLICT (id) DO NOTHING;
