-- The role that prefetchd logs in with, and all that it needs. Before Postgres 16 only a superuser may make it; a
-- managed Postgres has its own way to give REPLICATION (on Amazon RDS: GRANT rds_replication TO prefetchd).

DO $$
BEGIN
    -- Roles belong to the whole server, so another database may have made it already.
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'prefetchd') THEN
        -- REPLICATION lets it make its slot and read the stream. It gives no right to any table.
        -- No password is set here: give it one (\password prefetchd), or let pg_hba.conf say how it logs in.
        CREATE ROLE prefetchd LOGIN REPLICATION;
    END IF;
END
$$;

-- REPLICATION can read every table's changes. So that the role that has it reads no table itself, and the one that reads has no
-- REPLICATION, make two (docs/operating.md, "Two roles"): leave out the GRANT below, name a second role in
-- postgres.reader_url, and
--     CREATE ROLE cache_reader LOGIN;
--     GRANT SELECT ON categories TO cache_reader;

-- The first load, and every verification, read the rows with COPY. Nothing is ever written, so nothing else is granted.
GRANT SELECT ON categories TO prefetchd;
