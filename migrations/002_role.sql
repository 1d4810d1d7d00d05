-- The role that prefetchd logs in with, and everything that it needs. Before Postgres 16, only a superuser may create
-- it; a managed Postgres has its own way to grant REPLICATION (on Amazon RDS: GRANT rds_replication TO prefetchd).

DO $$
BEGIN
    -- Roles belong to the whole server, so another database may have created it already.
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'prefetchd') THEN
        -- REPLICATION lets it create its slot and read the stream. It gives no right to any table.
        -- No password is set here: set one (\password prefetchd), or configure in pg_hba.conf how it logs in.
        CREATE ROLE prefetchd LOGIN REPLICATION;
    END IF;
END
$$;

-- REPLICATION gives access to the changes of every table. To keep the role that has it from reading tables itself, and
-- the role that reads from having REPLICATION, create two roles (docs/operating.md, "Two roles"): leave out the GRANT
-- below, put a second role into postgres.reader_url, and run
--     CREATE ROLE cache_reader LOGIN;
--     GRANT SELECT ON categories TO cache_reader;

-- The first load and every verification read the rows with COPY. Nothing is ever written, so nothing else is granted.
GRANT SELECT ON categories TO prefetchd;
