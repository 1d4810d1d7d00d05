-- What of the table goes into the stream. Made by the table's owner, so that prefetchd needs no right to the database.
-- It must be older than the replication slot: a slot cannot decode what was written before its publication existed.

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_publication WHERE pubname = 'prefetchd') THEN
        -- publish_via_partition_root: changes of a partition arrive under the name of the partitioned table, which is
        -- the one that the configuration names. Without partitions it makes no difference.
        CREATE PUBLICATION prefetchd FOR TABLE categories WITH (publish_via_partition_root = true);
    END IF;
END
$$;
