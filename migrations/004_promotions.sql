-- A second, empty table for demonstrations that need two: a transaction that starts a promotion and features its
-- category must appear in Redis as a whole. Only the demo applies this file.

CREATE TABLE IF NOT EXISTS promotions (
    id          text PRIMARY KEY,
    category_id text NOT NULL REFERENCES categories (id) ON DELETE CASCADE,
    headline    text NOT NULL
);

GRANT SELECT ON promotions TO prefetchd;

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_publication_tables
                   WHERE pubname = 'prefetchd' AND schemaname = 'public' AND tablename = 'promotions') THEN
        ALTER PUBLICATION prefetchd ADD TABLE promotions;
    END IF;
END
$$;
